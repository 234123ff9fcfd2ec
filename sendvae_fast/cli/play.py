"""Try trained networks by hand in a browser: reconstruct a picture, move its attributes, generate others.

    sendvae play runs/demo
    sendvae play runs/send runs/control --attributes=celeba --benchmark=celeba

The page is served to this machine alone and fetches nothing from elsewhere. Several runs are shown side by side.
"""

from sendvae_fast.play.settings import PlayConfig

Config = PlayConfig
POSITIONAL = "runs"
MAIN_OPTIONS = ("autoencoder", "attributes", "benchmark", "direction", "image_size", "host", "port")


def run(config: PlayConfig) -> None:
    """Serve the page until it is stopped."""
    from sendvae_fast.play.server import play

    play(config)
