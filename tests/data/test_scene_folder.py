from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.scenes.scene import ATTRIBUTES, CLASS_NAMES, SHAPES, draw_scene, oklch_to_srgb, render_scene
from sendvae_fast.data.scenes.scene_folder import render_scenes, scene_path, synth_scenes
from sendvae_fast.data.scenes.sdf import distance
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.probing.attribute_probe import Labelled, probe_attributes
from sendvae_fast.evaluation.probing.rows import Rows

pytestmark = pytest.mark.slow


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_folder_is_a_catalog_with_attributes(tmp_path):
    synth_scenes(tmp_path / "s", 30, size=32, seed=3)
    catalog = Catalog.open(tmp_path / "s")
    assert len(catalog) == 30 and catalog.class_names == tuple(sorted(CLASS_NAMES))
    assert catalog.attributes.names == ATTRIBUTES and len(ATTRIBUTES) >= 12
    for scene_id in range(30):
        scene = draw_scene(3, scene_id)
        row = catalog.names.index(scene_path(scene_id))
        assert catalog.class_names[catalog.labels[row]] == CLASS_NAMES[scene.label] == f"{scene.shape}_{scene.texture}"
        assert dict(zip(ATTRIBUTES, catalog.attributes.values[row].tolist(), strict=True)) == scene.attributes
        with Image.open(catalog.locate(row)) as image:
            assert image.format == "JPEG" and image.size == (32, 32)
            error = np.asarray(image, np.float64) - render_scene(scene, 32)
        assert np.sqrt((error**2).mean()) < 8  # JPEG at quality 92


def test_files_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("sendvae_fast.data.scenes.scene_folder.IN_PROCESS_LIMIT", 0)
    monkeypatch.setattr("sendvae_fast.data.scenes.scene_folder.CHUNK", 5)
    synth_scenes(tmp_path / "one", 26, size=16, num_workers=1)
    synth_scenes(tmp_path / "two", 26, size=16, num_workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_scene_depends_on_seed_and_id_only(tmp_path):
    synth_scenes(tmp_path / "few", 10, size=16)
    synth_scenes(tmp_path / "more", 20, size=16)
    synth_scenes(tmp_path / "other", 10, size=16, seed=1)
    few, more, other = (files(tmp_path / name) for name in ("few", "more", "other"))
    pictures = [name for name in few if name.endswith(".jpg")]
    assert len(pictures) == 10
    assert all(few[name] == more[name] for name in pictures)
    assert not any(few[name] == other[name] for name in pictures)


def test_a_second_call_does_nothing_and_an_interrupted_one_goes_on(tmp_path, capsys):
    root = tmp_path / "s"
    synth_scenes(root, 12, size=16)
    before = files(root)
    capsys.readouterr()
    synth_scenes(root, 12, size=16)
    assert "all 12 pictures are already in" in capsys.readouterr().err
    (root / "attributes.csv").unlink()
    (root / scene_path(7)).unlink()
    untouched = (root / scene_path(3)).stat().st_mtime_ns
    synth_scenes(root, 12, size=16)
    assert files(root) == before and (root / scene_path(3)).stat().st_mtime_ns == untouched


def test_errors(tmp_path):
    synth_scenes(tmp_path / "s", 4, size=16)
    with pytest.raises(UserError, match="holds scenes made with .*'num_images': 4.* not .*'num_images': 5"):
        synth_scenes(tmp_path / "s", 5, size=16)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and was not made by this command"):
        synth_scenes(tmp_path / "other", 4)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        synth_scenes(tmp_path / "other" / "thesis.tex", 4)
    (tmp_path / "s" / "scenes.json").write_text("{")
    with pytest.raises(UserError, match="scenes.json is damaged, or no file of its kind .*: remove the folder"):
        synth_scenes(tmp_path / "s", 4, size=16)
    for arguments in ({"num_images": 0}, {"num_images": 1, "size": 4}, {"num_images": 1, "seed": -1}):
        with pytest.raises(UserError, match="at least"):
            synth_scenes(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_attributes_are_balanced_and_mostly_independent_of_the_class():
    scenes = [draw_scene(0, i) for i in range(2400)]
    values = np.array([list(scene.attributes.values()) for scene in scenes], float)
    assert list(scenes[0].attributes) == list(ATTRIBUTES)
    assert ((values.mean(0) > 0.15) & (values.mean(0) < 0.85)).all()
    labels = np.array([scene.label for scene in scenes])
    assert np.bincount(labels).tolist() == [100] * len(CLASS_NAMES)
    rates = np.stack([values[labels == label].mean(0) for label in range(len(CLASS_NAMES))])
    free = [name not in ("curved", "pointed", "lobed", "striped", "dotted") for name in ATTRIBUTES]
    assert np.abs(rates[:, free] - 0.5).max() < 0.2  # 4 standard deviations of 100 fair draws


def test_attributes_are_what_the_scene_shows():
    for scene_id in range(240):
        scene = draw_scene(5, scene_id)
        x, y = scene.centre
        assert scene.attributes["left"] == (x < 0.5) and scene.attributes["upper"] == (y < 0.5)
        assert scene.attributes["large"] == (scene.radius > 0.275)
        assert scene.attributes["contrasting"] == (abs(scene.colour[0] - scene.background[0]) > 0.28)
        assert scene.attributes["lit_from_left"] == (np.cos(scene.light_angle) < 0)
        assert scene.attributes["matching"] == (np.cos(scene.colour[2] - scene.background[2]) > 0)


def test_pixels_do_not_give_the_attributes_away_linearly():
    """Linear probes on 8 x 8 pixels stay near what guessing gets (0.5 for the balanced ones), the position aside."""
    images, _, attributes = render_scenes(range(1600), size=32, seed=3)
    pixels = torch.from_numpy(images).float().unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(1)
    values = torch.from_numpy(attributes).float()
    train, test = (Labelled(Rows(pixels[part]), values[part]) for part in (slice(1200), slice(1200, None)))
    f1 = probe_attributes(train, test, test, ATTRIBUTES).at_half.each
    assert max(f1) < 0.75, dict(zip(ATTRIBUTES, f1, strict=True))


@pytest.mark.parametrize("size", [32, 64, 96])
def test_the_object_is_where_the_scene_says(size):
    """Pixels that change with the object's colours, and only with them, lie within its radius."""
    for scene_id in range(24):
        scene = replace(draw_scene(1, scene_id), details_seed=9)
        scene.attributes.update(shadowed=False)
        other = replace(scene, colour=(0.9, 0.0, 0.0), colour_2=(0.2, 0.0, 0.0))
        rows, columns = np.nonzero((render_scene(scene, size) != render_scene(other, size)).any(-1))
        away = np.hypot((columns + 0.5) / size - scene.centre[0], (rows + 0.5) / size - scene.centre[1])
        assert len(rows) and away.max() < 1.2 * scene.radius + 1.5 / size


def test_colours():
    assert np.allclose(oklch_to_srgb(1.0, 0.0, 0.0), 1.0, atol=1e-3)
    assert np.allclose(oklch_to_srgb(0.0, 0.0, 0.0), 0.0)
    # OKLCH of pure sRGB red and blue, from the publication's reference implementation.
    assert np.allclose(oklch_to_srgb(0.627955, 0.257683, np.radians(29.2339)), (1, 0, 0), atol=2e-3)
    assert np.allclose(oklch_to_srgb(0.452014, 0.313214, np.radians(264.0520)), (0, 0, 1), atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_fields(shape):
    """Right in sign at the middle and far out, and close to a distance (slope 1) about the outline."""
    steps = np.linspace(-1.6, 1.6, 321, dtype=np.float32)
    v, u = np.meshgrid(steps, steps, indexing="ij")
    field = distance(shape, u, v)
    assert field.dtype == np.float32
    assert (field[160, 160] < 0) == (shape != "ring")
    radius = np.hypot(u, v)
    assert (field[radius > 1.15] > 0).all() and (field[np.abs(radius - 0.45) < 0.03] < 0).all()
    slope_v, slope_u = np.gradient(field, steps[1] - steps[0])
    slope = np.hypot(slope_u, slope_v)[np.abs(field) < 0.05]
    # The flower's, a bound, is the farthest off. Differences across a corner come out small, hence the median.
    assert np.median(slope) > 0.8 and slope.max() < 1.65


def test_render_scenes_in_memory():
    images, labels, attributes = render_scenes(range(5), size=16, seed=2)
    assert images.shape == (5, 3, 16, 16) and images.dtype == np.uint8
    for i in range(5):
        scene = draw_scene(2, i)
        assert np.array_equal(images[i].transpose(1, 2, 0), render_scene(scene, 16)) and labels[i] == scene.label
        assert dict(zip(ATTRIBUTES, attributes[i].tolist(), strict=True)) == scene.attributes
