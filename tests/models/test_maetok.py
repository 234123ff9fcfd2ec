"""MAETok: its network against its authors' code, its published layout, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch
from maetok_weights import BASE, SMALL, filled, picture, published_shapes
from safetensors.torch import save_file
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.export import write_diffusers, write_ldm
from sendvae_fast.models.autoencoder.maetok import MAETok, MAETokConfig
from sendvae_fast.models.autoencoder.maetok_layout import from_maetok
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder
from sendvae_fast.models.weights import check_fit
from sendvae_fast.train.vae.networks import initial_autoencoder

# What the authors' code (Hhhhhhao/continuous_tokenizer at 7cc3e96, AEModel) made of `filled` weights and `picture(32)`:
# the first two latent tokens, the pixels of row 5 in columns 0 and 13 of each colour, the mean square of all pixels. In
# float64, its rotary positions too, which it computes in float32 otherwise; its DINOv2-S cut to the sizes of `SMALL`.
RECORDED = {
    "rotary positions": (
        {},
        [[-1.2958497582361104, -0.08095870059880364, -0.2444244703794094],
         [-1.7329834019870374, -0.40065501002183945, -0.6254532185110773]],
        [[0.5174551829495798, 0.05190498813493262], [-1.3210204350496075, -0.32174363708458414],
         [-0.9471700429027657, -0.55644591857779]],
        0.8304635446352832,
    ),
    "learned positions": (
        {"rope": False, "class_token": True},
        [[-0.6640129040550529, 0.7624007731786396, 0.7520567939536141],
         [-0.6930805391075747, -0.10639314054192339, 0.7197615837597195]],
        [[-1.6181425017667046, -0.012820526320162421], [-0.8473752226256338, 1.4582437024150683],
         [-0.05506163794773519, 0.2334251021913395]],
        0.8617021701845177,
    ),
}  # fmt: skip


def network(**options) -> MAETok:
    """In float64."""
    config, state = from_maetok(filled(published_shapes(**SMALL, **options)), "a test")
    model = MAETok(config).double()
    model.load_state_dict(state)
    return model.eval()


def published(folder, extra=(), **entries):
    """A folder as the authors publish it, weights in float32, with what only training has."""
    folder.mkdir(parents=True)
    state = {name: value.float() for name, value in filled(published_shapes(**SMALL)).items()}
    state |= {"projection.0.weight": torch.ones(2), "repa_model.cls_token": torch.ones(1), **dict(extra)}
    save_file(state, folder / "model.safetensors")
    entries = {"codebook_embed_dim": 3, "encoder_model": "vit_base", "vq_mean": 0.25, "vq_std": 2, **entries}
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("kind", RECORDED)
@torch.no_grad()
def test_the_network_is_its_authors(kind):
    options, latent, pixels, mean_square = RECORDED[kind]
    model = network(**options)
    posterior = model.posterior(picture(32))
    assert posterior.mean.shape == (1, 3, 1, 5) and not posterior.std.any()
    decoded = model.decode(posterior.mean)
    assert_close(posterior.mean[0, :, 0, :2].T, torch.tensor(latent, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(decoded[0, :, 5, [0, 13]], torch.tensor(pixels, dtype=torch.float64), rtol=0, atol=1e-12)
    assert decoded.square().mean().item() == pytest.approx(mean_square, abs=1e-12)


def test_the_published_names_and_shapes_are_maetok_b_128s():
    state = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(**BASE).items()}
    config, own = from_maetok(state, "a test")
    assert config == MAETokConfig()
    with torch.device("meta"):
        model = MAETok(config)
    check_fit(model, own, "a test")
    assert model.latent_shape(256) == (32, 1, 128) and model.image_size((32, 1, 128)) == 256
    # The authors' code counts 172,680,992: these, and what it carries and does not use.
    unused = [f"decoder.model.{name}" for name in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")]
    unused += ["encoder.mask_token"]
    assert sum(p.numel() for p in model.parameters()) + sum(state[name].numel() for name in unused) == 172_680_992


def test_a_published_folder_is_read_and_kept(tmp_path):
    saved = load_autoencoder(published(tmp_path / "theirs"))
    assert saved.latent_mean.tolist() == [0.25] * 3 and saved.latent_std.tolist() == [2.0] * 3
    assert not saved.autoencoder.training and saved.autoencoder.config == network().config
    expected = network().state_dict()
    assert all(torch.equal(value, expected[name].float()) for name, value in saved.autoencoder.state_dict().items())
    save_autoencoder(tmp_path / "ours", *saved[:3])
    ours = load_autoencoder(tmp_path / "ours")
    assert ours.autoencoder.config == saved.autoencoder.config and torch.equal(ours.latent_std, saved.latent_std)
    x = picture(32).float()
    with torch.no_grad():
        assert torch.equal(ours.autoencoder(x), saved.autoencoder(x))


def test_a_checkpoint_of_theirs_has_no_statistics_and_takes_given_ones(tmp_path):
    state = {name: value.float() for name, value in filled(published_shapes(**SMALL)).items()}
    torch.save({"ema": {f"_orig_mod.{name}": value for name, value in state.items()}, "steps": 3}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt has no latent statistics"):
        load_autoencoder(tmp_path / "x.pt")
    saved = load_autoencoder(tmp_path / "x.pt", scaling_factor=0.5)
    assert saved.latent_std.tolist() == [2.0] * 3 and saved.autoencoder.config == network().config


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"quantize.embedding": torch.ones(1)}, "quantises or draws its latents"),
        ({"quant_conv.weight": torch.ones(6, 128)}, "quantises or draws its latents"),
        ({"decoder.model.blocks.0.adaLN_modulation.1.weight": torch.ones(1)}, "a MoVQ decoder"),
        ({"encoder.latent_tokens": torch.ones(5, 128)}, "it lacks encoder.latent_tokens of 3 dims"),
        ({"encoder.model.reg_token": torch.ones(1, 4, 128)}, "1 unexpected .encoder.model.reg_token"),
        (
            {"decoder.to_pixel.model.bias": torch.ones(3)},
            "1 of another shape .decoder.to_pixel.model.bias 3 instead of",
        ),
        ({"encoder.freqs": torch.full((2, 2, 64), torch.nan)}, "has NaN or inf in 1 weights .encoder.freqs"),
    ],
)
def test_other_tokenizers_and_broken_ones_are_refused(tmp_path, extra, message):
    with pytest.raises(UserError, match=message) as raised:
        load_autoencoder(published(tmp_path / "x", extra.items()))
    assert "\n" not in str(raised.value)


def test_broken_statistics_are_refused(tmp_path):
    with pytest.raises(UserError, match="vq_mean and vq_std are 'a' and 2 and should be numbers"):
        load_autoencoder(published(tmp_path / "x", vq_mean="a"))
    with pytest.raises(UserError, match="a deviation that is not above 0"):
        load_autoencoder(published(tmp_path / "y", vq_std=0))
    with pytest.raises(UserError, match="hold NaN, inf or"):
        load_autoencoder(published(tmp_path / "z", vq_mean=1e300))


def test_sizes_that_do_not_fit_are_refused():
    model = network()
    for call in (lambda: model.posterior(torch.zeros(1, 3, 64, 64).double()), lambda: model.latent_shape(64)):
        with pytest.raises(UserError, match="takes pictures of 32 x 32 pixels and no other, not 64 x 64"):
            call()
    with pytest.raises(UserError, match="latents of 3 x 4 x 4 are not this MAETok's, which are 3 x 1 x 5"):
        model.image_size((3, 4, 4))
    with pytest.raises(UserError, match="image_size=40 must be a multiple of patch_size=16"):
        MAETokConfig(image_size=40)
    with pytest.raises(UserError, match="decoder_width=96 must be a multiple of twice decoder_heads=9"):
        MAETokConfig(decoder_width=96, decoder_heads=9)
    with pytest.raises(UserError, match="set decoder_class_token, or rope"):
        MAETokConfig(rope=False)


def test_it_is_not_trained_and_has_no_other_layout(tmp_path):
    theirs = published(tmp_path / "theirs")
    config = SimpleNamespace(init_from=str(theirs))
    with pytest.raises(
        UserError, match=r"init_from=.*theirs is a MAETok, which encodes and decodes here but is neither"
    ):
        initial_autoencoder(config)
    saved = load_autoencoder(theirs)
    for write in (write_diffusers, write_ldm):
        with pytest.raises(UserError, match="theirs is a MAETok"):
            write(tmp_path, saved, "theirs")
