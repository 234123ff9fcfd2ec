"""The demo, smaller still: every part runs, a second call trains nothing, and photographs are split and linked."""

import json
import shutil
import time
from contextlib import nullcontext

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from process_state import is_running

from sendvae_fast.cli.main import main
from sendvae_fast.compare import compare, timeline
from sendvae_fast.compare.compare import claim_folder
from sendvae_fast.compare.pictures import split_photographs
from sendvae_fast.compare.results import Results
from sendvae_fast.compare.timeline import Speed, Timeline, costs, finish_times, in_words, measure_speed
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.demo.demo import comparison_of
from sendvae_fast.demo.settings import DemoConfig
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.latent_space.view import read_view
from sendvae_fast.evaluation.result import read_results

pytestmark = pytest.mark.slow

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
        measured = {result.metric: result for file in entry["evaluations"] for result in read_results(demo / file)}
        assert {"rfrechet_judge", "psnr", "ssim", "attribute_f1", "frechet_judge", "precision_judge"} <= set(measured)
        assert len(measured["attribute_f1"].details["f1"]) >= 12 and measured["frechet_judge"].counts["samples"] == 6
        assert -1 <= measured["class_silhouette"].value <= 1 and measured["class_silhouette"].counts["pictures"] == 20
        assert -1 <= measured["patch_similarity_demo"].value <= 1
        view = read_view(demo / entry["latent_space"])
        assert sum(map(len, view.classes.values())) == 20 and set(view.sheets) == {"pictures", "foundation", "latents"}
        assert (demo / entry["samples"]).is_file() and (demo / entry["reconstructions"]).is_file()


def test_the_report_is_one_page_with_everything(demo):
    page = (demo / "report.html").read_text()
    for words in ("Plain VAE", "Control", "Send-VAE", "Attribute F1", "PSNR"):
        assert words in page, words
    assert "http://" not in page.replace("http://www.w3.org", "") and page.count("<img") >= 7


def test_only_the_aligned_run_aligns(demo):
    aligned = {
        key: "align" in (demo / key / "vae" / "metrics.jsonl").read_text() for key in ("plain", "control", "send")
    }
    assert aligned == {"plain": False, "control": False, "send": True}


def test_the_results_say_how_they_were_made(demo):
    results = json.loads((demo / "results.json").read_text())
    assert results["settings"]["finetune_steps"] == 2 and results["environment"]["cpu_cores"] >= 1
    seconds = results["seconds"]
    assert seconds["pictures"] >= 0
    assert set(seconds["Plain VAE"]) == {"autoencoder", "latents", "generator", "samples", "evaluation"}
    assert set(seconds["Control"]) == set(seconds["Send-VAE"]) == {
        "fine-tuning", "latents", "generator", "samples", "evaluation",
    }  # fmt: skip
    assert "progress" not in results and 'http-equiv="refresh"' not in (demo / "report.html").read_text()


def test_a_second_call_trains_nothing(demo):
    logs = {path: path.read_text() for path in demo.rglob("metrics.jsonl")}
    assert len(logs) == 6
    assert main(["demo", f"--run={demo}", *SMALL]) == 0
    assert logs == {path: path.read_text() for path in demo.rglob("metrics.jsonl")}


def test_other_settings_in_the_same_folder_are_refused(demo, capsys):
    assert main(["demo", f"--run={demo}", *SMALL, "--seed=5"]) == 2
    assert "seed was 0, now 5" in capsys.readouterr().err


def test_the_page_shows_what_is_there_and_what_is_to_come(demo, tmp_path):
    """After the plain autoencoder, and with one variant measured."""
    root = tmp_path / "run"
    shutil.copytree(demo, root)
    for name in ("control", "send", "control_samples.png", "send_samples.png", "send_reconstructions.png"):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = DemoConfig(run=str(root), num_train_images=48, num_test_images=48)
    comparison = comparison_of(config)
    results = Results(comparison, Timeline(costs(comparison, Speed(1.0, 1.0), 48, 48), num_workers=3))
    assert not results.is_finished() and results.done()["Plain VAE", "evaluation"] == 1
    results.write()
    page = (root / "report.html").read_text()
    assert '<meta http-equiv="refresh"' in page and "Still to come" in page and "Not finished" in page
    assert page.count('<td class="absent">to come</td>') == 2 * 14 and page.count("<img") == 7
    progress = json.loads((root / "results.json").read_text())["progress"]
    states = {part["name"]: part["state"] for part in progress["parts"]}
    assert states["Plain VAE: measuring"] == "done" and states["Control: measuring"] == "to come"
    assert all(bool(part["when"]) == (part["state"] != "done") for part in progress["parts"])
    for plan in ("plain/evaluation.jsonl", "plain_samples.png"):
        (root / plan).unlink()
    results.write()
    page = (root / "report.html").read_text()
    assert "Attribute F1" not in page and page.count("<img") == 6 and "Reconstructions" in page


def test_the_folder_of_another_demo_is_refused(tmp_path):
    for methods in (["plain", "send"], ["plain", "control", "send"]):
        claim_folder(comparison_of(DemoConfig(run=str(tmp_path), methods=methods)), ("methods",))
    with pytest.raises(UserError, match="finetune_steps was 1200, now 9.*--run=FOLDER"):
        claim_folder(comparison_of(DemoConfig(run=str(tmp_path), finetune_steps=9)), ("methods",))


def test_parts_end_when_the_cores_have_done_them():
    parts = {("", "pictures"): 8.0, ("a", "x"): 6.0, ("b", "x"): 2.0, ("c", "x"): 2.0, ("a", "y"): 1.0}
    # two cores: 4 s of pictures; three at 2/3 of a core until b and c end after 3 s; then a's last 4 + 1 on one core
    ends = finish_times(parts, cores=2, num_workers=3)
    assert ends == pytest.approx({("", "pictures"): 4, ("b", "x"): 7, ("c", "x"): 7, ("a", "x"): 11, ("a", "y"): 12})
    assert finish_times(parts, cores=8, num_workers=1)["c", "x"] == pytest.approx(1 + 6 + 1 + 2 + 2)


def test_times_follow_how_fast_the_work_goes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(timeline.time, "monotonic", lambda: clock[0])
    guess = Timeline({("a", "x"): 100.0, ("a", "y"): 100.0}, num_workers=1, cores=1)
    guess.begin({})
    assert guess.total_range_s() == pytest.approx((170, 280))
    assert max(guess.remaining_s({}).values()) == pytest.approx(200)
    clock[0] += 100
    # half of x took twice as long as it should: the rest will, too
    assert guess.remaining_s({("a", "x"): 0.5}) == pytest.approx({("a", "x"): 100, ("a", "y"): 300})
    assert guess.remaining_s({("a", "x"): 1.0}) == pytest.approx({("a", "y"): 100})
    guess.begin({("a", "x"): 0.75})
    clock[0] += 100  # for a quarter of x
    assert guess.remaining_s({("a", "x"): 1.0}) == pytest.approx({("a", "y"): 400})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's work is measured by the clock")
def test_a_busy_machine_does_not_make_the_guess_longer():
    assert timeline._seconds(lambda: time.sleep(0.05)) < 0.02


def test_the_guess_is_of_minutes_in_words():
    assert (in_words((350, 560)), in_words((170, 190)), in_words((5, 9))) == (
        "6 to 9 minutes", "about 3 minutes", "about a minute"
    )  # fmt: skip
    assert in_words((3.1 * 3600, 5.2 * 3600)) == "3 to 5 hours"
    speed = measure_speed(comparison_of(DemoConfig()))
    assert 1e-4 < speed.autoencoder_s < 60 and 1e-4 < speed.generator_s < 60
    small, large = (costs(comparison_of(DemoConfig(generator_steps=steps)), speed, 48, 48) for steps in (10, 20))
    assert large["Send-VAE", "generator"] == pytest.approx(2 * small["Send-VAE", "generator"])
    assert sum(large.values()) - sum(small.values()) == pytest.approx(3 * small["Send-VAE", "generator"])


WORKERS_SCRIPT = """
import os, pathlib, sys, time
from sendvae_fast.compare import workers

def work(folder):
    pathlib.Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(600)

if __name__ == "__main__":
    workers.WORK = workers.__name__  # what a trial imports takes seconds
    with workers.side_by_side() as pool:
        pool.run(work, [sys.argv[1]] * 2, lambda: None)
"""


def wait_for(condition, what):
    deadline_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


def test_workers_end_with_the_demo(tmp_path):
    """Of kill -9; test_processes.py has other ends."""
    (tmp_path / "script.py").write_text(WORKERS_SCRIPT)
    with forks.start([tmp_path / "script.py", tmp_path]) as demo:
        wait_for(lambda: list(tmp_path.glob("*.pid")), "no worker started")
        demo.kill()
        demo.wait(60)
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        wait_for(lambda: not any(map(is_running, pids)), f"workers {pids} are still there")


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


class InThisProcess:
    """Workers that start no process."""

    def run(self, work, jobs, watch):
        codes = [work(job) for job in jobs]
        watch()
        return codes


def test_photographs_go_through_the_whole_demo(tmp_path, monkeypatch):
    """Of one variant: what the others do more has no part in what the pictures are."""
    monkeypatch.setattr(compare, "side_by_side", lambda: nullcontext(InThisProcess()))
    photographs(tmp_path / "photos", per_class=30)
    root = tmp_path / "run"
    options = [f"--run={root}", f"--data={tmp_path / 'photos'}", "--methods=[plain]"]
    assert main(["demo", *options, *SMALL, "--debug"]) == 0
    variant = json.loads((root / "results.json").read_text())["variants"][0]
    results = [result for file in variant["evaluations"] for result in read_results(root / file)]
    measured = {result.metric: result.value for result in results}
    assert measured["frechet_judge"] > 0 and "attribute_f1" not in measured
    assert "photographs from" in (root / "report.html").read_text()


def test_too_few_photographs_are_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="too few pictures"):
        split_photographs(photographs(tmp_path / "photos", per_class=3), tmp_path / "train", tmp_path / "test")
