"""A page made of a stranger's run shows its words and obeys none of them."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.latent_space.view import LatentView, write_view
from sendvae_fast.evaluation.result import PicturesOrigin, Result, WeightsOrigin, append_results
from sendvae_fast.report.load import load_report
from sendvae_fast.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACKS = (
    "<script>document.documentElement.dataset.owned=1</script>",
    '"><img src=x onerror="document.documentElement.dataset.owned=1">',
    "'-alert(1)-'</title></style><svg onload=document.documentElement.dataset.owned=1>",
    '\\g<0>"#</svg><iframe srcdoc="<script>parent.document.documentElement.dataset.owned=1</script>">',
    "{{ 7 * 7 }}{% raw %}",
)


def hostile(tree):
    """`tree` with an attack in front of every key and in place of every text."""
    if isinstance(tree, dict):
        return {f"{ATTACKS[index % 5]}{key}": hostile(value) for index, (key, value) in enumerate(tree.items())}
    if isinstance(tree, list):
        return [hostile(value) for value in tree]
    return f"{ATTACKS[len(tree) % 5]}{tree}" if isinstance(tree, str) else tree


@pytest.fixture
def folder(tmp_path):
    """A run and a comparison in which every text is an attack."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    logged = [{"step": step, "loss": 1 / step} | dict.fromkeys(ATTACKS, step) for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    (run / "config.yaml").write_text(yaml.safe_dump(hostile({"data": {"root": "x"}, "list": ["a", "bb"]})))
    (run / "environment.json").write_text(json.dumps(hostile({"platform": "x", "gpus": ["a"]})))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(run / "samples" / "samples_00000001.png")
    results = [
        Result(
            metric=attack,
            value=1.0,
            protocol=attack,
            interval=(0.0, 2.0),
            counts={attack: 3},
            remarks=(attack,),
            weights={attack: WeightsOrigin(path=attack, sha256=attack, step=3)},
            pictures={attack: PicturesOrigin(path=attack, num_pictures=1, image_size=1, sha256=attack, hash_of=attack)},
            details={"f1": {attack: 0.5}},
            while_training=index % 2 == 0,
        )
        for index, attack in enumerate(ATTACKS)
    ]
    append_results(run / "evaluation.jsonl", results)
    view = LatentView(
        classes={attack: np.full((2, 2), number) for number, attack in enumerate(ATTACKS)},
        numbers=dict.fromkeys(ATTACKS, 0.5),
        foundation=ATTACKS[0],
        sheets={name: np.zeros((4, 4, 3), np.uint8) for name in ("pictures", "foundation", "latents")},
    )
    write_view(run / "latent_space", view)
    of_run = {"runs": ["run"], "evaluations": ["run/evaluation.jsonl"], "latent_space": "run/latent_space"}
    variants = [{"name": attack, "description": attack} | of_run for attack in ATTACKS]
    progress = {
        "written": ATTACKS[0],
        "ready": ATTACKS[1],
        "parts": [{"name": a, "state": a, "when": a} for a in ATTACKS],
    }
    compared = {"title": ATTACKS[0], "subtitle": ATTACKS[1], "candidate": ATTACKS[0], "control": ATTACKS[1]}
    compared |= {"variants": variants, "notes": list(ATTACKS), "progress": progress}
    (tmp_path / "results.json").write_text(json.dumps(compared))
    return tmp_path


class Obeyed(HTMLParser):
    """Everything in a page that a browser would run or fetch."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag in {"script", "iframe", "object", "embed", "base", "link", "form"}:
            self.found.append(tag)
        self.found += [name for name, _ in attributes if name.startswith("on")]
        links = [value or "" for name, value in attributes if name in {"src", "href", "srcdoc", "action", "xlink:href"}]
        self.found += [link for link in links if not link.startswith(("#", "data:image/png;base64,"))]


@pytest.mark.parametrize(
    "what", [["run"], ["run", ATTACKS[0].replace("/", "")], ["."]], ids=["run", "runs", "comparison"]
)
def test_no_word_of_a_run_is_obeyed(folder, what, tmp_path):
    if len(what) > 1:
        shutil.copytree(folder / "run", folder / what[1])
        (folder / what[1] / "config.yaml").write_text(yaml.safe_dump(hostile({"data": {"root": "y"}, "seed": "x"})))
    page = write_report(folder / "report.html", load_report(*(folder / name for name in what)))
    assert Obeyed(page.read_text()).found == []
    assert "document.documentElement.dataset.owned" in page.read_text(), "the words themselves are shown"
    assert 'id="latent-space"' in page.read_text()
    if CHROMIUM is None:
        pytest.skip("no chromium binary found: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [CHROMIUM, *flags, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, timeout=300, check=True, text=True).stdout
    assert "</html>" in dom and "data-owned" not in dom[: dom.index(">", dom.index("<html"))]


@pytest.mark.parametrize("outside", ["../secret.png", "/etc/hostname"])
def test_a_page_shows_only_what_lies_in_its_folder(folder, outside, tmp_path_factory):
    results = json.loads((folder / "results.json").read_text()) | {"originals": outside}
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="outside of its folder"):
        load_report(folder)


def test_nor_does_it_follow_a_link_out_of_its_folder(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    (folder / "run" / "latent_space" / "latents.png").rename(secret)
    (folder / "run" / "latent_space" / "latents.png").symlink_to(secret)
    with pytest.raises(UserError, match=r"latents\.png, which is outside of its folder"):
        load_report(folder)
