"""Every loss of both stages."""
