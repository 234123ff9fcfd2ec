"""What a comparison's page is drawn from, of hand-written results: whose number, with which seed, beside whose."""

import json

import numpy as np
import pytest
import scipy.stats
import yaml
from PIL import Image
from tiny_comparison import PLAIN, SEND, comparison

from sendvae_fast.compare.results import Results, print_summary
from sendvae_fast.compare.timeline import PICTURES, Timeline
from sendvae_fast.evaluation.result import PicturesOrigin, Result, WeightsOrigin, append_results
from sendvae_fast.report import load_report
from sendvae_fast.report.page import metric_table

SEEDS = [3, 5, 8]
PSNR = {"plain": [19.0, 19.5, 21.0], "send": [20.0, 20.2, 20.9], "va": [18.0, 20.5, 22.5]}
THREE_STEPS = {"settings": {"loop": {"num_steps": 3}}}
METHODS = [
    PLAIN,
    SEND | {"name": "Send-VAE"} | THREE_STEPS,
    SEND | {"key": "va", "name": "VA-VAE", "config": "demo/vae_va"} | THREE_STEPS,
]
TITLES = {method["key"]: method["name"] for method in METHODS}
UNGUIDED = PicturesOrigin(
    path="drawn", num_pictures=4, image_size=32, sha256="", hash_of="settings", settings={"guidance_scale": 1.0}
)


def result(metric, value, **fields):
    return Result(metric=metric, value=value, protocol="p", **fields)


def write_run(path, metric, value):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"data": {"global_batch": 4}}))
    (path / "metrics.jsonl").write_text(json.dumps({"step": 2, metric: value, "img_per_s": 1.0}) + "\n")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three methods with three seeds; the control is the second, the candidate the last."""
    one = comparison(
        tmp_path_factory.mktemp("compared"), methods=METHODS, seeds=SEEDS, control="send", candidate="va", curve_every=1
    )
    for folder in one.pictures:
        (folder / "class").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "class" / "0.png")
    for number, trial in enumerate(one.trials):
        value = PSNR[trial.method.key][SEEDS.index(trial.seed)]
        append_results(trial.results, [result("psnr", value), result("ssim", value / 100)])
        write_run(trial.folder / "vae", "reconstruction", value)
        write_run(trial.folder / "sit", "velocity", value)
        weights = {"generator": WeightsOrigin(path="", sha256="", step=2)}
        drawn = result(
            "frechet_demo", 100 - value, pictures={"samples": UNGUIDED}, weights=weights, while_training=True
        )
        append_results(trial.folder / "sit" / "evaluation.jsonl", [drawn])
        (trial.folder / "parts.json").write_text(json.dumps(dict.fromkeys(trial.parts, 6.0)))
        for what, height in (("reconstructions", 2), ("samples", 3)):
            colour = np.full((height, 2, 3), 10 * number, np.uint8)
            Image.fromarray(colour).save(trial.picture(what))
    (one.root / "parts.json").write_text(json.dumps({PICTURES[1]: 30.0}))
    return one


def results_of(one):
    parts = [(trial.name, part) for trial in one.trials for part in trial.parts]
    return Results(one, Timeline(dict.fromkeys([PICTURES, *parts], 1.0), num_workers=1))


@pytest.fixture(scope="module")
def page(compared):
    results_of(compared).write()
    return load_report(compared.root)


def test_numbers_are_their_methods_and_seeds(page):
    assert [variant.name for variant in page.variants] == list(TITLES.values())
    for key, variant in zip(PSNR, page.variants, strict=True):
        assert [found.value for found in variant.metrics["psnr"]] == PSNR[key]
        for value, (autoencoder, generator) in zip(PSNR[key], variant.trials, strict=True):
            assert autoencoder.series["reconstruction"][1] == generator.series["velocity"][1] == [value]
            assert [found.value for found in generator.results] == [100 - value]
    assert [(run.name, run.stage) for run in page.runs] == [
        (title, stage) for title in TITLES.values() for stage in ("autoencoder", "generator")
    ]
    for strips, height in ((page.reconstructions, 2), (page.samples, 3)):
        assert [strip.title for strip in strips] == list(TITLES.values())
        assert [(len(strip.image), strip.image.mean()) for strip in strips] == [(height, 10 * n) for n in range(3)]


def test_differences_are_from_the_control_with_students_interval(page):
    assert page.control == "Send-VAE"
    row = next(row for row in metric_table(page.variants, control=page.control) if row.label.startswith("PSNR"))
    for key, cell in zip(PSNR, row.cells, strict=True):
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(PSNR[key]), scipy.stats.sem(PSNR[key]))
        assert (cell.text, cell.spread) == (f"{np.mean(PSNR[key]):.2f}", f"[{low:.2f}, {high:.2f}]")
        if key == "send":
            assert cell.difference == ""
            continue
        paired = scipy.stats.ttest_rel(PSNR[key], PSNR["send"]).confidence_interval(0.95)
        mean = np.mean(PSNR[key]) - np.mean(PSNR["send"])
        assert cell.difference == f"{mean:+.2f} [{paired.low:+.2f},\N{NO-BREAK SPACE}{paired.high:+.2f}]"
    assert page.tiles[0].label == "PSNR, dB: VA-VAE" and page.tiles[0].detail == "Send-VAE: 20.37"
    assert page.summary[0].endswith("for VA-VAE, 20.37 for Send-VAE; higher in 2 of 3 seeds.")


def test_the_summary_has_means_over_seeds(compared):
    lines = []
    print_summary(compared, lines.append)
    assert lines[0].split() == ["Plain", "VAE", "Send-VAE", "VA-VAE"]
    assert lines[1].split() == ["psnr", *(f"{np.mean(values):.3f}" for values in PSNR.values())]
    assert lines[2].split() == ["ssim", *(f"{np.mean(values) / 100:.3f}" for values in PSNR.values())]


def test_it_is_finished_when_the_last_trial_is_measured(compared):
    found = results_of(compared)
    assert found.is_finished()
    # With each seed 2, 3 and 3 steps of autoencoders, three generators of 2 and their 6 pictures; runs logged step 2.
    assert found.total_work() == 3 * (8 + 3 * 8) and found.work() == 3 * (6 + 3 * 2)
    page = found.write()
    assert "progress" not in page and "took 5.0 minutes together" in page["notes"][-1]  # 9 trials of 30 s, and 30 s
    last = compared.trials[-1]
    kept = last.results.rename(last.results.with_suffix(".kept"))
    try:
        assert not results_of(compared).is_finished() and "progress" in results_of(compared).write()
    finally:
        kept.rename(last.results)
