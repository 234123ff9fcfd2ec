"""A run that is resumed after any of its steps ends with the very weights of one that never stopped."""

import shutil

import pytest
import torch
from reliability_counts import counting, full_counts
from tiny_runs import cache_of, checkpoint_tensors, sit_config, vae_config

from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

STEPS = 20


@pytest.mark.slow
@pytest.mark.skipif(not full_counts(), reason="make reliability; single steps are in test_train_vae and test_train_sit")
@pytest.mark.parametrize("stage", ["vae", "sit"])
def test_resume_after_every_step(stage, images, tmp_path):
    if stage == "sit":
        plain = {"alignment": {"method": "none"}, "loss": {"gan_weight": 0.0}, "loop": {"num_steps": 1}}
        train_vae(vae_config(tmp_path / "vae", images, **plain))
        latents = cache_of(tmp_path / "vae", images, tmp_path / "latents", flips=True)

    def train(run, **loop):
        if stage == "vae":
            return train_vae(vae_config(run, images, loop={"num_steps": STEPS, **loop}))
        return train_sit(sit_config(run, images, latents, loop={"num_steps": STEPS, **loop}))

    assert train(tmp_path / "whole", save_every=1, keep_checkpoints=STEPS) == 0
    whole = checkpoint_tensors(tmp_path / "whole", STEPS)
    with counting("resume", f"resumed after each of {STEPS} steps, to the same weights bit for bit") as trials:
        for step in range(1, STEPS):
            run, name = tmp_path / f"from{step}", f"step_{step:08d}"
            shutil.copytree(tmp_path / "whole/checkpoints" / name, run / "checkpoints" / name)
            shutil.copy(tmp_path / "whole/config.yaml", run)
            with trials.trial(step):
                assert train(run) == 0
                resumed = checkpoint_tensors(run, STEPS)
                assert whole.keys() == resumed.keys()
                assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
            shutil.rmtree(run)
