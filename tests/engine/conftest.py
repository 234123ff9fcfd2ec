import pytest
import torch

from sendvae_fast.engine.distributed import init_distributed


@pytest.fixture(scope="session")
def one_rank():
    """A process group of one, for all tests of this process: DeepSpeed cannot be given a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield init_distributed("cpu")
    torch.set_num_threads(threads)
