"""The private parts of DeepSpeed that the engine uses: names, globals, environment, log messages.

`tests/engine/test_deepspeed_private.py` checks that no other file uses them, and that the installed DeepSpeed has each
of them, so that a version without one is known by its number before any training fails.
"""

import importlib.metadata
import logging
import os
from collections import defaultdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sendvae_fast.errors import UserError, needs_extra

TESTED_VERSIONS = ("0.19.8",)
"""The versions that the engine's tests ran on, oldest first. pyproject.toml requires the oldest or later. Up to 0.19.7
a step whose fp32 gradients are not finite is taken and not skipped."""


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed with its device set and its log limited to warnings.

    Raises:
        UserError: it is not installed.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed requires LOCAL_RANK even when the process group exists; outside torchrun the process is local rank 0.
    os.environ.setdefault("LOCAL_RANK", "0")
    # On a machine with nvcc and no GPU, torch's extension builder, which DeepSpeed imports, remarks on it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with needs_extra("train", "engine.name=deepspeed"):
        import deepspeed
        import deepspeed.ops

    # None of its compiled ops is used. On a CPU it would compile one for half a minute and announce it on stdout.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # pyright: ignore[reportAttributeAccessIssue] - made on import
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_worth_saying)
    # Its own handler writes to stdout, which belongs to the command; Python's default one writes warnings to stderr.
    for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
        logger.removeHandler(handler)
    logger.propagate = True
    return deepspeed


def _is_worth_saying(record: logging.LogRecord) -> bool:
    # DeepSpeed calls any optimizer not on its own list untested; ours is tested with every stage.
    return "untested optimizer" not in record.getMessage()


def flat_partitions(zero_optimizer: Any) -> list[Tensor]:
    """The flat fp32 parts of the parameters that the optimizer updates on this rank at ZeRO stage 3.

    Between steps the optimizer's own groups are empty at this stage.
    """
    return list(_private(zero_optimizer, "fp32_partitioned_groups_flat"))


def link_optimizer_state(zero_optimizer: Any) -> None:
    """Let DeepSpeed's public functions reach optimizer state before the first step, at ZeRO stage 1 or 2.

    The state must be there. Stage 3 finds it without help.
    """
    _private(zero_optimizer, "_lazy_init_hp_params_optimizer_state")()


def local_fragment(param: Tensor, key: str) -> tuple[int, Tensor] | None:
    """This rank's fragment of a parameter's optimizer state, flat, after its first index in the flattened parameter.

    None where the rank has nothing of it. At ZeRO stage 1 or 2, where DeepSpeed's public function makes whole tensors
    by a sum over all ranks.
    """
    mapping = _private(param, "_hp_mapping")
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        installed = importlib.metadata.version("deepspeed")
        raise UserError(
            f"DeepSpeed {installed} has no {type(owner).__name__}.{name}, which this engine needs: install one from "
            f"{TESTED_VERSIONS[0]} to {TESTED_VERSIONS[-1]}, or train with engine.name=ddp"
        ) from None
