"""Look at every picture of a source once and write its catalog: place, size, checksum, class and verdict of each.

    sendvae data index imagenet/train
    sendvae data index 'shards/train-{0000..1023}.tar' --out=shards/train.catalog.parquet
    sendvae data index 'imagenet-1k/data/train-*.parquet' --out=train.catalog.parquet

SOURCE is an ImageFolder, tar shards or Hugging Face parquet files. The catalog it writes can be given wherever pictures
are asked for. Every picture is decoded in a worker process whose death costs that picture alone. The same command goes
on where it was stopped.
"""

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.indexing.catalog_summary import summarize
from sendvae_fast.data.indexing.index import default_catalog, index_source

POSITIONAL = "source"


@dataclass(kw_only=True)
class Config:
    """The pictures to index, and how closely to examine them. Raises `UserError` for a value out of range."""

    source: str
    """Folder, file or pattern."""
    out: str | None = None
    """Catalog to write; by default SOURCE.catalog.parquet."""
    label: str | None = None
    """Where classes come from. Tar shards: cls, json:FIELD, folder, shard or none (by default what there is, in the
    order cls, folder, wnid of the shard, none). Parquet files: column:NAME (by default label) or none."""
    num_workers: int | None = None
    """Processes; by default one per core."""
    quick: bool = False
    """Decode headers only: a fifth of the work, but truncated pictures go unseen."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "num_workers")


def run(config: Config) -> None:
    """Write the catalog and say what is in it."""
    out = config.out or default_catalog(config.source)
    fresh = index_source(config.source, out, num_workers=config.num_workers, quick=config.quick, label=config.label)
    catalog = Catalog.open(out)
    summary = summarize(catalog)
    print(f"{out}: {len(catalog)} samples in {len(catalog.class_names)} classes" + ("" if fresh else ", already there"))
    for kind, count in summary.kinds.items():
        print(f"{count:>10}  {kind}")
    if not summary.is_good:
        print(f"`sendvae data check {out}` names what is bad")
