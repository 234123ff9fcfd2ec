"""Measures of a latent space that say, or claim to say, how well a generator will learn it."""
