"""Publishing a folder on the Hugging Face hub: nothing here is called unless the user asks for it by name."""

from __future__ import annotations

from pathlib import Path

from sendvae_fast.errors import UserError, needs_extra


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
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{folder} is written but was not pushed to {repo}: {reason}. Try again with `hf upload {repo} {folder}`"
        ) from error
