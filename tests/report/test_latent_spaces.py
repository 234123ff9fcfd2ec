"""Latent spaces on the page: each in a column of its own, a picture or a class shown once."""

import re

import numpy as np
import pytest

from sendvae_fast.evaluation.latent_space.view import LatentView
from sendvae_fast.report import ReportData, build_report
from sendvae_fast.report.latent_spaces import latent_section
from sendvae_fast.report.scatter import MARGIN, SIDE, mark_svg, scatter_svg

POINTS = np.array([[0.0, 0.0], [10.0, 5.0]])


def sheet(value):
    return np.full((4, 3, 3), value, np.uint8)


def view(pictures=1, foundation="dino", classes=("cat", "dog_x")):
    numbers = {"class_silhouette": 0.25, f"patch_similarity_{foundation}": 0.5}
    sheets = {"pictures": sheet(pictures), "latents": sheet(7)} | ({"foundation": sheet(9)} if foundation else {})
    return LatentView(
        classes={name: POINTS + index for index, name in enumerate(classes)},
        numbers=numbers,
        foundation=foundation,
        sheets=sheets,
    )


def places(svg):
    return np.array([[float(number) for number in pair] for pair in re.findall(r"M([\d.]+) ([\d.]+)", svg)])


def test_points_keep_their_proportions_and_stay_inside():
    drawn = places(scatter_svg([POINTS, np.array([[4.0, 20.0]])], "x"))
    scale = (SIDE - 2 * MARGIN) / 20
    expected = (np.array([[0, 0], [10, 5], [4, 20]]) - [5, 10]) * scale + SIDE / 2
    np.testing.assert_allclose(drawn, expected, atol=0.06)
    np.testing.assert_allclose(places(scatter_svg([POINTS[:1]], "x")), [[SIDE / 2, SIDE / 2]])


def test_twelve_classes_have_marks_of_their_own():
    assert len({mark_svg(index) for index in range(12)}) == 12


def test_views_of_the_same_pictures_stand_side_by_side():
    section = latent_section([("A", view()), ("B", view()), ("C", view(pictures=2, foundation=""))])
    assert [[picture.title for picture in columns] for columns in section.columns] == [
        ["Pictures", "dino", "A", "B"],
        ["Pictures", "C"],
    ]
    assert [picture.caption for picture in section.columns[0][2:]] == ["Spearman 0.500"] * 2
    (plane,) = section.planes
    assert [name for _, name in plane.legend] == ["cat", "dog_x"]
    assert [(plot.title, plot.number) for plot in plane.plots] == [(name, "silhouette 0.250") for name in "ABC"]
    assert len(latent_section([("A", view()), ("B", view(classes=("bird",)))]).planes) == 2


@pytest.mark.parametrize("views", [[], [("A", LatentView())]])
def test_without_anything_to_see_there_is_no_section(views):
    assert latent_section(views) is None
    assert 'id="latent-space"' not in build_report(ReportData(title="T", latent_views=views))


def test_the_page_has_a_plot_and_a_column_of_each():
    page = build_report(ReportData(title="T", latent_views=[("A", view()), ("B", view(foundation=""))]))
    section = page[page.index('<section id="latent-space">') :]
    assert "The latent spaces" in section and "dog x" in section and section.count("<img") == 3 + 2
    assert section.count('<svg role="img"') == 2 and section.count('<svg class="point"') == 2
    identities = re.findall(r' id="([^"]+)"', page)
    assert len(identities) == len(set(identities))
    assert all(link in identities for link in re.findall(r'href="#(picture[^"]+)"', page))
