import numpy as np
import pytest
from fake_runs import result

from sendvae_fast.report.contents import RunRecord, Variant
from sendvae_fast.report.summary import (
    comparison_headline,
    comparison_sentences,
    comparison_tiles,
    format_duration,
    run_tiles,
)


def pair(*seeds):
    """Send-VAE and Control of (ours, theirs) per seed, each a value or (value, interval)."""
    sides = ([], [])
    for values in seeds:
        for side, value in zip(sides, values, strict=True):
            value, interval = value if isinstance(value, tuple) else (value, None)
            side.append([result("frechet_demo", value, interval=interval)])
    return [Variant(name=name, seeds=side) for name, side in zip(("Send-VAE", "Control"), sides, strict=True)]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([(90, 100)], "90.00 for Send-VAE, 100.00 for Control."),
        ([((90, (80, 96)), (100, (95, 105)))], "for Control; their 95 % intervals overlap."),
        ([((90, (89, 91)), (100, (95, 105)))], "for Control; their 95 % intervals do not overlap."),
        ([(90, 100), (91, 99), (101, 100)], "94.00 for Send-VAE, 99.67 for Control; higher in 1 of 3 seeds."),
    ],
)
def test_sentences_say_numbers_and_what_holds_of_them(seeds, said):
    (sentence,) = comparison_sentences(*pair(*seeds))
    assert sentence.startswith("Fréchet distance, demo: ") and sentence.endswith(said)


def test_what_one_of_them_lacks_is_not_compared():
    ours, _ = pair((90, 100))
    assert comparison_sentences(ours, Variant(name="Control")) == comparison_tiles(ours, Variant(name="Control")) == []


def test_generation_attributes_and_pixels_get_tiles_first():
    names = ("ssim", "kid_demo", "psnr", "attribute_f1", "frechet_infinity_demo", "decoded_frechet_demo")
    one = Variant(name="Send-VAE", seeds=[[result(name, 1.0) for name in (*names, "frechet_demo")]])
    labels = [tile.label for tile in comparison_tiles(one, one)]
    assert [label.split(":")[0] for label in labels] == [
        "Fréchet distance, demo", "Fréchet distance from decoded, demo", "Attribute F1", "PSNR, dB",
    ]  # fmt: skip


def test_one_seed_is_called_one():
    assert "one seed each" in comparison_headline(pair((90, 100)))
    assert comparison_headline(pair((90, 100), (91, 100))) == "2 variants, 2 seeds each."


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
