"""Folders from and to the Hugging Face hub: nothing enters or leaves the machine unless the user asks for it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from sendvae_fast.errors import UserError, needs_extra

PREFIX = "hf:"
"""Before a repository where a folder is asked for: hf:USER/NAME, or hf:USER/NAME@REVISION."""
ALLOWED = "SENDVAE_NETWORK"
"""Environment variable of the processes that may fetch; `--allow_network` sets it to 1."""
WEIGHT_FILES = ("*.json", "*.safetensors")
"""What is fetched of a repository: nothing that could hold a program."""


def is_allowed() -> bool:
    """Whether this process may use the network."""
    return os.environ.get(ALLOWED) == "1"


@cache
def fetched_folder(where: str) -> Path:
    """The folder of the hub's own cache that holds the weights of a repository; fetched where they are not there yet.

    Args:
        where: "hf:USER/NAME" or "hf:USER/NAME@REVISION"; without a revision the newest.

    Raises:
        UserError: it is no name of a repository, it is not in the cache and the network is not allowed, or the hub has
            none of that name or cannot be reached.
    """
    with needs_extra("train", where):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils import validate_repo_id
    repository, _, revision = where.removeprefix(PREFIX).partition("@")
    try:
        validate_repo_id(repository)
        is_name = "/" in repository
    except ValueError:
        is_name = False
    if not is_name:
        raise UserError(f"{where} is no repository of the hub: give hf:USER/NAME, or hf:USER/NAME@REVISION")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(WEIGHT_FILES),
                local_files_only=not is_allowed(),
            )
        )
    except LocalEntryNotFoundError as error:
        if not is_allowed():
            raise UserError(
                f"{where} is not in the hub's cache here, and the network is not allowed: give --allow_network (in a "
                f"program set {ALLOWED}=1), or fetch it elsewhere with `hf download {repository}`"
            ) from error
        raise _not_fetched(where, error) from error
    except Exception as error:  # HTTP errors are those of whatever client the library of the day has
        raise _not_fetched(where, error) from error


def _not_fetched(where: str, error: Exception) -> UserError:
    return UserError(f"{where} could not be fetched: {_reason(error)}")


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_push(repo: str) -> None:
    """`UserError` unless `repo` can name a repository, the hub's library is installed and the user logged in."""
    with needs_extra("train", "--push"):
        from huggingface_hub import get_token
        from huggingface_hub.utils import validate_repo_id
    user, _, name = repo.partition("/")
    try:
        validate_repo_id(repo)
    except ValueError:
        user = ""
    if not user or not name:
        raise UserError(f"--push={repo} is no repository: give USER/NAME, of letters, digits, -, _ and .")
    if get_token() is None:
        raise UserError("--push needs a login: run `hf auth login`, or set HF_TOKEN to a token that may write")


def push_folder(folder: Path, repo: str) -> str:
    """Upload `folder` as one commit and return its address; a repository that is not there yet is made private.

    `UserError` where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Weights by sendvae_fast"))
    except Exception as error:  # HTTP errors are those of whatever client the library of the day has
        raise UserError(
            f"{folder} is written but was not pushed to {repo}: {_reason(error)}. Try again with "
            f"`hf upload {repo} {folder}`"
        ) from error
