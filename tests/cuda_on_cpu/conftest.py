"""What builds and runs kernels, once for all tests of a process."""

import pytest

from cuda_on_cpu import build
from cuda_on_cpu.runner import Runner


@pytest.fixture(scope="session")
def compiler():
    """Skips what needs a compiler where the kernels cannot be built."""
    reason = build.reason_not_to_build()
    if reason is not None:
        pytest.skip(f"CUDA on CPU: {reason}")


@pytest.fixture(scope="session")
def runner(compiler):
    runner = Runner()
    yield runner
    runner.close()
