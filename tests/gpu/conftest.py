"""Everything under tests/gpu needs a CUDA device."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without one they are collected, which is a test of their cases, and left out; `pytest_report_header` says so."""
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    left_out = [item for item in items if here in item.path.parents]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if here not in item.path.parents]


@pytest.fixture
def much_of_the_memory():
    """The GPU's memory for one test at a time, whichever process it runs in."""
    with open(Path(tempfile.gettempdir(), "sendvae_gpu_memory.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
