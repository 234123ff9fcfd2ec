"""Each loss by itself moves what it is meant to train, all of that and nothing else."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import e2e_config, vae_config

from sendvae_fast.data.loader import ImageBatch
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.train.e2e.stage import E2EStage
from sendvae_fast.train.vae.stage import VAEStage

pytestmark = pytest.mark.slow

OFF = dict.fromkeys(("reconstruction_weight", "perceptual_weight", "kl_weight", "gan_weight"), 0.0)
NO_ALIGNMENT = {"method": "none", "latent_norm": "none"}
ENCODER, DECODER, DISCRIMINATOR = {"encoder", "quant_conv"}, {"post_quant_conv", "decoder"}, {"discriminator"}
PICTURE = ENCODER | DECODER


def batch_of() -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageBatch(0, torch.arange(4), images, torch.arange(4) % 2)


def moved_by(stage, networks):
    """Names of the parts of networks of which a step moves parameters, and of those with a parameter it leaves."""
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    stage.train_step(0, batch_of())
    moved, left = set(), {}
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            part = name or key.split(".")[0]
            if torch.equal(parameter, before[name][key]):
                left.setdefault(part, []).append(key)
            else:
                moved.add(part)
    return moved, {part: keys for part, keys in left.items() if part in moved}


@pytest.mark.parametrize(
    "loss, alignment, trained",
    [
        ({"reconstruction_weight": 1.0}, NO_ALIGNMENT, PICTURE),
        ({"perceptual_weight": 1.0}, NO_ALIGNMENT, PICTURE),
        ({"kl_weight": 1.0}, NO_ALIGNMENT, ENCODER),
        ({"gan_weight": 1.0}, NO_ALIGNMENT, PICTURE | DISCRIMINATOR),
        ({}, {"method": "send"}, ENCODER | {"mapper"}),
        ({}, {"method": "va", "va": {"adaptive": False}}, ENCODER | {"mapper"}),
        ({}, {"method": "reals"}, ENCODER | {"mapper"}),
    ],
    ids=["reconstruction", "lpips", "kl", "gan", "send", "va", "reals"],
)
def test_a_term_of_stage_1(tmp_path, perceptual, loss, alignment, trained):
    loss = OFF | {"gan_start_step": 0, "gan_adaptive": False} | loss
    if loss["perceptual_weight"]:
        loss["perceptual"] = perceptual
    config = vae_config(
        tmp_path, tmp_path, loss=loss, alignment=alignment, engine={"name": "ddp"}, cold_discriminator=True
    )
    stage = VAEStage(config, None, init_distributed("cpu"))
    networks = {"": stage.model.autoencoder}
    if stage.model.mapper is not None:
        networks["mapper"] = stage.model.mapper
    if stage.judge.discriminator is not None:
        networks["discriminator"] = stage.judge.discriminator.module
    moved, left = moved_by(stage, networks)
    assert moved == trained
    # Real and fake push the hinge loss's last bias as much one way as the other while both are within its margin.
    assert left == ({"discriminator": ["main.8.bias"]} if "discriminator" in trained else {})


def test_alignment_through_the_generator_trains_the_autoencoder_end_to_end(tmp_path):
    """REPA-E's, by itself, by way of the SiT's first blocks: the encoder. The SiT is trained beside it."""
    images = SimpleNamespace(catalog=SimpleNamespace(class_names=["class"] * 2))
    loss = OFF | {"gan_start_step": 0, "gan_adaptive": False}
    stage = E2EStage(e2e_config(tmp_path, tmp_path, loss=loss), images, init_distributed("cpu"))
    with torch.no_grad():
        for parameter in stage.sit.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)  # what starts at zero would let nothing through in the first step
    moved, left = moved_by(stage, {"": stage.model.autoencoder, "sit": stage.sit})
    assert moved == ENCODER | {"sit"} and not left
