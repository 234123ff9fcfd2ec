"""The version of the package and the commit that it is of."""

import subprocess
from pathlib import Path

__version__ = "0.1.0"

COMMIT_FILE = Path(__file__).with_name("commit.txt")
"""In a wheel: the commit it was built from (written by setup.py)."""


def package_commit() -> str | None:
    """The commit of this package's checkout, marked when files differ from it, or the one its wheel was built from.

    None where neither is known.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        try:
            return COMMIT_FILE.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None
    try:
        answers = [
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0].strip() + (" (modified)" if answers[1].strip() else "")
