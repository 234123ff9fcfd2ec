"""Drawing pictures from a trained generator."""
