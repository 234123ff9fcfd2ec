"""A long run holds no more than a short one: memory, Python objects, descriptors, threads.

`make soak` runs it for 20,000 steps of either stage.
"""

import os

import pytest
from reliability_counts import record
from soak import give_back_free_memory, growth, look, table
from tiny_runs import cache_of, sit_config, vae_config

from sendvae_fast.engine.watchdog import Watchdog
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("SENDVAE_SOAK", "140"))
IS_LONG = STEPS >= 5000
EVERY = 100 if IS_LONG else 10
"""Steps between looks at what is held."""
LOOP = {"num_steps": STEPS, "log_every": 5, "save_every": 6 * EVERY, "preview_every": 9 * EVERY}
AT_MOST = {"files": 0, "threads": 0, "objects": 20, "used_kib": 50, "rss_kib": 1024}
"""Growth in 1,000 steps of a long run. Ten objects are the looks themselves, some are patterns of file names that
Python keeps, up to a number. Resident memory grows more than what is in use: malloc keeps what was freed in pieces."""
AT_MOST_BRIEFLY = {"files": 0, "threads": 0, "objects": 1000}
"""The same of a short one, in which caches still fill: an object a step is noticed."""


def train(stage, images, folder):
    data = {"global_batch": 8 if IS_LONG else 2}
    if stage == "vae":
        return train_vae(vae_config(folder / "run", images, data=data, loop=LOOP))
    plain = {"alignment": {"method": "none"}, "loss": {"gan_weight": 0.0}, "loop": {"num_steps": 1}}
    train_vae(vae_config(folder / "vae", images, **plain))
    latents = cache_of(folder / "vae", images, folder / "latents")
    return train_sit(sit_config(folder / "run", images, latents, data=data, loop=LOOP, autoencoder=str(folder / "vae")))


@pytest.mark.parametrize("stage", ["sit", "vae"] if IS_LONG else ["sit"])
def test_a_long_run_holds_no_more_than_a_short_one(stage, images, tmp_path, monkeypatch):
    seen, finished = [], Watchdog.finished

    def look_now_and_then(self, step):
        finished(self, step)
        if step % EVERY == EVERY // 2:
            seen.append(look(step))

    monkeypatch.setattr(Watchdog, "finished", look_now_and_then)
    assert train(stage, images, tmp_path) == 0
    rates = {name: round(growth(seen, name), 1) for name in AT_MOST}
    print(f"{table(seen)}\nresident after malloc_trim: {give_back_free_memory()} KiB\nin 1,000 steps: {rates}")
    bounds = AT_MOST if IS_LONG else AT_MOST_BRIEFLY
    assert {name: rates[name] for name in bounds if rates[name] > bounds[name]} == {}
    record("soak", f"steps of {stage}", tried=STEPS, survived=STEPS)
