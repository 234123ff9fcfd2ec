"""Leaving the process group: a finished run must not abort while the interpreter shuts down."""

import forks
import pytest
import torch

from sendvae_fast.engine.distributed import init_distributed

pytestmark = pytest.mark.slow

THREADS_AT_EXIT = """
import atexit, os
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel

def threads():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]

atexit.register(lambda: print("at exit", *threads()))  # the last handler to run is the first that was registered
from sendvae_fast.engine.distributed import init_distributed
init_distributed("cpu")
while "pt_gloo_runloop" not in threads():
    pass  # a thread names itself
network = nn.Linear(2, 2)
network.engine = [DistributedDataParallel(network)]  # a cycle, as an engine and its hooks make
del network
"""


def test_no_thread_of_the_group_outlives_it():
    done = forks.run(["-c", THREADS_AT_EXIT])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("at exit")
    assert "gloo" not in done.stdout


@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_cudnn_measures_its_algorithms(monkeypatch, deterministic):
    init_distributed("cpu")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)  # what must be changed
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    for name, value in {"is_available": True, "device_count": 1, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert init_distributed("cuda").device == torch.device("cuda", 0)
    assert torch.backends.cudnn.benchmark is not deterministic
