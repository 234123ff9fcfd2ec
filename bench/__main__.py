"""`python -m bench <verb>`: measurements, run by hand on the machine to measure.

    kernels   time every fused op against plain PyTorch and torch.compile; writes bench/results/kernels_<machine>.json
    sass      say what nvcc makes of CUDA kernels for an H200: registers, occupancy, instructions
    data      time decoding, the latent reader and a step fed by them; writes bench/results/data_<machine>.json
    sampling  time the sampler against plain PyTorch; writes bench/results/sampling_<machine>.json
    evaluate  time FID, precision and recall against torch-fidelity; writes bench/results/evaluation_<machine>.json
    demo      note what finished demos measured; writes bench/results/demo.json and README's table
    evidence  run the study of alignment and generation; writes bench/evidence/results and docs/evidence.md
    step      time a training step against plain PyTorch; writes bench/results/step_<stage>_<machine>.json
    saving    time checkpoints that are written beside the steps; writes bench/results/saving_<machine>.json
    peers     time peers' own training steps from checkouts of theirs; writes bench/results/peers_<machine>.json
    memory    compare what `sendvae plan` counts with real steps; writes bench/results/memory_<machine>.json
    table     rewrite the tables of docs/performance.md from bench/results

`python -m bench <verb> --help` lists a verb's options.
"""

import importlib
import sys

from sendvae_fast.errors import UserError

VERBS = (
    "kernels", "sass", "data", "sampling", "evaluate", "demo", "evidence", "step", "saving", "peers", "memory", "table",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run one verb; a failure that the user can mend gives one line and exit code 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise UserError(f"no verb {verb!r}; the verbs are {', '.join(VERBS)}")
        return importlib.import_module(f"bench.{verb}").main(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
