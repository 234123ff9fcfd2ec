"""The packer of a catalog's samples into WebDataset tar shards, for storage that is slow at opening a million files.

    shard-00000.tar ...   000000042.JPEG (the picture) and 000000042.cls (its class number) per sample id
    catalog.parquet       the samples under their ids and names from before, with their verdicts
    attributes.csv        where the catalog has attributes

The bytes of a shard depend on the catalog and the options alone. Bad samples are packed as they are, so that ids stay.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sendvae_fast.data.attributes import write_attributes
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.catalog_file import read_origin, write_catalog_file
from sendvae_fast.data.decode import FORMAT_OF_EXTENSION, UnreadableImage
from sendvae_fast.data.indexing.listing_parts import ListingParts, listing_sha256
from sendvae_fast.data.indexing.sandbox import SampleFacts
from sendvae_fast.data.patience import read_patiently
from sendvae_fast.data.sources.base import Listing
from sendvae_fast.data.sources.shards import CATALOG_NAME
from sendvae_fast.data.sources.tar import list_tars
from sendvae_fast.errors import UserError
from sendvae_fast.files import staged
from sendvae_fast.processes import process_pool
from sendvae_fast.progress import Progress

PARTS_FOLDER = ".parts"
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
UNKNOWN_EXTENSION = ".jpg"
"""Extension for rows of parquet files without a path; their contents decide anyway."""


def pack_catalog(
    catalog: Catalog,
    out: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    shard_size: int = 1024,
    num_workers: int | None = None,
) -> bool:
    """Write shards of `catalog` and their catalog into the folder `out`. A later call continues an interrupted one.

    Args:
        image_size: pack the centre crop of so many pixels a side as PNG, without loss; by default the pictures' own
            bytes.
        shard_size: samples per shard.
        num_workers: processes; by default one per available core. They are spawned: call this from a script's
            `if __name__ == "__main__"` part.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: when the catalog was not indexed, a picture has changed since, or `out` holds something else.
    """
    out = Path(out)
    if catalog.facts is None:
        raise UserError(f"{catalog.root} was not indexed; run `sendvae data index` on it and pack the catalog it makes")
    origin = {"packed": listing_sha256(catalog.listing), "image_size": image_size, "shard_size": shard_size}
    if (out / CATALOG_NAME).exists():
        if read_origin(out / CATALOG_NAME) != origin:
            raise UserError(f"{out} holds shards of other samples or options; remove it or give another --out")
        return False
    if out.exists() and not (out / PARTS_FOLDER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds something else; give an empty or a new folder with --out")
    parts = ListingParts(out / PARTS_FOLDER, catalog.listing, shard_size, origin)
    jobs = [
        (number, (_shard_path(out, number), parts.ids(number), catalog.subset(parts.ids(number)), image_size))
        for number in parts.missing()
    ]
    with Progress("packing", len(catalog), unit="image", start=parts.num_done()) as progress:
        for number, facts in _write_shards(jobs, num_workers or len(os.sched_getaffinity(0))):
            parts.write(number, facts)
            progress.advance(len(facts))
    if catalog.attributes is not None:
        values = catalog.attributes.values.astype(int).tolist()
        write_attributes(out, catalog.attributes.names, zip(catalog.names, values, strict=True))
    shards = [_shard_path(out, number) for number in range(parts.count)]
    write_catalog_file(out / CATALOG_NAME, _packed_listing(shards, catalog), parts.collect(), origin)
    parts.remove()
    return True


def _shard_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.tar"


def _write_shards(jobs: list[tuple[int, tuple]], num_workers: int) -> Iterator[tuple[int, list[SampleFacts]]]:
    """The numbers of the jobs and what `_write_shard` returns for their arguments, as they get done."""
    if num_workers == 1:
        yield from ((number, _write_shard(*arguments)) for number, arguments in jobs)
        return
    pool = process_pool(num_workers)
    try:
        futures = {pool.submit(_write_shard, *arguments): number for number, arguments in jobs}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(path: Path, ids: np.ndarray, part: Catalog, image_size: int | None) -> list[SampleFacts]:
    """Write the samples of `part` under their `ids`; returns the facts about each as packed."""
    packed = []
    with staged(path) as unfinished, open(unfinished, "wb") as shard:
        for sample_id, label, (extension, data, facts) in zip(
            ids.tolist(), part.labels.tolist(), _contents(part, image_size), strict=True
        ):
            _write_member(shard, f"{sample_id:09d}{extension}", data)
            _write_member(shard, f"{sample_id:09d}.cls", str(label).encode())
            packed.append(facts)
        shard.write(END_OF_TAR)
    return packed


def _write_member(shard: io.BufferedWriter, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    shard.write(header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))


def _contents(part: Catalog, image_size: int | None) -> Iterator[tuple[str, bytes, SampleFacts]]:
    """Extension, bytes and facts of every sample as it is packed."""
    assert part.facts is not None, "not an indexed catalog"
    for index, row in enumerate(part.facts.to_pylist()):
        facts = SampleFacts(**row)
        try:
            data = read_patiently(partial(part.read, index))
        except UnreadableImage:
            if not part.is_bad[index]:
                raise
            data = b""
        if facts.sha256 is not None and hashlib.sha256(data).digest() != facts.sha256:
            raise UserError(f"{part.locate(index)} has changed since it was indexed; index it again")
        if image_size is None or part.is_bad[index]:
            extension = os.path.splitext(part.names[index])[1]
            known = extension.lower() in FORMAT_OF_EXTENSION
            yield extension if known else UNKNOWN_EXTENSION, data, facts._replace(size=len(data))
        else:
            from sendvae_fast.data.crop import read_crop  # brings torch along, seconds in every worker

            crop = read_crop(data, image_size, part.locate(index)).transpose(1, 2, 0)
            buffer = io.BytesIO()
            Image.fromarray(crop).save(buffer, format="PNG")
            data = buffer.getvalue()
            digest = hashlib.sha256(data).digest()
            yield ".png", data, SampleFacts(len(data), digest, image_size, image_size, "RGB", "PNG", "ok")


def _packed_listing(shards: list[Path], catalog: Catalog) -> Listing:
    """The samples in the shards, under their ids, names and classes from before."""
    packed = list_tars(shards, "cls")
    ids = np.array([int(name.partition(".")[0]) for name in packed.source.names])
    source = packed.source.take(np.argsort(ids))
    source.names = catalog.names
    return replace(catalog.listing, source=source, damage=(), passed_over=())
