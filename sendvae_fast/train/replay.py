"""One step of a run again, with a look at every tensor on its way: where a number stopped being finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.engine.snapshot import find_unsound
from sendvae_fast.errors import UserError
from sendvae_fast.progress import Progress
from sendvae_fast.train.loss_spikes import LeftOutSteps
from sendvae_fast.train.skipped_steps import first_not_finite
from sendvae_fast.train.stage import Stage

NUM_SHOWN = 8
"""Gradients that a report spells out, of each kind."""


class ReplayableStage(Stage, Protocol):
    """A training stage whose networks can be watched."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines of the networks in training, by name."""
        ...


def replay(
    stage: ReplayableStage,
    run: RunDirectory,
    step: int,
    distributed: Distributed,
    begin: Callable[[], int] | None = None,
) -> int:
    """Train from the newest checkpoint before `step` up to it, watch that step, and print what was seen.

    The steps between are made again as they were, so that the step is the same bit for bit where the run's are.
    Nothing is written into the run. Returns the exit code. Collective. `begin` is that of `train.loop.fit`.

    Raises:
        UserError: the run has not come so far, or passed over that step's batch; or hooks in its networks do not see
            what its engine does.
    """
    for engine in stage.engines.values():
        check_watchable(engine.config)
    found = Checkpointer(run.checkpoints, distributed, config_hash=run.config_hash).load_latest(before=step)
    if found is not None:
        start, directory = found
        stage.load(directory)
    else:
        start = 0 if begin is None else begin()
    left_out = LeftOutSteps(run.path, distributed)
    if step <= start:
        raise UserError(f"step {step} is none of this run, which begins after step {start}: give a later one")
    if step in left_out:
        raise UserError(f"step {step} was never made: the run passed over its batch after a loss spike")
    batches = stage.batches(start)
    with Progress("replay", step, "step", start=start) as progress:
        for number in range(start + 1, step):
            batch = next(batches)
            if number not in left_out:
                stage.train_step(number - 1, batch)
            progress.advance(1)
    batch = next(batches)
    unsound = {name: find_unsound(engine.full_state("model").items()) for name, engine in stage.engines.items()}
    watches = {name: Watch(engine.module) for name, engine in stage.engines.items()}
    values = stage.train_step(step - 1, batch)
    lines = [
        f"rank {distributed.rank}: samples {', '.join(map(str, batch.ids.tolist()))}",
        "  " + ", ".join(f"{name} {float(value):.4g}" for name, value in values.items()),
        f"  first value that is not finite: {first_not_finite(values) or 'none'}",
    ]
    for name, watch in watches.items():
        watch.close()
        lines += [f"  {name}: {line}" for line in [*_of_weights(unsound[name]), *watch.lines()]]
    reports = distributed.gather_objects(lines)
    if distributed.is_main:
        origin = f"from {found[1].name}" if found else "from the beginning"
        print(f"step {step} of {run.path}, {origin}")
        print("\n".join(line for report in reports for line in report))
    return 0


def check_watchable(config: EngineConfig) -> None:
    """Raise a `UserError` where hooks of modules and parameters do not see the numbers of a step.

    Compiled blocks run without the hooks of the modules in them, a recorded step runs no Python at all, and where
    ZeRO 3 splits parameters, hooks do not see whole gradients.
    """
    for hides, setting in (
        (config.compile, "engine.compile=false"),
        (config.cuda_graph, "engine.cuda_graph=false"),
        (not config.has_whole_parameters, "engine.zero_stage=2"),
    ):
        if hides:
            raise UserError(
                f"--replay cannot look into this engine's steps: add --{setting}, which gives the same numbers but for "
                "rounding"
            )


class Watch:
    """Watches a network through one step: outputs of its modules and gradients of its parameters, as they come.

    The gradients are those of this rank's samples, before ranks and accumulation are averaged.
    """

    def __init__(self, module: nn.Module) -> None:
        self.output: str | None = None
        """The first module with an output that is not finite."""
        self.gradients: list[tuple[str, float, float]] = []
        """Parameter, share of its numbers that are not finite, L2 norm; in the order of the backward pass."""
        self._handles: list[RemovableHandle] = []
        for name, part in module.named_modules():
            hook = part.register_forward_hook(lambda part, _, output, name=name: self._see_output(name, part, output))
            self._handles.append(hook)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hook = parameter.register_hook(lambda gradient, name=name: self._see_gradient(name, gradient))
                self._handles.append(hook)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def lines(self) -> list[str]:
        """What was seen, in words."""
        broken = [(name, share) for name, share, _ in self.gradients if share > 0]
        lines = [f"first module with an output that is not finite: {self.output or 'none'}"]
        shown = ", ".join(f"{name} ({share:.0%} of it)" for name, share in broken[:NUM_SHOWN])
        more = ", ..." if len(broken) > NUM_SHOWN else ""
        lines.append(
            f"gradients that are not finite, in the order of the backward pass: {len(broken)} of "
            f"{len(self.gradients)}{': ' if broken else ''}{shown}{more}"
        )
        largest = sorted((entry for entry in self.gradients if entry[1] == 0), key=lambda entry: -entry[2])[:NUM_SHOWN]
        if largest:
            lines.append("largest gradients: " + ", ".join(f"{name} {norm:.3g}" for name, _, norm in largest))
        return lines

    def _see_output(self, name: str, part: nn.Module, output: object) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        if self.output is None and not all(map(_is_finite, tensors)):
            self.output = f"{name or 'the network itself'} ({type(part).__name__})"

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        finite = gradient.isfinite()
        self.gradients.append((name, 1 - finite.double().mean().item(), gradient.double().norm().item()))


def _is_finite(value: object) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _of_weights(unsound: list[tuple[str, str]]) -> list[str]:
    if not unsound:
        return ["weights before the step: finite"]
    shown = ", ".join(f"{name} {reason}" for name, reason in unsound[:NUM_SHOWN])
    return [f"weights before the step: {len(unsound)} tensors are unsound: {shown}"]
