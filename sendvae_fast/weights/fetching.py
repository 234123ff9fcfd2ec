"""How published files come to where configs look: as commands to run elsewhere, or by downloading them here."""

from __future__ import annotations

import shutil
from pathlib import Path

from sendvae_fast.errors import UserError, needs_extra
from sendvae_fast.files import file_sha256
from sendvae_fast.weights.catalog import PublishedFile


def commands(file: PublishedFile) -> list[str]:
    """Shell commands that fetch a file and put it at its path."""
    if file.url is not None:
        return [f"curl -L --create-dirs -o {file.path} {file.url}"]
    if file.hub is None:
        return []
    first = f"{file.download}/{file.files[0]}"
    fetch = f"hf download {file.hub} {' '.join(file.files)} --local-dir={file.download}"
    if file.conversion is None:
        return [fetch, f"mkdir -p {Path(file.path).parent} && cp {first} {file.path}"]
    return [fetch, f"sendvae convert {source_of(file)} {_options(file)} --out={file.path}"]


def source_of(file: PublishedFile) -> str:
    """What is converted: a folder of diffusers, or the first file."""
    return file.download if "config.json" in file.files else f"{file.download}/{file.files[0]}"


def _options(file: PublishedFile) -> str:
    return (file.conversion or "").format(folder=file.download)


def conversion_options(file: PublishedFile) -> dict[str, str]:
    """The options of `sendvae convert` for a file, by name."""
    pairs = (option.removeprefix("--").split("=", 1) for option in _options(file).split())
    return dict(pairs) | {"source": source_of(file), "out": file.path}


def download(file: PublishedFile) -> None:
    """Fetch a file by its project's own client; what is on the hub comes through the hub's cache.

    Where it needs no conversion it is at its path afterwards, else in its folder of `downloads`.

    Raises:
        UserError: it cannot be fetched, or is not what was published.
    """
    try:
        if file.url is not None:
            _download_url(file)
        elif file.hub is not None:
            _download_from_hub(file, file.hub)
    except UserError:
        raise
    except Exception as error:  # HTTP errors are those of whatever client the library of the day has
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{file.path} could not be fetched from {file.published}: {reason}. Without a network here, run what "
            "`sendvae weights fetch` prints on a machine that has one, and copy the folder"
        ) from error


def _download_url(file: PublishedFile) -> None:
    from torch.hub import download_url_to_file

    path = Path(file.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        download_url_to_file(str(file.url), str(unfinished))
        check_hash(file, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _download_from_hub(file: PublishedFile, repository: str) -> None:
    with needs_extra("train", "`sendvae weights fetch --download`"):
        from huggingface_hub import hf_hub_download
    for name in file.files:
        fetched = hf_hub_download(repository, name, local_dir=file.download)
        if file.conversion is None:
            check_hash(file, Path(fetched))
            path = Path(file.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched, path)


def check_hash(file: PublishedFile, path: Path) -> None:
    """Raise a UserError where the file at `path` is not the published one."""
    if file.sha256 is not None and not (found := file_sha256(path)).startswith(file.sha256):
        raise UserError(f"{path} is not the published file: its sha256 is {found}, not {file.sha256}: fetch it again")
