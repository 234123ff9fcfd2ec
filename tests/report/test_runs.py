"""Several runs side by side: what differs, all metrics beside the paper's, what cannot be compared and why."""

import csv
import json
from dataclasses import replace

import fake_runs
import numpy as np
import pytest
import yaml

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.correlation import PAPER_TABLE, read_table
from sendvae_fast.evaluation.result import FeaturesOrigin, PicturesOrigin, Result, WeightsOrigin, append_results
from sendvae_fast.report import build_report, load_report
from sendvae_fast.report.contents import RunRecord
from sendvae_fast.report.paper import TABLE, guidance_of, paper_value, why_not_beside_the_paper
from sendvae_fast.report.run_facts import differing_settings, epochs_to_fid, facts
from sendvae_fast.report.run_metrics import newest, run_metrics, seeds_sentence, what_intervals_say

INCEPTION = FeaturesOrigin(name="inception", dim=2048, weights="inception.pth", sha256="67")
SDE = {"kind": "sde", "num_steps": 250}


def pictures(path="imagenet/val", size=256, **settings):
    return PicturesOrigin(
        path=path, num_pictures=50_000, image_size=size, sha256=path, hash_of="names", settings=settings
    )


def fid(value=8.0, half=0.1, step=400_320, num=50_000, guidance=1.0, **fields):
    """A FID as the paper's, but for `fields`."""
    given = {
        "metric": "fid",
        "value": value,
        "protocol": "adm",
        "interval": (value - half, value + half),
        "features": INCEPTION,
        "counts": {"samples": num, "reference": 50_000},
        "weights": {"generator": WeightsOrigin(path="run", sha256="1", step=step)},
        "pictures": {"samples": pictures(guidance_scale=guidance, sampler=SDE), "reference": pictures()},
    }
    return Result(**given | fields)


def run(name="a", stage="generator", results=(), config=None, environment=None, last_step=100, **fields):
    return RunRecord(
        name=name,
        stage=stage,
        series={"loss": (np.array([1, last_step]), np.array([2.0, 1.0]))},
        duration_s=1.0,
        config=config or {},
        environment=environment or {},
        results=results,
        **fields,
    )


def test_the_papers_rows_are_those_of_the_other_table():
    """Both are typed from the paper, at different times."""
    table = read_table(PAPER_TABLE)
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    value = {
        (row["autoencoder"], row["generator"], row["epochs"], row["guided"], row["metric"]): row["value"]
        for row in rows
    }
    assert len(value) == len(rows)
    for name in ("VA-VAE", "Send-VAE"):
        known = table[name]
        for metric in ("rfid", "psnr", "lpips", "ssim", "celeba_f1", "deepfashion_f1", "awa_f1"):
            assert float(value[name, "", "", "", metric]) == known[metric]
        assert float(value[name, "SiT-B/1", "80", "no", "fid"]) == known["gfid"]
        for epochs in ("80", "800"):
            assert float(value[name, "XL/1", epochs, "no", "fid"]) == known[f"gfid_xl_{epochs}"]


@pytest.mark.parametrize(
    ("preset", "epochs", "guidance", "expected"),
    [
        ("SiT-B/1", 80, 1.0, ("7.57", "Table 6, SiT-B/1, 80 epochs")),
        ("SiT-XL/1", 80, 1.0, ("2.88", "Table 1, XL/1, 80 epochs")),
        ("SiT-XL/1", 80, 2.5, ("1.41", "Table 1, XL/1, 80 epochs")),
        ("SiT-XL/1", 800, 2.5, ("1.21", "Table 1, XL/1, 800 epochs")),
        ("SiT-B/1", 80, 2.5, None),
    ],
)
def test_a_run_stands_beside_the_row_of_its_generator(preset, epochs, guidance, expected):
    config = {"generator": {"preset": preset}, "data": {"global_batch": 100}}
    own = run(config=config, environment={"training_pictures": 1000}, last_step=10 * epochs)
    found = paper_value("Send-VAE", fid(guidance=guidance), [own])
    assert (None if found is None else (found.text, found.where)) == expected


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({}, []),
        (
            {"features": replace(INCEPTION, name="demo"), "metric": "frechet_demo"},
            ["features of demo, not of Inception"],
        ),
        ({"num": 5000}, ["5,000 pictures, not 50,000"]),
        ({"protocol": "pytorch-fid"}, ["another protocol than ADM's"]),
        ({"guidance": 4.0}, ["guidance 4, not 2.5"]),
        (
            {"pictures": {"samples": pictures(size=64, guidance_scale=1.0, sampler=SDE | {"num_steps": 50}),
                          "reference": pictures("scenes", 64)}},
            ["pictures of 64 px, not 256", "drawn in 50 steps of sde, not 250 of sde", "other pictures than ImageNet"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_put_beside_the_paper_says_why(fields, reasons):
    assert why_not_beside_the_paper(fid(**fields)) == reasons


def test_another_protocol_of_reconstruction_says_so():
    psnr = Result(metric="psnr", value=27.6, protocol="adm", counts={"pictures": 50_000}, pictures={"data": pictures()})
    assert why_not_beside_the_paper(psnr) == ["another protocol than the tokenizer papers' (lightningdit)"]
    assert why_not_beside_the_paper(replace(psnr, protocol="lightningdit")) == []


def test_marks_lead_to_their_reasons():
    ours, theirs = fid(8.0, num=2000), fid(9.0, features=replace(INCEPTION, sha256="other"))
    table = run_metrics([run("a", results=[ours]), run("b", results=[theirs])])
    (row,) = table.rows
    said = [[table.reasons[letter] for letter in cell.marks] for cell in row.cells]
    assert said == [
        ["Not beside the paper: 2,000 pictures, not 50,000."],
        ["Not beside a: other weights of the feature network.", "Not beside a: other numbers of pictures."],
    ]
    assert row.said == "measured in different ways: not to be compared"
    assert [value.text for value in row.paper] == ["11.40", "7.57"] and table.paper == ("VA-VAE", "Send-VAE")
    assert row.cells[0].basis == "2,000 samples, 50,000 reference; step 400,320"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([8.0], ""),
        ([8.0, 8.15], "the intervals overlap: no difference is shown"),
        ([8.0, 9.0], "the intervals do not overlap"),
        ([9.0, 8.0], "the intervals do not overlap"),
        ([8.15, 8.0], "the intervals overlap: no difference is shown"),
        ([8.0, 8.1, 8.15], "all intervals overlap"),
        ([8.0, 8.15, 9.0], "intervals overlap of run0 and run1"),
        ([8.0, 9.0, 10.0], "no two intervals overlap"),
    ],
)
def test_words_follow_the_intervals(values, said):
    names = [f"run{index}" for index in range(len(values))]
    assert what_intervals_say(names, [fid(value) for value in values]) == said
    if len(values) > 1:
        alone = [replace(fid(value), interval=None) for value in values]
        assert what_intervals_say(names, alone) == "without intervals: the difference may be chance"


def test_a_result_of_training_gives_way_to_one_of_evaluate_and_an_old_one_to_a_new():
    training = [fid(9.0 - step, step=step, num=5000, while_training=True) for step in (1, 2)]
    assert [result.value for result in newest(training).values()] == [7.0]
    again = [fid(8.0), fid(7.9), *training]
    assert [result.value for result in newest(again).values()] == [7.9]
    guided = fid(2.0, guidance=2.5)
    rows = run_metrics([run(results=[*again, guided])]).rows
    assert [(row.label, row.cells[0].value) for row in rows] == [
        ("FID, without guidance", "7.90"),
        ("FID, guidance 2.5", "2.00"),
    ]
    assert guidance_of(guided) == 2.5


def test_seeds_are_counted():
    config = {"run": "x", "optimizer": {"learning_rate": 1.0}}
    runs = [run("a", config=config | {"seed": 0}), run("b", config=config | {"seed": 1, "run": "y"}), run("c")]
    assert seeds_sentence(runs) == "a, b are 2 seeds of one configuration. The others have one seed each."
    assert seeds_sentence(runs[1:]).startswith("One seed of each")


def test_only_settings_that_differ_are_shown():
    runs = [
        run("a", config={"run": "a", "seed": 0, "loss": {"gan_weight": 0.0, "kl": 1}, "list": [1, 2]}),
        run("b", config={"run": "b", "seed": 0, "loss": {"gan_weight": 0.1, "kl": 1}, "list": [1, 3], "new": None}),
    ]
    assert differing_settings(runs) == [
        ("loss.gan_weight", ["0.0", "0.1"]),
        ("list", ["[1, 2]", "[1, 3]"]),
        ("new", ["–", "null"]),
    ]
    assert differing_settings(runs[:1]) == []


def test_facts_count_what_was_seen():
    config = {"seed": 3, "data": {"root": "scenes", "image_size": 64, "global_batch": 16}}
    environment = {
        "gpus": ["H200", "H200"],
        "world_size": 2,
        "training_pictures": 800,
        "git_commit": "0123456789abcdef",
    }
    known = dict(facts([run(config=config, environment=environment, last_step=125, num_parameters=694_835)]))
    assert {heading: cell for heading, (cell,) in known.items()} == {
        "Stage": "2: generator",
        "Data": "scenes, 800 pictures, 64 px",
        "Parameters": "694,835",
        "Hardware": "2 x H200, 2 ranks",
        "Code": "0123456789",
        "Seed": "3",
        "Steps": "125",
        "Pictures in a step": "16",
        "Pictures seen": "2,000",
        "Epochs": "2.5",
    }
    assert "Epochs" not in dict(facts([run(config=config)]))


def test_epochs_to_fid_of_runs():
    """Steps of 100 out of 1000 pictures: ten steps are an epoch."""

    def trained(name, values, num=5000):
        results = [
            fid(value, step=10 * (index + 1), num=num, while_training=True) for index, value in enumerate(values)
        ]
        return run(
            name, results=results, config={"data": {"global_batch": 100}}, environment={"training_pictures": 1000}
        )

    title, rows = epochs_to_fid(
        [trained("a", [60, 40, 8]), trained("b", [15, 12, 11]), trained("c", [5], num=99), run("d")]
    )
    assert title == "FID, 5,000 pictures without guidance"
    assert rows == [
        ("FID of 200", ["at most 1", "at most 1", "–", "–"]),
        ("FID of 100", ["at most 1", "at most 1", "–", "–"]),
        ("FID of 50", ["1.5", "at most 1", "–", "–"]),
        ("FID of 20", ["2.62", "at most 1", "–", "–"]),
        ("FID of 10", ["2.94", "not reached (lowest 11)", "–", "–"]),
        ("FID of 5", ["not reached (lowest 8)", "not reached (lowest 11)", "–", "–"]),
    ]
    assert epochs_to_fid([run()]) is None


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for number, name in enumerate(("control", "send")):
        folder = fake_runs.write_run(root / name / "vae", "autoencoder", rng)
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"alignment": {"method": name}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        environment = json.loads((folder / "environment.json").read_text()) | {"training_pictures": 3000}
        (folder / "environment.json").write_text(json.dumps(environment))
        results = [
            Result(
                metric="psnr", value=20.0 + step / 1000 + number / 10, protocol="lightningdit", interval=(19.0, 22.0),
                counts={"pictures": 600}, while_training=True, pictures={"data": pictures("scenes", 64)},
                weights={"autoencoder": WeightsOrigin(path=str(folder), sha256=str(step), step=step)},
            )
            for step in (500, 1000, 1500)
        ]  # fmt: skip
        append_results(folder / "evaluation.jsonl", results)
    return root


def test_the_page_of_two_runs(two_runs):
    page = build_report(load_report(two_runs / "control" / "vae", two_runs / "send" / "vae"))
    for words in (
        "2 runs", "control/vae", "send/vae", "Settings that differ", "alignment.<wbr>method",
        "All metrics, beside the paper&#39;s",
        "The intervals overlap: no difference is shown", "One seed of each", "Measured while training", "27.62",
        "600 pictures, not 50,000", 'href="#why-a"', 'id="why-a"', "3,000 pictures", "control/vae, step 1,500",
    ):  # fmt: skip
        assert words in page.replace("beside the paper's", "beside the paper&#39;s"), words
    assert page.count("<svg") == 1 + 7 + 1, "each metric is one chart of both runs"
    assert page.count('class="zoom"') == 2 and 'href="#picture-r1"' in page and 'id="picture-r1"' in page
    assert not any(f" {word} " in page for word in ("best", "better than", "worse", "wins", "beats"))


def test_a_run_is_given_once(two_runs):
    path = two_runs / "send" / "vae"
    with pytest.raises(UserError, match="is given twice"):
        load_report(path, path.parent / ".." / "send" / "vae")
