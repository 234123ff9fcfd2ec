"""The training loop that both stages share: resume, step, log, preview, save, stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sendvae_fast import checks
from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer, is_milestone, newest_checkpoint
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.loggers import LoggingConfig
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.signals import EXIT_REQUEUE, StopOnSignal
from sendvae_fast.engine.watchdog import Watchdog
from sendvae_fast.errors import UserError
from sendvae_fast.train.loss_spikes import LeftOutSteps, LossSpikes, Returns, ReturnToCheckpoint
from sendvae_fast.train.memory_advice import PlannedMemory, advising_on_memory
from sendvae_fast.train.profiling import profiling
from sendvae_fast.train.reporter import Reporter
from sendvae_fast.train.skipped_steps import SkippedSteps
from sendvae_fast.train.stage import Stage, StageEvaluator


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
    keep_every: int | None = field(default=None, metadata={checks.ADDED_LATER: True})
    """Steps between milestones: checkpoints of these steps are written beside those of `save_every`, and kept for good.
    null: none. 400,320 keeps the 80th and every 80th epoch of the paper's generators."""
    step_timeout_s: float = 600.0
    """Seconds without a finished step, after the first one, that end the run: the stacks and last collectives of all
    ranks are written, and the message names the rank that does not answer. A step may always take 20 times as long as
    the longest before."""
    start_timeout_s: float = 3600.0
    """The same for the first step of each start, in which networks are compiled, and for checkpoints, previews and
    evaluations. A collective fails after as long."""
    spike_threshold: float = 20.0
    """Robust z-score of a step's loss, against the median of the last 128, above which a warning is given; 0: none."""
    spike_return_steps: int = 0
    """Steps up to such a spike whose batches are passed over, after the run has gone back to its newest checkpoint
    before them; 0 only warns. Each start judges losses afresh, so an interrupted run may go back from other spikes."""

    def __post_init__(self) -> None:
        checks.above(0, self, "step_timeout_s", "start_timeout_s", where="loop")
        checks.at_least(0, self, "profile_steps", where="loop", hint=" (0 profiles nothing)")
        checks.at_least(0, self, "spike_threshold", "spike_return_steps", where="loop")
        checks.at_least(
            1, self, "num_steps", "log_every", "save_every", "preview_every", "keep_checkpoints", where="loop"
        )
        checks.at_least(1, self, "evaluate_every", "keep_every", where="loop", hint=", or null")

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, be it the last or not."""
        return step % self.save_every == 0 or is_milestone(step, self.keep_every)


def fit(
    stage: Stage,
    config: LoopConfig,
    run: RunDirectory,
    global_batch: int,
    distributed: Distributed,
    logging: LoggingConfig | None = None,
    evaluator: StageEvaluator | None = None,
    planned: PlannedMemory | None = None,
    begin: Callable[[], int] | None = None,
) -> int:
    """Train `stage` from the run's newest checkpoint to the last step.

    begin: called where there is no checkpoint yet; it may give the stage another state than it was built with, and
    returns the step after which that is.

    Returns the exit code: 0 when the run is complete, `EXIT_REQUEUE` when a signal stopped it after a save. Raises
    `UserError` after `MAX_SKIPPED_STEPS` skipped steps in a row, without another checkpoint: such weights should not
    push out an older checkpoint; and where the disk would not take the last checkpoint of this start.
    """
    with distributed.beside(config.start_timeout_s) as writers:
        checkpointer = Checkpointer(
            run.checkpoints, writers, config.keep_checkpoints, run.config_hash, keep_every=config.keep_every
        )
        returns = Returns(config.spike_return_steps, LeftOutSteps(run.path, distributed), checkpointer)
        while True:
            reporter = Reporter(stage, run, config.num_steps, global_batch, distributed, logging)
            with suppress(ReturnToCheckpoint):
                return _train(
                    stage, config, run, checkpointer, returns, reporter, distributed, evaluator, planned, begin
                )


def _train(
    stage: Stage,
    config: LoopConfig,
    run: RunDirectory,
    checkpointer: Checkpointer,
    returns: Returns,
    reporter: Reporter,
    distributed: Distributed,
    evaluator: StageEvaluator | None,
    planned: PlannedMemory | None,
    begin: Callable[[], int] | None,
) -> int:
    """`fit`, from the newest checkpoint up to the end or to a spike that the run is to go back from."""
    step = resume(stage, checkpointer, begin)
    owed = evaluator is not None and evaluator.resume(step)
    if step >= config.num_steps and not owed:
        reporter.ended(step)
        return 0
    batches, skipped = stage.batches(step), SkippedSteps(distributed, stage.title)
    spikes = LossSpikes(config.spike_threshold, distributed)
    with (
        Watchdog(distributed, config.step_timeout_s, config.start_timeout_s, run.path) as watchdog,
        BackgroundSaver(checkpointer, distributed, in_background=config.save_in_background) as saver,
        StopOnSignal(distributed) as stop,
        reporter.following(step) as progress,
        profiling(config.profile_steps, run.path / "profile", distributed) as profiled,
        advising_on_memory(run, distributed, planned),
    ):

        def evaluate() -> None:
            assert evaluator is not None
            with watchdog.pausing("evaluating"), reporter.pausing():
                reporter.measured(step, evaluator.evaluate(stage, step))

        if owed:
            evaluate()
        while step < config.num_steps:
            batch = reporter.fetch(batches)
            step += 1
            if step not in returns.left_out:
                of_step = stage.train_step(step - 1, batch)
                reporter.add(of_step)
                skipped.see(step, of_step, batch.ids)
                spiked = spikes.see(step, of_step["loss"])
                if spiked is not None:
                    returns.consider(spiked, saver)
            saver.settle()
            stopping, last = stop.requested(), step == config.num_steps
            if last or stopping or step % config.log_every == 0:
                reporter.add({"skipped_steps": float(skipped.take_count())})
                reporter.report(step, progress)
            progress.advance(1, **reporter.shown)
            profiled()
            watchdog.finished(step)
            if last or stopping or config.saves(step):
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


def resume(stage: Stage, checkpointer: Checkpointer, begin: Callable[[], int] | None) -> int:
    """Load the newest sound checkpoint into `stage`, or `begin` without one (see `fit`); the step after which it is."""
    found = checkpointer.load_latest()
    if found is None:
        return 0 if begin is None else begin()
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
