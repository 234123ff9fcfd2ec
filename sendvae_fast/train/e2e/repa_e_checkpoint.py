"""Training checkpoints of REPA-E's `train_repae.py`, read and written whole.

    model, ema                 the SiT's state dict, its batch norm of latents in it (bn.*)
    vae, discriminator         state dicts
    opt, opt_vae, opt_disc     torch's of an AdamW: step, exp_avg, exp_avg_sq by number of the parameter
    steps                      after which it was written

PyTorch numbers parameters in the order of `parameters()`, which is a state dict's without its buffers. The SiT's first
is the position embedding, which REPA-E trains. `opt_disc` is of the whole loss module: a number `logvar`, the
discriminator, LPIPS; the discriminator's parameters alone have a state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.run_weights import run_of
from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.engine.snapshot import find_unsound
from sendvae_fast.engine.state import SavedState, saved_state
from sendvae_fast.errors import UserError
from sendvae_fast.files import AUTOENCODER_PART, GENERATOR_PART
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.published_layouts import to_repa
from sendvae_fast.models.sit.storage import SavedSiT
from sendvae_fast.models.weights import check_fit, read_weights
from sendvae_fast.reading import NotOfItsKind, count_in, dataclass_of, read_json, read_yaml, reading
from sendvae_fast.train.e2e.networks import LATENT_NORM_FILE
from sendvae_fast.train.vae.networks import DISCRIMINATOR_FILE

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_STATISTICS = {"bn.running_mean": "bn.ema_mean", "bn.running_var": "bn.ema_var"}
"""The batch norm's statistics, and our names for their averages, which REPA-E has in its averaged SiT."""
_POSITIONS = "pos_embed"
_NUM_OF_LPIPS = 31
"""Parameters after the discriminator's in REPA-E's loss module: of 13 convolutions of VGG16, two each, and 5 heads."""


class TrainedNetwork(NamedTuple):
    """A network in training."""

    name: str
    """In the checkpoint."""
    prefix: str
    """Of our engine's names, which are the checkpoint's otherwise."""
    optimizer: str
    """In the checkpoint."""
    setting: str
    """The optimizer's, in a run's config."""


_NETWORKS = {
    "vae": TrainedNetwork("vae", "autoencoder.", "opt_vae", "optimizer"),
    "sit": TrainedNetwork("model", "", "opt", "generator_optimizer"),
    "discriminator": TrainedNetwork("discriminator", "", "opt_disc", "discriminator_optimizer"),
}
"""By the names of a stage's engines."""


class NetworkState(NamedTuple):
    """A network as it was trained so far, by our engine's names."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """"exp_avg/<parameter>", "exp_avg_sq/<parameter>" and, for the SiT, "ema/<parameter>": float32."""
    num_updates: int


class Checkpoint(NamedTuple):
    """The content of a checkpoint."""

    networks: dict[str, NetworkState]
    """By the names of a stage's engines; without the discriminator's where there is none."""
    steps: int


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a training checkpoint of REPA-E's. No code in it is run.

    Raises:
        UserError: it is none, is damaged, or its optimizers are not those of its networks.
    """
    content = read_weights(path)
    for network in _NETWORKS.values():
        present = [name for name in (network.name, network.optimizer) if name in content]
        if len(present) == 1 or (not present and network.name != "discriminator"):
            missing = next(name for name in (network.name, network.optimizer) if name not in content)
            raise UserError(
                f"{path} is no training checkpoint of REPA-E, it has no {missing}: give the file its train_repae.py "
                "wrote, or begin from networks alone, by init_from, discriminator_from and generator_from"
            )
    with reading(path, "give a training checkpoint of REPA-E's train_repae.py"):
        networks = {
            engine: _network(path, content, network) for engine, network in _NETWORKS.items() if network.name in content
        }
        sit, ema = networks["sit"], _of(dict, content["ema"])
        for name, value in sit.weights.items():
            if _of(Tensor, ema[name]).shape != _of(Tensor, value).shape:
                raise NotOfItsKind(f"{name} of ema has another shape than that of model")
        trained = [name for name in sit.weights if f"exp_avg/{name}" in sit.optimizer]
        sit.optimizer.update({f"ema/{name}": ema[name].float() for name in trained})
        sit.weights.update({own: ema[name] for name, own in _STATISTICS.items()})
        for engine, state in networks.items():
            unsound = find_unsound([*state.weights.items(), *state.optimizer.items()])
            unsound += [(name, "is below 0") for name, value in state.optimizer.items() if _is_negative(name, value)]
            if unsound:
                name, reason = unsound[0]
                raise UserError(f"{path} is no state to go on from: {name} of its {_NETWORKS[engine].name} {reason}")
        return Checkpoint(networks, count_in(content, "steps"))


def parameter_names(state: Iterable[str]) -> list[str]:
    """The names in a state dict that are of parameters, in the order in which PyTorch numbers them."""
    return [name for name in state if name.rpartition(".")[2] not in _BUFFERS]


def _is_negative(name: str, value: Tensor) -> bool:
    return name.startswith("exp_avg_sq/") and bool((value < 0).any())


def _network(path: str | Path, content: dict[str, Any], network: TrainedNetwork) -> NetworkState:
    weights = _of(dict, content[network.name])
    names, optimizer = parameter_names(weights), _of(dict, content[network.optimizer])
    state, groups = _of(dict, optimizer["state"]), _of(list, optimizer["param_groups"])
    numbers = [number for group in groups for number in _of(list, _of(dict, group)["params"])]
    if network.name == "discriminator":
        numbers = [number for number in numbers if number in state]
    if len(numbers) != len(names):
        raise UserError(
            f"{path}: {network.optimizer} is of {len(numbers)} parameters and {network.name} has {len(names)}: give a "
            "checkpoint that is as train_repae.py wrote it"
        )
    moments, steps = {}, set()
    for number, name in zip(numbers, names, strict=True):
        if number not in state:
            continue
        own = _of(dict, state[number])
        for key in _MOMENTS:
            value, wanted = _of(Tensor, own[key]), _of(Tensor, weights[name]).shape
            if value.shape != wanted:
                raise UserError(
                    f"{path}: {key} of parameter {number} in {network.optimizer} is {_words(value.shape)} and {name} "
                    f"of {network.name} is {_words(wanted)}: give a checkpoint that is as train_repae.py wrote it"
                )
            moments[f"{key}/{network.prefix}{name}"] = value.float()
        steps |= set(torch.as_tensor(_of((Tensor, int, float), own["step"])).flatten().tolist())
    if len(steps) != 1 or (count := steps.pop()) != int(count):
        raise NotOfItsKind(f"the parameters in {network.optimizer} have not all seen the same number of steps")
    num_updates = count_in({"step": int(count)}, "step")
    return NetworkState({f"{network.prefix}{name}": value for name, value in weights.items()}, moments, num_updates)


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise NotOfItsKind(f"there is a {type(value).__name__} where it has none")
    return value


def _words(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a number"


def begin_from(path: str, engines: Mapping[str, Engine], num_steps: int, distributed: Distributed) -> int:
    """Give the engines of an end-to-end run the state in a checkpoint of REPA-E's. Collective.

    num_steps: at which the run ends.

    Returns:
        The step after which it was written.

    Raises:
        UserError: it is damaged, or not of these networks, or of a step at which the run has ended.
    """
    with distributed.all_or_none():
        checkpoint, source = read_checkpoint(path), f"start_from={path}"
        if checkpoint.steps >= num_steps:
            raise UserError(
                f"{source} was written after {checkpoint.steps} steps and loop.num_steps is {num_steps}: give more"
            )
        for name, engine in engines.items():
            if name not in checkpoint.networks:
                raise UserError(f"{source} has no {name}, and this run trains one: set loss.gan_weight=0")
            _check(engine, checkpoint.networks[name], f"{source}, {_NETWORKS[name].name}")
    for name, engine in engines.items():
        weights, tensors, num_updates = checkpoint.networks[name]
        engine.load_model(weights)
        saved = SavedState(tensors.keys(), lambda key, shape, tensors=tensors: tensors[key], num_updates)
        engine.load_state(saved, source)
    return checkpoint.steps


def _check(engine: Engine, state: NetworkState, source: str) -> None:
    """Raise the UserError of `begin_from` for one network."""
    check_fit(engine.module, state.weights, source)
    trained = {name.removeprefix("exp_avg/") for name in state.optimizer if name.startswith("exp_avg/")}
    if (_POSITIONS in trained) != (_POSITIONS in engine.trained) and _POSITIONS in engine.module.state_dict():
        has, wanted = ("has trained", "true") if _POSITIONS in trained else ("has not trained", "false")
        raise UserError(f"{source} {has} its position embedding: set generator.trained_positions={wanted}")
    if trained != engine.trained.keys():
        raise UserError(
            f"{source} has an optimizer's state of {len(trained)} parameters, and {len(engine.trained)} are in "
            "training: give a checkpoint that is as train_repae.py wrote it"
        )


def checkpoint_entries(source: Path, raw: SavedSiT, ema: SavedSiT) -> dict[str, Any]:
    """The entries of a REPA-E checkpoint, from a checkpoint directory of an end-to-end run.

    Where the directory has only networks, so have the entries.

    Args:
        source: the directory.
        raw: the generator in it, as it is.
        ema: its average.

    Raises:
        UserError: the networks are none that REPA-E has, or a file is damaged.
    """
    norm = read_weights(source / LATENT_NORM_FILE)
    with reading(source / LATENT_NORM_FILE, "use another checkpoint"):
        running = {f"bn.{name}": norm[f"bn.{name}"] for name in _BUFFERS}
        averaged = running | {name: norm[own] for name, own in _STATISTICS.items()}
    entries: dict[str, Any] = {
        name: {**to_repa(part.sit, part.latent_mean, part.latent_std, batch_norm=True), **statistics}
        for name, part, statistics in (("model", raw, running), ("ema", ema, averaged))
    }
    entries["vae"] = load_autoencoder(source).autoencoder.state_dict()
    if (source / DISCRIMINATOR_FILE).is_file():
        entries["discriminator"] = dict(sorted(read_weights(source / DISCRIMINATOR_FILE).items(), key=_place))
    if not (source / "engine").is_dir():
        return entries
    entries["steps"] = read_json(source / "manifest.json", "use another checkpoint")["step"]
    folders = {"vae": AUTOENCODER_PART, "sit": GENERATOR_PART, "discriminator": "discriminator"}
    for engine, network in _NETWORKS.items():
        if network.name in entries:
            weights = entries[network.name]
            names: list[str | None] = list(parameter_names(weights))
            if network.name == "discriminator":
                names = [None, *names, *[None] * _NUM_OF_LPIPS]
            with saved_state(source / "engine" / folders[engine]) as saved:
                moments = {
                    name: {key: saved.read(f"{key}/{network.prefix}{name}", weights[name].shape) for key in _MOMENTS}
                    for name in names
                    if f"exp_avg/{network.prefix}{name}" in saved.names
                }
            settings = _optimizer_settings(source, network.setting)
            entries[network.optimizer] = _adamw_state(names, moments, saved.num_updates, settings)
    return entries


def _place(item: tuple[str, Tensor]) -> tuple[int, int]:
    """A discriminator's entries, main.<layer>.<name>, in the order of its state dict: safetensors has another."""
    _, layer, name = item[0].split(".")
    return int(layer), ("weight", "bias", *_BUFFERS).index(name)


def _optimizer_settings(source: Path, setting: str) -> OptimizerConfig:
    """Those of the run that a checkpoint lies in; REPA-E's, which are ours by default, outside a run."""
    run = run_of(source)
    if run is None:
        return OptimizerConfig()
    file = run / "config.yaml"
    with reading(file, "repair it"):
        return dataclass_of(OptimizerConfig, read_yaml(file, "repair it")[setting])


def _adamw_state(
    names: list[str | None], moments: dict[str | None, dict[str, Tensor]], num_updates: int, config: OptimizerConfig
) -> dict[str, Any]:
    """The state dict of torch's AdamW of these parameters, of which those without moments are frozen."""
    betas = config.betas[0], config.betas[1]
    empty = torch.optim.AdamW([torch.empty(0)], config.learning_rate, betas, config.eps, config.weight_decay)
    (group,) = empty.state_dict()["param_groups"]
    step = torch.tensor(float(num_updates))
    state = {number: {"step": step.clone(), **moments[name]} for number, name in enumerate(names) if name in moments}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(names)))}]}
