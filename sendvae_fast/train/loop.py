"""The training loop that both stages share: resume, step, log, preview, save, stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.checkpoint_files import newest_checkpoint
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import LoggingConfig
from sendvae_fast.engine.signals import EXIT_REQUEUE, StopOnSignal
from sendvae_fast.engine.watchdog import Watchdog
from sendvae_fast.errors import UserError
from sendvae_fast.train.loss_spikes import LeftOutSteps, LossSpikes, Returns, ReturnToCheckpoint
from sendvae_fast.train.memory_advice import PlannedMemory, advising_on_memory
from sendvae_fast.train.profiling import profiling
from sendvae_fast.train.reporter import Reporter
from sendvae_fast.train.settings import LoopConfig
from sendvae_fast.train.skipped_steps import SkippedSteps
from sendvae_fast.train.stage import Stage, StageEvaluator


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
