"""Measuring autoencoders and generators."""
