"""Measure how far generated pictures are from real ones: FID and its like, in the features of a network.

    sendvae evaluate generation --samples=samples/xl --reference=VIRTUAL_imagenet256_labeled.npz --features.weights=...
    sendvae evaluate generation --generator=runs/xl --autoencoder=runs/send --reference=imagenet/train ...

A number carries its features in its name; FID, sFID, Inception score, precision and recall are Inception's, by the ADM
protocol. Results are added to `evaluation.jsonl` in the generator's run, a JSON line each with everything that decides
it; `sendvae report` shows them. Runs on several ranks, and goes on where it was interrupted.
"""

from sendvae_fast.evaluation.settings import GenerationConfig

Config = GenerationConfig
MAIN_OPTIONS = (
    "samples",
    "generator",
    "autoencoder",
    "generate.num_samples",
    "features.name",
    "features.weights",
    "features_dir",
    "batch_size",
    "out",
)


def run(config: GenerationConfig) -> None:
    """Measure and print."""
    from sendvae_fast.evaluation.generation import evaluate_generation

    evaluate_generation(config)
