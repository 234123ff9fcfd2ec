import numpy as np
import pytest

from sendvae_fast.report.contents import RunRecord, Variant
from sendvae_fast.report.summary import compare, comparison_sentences, format_duration, run_tiles, verdict


def pair(ours, theirs):
    return Variant(name="Send-VAE", metrics=ours), Variant(name="Control", metrics=theirs)


@pytest.mark.parametrize(
    ("key", "ours", "theirs", "outcome"),
    [
        ("attribute_f1", 0.5, 0.4, "better"),
        ("attribute_f1", 0.4, 0.5, "worse"),
        ("gfid", 90, 100, "better"),
        ("gfid", [90, 91, 101], [100, 99, 100], "unclear"),
        ("gfid", [101, 102], [100, 99], "worse"),
        ("gfid", [90, 91], 100, "better"),
        ("psnr", 19.0, 19.0, "unclear"),
        ("lpips", None, 0.3, "absent"),
        ("lpips", [], 0.3, "absent"),
    ],
)
def test_outcome_takes_direction_and_every_seed_into_account(key, ours, theirs, outcome):
    assert compare(key, *pair({key: ours}, {key: theirs}))[0] == outcome


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"attribute_f1": 0.5, "gfid": 90}, "tell attributes better and its generated pictures are closer"),
        ({"attribute_f1": 0.3, "gfid": 110}, "tell attributes worse and its generated pictures are farther"),
        ({"attribute_f1": 0.5, "gfid": 110}, "tell attributes better and its generated pictures are farther"),
        ({"attribute_f1": 0.4, "gfid": 100}, "about as well and its generated pictures are about as close"),
        ({"attribute_f1": 0.5}, "Send-VAE's latents tell attributes better."),
        ({"psnr": 19}, "Neither attributes nor generation"),
    ],
)
def test_verdict_says_what_came_out(ours, said):
    assert said in verdict(*pair(ours, {"attribute_f1": 0.4, "gfid": 100}))


def test_sentences_give_numbers_and_seeds():
    sentences = comparison_sentences(
        *pair(
            {"attribute_f1": [0.5, 0.52, 0.51], "gfid": [90, 101, 95], "psnr": [18, 18, 18], "lpips": None},
            {"attribute_f1": [0.4, 0.42, 0.41], "gfid": [100, 100, 100], "psnr": [19, 19, 19], "lpips": None},
        )
    )
    assert len(sentences) == 3
    assert "0.510 for Send-VAE and 0.410 for Control: better in all 3 seeds" in sentences[0]
    assert "95.33 for Send-VAE and 100.00 for Control: no clear difference (better in 2 of 3 seeds)" in sentences[1]
    assert "worse in all 3 seeds" in sentences[2]


def test_a_single_seed_is_called_one():
    sentences = comparison_sentences(*pair({"psnr": 18.0}, {"psnr": 19.0}))
    assert "18.00 for Send-VAE and 19.00 for Control: worse." in sentences[0]
    assert "one seed" in sentences[-1]


@pytest.mark.parametrize(("seconds", "text"), [(3723, "1:02:03"), (123, "2:03"), (5, "0:05"), (36_000, "10:00:00")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_run_tiles():
    steps = np.array([10, 20, 30])
    run = RunRecord(
        name="r",
        stage="generator",
        duration_s=90.0,
        series={"loss": (steps, np.array([3.0, 2.0, 1.0])), "img_per_s": (steps, np.array([100.0, 300.0, 110.0]))},
    )
    assert [tile.value for tile in run_tiles(run)] == ["30", "1", "110.0", "1:30"]
