"""Facts about a generator's checkpoint from its run, for a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sendvae_fast.engine.run_weights import run_of, step_of
from sendvae_fast.reading import read_yaml, reading
from sendvae_fast.version import __version__


def facts_of_generator(checkpoint: Path) -> dict[str, object]:
    """Settings of the stage 2 run that a checkpoint directory lies in; empty for other weights.

    Paths of the training machine are cut down to their names.
    """
    run = run_of(checkpoint)
    if run is None:
        return {}
    config_file = run / "config.yaml"
    config = read_yaml(config_file, "repair it")
    with reading(config_file, "repair it"):
        return _facts(config, step_of(checkpoint)) if "latents" in config else {}


def _facts(config: dict[str, Any], step: int | None) -> dict[str, object]:
    data, repa = config["data"], config["repa"]
    return {
        "trained by": f"sendvae_fast {__version__}, {step} steps of {data['global_batch']} latents",
        "latents": Path(config["latents"]).name,
        "started from": "random weights" if config["init_from"] is None else Path(config["init_from"]).name,
        "aligned with": "nothing"
        if repa["weight"] == 0
        else f"{repa['foundation']['name']} after block {repa['block']} (REPA), weight {repa['weight']}",
        "decay of the moving average": config["optimizer"]["ema_decay"],
    }
