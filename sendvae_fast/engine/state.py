"""An engine's state as full tensors by parameter name: gathered, saved, and loaded by any other engine.

    <directory>/optimizer_rank{r}.safetensors    "exp_avg/<name>", "exp_avg_sq/<name>", "ema/<name>", fp32
    <directory>/state.json                       {"num_updates": ..., "num_skipped": ..., "world_size": ...}

Rank r of the w ranks that save writes the parameters whose index is r modulo w. Tensors are gathered one parameter at
a time, so a rank never holds more than its share.
"""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sendvae_fast.errors import UserError

if TYPE_CHECKING:
    from sendvae_fast.engine.engine import Engine

NUM_NAMES_SHOWN = 5


def full_state(engine: "Engine", kind: str) -> dict[str, Tensor]:
    """See `Engine.full_state`."""
    if kind not in ("model", *engine.state_keys):
        raise ValueError(f"there is no {kind!r} state: this engine has model, {', '.join(engine.state_keys)}")
    if kind in ("exp_avg", "exp_avg_sq"):
        return {name: _to_cpu(engine.gather(name, kind)) for name in engine.trained}
    tensors = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            value = engine.gather(name, kind if name in engine.trained else "model")
        tensors[name] = _to_cpu(value)
    return tensors


def load_model(engine: "Engine", tensors: dict[str, Tensor]) -> None:
    """See `Engine.load_model`."""
    own = engine.module.state_dict(keep_vars=True)
    _check_names("weights", wanted=own.keys(), found=tensors.keys())
    for name, value in own.items():
        # ZeRO 3 leaves an empty tensor in the module and the true shape in ds_shape.
        shape = torch.Size(getattr(value, "ds_shape", value.shape))
        if tensors[name].shape != shape:
            raise UserError(
                f"weight {name} has shape {list(tensors[name].shape)} and the model wants {list(shape)}: "
                "load it with the model settings it was made with"
            )
    for name, value in own.items():
        if not isinstance(value, nn.Parameter):
            value.detach().copy_(tensors[name])
            continue
        full = tensors[name].to(engine.distributed.device, torch.float32)
        engine.scatter(name, "model", full)
        if name in engine.trained and "ema" in engine.state_keys:
            engine.scatter(name, "ema", full)


def save_optimizer(engine: "Engine", directory: Path) -> None:
    """See `Engine.save`."""
    rank, world_size = engine.distributed.rank, engine.distributed.world_size
    share = {}
    for index, name in enumerate(engine.trained):
        for key in engine.state_keys:
            full = engine.gather(name, key)
            if index % world_size == rank:
                share[f"{key}/{name}"] = _to_cpu(full)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(share, directory / f"optimizer_rank{rank}.safetensors")
    if engine.distributed.is_main:
        counts = {"num_updates": engine.num_updates, "num_skipped": engine.num_skipped, "world_size": world_size}
        (directory / "state.json").write_text(json.dumps(counts) + "\n")


def load_optimizer(engine: "Engine", directory: Path) -> None:
    """See `Engine.load`."""
    try:
        counts = json.loads((directory / "state.json").read_text())
        with ExitStack() as files:
            where = {}
            for rank in range(counts["world_size"]):
                file = files.enter_context(safe_open(directory / f"optimizer_rank{rank}.safetensors", framework="pt"))
                where.update(dict.fromkeys(file.keys(), file))
            wanted = [f"{key}/{name}" for name in engine.trained for key in engine.state_keys]
            _check_names(f"optimizer state in {directory}", wanted=wanted, found=where)
            for name in engine.trained:
                for key in engine.state_keys:
                    full = where[f"{key}/{name}"].get_tensor(f"{key}/{name}")
                    engine.scatter(name, key, full.to(engine.distributed.device))
        num_updates, engine.num_skipped = int(counts["num_updates"]), int(counts["num_skipped"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot read optimizer state from {directory} ({error}): use another checkpoint") from error
    for param in engine.optimizer_params():
        engine.optimizer.state[param]["step"].fill_(num_updates)


def _to_cpu(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares no memory with training."""
    return value.detach().to("cpu", copy=True).contiguous()


def _check_names(what: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    wanted, found = set(wanted), set(found)
    differences = [
        f"{title} {_shortened(sorted(names))}"
        for title, names in (("missing", wanted - found), ("unexpected", found - wanted))
        if names
    ]
    if differences:
        raise UserError(f"{what} do not fit this model: {'; '.join(differences)}: check the model settings")


def _shortened(names: list[str]) -> str:
    more = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
