"""`sendvae play` without its page: what runs are found, and what is done with their networks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import sendvae_fast
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.crop import center_crop
from sendvae_fast.data.decode import decode_rgb
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.errors import UserError
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.play.places import find_runs
from sendvae_fast.play.player import ANY_CLASS, MAX_SLIDERS, Player, slider_names
from sendvae_fast.play.runs import load_runs
from sendvae_fast.play.settings import PlayConfig
from sendvae_fast.sampling.settings import SamplerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

OLD_RUNS = Path(__file__).parents[1] / "old_runs"
SIZE = 32


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The runs in tests/old_runs, whose configs name their neighbours `vae` and `scenes`, with those pictures."""
    root = tmp_path_factory.mktemp("play")
    shutil.copytree(OLD_RUNS, root, dirs_exist_ok=True)
    synth_scenes(root / "scenes", 60, SIZE, seed=0)
    return root


@pytest.fixture
def there(house, monkeypatch):
    monkeypatch.chdir(house)
    return house


def load(*runs, **options):
    said = []
    return load_runs(PlayConfig(runs=runs, **options), torch.device("cpu"), said.append), said


@pytest.fixture
def networks(there):
    (networks,), said = load("sit")
    assert not said
    generator = torch.Generator().manual_seed(0)
    for parameter in networks._generator.parameters():  # three steps from its start, all classes have velocity 0
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return networks


def picture(number=3):
    catalog = Catalog.open("scenes")
    return center_crop(decode_rgb(catalog.read(number)), SIZE).transpose(2, 0, 1)


def decoded(autoencoder, z):
    """Of a raw latent, by the library's normalised one."""
    scale = autoencoder.latent_std.view(1, -1, 1, 1)
    with torch.no_grad():
        return to_uint8(autoencoder.decode((z - autoencoder.latent_mean.view(1, -1, 1, 1)) / scale), "round")[0].numpy()


def encoded(autoencoder, images):
    with torch.no_grad():
        z = autoencoder.encode(torch.from_numpy(images))
        return z * autoencoder.latent_std.view(1, -1, 1, 1) + autoencoder.latent_mean.view(1, -1, 1, 1)


def assert_same_picture(one, other):
    """But for a grey level here and there, which normalising and back may move over the edge."""
    difference = np.abs(one.astype(int) - other)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_a_reconstruction_is_the_librarys_and_its_psnr_that_of_the_definition(networks):
    original = picture()
    reconstruction, psnr_db = networks.reconstruct(original)
    autoencoder = sendvae_fast.load_autoencoder("vae")
    assert_same_picture(reconstruction, decoded(autoencoder, encoded(autoencoder, original[None])))
    mse = ((original.astype(float) - reconstruction) ** 2).mean()
    assert psnr_db == pytest.approx(10 * np.log10(255**2 / mse))


def test_directions_are_those_of_scikit_learns_probes(networks):
    """Covariance of latents, in half precision, with a probe's logit over its deviation."""
    catalog, autoencoder = Catalog.open("scenes"), sendvae_fast.load_autoencoder("vae")
    images = np.stack([picture(number) for number in range(60)])
    x = encoded(autoencoder, images).flatten(1).half().double().numpy()
    names = list(networks.attribute_shares)
    assert names == list(catalog.attributes.names)
    y = catalog.attributes.values[:, names.index("large")]
    assert networks.attribute_shares["large"] == pytest.approx(y.mean())
    scaled = StandardScaler().fit_transform(x)
    logit = LogisticRegression(tol=1e-8, max_iter=5000).fit(scaled, y).decision_function(scaled)
    expected = (logit - logit.mean()) @ x / 60 / logit.std()
    found = networks.directions[names.index("large")].numpy()
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


def test_a_picture_moves_by_the_named_amounts(networks):
    original, autoencoder = picture(), sendvae_fast.load_autoencoder("vae")
    names = list(networks.attribute_shares)
    moved = networks.move(original, {"upper": -4.0, "large": 2.5})
    z = encoded(autoencoder, original[None])
    step = 2.5 * networks.directions[names.index("large")] - 4.0 * networks.directions[names.index("upper")]
    assert_same_picture(moved, decoded(autoencoder, z + step.view_as(z)))
    assert np.abs(moved.astype(int) - networks.reconstruct(original)[0]).max() > 5
    np.testing.assert_array_equal(networks.move(original, {}), networks.reconstruct(original)[0])
    with pytest.raises(UserError, match="vae|sit.* knows no direction of purple"):
        networks.move(original, {"purple": 1.0})


@pytest.mark.parametrize("label, labels", [(5, [5] * 26), (None, [*range(24), 0, 1])])
def test_generated_pictures_are_the_librarys(networks, label, labels):
    drawn = networks.generate(26, label, seed=7, guidance_scale=1.5, num_steps=3)
    autoencoder = sendvae_fast.load_autoencoder("vae")
    settings = dict(seed=7, guidance_scale=1.5, sampler=SamplerConfig(num_steps=3))
    expected = networks._generator.sample(autoencoder, 26, labels, **settings).images.numpy()
    np.testing.assert_array_equal(drawn, expected)
    other = networks.generate(26, label, seed=8, guidance_scale=1.5, num_steps=3)
    assert (other != drawn).any()


def test_without_a_generator_or_attributes_it_says_so(there, tmp_path):
    shutil.copytree("vae/checkpoints/step_00000003", tmp_path / "weights")
    (networks,), said = load(str(tmp_path / "weights"), image_size=32)
    assert len(said) == 1 and "nothing is known of attributes" in said[0]
    assert networks.class_names == () and networks.attribute_shares == {} and networks.catalog is None
    with pytest.raises(UserError, match="has no generator: give a run of stage 2"):
        networks.generate(1, None, 0, 1.0, 3)
    with pytest.raises(UserError, match="open one of yours"):
        Player([networks]).example(0)
    (networks,), said = load(str(tmp_path / "weights"), image_size=32, attributes="scenes")
    assert not said and "large" in networks.attribute_shares and networks.catalog is not None


def test_runs_of_all_kinds_are_found(there, tmp_path):
    checkpoint = Path("vae/checkpoints/step_00000003")
    names = ("Plain VAE", "Send-VAE")
    comparison = {"variants": [{"name": names[0], "runs": ["vae"]}, {"name": names[1], "runs": ["sit", "vae"]},
                               {"name": "not begun"}]}  # fmt: skip
    shutil.copytree(there, tmp_path / "moved")
    (tmp_path / "moved" / "results.json").write_text(json.dumps(comparison))
    vae, sit, plain, send = find_runs(["vae", "sit", str(tmp_path / "moved")])
    assert (vae.generator, sit.generator) == (None, Path("sit/checkpoints/step_00000003"))
    assert vae.autoencoder == sit.autoencoder == checkpoint
    assert {(one.image_size, one.pictures) for one in (vae, sit, plain)} == {(32, "scenes")}
    assert (plain.name, send.name) == names and plain.generator is None
    assert send.generator.is_relative_to(tmp_path) and send.autoencoder.is_relative_to(tmp_path)
    (weights,) = find_runs([str(checkpoint)])
    assert weights.autoencoder == checkpoint and weights.image_size == 32


@pytest.mark.parametrize(
    "runs, options, words",
    [
        (["nowhere"], {}, "nowhere does not exist"),
        (["scenes"], {}, "scenes is neither a weight folder"),
        (["vae", "vae"], {}, "is given twice"),
        (["vae"], {"image_size": 30}, "pictures of 30 pixels do not fit .* a multiple of 4"),
        (["vae"], {"attributes": "vae"}, "vae"),
        (["vae"], {"benchmark": "celeba"}, "goes with --attributes"),
        (["vae"], {"port": 70000}, "port is 70000"),
        ([], {}, "name one or more runs"),
    ],
)
def test_what_is_wrong_is_one_line(there, runs, options, words):
    with pytest.raises(UserError, match=words) as caught:
        load(*runs, **options)
    assert "\n" not in str(caught.value)


def test_a_generator_of_unknown_latents_asks_for_the_autoencoder(there, tmp_path):
    shutil.copytree("sit", tmp_path / "sit")
    config = tmp_path / "sit" / "config.yaml"
    config.write_text(config.read_text().replace("autoencoder: vae", "autoencoder: null"))
    with pytest.raises(UserError, match="give --autoencoder"):
        find_runs([str(tmp_path / "sit")])
    (found,) = find_runs([str(tmp_path / "sit")], autoencoder="vae")
    assert found.autoencoder == Path("vae/checkpoints/step_00000003")


def test_controls_show_a_row_of_pictures_for_each_ticked_run(there):
    networks, _ = load("sit", "vae")
    player = Player(networks)
    crops, names = player.example(1), [one.name for one in networks]
    assert set(crops) == {SIZE} and crops[SIZE].shape == (3, SIZE, SIZE)
    amounts = [0.0] * len(player.sliders)
    assert player.reconstruct_and_move({}, names, amounts) == {}
    rows = player.reconstruct_and_move(crops, names[1:], amounts)
    assert list(rows) == names[1:] and [caption.split(",")[0] for _, caption in rows[names[1]]] == [
        "original",
        "decoded",
    ]
    np.testing.assert_array_equal(rows[names[1]][0][0], crops[SIZE].transpose(1, 2, 0))
    amounts[player.sliders.index("busy_background")] = -1.5
    rows = player.reconstruct_and_move(crops, names, amounts)
    assert [row[2][1] for row in rows.values()] == ["busy background -1.5"] * 2
    expected = networks[0].move(crops[SIZE], {"busy_background": -1.5}).transpose(1, 2, 0)
    np.testing.assert_array_equal(rows[names[0]][2][0], expected)
    rows = player.generate(names, ANY_CLASS, 3.0, 0.0, 1.0, 2.0)
    assert list(rows) == names[:1] and [caption for _, caption in rows[names[0]]] == [
        name.replace("_", " ") for name in networks[0].class_names[:3]
    ]
    with pytest.raises(UserError, match="no run that is ticked has a generator"):
        player.generate(names[1:], ANY_CLASS, 1, 0, 1.0, 2)


def test_a_photograph_is_upright_and_cropped_as_training_pictures_are(there, tmp_path):
    networks, _ = load("vae")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    lying = Image.fromarray(np.rot90(pixels))
    exif = lying.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "photo.png", exif=exif)
    crops = Player(networks).open(str(tmp_path / "photo.png"))
    np.testing.assert_array_equal(crops[SIZE], center_crop(Image.fromarray(pixels), SIZE).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["script.eps", "bomb.png", "text.jpg"])
def test_only_pictures_are_opened(there, tmp_path, name):
    networks, _ = load("vae")
    if name == "bomb.png":
        Image.new("1", (8200, 8200)).save(tmp_path / name)
    elif name == "script.eps":
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    else:
        (tmp_path / name).write_text("no picture")
    with pytest.raises(UserError, match="cannot read the image"):
        Player(networks).open(str(tmp_path / name))


def test_of_very_many_attributes_the_most_even_get_sliders(there):
    many = SimpleNamespace(attribute_shares={f"a{number}": number / 101 for number in range(102)})
    names = slider_names([many])
    assert len(names) == MAX_SLIDERS and names == [f"a{number}" for number in range(31, 71)]
