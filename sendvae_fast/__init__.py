"""A training engine for generation-friendly VAEs (Send-VAE) and the flow transformers on top of them."""

__version__ = "0.1.0"
