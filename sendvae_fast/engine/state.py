"""An engine's state as full tensors by parameter name: gathered, saved, and loaded by any other engine.

    <directory>/optimizer_rank{r}.safetensors    "exp_avg/<name>", "exp_avg_sq/<name>", "ema/<name>", fp32
    <directory>/state.json                       {"num_updates": ..., "num_skipped": ..., "world_size": ...}

A rank writes what it holds: with ZeRO its parts of the flattened tensors (see `state_parts`), else, of w ranks, the
tensors of the parameters whose index is its rank modulo w. So a save moves none of them between ranks.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.optimizer import AdamWEMA
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.engine.state_parts import Part, open_parts, rank_file
from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors, write_atomic
from sendvae_fast.reading import count_in, read_json, reading

NUM_NAMES_SHOWN = 5


class SavedState(NamedTuple):
    """The state of an engine outside it: full tensors by names such as "exp_avg/<parameter>"."""

    names: Collection[str]
    read: Callable[[str, torch.Size], Tensor]
    """The tensor of a name, which is to have that shape."""
    num_updates: int
    """Optimizer steps that the state has seen."""
    num_skipped: int = 0


@contextmanager
def saved_state(directory: Path) -> Iterator[SavedState]:
    """What was written of a `TrainingState.snapshot` by any ranks, any ZeRO stage, either engine.

    Tensors are read one by one, while the context lasts.

    Raises:
        UserError: the directory is not such a save, or a tensor has another shape than asked for.
    """
    counts_file = directory / "state.json"
    counts = read_json(counts_file, "use another checkpoint")
    with reading(counts_file, "use another checkpoint"):
        num_updates, num_skipped, num_files = (
            count_in(counts, name) for name in ("num_updates", "num_skipped", "world_size")
        )
    with reading(directory, "use another checkpoint"), open_parts(directory, num_files) as parts:
        yield SavedState(parts.names, parts.read, num_updates, num_skipped)


class TrainingState(ABC):
    """The state of an engine: a module and its optimizer, accessed by parameter name.

    Args:
        module: on the device already, every parameter whole. Those that require a gradient are trained.
        optimizer: of the parameters that are trained. The engine gives it their state, or that of this rank's parts of
            them, before it is used.
        distributed: the ranks.
    """

    def __init__(self, module: nn.Module, optimizer: AdamWEMA, distributed: Distributed) -> None:
        self.module, self.optimizer, self.distributed = module, optimizer, distributed
        self.trained = trained_parameters(module)
        self._index = {name: index for index, name in enumerate(self.trained)}
        # Kept from before the engine, which may leave parts or nothing in the module.
        self._shapes = {name: value.shape for name, value in module.state_dict().items()}
        self.num_skipped = 0

    @abstractmethod
    def gather(self, name: str, kind: str) -> Tensor:
        """The full tensor behind one parameter name, on the device; kind "model" or one of `state_keys`. Collective.

        The result may share memory with the parameter. State exists for trained parameters only.
        """

    @abstractmethod
    def scatter(self, name: str, kind: str, value: Tensor) -> None:
        """Store a full tensor behind one parameter name: the inverse of `gather`, with the value on every rank."""

    def own_part(self, name: str, key: str) -> Part | None:
        """What this rank saves of a trained parameter's state, on the device: the ranks' parts make the whole.

        Here for engines whose every rank holds all: one has the tensor, the others nothing. No copy, no collective.
        """
        ranks = self.distributed
        return Part(0, self.gather(name, key)) if self._index[name] % ranks.world_size == ranks.rank else None

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors: exp_avg, exp_avg_sq and, with ema_decay, ema."""
        return self.optimizer.state_keys

    @property
    def num_updates(self) -> int:
        """Optimizer steps applied so far (skipped ones not counted)."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    def full_state(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind by name, on the CPU of every rank. Collective.

        "model": the module's state dict (parameters fp32, buffers in their dtype). "ema": the same keys with the
        moving average in place of every trained parameter. "exp_avg", "exp_avg_sq": trained parameters only.
        """
        if kind not in ("model", *self.state_keys):
            raise ValueError(f"there is no {kind!r} state: this engine has model, {', '.join(self.state_keys)}")
        return {name: _to_cpu(value) for name, value in self._gather_all(kind)}

    def copy_full_state(self, kind: str, snapshot: Snapshot) -> dict[str, Tensor]:
        """`full_state` of the main rank, as copies in a snapshot; the others have none of it. Collective."""
        tensors = {}
        for name, value in self._gather_all(kind):
            if self.distributed.is_main:
                tensors[name] = snapshot.copy(f"{kind}/{name}", value)
        return tensors

    def _gather_all(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `full_state`, on the device, one at a time."""
        if kind in ("exp_avg", "exp_avg_sq"):
            for name in self.trained:
                yield name, self.gather(name, kind)
            return
        for name, value in self.module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                value = self.gather(name, kind if name in self.trained else "model")
            yield name, value

    def load_model(self, tensors: dict[str, Tensor]) -> None:
        """Load a full state dict, the same on every rank, into the module; the EMA, if any, restarts from it.

        Raises:
            UserError: names or shapes differ from the module's.
        """
        _check_names("weights", wanted=self._shapes, found=tensors)
        for name, shape in self._shapes.items():
            if tensors[name].shape != shape:
                raise UserError(
                    f"weight {name} has shape {list(tensors[name].shape)} and the model wants {list(shape)}: "
                    "load it with the model settings it was made with"
                )
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                value.detach().copy_(tensors[name])
                continue
            full = tensors[name].to(self.distributed.device, torch.float32)
            self.scatter(name, "model", full)
            if name in self.trained and "ema" in self.state_keys:
                self.scatter(name, "ema", full)

    def snapshot(self, snapshot: Snapshot, *, beside: Collection[str] = ()) -> Write:
        """Copy moments, EMA and step counts, of every rank what it holds, for a directory of their own.

        Weights are not in it: they are `copy_full_state("model")`, which the caller writes in the stock layout. Nor are
        the kinds of `beside`, which the caller writes in full as well and gives to `load`.
        """
        rank, world_size = self.distributed.rank, self.distributed.world_size
        share = {}
        for name in self.trained:
            for key in self.state_keys:
                part = None if key in beside else self.own_part(name, key)
                if part is not None:
                    stored_name, values = part.named(f"{key}/{name}", self._shapes[name])
                    share[stored_name] = snapshot.copy(stored_name, values)
        num_updates = snapshot.copy("num_updates", next(iter(self.optimizer.state.values()))["step"])
        num_skipped = self.num_skipped

        def write(directory: Path) -> None:
            directory.mkdir(parents=True, exist_ok=True)
            save_tensors(rank_file(directory, rank), share)
            if rank == 0:
                counts = {"num_updates": int(num_updates), "num_skipped": num_skipped, "world_size": world_size}
                write_atomic(directory / "state.json", json.dumps(counts) + "\n")

        return write

    def load(self, directory: Path, beside: Mapping[str, dict[str, Tensor]] | None = None) -> None:
        """Read what was written of a `snapshot` by any ranks, any ZeRO stage, either engine. Call `load_model` first.

        beside: full state, by name, of the kinds that the directory may be without; where it has them, its own is read.

        Raises:
            UserError: the directory is not such a save, or belongs to another module.
        """
        with saved_state(directory) as saved:
            self.load_state(saved, f"optimizer state in {directory}", beside)

    def load_state(self, saved: SavedState, source: str, beside: Mapping[str, dict[str, Tensor]] | None = None) -> None:
        """Take over moments, EMA and counts, the same on every rank. Call `load_model` first.

        Args:
            saved: the state.
            source: where it is from, for the message.
            beside: as in `load`.

        Raises:
            UserError: it is that of other parameters than those trained here.
        """
        kinds = {name.partition("/")[0] for name in saved.names}
        given = {f"{key}/{name}": value for key, state in (beside or {}).items()
                 if key in self.state_keys and key not in kinds
                 for name, value in state.items() if name in self.trained}  # fmt: skip
        wanted = [f"{key}/{name}" for name in self.trained for key in self.state_keys]
        _check_names(source, wanted=wanted, found={*saved.names, *given})
        for name in self.trained:
            for key in self.state_keys:
                full = given.get(f"{key}/{name}")
                if full is None:
                    full = saved.read(f"{key}/{name}", self._shapes[name])
                self.scatter(name, key, full.to(self.distributed.device))
        self.num_skipped = saved.num_skipped
        for of_param in self.optimizer.state.values():
            of_param["step"].fill_(saved.num_updates)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name.

    Raises:
        ValueError: there is none.
    """
    trained = {name: param for name, param in module.named_parameters() if param.requires_grad}
    if not trained:
        raise ValueError("the module has no parameter to train: every requires_grad is False")
    return trained


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
