"""Training-free downstream tasks on latents: segmentation and depth by heads of a foundation model (ReaLS)."""
