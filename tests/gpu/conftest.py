"""Everything under tests/gpu needs a CUDA device."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def much_of_the_memory():
    """The GPU's memory for one test at a time, whichever process it runs in."""
    with open(Path(tempfile.gettempdir(), "sendvae_gpu_memory.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
