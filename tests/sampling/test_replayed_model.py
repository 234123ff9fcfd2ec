"""Recorded evaluations give what the network gives."""

import pytest
import torch
from recording import TapeRecorder
from tiny_networks import CHANNELS, NUM_CLASSES, tiny_sit

from sendvae_fast.ops import use_backend
from sendvae_fast.sampling.guidance import guided
from sendvae_fast.sampling.replayed_model import ReplayedModel
from sendvae_fast.sampling.samplers import initial_noise, sample
from sendvae_fast.sampling.settings import SamplerConfig

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@torch.no_grad()
def draw(model, ids, config, scale=2.0, dtype=torch.float32):
    ids = torch.tensor(ids)
    velocity = guided(model, ids % NUM_CLASSES, scale, (0.2, 0.6), NUM_CLASSES)
    return sample(velocity, initial_noise(3, ids, (CHANNELS, 8, 8)), ids, 3, config, network_dtype=dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("sde", torch.bfloat16), ("heun", torch.float32)])
def test_replays_give_the_networks_own_bits(kind, dtype):
    sit, recorder, config = tiny_sit(depth=1).to(dtype), TapeRecorder(), SamplerConfig(kind=kind, num_steps=8)
    replayed = ReplayedModel(sit, recorder, CPU)
    with use_backend("reference"):
        for ids in ([0, 1, 2], [7, 4, 9], [5]):  # the last batch is a partial one
            assert torch.equal(draw(replayed, ids, config, dtype=dtype), draw(sit, ids, config, dtype=dtype))
    assert recorder.num_recordings == 4  # guided and unguided, of both batch sizes


def test_without_guidance_there_is_one_recording():
    recorder = TapeRecorder()
    draw(ReplayedModel(tiny_sit(depth=1), recorder, CPU), [0, 1], SamplerConfig(num_steps=4), scale=1.0)
    assert recorder.num_recordings == 1
