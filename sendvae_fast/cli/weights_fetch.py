"""Print the commands that fetch what configs need and put it where they look; or, where there is a network, do it.

    sendvae weights fetch vae/send_vae_f16d32 > fetch.sh
    sendvae weights fetch vae/send_vae_f16d32 --download

Nothing is fetched without --download. What is there already is left out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from sendvae_fast.cli import convert
from sendvae_fast.config import build_config
from sendvae_fast.errors import UserError
from sendvae_fast.weights.catalog import PublishedFile
from sendvae_fast.weights.fetching import commands, conversion_options, download
from sendvae_fast.weights.needs import files_of

POSITIONAL = "configs"


@dataclass(kw_only=True)
class Config:
    """Which files, and how."""

    configs: tuple[str, ...] = ()
    """Names or files of configs; without any, all files that some packaged config or `evaluate` needs."""
    download: bool = False
    """Fetch them here, from the Hugging Face hub by its library and from elsewhere by PyTorch's, and convert them."""


def run(config: Config) -> None:
    """Print or fetch."""
    missing = [file for file in files_of(config.configs) if not Path(file.path).exists()]
    if not missing:
        print("all of it is here", file=sys.stderr)
    for file in missing:
        if config.download:
            _fetch(file)
            print(f"{file.path}: {file.what}")
        else:
            print(f"# {file.what}; licence {file.licence}{f'; {file.remark}' if file.remark else ''}")
            print("\n".join(commands(file)))


def _fetch(file: PublishedFile) -> None:
    if file.hub is None and file.url is None:
        raise UserError(f"{file.path} is published nowhere that is known: give another with its setting")
    download(file)
    if file.conversion is not None:
        convert.run(build_config(convert.Config, conversion_options(file), file.path))
