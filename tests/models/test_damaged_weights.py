"""Damaged files of other projects' weights: each reader takes them or raises a `UserError` of one line."""

import dataclasses
import io
import json
import warnings
from functools import partial
from pathlib import Path

import lpips
import plain_vit as plain
import pytest
import torch
import torchvision
from fuzz import Reader, check_reader, damaged_bytes, damaged_text, damaged_tree
from safetensors.torch import save_file

from bench.random_inception import random_inception
from sendvae_fast.evaluation.inception import InceptionFeatures
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.diffusers_layout import to_diffusers, to_diffusers_config
from sendvae_fast.models.autoencoder.maetok import MAETok, MAETokConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.discriminator import Discriminator, load_discriminator_weights
from sendvae_fast.models.discriminator_config import DiscriminatorConfig
from sendvae_fast.models.foundation.foundation import load_foundation
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.foundation.recipes import RECIPES
from sendvae_fast.models.foundation.squeezenet import load_squeezenet
from sendvae_fast.models.latent_statistics import statistics_of_file
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.train.e2e.repa_e_checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

AUTOENCODER = AutoencoderConfig(
    base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), latent_channels=2
)
DISCRIMINATOR = DiscriminatorConfig(base_channels=8, num_layers=1)
MAETOK = MAETokConfig(
    image_size=2, patch_size=1, num_latent_tokens=2, latent_channels=2,
    encoder_width=64, encoder_depth=1, encoder_heads=1, decoder_width=64, decoder_depth=1, decoder_heads=1,
)  # fmt: skip
GENERATOR = SiTConfig(
    latent_size=2, latent_channels=2, patch_size=1, width=8, depth=1, num_heads=2, num_classes=2,
    rope=True, swiglu=True, rms_norm=True,
)  # fmt: skip
VECTOR = torch.ones(2)
BATCH_NORM = {"bn.running_mean": VECTOR, "bn.running_var": VECTOR, "bn.num_batches_tracked": torch.tensor(3)}


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch no longer likes to make such tensors; old files have them
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


TENSORS = (
    torch.ones(2, 2).to_sparse(),
    quantised(),
    torch.empty(2, device="meta"),
    torch.tensor([float("nan"), 1]),
    torch.ones(2, dtype=torch.complex64),
    torch.zeros(0),
    torch.tensor(1),
    torch.tensor([True, False]),
    {5: torch.ones(2)},
    torch.float16,
)


HEADS = Path(lpips.__file__).parent / "weights" / "v0.1" / "squeeze.pth"


def vision_transformers():
    """Weights by name, in the layouts of the original releases, of the networks that `read_transformer` makes small."""
    token = plain.random_token()
    dinov2 = plain.random_weights(14, prefix_positions=1, grid=5, layer_scale=True) | {"cls_token": token}
    dinov3 = plain.random_weights(16, prefix_positions=None, grid=4, layer_scale=True) | {"cls_token": token}
    mask = torch.ones(3, plain.WIDTH).index_fill_(0, torch.tensor(1), 0).flatten()
    dinov3 |= {f"blocks.{i}.attn.qkv.bias_mask": mask for i in range(plain.DEPTH)}
    dinov3 |= {"storage_tokens": plain.random_token(4), "rope_embed.periods": torch.tensor([1.0, 4.6, 21.5])}
    return {"dinov2-vit-b": dinov2, "dinov3-vit-b": dinov3 | {"mask_token": torch.zeros(1, plain.WIDTH)}}


def read_transformer(name, folder):
    recipe = dataclasses.replace(RECIPES[name], arguments=RECIPES[name].arguments | plain.NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, name, recipe)
        load_foundation(FoundationConfig(name=name, weights=str(folder / f"{name}.pth"), grid_size=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tmp_path = tmp_path_factory.mktemp("files")
    vae, discriminator = Autoencoder(AUTOENCODER).state_dict(), Discriminator(DISCRIMINATOR).state_dict()
    generator = SiT(GENERATOR).state_dict() | {"feat_rope.freqs_cos": torch.ones(4, 4)}
    repa_e = {"model": BATCH_NORM, "ema": BATCH_NORM, "vae": vae, "opt": {"state": {0: VECTOR}}, "steps": 4}
    torch.save(repa_e, tmp_path / "repa_e.pt")
    torch.save(repa_e, tmp_path / "old_form.pt", _use_new_zipfile_serialization=False)
    torch.save(training_checkpoint(), tmp_path / "training.pt")
    torch.save({"mean": VECTOR, "std": VECTOR}, tmp_path / "latents_stats.pt")
    torch.save({"ema": generator | BATCH_NORM, "step": 4}, tmp_path / "generator.pt")
    sequence = SiT(dataclasses.replace(GENERATOR, one_dimensional=True, latent_size=3)).state_dict()
    sequence = {key.replace("embedder.proj", "embedder"): value for key, value in sequence.items()}
    sequence["x_embedder.weight"] = sequence["x_embedder.weight"][:, :, 0, 0].clone()
    rotary = {"feat_rope.freqs_cos": torch.ones(3, 4)}  # tells the number of heads
    torch.save({"ema": sequence | rotary | BATCH_NORM}, tmp_path / "sequence.pt")
    torch.save({"state_dict": discriminator, "epoch": 1}, tmp_path / "discriminator.ckpt")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.pth")
    torch.save(torch.load(HEADS, map_location="cpu", weights_only=True), tmp_path / "heads.pth")
    for name, state in vision_transformers().items():
        torch.save(state, tmp_path / f"{name}.pth")
    # One number in place of each weight: a file of 24 million would take longest to write.
    inception = random_inception().state_dict()
    inception = {key: value.new_ones(()).expand(value.shape) for key, value in inception.items()}
    torch.save(inception, tmp_path / "inception.pth")
    (tmp_path / "diffusers").mkdir()
    config = to_diffusers_config(AUTOENCODER, VECTOR, VECTOR)
    (tmp_path / "diffusers/config.json").write_text(json.dumps(config))
    torch.save(to_diffusers(vae, AUTOENCODER), tmp_path / "diffusers/diffusion_pytorch_model.bin")
    (tmp_path / "maetok").mkdir()
    (tmp_path / "maetok/config.json").write_text(json.dumps({"codebook_embed_dim": 2, "vq_mean": 0.5, "vq_std": 2.0}))
    save_file(MAETok(MAETOK).state_dict(), tmp_path / "maetok/model.safetensors")
    torch.save({"model": MAETok(MAETOK).state_dict()}, tmp_path / "maetok.pt")
    return tmp_path


def training_checkpoint():
    """REPA-E's, whole, but that its networks are a layer each."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(VECTOR).sum().backward()
    optimizer.step()
    model, adamw = {**layer.state_dict(), **BATCH_NORM}, optimizer.state_dict()
    networks = {"model": model, "ema": model, "vae": layer.state_dict(), "discriminator": layer.state_dict()}
    return {**networks, "opt": adamw, "opt_vae": adamw, "opt_disc": adamw, "steps": 1}


def damaged_weights(path, draw):
    """Half of the copies are sound archives of unsound values."""
    content = path.read_bytes()
    if draw.random() < 0.5:
        return damaged_bytes(content, draw)
    file = io.BytesIO()
    torch.save(damaged_tree(torch.load(path, weights_only=True), draw, TENSORS), file)
    return file.getvalue()


def read_discriminator(folder):
    load_discriminator_weights(Discriminator(DISCRIMINATOR), folder / "discriminator.ckpt")


def read_statistics(folder):
    statistics_of_file(folder / "latents_stats.pt").checked(2)


def read_squeezenet(folder):
    load_squeezenet(FoundationConfig(name="squeezenet", weights=str(folder / "squeeze.pth")))


def read_lpips(folder):
    weights, heads = str(folder / "squeeze.pth"), str(folder / "heads.pth")
    Perceptual(PerceptualConfig(net="squeeze", weights=weights, heads=heads))


READERS = {
    "config of diffusers": Reader(
        "diffusers/config.json", damaged_text, lambda folder: load_autoencoder(folder / "diffusers")
    ),
    "weights of diffusers": Reader(
        "diffusers/diffusion_pytorch_model.bin", damaged_weights, lambda folder: load_autoencoder(folder / "diffusers")
    ),
    "checkpoint of REPA-E": Reader("repa_e.pt", damaged_weights, lambda folder: load_autoencoder(folder / "repa_e.pt")),
    "training checkpoint of REPA-E": Reader(
        "training.pt", damaged_weights, lambda folder: read_checkpoint(folder / "training.pt")
    ),
    "checkpoint in torch's old form": Reader(
        "old_form.pt", damaged_weights, lambda folder: load_autoencoder(folder / "old_form.pt")
    ),
    "config of MAETok": Reader("maetok/config.json", damaged_text, lambda folder: load_autoencoder(folder / "maetok")),
    "checkpoint of MAETok": Reader(
        "maetok.pt", damaged_weights, lambda folder: load_autoencoder(folder / "maetok.pt", scaling_factor=0.5)
    ),
    "statistics of LightningDiT": Reader("latents_stats.pt", damaged_weights, read_statistics),
    "generator of MAETok": Reader("sequence.pt", damaged_weights, lambda folder: load_sit(folder / "sequence.pt")),
    "generator": Reader("generator.pt", damaged_weights, lambda folder: load_sit(folder / "generator.pt")),
    "discriminator": Reader("discriminator.ckpt", damaged_weights, read_discriminator),
    "foundation model": Reader("squeeze.pth", damaged_weights, read_squeezenet),
    **{
        name: Reader(f"{name}.pth", damaged_weights, partial(read_transformer, name))
        for name in ("dinov2-vit-b", "dinov3-vit-b")
    },
    "LPIPS": Reader("squeeze.pth", damaged_weights, read_lpips),
    "heads of LPIPS": Reader("heads.pth", damaged_weights, read_lpips),
    "Inception": Reader("inception.pth", damaged_weights, lambda folder: InceptionFeatures(folder / "inception.pth")),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_user_error_or_nothing(name, folder):
    check_reader(name, READERS[name], folder)
