"""Frozen foundation models: their construction, preprocessing and weight files."""
