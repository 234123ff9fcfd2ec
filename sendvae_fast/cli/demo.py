"""Run everything end to end on a small scale and write a report: no downloads, no GPU needed.

    sendvae demo                          on rendered scenes with known attributes
    sendvae demo --data=FOLDER            on your own ImageFolder of photographs
    sendvae demo --methods="[plain, control, send, va, reals, e2e]"

Trains a plain VAE, fine-tunes it with and without the alignment loss for equal steps, trains a SiT with REPA on the
latents of each, samples with guidance, evaluates, and writes RUN/report.html. The same command again goes on.
"""

from sendvae_fast.demo.settings import DemoConfig

Config = DemoConfig
MAIN_OPTIONS = (
    "run",
    "data",
    "methods",
    "seed",
    "vae_steps",
    "finetune_steps",
    "generator_steps",
    "generate.num_samples",
)


def run(config: DemoConfig) -> int:
    """Run all of it; returns the exit code."""
    from sendvae_fast.demo.demo import run_demo

    return run_demo(config)
