"""The place of a run's weights, and the run of weights."""

from pathlib import Path

from sendvae_fast.engine.checkpoint_files import FINAL_NAME, newest_checkpoint
from sendvae_fast.errors import UserError
from sendvae_fast.files import AUTOENCODER_PART, CONFIG_FILE, GENERATOR_PART
from sendvae_fast.hub import PREFIX, fetched_folder

PACKAGED = {"demo": Path(__file__).parents[1] / "models" / "autoencoder" / "demo"}
"""Weights that come with the package, by the name that stands for their path: the demo's plain autoencoder."""


def resolve_weights(path: str | Path) -> Path:
    """The weights at `path`: itself, if it is a file or a folder of weights, or the newest checkpoint of the run there.

    A folder of weights has a config.json, or one in a folder of each network. "hf:USER/NAME" is that repository's
    folder in the hub's cache (`hub.fetched_folder`). ``demo``, where there is no such path, is the autoencoder that
    comes with the package.

    Raises:
        UserError: it is neither.
    """
    path = fetched_folder(str(path)) if str(path).startswith(PREFIX) else Path(path)
    if not path.exists():
        if str(path) in PACKAGED:
            return PACKAGED[str(path)]
        raise UserError(
            f"{path} does not exist; give a weight file or folder, a checkpoint or a run directory, or hf:USER/NAME "
            "for a repository of the Hugging Face hub"
        )
    if path.is_file() or any((path / part / CONFIG_FILE).is_file() for part in ("", AUTOENCODER_PART, GENERATOR_PART)):
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise UserError(f"{path} is neither a weight folder (no {CONFIG_FILE}) nor a run with a finished checkpoint")
    return newest


def part_of(weights: Path, part: str) -> Path:
    """The folder of one network, where `weights` is a checkpoint of both, else `weights` itself.

    part: `files.AUTOENCODER_PART` or `GENERATOR_PART`.
    """
    return weights / part if (weights / part / CONFIG_FILE).is_file() else weights


def run_of(weights: Path) -> Path | None:
    """The run that a checkpoint, as `resolve_weights` gives it, is in; None for weights outside a run."""
    run = weights.parent.parent
    return run if weights.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def step_of(weights: Path) -> int | None:
    """The training step of a checkpoint; None for weights that are none."""
    name = FINAL_NAME.fullmatch(weights.name)
    return None if name is None else int(name[1])
