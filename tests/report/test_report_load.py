import json
from pathlib import Path

import fake_runs
import numpy as np
import pytest

from sendvae_fast.errors import UserError
from sendvae_fast.report import load_report, load_runs


@pytest.fixture
def run(tmp_path):
    return fake_runs.write_run(tmp_path / "my-vae", "autoencoder", np.random.default_rng(0))


def test_run_is_read_back(run):
    data = load_runs(run)
    [record] = data.runs
    assert data.title == record.name == "my-vae"
    assert record.stage == "autoencoder" and record.last_step == 1500
    steps, values = record.series["loss"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    logged = [line for line in logged if line["loss"] is not None]
    assert steps.tolist() == [line["step"] for line in logged] and steps[-1] == 1500
    assert values.tolist() == [line["loss"] for line in logged]
    assert record.duration_s == pytest.approx(logged[-1]["time_s"] - logged[0]["time_s"])
    assert record.config["loop"]["num_steps"] == 1500 and record.environment["python"] == "3.11.7"
    assert [picture.title for picture in data.reconstructions] == ["Step 500", "Step 1,500"]
    assert data.samples == []
    assert data.reconstructions[0].image.shape == (128, 512, 3)


def test_a_generators_run_is_known_by_its_velocity_loss(tmp_path):
    data = load_report(fake_runs.write_run(tmp_path / "sit", "generator", np.random.default_rng(0)))
    assert data.runs[0].stage == "generator"
    assert len(data.samples) == 2 and data.reconstructions == []


def test_sentences_follow_the_curves(run):
    values = [0.05, None, 0.75, float("nan"), float("inf"), "text"]
    lines = [{"step": step, "reconstruction": value} for step, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_runs(run).summary == ["The reconstruction loss rose from 0.05 to 0.75."]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml"])
def test_a_folder_that_is_no_run_is_refused(run, missing):
    (run / missing).unlink()
    with pytest.raises(UserError, match=f"not a run directory .{missing} is missing"):
        load_report(run)


def test_absent_folder_and_empty_log_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        load_report(tmp_path / "absent")
    (run / "metrics.jsonl").write_text('{"step": 1, "time_s": 5.0}\n')
    with pytest.raises(UserError, match="no numbers yet"):
        load_report(run)


def test_damaged_config_and_picture_are_named(run):
    (run / "samples" / "reconstruction_00001500.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="reconstruction_00001500.png"):
        load_report(run)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="damaged"):
        load_report(run)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fake_runs.write_comparison(tmp_path_factory.mktemp("comparison"))


def test_comparison_is_read_back(demo):
    data = load_report(demo)
    assert [variant.name for variant in data.variants] == ["Plain VAE", "Control", "Send-VAE"]
    assert [picture.title for picture in data.reconstructions] == ["Originals", "Plain VAE", "Control", "Send-VAE"]
    assert len(data.runs) == 6 and {run.stage for run in data.runs} == {"autoencoder", "generator"}
    per_attribute = np.array(list(data.variants[2].attribute_f1.values()))
    means = [result.value for result in data.variants[2].metrics["attribute_f1"]]
    np.testing.assert_allclose(means, per_attribute.mean(axis=0))
    assert f"{np.mean(means):.3f}" in [tile.value for tile in data.tiles]


def change_results(demo, target: Path, **changes):
    results = json.loads((demo / "results.json").read_text()) | {"originals": None}
    for variant in results["variants"]:
        variant.update(runs=[], reconstructions=None, samples=None)
    (target / "results.json").write_text(json.dumps(results | changes))
    return target


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": None}, "needs `variants`"),
        ({"variants": [{"runs": []}]}, "needs `variants`"),
        ({"candidate": "Other"}, "no variant is named 'Other'"),
        (
            {"variants": [{"name": "A", "evaluations": ["results.json"]}]},
            "line 1 is damaged.*not a result",
        ),
        ({"originals": "absent.png"}, "absent.png"),
        ({"variants": [{"name": "A", "runs": ["absent"]}]}, "not a run directory"),
    ],
)
def test_what_is_wrong_with_results_is_named(demo, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        load_report(change_results(demo, tmp_path, **changes))


def test_results_that_are_no_json_are_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="results.json is damaged"):
        load_report(tmp_path)
