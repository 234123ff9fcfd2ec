"""The one exception a user is meant to see."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A failure the user can mend: one line saying what, where, and what to do.

    The command line prints it as ``error: ...`` without a traceback and exits with `exit_code`.
    """

    exit_code = 2

    def __str__(self) -> str:
        """The message on one line, without what a terminal would obey: parts of it may come out of a foreign file."""
        line = " ".join(super().__str__().split())
        return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Context for imports of optional packages: a missing one is a `UserError` with the command that installs it.

    Args:
        extra: the extra, or several with commas, of `pyproject.toml` that installs them: "train".
        what: the feature that needs them: "`sendvae report`".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "sendvae_fast"):
            raise
        raise UserError(
            f"{what} needs {package}, which is not installed: pip install 'sendvae_fast[{extra}]'"
        ) from error
