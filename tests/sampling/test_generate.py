"""Settings of a job that reach the network, on a tiny SiT with random weights and a decoder that shows the latents."""

import pytest
import torch
from tiny_networks import tiny_sit

from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.sampling.generate import generate
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig


def latents(**settings):
    """[B, C, H, H]: what the decoder is given in one Euler step, so that every channel shows its own guidance alone."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(latent_size=4, latent_channels=5, patch_size=2, width=16, depth=1, num_heads=2, num_classes=3))
    for parameter in sit.parameters():  # a new SiT gives 0
        torch.nn.init.normal_(parameter, std=0.2)
    euler = SamplerConfig(kind="euler", num_steps=1)
    config = GenerateConfig(guidance_interval=(0.0, 1.0), sampler=euler, **settings)
    seen = []
    list(generate(sit, lambda z: seen.append(z) or z[:, :3], torch.arange(4), config))
    [only] = seen
    return only


def test_guidance_of_the_first_channels():
    unguided, all_guided = latents(guidance_scale=1.0), latents(guidance_scale=2.5)
    some_guided = latents(guidance_scale=2.5, guidance_channels=3)
    # A batch of 8 may round otherwise than one of 4.
    torch.testing.assert_close(some_guided[:, 3:], unguided[:, 3:])
    assert torch.equal(some_guided[:, :3], all_guided[:, :3])
    assert not torch.isclose(all_guided, unguided, rtol=1e-2).all(dim=(0, 2, 3)).any()
    assert torch.equal(latents(guidance_scale=2.5, guidance_channels=5), all_guided)


def test_more_guided_channels_than_the_latent_has_are_refused():
    with pytest.raises(UserError, match="guidance_channels is 6, but the generator's latents have 5"):
        latents(guidance_channels=6)


def test_large_batches_are_decoded_in_parts():
    sizes = []
    config = GenerateConfig(batch_size=130, sampler=SamplerConfig(kind="euler", num_steps=1))
    [batch] = generate(
        tiny_sit(latent_channels=3, depth=1), lambda z: sizes.append(len(z)) or z, torch.arange(130), config
    )
    assert sizes == [64, 64, 2] and batch.images.shape == (130, 3, 8, 8)
    assert len(batch.images.flatten(1).unique(dim=0)) == 130


def test_for_no_samples_nothing_is_evaluated():
    """A finished job run again, or a rank that none of the missing pictures fell to."""
    sit = tiny_sit()
    sit.forward = None
    assert list(generate(sit, lambda z: z, torch.arange(0), GenerateConfig())) == []


def test_bf16_stays_near_fp32_and_leaves_the_generator_as_it_is():
    exact, rounded = (latents(guidance_scale=1.5, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32 and 1e-4 < (rounded - exact).std() / exact.std() < 0.02
    sit = tiny_sit(latent_channels=3)
    config = GenerateConfig(precision="bf16", sampler=SamplerConfig(num_steps=2))
    list(generate(sit, lambda z: z, torch.arange(2), config))
    assert {parameter.dtype for parameter in sit.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_tensor_cores_are_allowed_while_drawing_alone(precision, allowed):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before, seen = [flag.allow_tf32 for flag in flags], []
    config = GenerateConfig(precision=precision, sampler=SamplerConfig(num_steps=2))

    def decode(z):
        seen.append([flag.allow_tf32 for flag in flags])
        return z

    for _ in generate(tiny_sit(latent_channels=3), decode, torch.arange(2), config):
        assert [flag.allow_tf32 for flag in flags] == before
    assert seen == [[allowed, allowed]]


def test_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision is 'fp8'"):
        GenerateConfig(precision="fp8")
