"""What images and latents there are, in which order they come, and how they are read."""
