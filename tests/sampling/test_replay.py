"""Recorded evaluations give what the network gives. A CUDA graph freezes all that Python decides while it records; on a
CPU a traced program takes its place, which freezes the same.
"""

import pytest
import torch
from tiny_networks import CHANNELS, NUM_CLASSES, tiny_sit
from torch.fx.experimental.proxy_tensor import make_fx

from sendvae_fast.ops import use_backend
from sendvae_fast.sampling.guidance import guided
from sendvae_fast.sampling.replay import ReplayedModel
from sendvae_fast.sampling.samplers import SamplerConfig, initial_noise, sample

pytestmark = pytest.mark.slow


class Tracer:
    """Records the tensor operations of a first run; each replay carries out the same on the same tensors."""

    def __init__(self):
        self.num_recordings = 0

    def __call__(self, work):
        self.num_recordings += 1
        with use_backend("reference"):  # what is compiled is one operation to a trace
            return make_fx(work)()


@torch.no_grad()
def draw(model, ids, config, scale=2.0, dtype=torch.float32):
    ids = torch.tensor(ids)
    velocity = guided(model, ids % NUM_CLASSES, scale, (0.2, 0.6), NUM_CLASSES)
    return sample(velocity, initial_noise(3, ids, (CHANNELS, 8, 8)), ids, 3, config, network_dtype=dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("sde", torch.bfloat16), ("heun", torch.float32)])
def test_replays_give_the_networks_own_bits(kind, dtype):
    sit, record, config = tiny_sit(depth=1).to(dtype), Tracer(), SamplerConfig(kind=kind, num_steps=4)
    replayed = ReplayedModel(sit, record)
    with use_backend("reference"):
        for ids in ([0, 1, 2], [7, 4, 9], [5]):  # the last batch is a partial one
            assert torch.equal(draw(replayed, ids, config, dtype=dtype), draw(sit, ids, config, dtype=dtype))
    assert record.num_recordings == 4  # guided and unguided, of both batch sizes


def test_without_guidance_there_is_one_recording():
    record = Tracer()
    draw(ReplayedModel(tiny_sit(depth=1), record), [0, 1], SamplerConfig(num_steps=4), scale=1.0)
    assert record.num_recordings == 1


@torch.no_grad()
def test_a_velocity_outlives_the_next_evaluation():
    replayed = ReplayedModel(lambda x, t, labels: (x * t[:, None, None, None], None), lambda work: work)
    x, labels = torch.ones(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    first, _ = replayed(x, torch.full((2,), 2.0), labels)
    second, _ = replayed(x, torch.full((2,), 3.0), labels)
    assert (first == 2).all() and (second == 3).all()
