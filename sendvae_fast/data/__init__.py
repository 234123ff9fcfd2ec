"""Images and latents: their catalogs and sources, their order in training, and their reading."""
