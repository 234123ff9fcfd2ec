"""The place of a run's weights."""

from pathlib import Path

from sendvae_fast.engine.checkpoint import newest_checkpoint
from sendvae_fast.errors import UserError
from sendvae_fast.files import CONFIG_FILE


def resolve_weights(path: str | Path) -> Path:
    """A weight file or folder (one with config.json): `path` itself, or the newest checkpoint of the run at `path`.

    Raises:
        UserError: it is neither.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a weight file or folder, a checkpoint or a run directory")
    if path.is_file() or (path / CONFIG_FILE).is_file():
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise UserError(f"{path} is neither a weight folder (no {CONFIG_FILE}) nor a run with a finished checkpoint")
    return newest
