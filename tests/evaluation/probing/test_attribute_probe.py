import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_curve
from sklearn.preprocessing import StandardScaler

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.probing import linear_fit, rows
from sendvae_fast.evaluation.probing.attribute_probe import Labelled, held_out, probe_attributes
from sendvae_fast.evaluation.probing.linear_fit import fit_linear
from sendvae_fast.evaluation.probing.rows import Rows
from sendvae_fast.evaluation.probing.scores import best_thresholds, f1_scores, top_recall
from sendvae_fast.evaluation.settings import ProbeConfig


def linear_data(num, dim, num_attributes, seed=0, sharpness=2.0):
    """Features of unequal scale, and attributes that are noisy linear functions of them, some rare."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, dim))
    weight = rng.normal(size=(dim, num_attributes)) / dim**0.5
    logits = sharpness * 3 * x @ weight - np.linspace(0, 3, num_attributes)
    y = (rng.uniform(size=logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return torch.from_numpy(x * rng.uniform(0.1, 10, size=dim) + rng.normal(size=dim)), torch.from_numpy(y)


def probe(x, y, num_train, names=None, **options):
    """The probe with the pictures after `num_train` for validation and test."""
    train, test = (Labelled(Rows(x[part]), y[part]) for part in (slice(num_train), slice(num_train, None)))
    return probe_attributes(train, test, test, names or [str(i) for i in range(y.shape[1])], **options)


@pytest.mark.parametrize("inverse_penalty", [1.0, 0.01])
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_same_optimum_as_scikit_learn_over_blocks(inverse_penalty, loss, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_NUMBERS", 10 * 130)  # 4 blocks, the last smaller
    x, y = linear_data(400, 10, 5)
    scaled = StandardScaler().fit_transform(x)
    targets = y if loss == "logistic" else y.argmax(dim=1)
    model = fit_linear(Rows(x), targets, 5, ProbeConfig(inverse_penalty=inverse_penalty, tolerance=1e-9), loss)
    if loss == "logistic":
        theirs = [
            LogisticRegression(C=inverse_penalty, tol=1e-10, max_iter=10_000).fit(scaled, y[:, i]) for i in range(5)
        ]
        coefficients, intercepts = (
            np.concatenate([getattr(one, name) for one in theirs]) for name in ("coef_", "intercept_")
        )
    else:
        one = LogisticRegression(C=inverse_penalty, tol=1e-10, max_iter=10_000).fit(scaled, targets)
        coefficients, intercepts = one.coef_, one.intercept_
    np.testing.assert_allclose(model.weight, coefficients, atol=1e-5)
    np.testing.assert_allclose(model.bias - model.bias.mean(), intercepts - intercepts.mean(), atol=1e-5)


def test_whole_protocol_equals_scikit_learn():
    x, y = linear_data(700, 2 * 3 * 3, 6)
    latents = x.reshape(-1, 2, 3, 3)
    result = probe(latents, y, 400, names=list("abcdef"))
    scaler = StandardScaler().fit(x[:400])
    expected, tuned = [], []
    for attribute in range(6):
        model, actual = LogisticRegression().fit(scaler.transform(x[:400]), y[:400, attribute]), y[400:, attribute]
        expected.append(f1_score(actual, model.predict(scaler.transform(x[400:])), zero_division=0))
        precision, recall, _ = precision_recall_curve(actual, model.decision_function(scaler.transform(x[400:])))
        tuned.append((2 * precision * recall / (precision + recall).clip(1e-9)).max())
    np.testing.assert_allclose(result.at_half.each, expected, atol=1e-12)
    np.testing.assert_allclose(
        result.tuned.each, tuned, atol=1e-12
    )  # the test pictures are the validation pictures here
    assert result.names == tuple("abcdef")
    assert result.at_half.macro.value == pytest.approx(np.mean(expected))


def test_scores_and_intervals_are_scikit_learns_and_scipys():
    generator = torch.Generator().manual_seed(0)
    predicted, actual = (torch.rand(2, 300, 6, generator=generator) < 0.4).unbind(0)
    predicted[:, 4] = False
    predicted[:, 5] = actual[:, 5] = False
    f1 = f1_scores(predicted, actual)
    np.testing.assert_allclose(f1.each, [f1_score(actual[:, i], predicted[:, i], zero_division=0) for i in range(6)])
    for average in ("macro", "micro"):
        estimate = getattr(f1, average)
        assert estimate.value == pytest.approx(f1_score(actual, predicted, average=average, zero_division=0))

        def statistic(ids, average=average):
            hits, there = (actual & predicted).numpy()[ids].sum(0), (actual.int() + predicted).numpy()[ids].sum(0)
            return 2 * hits.sum() / there.sum() if average == "micro" else (2 * hits / np.maximum(there, 1)).mean()

        theirs = bootstrap((np.arange(300),), statistic, n_resamples=1000, vectorized=False, method="percentile", rng=0)
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        np.testing.assert_allclose(estimate.interval, theirs.confidence_interval, atol=0.2 * width)


def test_thresholds_against_all_that_there_are():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.integers(-4, 5, size=(60, 4))).double()  # with ties
    actual = torch.from_numpy(rng.uniform(size=(60, 4)) < 0.3)
    actual[:, 3] = False
    found = best_thresholds(logits, actual)
    for attribute in range(3):
        every = [f1_scores(logits[:, [attribute]] > cut, actual[:, [attribute]]).each[0] for cut in np.arange(-5.5, 5)]
        assert f1_scores(logits[:, [attribute]] > found[attribute], actual[:, [attribute]]).each[0] == max(every)
    assert found[3] == 0


def test_top_recall_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    actual = torch.tensor([[True, False, False, True], [False, False, True, True]])
    assert top_recall(logits, actual, 2).value == 0.75  # 0 of the first, 2 and 3 of the second, of four
    assert top_recall(logits, actual, 1).value == 0.5


def test_separable_attributes_score_one_and_noise_does_not():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    coin = torch.rand(2000, generator=torch.Generator().manual_seed(1)) < 0.3
    y = torch.stack([x[:, 0] > 0, x[:, 1] - x[:, 2] > 0.5, coin], dim=1)
    f1 = probe(x, y, 1000).at_half.each
    assert min(f1[:2]) > 0.97 and f1[2] < 0.2


def test_a_constant_feature_has_no_say():
    x, y = linear_data(300, 6, 3)
    x = x.float()
    x[:200, 2] = 0.1
    x[200:, 2] = 7.0
    assert probe(x, y, 200).at_half == probe(x[:, [0, 1, 3, 4, 5]], y, 200).at_half


def test_one_sided_attributes_are_predicted_as_they_are():
    x, y = linear_data(200, 6, 2)
    y[:, 0], y[:, 1] = 0, 1
    everything = Labelled(Rows(x), y)
    assert probe_attributes(everything, everything, everything, ["none", "all"]).at_half.each == [0.0, 1.0]


def test_demo_sized_probe_converges_in_float32_within_few_evaluations(monkeypatch):
    x, y = linear_data(5000, 512, 16, sharpness=1.0)
    counted = []
    loss = linear_fit.binary_cross_entropy_with_logits
    monkeypatch.setattr(
        linear_fit, "binary_cross_entropy_with_logits", lambda *a, **b: counted.append(1) or loss(*a, **b)
    )
    result = probe(x.float(), y, 4000)
    assert len(counted) < 100  # 41; where float32 missed the tolerance they would be over a thousand
    exact = probe(x, y, 4000, config=ProbeConfig(tolerance=1e-8))
    assert abs(result.at_half.macro.value - exact.at_half.macro.value) < 0.002


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test": Labelled(Rows(torch.randn(10, 4)), torch.zeros(9, 2))}, "10 test latents but 9 rows"),
        (
            {"validation": Labelled(Rows(torch.randn(10, 4)), torch.full((10, 2), 2))},
            "validation attributes must be 0 or 1",
        ),
        ({"train": Labelled(Rows(torch.randn(10, 4)), torch.full((10, 2), -1))}, "training attributes must be 0 or 1"),
        ({"test": Labelled(Rows(torch.zeros(10, 5)), torch.zeros(10, 2))}, "4 and 5 numbers"),
        ({"train": Labelled(Rows(torch.full((10, 4), torch.nan)), torch.zeros(10, 2))}, "not finite"),
        ({"names": ["one"]}, "2 training attributes but 1 names"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    fine = Labelled(Rows(torch.randn(10, 4)), torch.zeros(10, 2))
    arguments = {"train": fine, "validation": fine, "test": fine, "names": ["one", "two"]}
    with pytest.raises(UserError, match=said):
        probe_attributes(**(arguments | change))


def test_held_out_is_a_partition_that_depends_on_the_seed_alone():
    stay, out = held_out(100, 0.1, 3)
    assert len(out) == 10 and sorted([*stay, *out]) == list(range(100))
    np.testing.assert_array_equal(out, held_out(100, 0.1, 3)[1])
    assert set(out) != set(held_out(100, 0.1, 4)[1])
    with pytest.raises(UserError, match="1 pictures cannot be split"):
        held_out(1, 0.1, 0)


def test_config_refuses_nonsense():
    with pytest.raises(UserError, match="inverse_penalty"):
        ProbeConfig(inverse_penalty=0)
