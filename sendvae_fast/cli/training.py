"""What the training verbs share: to train, or with --dry_run to look at what training would need."""

from collections.abc import Callable
from typing import Any


def train_or_look(train: Callable[..., int], config: Any) -> int:
    """Call `train` with the config of its stage, or look; returns the exit code. What plans is imported when needed."""
    if config.dry_run:
        from sendvae_fast.plan.dry_run import dry_run

        return dry_run(config)

    def planned(num_ranks: int) -> str:
        from sendvae_fast.plan.memory_advice import planned_memory_words

        return planned_memory_words(config, num_ranks)

    return train(config, planned)
