"""What there is to see of a latent space, and its numbers: against plain arithmetic in float64."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_info, threadpool_limits

from sendvae_fast.cli.main import main
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.latent_space.clusters import clusters, has_clusters, spread_over_classes
from sendvae_fast.evaluation.latent_space.patches import (
    agreement,
    cell_at,
    chosen_points,
    drawn_maps,
    maps_of,
    marked,
    similarities,
)
from sendvae_fast.evaluation.latent_space.view import VIEW_FILE, LatentView, read_view, write_view
from sendvae_fast.evaluation.latent_views import sights_of
from sendvae_fast.evaluation.result import read_results


def cells_of(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_cosines(cells):
    """[n, N, N] by loops over pairs."""
    vectors = cells.double().flatten(2).numpy()
    n, _, num = vectors.shape
    found = np.empty((n, num, num))
    for picture in range(n):
        for i in range(num):
            for j in range(num):
                a, b = vectors[picture, :, i], vectors[picture, :, j]
                found[picture, i, j] = sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5
    return found


def test_similarities_and_maps_are_cosines():
    cells = cells_of(0, 3, 5, 2, 4)
    expected = plain_cosines(cells)
    np.testing.assert_allclose(similarities(cells), expected, atol=1e-6)
    points = torch.tensor([[0.1, 0.1], [0.6, 0.3], [0.99, 0.99]], dtype=torch.float64)
    chosen = [0, 1 * 4 + 1, 7]  # rows of two, columns of four
    expected = np.stack([expected[n, cell].reshape(2, 4) for n, cell in enumerate(chosen)])
    np.testing.assert_allclose(maps_of(cells, points), expected, atol=1e-6)
    assert torch.equal(torch.stack(cell_at(points, 2, 4)), torch.tensor([[0, 1, 1], [0, 1, 3]]))


def test_agreement_is_spearmans_over_pairs_of_different_patches():
    ours, theirs = cells_of(1, 4, 6, 4, 4), cells_of(2, 4, 9, 4, 4)
    theirs[0] = F.pad(2 * ours[0], (0, 0, 0, 0, 0, 3))  # the same directions
    above = np.triu_indices(16, k=1)
    pairs = [(a[above], b[above]) for a, b in zip(plain_cosines(ours), plain_cosines(theirs), strict=True)]
    expected = [spearmanr(*pair).statistic for pair in pairs]
    np.testing.assert_allclose(agreement(ours, theirs), expected, atol=1e-12)
    assert expected[0] == pytest.approx(1) and max(map(abs, expected[1:])) < 0.4
    same = torch.ones(1, 3, 4, 4)
    assert agreement(same, theirs[:1]).tolist() == [0]


def test_the_finer_of_two_grids_is_averaged_onto_the_coarser():
    fine, coarse = cells_of(3, 2, 6, 8, 8), cells_of(4, 2, 5, 4, 4)
    means = fine.double().reshape(2, 6, 4, 2, 4, 2).mean(dim=(3, 5))
    expected = agreement(means, coarse)
    torch.testing.assert_close(agreement(fine, coarse), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(agreement(coarse, fine), expected, rtol=0, atol=1e-12)


def plain_silhouette(vectors, labels):
    """Rousseeuw's, by its definition."""
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    found = []
    for i, own in enumerate(labels):
        same = labels == own
        a = distance[i, same].sum() / (same.sum() - 1)
        b = min(distance[i, labels == other].mean() for other in set(labels.tolist()) - {own})
        found.append((b - a) / max(a, b))
    return np.array(found)


def test_classes_that_are_apart_have_a_silhouette_near_one_and_shuffled_ones_near_nothing():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    latents = 5 * rng.normal(size=(3, 4, 2, 2))[labels] + 0.1 * rng.normal(size=(60, 4, 2, 2))
    apart = clusters(latents, labels)
    assert apart.points.shape == (60, 2) and np.isfinite(apart.points).all()
    np.testing.assert_allclose(apart.silhouette, plain_silhouette(latents.reshape(60, -1), labels), atol=1e-5)
    assert apart.silhouette.min() > 0.9
    centres = np.stack([apart.points[labels == label].mean(axis=0) for label in range(3)])
    nearest = np.linalg.norm(apart.points[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == labels).all()  # the plane has the classes, too
    shuffled = clusters(latents, rng.permutation(labels))
    assert abs(shuffled.silhouette.mean()) < 0.1


def test_the_plane_does_not_depend_on_the_number_of_threads(monkeypatch):
    """The sums of t-SNE's gradient come out otherwise on two."""
    threads = []

    def fit_transform(self, vectors):
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return vectors[:, :2]

    monkeypatch.setattr(TSNE, "fit_transform", fit_transform)
    with threadpool_limits(2):
        clusters(np.random.default_rng(0).normal(size=(6, 4)), np.array([0, 0, 0, 1, 1, 1]))
    assert threads and set(threads) == {1}


def test_pictures_are_of_classes_all_over_the_list():
    labels = np.repeat(np.arange(24), 5)
    ids = spread_over_classes(labels, num_pictures=17, num_classes=4)
    assert np.unique(labels[ids]).tolist() == [0, 8, 15, 23] and np.bincount(labels[ids]).max() == 4 == len(ids) / 4
    assert spread_over_classes(labels[:7], 500, 10).tolist() == list(range(7))
    assert spread_over_classes(labels, 2, 24).tolist() == list(range(0, 120, 5))  # one of each at least
    assert has_clusters(labels[:7])
    assert not has_clusters(labels[:5]) and not has_clusters(labels[::5])


def test_what_cannot_be_seen_is_left_out():
    assert sights_of(np.array([0, 0, 1]), (32, 4, 4)) == {"clusters", "patches"}
    assert sights_of(np.array([0, 0, 0]), (32, 4, 4)) == {"patches"}
    assert sights_of(np.array([0, 0, 1]), (32, 1, 128)) == sights_of(np.array([0, 0, 1]), (32, 1, 1)) == {"clusters"}


def test_what_pictures_of_one_class_do_not_allow_is_left_out_and_said(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    arguments = [f"--train_data={tmp_path}", f"--data={tmp_path}", "--image_size=32", f"--out={tmp_path / 'out.jsonl'}"]
    verb = ["evaluate", "latents", "--autoencoder=demo", *arguments]
    assert main([*verb, "--measures=[classes,clusters,spectrum]"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"classes is left out: the pictures in {tmp_path} are of one class",
        f"clusters is left out: it needs pictures of two classes, several of one, and those in {tmp_path} are not",
    ]
    assert [result.metric for result in read_results(tmp_path / "out.jsonl")] == ["latent_high_frequency"]
    assert main([*verb, "--measures=[clusters]"]) == 2
    assert "clusters cannot be measured: it needs pictures of two classes" in capsys.readouterr().err


def test_one_looks_from_the_cell_that_stands_out():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, 1, 8:12, 20:24] = 255
    images[1] = 255
    images[1, :, 28:, :4] = 0
    points = chosen_points(images)
    assert points.tolist() == [[2.5 / 8, 5.5 / 8], [7.5 / 8, 0.5 / 8]]
    tiles = marked(images, points)
    assert tiles.shape == (2, 3, 128, 128) and tiles[0, :, 40, 88].tolist() == [0, 255, 0]
    red = (tiles == torch.tensor((255, 60, 60), dtype=torch.uint8)[:, None, None]).all(dim=1)
    assert red.any(dim=2)[0].nonzero().flatten()[[0, -1]].tolist() == [32, 47]  # pixels 8 to 12, four times as large


def test_a_map_is_bright_where_patches_are_alike():
    points = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    tiles = drawn_maps(torch.tensor([[[0.0, 1.0], [0.5, -0.5]]]), points, size=64)
    assert tiles.shape == (1, 3, 128, 128)
    inside = tiles[0, :, 32::64, 32::64].sum(dim=0)  # the middles of the cells
    assert inside[0, 1] > inside[1, 0] > inside[0, 0] > inside[1, 1]
    assert tiles[0, :, 0, 64].tolist() == [255, 60, 60] != tiles[0, :, 0, 63].tolist()
    constant = drawn_maps(torch.ones(1, 2, 2), points, size=64)
    assert torch.equal(constant[0, :, 32, 32], constant[0, :, 96, 96])


@pytest.fixture
def view():
    sheets = {name: np.full((4, 3, 3), number, np.uint8) for number, name in enumerate(("pictures", "latents"))}
    classes = {"cat": np.array([[0.5, -1.25]]), "d\udce9g": np.zeros((2, 2))}
    return LatentView(classes=classes, numbers={"class_silhouette": 0.25}, sheets=sheets)


def test_a_view_is_read_as_it_was_written(view, tmp_path):
    assert read_view(tmp_path) is None
    write_view(
        tmp_path / "a", LatentView(foundation="demo", sheets=dict(view.sheets, foundation=view.sheets["latents"]))
    )
    write_view(tmp_path / "a", view)  # in place of another, whose further sheet no longer counts
    found = read_view(tmp_path / "a")
    assert found.classes.keys() == view.classes.keys() and found.numbers == view.numbers and found.foundation == ""
    for name, points in view.classes.items():
        np.testing.assert_array_equal(found.classes[name], points)
    assert found.sheets.keys() == view.sheets.keys()
    for name, sheet in view.sheets.items():
        np.testing.assert_array_equal(found.sheets[name], sheet)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": [{"name": "a", "points": [[1, float("nan")]]}]},
        {"classes": [{"name": "a", "points": [1, 2]}]},
        {"classes": [{"name": "a"}]},
        {"classes": [{"name": "a", "points": [["x", "y"]]}]},
        {"numbers": {"a": "1"}},
        {"numbers": [1]},
        {"sheets": ["pictures", "foundation"]},
        {"sheets": 3},
    ],
)
def test_a_damaged_view_is_one_line(view, tmp_path, change):
    write_view(tmp_path, view)
    content = json.loads((tmp_path / VIEW_FILE).read_text())
    (tmp_path / VIEW_FILE).write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=str(tmp_path)):
        read_view(tmp_path)
