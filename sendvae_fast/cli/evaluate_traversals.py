"""Move latents along attributes' directions and see what changes: strips of pictures, and a matrix of effects.

    sendvae evaluate traversals --autoencoders='[runs/control,runs/send]' --train_data=scenes/train --data=scenes/test

Probes on another network's features judge the decoded pictures: the diagonal of the matrix is the point. Figures go to
`folder`, results to `evaluation.jsonl` in each autoencoder's run.
"""

from sendvae_fast.evaluation.settings import TraversalsConfig

Config = TraversalsConfig
MAIN_OPTIONS = ("benchmark", "train_data", "split", "direction", "num_pictures", "num_shown", "folder", "cache")


def run(config: TraversalsConfig) -> None:
    """Measure, print and draw."""
    from sendvae_fast.evaluation.traversals import evaluate_traversals

    evaluate_traversals(config)
