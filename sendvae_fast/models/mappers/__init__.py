"""Networks from latents to the features of a foundation model, one per alignment method."""
