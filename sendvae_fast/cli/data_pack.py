"""Pack the samples of a catalog into WebDataset tar shards, for storage that is slow at opening a million files.

    sendvae data pack imagenet/train.catalog.parquet --out=shards/train
    sendvae data pack imagenet/train.catalog.parquet --out=shards/train256 --image_size=256

Sample ids, names, classes and verdicts stay the same: OUT can be given wherever the catalog was. The same command again
goes on where it was stopped.
"""

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.indexing.pack import pack_catalog

POSITIONAL = "catalog"


@dataclass(kw_only=True)
class Config:
    """The catalog to pack, and the form of its shards. Raises `UserError` for a value out of range."""

    catalog: str
    """Catalog file of `sendvae data index`."""
    out: str
    """Folder for the shards."""
    image_size: int | None = None
    """Pack the ADM centre crop of so many pixels a side as PNG, without loss; by default the pictures' own bytes."""
    shard_size: int = 1024
    """Samples per shard."""
    num_workers: int | None = None
    """Processes; by default one per core."""

    def __post_init__(self) -> None:
        checks.paths(self, "out")
        checks.at_least(1, self, "shard_size", "num_workers")
        checks.in_interval("[1, 8192]", self, "image_size")


def run(config: Config) -> None:
    """Write the shards."""
    fresh = pack_catalog(
        Catalog.open(config.catalog),
        config.out,
        image_size=config.image_size,
        shard_size=config.shard_size,
        num_workers=config.num_workers,
    )
    packed = Catalog.open(config.out)
    num_shards = len(packed.source.files)  # pyright: ignore[reportAttributeAccessIssue] - packed catalogs have shards
    print(f"{config.out}: {len(packed)} samples in {num_shards} shards" + ("" if fresh else ", already there"))
