"""Call every CUDA op of the compiled library on small inputs that take every path: what compute-sanitizer is run over.

compute-sanitizer --tool memcheck python tests/gpu/call_every_kernel.py
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from cuda_on_cpu.chosen import CHOSEN  # noqa: E402
from op_cases import ALL  # noqa: E402

from sendvae_fast.ops import dispatch, use_backend  # noqa: E402
from sendvae_fast.ops.registration import op_of  # noqa: E402


def main() -> None:
    for tests in ALL:
        if "cuda" not in dispatch.OPS[tests.op]:
            continue
        with use_backend("cuda"):
            for name, arguments in tests.raw_calls("cuda", "cuda"):
                op_of(name, "cuda")(*arguments)
            for dtype in tests.dtypes:
                tests.example(0, dtype, "cuda").run()
        for number, case in enumerate(case for case in tests.cases if str(case) in CHOSEN[tests.op]):
            tests.check(case, tests.dtypes[number % len(tests.dtypes)], "cuda", "cuda")
        torch.cuda.synchronize()
        print(tests.op, "called", flush=True)


if __name__ == "__main__":
    main()
