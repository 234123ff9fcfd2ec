"""Dockerfile, Apptainer definition and conda environment: what they name is there, and linters find nothing.

What they do as root on Debian is scripts/container/steps.sh; nothing here builds an image.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sendvae_fast.cli.main import VERBS

ROOT = Path(__file__).parents[1]
STEPS = "scripts/container/steps.sh"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFINITION = (ROOT / "scripts/container/sendvae.def").read_text()


def steps_in(text):
    """The steps that a file runs, in order."""
    return [step for line in re.findall(rf"{STEPS} ([a-z ]+)$", text, re.MULTILINE) for step in line.split()]


def test_both_take_all_steps_in_order():
    defined = re.findall(r"^([a-z]+)\(\) \{$", (ROOT / STEPS).read_text(), re.MULTILINE)
    assert defined[0] == "debian" and defined[1:] == ["base", "tools", "wheel", "install", "clean"]
    assert steps_in(DEFINITION) == defined[1:]
    assert steps_in(DOCKERFILE) == defined[1:-1]  # the stages that built are not in the image


def test_what_the_dockerfile_copies_is_there():
    copied = [shlex.split(line)[1:-1] for line in re.findall(r"^COPY (?!--from).*$", DOCKERFILE, re.MULTILINE)]
    assert len(copied) == 3 and all((ROOT / name).exists() for names in copied for name in names)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert not {name.split("/")[0] for names in copied for name in names} & {line.split("/")[0] for line in ignored}


def test_pins_become_constraints():
    """Constraints may have no extras; every pin is kept."""
    command = re.search(r"sed -nE '[^']+'", (ROOT / STEPS).read_text())[0]
    files = ["requirements.txt", "requirements-deepspeed.txt"]
    made = subprocess.run([*shlex.split(command), *files], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    pinned = [line for name in files for line in (ROOT / name).read_text().splitlines() if "==" in line]
    assert made.splitlines() == [re.sub(r"\[\w+\]", "", line) for line in pinned] and "[" not in made


def test_what_the_comments_tell_one_to_type_is_there():
    texts = [DOCKERFILE, DEFINITION, (ROOT / "environment.yml").read_text()]
    for path in re.findall(r"(?:--file |--requirement |apptainer build \S+ )(\S+)", "\n".join(texts)):
        assert (ROOT / path).exists(), path
    assert "sendvae_fast doctor" in DOCKERFILE and "doctor" in VERBS


def test_the_conda_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (from_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert from_pip == ["--requirement requirements.txt"]
    (python,) = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    wanted = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert int(python.split(".")[1]) >= int(wanted.split(".")[1])
    assert environment["name"] == "sendvae_fast" and environment["channels"] == ["conda-forge"]


def linter(name):
    path = shutil.which(name) or str(Path(sys.executable).with_name(name))
    if not Path(path).exists():
        pytest.skip(f"{name} is not installed")
    return path


def test_hadolint_finds_nothing():
    subprocess.run([linter("hadolint"), "Dockerfile"], check=True, cwd=ROOT)


def test_shellcheck_finds_nothing():
    scripts = [STEPS, *(path.relative_to(ROOT) for path in ROOT.glob("scripts/slurm/*"))]
    subprocess.run([linter("shellcheck"), *scripts], check=True, cwd=ROOT)
