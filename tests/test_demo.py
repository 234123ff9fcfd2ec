"""The demo, smaller still: every part runs, a second call trains nothing, and photographs are split and linked."""

import json

import numpy as np
import pytest
from PIL import Image

from sendvae_fast.cli.main import main
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.demo.demo import split_photographs
from sendvae_fast.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

SMALL = [
    "--num_train_images=48",
    "--num_test_images=48",
    "--vae_steps=2",
    "--finetune_steps=2",
    "--generator_steps=2",
    "--generate.num_samples=6",
    "--generate.sampler.num_steps=2",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", f"--run={root}", *SMALL, "--debug"]) == 0
    return root


def test_the_results_compare_three_autoencoders(demo):
    results = json.loads((demo / "results.json").read_text())
    assert [entry["name"] for entry in results["variants"]] == ["Plain VAE", "Control", "Send-VAE"]
    for entry in results["variants"]:
        assert entry["metrics"].keys() == {"rfid", "psnr", "ssim", "lpips", "attribute_f1", "gfid"}
        assert len(entry["attribute_f1"]) >= 12 and entry["metrics"]["lpips"] is None
        assert (demo / entry["samples"]).is_file() and (demo / entry["reconstructions"]).is_file()


def test_the_report_is_one_page_with_everything(demo):
    page = (demo / "report.html").read_text()
    for words in ("Plain VAE", "Control", "Send-VAE", "Attribute F1", "PSNR", "weights not given"):
        assert words in page, words
    assert "http://" not in page.replace("http://www.w3.org", "") and page.count("<img") >= 7


def test_only_the_aligned_run_aligns(demo):
    aligned = {
        key: "align" in (demo / key / "vae" / "metrics.jsonl").read_text() for key in ("plain", "control", "send")
    }
    assert aligned == {"plain": False, "control": False, "send": True}


def test_a_second_call_trains_nothing(demo):
    logs = {path: path.read_text() for path in demo.rglob("metrics.jsonl")}
    assert len(logs) == 6
    assert main(["demo", f"--run={demo}", *SMALL]) == 0
    assert logs == {path: path.read_text() for path in demo.rglob("metrics.jsonl")}


def test_other_settings_in_the_same_folder_are_refused(demo, capsys):
    assert main(["demo", f"--run={demo}", *SMALL, "--seed=5"]) == 2
    assert "seed was 0, now 5" in capsys.readouterr().err


def photographs(root, per_class):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name} {number}.JPEG")
    return Catalog.open(root)


def test_photographs_are_split_by_catalogs(tmp_path):
    catalog = photographs(tmp_path / "photos", per_class=10)
    split_photographs(catalog, tmp_path / "train.parquet", tmp_path / "test.parquet")
    train, test = (Catalog.open(tmp_path / name) for name in ("train.parquet", "test.parquet"))
    assert (len(train), len(test)) == (16, 4) and train.class_names == test.class_names == ("cat", "dog")
    assert sorted(train.names + test.names) == sorted(catalog.names) and np.bincount(test.labels).tolist() == [2, 2]


def test_photographs_go_through_the_whole_demo(tmp_path):
    photographs(tmp_path / "photos", per_class=30)
    root = tmp_path / "run"
    assert main(["demo", f"--run={root}", f"--data={tmp_path / 'photos'}", *SMALL, "--debug"]) == 0
    metrics = [entry["metrics"] for entry in json.loads((root / "results.json").read_text())["variants"]]
    assert all(entry["gfid"] > 0 and "attribute_f1" not in entry for entry in metrics)
    assert "photographs from" in (root / "report.html").read_text()


def test_too_few_photographs_are_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="too few pictures"):
        split_photographs(photographs(tmp_path / "photos", per_class=3), tmp_path / "train", tmp_path / "test")
