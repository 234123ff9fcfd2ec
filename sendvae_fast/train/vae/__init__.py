"""Stage 1: settings, networks, the step."""
