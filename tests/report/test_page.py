"""The page as a browser sees it: headless Chromium reads it, and nothing may come from outside."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import fake_runs
import numpy as np
import pytest
from fake_runs import result
from PIL import Image
from time_limits import HANG_S

from sendvae_fast.report import ReportData, Variant, build_report, load_report, write_report
from sendvae_fast.report.charts import MAX_POINTS, line_chart, thin
from sendvae_fast.report.page import MAX_PICTURE_WIDTH_PX, attribute_table, metric_table, png_data_uri

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Outline(HTMLParser):
    """Headings, pictures, tables, ids and everything that could make a browser fetch something."""

    def __init__(self, page):
        super().__init__()
        self.headings, self.images, self.ids, self.fetched, self.tags, self.cells = [], [], [], [], [], []
        self._open = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            if name in attributes:
                self.fetched.append(attributes[name])
        self._open = tag

    def handle_data(self, text):
        if self._open in ("h1", "h2", "h3"):
            self.headings.append(text)
        if self._open == "td":
            self.cells.append(text.strip())

    def handle_endtag(self, tag):
        self._open = None


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory):
    folder = fake_runs.write_comparison(tmp_path_factory.mktemp("page"))
    return write_report(folder / "report.html", load_report(folder))


@pytest.fixture
def in_chromium(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium binary found: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile"]

    def call(*arguments):
        return subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, timeout=HANG_S, check=True).stdout

    return call


def check_page(page):
    outline = Outline(page)
    assert outline.headings == [
        "Send-VAE demo",
        "What was seen",
        "The variants compared",
        "Reconstructions",
        "Generated pictures",
        "Attributes read off the latents",
        "Training curves",
        "Stage 1: autoencoder",
        "Stage 2: generator",
        "Throughput",
        "How to get the same again",
    ]
    assert outline.tags.count("table") == 3
    assert outline.tags.count("details") == 12
    assert outline.tags.count("svg") == 7 + 4 + 2
    assert len(outline.images) == 4 + 3
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in outline.images)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in outline.fetched)
    assert len(outline.ids) == len(set(outline.ids))
    assert "script" not in outline.tags and "link" not in outline.tags
    without_pictures = re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", without_pictures)
    for text in (
        "3 variants, 3 seeds each",
        "made up; 2,000 pictures",
        "higher in 0 of 3",
        "prefers-color-scheme: dark",
    ):
        assert text in page
    assert not re.search(
        r"\b(best|worse|wins|beats)\b", re.sub("<style>.*</style>", "", without_pictures, flags=re.DOTALL)
    )


def test_page_stands_alone(demo_page):
    check_page(demo_page.read_text())


def test_chromium_sees_the_whole_page(demo_page, in_chromium):
    dom = in_chromium("--dump-dom", demo_page.as_uri()).decode()
    check_page(dom)


def test_chromium_draws_it_light_and_dark(demo_page, in_chromium, tmp_path):
    backgrounds = []
    for scheme in (1, 0):  # Blink's numbers for light and dark
        shot = tmp_path / f"{scheme}.png"
        in_chromium(
            "--window-size=1000,800",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
            demo_page.as_uri(),
        )
        pixels = np.array(Image.open(shot).convert("RGB"))
        assert pixels.std() > 10  # something was drawn
        backgrounds.append(pixels[5, 5].mean())
    assert backgrounds[0] > 240 and backgrounds[1] < 30


def test_a_phone_need_not_scroll_sideways(demo_page, in_chromium, tmp_path):
    """Headless windows have a least width, so the page lies in a frame of a phone's width; it runs no script itself."""
    wrapper = tmp_path / "phone.html"
    escaped = demo_page.read_text().replace("&", "&amp;").replace('"', "&quot;")
    measure = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe onload="{measure}" style="width:360px;height:2000px;border:0" srcdoc="{escaped}"></iframe>'
    wrapper.write_text(frame)
    dom = in_chromium("--dump-dom", wrapper.as_uri()).decode()
    assert re.search(r"<title>(\d+)</title>", dom)[1] == "360"


def test_single_run_page(tmp_path):
    run = fake_runs.write_run(tmp_path / "my <vae>", "autoencoder", np.random.default_rng(0))
    page = build_report(load_report(run))
    outline = Outline(page)
    assert [heading for heading in outline.headings if "compared" in heading or "Attributes" in heading] == []
    assert {"Reconstructions", "Training curves", "Throughput"} <= set(outline.headings)
    assert "my &lt;vae&gt;" in page and "<vae>" not in page
    assert "global_batch: 16" in page and "deepspeed: 0.19.8" in page


def test_empty_report_is_a_page():
    assert Outline(build_report(ReportData(title="Nothing yet"))).headings == ["Nothing yet"]


def test_writing_leaves_only_the_page(tmp_path):
    path = write_report(tmp_path / "new" / "report.html", ReportData(title="T"))
    assert path.read_text().startswith("<!doctype html>")
    assert list(path.parent.iterdir()) == [path]


def variant(name, *seeds, **fields):
    results = [[result(metric, value, **fields) for metric, value in seed.items()] for seed in seeds]
    return Variant(name=name, seeds=results)


def test_cells_give_seeds_or_the_interval_of_one():
    rows = metric_table(
        [
            variant("a", {"psnr": 19.0, "fid": 90.0}, {"psnr": 19.004, "fid": 92.0}),
            variant("b", {"psnr": 18.0, "lpips_vgg": 0.3}, interval=(17.5, 18.5)),
        ]
    )
    cells = {f"{row.label} {row.direction}": [(cell.text, cell.spread) for cell in row.cells] for row in rows}
    assert cells == {
        "FID ↓": [("91.00", "[78.29, 103.71]"), ("not measured", "")],
        "PSNR, dB ↑": [("19.00", "[18.98, 19.03]"), ("18.00", "[17.50, 18.50], 1 of 2 seeds")],
        "LPIPS, vgg ↓": [("not measured", ""), ("0.300", "[17.500, 18.500]")],
    }


def test_differences_are_of_pairs_of_seeds():
    """1 and 3 of two seeds: 2, with Student's 12.71 standard errors of 1 on either side."""
    control = variant("control", {"fid": 50.0}, {"fid": 60.0})
    (row,) = metric_table([control, variant("a", {"fid": 51.0}, {"fid": 63.0})], control="control")
    assert [cell.difference for cell in row.cells] == ["", "+2.00 [-10.71,\N{NO-BREAK SPACE}+14.71]"]
    assert row.has_differences
    alone = [variant("control", {"fid": 50.0}), variant("a", {"fid": 51.0})]
    assert not metric_table(alone, control="control")[0].has_differences


def test_attributes_are_ordered_by_how_well_they_are_read():
    seed = {"attribute_f1": 0.0}
    table = attribute_table(
        [variant("a", seed, details={"f1": {"x": 0.2, "y": 0.6}}), variant("b", seed, details={"f1": {"x": 0.3}})]
    )
    assert list(table) == ["y", "x"] and [cell.text for cell in table["y"]] == ["0.600", "–"]


def test_pictures_keep_their_pixels():
    image = fake_runs.scenes(1, 32, np.random.default_rng(0))[0]
    data = base64.b64decode(png_data_uri(image).partition(",")[2])
    assert np.array_equal(np.array(Image.open(io.BytesIO(data))), image)
    wide = np.zeros((10, 2 * MAX_PICTURE_WIDTH_PX, 3), dtype=np.uint8)
    shown = Image.open(io.BytesIO(base64.b64decode(png_data_uri(wide).partition(",")[2])))
    assert shown.size == (MAX_PICTURE_WIDTH_PX, 5)


def test_charts_take_colours_and_font_from_the_page():
    steps = np.arange(1, 5000)
    svg = line_chart({"a": (steps, 1 / steps), "b": (steps[:1], np.array([0.5]))}, {"a": 0, "b": 3}, "id0", "a &amp; b")
    assert "var(--series-0)" in svg and "var(--series-3)" in svg and 'aria-label="a &amp; b"' in svg
    assert "#0" not in re.sub(r'(url\(|href=")#', "", svg) and "font:" not in svg and "DejaVu" not in svg
    assert re.search(r"<svg[^>]*viewBox", svg) and not re.search(r'<svg[^>]*\swidth="', svg)


def test_thinning_keeps_the_mean_and_the_order():
    steps, values = np.arange(10_000), np.random.default_rng(0).normal(size=10_000)
    thin_steps, thin_values = thin(steps, values)
    assert len(thin_steps) == MAX_POINTS and (np.diff(thin_steps) > 0).all()
    assert abs(thin_values.mean() - values.mean()) < 1e-3
    assert thin(steps[:9], values[:9])[0] is not None and len(thin(steps[:9], values[:9])[0]) == 9
