"""Every YAML in configs/ loads, its networks can be built, and the paper's runs have the paper's numbers."""

import copy
import dataclasses
import functools
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from sendvae_fast.compare.settings import CompareConfig
from sendvae_fast.config import build_config, merge, read_config, required_keys
from sendvae_fast.errors import UserError
from sendvae_fast.models.discriminator import Discriminator
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.sampling.samplers import time_grid
from sendvae_fast.sampling.settings import SampleConfig
from sendvae_fast.train.e2e.networks import build_networks
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.sit.settings import FlowConfig, SiTTrainConfig
from sendvae_fast.train.vae.networks import build_model
from sendvae_fast.train.vae.settings import VAETrainConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1] / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))
NUM_IMAGES = 1_281_167  # ImageNet-1k's training set


class VAERow(NamedTuple):
    """A row of the paper's ablations. The defaults are its section 4.1: VA-VAE f16d32, DINOv2-B, one layer, noise."""

    source: str
    init_from: str = "vavae-f16d32"
    latent: tuple[int, int, int] = (32, 16, 16)  # C, H, W
    num_parameters: int = 69_836_067  # of the published architecture
    foundation: str = "dinov2-vit-b"
    dim: int = 768
    num_heads: int = 12  # section 4.1: 12 for features of 768, 16 for 1024
    depth: int = 1
    noise: bool = True
    image_size: int = 256
    method: str = "send"
    lambda_align: float = 1.0
    legacy_range: bool = False


VAE_ROWS = {
    "send_vae_f16d32": VAERow("Table 3 with noise, Table 4 DINOv2, Table 6 VA-VAE, Table 7 Send-VAE"),
    "no_noise": VAERow("Table 2 depth 1, Table 3 without noise", noise=False),
    "no_noise_depth_0": VAERow("Table 2 depth 0", noise=False, depth=0),
    "no_noise_depth_2": VAERow("Table 2 depth 2", noise=False, depth=2),
    "vfm_mae": VAERow("Table 4 MAE", foundation="mae-vit-l", dim=1024, num_heads=16),
    "vfm_clip": VAERow("Table 4 CLIP", foundation="clip-vit-l", dim=1024, num_heads=16),
    "vfm_ijepa": VAERow("Table 4 I-JEPA", foundation="ijepa-vit-h", dim=1280, num_heads=16),
    "vfm_siglip": VAERow("Table 4 SigLIP", foundation="siglip-b"),
    "vfm_dinov3": VAERow("Table 4 DINOv3", foundation="dinov3-vit-b"),
    "f16d16": VAERow("Table 5 f16d16", "vae-f16d16", latent=(16, 16, 16), num_parameters=69_610_963),
    "f16d64": VAERow("Table 5 f16d64", "vae-f16d64", latent=(64, 16, 16), num_parameters=70_293_955),
    "in_vae": VAERow("Table 5 f16d32, Table 6 IN-VAE", "invae-f16d32"),
    "sd_vae": VAERow("Table 6 SD-VAE 256", "sdvae-f8d4", latent=(4, 32, 32), num_parameters=83_653_863),
    "sd_vae_512": VAERow(
        "Table 6 SD-VAE 512", "sdvae-f8d4", latent=(4, 64, 64), num_parameters=83_653_863, image_size=512
    ),
    "control_none": VAERow("no row: naive fine-tuning", method="none", lambda_align=0.0),
    "control_va": VAERow("no row: VA-VAE's loss, as in its last stage", method="va", lambda_align=0.1),
    "control_reals": VAERow("no row: ReaLS", method="reals"),
    "reals_f8d4": VAERow("ReaLS' own", "sdvae-f8d4", latent=(4, 32, 32), num_parameters=83_653_863, method="reals"),
    "lpips_as_repa_e_ran": VAERow("no row: LPIPS of pictures in [-3, 1]", legacy_range=True),
}


class SiTRow(NamedTuple):
    """A generator: (depth, width, heads) of SiT's paper, patch size, the latents it is for, epochs.

    REPA reads SiT-B after block 4, L and XL after block 8: its author in issue 12 of its repository.
    """

    source: str
    size: tuple[int, int, int]
    patch_size: int
    latent: tuple[int, int, int]  # C, H, W
    epochs: int
    num_steps: int
    image_size: int = 256
    repa_block: int | None = 8  # None: without REPA


BASE, XL = (12, 768, 12), (28, 1152, 16)
SIT_ROWS = {
    "b_1": SiTRow("section 4.4, Tables 2-8", BASE, 1, (32, 16, 16), 80, 400_320, repa_block=4),
    "b_2": SiTRow("section 4.4, Table 6 SD-VAE 256", BASE, 2, (4, 32, 32), 80, 400_320, repa_block=4),
    "b_2_512": SiTRow(
        "section 4.4, Table 6 SD-VAE 512", BASE, 2, (4, 64, 64), 80, 400_320, image_size=512, repa_block=4
    ),
    "xl_1": SiTRow("section 4.1, Table 1 Send-VAE 80", XL, 1, (32, 16, 16), 80, 400_320),
    "xl_1_800ep": SiTRow("section 4.1, Table 1 Send-VAE 800", XL, 1, (32, 16, 16), 800, 4_003_200),
    "xl_2": SiTRow("section 4.1, f8 latents", XL, 2, (4, 32, 32), 80, 400_320),
    "xl_2_800ep": SiTRow("Table 1 REPA 800", XL, 2, (4, 32, 32), 800, 4_003_200),
    "sit_xl_2": SiTRow("ReaLS' headline, as SiT trains", XL, 2, (4, 32, 32), 400, 2_001_600, repa_block=None),
}


# LightningDiT's configs, with the epochs of its README; the rest as in its train.py. The step from which noise levels
# are uniform is its author's (issue 23 of its repository), as is B/1 at 100,000 steps (issue 74).
LIGHTNINGDIT_ROWS = {  # size, steps, steps with logit-normal noise levels
    "lightningdit_xl_1": (XL, 80_000, None),  # 64 epochs
    "lightningdit_xl_1_800ep": (XL, 800 * (NUM_IMAGES // 1024), 600_000),
    "lightningdit_b_1": (BASE, 100_000, None),
}


# REPA-E's three starts: the autoencoder, C of its latents and their size, the generator's patch size.
E2E_ROWS = {
    "va_vae": ("vavae-f16d32", 32, 16, 1),
    "in_vae": ("invae-f16d32", 32, 16, 1),
    "sd_vae": ("sdvae-f8d4", 4, 32, 2),
}


DIT_ROWS = {"dit_xl_2": XL, "dit_b_2": BASE}

MAETOK_ROWS = ("maetok_sit_xl_1",)


class SamplingRow(NamedTuple):
    """Guidance, labels and sampler. The defaults are the paper's section 4.2, with REPA's pixels."""

    scale: float
    interval: tuple[float, float]  # in noise levels
    labels: str = "random"
    channels: int | None = None  # guided
    rounding: str = "truncate"
    kind: str = "sde"
    num_steps: int = 250
    timestep_shift: float = 1.0


# Sources: the paper's section 4.1, the READMEs of REPA and REPA-E, the sampling code of SiT and LightningDiT.
SAMPLING_ROWS = {
    "sde_250": SamplingRow(2.5, (0.0, 0.75)),  # Table 1 Send-VAE (the interval is REPA-E's), E2E-VAE 800: FID 1.26
    "unguided": SamplingRow(1.0, (0.0, 0.75)),  # Table 1 without guidance, Tables 2-8
    "sit_unguided": SamplingRow(1.0, (0.0, 0.75), rounding="round"),  # SiT: FID 8.61
    "lightningdit_unguided": SamplingRow(  # LightningDiT 64 and 800: FID 4.29 and 2.17
        1.0, (0.0, 1 - 0.125), channels=3, rounding="round", kind="euler", num_steps=249, timestep_shift=0.3
    ),
    "dit_sd_vae": SamplingRow(1.5, (0.0, 1.0), channels=3, rounding="round", kind="ddpm"),  # DiT: FID 2.27
    "dit_unguided": SamplingRow(1.0, (0.0, 1.0), channels=3, rounding="round", kind="ddpm"),  # DiT: FID 9.62
    "reals": SamplingRow(1.8, (0.0, 0.75), rounding="round"),  # ReaLS 400: FID 1.82
    "maetok": SamplingRow(1.9, (0.0, 0.75)),  # MAETok's SiT-XL: FID 1.67
    "repa": SamplingRow(1.8, (0.0, 0.7)),  # Table 1 REPA 800: FID 1.42
    "repa_e_sd_vae": SamplingRow(2.2, (0.0, 0.65)),  # Table 1 E2E-VAE 80: FID 1.67
    "repa_e_in_vae": SamplingRow(1.8, (0.0, 0.825)),  # REPA-E: FID 1.61
    "repa_e_va_vae": SamplingRow(1.9, (0.0, 0.825)),  # REPA-E: FID 1.73
    "e2e_va_vae_equal": SamplingRow(2.4, (0.0, 0.73), "equal"),  # REPA-E, later protocol: FID 1.12
    "sit_sd_vae": SamplingRow(1.5, (0.0, 1.0), channels=3, rounding="round"),  # SiT: FID 2.06
    "lightningdit_va_vae_64ep": SamplingRow(  # LightningDiT 64: FID 2.11
        10.0, (0.0, 1 - 0.1), channels=3, rounding="round", kind="euler", num_steps=249, timestep_shift=0.3
    ),
    "lightningdit_va_vae": SamplingRow(  # LightningDiT 800: FID 1.35; 250 times are 249 steps
        6.7, (0.0, 1 - 0.125), channels=3, rounding="round", kind="euler", num_steps=249, timestep_shift=0.3
    ),
}


def config_class(file: Path) -> type:
    if file.parent.name == "compare":
        return CompareConfig
    if "e2e" in (file.parent.name, file.stem):
        return E2ETrainConfig
    if file.parent.name == "sampling":
        return SampleConfig
    return VAETrainConfig if file.parent.name == "vae" or file.stem.startswith("vae") else SiTTrainConfig


@cache
def load_once(file: Path):
    return load(file, {})


def load(file: Path, changes: dict | None = None):
    if changes is None:
        return copy.deepcopy(load_once(file))
    settings = merge(merge(required_keys(config_class(file), "x"), read_config(file)), changes)
    return build_config(config_class(file), settings, str(file))


FOUNDATIONS = {}  # those that were made, by config


def foundation_without_file(config):
    """The foundation model of a config on the meta device: its shapes, no memory, no weight file."""
    config = dataclasses.replace(config, weights=None, random_weights=True)
    with torch.device("meta"):
        return FOUNDATIONS.get(repr(config)) or FOUNDATIONS.setdefault(repr(config), load_foundation(config))


def num_parameters(module: torch.nn.Module) -> int:
    assert all(parameter.is_meta for parameter in module.parameters())
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_loads(file):
    load(file)
    assert file.read_text().startswith("# ") and isinstance(yaml.safe_load(file.read_text()), dict)
    assert f"`{file.name}`" in (ROOT / "README.md").read_text()


def test_every_config_has_its_row_here():
    sit_rows = {*SIT_ROWS, *LIGHTNINGDIT_ROWS, *DIT_ROWS, *MAETOK_ROWS}
    vae_rows = {*VAE_ROWS, "in_vae_scratch"}
    rows_by_folder = {"vae": vae_rows, "sit": sit_rows, "e2e": E2E_ROWS, "sampling": SAMPLING_ROWS}
    for folder, rows in rows_by_folder.items():
        assert {file.stem for file in FILES if file.parent.name == folder} == set(rows)


def switches():
    """What each row of the table of assumptions offers instead, as {dotted key: value}."""
    table = (ROOT / "README.md").read_text().partition("## Assumptions")[2].partition("\n## ")[0]
    for row in table.splitlines():
        found = re.findall(r"--([\w.]+)=(\"[^\"]+\"|[^` ]+)", row)
        if found:
            yield {key: yaml.safe_load(value.strip('"')) for key, value in found}


@pytest.mark.parametrize("switch", list(switches()), ids=str)
def test_the_other_way_of_an_assumption_changes_it(switch):
    folders = {
        "repa": "sit/b_1", "guidance_interval": "sampling/sde_250", "labels": "sampling/sde_250",
        "latent_stats": "sit/maetok_sit_xl_1", "generator": "sit/lightningdit_xl_1_800ep",
    }  # fmt: skip
    key = next(iter(switch))
    file = ROOT / f"{folders.get(key.split('.')[0], 'vae/vfm_ijepa')}.yaml"
    changes = {}
    for key, value in switch.items():
        changes = merge(changes, functools.reduce(lambda inner, part: {part: inner}, reversed(key.split(".")), value))
    before, after = load(file), load(file, changes)
    for key in switch:
        assert functools.reduce(getattr, key.split("."), before) != functools.reduce(getattr, key.split("."), after)


@pytest.mark.parametrize("name", VAE_ROWS)
def test_stage_1_trains_as_the_paper_says(name):
    config = load(ROOT / "vae" / f"{name}.yaml")
    row = VAE_ROWS[name]
    # Section 4.1: 80 epochs, batch 1024, AdamW, lr 3e-4, λ_align 1.
    assert config.data.global_batch == 1024 and config.data.image_size == row.image_size
    assert config.loop.num_steps == 80 * (NUM_IMAGES // 1024) == 100_080
    assert config.optimizer.learning_rate == 3e-4
    assert (config.alignment.method, config.alignment.lambda_align) == (row.method, row.lambda_align)
    assert config.alignment.send.noise == row.noise
    # Everything else as in REPA-E: l1_lpips_kl_gan.yaml and train_repae.py.
    loss, discriminator = config.loss, config.discriminator_optimizer
    assert (loss.reconstruction, loss.reconstruction_weight, loss.kl_weight) == ("l1", 1.0, 1e-6)
    assert (loss.perceptual.net, loss.perceptual_weight, loss.reduction) == ("vgg", 1.0, "mean")
    assert loss.perceptual.legacy_range == row.legacy_range
    assert (loss.gan_weight, loss.gan_adaptive, loss.gan_start_step, loss.gan_warmup_steps) == (0.1, False, 0, 0)
    assert discriminator.learning_rate == 1e-4
    for optimizer in (config.optimizer, discriminator):
        assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
        assert (optimizer.max_grad_norm, optimizer.ema_decay) == (1.0, None)


def test_the_controls_differ_from_send_vae_in_the_alignment_alone():
    send = load(ROOT / "vae" / "send_vae_f16d32.yaml")
    for name in ("control_none", "control_va", "control_reals"):
        control = load(ROOT / "vae" / f"{name}.yaml")
        assert control.alignment == dataclasses.replace(send.alignment, method=VAE_ROWS[name].method)
        assert dataclasses.replace(control, alignment=send.alignment) == send
    # VA-VAE's last stage, the defaults of the method.
    va = load(ROOT / "vae" / "control_va.yaml").alignment.va
    assert (va.cos_margin, va.distmat_margin, va.cos_weight, va.distmat_weight, va.adaptive) == (0.5, 0.25, 1, 1, True)


@pytest.mark.parametrize("name", VAE_ROWS)
def test_stage_1_builds_the_rows_networks(name):
    config, row = load(ROOT / "vae" / f"{name}.yaml"), VAE_ROWS[name]
    alignment = config.alignment
    assert config.init_from == f"pretrained/{row.init_from}"
    assert config.discriminator_from == f"pretrained/{row.init_from}-discriminator.pt"
    # I-JEPA is published as its original release alone.
    weights = {"ijepa-vit-h": "IN1K-vit.h.14-300e.pth.tar"}.get(row.foundation, f"{row.foundation}.safetensors")
    assert alignment.foundation.weights == f"pretrained/{weights}"
    foundation = foundation_without_file(alignment.foundation)
    assert (foundation.name, foundation.dim) == (row.foundation, row.dim)
    with torch.device("meta"):
        model = build_model(
            dataclasses.replace(config, init_from=None), foundation if alignment.lambda_align > 0 else None
        )
        moments = model.autoencoder.encode(torch.empty(1, 3, row.image_size, row.image_size))
        discriminator = Discriminator(config.discriminator)
    assert moments.shape == (1, 2 * row.latent[0], *row.latent[1:])
    assert num_parameters(model.autoencoder) == row.num_parameters
    assert num_parameters(discriminator) == 2_765_633  # REPA-E's PatchGAN
    if row.method != "send":
        mappers = {"none": "NoneType", "va": "LinearMapper", "reals": "MLPMapper"}
        assert type(model.mapper).__name__ == mappers[row.method]
        return
    mapper = model.mapper.config
    assert (mapper.width, mapper.target_dim, mapper.num_heads) == (row.dim, row.dim, row.num_heads)
    assert (mapper.depth, len(model.mapper.blocks), mapper.projector_width) == (row.depth, row.depth, 2048)
    assert mapper.grid_size == foundation.grid_size == row.image_size // 16


def test_training_from_scratch_is_latent_diffusions():
    config = load(ROOT / "vae" / "in_vae_scratch.yaml")
    loss = config.loss
    assert (loss.reduction, loss.reconstruction, loss.reconstruction_weight, loss.kl_weight) == ("sum", "l1", 1.0, 1e-6)
    assert (loss.perceptual.net, loss.perceptual_weight, loss.perceptual.legacy_range) == ("vgg", 1.0, False)
    assert (loss.gan_weight, loss.gan_adaptive, loss.gan_start_step, loss.gan_warmup_steps) == (0.5, True, 50001, 0)
    for optimizer in (config.optimizer, config.discriminator_optimizer):
        assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.5, 0.9), 0.0)
        assert (optimizer.max_grad_norm, optimizer.ema_decay) == (0.0, None)
    assert config.data.global_batch == 256 and config.loop.num_steps == 50 * (NUM_IMAGES // 256) == 250_200
    assert (config.init_from, config.alignment.lambda_align) == (None, 0.0)
    with torch.device("meta"):
        model = build_model(config, None)
    assert num_parameters(model.autoencoder) == VAE_ROWS["in_vae"].num_parameters and model.mapper is None


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("vfm_mae", {"data": {"image_size": 512}}, "mae-vit-l gives 16 x 16 .* latents give 32 x 32.*grid_size=32"),
        ("sd_vae", {"alignment": {"foundation": {"grid_size": 32}}}, "dinov2-vit-b gives 32 x 32 .* give 16 x 16"),
        ("vfm_clip", {"data": {"image_size": 248}}, "data.image_size=248 must be a multiple"),
    ],
)
def test_grids_that_do_not_match_stop_stage_1_before_it_trains(name, changes, words):
    config = load(ROOT / "vae" / f"{name}.yaml", changes)
    foundation = foundation_without_file(config.alignment.foundation)
    with torch.device("meta"), pytest.raises(UserError, match=words):
        build_model(dataclasses.replace(config, init_from=None), foundation)


@pytest.mark.parametrize("name", SIT_ROWS)
def test_stage_2_trains_as_the_paper_says(name):
    config, row = load(ROOT / "sit" / f"{name}.yaml"), SIT_ROWS[name]
    # Section 4.1: batch 256, lr 1e-4, AdamW, clipping, EMA; REPA's own settings for the rest.
    assert config.data.global_batch == 256 and config.data.image_size == row.image_size
    assert config.loop.num_steps == row.epochs * (NUM_IMAGES // 256) == row.num_steps
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    clips = row.repa_block is not None  # SiT does not
    assert (optimizer.max_grad_norm, optimizer.ema_decay) == (1.0 if clips else 0.0, 0.9999)
    if row.repa_block is None:
        assert config.repa.weight == 0
    else:
        assert (config.repa.weight, config.repa.block) == (0.5, row.repa_block)
        assert config.repa.foundation.name == "dinov2-vit-b"
    assert config.generator.label_dropout == 0.1
    assert config.flow == FlowConfig(noise_level="uniform", logit_normal_steps=None, direction_weight=0.0)


@pytest.mark.parametrize("name", LIGHTNINGDIT_ROWS)
def test_lightningdit_trains_as_published(name):
    config, (size, num_steps, logit_normal_steps) = load(ROOT / "sit" / f"{name}.yaml"), LIGHTNINGDIT_ROWS[name]
    assert (config.data.global_batch, config.data.image_size, config.loop.num_steps) == (1024, 256, num_steps)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (2e-4, (0.9, 0.95), 0.0)
    assert (optimizer.max_grad_norm, optimizer.ema_decay, config.engine.precision) == (0.0, 0.9999, "bf16")
    assert config.flow == FlowConfig(
        noise_level="logit_normal", logit_normal_steps=logit_normal_steps, direction_weight=1.0
    )
    assert config.repa.weight == 0 and config.generator.label_dropout == 0.1
    sizes = config.generator.build((32, 16, 16), 1000, None, config.repa.block)
    assert ((sizes.depth, sizes.width, sizes.num_heads), sizes.patch_size) == (size, 1)
    assert (sizes.swiglu, sizes.rms_norm, sizes.rope, sizes.qk_norm) == (True, True, True, False)


@pytest.mark.parametrize("name", SIT_ROWS)
def test_stage_2_builds_the_rows_generator(name):
    config, row = load(ROOT / "sit" / f"{name}.yaml"), SIT_ROWS[name]
    assert config.repa.foundation.weights == "pretrained/dinov2-vit-b.safetensors"
    foundation = foundation_without_file(config.repa.foundation)
    sizes = config.generator.build(row.latent, 1000, foundation.dim, config.repa.block)
    with torch.device("meta"):
        generator = SiT(sizes)
    assert ((sizes.depth, sizes.width, sizes.num_heads), sizes.patch_size) == (row.size, row.patch_size)
    assert generator.pos_embed.is_meta and foundation.grid_size == row.image_size // 16
    assert generator.config.grid_shape == (foundation.grid_size,) * 2
    if name in ("b_1", "xl_1"):  # SiT-B/1 and -XL/1 with REPA-E's projector to 768
        projector = {"b_1": 7_344_896, "xl_1": 8_131_328}[name]
        assert num_parameters(generator) == {"b_1": 130_328_096, "xl_1": 674_853_152}[name] + projector


@pytest.mark.parametrize("name", DIT_ROWS)
def test_dit_trains_as_published(name):
    """train.py of DiT: AdamW at 1e-4 without decay or clipping, EMA 0.9999, batch 256, 400,000 steps."""
    config, size = load(ROOT / "sit" / f"{name}.yaml"), DIT_ROWS[name]
    optimizer = config.optimizer
    assert (config.data.global_batch, config.data.image_size, config.loop.num_steps) == (256, 256, 400_000)
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (optimizer.max_grad_norm, optimizer.ema_decay, config.repa.weight) == (0.0, 0.9999, 0)
    sizes = config.generator.build((4, 32, 32), 1000, None, config.repa.block)
    assert (sizes.depth, sizes.width, sizes.num_heads, sizes.patch_size, sizes.diffusion) == (*size, 2, True)
    with torch.device("meta"):
        # SiT's with four more outputs for each of the 4 positions of a token: 675 M and 130 M, as in DiT's Table 4.
        flow = num_parameters(SiT(dataclasses.replace(sizes, diffusion=False)))
        assert num_parameters(SiT(sizes)) == flow + 16 * (sizes.width + 1)
    assert flow == {"dit_xl_2": 674_816_272, "dit_b_2": 130_303_504}[name]


@pytest.mark.parametrize("name", MAETOK_ROWS)
def test_maetok_is_generated_on_as_its_authors_do(name):
    """train_sit.py and its README's command: AdamW at 1e-4 without decay, clipped, EMA 0.9999, batch 256."""
    config = load(ROOT / "sit" / f"{name}.yaml")
    optimizer = config.optimizer
    assert (config.data.global_batch, config.data.image_size, config.loop.num_steps) == (256, 256, 400_000)
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (optimizer.max_grad_norm, optimizer.ema_decay, config.repa.weight) == (1.0, 0.9999, 0)
    assert config.flow == FlowConfig(noise_level="logit_normal") and config.generator.label_dropout == 0.1
    sizes = config.generator.build((32, 1, 128), 1000, None, config.repa.block)
    assert (sizes.depth, sizes.width, sizes.num_heads) == XL and (sizes.swiglu, sizes.rope) == (False, False)
    assert (sizes.grid_shape, sizes.patch_size, sizes.one_dimensional) == ((1, 128), 1, True)
    with torch.device("meta"):  # SiT-XL/1's: positions are no weights
        assert num_parameters(SiT(sizes)) == 674_853_152


def test_lightningdit_is_for_maetoks_latents_too():
    config = load(ROOT / "sit" / "lightningdit_xl_1_800ep.yaml")
    sizes = config.generator.build((32, 1, 128), 1000, None, config.repa.block)
    with torch.device("meta"):
        velocity, _ = SiT(sizes)(torch.empty(2, 32, 1, 128), torch.empty(2), torch.empty(2, dtype=torch.int64))
    assert velocity.shape == (2, 32, 1, 128) and sizes.rope


@pytest.mark.parametrize("name", E2E_ROWS)
def test_end_to_end_training_is_repa_es(name):
    config, (source, channels, size, patch_size) = load(ROOT / "e2e" / f"{name}.yaml"), E2E_ROWS[name]
    assert config.init_from == f"pretrained/{source}"
    assert config.discriminator_from == f"pretrained/{source}-discriminator.pt"
    # train_repae.py and its configuration: three AdamW of the same rate, clipped apart, 80 epochs of 256.
    assert config.data.global_batch == 256 and config.loop.num_steps == 80 * (NUM_IMAGES // 256)
    for optimizer in (config.optimizer, config.discriminator_optimizer, config.generator_optimizer):
        assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
        assert optimizer.max_grad_norm == 1.0
    assert config.generator_optimizer.ema_decay == 0.9999
    assert (config.repa.weight, config.repa.autoencoder_weight, config.repa.block) == (0.5, 1.5, 8)
    loss = config.loss
    assert (loss.reconstruction, loss.perceptual.net, loss.gan_weight, loss.kl_weight) == ("l1", "vgg", 0.1, 1e-6)
    foundation = foundation_without_file(config.repa.foundation)
    with torch.device("meta"):
        _, sit = build_networks(dataclasses.replace(config, init_from=None), foundation, 1000)
    sizes = sit.config
    assert (sizes.latent_channels, sizes.latent_size, sizes.patch_size) == (channels, size, patch_size)
    assert ((sizes.depth, sizes.width, sizes.num_heads), foundation.dim) == (XL, 768)


@pytest.mark.parametrize("name", SAMPLING_ROWS)
def test_sampling_has_the_headline_settings(name):
    config = load(ROOT / "sampling" / f"{name}.yaml")
    sampler = config.sampler
    assert SAMPLING_ROWS[name] == (
        config.guidance_scale, config.guidance_interval, config.labels, config.guidance_channels, config.rounding,
        sampler.kind, sampler.num_steps, sampler.timestep_shift,
    )  # fmt: skip
    # Section 4.2: 50,000 samples. REPA: last step from 0.04, fp64.
    assert (config.num_samples, config.ema, config.npz, sampler.dtype) == (50_000, True, True, "float64")
    if sampler.is_diffusion:
        return
    times = time_grid(sampler)
    # LightningDiT's last time but one of linspace(0, 1, 250), shifted: 1 - 0.3 τ / (1 - 0.7 τ) at τ = 248 / 249.
    before_last = {"sde": 0.04, "euler": 1 / (0.3 * 249 + 0.7)}[sampler.kind]
    assert (times[0], times[-2], times[-1]) == (1.0, pytest.approx(before_last), 0.0)


def test_the_demos_finetunings_differ_in_the_alignment_alone():
    control, send = load(ROOT / "demo" / "vae_control.yaml"), load(ROOT / "demo" / "vae_send.yaml")
    assert control.alignment.lambda_align == 0 and send.alignment.lambda_align == 1
    send.alignment = control.alignment
    assert control == send
