"""What is compiled or recomputed gives what it gave before; frozen networks in bfloat16 are close to themselves."""

import copy
from collections import Counter

import pytest
import torch
import torchvision
from torch import nn

from sendvae_fast.engine import blocks
from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder, ResnetBlock
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.discriminator import Discriminator
from sendvae_fast.models.discriminator_config import DiscriminatorConfig
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.mappers.mapper_config import MapperConfig
from sendvae_fast.models.mappers.transformer_mapper import Mapper
from sendvae_fast.models.send_vae import SendVAE
from sendvae_fast.models.sit.sit import SiT, SiTConfig
from sendvae_fast.ops import philox

pytestmark = pytest.mark.slow


def fill(network: nn.Module) -> nn.Module:
    """No zero-initialised layer hides a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in network.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    return network


def send_vae() -> SendVAE:
    config = AutoencoderConfig(
        base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(8,),
        nominal_resolution=16, latent_channels=4, num_groups=4,
    )  # fmt: skip
    mapper = Mapper(MapperConfig(latent_channels=4, grid_size=8, target_dim=6, width=8, num_heads=2, projector_width=8))
    return fill(SendVAE(Autoencoder(config), mapper))


def send_vae_loss(network: nn.Module) -> torch.Tensor:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    out = network(x.contiguous(memory_format=torch.channels_last), philox.make_key(0, 0), torch.arange(2))
    return out.reconstruction.square().mean() + out.features.sin().mean()


def sit() -> SiT:
    torch.manual_seed(0)
    return fill(SiT(SiTConfig(
        latent_size=4, latent_channels=3, patch_size=1, width=16, depth=3, num_heads=2, num_classes=5, repa_dim=6,
        repa_block=2, projector_width=8,
    )))  # fmt: skip


def sit_loss(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    z, t = torch.randn(2, 3, 4, 4, generator=generator), torch.rand(2, generator=generator)
    velocity, features = network(z, t, torch.tensor([1, 5]), return_features=True)
    return velocity.square().mean() + features.sin().mean()


NETWORKS = {"vae": (send_vae, send_vae_loss), "sit": (sit, sit_loss)}


def gradients(network: nn.Module, loss) -> dict[str, torch.Tensor]:
    loss(network).backward()
    return {name: param.grad for name, param in network.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_blocks_give_the_same_gradients(name, bf16):
    build, loss = NETWORKS[name]
    network = build()
    recomputed = copy.deepcopy(network)
    blocks.recompute_blocks(recomputed)
    counts = {"plain": 0, "recomputed": 0}
    for key, module in (("plain", network), ("recomputed", recomputed)):
        inner = next(blocks.recomputed_blocks(module))
        leaf = next(part for part in inner.modules() if isinstance(part, nn.Linear | nn.Conv2d))
        leaf.register_forward_hook(lambda *_, key=key: counts.update({key: counts[key] + 1}))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        wanted, actual = gradients(network, loss), gradients(recomputed, loss)
    assert counts == {"plain": 1, "recomputed": 2}
    assert all(grad is not None for grad in wanted.values())
    for key, grad in wanted.items():
        assert torch.equal(actual[key], grad), key
    assert network.state_dict().keys() == recomputed.state_dict().keys()


def test_recomputed_blocks_keep_less():
    def kept(network, loss):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss(network)
        return sum(sizes)

    for build, loss in NETWORKS.values():
        network = build()
        before = kept(network, loss)
        blocks.recompute_blocks(network)
        assert kept(network, loss) < 0.7 * before


def test_compiled_block_gives_the_same_gradients():
    block = fill(ResnetBlock(AutoencoderConfig(base_channels=8, num_groups=4), 8, 16))
    compiled = copy.deepcopy(block)
    blocks.compile_blocks(compiled, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    wanted, actual = (gradients(each, lambda each: sum(each((x, None))).sin().sum()) for each in (block, compiled))
    for key, grad in wanted.items():
        torch.testing.assert_close(actual[key], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())
    assert block.state_dict().keys() == compiled.state_dict().keys()


def test_compiled_and_recomputed():
    network = sit()
    both = copy.deepcopy(network)
    blocks.compile_blocks(both, backend="aot_eager")
    blocks.recompute_blocks(both)
    wanted, actual = gradients(network, sit_loss), gradients(both, sit_loss)
    for key, grad in wanted.items():
        torch.testing.assert_close(actual[key], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())


def foundation_of(name: str) -> nn.Module:
    return load_foundation(FoundationConfig(name=name, random_weights=True, image_size=64))


def test_what_is_compiled_and_recomputed(tmp_path):
    """Each network of a run says which of its blocks, none inside another; what is frozen keeps nothing anyway."""
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.pth")
    perceptual = Perceptual(PerceptualConfig(net="squeeze", weights=str(tmp_path / "squeeze.pth")))
    for network, wanted, is_trained in (
        (send_vae(), {"ResnetBlock": 10, "AttentionBlock": 5, "Block": 1}, True),
        (sit(), {"SiTBlock": 3}, True),
        (Discriminator(DiscriminatorConfig()), {"Discriminator": 1}, False),
        (foundation_of("vit_tiny_patch16_224"), {"Block": 12}, False),
        (foundation_of("dinov3-vit-s"), {"EvaBlock": 12}, False),
        (foundation_of("demo"), {"Block": 2}, False),
        (perceptual, {"Sequential": 7}, False),
    ):
        compiled = list(blocks.compiled_blocks(network))
        assert Counter(type(block).__name__ for block in compiled) == wanted
        assert list(blocks.recomputed_blocks(network)) == (compiled if is_trained else [])
        inside = [part for block in compiled for part in block.modules() if part is not block]
        assert not any(part is block for part in inside for block in compiled)
    # Its forward pass makes shapes of what ranks tell each other: a graph break, which would be an error.
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(Discriminator(DiscriminatorConfig()))
    assert not list(blocks.compiled_blocks(synchronised))


@pytest.mark.parametrize("name", ["compile", "recompute"])
def test_refused_where_parameters_are_split(name):
    with pytest.raises(UserError, match=f"engine.{name} does not work"):
        EngineConfig(zero_stage=3, **{name: True})
    EngineConfig(name="ddp", zero_stage=3, **{name: True})


@pytest.mark.parametrize("kind", [{"name": "ddp"}, {"zero_stage": 1}])
def test_an_engine_that_recomputes_trains_the_same(kind, one_rank):
    results = []
    for recompute in (False, True):
        config = EngineConfig(**kind, recompute=recompute, precision="bf16")
        engine = build_engine(sit(), OptimizerConfig(), config, one_rank)
        for _ in range(2):
            engine.backward(sit_loss(engine))
            engine.step()
        results.append(engine.full_state("model"))
        engine.close()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def discriminator_engine(**settings):
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(base_channels=8, num_layers=1))
    return build_engine(discriminator, OptimizerConfig(), EngineConfig(name="ddp", **settings), Distributed())


def test_input_gradients_are_at_the_engines_precision():
    output, gradient = discriminator_engine(precision="bf16").input_gradient(torch.zeros(1, 3, 16, 16), torch.sum)
    assert output.dtype == torch.bfloat16 and gradient.dtype == torch.float32


def test_a_compiled_module_lets_its_graph_be_gone_through_twice():
    results = []
    for compiled in (False, True):
        engine = discriminator_engine()
        if compiled:
            blocks.compile_blocks(engine.module, backend="aot_eager")
        output, gradient = engine.input_gradient(torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16), torch.sum)
        engine.backward(output.square().mean())
        results.append([gradient, *(parameter.grad for parameter in engine.module.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mapper(
            MapperConfig(latent_channels=4, grid_size=2, target_dim=6, width=8, num_heads=2, projector_width=8)
        ),
        sit,
        send_vae,
    ],
)
def test_nothing_goes_to_float32_under_autocast(build):
    """Every module between the first and the last layer is given and gives bfloat16, but for the condition."""
    seen = {}
    network = build()

    def note(name):
        return lambda _, inputs, output: seen.update({name: [x.dtype for x in (*inputs, output) if torch.is_tensor(x)]})

    for name, module in network.named_modules():
        embeds = name.startswith(("t_embedder", "y_embedder")) or "adaLN_modulation" in name
        if name and not list(module.children()) and not embeds:
            module.register_forward_hook(note(name))
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(network, Mapper):
            network(torch.randn(2, 4, 2, 2))
        else:
            (sit_loss if isinstance(network, SiT) else send_vae_loss)(network)
    first_layers = ("encoder.conv_in", "patch_embed.proj", "x_embedder.proj", "conv1.")
    wide = [name for name, dtypes in seen.items() if torch.float32 in dtypes and not name.endswith(first_layers)]
    assert seen and not wide, wide


def test_foundation_models_in_bfloat16():
    """Weights and tokens are bfloat16, tokens within its rounding, with norms of each kind and rotary positions."""
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for config in (
        FoundationConfig(name="demo"),
        FoundationConfig(name="vit_tiny_patch16_224", random_weights=True, image_size=64),
        FoundationConfig(name="dinov3-vit-s", random_weights=True, image_size=64),
    ):
        foundation = load_foundation(config)
        wanted = foundation(images)
        tokens = foundation.compute_in(torch.bfloat16)(images)
        assert tokens.dtype == torch.bfloat16
        cosine = torch.cosine_similarity(tokens.float(), wanted, dim=-1)
        assert cosine.min() > 0.999, config.name
