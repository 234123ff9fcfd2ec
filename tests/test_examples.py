"""Every example runs and does what it says."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script and gives what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_all_are_listed():
    listed = re.findall(r"^- `(\w+\.py)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_fused_vae_training(run):
    pytest.importorskip("diffusers")
    printed = run("fused_vae_training.py", "--size=16", "--channels", "16", "32", "--steps=4")
    assert "swapped: 22 pairs" in printed
    # float32 has 1.2e-7, and some sixty layers follow each other.
    assert 0 < float(re.search(r"largest difference: (\S+)", printed)[1]) < 1e-4
    (first, last), (fast_first, fast_last) = (map(float, pair) for pair in re.findall(r"loss (\S+) to (\S+)", printed))
    assert last < first and fast_last < fast_first
    assert fast_last == pytest.approx(last, rel=0.01)
    before, after, gain = map(float, re.search(r"takes (\d+) ms and (\d+) ms: (\S+)x", printed).groups())
    assert before > 0 and after > 0 and gain > 0


def test_align_any_vae(run):
    pytest.importorskip("diffusers")
    pytest.importorskip("timm")
    lines = re.findall(r"reconstruction (\S+), alignment (\S+)", run("align_any_vae.py"))
    reconstruction, alignment = zip(*(map(float, line) for line in lines), strict=True)
    assert len(lines) == 10
    assert reconstruction[-1] < 0.97 * reconstruction[0] and alignment[-1] < 0.9 * alignment[0]


def test_sample_from_run(run, tmp_path):
    runs, out = ROOT / "tests" / "old_runs", tmp_path / "out.png"
    run("sample_from_run.py", str(runs / "sit"), str(runs / "vae"), str(out))
    sheet = np.asarray(Image.open(out))
    gap = 2
    side = 4 * 32 + 3 * gap
    assert sheet.shape == (side, side, 3)
    corners = [sheet[row : row + 32, column : column + 32] for row in (0, side - 32) for column in (0, side - 32)]
    assert all(corner.std() > 1 for corner in corners) and not np.array_equal(corners[0], corners[3])
