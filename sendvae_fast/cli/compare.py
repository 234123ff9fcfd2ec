"""Train or take several autoencoders, the same generator on each, and put them on one page.

    sendvae compare compare/scenes --run=runs/compare
    sendvae compare my.yaml --run=runs/photos --pictures.data=FOLDER --seeds="[0, 1, 2]"

The same command goes on in the folder. Several may run at once, on machines that share it or as tasks of a Slurm array:
each takes what nobody else does. RUN/report.html fills as parts finish; docs/compare.md says how to write my.yaml.
"""

from sendvae_fast.compare.settings import CompareConfig

Config = CompareConfig
POSITIONAL = "config"
MAIN_OPTIONS = (
    "only",
    "seeds",
    "control",
    "pictures.data",
    "pictures.held_out",
    "foundation.weights",
    "features.weights",
    "reference",
    "curve_every",
    "samples.num_samples",
)


def run(config: CompareConfig) -> int:
    """Do what is left of it; returns the exit code."""
    from sendvae_fast.compare.compare import run_compare

    return run_compare(config)
