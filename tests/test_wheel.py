"""The wheel in dist/ in clean environments, under the torch it was built with and the oldest that it promises.

Each environment costs gigabytes of downloads and minutes: they run with SENDVAE_WHEEL=1, `make wheel-test`;
SENDVAE_WHEEL_TORCH="2.12.1 2.13.0" names other versions.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sendvae_fast.ops import library

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 30e6
PINNED = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
OLDEST = re.search(r'SENDVAE_TORCH_TARGET_VERSION "([\d.]+)"', (ROOT / "CMakeLists.txt").read_text())[1]
TORCHES = os.environ.get("SENDVAE_WHEEL_TORCH", f"{PINNED['torch']} {OLDEST}.0").split()
"""Versions of torch to try the wheel under."""
TESTS = [f"tests/ops/test_{op}.py" for op in ("compiled", "cosine_align", "global_norm", "sde_step", "center_crop")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SENDVAE_WHEEL" not in os.environ, reason="set SENDVAE_WHEEL=1: it downloads gigabytes"),
]


@pytest.fixture(scope="module")
def wheel():
    """The one that `make wheel` made for this Python."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (path,) = ROOT.glob(f"dist/*-{python}-{python}-*.whl")
    return path


def test_the_wheel_is_small_and_says_for_which_cuda(wheel):
    assert wheel.stat().st_size <= MAX_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    assert f"sendvae_fast/_lib/{library.CPU_LIBRARY}" in names
    assert f"sendvae_fast/_lib/{library.NOT_BUILT_FILE}" not in names
    tag = wheel.name.split("-")[2]
    assert re.fullmatch(r"1cu1\d\d" if f"sendvae_fast/_lib/{library.CUDA_LIBRARY}" in names else "1cpu", tag)


def test_the_source_distribution_beside_it_is_of_the_same_commit(wheel):
    """The wheel was made from it: it has the note that only a source distribution carries on."""
    (source,) = ROOT.glob("dist/*.tar.gz")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    noted = zipfile.ZipFile(wheel).read("sendvae_fast/commit.txt").decode()
    assert noted.split()[0] == head.strip() and source.stat().st_size < MAX_BYTES


CHECK = """
import sys, torch
from pathlib import Path
from sendvae_fast.ops import dispatch, library
assert Path(library.__file__).is_relative_to(sys.prefix), library.__file__
assert torch.__version__.split("+")[0] == sys.argv[1], torch.__version__
status = library.status()
assert status["cpu"] is None and status["host"] is None, status
facts = library.host().build_info()
assert facts["torch_version"].split("+")[0] == sys.argv[2], facts
cuda = library.LIBRARY_DIR / library.CUDA_LIBRARY
if cuda.exists() and torch.backends.cuda.is_built():
    torch.ops.load_library(str(cuda))
    for op, backends in dispatch.OPS.items():
        assert "cuda" not in backends or torch._C._dispatch_has_kernel_for_dispatch_key(f"sendvae::{op}", "CUDA"), op
    print("CUDA library loads")
print("CPU library and host module load")
"""


@pytest.mark.parametrize("torch", TORCHES)
def test_the_wheel_runs_in_a_clean_environment(wheel, torch, tmp_path):
    """What pip installs beside it, the libraries loaded, and tests of the compiled ops, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    python = tmp_path / "venv" / "bin" / "python"

    def run(*command):
        done = subprocess.run(
            [str(word) for word in command], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(
        python,
        "-m",
        "pip",
        "install",
        wheel,
        f"torch=={torch}",
        *(f"{name}=={PINNED[name]}" for name in ("numpy", "pytest")),
    )
    said = run(python, "-c", CHECK, torch, PINNED["torch"])
    assert "CPU library and host module load" in said
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("old_runs", "__pycache__"))
    ours = [python, "-m", "pytest", "-q", "-rs", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    said = run(*ours, "-k", "not triton", *TESTS)  # Triton's interpreter is torch's own, and is not what a wheel brings
    assert int(re.search(r"(\d+) passed", said)[1]) > 150, said
    skipped = re.findall(r"^SKIPPED.*", said, re.MULTILINE)
    assert not [line for line in skipped if "SENDVAE_TEST_DATA" not in line], skipped
    shutil.rmtree(tmp_path / "venv")  # gigabytes, which pytest would keep
