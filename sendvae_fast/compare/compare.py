"""A comparison, from its pictures to its page.

    pictures -> autoencoders that others start from -> trials: autoencoder, latents, generator, samples, numbers

A trial is a method with a seed. Every part of it is an ordinary run or job in a folder of its own that resumes, so a
comparison that is interrupted anywhere goes on, here or in another process that sees the folder; several may work on it
at once. `report.html` fills as parts finish.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection

import yaml

from sendvae_fast.compare.parts import noting
from sendvae_fast.compare.pictures import prepare_pictures
from sendvae_fast.compare.plan import Comparison
from sendvae_fast.compare.results import Results, print_summary
from sendvae_fast.compare.settings import CompareConfig
from sendvae_fast.compare.timeline import PICTURES, Timeline, costs, in_words, measure_speed
from sendvae_fast.compare.trial import REFERENCE
from sendvae_fast.compare.workers import num_workers, side_by_side, train_starts, work_off
from sendvae_fast.config import plain
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run import describe_changes
from sendvae_fast.engine.run_lock import wait_for_claim
from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic
from sendvae_fast.progress import Progress
from sendvae_fast.reading import read_yaml, reading

SETTINGS_FILE = "settings.yaml"
MAY_CHANGE = ("title", "only", "seeds", "control", "candidate", "batch_size")
"""Of a comparison that is begun: what adds to it, or changes the page alone."""
ADDED_LATER = ("views",)
"""Settings that the folders of earlier versions do not have."""
NUM_PARTS = 3


def run_compare(config: CompareConfig) -> int:
    """Run or finish a comparison; returns the exit code. Collective."""
    methods = {method.key: plain(method) for method in config.methods}
    return run_comparison(Comparison(config, plain(config) | {"methods": methods}), MAY_CHANGE)


def run_comparison(comparison: Comparison, may_change: Collection[str]) -> int:
    """Run or finish a comparison; returns the exit code. Collective.

    Args:
        comparison: what to do.
        may_change: settings of `comparison` that may be others than those the folder was begun with.

    Raises:
        UserError: the folder holds a comparison with other settings, what is given is not there or broken, or a trial
            failed.
    """
    numbers = comparison.check()
    ranks = init_distributed()
    with ranks.all_or_none():
        if ranks.is_main:
            claim_folder(comparison, may_change)
    timeline = Timeline(costs(comparison, measure_speed(comparison), *numbers), num_workers())
    results, root = Results(comparison, timeline), comparison.root
    code = 0
    if not ranks.broadcast_object(results.is_finished()):
        if ranks.is_main:
            say(f"all of it takes {in_words(timeline.total_range_s())} on this machine ({timeline.cores} cores), less")
            say(f"what is there already; {root / 'report.html'} can be opened after part 2 and fills as parts finish")
        code = run_parts(comparison, results, ranks)
    if ranks.is_main and code:
        say(f"stopped; what is done is kept in {root}; the same command goes on")
    elif ranks.is_main:
        shutil.rmtree(root / REFERENCE, ignore_errors=True)
        results.write()
        print_summary(comparison)
        print(f"report: {root / 'report.html'}")
    return code


def run_parts(comparison: Comparison, results: Results, ranks: Distributed) -> int:
    """Do what is missing; returns the exit code of a training that was stopped by a signal, else 0."""

    def watch() -> None:
        if ranks.is_main:
            for line in results.update():
                say(line)

    if ranks.is_main:
        say(f"[1/{NUM_PARTS}] pictures")
    with ranks.all_or_none():
        if ranks.is_main:
            with wait_for_claim(comparison.root / "data"), noting(comparison.root, PICTURES[1]):
                prepare_pictures(comparison.config.pictures, comparison.root)
    num_trials = len(comparison.trials)
    if ranks.world_size > 1:
        say(f"[2/{NUM_PARTS}] {num_trials} trials, each on all ranks") if ranks.is_main else None
        return work_off(comparison, watch)
    say(f"[2/{NUM_PARTS}] autoencoders to start from")
    if code := train_starts(comparison, ranks):
        return code
    results.write()
    say(f"[3/{NUM_PARTS}] {num_trials} trials")
    with side_by_side() as workers:
        total, start = results.total_work(), results.work()
        with Progress("trials", total, "steps and pictures", start=start) as progress:

            def watch_progress() -> None:
                progress.advance(results.work() - progress.done)
                watch()

            codes = workers.run(work_off, [comparison] * num_workers(), watch_progress)
    return max(codes)


def claim_folder(comparison: Comparison, may_change: Collection[str]) -> None:
    """Note the settings in the folder, or check that they are those it was started with."""
    settings, root = comparison.settings, comparison.root
    path = root / SETTINGS_FILE
    try:
        if path.is_file():
            remedy = "repair it, or give another folder with --run=FOLDER"
            before = read_yaml(path, remedy)
            with reading(path, remedy):
                added = [key for key in ADDED_LATER if key not in before]
                changes = describe_changes(before, settings, (*may_change, *added, *_new_methods(before, settings)))
            if changes:
                raise UserError(
                    f"{root} was started with other settings ({changes}): repeat those in {path}, or give another "
                    "folder with --run=FOLDER"
                )
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(path, yaml.safe_dump(settings, sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot use the folder {root} ({error.strerror}): choose another with --run=FOLDER") from error


def _new_methods(before: dict, settings: dict) -> list[str]:
    """The methods that only one of two settings knows: a comparison may grow."""
    old, new = (content.get("methods") for content in (before, settings))
    return (
        [f"methods.{key}" for key in old.keys() ^ new.keys()] if isinstance(old, dict) and isinstance(new, dict) else []
    )


def say(line: str) -> None:
    """A line for who waits."""
    print(line, file=sys.stderr, flush=True)
