"""Sampling with CUDA graphs gives the bits of sampling without."""

import pytest
import torch

from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.sampling.generate import generate
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig


@pytest.fixture(scope="module")
def sit() -> SiT:
    torch.manual_seed(0)
    sit = SiT(SiTConfig(
        latent_size=16, latent_channels=32, patch_size=1, width=384, depth=4, num_heads=6, num_classes=10
    ))  # fmt: skip
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return sit.cuda()


def latents(sit: SiT, **settings) -> torch.Tensor:
    """Of seven samples in batches of three: two full batches and a partial one."""
    seen = []
    config = GenerateConfig(num_samples=7, batch_size=3, guidance_interval=(0.2, 0.7), **settings)
    ids = torch.arange(7, device="cuda")
    list(generate(sit, lambda z: seen.append(z.clone()) or z[:, :3], ids, config))
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["sde", "euler", "heun"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_graphs_change_no_bit(sit, kind, precision):
    settings = {"precision": precision, "sampler": SamplerConfig(kind=kind, num_steps=12)}
    with_graphs, without = (latents(sit, cuda_graphs=graphs, **settings) for graphs in (True, False))
    assert with_graphs.isfinite().all() and with_graphs.std() > 0.1
    assert torch.equal(with_graphs, without)


def test_graphs_follow_labels_noise_and_time(sit):
    """What a graph might have frozen: samples of one batch differ, and another seed's differ from these."""
    one, other = (latents(sit, seed=seed, sampler=SamplerConfig(num_steps=12)) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert all(not torch.equal(one[i], one[j]) for i in range(7) for j in range(i))


def test_bf16_stays_near_fp32(sit):
    config = SamplerConfig(kind="heun", num_steps=12)
    exact, rounded = (latents(sit, precision=precision, sampler=config) for precision in ("fp32", "bf16"))
    assert (exact - rounded).std() < 0.02 * exact.std()
