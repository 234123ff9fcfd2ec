"""Runs command lines, one after the other, on this rank: `verbs_of_ranks.py FILE`, a JSON list of argument lists."""

import json
import sys
from pathlib import Path

from sendvae_fast.cli.main import main

for command in json.loads(Path(sys.argv[1]).read_text()):
    if code := main(command):
        sys.exit(code)
