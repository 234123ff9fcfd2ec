"""How pictures are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sendvae_fast import checks


@dataclass(kw_only=True)
class LoaderConfig:
    """How images are read; none of it but `max_bad_fraction` changes what comes out.

    Raises `UserError` for a value out of range.
    """

    section: ClassVar[str] = "loader"
    """The section of a config file that these settings are in, for messages."""

    num_threads: int = 4
    """Threads that decode in the background."""
    read_ahead: int = 4
    """Batches in preparation beyond the one in use."""
    cache_mb: int = 1024
    """Keep all decoded crops in memory when they fit into so many MiB; 0 turns it off."""
    max_bad_fraction: float = 1e-4
    """Share of unreadable images passed over (each replaced by the next readable one) before the run stops."""
    read_retry_s: float = 30.0
    """Seconds for which a read is tried again that fails as a file server's absence makes it fail (EIO, ESTALE, ...),
    before the image counts as unreadable."""
    decoder: Literal["auto", "pillow", "dali"] = "auto"
    """Who decodes. `dali` needs a catalog that says which pictures are ordinary (`sendvae data index`); the others go
    to Pillow. `auto` is dali on a GPU, with such a catalog and DALI installed, and else pillow."""

    def __post_init__(self) -> None:
        checks.choices(self, where=self.section)
        checks.at_least(1, self, "num_threads", where=self.section)
        checks.at_least(0, self, "read_ahead", "cache_mb", "read_retry_s", where=self.section)
        checks.in_interval("[0, 1)", self, "max_bad_fraction", where=self.section)
