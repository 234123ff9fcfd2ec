"""Forcing a choice among backends: by an environment variable for a process, by a `with` block for a part of it."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sendvae_fast.errors import UserError
from sendvae_fast.ops.tracing import constant_when_traced


class ForcedChoice:
    """Which of several backends is forced, if one is. The `with` block outranks the variable, blocks nest.

    The setting is the process's, not the thread's. Compiled functions follow a block: torch.compile guards on `name`.

    Args:
        variable: the environment variable; empty is the same as unset.
        function: the public function that makes the `with` block, for messages.
        what: the name of the choice, for messages.
        known: the names that can be forced.
    """

    __slots__ = ("function", "known", "name", "variable", "what")

    def __init__(self, variable: str, function: str, what: str, known: Collection[str]) -> None:
        self.variable, self.function, self.what, self.known = variable, function, what, known
        self.name: str | None = None
        """What the innermost `with` block forces."""

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Force `name` inside the block; UserError where it is not known."""
        self._check(name, self.function)
        previous, self.name = self.name, name
        try:
            yield
        finally:
            self.name = previous

    # Dynamo calls this while tracing and burns the answer into the graph; `name` is an argument so that it is guarded.
    @constant_when_traced
    def resolve(self, name: str | None) -> tuple[str | None, str]:
        """The forced choice, if any, and its origin (block or variable), given `self.name`.

        Raises:
            UserError: the environment variable names nothing that is known.
        """
        if name is not None:
            return name, self.function
        name = os.environ.get(self.variable) or None
        if name is not None:
            self._check(name, self.variable)
        return name, self.variable

    def _check(self, name: str, source: str) -> None:
        if name not in self.known:
            raise UserError(f"{source}: unknown {self.what} {name!r}; choose one of {', '.join(self.known)}")


def cannot_run(op: str, backend: str, source: str, reason: str) -> UserError:
    """The error of an op whose forced backend cannot run: never a silent fall-back."""
    return UserError(f"{op}: backend {backend!r} is forced by {source} but cannot run: {reason}")
