"""One command for a machine with a GPU: build the CUDA ops for it, measure and test them, print a table.

    make gpu-check
    make gpu-check PYTHON=python3.12 ARGS="--wheels wheels/ --out results/"
    make gpu-check ARGS="--parts bench tests"

A call takes at most `--seconds`, nine and a half minutes; all of it is planned for three calls. Each call goes on where
the last one stopped: what passed is kept, with the commit it passed at; what was not reached comes next; what failed is
tried again. Where it stopped, and all rows measured so far, are read from `--out` and bench/results: on a machine that
forgets its folder `--out` between calls, put into bench/results what the last call wrote there.

The parts, in this order: build (for this GPU only), attention (the table of its fastest libraries, which step and
sampling then use), step, sampling and bench (`python -m bench ...`, the cases of the goals first, compiled forms last),
tests (tests/gpu), sanitizers (compute-sanitizer over a call of every CUDA kernel) and demo (a short one). Each has a
time limit; a part that hangs is stopped and the next ones still run.

It uses the interpreter it is started with: that torch, that CUDA. Nothing is fetched; packages that are missing can lie
in `--wheels` as wheel files, which a machine with a network fetches for that Python, without what they depend on:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels jsonargparse docstring-parser lpips
    pip download --only-binary=:all: --python-version 3.12 -d wheels pydantic
    DS_BUILD_OPS=0 pip wheel --no-deps --no-build-isolation -w wheels deepspeed hjson

Writes gpu_check.log, gpu_check_<gpu>.json, kernels_<gpu>.json, step_<stage>_<gpu>.json, sampling_<gpu>.json and the
attention table into `--out`; in bench/results they are what `python -m bench table` reads. Exits with 1 if a part
failed.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import gpu_parts
from bench.gpu_parts import Place
from bench.machine import ROOT, machine_facts, slug, source_facts, version_facts
from bench.parts import FAILED, LEFT, Part, Runner, table

RESULTS = ROOT / "bench" / "results"
ALL_S = 570.0
"""Together less than ten minutes."""
BUILD_S, INSTALL_S = 300.0, 60.0
WORTH_STARTING = 0.6
"""The share of its limit that a part must have left to be begun."""


@dataclass(frozen=True)
class Item:
    """A piece of work that is done in one go."""

    part: str
    """The name that `--parts` knows."""
    name: str
    limit_s: float
    run: Callable[[Place, str, float], Part]
    """Given the place, and the name and the limit of the item."""


XL, SMALL_XL = (f"SiT-XL/1 + DINOv2-B, 256 px, batch {batch}" for batch in (128, 32))
VAE = "f16d32 + DINOv2-B, 256 px, batch 64"
GRAPH = ("--engines", "ddp", "ddp_graph")
DRAW = "SiT-XL/1, bf16, batch 128"


def _bench(verb: str, name: str, limit_s: float, *arguments: str) -> Item:
    return Item(verb, f"{verb} {name}", limit_s, partial(gpu_parts.measure, command=(verb, *arguments)))


def _kernels(op: str) -> Item:
    return Item("bench", f"bench {op}", 100, partial(gpu_parts.kernels, op=op))


def _tests(name: str, limit_s: float, *arguments: str) -> Item:
    return Item("tests", f"tests {name}", limit_s, partial(gpu_parts.tests, arguments=arguments))


ITEMS = (
    Item("attention", "attention", 150, gpu_parts.tune_attention),
    _bench("step", "sit XL/1", 120, "--stage", "sit", "--quick", "--cases", XL),
    _bench("step", "vae", 90, "--stage", "vae", "--quick", "--cases", VAE),
    _bench("sampling", "XL/1", 90, "--quick", "--cases", DRAW),
    _bench("step", "sit XL/1, CUDA graph", 90, "--stage", "sit", "--seconds", "10", "--cases", SMALL_XL, *GRAPH),
    *map(_kernels, ("group_norm_silu", "adaln", "noise_inject", "cosine_align", "adamw_ema")),
    _tests("of CUDA ops", 150, "tests/gpu/test_gpu_ops.py", "-k", "not triton"),
    Item("sanitizers", "memcheck", 100, gpu_parts.sanitize),
    Item("sanitizers", "racecheck", 100, gpu_parts.sanitize),
    _tests("of replayed steps", 100, "tests/gpu/test_gpu_step.py"),
    _tests("of sampling and loading", 100, "tests/gpu/test_gpu_sampling.py", "tests/gpu/test_gpu_loader.py"),
    _tests("of attention", 100, "tests/gpu/test_gpu_attention.py"),
    _bench("step", "sit XL/1, compiled", 240, "--stage", "sit", "--seconds", "30", "--cases", XL),
    _bench("step", "vae, compiled", 300, "--stage", "vae", "--seconds", "30", "--cases", VAE),
    _bench("sampling", "XL/1, compiled", 180, "--cases", DRAW),
    _bench("step", "e2e", 120, "--stage", "e2e", "--quick"),
    _bench("step", "vae, CUDA graph", 120, "--stage", "vae", "--seconds", "15", "--cases", VAE, *GRAPH),
    _bench(
        "step", "sit XL/1, engines", 120, "--stage", "sit", "--seconds", "20", "--cases", XL,
        "--engines", "ddp", "zero1",
    ),
    Item("demo", "demo", 90, gpu_parts.demo),
    _tests("of Triton ops", 180, "tests/gpu/test_gpu_ops.py", "-k", "triton"),
    _tests("of large sizes", 150, "tests/gpu/test_gpu_special.py"),
    *map(_kernels, ("sde_step", "lpips_distance", "global_norm", "center_crop", "attention")),
)  # fmt: skip
PARTS = ("build", *dict.fromkeys(item.part for item in ITEMS))


def main(arguments: list[str] | None = None) -> int:
    """Do what is left, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    parser.add_argument("--wheels", type=Path, help="folder of wheel files to install from")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--seconds", type=float, default=ALL_S, help="for this call, default %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: PyTorch sees no CUDA device here; run this on a machine with a GPU", file=sys.stderr)
        return 2
    facts = {"machine": machine_facts(torch.device("cuda")), "versions": version_facts(), **source_facts()}
    gpu = slug(facts["machine"]["name"])
    bring_results(gpu, options.out)
    record = Record(options.out / f"gpu_check_{gpu}.json", facts)
    items = [item for item in ITEMS if item.part in options.parts]
    if options.again:
        record.forget(items)
    runner = Runner(options.out / "gpu_check.log", options.seconds)
    if options.wheels is not None:
        record.note(gpu_parts.install_wheels(runner, options.wheels, INSTALL_S))
    if "build" in options.parts:  # also where it has passed: on another machine there is nothing of it
        record.note(gpu_parts.build(runner, BUILD_S))
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(runner, options.out, Path(scratch), gpu)
        place.copy_tables(back=False)
        work_through(items, record, place)
    print(f"\n{facts['machine']['name']} (sm_{facts['machine']['capability']}), commit {facts['commit']}")
    parts = list(record.parts.values())
    print(table(parts))
    if left := [part.name for part in parts if part.outcome == LEFT]:
        print(f"{len(left)} of {len(parts)} are left: run this again, it goes on there")
    return 1 if any(part.outcome == FAILED for part in parts) else 0


def bring_results(gpu: str, out: Path) -> None:
    """Copy what earlier calls found on this GPU into `out`, where it is added to."""
    out.mkdir(parents=True, exist_ok=True)
    tables = RESULTS.glob(f"{gpu_parts.ATTENTION_TABLES}/*.json")
    for source in [*RESULTS.glob(f"*_{gpu}.json"), *tables]:
        target = out / source.relative_to(RESULTS)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)


class Record:
    """The parts done so far, kept in a file that is written after each."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.parts: dict[str, Part] = {}
        if path.exists():
            before = json.loads(path.read_text())
            if before["versions"] == facts["versions"]:  # of other libraries nothing is known yet
                self.parts = {part["name"]: Part(**part) for part in before["parts"]}

    def forget(self, items: list[Item]) -> None:
        """Take these for not reached yet."""
        for item in items:
            self.parts.pop(item.name, None)

    def note(self, part: Part) -> None:
        """Keep a part, with the commit it was run at."""
        self.parts[part.name] = replace(part, commit=self.facts["commit"])
        content = {**self.facts, "parts": [asdict(part) for part in self.parts.values()]}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def work_through(items: list[Item], record: Record, place: Place) -> None:
    """Run what was not reached before, then what failed, each if there is time for most of it."""
    outcome = {item.name: record.parts[item.name].outcome if item.name in record.parts else LEFT for item in items}
    new, failed = ([item for item in items if outcome[item.name] == wanted] for wanted in (LEFT, FAILED))
    for item in [*new, *failed]:
        if place.runner.remaining_s >= WORTH_STARTING * item.limit_s:
            record.note(item.run(place, item.name, item.limit_s))
        elif outcome[item.name] == LEFT:
            record.note(Part(item.name, LEFT))


if __name__ == "__main__":
    sys.exit(main())
