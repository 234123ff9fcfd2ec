"""The demo: everything the project does, end to end, small enough for two CPU cores, ending in a report.

    pictures -> plain autoencoder -> three variants side by side: the plain one, fine-tuned without alignment (control),
    fine-tuned for as many steps with it (Send-VAE); each -> latent cache -> SiT with REPA -> samples -> evaluation

`report.html` can be opened once the plain autoencoder is trained and fills as parts finish. Every training is an
ordinary run in its own folder, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.demo.pictures import HELD_OUT_EVERY, prepare_pictures
from sendvae_fast.demo.results import Results, print_summary
from sendvae_fast.demo.settings import PLANS, DemoConfig, vae_config
from sendvae_fast.demo.timeline import Timeline, costs, in_words, measure_speed
from sendvae_fast.demo.variant import VariantJob, draw_reconstructions
from sendvae_fast.demo.workers import num_workers, side_by_side
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run import plain, recorded_changes
from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic
from sendvae_fast.progress import Progress
from sendvae_fast.train.vae.stage import train_vae

SETTINGS_FILE = "settings.yaml"
NUM_PARTS = 3


def run_demo(config: DemoConfig) -> int:
    """Run or finish the demo; returns the exit code.

    Raises:
        UserError: the folder holds a demo with other settings, or the user's photographs are too few.
    """
    root = Path(config.run)
    claim_folder(config, root)
    timeline = Timeline(costs(config, measure_speed(), *num_pictures(config)), num_workers())
    results = Results(config, root, timeline)
    code = 0
    if not results.is_finished():
        say(f"all of it takes {in_words(timeline.total_range_s())} on this machine ({timeline.cores} cores), less what")
        say(f"is there already; {root / 'report.html'} can be opened after part 2 and fills as parts finish")
        code = run_parts(config, root, results)
    if code == 0:
        print_summary(root, results.write())
        print(f"report: {root / 'report.html'}")
    return code


def run_parts(config: DemoConfig, root: Path, results: Results) -> int:
    """Do what is missing; returns the exit code of a training that was stopped by a signal, else 0."""
    with part(results, 1, "pictures"):
        train, test = prepare_pictures(config, root)
    with part(results, 2, "plain autoencoder") as codes:
        codes.append(train_vae(vae_config(config, PLANS[0], root, train)))
        if not any(codes):
            draw_reconstructions(PLANS[0], root, test, init_distributed())
    if any(codes):
        return max(codes)
    with part(results, 3, "three variants") as codes, side_by_side() as workers:
        jobs = [VariantJob(config, plan, root, train, test) for plan in PLANS]
        with Progress("variants", results.total_work(), "steps and pictures", start=results.work()) as progress:

            def watch() -> None:
                progress.advance(results.work() - progress.done)
                for line in results.update():
                    say(line)

            codes += workers.run(VariantJob.run, jobs, watch)
    return max(codes)


def claim_folder(config: DemoConfig, root: Path) -> None:
    """Note the settings in the demo's folder, or check that they are those it was started with."""
    settings = {key: value for key, value in plain(config).items() if key != "run"}
    path = root / SETTINGS_FILE
    try:
        if path.is_file():
            changes = recorded_changes(path, settings, (), "repair it, or give another folder with --run=FOLDER")
            if changes:
                raise UserError(
                    f"{root} was started with other settings ({changes}): repeat those in {path}, or give another "
                    "folder with --run=FOLDER"
                )
            return
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(path, yaml.safe_dump(settings, sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot use the folder {root} ({error.strerror}): choose another with --run=FOLDER") from error


def num_pictures(config: DemoConfig) -> tuple[int, int]:
    """How many pictures there are to train on and to test with, about."""
    if config.data is None:
        return config.num_train_images, config.num_test_images
    total = len(Catalog.open(config.data))
    return total - total // HELD_OUT_EVERY, total // HELD_OUT_EVERY


@contextmanager
def part(results: Results, number: int, title: str) -> Iterator[list[int]]:
    """Say that a part begins; when it ends well, note its time and write the page. What is appended are exit codes."""
    say(f"[{number}/{NUM_PARTS}] {title}")
    start_s, codes = time.monotonic(), []
    yield codes
    if not any(codes):
        results.finish(title, time.monotonic() - start_s)


def say(line: str) -> None:
    """A line for who waits."""
    print(line, file=sys.stderr, flush=True)
