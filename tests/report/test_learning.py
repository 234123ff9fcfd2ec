"""How fast generators learn, from curves made by hand: hours, means over seeds, and the speed-up to reach X."""

import numpy as np
import pytest
import scipy.stats

from sendvae_fast.evaluation.result import PicturesOrigin, Result, WeightsOrigin
from sendvae_fast.report.charts import STEP
from sendvae_fast.report.contents import RunRecord, Variant
from sendvae_fast.report.learning import ABSENT, LearningCurve, learning, learning_curve, mean_curve, speed_ups

UNGUIDED = PicturesOrigin(
    path="drawn", num_pictures=4, image_size=32, sha256="", hash_of="settings", settings={"guidance_scale": 1.0}
)


def curve(steps, values, hours=None):
    hours = np.array(steps) / 100 if hours is None else np.array(hours)
    return LearningCurve("frechet_demo", 4, np.array(steps, float), hours, np.array(values, float))


def run(stage, batch, rates, ranks, distances=(), num_samples=4):
    """A run that logged pictures per second at steps, and measured distances at steps."""
    results = [
        Result(
            metric="frechet_demo", value=value, protocol="p", counts={"samples": num_samples}, while_training=True,
            pictures={"samples": UNGUIDED}, weights={"generator": WeightsOrigin(path="", sha256="", step=step)},
        )
        for step, value in distances
    ]  # fmt: skip
    series = {"img_per_s": (np.array([step for step, _ in rates]), np.array([rate for _, rate in rates]))}
    return RunRecord(
        name="a", stage=stage, series=series, duration_s=0.0, config={"data": {"global_batch": batch}},
        environment={"world_size": ranks}, results=results,
    )  # fmt: skip


AUTOENCODER = run("autoencoder", batch=10, rates=[(100, 20.0), (200, 5.0)], ranks=3)
"""50 s and 200 s on 3 ranks."""


def test_hours_are_of_all_ranks_and_of_the_autoencoder_before():
    generator = run("generator", 8, [(10, 4.0), (30, 2.0)], 2, [(10, 9.0), (20, 5.0), (30, 4.0)])
    found = learning_curve([AUTOENCODER, generator])
    assert found.steps.tolist() == [10, 20, 30] and found.values.tolist() == [9, 5, 4]
    # 20 s to step 10, then 4 s a step, on 2 ranks
    np.testing.assert_allclose(found.hours, (3 * 250 + 2 * np.array([20, 60, 100])) / 3600)
    taken_as_it_is = learning_curve([generator])
    np.testing.assert_allclose(taken_as_it_is.hours, 2 * np.array([20, 60, 100]) / 3600)
    assert learning_curve([AUTOENCODER]) is None


def test_means_are_over_seeds_where_all_were_measured():
    seeds = [
        curve([1, 2, 3], [9, 6, 2], hours=[1, 2, 3]),
        curve([1, 3, 4], [7, 5, 1], hours=[3, 5, 9]),
        curve([1, 3], [5, 5], hours=[2, 4]),
        None,
    ]
    for against, places in ((STEP, [1, 3]), ("hours of a process", [2, 4])):
        at, means, (low, high) = mean_curve(seeds, against)
        assert at.tolist() == places and means.tolist() == [7, 4]
        for index, values in enumerate(([9, 7, 5], [2, 5, 5])):
            truth = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
            np.testing.assert_allclose((low[index], high[index]), truth)
    assert mean_curve(seeds[:1], STEP)[2] is None and mean_curve([None], STEP) is None
    assert mean_curve([curve([1], [2]), curve([2], [2])], STEP) is None


CONTROL = [curve([100, 200, 300], [40, 20, 10]), curve([100, 200, 300], [50, 30, 20])]


def test_a_speed_up_is_of_the_controls_last_distance_with_the_same_seed():
    """X is 10 and 20, which the other has at step 150, half way, and at 120: 300 over these; hours have an offset."""
    own = [
        curve([100, 200, 300], [15, 5, 4], hours=[2, 3, 4]),
        curve([100, 200, 300], [22, 12, 1], hours=[2, 3, 4]),
    ]
    (control, cells), (name, others) = speed_ups({"control": CONTROL, "other": own}, "control")
    ratios, hours = [300 / 150, 300 / 120], [3 / 2.5, 3 / 2.2]
    assert (control, name) == ("control", "other")
    for values, form, cell in (([4, 1], ".4g", others[0]), (ratios, ".2f", others[1]), (hours, ".2f", others[2])):
        low, high = scipy.stats.t.interval(0.95, 1, np.mean(values), scipy.stats.sem(values))
        assert cell == f"{np.mean(values):{form}} [{low:{form}}, {high:{form}}]"
    assert cells[1:] == ["1.00 [1.00, 1.00]"] * 2


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ([curve([100, 300], [90, 70])], "not reached"),
        ([curve([100, 300], [90, 70]), curve([100, 300], [40, 15])], "not reached with 1 of 2 seeds"),
        ([curve([100, 300], [9, 7])], "at least 3.00"),  # it was there at the first look
        ([None, curve([100, 300], [30, 20])], "1.00"),
        ([None, None, curve([100], [1])], ABSENT),  # a seed that the control lacks
    ],
)
def test_what_a_speed_up_cannot_be_is_said(own, said):
    assert dict(speed_ups({"control": CONTROL, "other": own}, "control"))["other"][1] == said


def test_only_like_distances_are_put_together():
    def trial(num_samples, distances, ranks=1):
        return [AUTOENCODER, run("generator", 8, [(20, 4.0)], ranks, distances, num_samples)]

    variants = [
        Variant(name="control", trials=[trial(4, [(10, 8.0), (20, 4.0)])]),
        Variant(name="more pictures", trials=[trial(5, [(10, 2.0), (20, 1.0)])]),
        Variant(name="faster", trials=[trial(4, [(10, 4.0), (20, 3.0)])]),
        Variant(name="not yet", trials=[[AUTOENCODER]]),
    ]
    section = learning(variants, "control")
    assert [name for name, _ in section["legend"]] == ["control", "faster"]
    rows = dict(section["rows"])
    assert rows.keys() == {"control", "faster"} and rows["control"] == ["4", "1.00", "1.00"]
    # 750 s of the autoencoder, 20 s for 10 steps: X is reached at the first look, after 770 s in place of 790 s
    assert rows["faster"] == ["3", "at least 2.00", f"at least {790 / 770:.2f}"]
    assert not section["several"] and [chart["title"] for chart in section["charts"]] == [
        "Fréchet distance, demo against steps", "Fréchet distance, demo against hours of a process",
    ]  # fmt: skip
    assert learning(variants[3:], "control") is None
