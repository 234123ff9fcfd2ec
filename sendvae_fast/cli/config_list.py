"""List the configs that come with the package, each with what it is for.

    sendvae config list
    sendvae config list sit

`--config NAME` takes one of them in any folder, and `base: NAME` in a config of your own starts from it.
"""

import textwrap
from dataclasses import dataclass

from sendvae_fast.config import packaged_configs
from sendvae_fast.errors import UserError

POSITIONAL = "folder"
WIDTH = 100


@dataclass(kw_only=True)
class Config:
    """The kind of configs to list."""

    folder: str | None = None
    """Only those of vae, sit, sampling or demo."""


def run(config: Config) -> None:
    """Print the names and the first sentence of each file."""
    wanted = "" if config.folder is None else f"{config.folder.strip('/')}/"
    configs = {name: path for name, path in packaged_configs().items() if name.startswith(wanted)}
    if not configs:
        raise UserError(f"there are no packaged configs in {config.folder!r}; `sendvae config list` lists all")
    indent = 4 + max(map(len, configs))
    for name, path in configs.items():
        text = first_sentence(path.read_text(encoding="utf-8"))
        print(textwrap.fill(text, WIDTH, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent))


def first_sentence(text: str) -> str:
    """The first sentence of the comment at the top of a YAML file."""
    lines = text.splitlines()
    comment = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].removesuffix(".")
