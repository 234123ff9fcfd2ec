"""The training loop that both stages share: resume, step, log, preview, save, stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sendvae_fast import checks
from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer, newest_checkpoint
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.loggers import LoggingConfig
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.signals import EXIT_REQUEUE, StopOnSignal
from sendvae_fast.engine.streams import ToHost
from sendvae_fast.engine.watchdog import Watchdog
from sendvae_fast.errors import UserError
from sendvae_fast.train.memory_advice import advising_on_memory
from sendvae_fast.train.profiling import profiling
from sendvae_fast.train.reporter import Reporter
from sendvae_fast.train.stage import Stage, StageEvaluator

MAX_SKIPPED_STEPS = 100
"""Skipped steps in a row (gradients not finite) after which a run ends, because more would only burn time."""


@dataclass(kw_only=True)
class LoopConfig:
    """How long to train and how often to report. Raises `UserError` for a value out of range."""

    num_steps: int = 100_080
    """Optimizer steps. The paper: 80 epochs x 1251 steps for stage 1, 400,320 or 4,003,200 for stage 2."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl; values are means over those steps, and over all ranks."""
    save_every: int = 5_000
    """Steps between checkpoints; the last step is always saved."""
    save_in_background: bool = True
    """Write checkpoints beside the steps that follow: a step waits for a copy of the state in host memory, which is
    the checkpoint's size over all ranks and taken for good. false: a step waits for the disk."""
    preview_every: int = 5_000
    """Steps between preview pictures in samples/; the last step always has one."""
    profile_steps: int = 0
    """Steps under PyTorch's profiler, from the tenth after each start on: a trace and a summary in profile/."""
    evaluate_every: int | None = None
    """Steps between evaluations (`evaluation`); the last step always has one. null: 5,000 in stage 1 and 25,000 in
    stage 2 where `evaluation.features` has its weights, else none."""
    keep_checkpoints: int = 2
    """Checkpoints kept; the oldest goes once a newer one is verified."""
    step_timeout_s: float = 600.0
    """Seconds without a finished step, after the first one, that end the run: the stacks of all ranks are written, and
    the message names the rank that does not answer. A step may always take 20 times as long as the longest before."""

    def __post_init__(self) -> None:
        checks.above(0, self, "step_timeout_s", where="loop")
        checks.at_least(0, self, "profile_steps", where="loop", hint=" (0 profiles nothing)")
        checks.at_least(
            1, self, "num_steps", "log_every", "save_every", "preview_every", "keep_checkpoints", where="loop"
        )
        checks.at_least(1, self, "evaluate_every", where="loop", hint=", or null")


def fit(
    stage: Stage,
    config: LoopConfig,
    run: RunDirectory,
    global_batch: int,
    distributed: Distributed,
    logging: LoggingConfig | None = None,
    evaluator: StageEvaluator | None = None,
) -> int:
    """Train `stage` from the run's newest checkpoint to the last step.

    Returns the exit code: 0 when the run is complete, `EXIT_REQUEUE` when a signal stopped it after a save. Raises
    `UserError` after `MAX_SKIPPED_STEPS` skipped steps in a row, without another checkpoint: such weights should not
    push out an older checkpoint; and where the disk would not take the last checkpoint of this start.
    """
    with distributed.beside() as writers:
        checkpointer = Checkpointer(run.checkpoints, writers, config.keep_checkpoints, run.config_hash)
        reporter = Reporter(stage, run, config.num_steps, global_batch, distributed, logging)
        return _train(stage, config, run, checkpointer, reporter, distributed, evaluator)


def _train(
    stage: Stage,
    config: LoopConfig,
    run: RunDirectory,
    checkpointer: Checkpointer,
    reporter: Reporter,
    distributed: Distributed,
    evaluator: StageEvaluator | None,
) -> int:
    """`fit`, with checkpoints through a checkpointer whose ranks have a group of their own."""
    step = resume(stage, checkpointer)
    owed = evaluator is not None and evaluator.resume(step)
    if step >= config.num_steps and not owed:
        reporter.ended(step)
        return 0
    batches, skipped = stage.batches(step), SkippedSteps()
    with (
        Watchdog(distributed, config.step_timeout_s, run.path) as watchdog,
        BackgroundSaver(checkpointer, distributed, in_background=config.save_in_background) as saver,
        StopOnSignal(distributed) as stop,
        reporter.following(step) as progress,
        profiling(config.profile_steps, run.path / "profile", distributed) as profiled,
        advising_on_memory(run, distributed),
    ):

        def evaluate() -> None:
            assert evaluator is not None
            with watchdog.pausing("evaluating"), reporter.pausing():
                reporter.measured(step, evaluator.evaluate(stage, step))

        if owed:
            evaluate()
        while step < config.num_steps:
            of_step = stage.train_step(step, reporter.fetch(batches))
            reporter.add(of_step)
            step += 1
            skipped.see(step, of_step["grad_norm"])
            saver.settle()
            stopping, last = stop.requested(), step == config.num_steps
            if last or stopping or step % config.log_every == 0:
                reporter.report(step, progress)
            progress.advance(1, **reporter.shown)
            profiled()
            watchdog.finished(step)
            if last or stopping or step % config.save_every == 0:
                skipped.read()
                with watchdog.pausing("saving"), reporter.pausing():
                    saver.begin(step, stage.snapshot)
                    if (last or stopping) and saver.finish() is None:
                        raise _lost(step, run.checkpoints)
            if last or step % config.preview_every == 0:
                with watchdog.pausing("drawing previews"), reporter.pausing():
                    reporter.preview(step)
            if stopping and not last:
                break
            if evaluator is not None and evaluator.is_due(step):
                evaluate()
    reporter.ended(step)
    return 0 if step >= config.num_steps else EXIT_REQUEUE


def resume(stage: Stage, checkpointer: Checkpointer) -> int:
    """Load the newest sound checkpoint into `stage`; the step it was written after, 0 without one."""
    found = checkpointer.load_latest()
    if found is None:
        return 0
    step, directory = found
    stage.load(directory)
    return step


def _lost(step: int, checkpoints: Path) -> UserError:
    """The error of a run that ends at `step` without a checkpoint of it."""
    newest = newest_checkpoint(checkpoints)
    kept = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest.name}"
    return UserError(
        f"the run ended at step {step} and its checkpoint could not be written (the warning above says why), so the "
        f"steps since the last one are lost; {kept} in {checkpoints}: mend that (a full disk: make room) and run the "
        "same command again"
    )


class SkippedSteps:
    """Counts steps in a row whose gradients were not finite, and says so when they are too many.

    A norm that is on the device is read a step late: by then the device has the next step to do while the host waits.
    """

    def __init__(self) -> None:
        self._in_a_row = 0
        self._unread: tuple[int, ToHost | float] | None = None

    def see(self, step: int, grad_norm: Tensor | float) -> None:
        """Take note of the step and read the one before; UserError at the `MAX_SKIPPED_STEPS`-th in a row."""
        norm = ToHost(grad_norm) if isinstance(grad_norm, Tensor) else grad_norm
        self.read()
        self._unread = step, norm
        if not isinstance(norm, ToHost):
            self.read()

    def read(self) -> None:
        """Read what is still to be read; UserError like `see`."""
        if self._unread is None:
            return
        (step, norm), self._unread = self._unread, None
        grad_norm = norm.wait() if isinstance(norm, ToHost) else norm
        self._in_a_row = 0 if math.isfinite(grad_norm) else self._in_a_row + 1
        if self._in_a_row == MAX_SKIPPED_STEPS:
            raise UserError(
                f"the gradients of {MAX_SKIPPED_STEPS} steps in a row, up to step {step}, were not finite, so the run "
                "was stopped: go on from its newest checkpoint with engine.precision=fp32, or start another run from "
                "it (init_from) with a lower learning rate"
            )
