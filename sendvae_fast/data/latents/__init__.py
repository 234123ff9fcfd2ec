"""Latents on disk: the cache that we write, and LightningDiT's."""
