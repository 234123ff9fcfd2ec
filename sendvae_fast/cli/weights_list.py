"""List the published files that configs need: where they are published, licence, hash, which config needs them.

    sendvae weights list
    sendvae weights list vae/send_vae_f16d32 --json

Sizes, hashes and licences stand there only where they are published; "unknown" is a value.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sendvae_fast.weights.catalog import PublishedFile, needed_by
from sendvae_fast.weights.needs import files_of

POSITIONAL = "configs"


@dataclass(kw_only=True)
class Config:
    """Which files."""

    configs: tuple[str, ...] = ()
    """Names or files of configs; without any, all files that some packaged config or `evaluate` needs."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    """Print them."""
    files = files_of(config.configs)
    if config.json:
        print(json.dumps([_facts(file) for file in files], indent=1))
        return
    for file in files:
        facts = _facts(file)
        print(f"{file.path}{'' if facts['here'] else ' (not here)'}")
        print(f"    {file.what}")
        print(f"    {facts['published']}; licence {file.licence}")
        print(f"    size {facts['bytes']}, sha256 {facts['sha256']}")
        print(f"    for {', '.join(facts['needed_by']) or 'no packaged config'}")
        if file.remark:
            print(f"    {file.remark}")


def _facts(file: PublishedFile) -> dict:
    facts = dataclasses.asdict(file) | {"published": file.published, "here": Path(file.path).exists()}
    facts |= {"needed_by": list(needed_by().get(file.path, ()))}
    return facts | {name: "unknown" for name in ("bytes", "sha256") if facts[name] is None}
