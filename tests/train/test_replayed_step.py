"""A run whose steps are replayed equals one whose steps are not, bit for bit.

Recordings are tapes in place of CUDA graphs (`recording.TapeRecorder`); tests/fake_cuda has the order of the
device's work, tests/gpu the graphs.
"""

import json

import pytest
import torch
from recording import TapeRecorder
from tiny_runs import cache_of, checkpoint_tensors, sit_config, vae_config

from sendvae_fast.engine import build
from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.errors import UserError
from sendvae_fast.ops import use_attention, use_backend
from sendvae_fast.train.sit import latent_batches
from sendvae_fast.train.sit import stage as sit_stage
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae import stage as vae_stage
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

NUM_STEPS, BAD_STEP = 12, 10
ENGINE = {"name": "ddp", "accumulation_steps": 2}
SMALL = {"generator": {"width": 16, "depth": 1, "projector_width": 16}}


@pytest.fixture(scope="module", autouse=True)
def plain_ops():
    """What is compiled is one operation to a tape, which may write to what its schema does not say."""
    with use_backend("reference"), use_attention("math"):
        yield


@pytest.fixture(scope="module")
def latents(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    none = {"alignment": {"method": "none"}, "loss": {"gan_weight": 0.0}, "loop": {"num_steps": 1}}
    train_vae(vae_config(root / "vae", images, **none))
    return cache_of(root / "vae", images, root / "latents")


@pytest.fixture
def recorder(monkeypatch):
    """The recorder of runs with `engine.cuda_graph`."""
    recorder = TapeRecorder()
    for stage in (sit_stage, vae_stage):
        monkeypatch.setattr(stage, "build_recorder", lambda config, _: recorder if config.cuda_graph else None)
    return recorder


@pytest.fixture(autouse=True)
def few_first_steps(monkeypatch):
    """Steps before a recording, so that a resumed run comes to one as well. DDP's number is for more than one rank."""
    monkeypatch.setattr(build, "NUM_FIRST_STEPS", 2)


@pytest.fixture
def bad_batch(monkeypatch):
    """A batch whose latents are not finite, at `BAD_STEP`."""
    batches = latent_batches.TrainingLatents.batches

    def with_a_bad_one(self, start_step):
        for step, batch in enumerate(batches(self, start_step), start=start_step):
            yield batch._replace(mean=torch.full_like(batch.mean, torch.nan)) if step == BAD_STEP else batch

    monkeypatch.setattr(latent_batches.TrainingLatents, "batches", with_a_bad_one)


def logged(run):
    """The values in a run's log that its steps computed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    computed = ("loss", "velocity", "align", "align_weight", "psnr", "kl", "gan", "gan_weight", "discriminator")
    return [json.dumps({name: line[name] for name in (*computed, "grad_norm") if name in line}) for line in lines]


def test_a_replayed_stage2_run_is_the_same_run(images, latents, recorder, bad_batch, tmp_path):
    """12 steps, one of them not finite, two kinds of noise levels, and half of them resumed, which is recorded anew."""
    settings = {**SMALL, "flow": {"noise_level": "logit_normal", "logit_normal_steps": 3}}
    for name, cuda_graph, stops in (("plain", False, (NUM_STEPS,)), ("graph", True, (NUM_STEPS // 2, NUM_STEPS))):
        for stop in stops:
            engine = {**ENGINE, "cuda_graph": cuda_graph}
            train_sit(sit_config(tmp_path / name, images, latents, engine=engine, loop={"num_steps": stop}, **settings))
    assert recorder.num_recordings == 3  # both kinds, then the second in the resumed run
    plain, graph = (checkpoint_tensors(tmp_path / name, NUM_STEPS) for name in ("plain", "graph"))
    assert plain.keys() == graph.keys() and any("ema" in name for name in plain)
    for name in plain:
        assert torch.equal(plain[name], graph[name]), name
    for name in ("plain", "graph"):
        state = json.loads(next((tmp_path / name).glob(f"**/step_{NUM_STEPS:08d}/engine/sit/state.json")).read_text())
        assert state["num_skipped"] == 1 and state["num_updates"] == NUM_STEPS - 1
    assert logged(tmp_path / "plain") == logged(tmp_path / "graph")


def test_a_replayed_stage1_run_is_the_same_run(images, recorder, tmp_path):
    """With a discriminator that begins to learn during the run, a GAN weight that rises, and both adaptive weights.

    Half of it is resumed, and recorded anew.
    """
    loss = {"gan_start_step": 3, "gan_warmup_steps": 20, "gan_adaptive": True, "perceptual": None}
    settings = {"loss": loss, "alignment": {"method": "va"}}
    for name, stops in (("plain", (NUM_STEPS,)), ("graph", (NUM_STEPS // 2, NUM_STEPS))):
        for stop in stops:
            engine = {"name": "ddp", "cuda_graph": name == "graph"}
            train_vae(vae_config(tmp_path / name, images, engine=engine, loop={"num_steps": stop}, **settings))
    assert recorder.num_recordings == 3  # with and without a learning discriminator, then with one again
    plain, graph = (checkpoint_tensors(tmp_path / name, NUM_STEPS) for name in ("plain", "graph"))
    assert plain.keys() == graph.keys() and any("discriminator" in name for name in plain)
    for name in plain:
        assert torch.equal(plain[name], graph[name]), name
    assert logged(tmp_path / "plain") == logged(tmp_path / "graph")


def test_what_cannot_be_recorded_is_refused_in_a_line(images, latents, tmp_path):
    with pytest.raises(UserError, match="cuda_graph does not work with DeepSpeed.*: set engine.name=ddp"):
        EngineConfig(cuda_graph=True)
    engine = {"name": "ddp", "cuda_graph": True}
    with pytest.raises(UserError, match="engine.cuda_graph needs a GPU, and there is none here"):
        train_sit(sit_config(tmp_path / "run", images, latents, engine=engine))
