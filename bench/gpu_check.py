"""One command for a machine with a GPU: build the CUDA ops for it, test them, run a short demo on it, print a table.

    make gpu-check
    make gpu-check PYTHON=python3.12 ARGS="--wheels wheels/ --out results/"

It uses the interpreter it is started with: that torch, that CUDA. Nothing is fetched; packages that are missing can
lie in `--wheels` as wheel files. Writes `gpu_check_<gpu>.json` and the logs of every part into `--out`, and exits with
1 if a part failed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO_SCALE = {
    "num_train_images": 1000, "num_test_images": 300, "vae_steps": 300, "finetune_steps": 300, "generator_steps": 300,
    "generate.num_samples": 100,
}
"""A short demo: it shows that everything runs on the GPU, not that it learns."""


@dataclass
class Part:
    """One row of the table."""

    name: str
    passed: bool
    seconds: float
    detail: str = ""
    facts: dict = field(default_factory=dict)


def main() -> int:
    """Run all parts; a part whose forerunner failed still runs where it can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "bench" / "results")))
    parser.add_argument("--wheels", type=Path, help="folder of wheel files to install from")
    parser.add_argument("--skip-demo", action="store_true", help="build and test only")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    machine = machine_facts()
    if machine["gpu"] is None:
        print("error: PyTorch sees no CUDA device here; run this on a machine with a GPU", file=sys.stderr)
        return 2
    parts = []
    if arguments.wheels is not None:
        parts.append(install_wheels(arguments.wheels, arguments.out))
    parts += [build(arguments.out), *run_tests(arguments.out)]
    if not arguments.skip_demo:
        parts.append(run_demo(arguments.out))
    print_table(machine, parts)
    name = re.sub(r"\W+", "_", machine["gpu"].lower()).strip("_")
    result = {"machine": machine, "parts": [asdict(part) for part in parts]}
    (arguments.out / f"gpu_check_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(part.passed for part in parts) else 1


def machine_facts() -> dict:
    """What the results depend on."""
    import torch

    available = torch.cuda.is_available()
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name() if available else None,
        "capability": "".join(map(str, torch.cuda.get_device_capability())) if available else None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "commit": commit or None, "date": time.strftime("%Y-%m-%d"),
    }


def run(name: str, command: list[str], out: Path, environment: dict[str, str] | None = None) -> Part:
    """Run one command in the repository's root, its output into `<out>/<name>.log`."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    log, start_s = out / f"{name.replace(' ', '_')}.log", time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        ).returncode
    seconds = time.monotonic() - start_s
    if code != 0:
        print(*log.read_text(errors="replace").splitlines()[-30:], sep="\n", flush=True)
    return Part(name, code == 0, seconds, "" if code == 0 else f"exit code {code}, see {log.name}")


def install_wheels(wheels: Path, out: Path) -> Part:
    """Install wheel files as they are, without their dependencies: the machine's torch must stay what it is."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    return run("install wheels", [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *files], out)


def build(out: Path) -> Part:
    """Build for this machine's GPU only; a failing build fails here instead of falling back."""
    environment = {
        "SENDVAE_BUILD": "require", "SENDVAE_BUILD_CUDA": "1",
        "SENDVAE_CUDA_ARCHITECTURES": os.environ.get("SENDVAE_CUDA_ARCHITECTURES", "native"),
    }
    return run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], out, environment)


def run_tests(out: Path) -> list[Part]:
    """The GPU suite, one row per test file."""
    report = out / "gpu_tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", f"--junitxml={report}"]
    whole = run("gpu tests", command, out)
    if not report.exists():
        return [whole]
    counts: dict[str, Counter] = {}
    seconds: Counter = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").split(".")[-1]
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts.setdefault(file, Counter())[outcome] += 1
        seconds[file] += float(case.get("time", 0))
    parts = [
        Part(
            file, not (count["failure"] or count["error"]) and count["passed"] > 0, seconds[file],
            ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items())), dict(count),
        )
        for file, count in sorted(counts.items())
    ]
    return parts if whole.passed == all(part.passed for part in parts) else [whole, *parts]


def run_demo(out: Path) -> Part:
    """A short demo on the GPU; its throughput is read from the runs' logs."""
    options = [f"--{key}={value}" for key, value in DEMO_SCALE.items()]
    folder = out / "demo"
    part = run("demo", [sys.executable, "-m", "sendvae_fast", "demo", f"--run={folder}", "--debug", *options], out)
    if part.passed:
        for stage in ("send/vae", "send/sit"):
            lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
            part.facts[stage] = json.loads(lines[-1])["img_per_s"]
        part.detail = ", ".join(f"{stage} {rate:.0f} img/s" for stage, rate in part.facts.items())
    return part


def print_table(machine: dict, parts: list[Part]) -> None:
    """The end of the output: what passed."""
    print(f"\n{machine['gpu']} (sm_{machine['capability']}), torch {machine['torch']}, CUDA {machine['cuda']}, "
          f"Python {machine['python']}, commit {machine['commit']}")
    width = max(len(part.name) for part in parts)
    for part in parts:
        verdict = "passed" if part.passed else "FAILED"
        print(f"  {part.name:<{width}}  {verdict}  {part.seconds:7.1f} s  {part.detail}")


if __name__ == "__main__":
    sys.exit(main())
