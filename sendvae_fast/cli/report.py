"""Write the offline HTML report of a training run, or of a demo's comparison, into its folder.

    sendvae report runs/send

The page needs no network and no other file.
"""

from dataclasses import dataclass
from pathlib import Path

from sendvae_fast.report import load_report, write_report

POSITIONAL = "run"


@dataclass(kw_only=True)
class Config:
    """Which run."""

    run: str
    """Run directory, or a demo's folder."""
    out: str | None = None
    """HTML file; `<run>/report.html` without it."""


def run(config: Config) -> None:
    """Write the page and say where it is."""
    path = Path(config.out) if config.out else Path(config.run) / "report.html"
    write_report(path, load_report(config.run))
    print(f"report: {path}")
