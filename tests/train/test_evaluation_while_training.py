"""A run measures itself: the same numbers as `sendvae evaluate` gives, once per interval, and no other training."""

import itertools
import json
import math
from typing import NamedTuple

import pytest
import torch
from tiny_runs import cache_of, checkpoint_tensors, sit_config, vae_config

from sendvae_fast.config import build_config
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.loggers import GROUPS
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.generation import evaluate_generation
from sendvae_fast.evaluation.job import Evaluation
from sendvae_fast.evaluation.reconstruction import evaluate_reconstruction
from sendvae_fast.evaluation.result import Measurement, WeightsOrigin, append_results, read_results
from sendvae_fast.evaluation.settings import GenerationConfig, ReconstructionConfig
from sendvae_fast.train.evaluator import Evaluator
from sendvae_fast.train.loop import fit
from sendvae_fast.train.settings import LoopConfig
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

DEMO = {"features": {"name": "demo"}}
DRAWN = {"num_samples": 6, "batch_size": 6, "guidance_scale": 1.0, "sampler": {"num_steps": 2}}


def quiet(line):
    pass


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in ("time_s", *GROUPS["speed"])} for line in lines]


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """The same four steps of each stage, measured every second step and not."""
    root = tmp_path_factory.mktemp("runs")
    for name, every in (("plain", None), ("measured", 2)):
        evaluation = {} if every is None else DEMO
        loop = {"num_steps": 4, "evaluate_every": every}
        train_vae(vae_config(root / f"vae_{name}", images, loop=loop, evaluation=evaluation))
        if name == "plain":
            cache_of(root / "vae_plain", images, root / "latents")
        if every is not None:
            evaluation = {**DEMO, "generate": DRAWN}
        train_sit(
            sit_config(
                root / f"sit_{name}", images, root / "latents",
                autoencoder=str(root / "vae_plain"), loop=loop, evaluation=evaluation,
            )
        )  # fmt: skip
    return root


@pytest.mark.parametrize("stage", ["vae", "sit"])
def test_measuring_changes_no_bit_of_training(runs, stage):
    plain, measured = (checkpoint_tensors(runs / f"{stage}_{name}", 4) for name in ("plain", "measured"))
    assert plain.keys() == measured.keys() and all(torch.equal(plain[name], measured[name]) for name in plain)
    lines = [line for line in metrics(runs / f"{stage}_measured") if "loss" in line]
    assert without_times(lines) == without_times(metrics(runs / f"{stage}_plain"))
    previews = [(runs / f"{stage}_{name}" / "samples").glob("*.png") for name in ("plain", "measured")]
    for ours, theirs in zip(*map(sorted, previews), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("stage", ["vae", "sit"])
def test_results_are_those_of_sendvae_evaluate(runs, images, stage, tmp_path):
    """Of the last checkpoint: names, values, intervals, counts, protocols, features and the hash of the weights."""
    run, settings = runs / f"{stage}_measured", {**DEMO, "out": str(tmp_path / "results.jsonl")}
    if stage == "vae":
        config = build_config(ReconstructionConfig, {**settings, "autoencoder": str(run), "data": str(images)})
        expected = evaluate_reconstruction(config, quiet)
    else:
        settings |= {"generator": str(run), "autoencoder": str(runs / "vae_plain"), "reference": str(images)}
        config = build_config(GenerationConfig, {**settings, "generate": DRAWN, "batch_size": 6})
        expected = evaluate_generation(config, quiet)
    found = {result.metric: result for result in read_results(run / "evaluation.jsonl") if result.step == 4}
    role = "autoencoder" if stage == "vae" else "generator"
    assert found.keys() <= {result.metric for result in expected}
    assert len(found) == (3 if stage == "vae" else 4), "no LPIPS weights, no logits, no KID and no FID-infinity"
    for result in expected:
        if (own := found.get(result.metric)) is None:
            continue
        for name in ("interval_of", "counts", "protocol", "features"):
            assert getattr(own, name) == getattr(result, name), (result.metric, name)
        # To rounding: weights that were loaded lie elsewhere in memory than those in training, and PyTorch's kernels
        # sum by how their inputs are aligned. A difference of means is a small part of what is subtracted. One grey
        # level that tips over moves the Fréchet distance of so few pictures by up to 2e-5 of it, a step by a tenth.
        close = 1e-4 if "frechet" in result.metric else 1e-5
        assert own.value == pytest.approx(result.value, rel=close), result.metric
        assert (own.interval or ()) == pytest.approx(result.interval or (), rel=1e-4), result.metric
        assert own.details.keys() == result.details.keys(), result.metric
        assert own.weights[role].sha256 == result.weights[role].sha256 and own.while_training
        assert own.weights[role].step == result.weights[role].step == 4
        assert own.pictures.keys() == result.pictures.keys() and not result.while_training
    remark = "these pictures are among those that it is trained on"
    assert all((remark in result.remarks) == (stage == "vae") for result in found.values())


@pytest.mark.parametrize("stage", ["vae", "sit"])
def test_numbers_are_logged_with_their_names_and_counts(runs, stage):
    run = runs / f"{stage}_measured"
    results = read_results(run / "evaluation.jsonl")
    logged = {line["step"]: line for line in metrics(run) if "evaluation/seconds" in line}
    assert list(logged) == [2, 4] == sorted({result.step for result in results})
    for result in results:
        line = logged[result.step]
        assert line[f"evaluation/{result.metric}"] == result.value
        assert all(line[f"evaluation/num_{what}"] == num for what, num in result.counts.items())
    assert not (run / "evaluation.jsonl.training").exists(), "features go when the run is done"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loop": {"evaluate_every": 2}}, "features of inception need its weights: .*sha256"),
        ({"evaluation": {"features": {"weights": "absent.pth"}}}, "the weights of inception are not at absent.pth"),
        ({"evaluation": {**DEMO, "data": "absent"}}, "absent"),
        ({"loop": {"evaluate_every": 0}}, "loop.evaluate_every is 0: it must be at least 1"),
    ],
)
def test_what_is_missing_is_found_before_the_first_step(settings, said, images, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        train_vae(vae_config(tmp_path / "run", images, **settings))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_drawing_needs_an_autoencoder(runs, images, tmp_path):
    with pytest.raises(UserError, match="draws pictures: give --autoencoder"):
        train_sit(sit_config(tmp_path / "run", images, runs / "latents", evaluation=DEMO))
    assert not (tmp_path / "run").exists()


class Counter(Evaluator):
    """Measures the number of steps, and fails at those that are told."""

    def __init__(self, run, every, num_steps, fails=None):
        super().__init__(run, every, num_steps, Distributed())
        self.fails, self.measured = fails or {}, []

    def measure(self, stage, step):
        self.measured.append(step)
        if step in self.fails:
            raise self.fails[step]
        weights = {"generator": WeightsOrigin(path="run", sha256=str(stage.steps), step=step)}
        return Evaluation(weights=weights), [Measurement(metric="steps", value=float(step), protocol="counted")]


class Batch(NamedTuple):
    ids: torch.Tensor


class CountedStage:
    title, dtype, learning_rate, flops_by_part = "counted", torch.float32, 1e-4, None

    def facts(self):
        return {}

    def next_command(self):
        return "sendvae sample"

    def __init__(self, killed_after=math.inf):
        self.steps, self.killed_after = 0, killed_after

    def batches(self, start_step):
        return (Batch(torch.tensor([step])) for step in itertools.count(start_step))

    def train_step(self, step, batch):
        if step >= self.killed_after:
            raise KeyboardInterrupt
        self.steps = step + 1
        return {"loss": 1.0, "grad_norm": 1.0}

    def snapshot(self, snapshot):
        return lambda directory: (directory / "weights").touch()

    def load(self, directory):
        self.steps = int(directory.name.removeprefix("step_"))

    def preview(self, step, directory):
        pass


def go(run, evaluator, killed_after=math.inf):
    config, ranks = (
        LoopConfig(num_steps=evaluator.num_steps, save_every=30, save_in_background=False),
        init_distributed("cpu"),
    )
    stage = CountedStage(killed_after)
    return fit(stage, config, RunDirectory(run, OptimizerConfig(), ranks), 1, ranks, evaluator=evaluator)


def recorded(run):
    return [(result.step, result.value) for result in read_results(run / "evaluation.jsonl")]


ALL = [(20, 20.0), (40, 40.0), (60, 60.0), (70, 70.0)]


@pytest.mark.parametrize("at", [20, 40, 60, 70])
def test_an_evaluation_that_was_interrupted_is_made_once(at, tmp_path):
    """60 is the step of a checkpoint, 70 the last one: the first is resumed from, the second from its own."""
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Counter(tmp_path, 20, 70, {at: KeyboardInterrupt()}))
    again = Counter(tmp_path, 20, 70)
    assert go(tmp_path, again) == 0
    assert recorded(tmp_path) == ALL
    resumed_from = {20: 0, 40: 30, 60: 60, 70: 70}[at]
    assert again.measured == [step for step, _ in ALL if step >= max(resumed_from, 1)]


@pytest.mark.parametrize("killed_after", [21, 45, 60, 69])
def test_steps_that_are_taken_again_are_measured_again(killed_after, tmp_path):
    """The results are those of the steps that stand, as the curves are."""
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Counter(tmp_path, 20, 70), killed_after)
    assert go(tmp_path, Counter(tmp_path, 20, 70)) == 0
    assert recorded(tmp_path) == ALL


def test_a_finished_run_is_not_measured_again_and_a_longer_one_goes_on(tmp_path):
    theirs = Measurement(metric="by hand", value=1.0, protocol="counted")
    go(tmp_path, Counter(tmp_path, 20, 70))
    append_results(tmp_path / "evaluation.jsonl", Evaluation().finish([theirs], None, quiet))
    again = Counter(tmp_path, 20, 70)
    assert go(tmp_path, again) == 0 and again.measured == []
    longer = Counter(tmp_path, 20, 90)
    assert go(tmp_path, longer) == 0 and longer.measured == [80, 90]
    assert recorded_by_run(tmp_path) == [20, 40, 60, 70, 80, 90]
    assert [result.metric for result in read_results(tmp_path / "evaluation.jsonl")].count("by hand") == 1


def recorded_by_run(run):
    return [result.step for result in read_results(run / "evaluation.jsonl") if result.while_training]


def test_what_cannot_be_measured_is_a_warning(tmp_path, capsys):
    evaluator = Counter(tmp_path, 20, 70, {40: UserError("features are not finite")})
    assert go(tmp_path, evaluator) == 0
    assert "step 40 was not evaluated (features are not finite); training goes on" in capsys.readouterr().err
    assert recorded(tmp_path) == [ALL[0], *ALL[2:]]
