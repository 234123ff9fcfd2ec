"""Measure how far generated pictures are from real ones, in the features of a network.

    sendvae evaluate generation --samples=samples/xl --reference=imagenet/train

A number carries its features in its name. Results are added to `evaluation.jsonl` in the generator's run, a JSON line
each with everything that decides it; `sendvae report` shows them.
"""

from sendvae_fast.evaluation.generation import GenerationConfig, evaluate_generation

Config = GenerationConfig


def run(config: GenerationConfig) -> None:
    """Measure and print."""
    evaluate_generation(config)
