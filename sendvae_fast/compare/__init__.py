"""Several autoencoders side by side: the same generator on each, the same samples and metrics, seeds, one page."""
