"""Sources without the kernels of some 16-bit dtypes: each takes as long to compile as those of float32."""

import re
from collections.abc import Callable, Collection

from cuda_on_cpu import build

DISPATCH = "csrc/common/tensor.h"
NAMES = {"torch.bfloat16": "BFloat16", "torch.float16": "Half"}


def with_dtypes(dtypes: Collection[str], read: Callable[[str], str] = build.read_source) -> Callable[[str], str]:
    """`read` of a source, without the kernels of 16-bit dtypes that are not among `dtypes` ("torch.bfloat16", ...)."""
    left_out = "|".join(name for dtype, name in NAMES.items() if dtype not in dtypes)
    case = re.compile(rf"case ScalarType::(?:{left_out}):\s*return function\(\w+\{{\}}\);")

    def changed(path: str) -> str:
        return case.sub("", read(path)) if path == DISPATCH and left_out else read(path)

    return changed
