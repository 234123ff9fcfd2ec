"""The published numbers of ADM's samples against its reference, from files that the user supplies."""

import pytest
import torch

from sendvae_fast.evaluation.generation import evaluate_generation
from sendvae_fast.evaluation.settings import GenerationConfig

pytestmark = pytest.mark.slow

# Value and tolerance. torch-fidelity's Inception is not TensorFlow's bit by bit: a port with it gives 215.976, 3.9410,
# 6.1405, .8255 and .5285 (lavinal712/ADM-evaluation-suite-pytorch, which rounds distances to float16 as ADM does).
PUBLISHED = {
    "inception_score": (215.84, 0.4),
    "fid": (3.9426, 0.005),
    "sfid": (6.1404, 0.005),
    "precision": (0.8265, 0.002),
    "recall": (0.5309, 0.004),
}
SAMPLES, REFERENCE = "admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def test_published_numbers(test_data, tmp_path):
    folder = test_data / "adm"
    if missing := [name for name in (SAMPLES, REFERENCE, WEIGHTS) if not (folder / name).is_file()]:
        pytest.skip(f"{', '.join(missing)} not in {folder}: put ADM's sanity pair and Inception's weights there")
    if not torch.cuda.is_available():
        pytest.skip("60,000 pictures through Inception take hours without a GPU")
    config = GenerationConfig(
        samples=str(folder / SAMPLES), reference=str(folder / REFERENCE), out=str(tmp_path / "results.jsonl")
    )
    config.features.weights = str(folder / WEIGHTS)
    measured = {result.metric: result.value for result in evaluate_generation(config)}
    for metric, (value, tolerance) in PUBLISHED.items():
        assert measured[metric] == pytest.approx(value, abs=tolerance), metric
