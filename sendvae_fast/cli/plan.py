"""Say what a training run would need: memory, arithmetic, time, money, disk. Nothing is read, trained or written.

    sendvae plan train vae --config vae/send_vae_f16d32 --gpus=32 --gpu=H200
    sendvae plan train sit --config sit/xl_1 --gpus=8 --engine.zero_stage=2 --price=2.5
    sendvae plan train vae --config vae/send_vae_f16d32 --sweep

The options of `train` follow as they will be given to it; those of the plan stand beside them. Memory is counted in the
run's own step on tensors without content; time is a model on paper, and every plan ends with what it assumes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from sendvae_fast.config import build_config, merge, read_files, required_keys
from sendvae_fast.errors import UserError
from sendvae_fast.plan.settings import PlanConfig

Config = PlanConfig
PLACEHOLDER = "(not given)"


def run_for(config_class: type, files: list[Path], overrides: dict[str, Any]) -> None:
    """Print the plan of a run whose settings are `config_class`'s; what they require and nobody gives is not needed."""
    if not hasattr(config_class, "dry_run"):
        raise UserError("plans are of training runs: `sendvae plan train vae ...`, `train sit` or `train e2e`")
    own = {field.name for field in dataclasses.fields(PlanConfig)}
    plan = build_config(PlanConfig, {key: value for key, value in overrides.items() if key in own}, "the command line")
    of_run = {key: value for key, value in overrides.items() if key not in own}
    content = merge(required_keys(config_class, PLACEHOLDER), merge(read_files(files), of_run))
    of_stage = build_config(config_class, content)

    from sendvae_fast.plan.plan import Planner
    from sendvae_fast.plan.words import plan_words, sweep_words

    planner = Planner(of_stage, plan)
    if plan.sweep:
        plans = planner.sweep()
        print(json.dumps([one.as_json() for one in plans], indent=1) if plan.json else sweep_words(plans, plan))
    else:
        one = planner.one()
        print(json.dumps(one.as_json(), indent=1) if plan.json else plan_words(one, plan))
