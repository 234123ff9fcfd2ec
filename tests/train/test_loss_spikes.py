"""Loss spikes: what counts as one, and the way back to before it."""

import math

import pytest
import torch
from test_loop import IdleStage

from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors
from sendvae_fast.models.weights import read_weights
from sendvae_fast.train.loop import fit
from sendvae_fast.train.loss_spikes import WINDOW, LossSpikes, robust_z_score
from sendvae_fast.train.settings import LoopConfig


def test_the_score_is_that_of_normal_numbers():
    """Against its definition by scipy, and against the z-score of numbers that have no outliers."""
    from scipy.stats import median_abs_deviation

    others = torch.randn(20_001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(3).add(7)
    mad = median_abs_deviation(others.numpy(), scale="normal")
    assert robust_z_score(22.0, others.tolist()) == pytest.approx((22.0 - others.median().item()) / mad, rel=1e-3)
    assert robust_z_score(22.0, others.tolist()) == pytest.approx(5.0, rel=0.03)
    outliers = [*others.tolist(), *[1e9] * 1000]  # a mean and a standard deviation would see nothing any more
    assert robust_z_score(22.0, outliers) == pytest.approx(5.0, rel=0.15)


def spikes_of(losses, threshold=10.0):
    watch = LossSpikes(threshold, Distributed())
    return [found for step, loss in enumerate(losses, 1) if (found := watch.see(step, loss)) is not None]


def noisy(num, level=1.0):
    return (level + 0.05 * torch.randn(num, generator=torch.Generator().manual_seed(1))).tolist()


def test_a_spike_is_seen_a_step_later_and_once(capsys):
    losses = noisy(300)
    losses[99:103] = [5.0] * 4
    assert spikes_of(losses) == [100]
    (line,) = capsys.readouterr().err.splitlines()
    assert "the loss of step 100 is 5, " in line


@pytest.mark.parametrize(
    "losses",
    [
        noisy(500),
        [*noisy(20), 50.0, *noisy(20)],  # too early to know
        [*noisy(100), math.nan, math.inf, *noisy(100)],  # skipped steps are counted elsewhere
        [*noisy(100), *[0.2] * 50],  # a fall
        [1.0] * 100 + [1.05] + [1.0] * 100,  # a loss that does not move at all
        [3.0 * 0.99**step for step in range(400)],
    ],
)
def test_what_is_no_spike(losses, capsys):
    assert spikes_of(losses) == [] and capsys.readouterr().err == ""


def test_a_new_level_is_one_spike():
    assert spikes_of(noisy(100) + noisy(3 * WINDOW, level=9.0)) == [101]
    assert spikes_of([*noisy(100), 9.0], threshold=0.0) == []


class DriftingStage(IdleStage):
    """A loss that one batch throws off for good; the weights are the sum of the batches seen."""

    def __init__(self, bad=150):
        super().__init__(lambda step: 1.0)
        self.bad, self.weights = bad, torch.zeros(2)

    def train_step(self, step, batch):
        self.weights = self.weights + batch.ids
        spoilt = self.bad in self.steps
        return super().train_step(step, batch) | {"loss": 100.0 if spoilt else 1.0 + 0.01 * (step % 7)}

    def snapshot(self, snapshot):
        copy, steps = snapshot.copy("weights", self.weights), list(self.steps)

        def write(directory):
            save_tensors(directory / "weights.safetensors", {"weights": copy, "steps": torch.tensor(steps)})

        return write

    def load(self, directory):
        content = read_weights(directory / "weights.safetensors")
        self.weights, self.steps = content["weights"], content["steps"].tolist()


def train(stage, run, num_steps=200, **settings):
    config, ranks = LoopConfig(num_steps=num_steps, save_every=50, **settings), init_distributed("cpu")
    return fit(stage, config, RunDirectory(run, OptimizerConfig(), ranks), 1, ranks)


def test_without_a_return_a_spike_is_only_said(tmp_path, capsys):
    stage = DriftingStage()
    assert train(stage, tmp_path / "run") == 0
    assert stage.steps == list(range(200)) and "the loss of step 152 is 100" in capsys.readouterr().err


def test_a_run_goes_back_from_a_spike_and_passes_over_its_batches(tmp_path, capsys):
    stage = DriftingStage()
    assert train(stage, tmp_path / "run", spike_return_steps=10) == 0
    said = capsys.readouterr().err
    assert "goes back to step_00000100 and passes over steps 143 to 152" in said
    # Step n is number n - 1 of the stage; 151 was the first that the bad batch spoilt.
    expected = [*range(142), *range(152, 200)]
    assert stage.steps == expected
    truth = sum((torch.tensor([step, step + 1]) for step in expected), torch.zeros(2))
    assert torch.equal(stage.weights, truth)
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "100.0" not in logged
    # A resumed run passes over the same batches.
    again = DriftingStage()
    for name in ("step_00000150", "step_00000200"):
        path = tmp_path / "run" / "checkpoints" / name
        path.rename(path.with_name(name + ".tmp-0"))
    with pytest.raises(UserError, match="every checkpoint"):
        (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir()
        train(again, tmp_path / "run", spike_return_steps=10)
    (tmp_path / "run" / "checkpoints" / "step_00000001").rmdir()
    assert train(again, tmp_path / "run", spike_return_steps=10) == 0
    assert again.steps == expected


def test_without_a_checkpoint_before_it_the_run_goes_on(tmp_path, capsys):
    stage = DriftingStage(bad=45)
    assert train(stage, tmp_path / "run", spike_return_steps=10) == 0
    assert stage.steps == list(range(200)) and "no checkpoint before step" in capsys.readouterr().err


def test_a_run_does_not_go_back_for_ever(tmp_path, capsys):
    class Hopeless(DriftingStage):
        def train_step(self, step, batch):
            return super().train_step(step, batch) | {"loss": 100.0 if step > 190 else 1.0}

    stage = Hopeless()
    assert train(stage, tmp_path / "run", num_steps=240, spike_return_steps=1) == 0
    said = capsys.readouterr().err
    assert said.count("goes back to step_00000150") == 3 and "gone back often enough" in said
    assert stage.steps == [*range(191), *range(194, 240)]
