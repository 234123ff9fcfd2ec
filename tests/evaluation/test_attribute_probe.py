from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation import attribute_probe
from sendvae_fast.evaluation.attribute_probe import ProbeConfig, f1_scores, fit_logistic, probe_attributes


def linear_data(num, dim, num_attributes, seed=0, sharpness=2.0):
    """Features of unequal scale, and attributes that are noisy linear functions of them, some rare."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, dim))
    weight = rng.normal(size=(dim, num_attributes)) / dim**0.5
    logits = sharpness * 3 * x @ weight - np.linspace(0, 3, num_attributes)
    y = (rng.uniform(size=logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return torch.from_numpy(x * rng.uniform(0.1, 10, size=dim) + rng.normal(size=dim)), torch.from_numpy(y)


@pytest.mark.parametrize("inverse_penalty", [1.0, 0.01])
def test_same_optimum_as_scikit_learn(inverse_penalty):
    x, y = linear_data(400, 10, 5)
    x = torch.from_numpy(StandardScaler().fit_transform(x))
    config = ProbeConfig(inverse_penalty=inverse_penalty, tolerance=1e-9)
    weight, bias = fit_logistic(x, y.double(), config)
    for attribute in range(5):
        theirs = LogisticRegression(C=inverse_penalty, tol=1e-10, max_iter=10_000).fit(x, y[:, attribute])
        np.testing.assert_allclose(weight[attribute].numpy(), theirs.coef_[0], atol=1e-5)
        np.testing.assert_allclose(bias[attribute].item(), theirs.intercept_[0], atol=1e-5)


def test_whole_protocol_equals_scikit_learn():
    x, y = linear_data(700, 2 * 3 * 3, 6)
    latents = x.reshape(-1, 2, 3, 3)
    result = probe_attributes(latents[:400], y[:400], latents[400:], y[400:], names=list("abcdef"))
    scaler = StandardScaler().fit(x[:400])
    expected = []
    for attribute in range(6):
        model = LogisticRegression().fit(scaler.transform(x[:400]), y[:400, attribute])
        predicted = model.predict(scaler.transform(x[400:]))
        expected.append(f1_score(y[400:, attribute], predicted, zero_division=0))
    np.testing.assert_allclose(result.f1, expected, atol=1e-12)
    assert result.names == tuple("abcdef")
    assert result.mean_f1 == pytest.approx(np.mean(expected))


def test_separable_attributes_score_one_and_noise_does_not():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    coin = torch.rand(2000, generator=torch.Generator().manual_seed(1)) < 0.3
    y = torch.stack([x[:, 0] > 0, x[:, 1] - x[:, 2] > 0.5, coin], dim=1)
    result = probe_attributes(x[:1000], y[:1000], x[1000:], y[1000:])
    assert min(result.f1[:2]) > 0.97 and result.f1[2] < 0.2


def test_f1_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    predicted, actual = (torch.rand(2, 50, 6, generator=generator) < 0.4).unbind(0)
    predicted[:, 4] = False
    predicted[:, 5] = actual[:, 5] = False
    expected = [f1_score(actual[:, i], predicted[:, i], zero_division=0) for i in range(6)]
    np.testing.assert_allclose(f1_scores(predicted, actual).numpy(), expected)


def test_a_constant_feature_has_no_say():
    x, y = linear_data(300, 6, 3)
    x = x.float()
    x[:200, 2] = 0.1  # whose float32 mean over 200 is not 0.1
    assert x[:200, 2].mean() != x[0, 2]
    x[200:, 2] = 7.0
    rest = [0, 1, 3, 4, 5]
    expected = probe_attributes(x[:200, rest], y[:200], x[200:, rest], y[200:])
    assert probe_attributes(x[:200], y[:200], x[200:], y[200:]).f1 == expected.f1


def test_one_sided_attributes_are_predicted_as_they_are():
    x, y = linear_data(200, 6, 2)
    y[:, 0], y[:, 1] = 0, 1
    assert probe_attributes(x, y, x, y).f1 == (0.0, 1.0)


def test_demo_sized_probe_converges_in_float32_within_few_iterations(monkeypatch):
    x, y = linear_data(5000, 512, 16, sharpness=1.0)
    objective = Mock(wraps=attribute_probe.binary_cross_entropy_with_logits)
    monkeypatch.setattr(attribute_probe, "binary_cross_entropy_with_logits", objective)
    result = probe_attributes(x[:4000].float(), y[:4000], x[4000:].float(), y[4000:])
    assert objective.call_count < 100  # 41; where float32 missed the tolerance they would be over a thousand
    exact = probe_attributes(x[:4000], y[:4000], x[4000:], y[4000:], config=ProbeConfig(tolerance=1e-8))
    assert abs(result.mean_f1 - exact.mean_f1) < 0.002


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_attributes": torch.zeros(9, 2)}, "10 training latents but 9 rows"),
        ({"test_attributes": torch.full((10, 2), 2)}, "test attributes must be 0 or 1"),
        ({"train_attributes": torch.full((10, 2), -1)}, "training attributes must be 0 or 1"),
        ({"test_features": torch.zeros(10, 5)}, "4 and 5 numbers"),
        ({"train_features": torch.full((10, 4), torch.nan)}, "not finite"),
        ({"names": ["one"]}, "1 names"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    arguments = {
        "train_features": torch.randn(10, 4),
        "train_attributes": torch.zeros(10, 2),
        "test_features": torch.randn(10, 4),
        "test_attributes": torch.zeros(10, 2),
        "names": ["one", "two"],
    }
    with pytest.raises(UserError, match=said):
        probe_attributes(**(arguments | change))


def test_config_refuses_nonsense():
    with pytest.raises(UserError, match="inverse_penalty"):
        ProbeConfig(inverse_penalty=0)
