"""docs/design.md is kept true: the floors are those that are checked, and what it points to is there."""

import re
from pathlib import Path

from test_layout import FLOORS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/design.md").read_text()


def test_the_floors_are_those_that_are_checked():
    rows = re.findall(r"^\| (\d) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    written = [set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row))) for _, row in rows]
    beside = {"csrc", "sendvae_fast", "__main__", "__init__"}  # no Python; the package itself
    assert [names - beside for names in written] == [floor - beside for floor in FLOORS]


def test_paths_exist():
    words = re.findall(r"`([\w./]+/|[\w./]+\.(?:py|cpp|md))`", PAGE)
    words += re.findall(r"^    (\w+/\w+/)", PAGE, flags=re.MULTILINE)
    roots = (ROOT, ROOT / "sendvae_fast")
    assert "train/vae/stage.py" in words and "sendvae_fast/models/" in words
    assert not [word for word in words if not any((root / word).exists() for root in roots)]
