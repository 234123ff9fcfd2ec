"""Print the fully resolved config of another verb: every key, with its default where nothing sets it.

    sendvae config show train vae --config demo/vae --loop.num_steps=10

Required keys that nothing sets are shown as `(required)`.
"""

from pathlib import Path

import yaml

from sendvae_fast.config import build_config, merge, plain, read_files, required_keys

PLACEHOLDER = "(required)"


def run_for(config_class: type, files: list[Path], overrides: dict) -> None:
    """Print the config of a verb as YAML, read as the verb itself would read it."""
    content = merge(required_keys(config_class, PLACEHOLDER), merge(read_files(files), overrides))
    print(yaml.safe_dump(plain(build_config(config_class, content)), sort_keys=False), end="")
