"""A comparison of the demo's networks, as small as it can be."""

from sendvae_fast.compare.plan import Comparison
from sendvae_fast.compare.settings import CompareConfig
from sendvae_fast.config import build_config, plain

PLAIN = {"key": "plain", "name": "Plain VAE", "config": "demo/vae", "settings": {"loop": {"num_steps": 2}}}
SEND = {"key": "send", "config": "demo/vae_send", "start": "plain"}
E2E = {
    "key": "e2e", "name": "REPA-E", "config": "demo/e2e", "end_to_end": True, "start": "plain",
    "settings": {"loop": {"num_steps": 2, "log_every": 1}, "preview": {"num_samples": 1, "sampler": {"num_steps": 2}}},
}  # fmt: skip
CONTENT = {
    "methods": [PLAIN, SEND],
    "pictures": {"image_size": 32, "num_train_images": 48, "num_test_images": 24},
    "foundation": {"name": "demo", "image_size": 32},
    "features": {"name": "demo"},
    "metrics": ["frechet"],
    "protocol": "adm",
    "generator": "demo/sit",
    "generator_settings": {
        "loop": {"num_steps": 2, "log_every": 1, "preview_every": 100},
        "preview": {"num_samples": 1, "sampler": {"num_steps": 2}},
    },
    "samples": {"num_samples": 6, "guidance_scale": 2.0, "sampler": {"num_steps": 2}},
}


def comparison(tmp_path, **changes):
    config = build_config(CompareConfig, CONTENT | {"run": str(tmp_path / "run")} | changes)
    return Comparison(config, plain(config) | {"methods": {method.key: plain(method) for method in config.methods}})
