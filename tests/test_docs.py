"""The documentation's commands are commands: verbs, config files and keys that exist, through torchrun's parser."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from sendvae_fast.cli.main import main
from sendvae_fast.config import build_config, flag_keys, parse_overrides
from sendvae_fast.plan.settings import PlanConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/data.md", "docs/stage1.md", "docs/stage2.md", "docs/end_to_end.md", "docs/clusters.md"]
PAGES += ["docs/planning.md"]


def commands():
    """(page, words) of every sendvae command in a code block; what stands after three spaces or a # is a remark."""
    for page in PAGES:
        text = re.sub(r"\\\n +", "", (ROOT / page).read_text())
        for line in re.findall(r"^    (?:srun )?((?:\.venv/bin/)?(?:sendvae|torchrun) .*)", text, re.MULTILINE):
            words = shlex.split(re.split(" {3}", line)[0], comments=True)
            if "..." not in words:
                yield pytest.param(words, id=f"{page}:{' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_understood(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = words
    if program == "torchrun":
        launched = get_args_parser().parse_args([word.replace("$FIRST_NODE", "node0") for word in arguments])
        assert (launched.module, launched.training_script) == (True, "sendvae_fast")
        arguments = launched.training_script_args
    if arguments[:2] in (["config", "show"], ["weights", "check"]):
        arguments = arguments[2:]
    if arguments[0] == "plan":
        names = {f"--{field.name}" for field in dataclasses.fields(PlanConfig)}
        own = [word for word in arguments if word.partition("=")[0] in names]
        build_config(PlanConfig, parse_overrides(own, flag_keys(PlanConfig)))
        arguments = [word for word in arguments[1:] if word not in own]
    assert main(["config", "show", *arguments]) == 0, capsys.readouterr().err
