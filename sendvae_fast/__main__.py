"""`python -m sendvae_fast` and `torchrun -m -- sendvae_fast`: the sendvae command."""

import sys

from sendvae_fast.cli.main import main

sys.exit(main())
