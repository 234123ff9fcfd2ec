"""Linear probes: what can be read off the latents of pictures, from attribute files to scores with intervals."""
