"""The indexer of a source, which examines every picture once and writes the catalog."""

import os
from pathlib import Path

import numpy as np

from sendvae_fast.data.catalog import catalog_file_at
from sendvae_fast.data.catalog_file import read_origin, write_catalog_file
from sendvae_fast.data.indexing.listing_parts import ListingParts, listing_sha256
from sendvae_fast.data.indexing.sandbox import SampleFacts, examine_parts
from sendvae_fast.data.sources.find import list_source
from sendvae_fast.data.sources.shards import CATALOG_NAME, is_pattern
from sendvae_fast.errors import UserError
from sendvae_fast.progress import Progress

CATALOG_SUFFIX = f".{CATALOG_NAME}"
NUM_PARTS, MIN_PART_SIZE, MAX_PART_SIZE = 64, 32, 4096
"""Enough parts for many workers; small ones lose little when the command is killed, large ones make few files."""


def index_source(
    where: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    quick: bool = False,
    label: str | None = None,
) -> bool:
    """Examine every picture at `where` and write the catalog `out`. A later call continues an interrupted one.

    Args:
        where: the pictures, as `list_source` takes them.
        out: path of the catalog.
        label: of the pictures' classes, as `list_source` takes it.
        num_workers: processes; by default one per available core.
        quick: read the pictures and their headers but do not decode them: damage further on goes unseen.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: as `list_source`; when `out` is something else or cannot be written.
    """
    if catalog_file_at(where) is not None:
        raise UserError(f"{where} is a catalog already; give the pictures, or look at it with `sendvae data check`")
    listing, out = list_source(where, label), Path(out)
    origin = {"indexed": listing_sha256(listing), "quick": quick}
    if out.exists():
        if read_origin(out) != origin:
            raise UserError(
                f"{out} exists and is not the catalog of these pictures as they are now; remove it to index them anew, "
                "or give another --out"
            )
        return False
    num_samples = len(listing.source)
    part_size = int(np.clip(num_samples // NUM_PARTS, MIN_PART_SIZE, MAX_PART_SIZE))
    parts = ListingParts(Path(f"{out}.parts"), listing, part_size, origin)
    num_bad = 0

    def count(facts: SampleFacts) -> None:
        nonlocal num_bad
        num_bad += facts.verdict.startswith("bad")
        progress.advance(1, bad=num_bad)

    with Progress("indexing", num_samples, unit="image", start=parts.num_done()) as progress:
        for number, facts in examine_parts(
            listing.source,
            [(number, parts.ids(number)) for number in parts.missing()],
            num_workers=num_workers or len(os.sched_getaffinity(0)),
            quick=quick,
            on_sample=count,
        ):
            parts.write(number, facts)
    write_catalog_file(out, listing, parts.collect(), origin)
    parts.remove()
    return True


def default_catalog(where: str | os.PathLike[str]) -> Path:
    """The path of a source's catalog, beside the source.

    Raises:
        UserError: for a pattern, which has no one place.
    """
    if is_pattern(str(where)):
        raise UserError(f"{where} is a pattern; say where its catalog goes, as in --out=train{CATALOG_SUFFIX}")
    path = Path(where).absolute()
    return path.with_name(path.name + CATALOG_SUFFIX)
