"""Published weight files: which configs need which, where they are published, and whether they are here."""
