"""Draw how measures of autoencoders go with how well they generate: each metric's Pearson correlation with gFID.

    sendvae evaluate correlation
    sendvae evaluate correlation --runs='[runs/va,runs/e2e,runs/send]' --target=fid

Without table and runs it is of the numbers that the paper prints. Few autoencoders give wide intervals: read them.
"""

from sendvae_fast.evaluation.correlation import CorrelationConfig, evaluate_correlation

Config = CorrelationConfig


def run(config: CorrelationConfig) -> None:
    """Print and draw."""
    evaluate_correlation(config)
