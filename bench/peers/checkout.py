"""A peer's own code, imported from a folder that the user has: none of it is in this repository.

Modules of a checkout have names such as `models` and `utils`, so a process imports from one checkout at a time: what
was imported from another is dropped.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.machine import commit_of
from sendvae_fast.errors import UserError


@dataclass(frozen=True)
class Checkout:
    """The folder of a peer's sources."""

    peer: str
    folder: Path

    @classmethod
    def of(cls, peer: str, option: str, folder: Path, files: tuple[str, ...]) -> "Checkout":
        """The checkout in `folder`.

        Args:
            peer: its name.
            option: the command line's option that gave the folder, for the messages.
            folder: where it is said to lie.
            files: paths in it by which it is known.

        Raises:
            UserError: there is no such folder, or it lacks one of the files.
        """
        if not folder.is_dir():
            raise UserError(f"{option}={folder}: there is no such folder; give the folder of a checkout of {peer}")
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise UserError(f"{option}={folder} is no checkout of {peer}: it has no {missing[0]}")
        return cls(peer, folder.resolve())

    def facts(self) -> dict[str, Any]:
        """The commit, and whether files differ from it; None where the folder is no git checkout."""
        commit, clean = commit_of(self.folder)
        return {"commit": commit, "clean": clean}

    def module(self, name: str, *needed: str) -> ModuleType:
        """Import a module of the checkout, which has the `needed` names.

        Raises:
            UserError: it imports a package that is not installed, cannot be imported, or lacks a name.
        """
        self._drop_others()
        path = str(self.folder)
        if path not in sys.path:
            sys.path.insert(0, path)
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = (error.name or name).partition(".")[0]
            if self._has(package):
                raise UserError(f"{path} is not the checkout of {self.peer} that is known here: {error}") from error
            raise UserError(
                f"{self.peer}'s code needs the package {package}, which is not installed: pip install {package}"
            ) from error
        except Exception as error:  # whatever foreign code does where its packages are of other versions
            raise UserError(
                f"{self.peer}'s {name} cannot be imported with the packages installed here: "
                f"{type(error).__name__}: {error}"
            ) from error
        if missing := [name for name in needed if not hasattr(module, name)]:
            raise UserError(
                f"{path} is not the checkout of {self.peer} that is known here: its {name} has no {missing[0]}"
            )
        return module

    def _has(self, package: str) -> bool:
        return (self.folder / package).is_dir() or (self.folder / f"{package}.py").is_file()

    def _drop_others(self) -> None:
        names = [name for name in sys.modules if self._has(name.partition(".")[0])]
        for name in names:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
            if not any(place and Path(place).is_relative_to(self.folder) for place in places):
                del sys.modules[name]
