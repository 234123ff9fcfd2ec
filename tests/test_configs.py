"""Every YAML in configs/ loads, and the paper's runs have the paper's numbers."""

from pathlib import Path

import pytest
import yaml

from sendvae_fast.config import build_config, merge, read_yaml, required_keys
from sendvae_fast.sampling.job import SampleConfig
from sendvae_fast.train.sit import SiTTrainConfig
from sendvae_fast.train.vae import VAETrainConfig

ROOT = Path(__file__).parents[1] / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))
NUM_IMAGES = 1_281_167  # ImageNet-1k's training set


def config_class(file: Path) -> type:
    if file.parent.name == "sampling":
        return SampleConfig
    return VAETrainConfig if file.parent.name == "vae" or file.stem.startswith("vae") else SiTTrainConfig


def load(file: Path):
    return build_config(config_class(file), merge(required_keys(config_class(file), "x"), read_yaml(file)), str(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_loads(file):
    load(file)
    assert file.read_text().startswith("# ") and isinstance(yaml.safe_load(file.read_text()), dict)


def test_the_papers_lengths():
    send, xl, base = (load(ROOT / name) for name in ("vae/send_vae_f16d32.yaml", "sit/xl_1.yaml", "sit/b_1.yaml"))
    assert send.loop.num_steps == 80 * (NUM_IMAGES // send.data.global_batch) == 100_080
    assert xl.loop.num_steps == base.loop.num_steps == 80 * (NUM_IMAGES // xl.data.global_batch) == 400_320
    assert (send.optimizer.learning_rate, xl.optimizer.learning_rate, xl.optimizer.ema_decay) == (3e-4, 1e-4, 0.9999)
    assert (send.alignment.weight, send.alignment.depth, xl.repa.weight, xl.repa.block) == (1.0, 1, 0.5, 8)
    assert base.generator.preset == "SiT-B/1" and base.repa == xl.repa


def test_the_demos_finetunings_differ_in_the_alignment_alone():
    control, send = load(ROOT / "demo" / "vae_control.yaml"), load(ROOT / "demo" / "vae_send.yaml")
    assert control.alignment.weight == 0 and send.alignment.weight == 1
    send.alignment = control.alignment
    assert control == send
