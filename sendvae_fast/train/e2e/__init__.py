"""REPA-E: an autoencoder and the generator on its latents, trained together."""
