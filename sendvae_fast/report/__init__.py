"""One offline page of a run, of several side by side, or of a demo."""

from sendvae_fast.report.contents import Picture, ReportData, RunRecord, Tile, Variant
from sendvae_fast.report.load import load_comparison, load_report, load_runs
from sendvae_fast.report.page import build_report, write_report

__all__ = [
    "Picture",
    "ReportData",
    "RunRecord",
    "Tile",
    "Variant",
    "build_report",
    "load_comparison",
    "load_report",
    "load_runs",
    "write_report",
]
