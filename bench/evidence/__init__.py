"""Does alignment help generation? Runs the points of bench/evidence/plan.md, one after the other, and shows them.

    python -m bench evidence --list                  what is done and what is missing
    python -m bench evidence                         run what is missing, in the plan's order
    python -m bench evidence --points send-0         run one point (again with --again)
    python -m bench evidence --page                  rewrite docs/evidence.md's tables and plots from the results

A point is a variant and a seed. Its result is a file of bench/evidence/results with its settings, seeds, commit and all
measurements. Every part of the work is kept: a call that was interrupted, in whatever way, is gone on with by the next.

On a GPU, on photographs (an ImageFolder), in calls of nine minutes, each of which goes on where the last stopped:

    python -m bench evidence --scale gpu --device cuda --seconds 540 --data FOLDER
        --foundation-weights dinov2.safetensors --features inception --features-weights inception.pth
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch

from bench.command_line import Parser, positive
from bench.evidence.study import RESULTS, Point, Runs, Scale, read_points, read_scale
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from sendvae_fast.engine.signals import EXIT_REQUEUE
from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic


def main(arguments: list[str]) -> int:
    """The verb."""
    options = parse(arguments)
    if options.page:
        from bench.evidence.page import write_page

        write_page(options.results)
        return 0
    scale = read_scale(options.scale, options.foundation_weights)
    points = chosen(read_points(), options.points)
    if options.list:
        print(listing(points, scale, options.results))
        return 0
    if scale.num_train is None and options.data is None:
        raise UserError("--data is missing: the photographs, an ImageFolder")
    return run(points, scale, options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = Parser("evidence", __doc__)
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--page", action="store_true", help="rewrite docs/evidence.md from the results")
    parser.add_argument("--points", nargs="+", metavar="POINT", help="these alone: send-0, or send for all its seeds")
    parser.add_argument("--again", action="store_true", help="run points whose results are there")
    parser.add_argument("--scale", default="cpu", help="cpu, gpu or tiny: a file of bench/evidence/scales")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", help="photographs for the scale gpu, an ImageFolder")
    parser.add_argument("--foundation-weights", help="weight file of the scale gpu's foundation model")
    parser.add_argument("--features", default="inception", help="network that judges photographs")
    parser.add_argument("--features-weights", help="its weight file")
    parser.add_argument("--seconds", type=float, help="end this call after so long; the next one goes on")
    parser.add_argument("--threads", type=positive, default=1, help="of PyTorch; 1 keeps a point the same everywhere")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence", help="folder of unfinished work")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def chosen(points: list[Point], names: list[str] | None) -> list[Point]:
    """The points of these names or variants; all without names.

    Raises:
        UserError: there is no such point.
    """
    if names is None:
        return points
    known = {point.name for point in points} | {point.variant.key for point in points}
    if unknown := [name for name in names if name not in known]:
        variants = ", ".join(dict.fromkeys(point.variant.key for point in points))
        raise UserError(f"--points: no point {'; '.join(unknown)}: a variant and a seed, as send-0, of {variants}")
    return [point for point in points if point.name in names or point.variant.key in names]


def listing(points: list[Point], scale: Scale, results: Path) -> str:
    """A line for each variant: its batch, and the seeds done and missing."""
    lines = []
    for key in dict.fromkeys(point.variant.key for point in points):
        own = [point for point in points if point.variant.key == key]
        done = [point.seed for point in own if point.result_file(scale, results).is_file()]
        missing = [point.seed for point in own if point.seed not in done]
        text = f"done {done or 'none'}" + (f", missing {missing}" if missing else "")
        lines.append(f"{own[0].batch:11s} {key:22s} {text}")
    return "\n".join(lines)


def run(points: list[Point], scale: Scale, options: argparse.Namespace) -> int:
    """Run what is missing; returns 0, `EXIT_REQUEUE` where the time was over, 1 where a point failed."""
    from bench.evidence.networks import make_missing
    from bench.evidence.pictures import Judge
    from bench.evidence.point import PointJob, Stopped, prepare
    from sendvae_fast.engine.distributed import init_distributed
    from sendvae_fast.evaluation.feature_config import FeaturesConfig

    torch.set_num_threads(options.threads)
    distributed = init_distributed(options.device)
    facts = {"machine": machine_facts(distributed.device), "versions": version_facts(), **source_facts()}
    root, features = options.runs / scale.name, FeaturesConfig(name=options.features, weights=options.features_weights)
    failed = []
    try:
        with time_limit(options.seconds):
            make_missing([scale.judge])
            prepare(Runs(scale, points[0], root), options.data)
            judge = Judge.open(Runs(scale, points[0], root), features, distributed.device)
            for point in points:
                runs, file = Runs(scale, point, root), point.result_file(scale, options.results)
                if file.is_file() and not options.again:
                    check_same(file, runs)
                    continue
                print(f"{time.strftime('%H:%M:%S')} {point.name}", flush=True)
                job = PointJob(runs, judge, distributed)
                try:
                    make_missing([scale.foundations.get(point.variant.foundation, {}).get("weights")])
                    result = job.run() | facts
                except UserError as error:
                    print(f"error: {point.name}: {error}", file=sys.stderr, flush=True)
                    failed.append(point.name)
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, json.dumps(result, indent=1) + "\n")
                job.clean()
                print(f"{time.strftime('%H:%M:%S')} {point.name}: {file}", flush=True)
    except Stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return EXIT_REQUEUE
    return 1 if failed else 0


def check_same(file: Path, runs: Runs) -> None:
    """Raise UserError where a result is of other settings than the plan's."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["identity"] != runs.identity():
        raise UserError(
            f"{file} was made with other settings than {runs.point.name} has now; remove it, or give --again"
        )


class time_limit:  # noqa: N801 - used like a function
    """Asks this process to stop after some seconds, as a batch system does: a training saves itself."""

    def __init__(self, seconds: float | None) -> None:
        self._timer = None if seconds is None else threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._stop)
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _stop(number: int, frame: FrameType | None) -> None:
        """Between trainings: measurements are kept one by one, and the next call makes this one again."""
        from bench.evidence.point import Stopped

        raise Stopped
