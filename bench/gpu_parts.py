"""The parts of gpu-check: each runs one command and makes a row of what it said."""

import importlib.util
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.parts import FAILED, PASSED, SKIPPED, Part, Runner

ATTENTION_TABLES = "sendvae_fast"
"""The folder of the attention tables in a cache directory."""
MAX_TEST_PROCESSES = 8
MAX_NAMED_FAILURES = 5
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
TUNE = """
import torch
from sendvae_fast.ops.attention.tuning import model_shapes, tune_attention
print(*tune_attention(model_shapes(torch.bfloat16)), sep="\\n")
"""


@dataclass(frozen=True)
class Place:
    """Where parts run and write."""

    runner: Runner
    out: Path
    scratch: Path
    gpu: str
    """The GPU's name in the names of files."""

    @property
    def cache(self) -> Path:
        """The cache directory of all commands, for the attention tables; other packages keep there what they like."""
        return self.scratch / "cache"

    def run(self, name: str, command: list[str], limit_s: float, environment: dict[str, str] | None = None):
        """A command with the attention tables of `cache`; its row and its output."""
        return self.runner.run(name, command, limit_s, {"XDG_CACHE_HOME": str(self.cache), **(environment or {})})

    def copy_tables(self, *, back: bool) -> None:
        """Copy the attention tables of earlier calls from `out` into `cache`, or `back`."""
        places = [self.out / ATTENTION_TABLES, self.cache / ATTENTION_TABLES]
        source, target = reversed(places) if back else places
        if source.exists():
            shutil.copytree(source, target, dirs_exist_ok=True)


def install_wheels(runner: Runner, wheels: Path, limit_s: float) -> Part:
    """Install wheel files as they are, without their dependencies: the machine's torch must stay what it is."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *files]
    return runner.run("install wheels", command, limit_s)[0]


def build(runner: Runner, limit_s: float) -> Part:
    """Build for this machine's GPU only; a failing build fails here instead of falling back."""
    environment = {
        "SENDVAE_BUILD": "require", "SENDVAE_BUILD_CUDA": "1",
        "SENDVAE_CUDA_ARCHITECTURES": os.environ.get("SENDVAE_CUDA_ARCHITECTURES") or architecture(),
    }  # fmt: skip
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return runner.run("build", command, limit_s, environment)[0]


def architecture() -> str:
    """This GPU's architecture for CMake, with its own instructions from Hopper on and without PTX: 90a-real."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def tune_attention(place: Place, name: str, limit_s: float) -> Part:
    """Measure the attention libraries, before anything that attends is."""
    part, output = place.run(name, [sys.executable, "-c", TUNE], limit_s)
    place.copy_tables(back=True)
    part.detail = "; ".join(filter(None, [part.detail, f"{output.count('Measurement(')} shapes"]))
    return part


def measure(place: Place, name: str, limit_s: float, command: tuple[str, ...]) -> Part:
    """A benchmark, with the goals it reached; it fails when ours computes something else than eager."""
    whole = [sys.executable, "-m", "bench", *command, "--out", str(place.out)]
    part, output = place.run(name, whole, limit_s)
    said = re.findall(r"^ +(?:FAILED .*|.*\(goal .*)$", output, re.MULTILINE)
    part.detail = "; ".join(filter(None, [part.detail, *map(str.strip, said)]))
    return part


def kernels(place: Place, name: str, limit_s: float, op: str) -> Part:
    """The kernel benchmark of one op, with the goals it reached. What was measured before a stop counts."""
    from bench.goals import verdicts  # not before the build: they import the package, whose libraries it replaces
    from bench.kernels import errors_of

    command = [sys.executable, "-m", "bench", "kernels", "--device", "cuda", "--ops", op, "--out", str(place.out)]
    part, _ = place.run(name, command, limit_s)
    path = place.out / f"kernels_{place.gpu}.json"
    rows = [row for row in json.loads(path.read_text()) if row["op"] == op] if path.exists() else []
    errors = [error for row in rows for error in errors_of(row)]
    judged = [verdict for row in rows if "forms" in row for verdict in verdicts(row, "graph")]
    goals = f"{sum(verdict.met for verdict in judged)} of {len(judged)} goals met"
    part.detail = "; ".join(filter(None, [part.detail, goals, *errors[:1]]))
    return part


def tests(place: Place, name: str, limit_s: float, arguments: tuple[str, ...]) -> Part:
    """Tests of tests/gpu; side by side in several processes where pytest-xdist is installed."""
    report = place.scratch / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *arguments, "-q", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None:
        # Tests that fill the GPU's memory are one group, so that only one of them runs at a time.
        count = min(MAX_TEST_PROCESSES, len(os.sched_getaffinity(0)))
        command += ["-n", str(count), "--dist", "load"]
    part, _ = place.run(name, command, limit_s)
    counts, failed = Counter(), []
    if report.exists():
        counts, failed = counts_of(report)
    if part.outcome == PASSED and not counts["passed"]:
        part.outcome = FAILED
    said = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no report"
    part.detail = "; ".join(filter(None, [part.detail, said, *failed[:MAX_NAMED_FAILURES]]))
    part.facts = dict(counts)
    return part


def counts_of(report: Path) -> tuple[Counter, list[str]]:
    """Tests of a JUnit report by outcome, and the names of those that failed."""
    counts, failed = Counter(), []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[outcome] += 1
        if outcome in ("failure", "error"):
            failed.append(case.get("name", ""))
    return counts, failed


def sanitize(place: Place, name: str, limit_s: float) -> Part:
    """compute-sanitizer's tool of this name over calls of every CUDA kernel; only our kernels are instrumented."""
    program = find_sanitizer()
    if program is None:
        return Part(name, SKIPPED, detail="compute-sanitizer is not installed")
    command = [
        program, "--tool", name, "--kernel-name", "kernel_substring=sendvae", "--report-api-errors", "no",
        "--error-exitcode", str(SANITIZER_FOUND), sys.executable, "tests/gpu/call_every_kernel.py",
    ]  # fmt: skip
    # PyTorch's allocator hands out parts of large blocks, in which an access out of bounds would not be seen.
    part, output = place.run(name, command, limit_s, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if "Device not supported" in output:
        return Part(name, SKIPPED, part.seconds, "compute-sanitizer does not support this device here")
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)[-1:]
    part.detail = "; ".join(filter(None, [part.detail, *summary]))
    return part


def find_sanitizer() -> str | None:
    """compute-sanitizer in PATH or beside nvcc."""
    beside = [str(Path(nvcc).resolve().parent) for nvcc in [shutil.which("nvcc")] if nvcc]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *beside]))


def demo(place: Place, name: str, limit_s: float) -> Part:
    """A short demo on the GPU; its throughput is read from the runs' logs."""
    options = [f"--{key}={value}" for key, value in DEMO_SCALE.items()]
    folder = place.scratch / "demo"
    command = [sys.executable, "-m", "sendvae_fast", "demo", f"--run={folder}", "--debug", *options]
    part, _ = place.run(name, command, limit_s)
    if part.outcome == PASSED:
        for stage in ("send/vae", "send/sit"):
            lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
            part.facts[stage] = json.loads(lines[-1])["img_per_s"]
        part.detail = ", ".join(f"{stage} {rate:.0f} img/s" for stage, rate in part.facts.items())
    return part
