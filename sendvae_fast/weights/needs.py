"""What configs need of published weights, and what is wrong with what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sendvae_fast.config import find_config, read_config
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.files import file_sha256
from sendvae_fast.hub import PREFIX
from sendvae_fast.reading import reading
from sendvae_fast.weights.catalog import PublishedFile, catalog, needed_by, weights_in
from sendvae_fast.weights.fetching import commands


@dataclass(frozen=True)
class Found:
    """A file or folder that settings name."""

    key: str
    """The setting."""
    path: str
    problem: str | None
    """None where it is there and, as far as that can be told without loading it, whole."""
    sha256: str | None = None
    """Of a file whose hash is published."""


def files_of(configs: Sequence[str]) -> list[PublishedFile]:
    """The files that configs name, or all that are needed by some packaged config, in the catalog's order.

    Raises:
        UserError: a config cannot be read.
    """
    wanted = {path for name in configs for path in weights_in(read_config(find_config(name))).values()}
    wanted = wanted or set(needed_by())
    known = catalog()
    unknown = (
        PublishedFile(path=path, what="not in the list of published files") for path in sorted(wanted - {*known})
    )
    return [file for path, file in known.items() if path in wanted] + list(unknown)


def look_at(settings: Mapping[str, Any]) -> Iterator[Found]:
    """Every file and folder of weights that settings name, looked at without loading it."""
    for key, path in weights_in(settings).items():
        published = catalog().get(path)
        try:
            yield Found(key, path, None, _checked(Path(path), published))
        except UserError as error:
            how = commands(published) if published is not None and not Path(path).exists() else []
            yield Found(key, path, "; ".join([str(error), *([f"fetch it: {' && '.join(how)}"] if how else [])]))


def _checked(path: Path, published: PublishedFile | None) -> str | None:
    """The sha256 of a file whose hash is published. UserError where it is missing, damaged or another."""
    is_on_the_hub = str(path).startswith(PREFIX)
    if not (is_on_the_hub or path.exists()):
        raise UserError(f"{path} is not there")
    if is_on_the_hub or path.is_dir():
        resolve_weights(path)
        return None
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: fetch it again")
    if path.suffix == ".safetensors":
        with reading(path, "fetch it again"), safe_open(path, framework="np") as file:
            if not list(file.keys()):
                raise UserError(f"{path} holds no tensors: fetch it again")
    if published is None or published.sha256 is None:
        return None
    found = file_sha256(path)
    if not found.startswith(published.sha256):
        raise UserError(f"{path} is not the published file: its sha256 is {found}, not {published.sha256}")
    return found
