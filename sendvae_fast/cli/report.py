"""Write an offline HTML page of training runs side by side, or of a demo's comparison.

    sendvae report runs/send
    sendvae report runs/control runs/send --out=send.html

Differences of settings, all metrics beside the paper's rows, curves, throughput and pictures. The page needs no
network and no other file.
"""

from dataclasses import dataclass
from pathlib import Path

from sendvae_fast.errors import UserError

POSITIONAL = "runs"


@dataclass(kw_only=True)
class Config:
    """Which runs. Raises `UserError` where there is none."""

    runs: tuple[str, ...]
    """Run directories, or a demo's folder."""
    out: str | None = None
    """HTML file; without it `report.html`, in the run where there is one, else here."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("give at least one run: sendvae report runs/send")


def run(config: Config) -> None:
    """Write the page and say where it is."""
    from sendvae_fast.report import load_report, write_report

    folder = Path(config.runs[0]) if len(config.runs) == 1 else Path()
    path = Path(config.out) if config.out else folder / "report.html"
    write_report(path, load_report(*config.runs))
    print(f"report: {path}")
