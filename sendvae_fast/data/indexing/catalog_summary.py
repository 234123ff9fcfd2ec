"""The summary of a catalog for people: counts, oddities, damage, duplicates."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc  # pyright does not know its functions, which are made at import

from sendvae_fast.data.catalog import Catalog

NUMBERS = re.compile(r"\d+")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class CatalogSummary:
    """Counts, oddities, damage and duplicates of a catalog."""

    kinds: dict[str, int]
    """How many samples have which verdict, the commonest first; numbers and names in verdicts stand as N and '...'."""
    out_of_the_ordinary: list[tuple[str, str]]
    """(where, verdict) of every sample that is bad, then of every odd one."""
    duplicates: list[list[str]]
    """Where samples of the same bytes lie, group by group."""
    class_counts: np.ndarray
    """Samples per class, int64 [num_classes]."""
    problems: list[str]
    """Damaged shards, and members that were passed over."""

    @property
    def is_good(self) -> bool:
        """Whether every sample decodes and nothing was damaged or passed over."""
        return not self.problems and not any(kind.startswith("bad") for kind in self.kinds)


def summarize(catalog: Catalog) -> CatalogSummary:
    """Summarize an indexed catalog."""
    assert catalog.verdicts is not None and catalog.facts is not None, "not an indexed catalog"
    verdicts = catalog.verdicts.tolist()
    unusual = [(catalog.locate(i), verdict) for i, verdict in enumerate(verdicts) if verdict != "ok"]
    return CatalogSummary(
        kinds=dict(Counter(QUOTED.sub("'...'", NUMBERS.sub("N", verdict)) for verdict in verdicts).most_common()),
        out_of_the_ordinary=sorted(unusual, key=lambda pair: pair[1].startswith("odd")),
        duplicates=[[catalog.locate(i) for i in group] for group in _duplicates(catalog.facts)],
        class_counts=np.bincount(catalog.labels, minlength=len(catalog.class_names)),
        problems=[*catalog.listing.damage, *catalog.listing.passed_over],
    )


def _duplicates(facts: pa.Table) -> list[list[int]]:
    """Groups of two and more sample ids of the same checksum."""
    table = pa.table({"sha256": facts["sha256"], "id": np.arange(len(facts))})
    table = table.filter(pc.is_valid(facts["sha256"]))  # pyright: ignore[reportAttributeAccessIssue]
    groups = table.group_by("sha256").aggregate([("id", "list")])["id_list"]
    several = pc.greater(pc.list_value_length(groups), 1)  # pyright: ignore[reportAttributeAccessIssue]
    return sorted(sorted(ids) for ids in groups.filter(several).to_pylist())
