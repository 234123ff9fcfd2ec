"""One command for a machine with a GPU: build the CUDA ops for it, test them, measure them, print a table.

    make gpu-check
    make gpu-check PYTHON=python3.12 ARGS="--wheels wheels/ --out results/"
    make gpu-check ARGS="--parts build bench"

The parts: build (for this GPU only), tests (tests/gpu), memcheck and racecheck (compute-sanitizer over a call of every
CUDA kernel), bench (`python -m bench kernels`), step and sampling (those benchmarks, their first cases), demo (a short
one). Each has a time limit and all together have `--seconds`; a part that hangs is stopped and the next ones still run.

It uses the interpreter it is started with: that torch, that CUDA. Nothing is fetched; packages that are missing can
lie in `--wheels` as wheel files. Writes gpu_check.log, gpu_check_<gpu>.json, kernels_<gpu>.json,
step_<stage>_<gpu>.json and sampling_<gpu>.json into `--out`, and exits with 1 if a part failed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

import torch

from bench.machine import ROOT, machine_facts, slug, source_facts, version_facts
from bench.parts import FAILED, PASSED, SKIPPED, Part, Runner, table
from bench.result_file import write_rows

PARTS = ("build", "tests", "memcheck", "racecheck", "bench", "step", "sampling", "demo")
LIMITS_S = {
    "install": 60, "build": 300, "tests": 240, "memcheck": 60, "racecheck": 60, "bench": 180, "step": 75,
    "sampling": 60, "demo": 60,
}  # fmt: skip
ALL_S = 570
"""Together less than ten minutes."""
SANITIZER_FOUND = 99  # its exit code for findings, unlike any of Python's
DEMO_SCALE = {
    "num_train_images": 1000,
    "num_test_images": 300,
    "vae_steps": 300,
    "finetune_steps": 300,
    "generator_steps": 300,
    "generate.num_samples": 100,
}
"""A short demo: it shows that everything runs on the GPU, not that it learns."""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; a part whose forerunner failed still runs where it can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "bench" / "results")))
    parser.add_argument("--wheels", type=Path, help="folder of wheel files to install from")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--seconds", type=float, default=ALL_S, help="for all parts together, default %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: PyTorch sees no CUDA device here; run this on a machine with a GPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)

    facts = {"machine": machine_facts(torch.device("cuda")), "versions": version_facts(), **source_facts()}
    runner = Runner(options.out / "gpu_check.log", options.seconds)
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        if options.wheels is not None:
            parts.append(install_wheels(runner, options.wheels))
        for name in PARTS:
            if name in options.parts:
                parts += run_part(name, runner, options.out, Path(scratch))
    result = {**facts, "parts": [asdict(part) for part in parts]}
    path = options.out / f"gpu_check_{slug(facts['machine']['name'])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"\n{facts['machine']['name']} (sm_{facts['machine']['capability']}), {versions}, commit {facts['commit']}")
    print(table(parts))
    return 1 if any(part.outcome == FAILED for part in parts) else 0


def run_part(name: str, runner: Runner, out: Path, scratch: Path) -> list[Part]:
    """The rows of one of `PARTS`."""
    if name == "build":
        return [build(runner)]
    if name == "tests":
        return run_tests(runner, scratch)
    if name == "bench":
        return run_bench(runner, out, scratch)
    if name == "step":
        return [run_short(runner, name, out, "--stage", stage) for stage in ("vae", "sit")]
    if name == "sampling":
        return [run_short(runner, name, out)]
    return [run_demo(runner, scratch)] if name == "demo" else [sanitize(runner, name)]


def install_wheels(runner: Runner, wheels: Path) -> Part:
    """Install wheel files as they are, without their dependencies: the machine's torch must stay what it is."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *files]
    return runner.run("install wheels", command, LIMITS_S["install"])[0]


def build(runner: Runner) -> Part:
    """Build for this machine's GPU only; a failing build fails here instead of falling back."""
    environment = {
        "SENDVAE_BUILD": "require", "SENDVAE_BUILD_CUDA": "1",
        "SENDVAE_CUDA_ARCHITECTURES": os.environ.get("SENDVAE_CUDA_ARCHITECTURES", "native"),
    }  # fmt: skip
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return runner.run("build", command, LIMITS_S["build"], environment)[0]


def run_tests(runner: Runner, scratch: Path) -> list[Part]:
    """The GPU suite, one row per test file; side by side in several processes where pytest-xdist is installed."""
    report = scratch / "gpu_tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None:
        # Tests that fill the GPU's memory are one group, so that only one of them runs at a time.
        command += ["-n", str(min(8, len(os.sched_getaffinity(0)))), "--dist", "loadgroup"]
    whole, _ = runner.run("gpu tests", command, LIMITS_S["tests"])
    files = rows_of_report(report) if report.exists() else []
    return files if files and whole.outcome == PASSED else [whole, *files]


def rows_of_report(report: Path) -> list[Part]:
    """Rows of a JUnit report: a file passes when something in it passed and nothing failed."""
    counts: dict[str, Counter] = {}
    seconds: dict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").split(".")[-1]
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts.setdefault(file, Counter())[outcome] += 1
        seconds[file] += float(case.get("time", 0))
    return [
        Part(
            file, FAILED if count["failure"] or count["error"] or not count["passed"] else PASSED, seconds[file],
            ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items()) if number), dict(count),
        )
        for file, count in sorted(counts.items())
    ]  # fmt: skip


def sanitize(runner: Runner, tool: str) -> Part:
    """compute-sanitizer over one call of every CUDA kernel; only our kernels are instrumented."""
    program = find_sanitizer()
    if program is None:
        return Part(tool, SKIPPED, detail="compute-sanitizer is not installed")
    command = [
        program, "--tool", tool, "--kernel-name", "kernel_substring=sendvae", "--report-api-errors", "no",
        "--error-exitcode", str(SANITIZER_FOUND), sys.executable, "tests/gpu/call_every_kernel.py",
    ]  # fmt: skip
    # PyTorch's allocator hands out parts of large blocks, in which an access out of bounds would not be seen.
    part, output = runner.run(tool, command, LIMITS_S[tool], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if "Device not supported" in output:
        return Part(tool, SKIPPED, part.seconds, "compute-sanitizer does not support this device here")
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)[-1:]
    part.detail = "; ".join(filter(None, [part.detail, *summary]))
    return part


def find_sanitizer() -> str | None:
    """compute-sanitizer in PATH or beside nvcc."""
    beside = [str(Path(nvcc).resolve().parent) for nvcc in [shutil.which("nvcc")] if nvcc]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *beside]))


def run_bench(runner: Runner, out: Path, scratch: Path) -> list[Part]:
    """The kernel benchmark, one row per op with the goals it reached. What was measured before a stop counts."""
    command = [sys.executable, "-m", "bench", "kernels", "--device", "cuda", "--out", str(scratch)]
    whole, _ = runner.run("bench kernels", command, LIMITS_S["bench"])
    rows = [row for path in scratch.glob("kernels_*.json") for row in json.loads(path.read_text())]
    if rows:
        write_rows(out, "kernels", rows[0]["machine"]["name"], rows, itemgetter("op"))
    return [whole, *bench_ops(rows)]


def bench_ops(rows: list[dict]) -> list[Part]:
    """Rows of the table from rows of the benchmark."""
    from bench.goals import verdicts  # as above
    from bench.kernels import errors_of

    parts = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        errors = [error for row in mine for error in errors_of(row)]
        judged = [verdict for row in mine if "forms" in row for verdict in verdicts(row, "graph")]
        detail = [f"{sum(verdict.met for verdict in judged)} of {len(judged)} goals met", *errors[:1]]
        parts.append(Part(f"bench {op}", FAILED if errors else PASSED, detail="; ".join(detail)))
    return parts


def run_short(runner: Runner, verb: str, out: Path, *arguments: str) -> Part:
    """A benchmark's first case, with the goals it reached; it fails when ours computes something else than eager."""
    command = [sys.executable, "-m", "bench", verb, *arguments, "--quick", "--out", str(out)]
    part, output = runner.run(" ".join(["bench", verb, *arguments[1:]]), command, LIMITS_S[verb])
    said = re.findall(r"^ +(?:FAILED .*|.*\(goal .*)$", output, re.MULTILINE)
    part.detail = "; ".join(filter(None, [part.detail, *map(str.strip, said)]))
    return part


def run_demo(runner: Runner, scratch: Path) -> Part:
    """A short demo on the GPU; its throughput is read from the runs' logs."""
    options = [f"--{key}={value}" for key, value in DEMO_SCALE.items()]
    folder = scratch / "demo"
    command = [sys.executable, "-m", "sendvae_fast", "demo", f"--run={folder}", "--debug", *options]
    part, _ = runner.run("demo", command, LIMITS_S["demo"])
    if part.outcome == PASSED:
        for stage in ("send/vae", "send/sit"):
            lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
            part.facts[stage] = json.loads(lines[-1])["img_per_s"]
        part.detail = ", ".join(f"{stage} {rate:.0f} img/s" for stage, rate in part.facts.items())
    return part


if __name__ == "__main__":
    sys.exit(main())
