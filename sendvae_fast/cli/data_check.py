"""Report odd and broken pictures of a catalog, or of a source without one.

    sendvae data check imagenet/train.catalog.parquet

A catalog is reported as it stands; a source without one is indexed first, as by `sendvae data index`. Exit code 0 when
every picture is readable, 1 when one is bad or a shard is damaged, or with `--jpeg_warnings` a JPEG has a warning.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sendvae_fast import checks
from sendvae_fast.data.catalog import Catalog, catalog_file_at
from sendvae_fast.data.indexing.catalog_summary import CatalogSummary, summarize
from sendvae_fast.data.indexing.index import index_source
from sendvae_fast.data.jpeg_warnings import jpegs_with_warnings
from sendvae_fast.data.sources.shards import CATALOG_NAME
from sendvae_fast.errors import UserError
from sendvae_fast.progress import Progress

POSITIONAL = "source"
NUM_EXTREME_CLASSES = 3


@dataclass(kw_only=True)
class Config:
    """The pictures to report on. Raises `UserError` for a value out of range."""

    source: str
    """Catalog, folder, file or pattern."""
    limit: int = 100
    """At most so many lines of each list."""
    jpeg_warnings: bool = False
    """Decode every JPEG again and list those that libjpeg warns of: damage in a scan that decodes, to wrong pixels. Not
    all such damage gives a warning."""

    def __post_init__(self) -> None:
        checks.at_least(0, self, "limit")


def run(config: Config) -> int:
    """Print the report; 0 when all is good."""
    catalog = _indexed(config.source)
    summary = summarize(catalog)
    print(f"{len(catalog)} samples in {len(catalog.class_names)} classes from {catalog.root}")
    for kind, count in summary.kinds.items():
        print(f"{count:>10}  {kind}")
    _print_classes(catalog, summary)
    _print_list("problems", summary.problems, config.limit)
    unusual = [f"{where}: {verdict}" for where, verdict in summary.out_of_the_ordinary]
    _print_list("bad and odd samples", unusual, config.limit)
    duplicates = [" = ".join(group) for group in summary.duplicates]
    _print_list("groups of samples with the same bytes", duplicates, config.limit)
    warnings = _jpeg_warnings(catalog) if config.jpeg_warnings else []
    _print_list("JPEGs that libjpeg warns of", warnings, config.limit)
    return 0 if summary.is_good and not warnings else 1


def _jpeg_warnings(catalog: Catalog) -> list[str]:
    """Where the JPEGs lie that have one, and what it says."""
    found = []
    with Progress("decoding JPEGs", len(catalog), unit="image") as progress:
        for sample_id, warning in jpegs_with_warnings(catalog, len(os.sched_getaffinity(0))):
            if warning is not None:
                found.append(f"{catalog.locate(sample_id)}: {warning}")
            progress.advance(sample_id + 1 - progress.done, warned=len(found))
    return found


def _indexed(source: str) -> Catalog:
    """The catalog at `source`, or a temporary one of its pictures."""
    if catalog_file_at(source) is None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / CATALOG_NAME
            index_source(source, out)
            return Catalog.open(out)
    catalog = Catalog.open(source)
    if catalog.facts is None:
        raise UserError(f"{source} was never indexed; check the pictures in {catalog.root} instead")
    return catalog


def _print_classes(catalog: Catalog, summary: CatalogSummary) -> None:
    """Print the sizes of all classes or, if there are many, of the smallest and the largest."""
    order = np.argsort(summary.class_counts, kind="stable").tolist()
    print(f"\nsamples per class: {summary.class_counts.min()} to {summary.class_counts.max()}")
    if len(order) > 2 * NUM_EXTREME_CLASSES:
        order = [*order[:NUM_EXTREME_CLASSES], *order[-NUM_EXTREME_CLASSES:]]
    for label in order:
        print(f"{summary.class_counts[label]:>10}  {catalog.class_names[label]}")


def _print_list(title: str, lines: list[str], limit: int) -> None:
    if lines:
        print(f"\n{title}: {len(lines)}")
        for line in lines[:limit]:
            print(f"  {line}")
        if len(lines) > limit:
            print(f"  ... and {len(lines) - limit} more; raise --limit to see them")
