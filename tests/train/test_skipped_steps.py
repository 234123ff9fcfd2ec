"""Steps whose gradients are not finite: what is said of the first, how many are counted, and the step made again."""

import json
import math

import pytest
import torch
from tiny_runs import vae_config

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.errors import UserError
from sendvae_fast.train.replay import check_watchable
from sendvae_fast.train.skipped_steps import SkippedSteps, first_not_finite
from sendvae_fast.train.vae.stage import VAEStage, train_vae


def of_step(grad_norm=1.0, **terms):
    return {"loss": sum(terms.values()), **terms, "grad_norm": grad_norm}


def test_the_first_is_explained_and_all_are_counted(capsys):
    skipped, ids = SkippedSteps(Distributed(), "train vae"), torch.arange(10)
    skipped.see(1, of_step(kl=1.0, align=2.0), ids)
    assert skipped.take_count() == 0 and capsys.readouterr().err == ""
    skipped.see(2, of_step(math.nan, kl=1.0, align=math.nan), ids)
    skipped.see(3, of_step(math.inf, kl=math.nan, align=2.0), ids)
    assert skipped.take_count() == 2 and skipped.take_count() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "step 2 was skipped" in line and "`align` on rank 0" in line and "--replay=2`" in line
    assert "(samples 0, 1, 2, 3, 4, 5, 6, 7 and 2 more)" in line


def test_on_the_device_it_is_read_a_step_late(capsys):
    skipped = SkippedSteps(Distributed(), "train vae")
    skipped.see(1, of_step(torch.tensor(math.nan), kl=torch.tensor(1.0)), torch.arange(2))
    assert capsys.readouterr().err == ""
    skipped.see(2, of_step(torch.tensor(1.0), kl=torch.tensor(1.0)), torch.arange(2))
    assert "step 1 was skipped" in (said := capsys.readouterr().err) and "the backward pass" in said


def test_the_sum_of_the_terms_is_named_last():
    values = {"loss": math.nan, "psnr": 1.0, "kl": math.inf, "grad_norm": math.nan}
    assert first_not_finite(values) == "kl"
    assert first_not_finite({"loss": math.nan, "psnr": 1.0, "grad_norm": math.nan}) == "loss"
    assert first_not_finite({"loss": 1.0, "psnr": 1.0, "grad_norm": math.nan}) is None


@pytest.mark.parametrize(
    ("engine", "remedy"),
    [
        ({"compile": True}, "engine.compile=false"),
        ({"name": "ddp", "cuda_graph": True}, "engine.cuda_graph=false"),
        ({"zero_stage": 3}, "engine.zero_stage=2"),
    ],
)
def test_an_engine_whose_steps_hooks_do_not_see_is_refused(engine, remedy):
    with pytest.raises(UserError, match=f"--replay cannot look .* --{remedy}"):
        check_watchable(EngineConfig(**engine))
    check_watchable(EngineConfig(name="ddp", zero_stage=3, recompute=True))


BROKEN_STEP = 4


@pytest.fixture
def broken_kl(monkeypatch):
    """The KL of one step has no finite value, as if the encoder's variances had overflowed."""
    loss, train_step, now = VAEStage._loss, VAEStage.train_step, []

    def noted(self, step, batch):
        now.append(step + 1)
        return train_step(self, step, batch)

    def broken(self, images, x, output, *rest):
        losses = loss(self, images, x, output, *rest)
        if now[-1] == BROKEN_STEP:
            losses["kl"] = losses["kl"] * output.moments.sum() * math.inf
            losses["loss"] = losses["loss"] + losses["kl"]
        return losses

    monkeypatch.setattr(VAEStage, "train_step", noted)
    monkeypatch.setattr(VAEStage, "_loss", broken)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_skipped_step_is_made_again_and_looked_into(images, tmp_path, broken_kl, capsys):
    loop = {"num_steps": 5, "save_every": 2, "keep_checkpoints": 5}
    settings = {"loop": loop, "alignment": {"method": "none"}, "loss": {"gan_weight": 0.0}}
    assert train_vae(vae_config(tmp_path / "run", images, **settings)) == 0
    said = capsys.readouterr().err
    assert f"step {BROKEN_STEP} was skipped" in said and "`kl` on rank 0 (samples " in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 0]

    before = contents(tmp_path / "run")
    assert train_vae(vae_config(tmp_path / "run", images, **settings, replay=BROKEN_STEP)) == 0
    report = capsys.readouterr().out
    assert f"step {BROKEN_STEP} of {tmp_path / 'run'}, from step_00000002" in report
    assert "first value that is not finite: kl" in report
    samples = said.partition("(samples ")[2].partition(")")[0]
    assert f"rank 0: samples {samples}" in report
    assert "vae: weights before the step: finite" in report
    assert "vae: first module with an output that is not finite: none" in report
    assert (
        "order of the backward pass: 0 of" not in report and "autoencoder.encoder.conv_out.bias (100% of it)" in report
    )
    # The step before is sound, and its loss that of the run.
    assert train_vae(vae_config(tmp_path / "run", images, **settings, replay=3)) == 0
    report = capsys.readouterr().out
    assert f"loss {lines[2]['loss']:.4g}" in report and f"grad_norm {lines[2]['grad_norm']:.4g}" in report
    assert "not finite: none" in report and "backward pass: 0 of" in report and "largest gradients: " in report
    with pytest.raises(UserError, match="--replay cannot look into this engine's steps"):
        train_vae(vae_config(tmp_path / "run", images, **settings, engine={"compile": True}, replay=3))
    assert contents(tmp_path / "run") == before
    with pytest.raises(UserError, match="no run in"):
        train_vae(vae_config(tmp_path / "other", images, **settings, replay=3))
    assert not (tmp_path / "other").exists()
