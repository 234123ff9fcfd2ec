"""The command line of `sendvae`, `python -m sendvae_fast` and `torchrun -m -- sendvae_fast`."""

import sys

from sendvae_fast.errors import UserError, needs_extra


def main() -> int:
    """Run the command line of this process; returns its exit code (a `UserError`'s if packages are missing)."""
    try:
        with needs_extra("train", "the command line"):
            from sendvae_fast.cli.main import main as run_command
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return run_command()


if __name__ == "__main__":
    sys.exit(main())
