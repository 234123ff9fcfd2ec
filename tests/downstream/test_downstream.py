"""Segmentation and depth of latents: heads, their scores, the truth they are fitted to, and the verb."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import jaccard_score

from sendvae_fast.cli.main import main
from sendvae_fast.data.scenes.ground_truth import SEGMENT_NAMES, WALL_DISTANCE, scene_truth
from sendvae_fast.data.scenes.scene import draw_scene, neighbours_of, oklch_to_srgb, render_scene
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.downstream.alignment_network import load_alignment_network
from sendvae_fast.downstream.dense_data import VOID, open_dense
from sendvae_fast.downstream.heads import L2, abs_rel, fit_depth, fit_segmentation, segmentation_score
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.send_vae import SendVAE
from sendvae_fast.ops import philox

pytestmark = pytest.mark.usefixtures("one_thread")

OLD_RUNS = Path(__file__).parents[1] / "old_runs"
SIZE = 32


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The runs in tests/old_runs, whose configs name their neighbour `vae`, and pictures."""
    root = tmp_path_factory.mktemp("downstream")
    shutil.copytree(OLD_RUNS, root, dirs_exist_ok=True)
    synth_scenes(root / "scenes", 24, SIZE, seed=3)
    return root


@pytest.fixture
def there(house, monkeypatch):
    monkeypatch.chdir(house)
    return house


def test_truth_is_of_the_scene():
    """The areas are those of the shapes in closed form, the distances those of their radii."""
    discs = [i for i in range(0, 240, 24) if not draw_scene(0, i).attributes["crowded"]]
    for scene in (draw_scene(0, i) for i in discs):
        segments, distances = scene_truth(scene, 256)
        (column, row), reach = scene.centre, 0.95 * scene.radius
        if min(column, row, 1 - column, 1 - row) > reach:
            area = (segments == SEGMENT_NAMES.index("disc")).mean()
            assert area == pytest.approx(np.pi * reach**2, rel=0.01)
        assert distances[int(row * 256), int(column * 256)] == pytest.approx(1 / scene.radius)
        for neighbour in neighbours_of(scene):
            place = tuple(int(c * 256) for c in reversed(neighbour.centre))
            assert SEGMENT_NAMES[segments[place]] == "neighbour" and distances[place] <= 1 / 0.035
        assert (distances[segments == 0] == WALL_DISTANCE).all()


def test_neighbours_are_where_the_picture_has_them():
    """Their middles have their colour, but for light, vignette, white balance and grain."""
    scenes = [scene for scene in (draw_scene(0, i) for i in range(12)) if scene.attributes["crowded"]]
    assert any(scene.attributes["busy_background"] for scene in scenes)
    for scene in scenes:
        picture, (segments, _) = render_scene(scene, 128) / 255, scene_truth(scene, 128)
        drawn = neighbours_of(scene)
        assert len(drawn) >= 3
        for neighbour in drawn[-1:]:  # none is painted over the last
            place = tuple(int(c * 128) for c in reversed(neighbour.centre))
            if segments[place] == SEGMENT_NAMES.index("neighbour"):
                np.testing.assert_allclose(picture[place], oklch_to_srgb(*neighbour.colour), atol=0.1)


def test_scores_are_scikit_learns_and_the_formula():
    rng = np.random.default_rng(0)
    actual, predicted = rng.integers(4, size=(2, 6, 9, 9)).astype(np.uint8)
    actual[actual == 3], predicted[predicted == 3] = VOID, 2
    score = segmentation_score(torch.from_numpy(predicted), torch.from_numpy(actual), 5)
    counted = actual != VOID
    each = jaccard_score(actual[counted], predicted[counted], labels=[0, 1, 2], average=None)
    np.testing.assert_allclose(score.each[:3], each)
    assert np.isnan(score.each[3:]).all() and score.miou.value == pytest.approx(each.mean())
    assert score.miou.interval[0] < each.mean() < score.miou.interval[1]
    true, guess = rng.uniform(1, 9, (2, 6, 9, 9))
    error = abs_rel(torch.from_numpy(guess), torch.from_numpy(true))
    assert error.value == pytest.approx((np.abs(guess - true) / true).mean())


def test_heads_are_scikit_learns():
    """A patch is a pixel here, so that shares are labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 16, 5, generator=generator)
    x = F.normalize(tokens, dim=-1).flatten(0, 1).double()
    noise = torch.randn(320, 3, generator=generator)
    labels = (x.float() @ torch.randn(5, 3, generator=generator) * 2 + noise).argmax(dim=1).reshape(20, 4, 4)
    head = fit_segmentation(tokens, labels.to(torch.uint8), 3)
    scaled = ((x - x.mean(dim=0)) / x.std(dim=0)).numpy()
    expected = LogisticRegression(C=1 / (2 * L2 * 320), tol=1e-10, max_iter=5000).fit(scaled, labels.flatten())
    found = head(tokens, 4).softmax(dim=1).permute(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(found, expected.predict_proba(scaled), atol=2e-3)
    distances = (x[:, 0] + 0.1 * noise[:, 0].double()).exp().reshape(20, 4, 4).float()
    ridge = Ridge(alpha=L2 * 320).fit(scaled, distances.flatten().log())
    depth = fit_depth(tokens, distances).distances(tokens, 4).flatten()
    np.testing.assert_allclose(depth.log(), ridge.predict(scaled), atol=1e-4)
    torch.testing.assert_close(head.segments(tokens * 7, 4), head.segments(tokens, 4))  # lengths say nothing


def test_features_of_latents_are_those_of_training(there):
    """`SendVAE` itself, given latents without spread at noise level 0."""
    weights = resolve_weights("vae")
    autoencoder = load_autoencoder(weights).autoencoder
    network = load_alignment_network(weights, autoencoder, SIZE)
    model = SendVAE(autoencoder, network.mapper)
    model.latent_norm.set_statistics(network.latent_mean, network.latent_std)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    zeros, key, ids = torch.zeros(2), philox.make_key(0, 0), torch.arange(2)
    with torch.no_grad():
        noised = model.eval().latent_norm(z, torch.full_like(z, -30.0), key, ids, zeros, patch_size=1)
        torch.testing.assert_close(network.features(z), network.mapper(noised.z_t), atol=1e-4, rtol=1e-4)


def test_the_verb(there):
    arguments = ["--autoencoder=vae", "--train_data=scenes", "--data=scenes", "--num_shown=3", "--num_test=10"]
    drawing = ["--generator=sit", "--generate.num_samples=4", "--generate.guidance_scale=1"]
    sampler = ["--generate.sampler.num_steps=2", "--out=results.jsonl"]
    assert main(["downstream", *arguments, *drawing, *sampler, "--debug"]) == 0
    results = {result.metric: result for result in read_results(there / "results.jsonl")}
    kinds = ("foundation", "mapped", "latents", "generated")
    assert set(results) == {f"{name}_{kind}" for name in ("segmentation_miou", "depth_abs_rel") for kind in kinds}
    assert set(results["depth_abs_rel_mapped"].weights) == {"autoencoder", "generator"}
    assert results["segmentation_miou_mapped"].counts == {"fitted": 24, "held out": 10}
    # Untrained as they are, latents say less than the features that the heads were fitted to.
    assert results["segmentation_miou_mapped"].value < results["segmentation_miou_foundation"].value
    gap = 2
    for name, rows in (("held_out", 9), ("generated", 5)):
        sheet = Image.open(there / "downstream" / f"{name}.png", formats=("PNG",))
        assert sheet.size == (3 * (SIZE + gap) - gap, rows * (SIZE + gap) - gap)


def test_trimaps_are_cropped_as_pictures_are(tmp_path):
    """A picture that is its own trimap: what is bright is the pet."""
    trimap = np.full((40, 64), 2, np.uint8)
    trimap[10:30, 8:56], trimap[:, 32:36] = 1, 3
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "trimaps").mkdir()
    Image.fromarray(trimap).save(tmp_path / "trimaps" / "a_1.png")
    Image.fromarray(np.repeat((trimap == 1)[..., None] * np.uint8(255), 3, axis=2)).save(
        tmp_path / "images" / "cats" / "a_1.png"
    )
    data = open_dense(str(tmp_path / "images"), str(tmp_path / "trimaps"), 20, 5)
    bright = next(iter(data.pictures.batches(1)))[0, 0] > 127
    segments = data.segments[0]
    assert data.segment_names == ("pet", "background") and data.distances is None
    assert ((segments == 0) == bright).float().mean() > 0.97 and (segments == VOID).float().mean() == 0.1


def test_bad_input_ends_in_a_line(there, capsys):
    shutil.copytree("vae", "plain", dirs_exist_ok=True)
    config = yaml.safe_load(Path("vae/config.yaml").read_text())
    scenes = ["--train_data=scenes", "--data=scenes"]

    def line(*arguments):
        assert main(["downstream", *arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (mapper,) = Path("plain").rglob("mapper.safetensors")
    mapper.unlink()
    assert "has no alignment network" in line(f"--autoencoder={mapper.parent}", *scenes)
    save_file({"latent_norm.running_mean": torch.zeros(4)}, mapper)
    assert "plain was trained without alignment" in line(f"--autoencoder={mapper.parent}", *scenes)
    shutil.copytree("vae", "other", dirs_exist_ok=True)
    config["alignment"]["foundation"]["image_size"] = 32
    Path("other/config.yaml").write_text(yaml.safe_dump(config))
    assert "foundation model demo gives 4 x 4" in line("--autoencoder=other", *scenes)
    nowhere = ["--autoencoder=vae", "--train_data=vae", "--data=scenes"]
    assert line(*nowhere).startswith("error: ")
    assert "there is no trimap" in line("--autoencoder=vae", *scenes, "--trimaps=nowhere")
    shutil.copytree("vae", "elsewhere", dirs_exist_ok=True)
    (weights,) = Path("elsewhere").rglob("model.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    assert "trained on latents of" in line(f"--autoencoder={weights.parent}", *scenes, "--generator=sit")
