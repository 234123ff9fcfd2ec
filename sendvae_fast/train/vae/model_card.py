"""Facts about an autoencoder's checkpoint from its run, for a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sendvae_fast.engine.run_weights import step_of
from sendvae_fast.evaluation.result import RESULTS_FILE, read_results
from sendvae_fast.reading import read_json, read_json_lines, read_yaml, reading
from sendvae_fast.train.vae.alignment_settings import DEFAULT_WEIGHT
from sendvae_fast.version import __version__

_MEASURED = ("reconstruction", "lpips", "kl", "align")


def facts_of_checkpoint(checkpoint: Path) -> dict[str, object]:
    """Settings and last logged losses of the run that a checkpoint directory lies in; empty for other weights.

    Paths of the training machine are cut down to their names.
    """
    run = checkpoint.parent.parent
    config_file, manifest = run / "config.yaml", checkpoint / "manifest.json"
    if not (config_file.is_file() and manifest.is_file()):
        return {}
    step = read_json(manifest, "use another checkpoint")["step"]
    config = read_yaml(config_file, "repair it")
    with reading(config_file, "repair it"):
        facts = _facts(config, step)
    with reading(run / "metrics.jsonl", "repair or remove it"):
        losses = _losses_at(run / "metrics.jsonl", step)
    if losses:
        facts["losses in training"] = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return facts


def measured_of_checkpoint(checkpoint: Path, role: str = "autoencoder") -> list[tuple[str, str, str]]:
    """What `sendvae evaluate` has measured of the network of a checkpoint: metric, value, protocol.

    The newest of each metric and protocol, a value with its 95 % interval and the number of pictures.

    role: "autoencoder", alone, or "generator", with whatever decoded its latents.
    """
    found = {}
    for result in read_results(checkpoint.parent.parent / RESULTS_FILE):
        origin = result.weights.get(role)
        is_its_own = role == "generator" or "generator" not in result.weights
        if origin is not None and is_its_own and origin.step == step_of(checkpoint):
            interval = "" if result.interval is None else " [{:.4g}, {:.4g}]".format(*result.interval)
            counts = ", ".join(f"{count:,} {what}" for what, count in result.counts.items())
            row = (result.metric, f"{result.value:.4g}{interval}", f"{result.protocol}; {counts}")
            found[result.metric, result.protocol] = tuple(_plain(cell) for cell in row)
    return list(found.values())


def picture_of_checkpoint(checkpoint: Path, kind: str = "reconstruction") -> Path | None:
    """The newest picture, "reconstruction" or "samples", that the run drew up to a checkpoint; None without any."""
    step = step_of(checkpoint) or 0
    found = {}
    for path in (checkpoint.parent.parent / "samples").glob(f"{kind}_*.png"):
        number = path.stem.rpartition("_")[2]
        if number.isdecimal() and int(number) <= step:
            found[int(number)] = path
    return found[max(found)] if found else None


def began_with(checkpoint: Path) -> str | None:
    """The setting `init_from` of the run that a checkpoint lies in; None where there is none."""
    config_file = checkpoint.parent.parent / "config.yaml"
    value = read_yaml(config_file, "repair it").get("init_from") if config_file.is_file() else None
    return value if isinstance(value, str) else None


def _plain(cell: str) -> str:
    """A cell of a table of Markdown, whatever it holds."""
    return "".join(character if character.isprintable() and character not in "|<>!`" else " " for character in cell)


def _facts(config: dict[str, Any], step: int) -> dict[str, object]:
    data = config["data"]
    return {
        "trained by": f"sendvae_fast {__version__}, {step} steps of {data['global_batch']} pictures of "
        f"{data['image_size']} x {data['image_size']}",
        "pictures": "unknown" if not data.get("root") else Path(data["root"]).name,
        "started from": "random weights" if config["init_from"] is None else Path(config["init_from"]).name,
        "aligned with": _alignment(config["alignment"]) if "alignment" in config else _repa(config["repa"]),
    }


def _alignment(alignment: dict[str, Any]) -> str:
    method, weight = alignment["method"], alignment["weight"]
    weight = DEFAULT_WEIGHT[method] if weight is None else weight
    return "nothing" if weight == 0 else f"{alignment['foundation']['name']}, method {method}, weight {weight}"


def _repa(repa: dict[str, Any]) -> str:
    return f"{repa['foundation']['name']}, through a generator (REPA-E), weight {repa['autoencoder_weight']}"


def _losses_at(metrics: Path, step: int) -> dict[str, float]:
    """The last of each that was logged by `step`."""
    losses = {}
    for entry in read_json_lines(metrics) if metrics.is_file() else ():
        if isinstance(entry.get("step"), int) and entry["step"] <= step:
            losses |= {name: entry[name] for name in _MEASURED if isinstance(entry.get(name), (int, float))}
    return losses
