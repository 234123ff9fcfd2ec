"""Options of the benchmark's verbs, with errors of one line."""

import argparse
from typing import NoReturn, TypeVar

from sendvae_fast.errors import UserError

Case = TypeVar("Case")


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


def chosen_cases(cases: list[tuple[str, Case]], names: list[str] | None, *, quick: bool) -> list[Case]:
    """Of (name, case) those with these names; without names all, or the first where it is to be quick.

    Raises:
        UserError: there is no case of a name.
    """
    if names is None:
        return [case for _, case in cases][: 1 if quick else None]
    known = list(dict(cases))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--cases: no case {'; '.join(unknown)}: there are {'; '.join(known)}")
    return [case for name, case in cases if name in names]
