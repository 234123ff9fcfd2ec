"""`bench kernels --predict` from sources to numbers, for one op."""

import shutil

import pytest

from bench.prediction.rows import predicted_rows

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cuda_on_cpu")]


@pytest.mark.repeats("cuda_on_cpu/test_traffic.py::test_each_byte_is_moved_once_in_whole_sectors")
def test_the_machine_code_moves_the_least_bytes(compiler):
    """cosine_align reads each tensor once in whole sectors, by nvcc's code at the size of a training step."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    forward = next(iter(predicted_rows("cosine_align")))
    (kernel,) = forward["kernels"]
    assert 1.0 <= kernel["memory_bytes"] / forward["bytes"] < 1.01 and kernel["coalescing"] > 0.95
    # Which block is the last is unknown: one branch of the first of the four warps that are followed in a block.
    assert kernel["undecided_per_warp"] == round(1 / 4, 1)
    assert kernel["unknown_accesses_per_warp"] == kernel["bank_conflicts"] == 0
    assert kernel["spill_bytes"] == 0 and 0.5 < forward["of_copy"] < 1.0
    assert kernel["us"] >= max(kernel["memory_us"], kernel["issue_us"], kernel["latency_us"])
