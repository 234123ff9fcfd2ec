"""What every test needs before torch, Triton or DeepSpeed are imported, and where the real test files are."""

import atexit
import functools
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from everything import EVERYTHING
from reliability_counts import Cases
from reliability_page import named_tests

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Containers often ask Python for no bytecode. Each worker and each program that a test starts would then compile the
# package anew, and each worker rewrite the assertions of all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# torch.compile would start processes that import torch, to compile a few small kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores have workers of their own; processes inherit it
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
elif "OMP_NUM_THREADS" not in os.environ:
    # Tensors are tiny here: more threads only wait for each other.
    torch.set_num_threads(min(4, len(os.sched_getaffinity(0))))


def pytest_configure() -> None:
    """Spare Triton's interpreter half of its time: it patches its language anew for each call of a kernel's helper."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    @functools.cache
    def languages(function) -> list:
        return [module for module in (tl, tl.core) if module in function.__globals__.values()]

    def call(self, *arguments, **named):
        if any(tl.core.is_builtin(module.broadcast_to) for module in languages(self.fn)):  # they are not patched yet
            return patch_and_call(self, *arguments, **named)
        return self.rewrite()(*arguments, **named)

    InterpretedFunction.__call__ = call


# The files that take longest, the longest first: were one of them the last to start, the other workers would wait.
LONGEST = (
    "ops/test_contract.py",
    "cuda_on_cpu/test_kernels.py",
    "test_demo.py",
    "train/test_two_ranks.py",
    "engine/test_engine.py",
    "fake_cuda/test_paths.py",
    "cli/test_main.py",
    "bench/test_step.py",
    "plan/test_plan_verb.py",
    "train/test_train_sit.py",
    "test_site.py",
    "test_packaging.py",
    "compare/test_compare.py",
    "test_configs.py",
    "train/test_train_vae.py",
    "train/test_alignment_methods.py",
    "ops/test_noise_inject.py",
    "bench/test_kernels.py",
    "ops/test_triton_build.py",
    "cuda_on_cpu/test_traffic.py",
    "plan/test_fake_step.py",
    "ops/test_attention.py",
    "bench/test_evidence.py",
    "test_dependencies.py",
    "bench/test_peers.py",
    "train/test_replayed_step.py",
    "train/test_soak.py",
    "models/test_foundation.py",
    "train/test_data_under_fire.py",
    "models/test_sit.py",
    "train/test_e2e.py",
    "play/test_play_page.py",
    "bench/test_sampling_bench.py",
    "train/test_vae_bad_input.py",
    "train/test_evaluation_while_training.py",
    "engine/test_checkpoint.py",
    "data/test_order.py",
    "losses/test_perceptual.py",
    "sampling/test_sample_to_folder.py",
    "data/test_scene_folder.py",
    "report/test_page.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only repeats, and begin with the longest files: workers of pytest-xdist take whole files."""
    if not EVERYTHING and (repeats := [item for item in items if item.get_closest_marker("repeats")]):
        config.hook.pytest_deselected(items=repeats)
        items[:] = [item for item in items if item not in set(repeats)]
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


_cases = Cases()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """For docs/reliability.md."""
    _cases.see(report)


def pytest_sessionfinish() -> None:
    """Write the counts for docs/reliability.md, where a file for them is named."""
    _cases.record(named_tests())


def pytest_report_header() -> str | None:
    """Say what runs on a GPU alone."""
    return None if torch.cuda.is_available() else "no CUDA device: tests/gpu is collected and left out"


def pytest_collection_finish() -> None:
    """Spare what the tests import from every later collection of garbage: DeepSpeed starts one for each engine."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries complain of what is left


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a worker for every core that this process may use."""
    return len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread, for tests of tiny networks that run for many steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real test files, which are not part of the repository."""
    folder = os.environ.get("SENDVAE_TEST_DATA")
    if not folder:
        pytest.skip("SENDVAE_TEST_DATA is not set: no real test files")
    return Path(folder)
