"""Look at all weights that a command names at once: whether they are there, whole, and the published ones.

    sendvae weights check train vae --config vae/send_vae_f16d32
    sendvae weights check train sit --config sit/xl_1 --repa.foundation.weights=dinov2.safetensors

The options are those of the verb that follows. Files are not loaded (`sendvae train ... --dry_run` does that). Exits 0
when all is well and 2 where something is missing or damaged.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sendvae_fast.config import build_config, merge, plain, read_files, required_keys
from sendvae_fast.weights.needs import look_at

PLACEHOLDER = "(not given)"


@dataclass(kw_only=True)
class Config:
    """How to say it."""

    json: bool = False
    """Print JSON."""


def run_for(config_class: type, files: list[Path], overrides: dict[str, Any]) -> int:
    """Print a line for each file that the settings of a verb name; returns the exit code."""
    own = build_config(Config, {key: value for key, value in overrides.items() if key == "json"}, "the command line")
    settings = merge(read_files(files), {key: value for key, value in overrides.items() if key != "json"})
    content = merge(required_keys(config_class, PLACEHOLDER), settings)
    found = list(look_at(plain(build_config(config_class, content))))
    if own.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    for one in found if not own.json else []:
        print(f"{'missing or damaged' if one.problem else 'ok':20}{one.key}: {one.problem or one.path}")
    if not found and not own.json:
        print("these settings name no weights")
    return 2 if any(one.problem for one in found) else 0
