"""The documentation's site builds without a warning, holds what the package exports, and needs no network."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import typing
from html import unescape
from pathlib import Path

import pytest

import sendvae_fast.ops
from sendvae_fast.evaluation.settings import GenerationConfig
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
JOINED = re.compile(r"<b><code>(\w+, \w+[^<]*)</code>")
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install -r requirements-docs.txt"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site. Strict: any warning, such as a link to nowhere, fails the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder],
        check=False, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder


def test_links_between_the_pages_lead_somewhere():
    """Without MkDocs: relative links of the Markdown files, as GitHub follows them."""
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.md"))
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken


@needs_mkdocs
def test_the_reference_has_every_export(site):
    page = (site / "reference/sendvae_fast.ops.html").read_text()
    headings = re.findall(r"<h2 [^>]*doc-heading.*?</h2>", page, flags=re.DOTALL)
    named = {name for heading in headings for name in re.findall(r"sendvae_fast\.ops\.(\w+)\s*<a", heading)}
    assert named == set(sendvae_fast.ops.__all__)


@needs_mkdocs
def test_docstrings_are_read_as_sections(site):
    """A section that the reader of docstrings missed shows as a paragraph that starts with its title."""
    missed = [
        f"{page.name}: {found}"
        for page in site.glob("reference/*.html")
        for found in re.findall(r"<p>(?:Args|Returns|Raises|Yields):.{0,60}", page.read_text(), flags=re.DOTALL)
    ]
    assert not missed
    # Two parameters of one line have neither type nor anchor.
    joined = [found for page in site.glob("reference/*.html") for found in JOINED.findall(page.read_text())]
    assert not joined
    assert "Raises:" in (site / "reference/sendvae_fast.data.html").read_text()


def option_keys(config, prefix=""):
    for name, kind in typing.get_type_hints(config).items():
        nested = next((one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)), None)
        if name in {field.name for field in dataclasses.fields(config)}:
            yield from [f"{prefix}{name}"] if nested is None else option_keys(nested, f"{prefix}{name}.")


@needs_mkdocs
@pytest.mark.parametrize(
    "verb, config",
    [("train vae", VAETrainConfig), ("train sit", SiTTrainConfig), ("evaluate generation", GenerationConfig)],
)
def test_every_option_is_listed_with_its_docstring(site, verb, config):
    page = (site / "reference/options.html").read_text()
    section = re.search(rf'<h2 id="[^"]*">sendvae {verb}<.*?(?=<h2 |\Z)', page, flags=re.DOTALL)[0]
    entries = re.findall(r"<dt><code>--([\w.]+)(?:=[^<]*)?</code>.*?</dt>\s*<dd>(.*?)</dd>", section, flags=re.DOTALL)
    assert [key for key, _ in entries] == [*dict.fromkeys(key for key, _ in entries)]
    assert {key for key, _ in entries} == set(option_keys(config))
    assert all(len(unescape(text)) > 5 for _, text in entries)


@needs_mkdocs
def test_nothing_is_fetched(site):
    fetched = []
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched += re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(https?://[^\" >]+)", text)
    assert not fetched


@needs_mkdocs
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary found: apt-get install chromium")
def test_the_search_finds_a_function_in_a_page_opened_as_a_file(site, tmp_path):
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=20000",
    ]
    url = (site / "index.html").as_uri() + "?q=noise_inject"
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    )
    results = re.findall(r'<a href="([^"]+)" class="md-search-result__link"', done.stdout)
    assert any("reference/sendvae_fast.ops.html" in result for result in results)
