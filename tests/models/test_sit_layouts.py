"""Generators as SiT, REPA, REPA-E and LightningDiT publish them: random checkpoints, a plain forward pass as truth."""

import argparse
import functools
import math

import pytest
import torch
from plain_sit import plain_sit
from safetensors.torch import save_file
from torch.testing import assert_close

from sendvae_fast.cli.main import main
from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.models.sit.storage import load_initial_weights, load_sit, save_sit

CHANNELS, PATCH, GRID, CLASSES, DEPTH = 3, 2, 3, 5, 2
MEAN, STD = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.01, 2.0, 4.0])  # 0.01² is not above REPA-E's eps
BATCH_NORM = {
    "bn.running_mean": MEAN, "bn.running_var": STD**2, "bn.num_batches_tracked": torch.tensor(7),
}  # fmt: skip
SCALE_AND_BIAS = {"latents_scale": (1 / STD).view(1, -1, 1, 1), "latents_bias": MEAN.view(1, -1, 1, 1)}


@functools.cache
def state_of(kind, seed=0):
    """A state dict with the names and shapes of the fact sheet, and the number of heads."""
    generator = torch.Generator().manual_seed(seed)
    lightning, qk_norm = "lightning" in kind, "norm of queries" in kind
    width, heads = (24, 3) if lightning or qk_norm else (384, 6)  # only published widths tell the heads
    outputs = PATCH**2 * CHANNELS * (2 if kind == "sit" else 1)
    layers = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (outputs, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    vectors = {}
    for index in range(DEPTH):
        block = f"blocks.{index}"
        layers |= {
            f"{block}.attn.qkv": (3 * width, width),
            f"{block}.attn.proj": (width, width),
            f"{block}.adaLN_modulation.1": (6 * width, width),
        }
        if lightning:
            layers |= {f"{block}.mlp.w12": (4 * width * 4 // 3, width), f"{block}.mlp.w3": (width, 4 * width * 2 // 3)}
            vectors |= {f"{block}.norm1.weight": width, f"{block}.norm2.weight": width}
            vectors |= {"final_layer.norm_final.weight": width}
        else:
            layers |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
        if qk_norm:
            vectors |= {f"{block}.attn.{part}_norm.weight": width // heads for part in "qk"}
            if not lightning:
                vectors |= {f"{block}.attn.{part}_norm.bias": width // heads for part in "qk"}
    if kind.startswith("repa"):
        layers |= {"projectors.0.0": (20, width), "projectors.0.2": (20, 20), "projectors.0.4": (7, 20)}
        layers |= {"projectors.1.0": (20, width), "projectors.1.2": (20, 20), "projectors.1.4": (9, 20)}
    shapes = {
        "x_embedder.proj.weight": (width, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, width),
        "pos_embed": (1, GRID**2, width),
    }
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    state = {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    state |= {name: 1 + 0.2 * torch.randn(size, generator=generator) for name, size in vectors.items()}
    if lightning:
        state |= {f"feat_rope.freqs_{part}": torch.zeros(GRID**2, 8) for part in ("cos", "sin")}  # a function of sizes
    return state | (BATCH_NORM if kind.startswith("repa-e") else {}), heads


KINDS = ["repa", "repa-e", "repa, norm of queries", "sit", "lightning", "lightning, norm of queries"]


def inputs():
    generator = torch.Generator().manual_seed(9)
    size = PATCH * GRID
    return torch.randn(4, CHANNELS, size, size, generator=generator), torch.rand(4, generator=generator)


def truth(kind, state, heads, z_t, t, labels):
    """The velocity towards noise at noise level t. SiT's and LightningDiT's goes to the data, as their time."""
    backwards = kind == "sit" or "lightning" in kind
    velocity, _ = plain_sit(state, z_t, 1 - t if backwards else t, labels, num_heads=heads)
    return -velocity if backwards else velocity


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_of_every_layout(tmp_path, kind):
    state, heads = state_of(kind)
    torch.save(state, tmp_path / "sit.pt")
    torch.save(SCALE_AND_BIAS, tmp_path / "sit-latents-stats.pt")
    saved = load_sit(tmp_path / "sit.pt")
    (z_t, t), labels = inputs(), torch.tensor([0, 4, 5, 2])
    with torch.no_grad():
        velocity, _ = saved.sit(z_t, t, labels)
    assert_close(velocity, truth(kind, state, heads, z_t, t, labels), rtol=1e-5, atol=1e-5)
    config = saved.sit.config
    assert (config.latent_size, config.num_classes, config.repa_dim) == (6, 5, 7 if "repa" in kind else None)
    assert_close(saved.latent_mean, MEAN, rtol=0, atol=0)
    assert_close(saved.latent_std, STD, rtol=1e-6, atol=0)  # REPA-E's variance without its eps
    assert saved.statistics_origin == (
        "batch norm bn in sit.pt" if kind == "repa-e" else str(tmp_path / "sit-latents-stats.pt")
    )


def files(state, ema):
    """The same weights as the projects save them."""
    arguments = argparse.Namespace(exp_name="run", learning_rate=1e-4, legacy=False, encoder_depth=8)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    prefixed = {f"module.{key}": value for key, value in ema.items()}
    return {
        "repa": {"model": state, "ema": ema, "opt": optimizer, "args": arguments, "steps": 400_000},
        "repa-e": {
            "model": state,
            "ema": ema,
            "vae": {"encoder.conv_in.weight": torch.ones(1)},
            "discriminator": {},
            "opt": optimizer,
            "args": arguments,
            "steps": 4_000_000,
        },
        "lightningdit": {"model": state, "ema": prefixed, "opt": optimizer, "config": {"train": {"max_steps": 80_000}}},
        "compiled": {"model": state, "ema": {f"_orig_mod.{key}": value for key, value in ema.items()}},
        "only ema": {"ema": prefixed},
        "bare": ema,
        "bare, of DistributedDataParallel": prefixed,
    }


@pytest.mark.parametrize("kind", files({}, {}))
def test_every_wrapper(tmp_path, kind):
    (state, _), (ema, _) = (state_of("repa-e, norm of queries", seed) for seed in (1, 2))
    content = files(state, ema)[kind]
    torch.save(content, tmp_path / "sit.pt")
    averaged, raw = (load_sit(tmp_path / "sit.pt", ema=which).sit.state_dict() for which in (True, False))
    for key, value in averaged.items():
        assert torch.equal(value, ema[key]) and torch.equal(raw[key], (state if "model" in content else ema)[key])


def test_statistics_are_asked_for_where_there_are_none(tmp_path):
    state, _ = state_of("sit")
    save_file(state, tmp_path / "sit.safetensors")
    with pytest.raises(UserError, match=r"convert .*sit.safetensors --to=generator.*--scaling_factor=0.18215"):
        load_sit(tmp_path / "sit.safetensors")
    saved = load_sit(tmp_path / "sit.safetensors", scaling_factor=0.18215)
    assert_close(saved.latent_std, torch.full((3,), 1 / 0.18215))
    torch.save({"mean": MEAN, "std": STD}, tmp_path / "latents_stats.pt")
    assert torch.equal(load_sit(tmp_path / "sit.safetensors").latent_std, STD)


@pytest.fixture
def folder(tmp_path):
    """A generator of ours, with other weights in its average."""
    config = SiTConfig(latent_size=6, latent_channels=3, patch_size=2, width=24, depth=2, num_heads=3, num_classes=5,
                       repa_dim=7, repa_block=2, projector_width=20, qk_norm=True)  # fmt: skip
    names, states = SiT(config).state_dict(), [state_of("repa, norm of queries", seed)[0] for seed in (1, 2)]
    weights, ema = ({key: state[key] for key in names} for state in states)
    save_sit(tmp_path / "ours", config, weights, ema, MEAN, STD)
    return tmp_path / "ours"


@pytest.mark.parametrize("to", ["repa", "repa-e"])
def test_convert_there_and_back(folder, tmp_path, capsys, to):
    assert main(["convert", str(folder), f"--to={to}", f"--out={tmp_path / 'theirs'}"]) == 0
    words = f"generator of 2 blocks of width 24 for 3 x 6 x 6 latents, {to} layout; latent statistics from"
    assert words in capsys.readouterr().out
    content = torch.load(tmp_path / "theirs" / "generator.pt", weights_only=True)
    (state, _), (ema, _) = (state_of(f"{to}, norm of queries", seed) for seed in (1, 2))
    for mine, theirs in ((content["model"], state), (content["ema"], ema)):
        assert mine.keys() == {key for key in theirs if not key.startswith("projectors.1")}
        for key, value in mine.items():
            assert value.shape == theirs[key].shape and (torch.equal(value, theirs[key]) or "num_batches" in key)
    file = str(tmp_path / "theirs" / "generator.pt")
    assert main(["convert", file, "--to=generator", f"--out={tmp_path / '2'}"]) == 0
    for which in (True, False):
        before, after = load_sit(folder, ema=which), load_sit(tmp_path / "2", ema=which)
        assert all(torch.equal(value, before.sit.state_dict()[key]) for key, value in after.sit.state_dict().items())
        assert_close((after.latent_mean, after.latent_std), (MEAN, STD), rtol=1e-6, atol=0)
        assert after.sit.config.repa_block == 2


def test_convert_lightningdit_there_and_back(tmp_path):
    state, _ = state_of("lightning, norm of queries")
    torch.save({"ema": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "lightning.pt")
    torch.save({"mean": MEAN, "std": STD}, tmp_path / "latents_stats.pt")
    commands = [(tmp_path / "lightning.pt", "generator", "1"), (tmp_path / "1", "lightningdit", "2")]
    for source, to, out in commands:
        assert main(["convert", str(source), f"--to={to}", f"--out={tmp_path / out}"]) == 0
    content = torch.load(tmp_path / "2" / "generator.pt", weights_only=True)["ema"]
    assert content.keys() == state.keys()
    for key, value in content.items():
        if key.startswith("feat_rope"):
            row, column, pair = 1, 2, 3  # the second frequency, of the column
            angle = {"freqs_cos": math.cos, "freqs_sin": math.sin}[key.partition(".")[2]](column / 10000**0.5)
            assert value.shape == (9, 8) and value[row * GRID + column, 2 * pair].item() == pytest.approx(angle)
        else:
            assert_close(value, state[key], rtol=1e-6, atol=1e-7)
    stats = torch.load(tmp_path / "2" / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == (1, 3, 1, 1) and torch.equal(stats["std"].flatten(), STD)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {"weight": torch.ones(1)}, "holds no SiT, it has no x_embedder.proj.weight"),
        (lambda s: s | {"pos_embed": None}, "lacks pos_embed of 3 dims"),
        (lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc2.bias"}, r"1 missing \(blocks.1.mlp.fc2.b"),
        (lambda s: s | {"blocks.1.attn.proj.bias": torch.full((384,), torch.nan)}, "NaN or inf in 1 weights"),
        (lambda s: s | {"x_embedder.proj.weight": torch.ones(380, 3, 2, 2)}, "do not tell the number of heads"),
        (lambda s: s | {"bn.running_mean": torch.zeros(2)}, "2 means and 3 deviations"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, change, words):
    torch.save(change(state_of("repa-e")[0]), tmp_path / "sit.pt")
    with pytest.raises(UserError, match=words) as error:
        load_sit(tmp_path / "sit.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "to", "advice"), [("lightning", "repa-e", "lightningdit"), ("repa", "lightningdit", "repa or")]
)
def test_networks_are_not_written_in_layouts_that_lack_their_parts(tmp_path, capsys, kind, to, advice):
    torch.save(state_of(kind)[0], tmp_path / "sit.pt")
    arguments = ["convert", str(tmp_path / "sit.pt"), f"--to={to}", f"--out={tmp_path / 'out'}", "--scaling_factor=1"]
    assert main(arguments) == 2
    assert f"convert --to={advice}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_initial_weights(folder, tmp_path):
    config = load_sit(folder).sit.config
    for changes in ({}, {"repa_dim": None}, {"repa_dim": 8}):
        sit = SiT(SiTConfig(**{**vars(config), **changes}))
        before = {key: value.clone() for key, value in sit.state_dict().items()}
        load_initial_weights(sit, folder)
        ema = state_of("repa, norm of queries", 2)[0]
        for key, value in sit.state_dict().items():
            kept = key.startswith("projectors.") and changes
            assert torch.equal(value, before[key] if kept else ema[key]), key
    for name, value in (("latent_channels", 4), ("num_classes", 6), ("num_heads", 2), ("qk_norm", False)):
        with pytest.raises(UserError, match=rf"{name}={getattr(config, name)}, but this run's has {name}={value}"):
            load_initial_weights(SiT(SiTConfig(**{**vars(config), name: value})), folder)


def test_initial_weights_need_no_statistics(tmp_path):
    torch.save(state_of("repa")[0], tmp_path / "sit.pt")
    sit = SiT(load_sit(tmp_path / "sit.pt", scaling_factor=1.0).sit.config)
    load_initial_weights(sit, tmp_path / "sit.pt")
    for key, value in load_sit(tmp_path / "sit.pt", scaling_factor=1.0).sit.state_dict().items():
        assert torch.equal(sit.state_dict()[key], value), key
