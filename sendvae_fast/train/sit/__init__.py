"""Stage 2: settings, latents by step, the step."""
