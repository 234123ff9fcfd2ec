import numpy as np
import pytest

from sendvae_fast.evaluation.epochs_to_fid import Reached, epochs_to, unguided_curve
from sendvae_fast.evaluation.result import PicturesOrigin, Result, WeightsOrigin


@pytest.mark.parametrize("every", [1.0, 7.0, 13.0])
@pytest.mark.parametrize("k", [90.0, 33.0, 10.5])
def test_a_falling_line_is_reached_where_it_is(every, k):
    """FID = 100 - 2 e: whatever the interval, EP_FID@k = (100 - k) / 2."""
    epochs = np.arange(every, 60.0, every)
    found = epochs_to(epochs, 100 - 2 * epochs, k)
    if 100 - 2 * epochs[0] <= k:
        assert found == Reached(epochs[0], at_first=True)
    elif 100 - 2 * epochs[-1] > k:
        assert found is None
    else:
        assert found.epochs == pytest.approx((100 - k) / 2, rel=1e-12) and not found.at_first


def test_the_first_crossing_counts_and_nothing_is_extrapolated():
    epochs, values = [10, 20, 30, 40], [60.0, 30.0, 50.0, 20.0]
    assert epochs_to(epochs, values, 45.0) == Reached(15.0, at_first=False)
    assert epochs_to(epochs, values, 30.0) == Reached(20.0, at_first=False)
    assert epochs_to(epochs, values, 60.0) == Reached(10, at_first=True)
    assert epochs_to(epochs, values, 19.9) is None and epochs_to([], [], 10.0) is None


def drawn(step, value, metric="fid", guidance=1.0, num=5000, training=True):
    samples = PicturesOrigin(
        path="run", num_pictures=num, image_size=256, sha256=str(step), hash_of="settings",
        settings={"guidance_scale": guidance},
    )  # fmt: skip
    return Result(
        metric=metric, value=value, protocol="adm", counts={"samples": num}, while_training=training,
        pictures={"samples": samples}, weights={"generator": WeightsOrigin(path="run", sha256=str(step), step=step)},
    )  # fmt: skip


def test_a_curve_is_of_one_kind_of_evaluation():
    results = [
        drawn(100, 90.0, num=2000), drawn(200, 50.0), drawn(400, 20.0), drawn(300, 30.0), drawn(400, 3.0, guidance=2.5),
        drawn(500, 1.0, training=False), drawn(400, 700.0, metric="frechet_demo"), drawn(400, 0.1, metric="precision"),
    ]  # fmt: skip
    curve = unguided_curve(results, epochs_per_step=0.01)
    assert (curve.metric, curve.epochs, curve.values, curve.num_samples) == ("fid", [2, 3, 4], [50, 30, 20], 5000)
    assert unguided_curve([drawn(400, 3.0, guidance=2.5)], 0.01) is None
    assert unguided_curve([drawn(1, 700.0, metric="frechet_demo")], 1.0).metric == "frechet_demo"
