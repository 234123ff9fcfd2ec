"""Frozen foundation models: how each is built, what it wants of its input, where its weights come from."""
