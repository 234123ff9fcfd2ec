"""What a plan says where a device had no memory left: what the run takes, and what with other settings."""

from __future__ import annotations

import dataclasses

from sendvae_fast.config import plain
from sendvae_fast.errors import UserError
from sendvae_fast.plan.fake_step import TrainConfig
from sendvae_fast.plan.machines import machines_here
from sendvae_fast.plan.plan import Planner
from sendvae_fast.plan.words import GIB, largest_words
from sendvae_fast.train.memory_advice import smaller_engines


def planned_memory_words(config: TrainConfig, num_ranks: int) -> str:
    """The planned memory of a GPU as the run is, the most pictures at once that fit, and each setting that takes less.

    It takes a few pretended steps on the CPU, and nothing of the device.
    """
    machines = machines_here(num_ranks)
    now = Planner(config, machines).one()
    takes = f"{now.memory.total / GIB:.2f} of the {now.gpu_bytes / GIB:.2f} GiB of a {now.gpu}"
    words = [f"by the plan it takes {takes} with {now.pictures_at_once} pictures at once, {largest_words(now)}"]
    for setting, changes in smaller_engines(plain(config), num_ranks):
        try:
            changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, **changes))
            total = Planner(changed, machines).memory().total
        except UserError:  # settings that exclude each other, or a batch that does not divide
            continue
        words.append(f"with {setting} {total / GIB:.2f} GiB")
    return "; ".join(words)
