"""Options of the benchmark's verbs, with errors of one line."""

import argparse
from typing import NoReturn

from sendvae_fast.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option raises `UserError` instead of printing the usage; no abbreviations."""

    def __init__(self, verb: str, description: str | None):
        super().__init__(
            f"python -m bench {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)
