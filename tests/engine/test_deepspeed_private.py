"""What the engine takes from DeepSpeed beside its public interface: it is there, it works, and one file knows it.

For another version than the installed one, whose number the failures name:

    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target FOLDER deepspeed==VERSION
    PYTHONPATH=FOLDER:. pytest tests/engine
"""

import importlib.metadata
import logging
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import make_engine, make_network

from sendvae_fast.engine import deepspeed_private
from sendvae_fast.engine.deepspeed_private import TESTED_VERSIONS
from sendvae_fast.errors import UserError

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.metadata.version("deepspeed")
PRIVATE = re.compile(
    r"\bds_[a-z]|\bDS_[A-Z]|_hp_|_z3_|__compatible_ops__|single_partition_of|partitioned_groups|\bimport deepspeed"
)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_linked_state_is_reached_before_the_first_step(stage, one_rank):
    engine = make_engine(f"zero{stage}", make_network())
    utils = deepspeed_private.import_deepspeed(one_rank.device).utils
    value = torch.arange(320.0 * 320).reshape(320, 320)
    utils.safe_set_full_optimizer_state(engine.module.middle.weight, value, "ema")
    assert torch.equal(utils.safe_get_full_optimizer_state(engine.module.middle.weight, "ema"), value), INSTALLED
    start, fragment = deepspeed_private.local_fragment(engine.module.middle.weight, "ema")
    assert start == 0 and torch.equal(fragment, value.flatten()), INSTALLED
    engine.close()


@pytest.mark.slow
def test_flat_partitions_are_what_the_optimizer_updates(one_rank):
    engine = make_engine("zero3", make_network())
    partitions = deepspeed_private.flat_partitions(engine._engine.optimizer)
    assert sum(part.numel() for part in partitions) == sum(param.ds_numel for param in engine.trained.values())
    x = torch.ones(2, 6)
    before = [part.clone() for part in partitions]
    engine.backward(engine(x).square().mean())
    assert not engine.step().skipped
    for part, old in zip(partitions, before, strict=True):
        assert part in engine.optimizer.state and not torch.equal(part, old), INSTALLED
    engine.close()


def test_no_op_is_compiled_and_nothing_is_said_on_stdout(one_rank, capsys):
    deepspeed_private.import_deepspeed(one_rank.device)
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None, f"DeepSpeed {INSTALLED} compiles an op on a CPU"
    logger = logging.getLogger("DeepSpeed")
    logger.warning("You are using an untested optimizer")
    logger.info("a detail")
    assert not [handler for handler in logger.handlers if getattr(handler, "stream", None) is sys.stdout]
    assert capsys.readouterr().out == ""
    assert logger.filter(logging.makeLogRecord({"msg": "untested optimizer"})) is False
    assert logger.filter(logging.makeLogRecord({"msg": "something else"}))


@pytest.mark.parametrize(
    "use",
    [
        deepspeed_private.flat_partitions,
        deepspeed_private.link_optimizer_state,
        lambda param: deepspeed_private.local_fragment(param, "ema"),
    ],
)
def test_a_version_without_a_name_is_named(use):
    with pytest.raises(
        UserError, match=rf"^DeepSpeed {re.escape(INSTALLED)} has no SimpleNamespace\.\w+.*engine.name=ddp"
    ):
        use(SimpleNamespace())


def test_one_file_knows_private_names():
    """No other file of the package has one of them, or imports DeepSpeed."""
    known = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sendvae_fast").rglob("*.py")
        if PRIVATE.search(path.read_text(encoding="utf-8"))
    }
    assert known == {"sendvae_fast/engine/deepspeed_private.py"}


def test_the_installed_version_is_a_tested_one():
    """Whoever takes another adds it here, when the tests of the engine pass with it."""
    assert INSTALLED in TESTED_VERSIONS, f"DeepSpeed {INSTALLED} is not among {TESTED_VERSIONS}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"deepspeed>={TESTED_VERSIONS[0]}" in extras["train"]
    assert f"deepspeed=={TESTED_VERSIONS[-1]}" in (ROOT / "requirements-deepspeed.txt").read_text().splitlines()
