"""The choice of the backend that runs an op.

    reference   plain PyTorch, any device, any dtype
    cpu, cuda   the compiled libraries, `torch.ops.sendvae.*`
    triton      the Triton kernels, `torch.ops.sendvae_triton.*`; on a CPU only under TRITON_INTERPRET=1

Unless forced, a CUDA tensor takes cuda, else triton, else the reference; a CPU tensor takes cpu, else the reference.
`SENDVAE_BACKEND=<name>` or `use_backend(name)` forces one; a forced backend that cannot run is an error, never a silent
fall-back. An op that was never written for the forced backend (`OPS`) keeps its own choice, so that a whole run can be
forced. Where a checkout has compiled libraries of other sources, a choice that is not forced is an error too.
float64 tensors always take the reference, which is the ground truth of the others. (For `sde_step` the dtype of
the velocity counts, not that of its float64 state.)
"""

import importlib.util
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import torch

from sendvae_fast.errors import UserError
from sendvae_fast.ops import library
from sendvae_fast.ops.forcing import ForcedChoice, cannot_run
from sendvae_fast.ops.tracing import constant_when_traced

BACKENDS = ("reference", "cpu", "triton", "cuda")
# Those of csrc, which check all that they are given.
COMPILED = ("cpu", "cuda")
# The backends that each op was written for; its docstring says why one is missing.
OPS = {
    "noise_inject": BACKENDS,
    "cosine_align": BACKENDS,
    "lpips_distance": ("reference", "cpu", "triton"),
    "sde_step": ("reference", "cpu", "cuda"),
    "adaln": BACKENDS,
    "group_norm_silu": BACKENDS,
    "global_norm": ("reference", "cpu", "cuda"),
    "adamw_ema": ("reference", "cpu", "cuda"),
    "center_crop": ("reference", "cpu", "cuda"),
}
# Ops of data loading: they run where their tensors are, also in a run that is forced to the other device's backend.
DATA_OPS = frozenset({"center_crop"})
ENVIRONMENT_VARIABLE = "SENDVAE_BACKEND"

# Device type: backends in order of preference.
_AUTOMATIC = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_forced = ForcedChoice(ENVIRONMENT_VARIABLE, "use_backend", "backend", BACKENDS)
# The dictionary behind os.environ. Asking that for a variable that is not set costs a microsecond, a tenth of a call.
_environment: dict[bytes, bytes] = os.environ._data  # pyright: ignore[reportAttributeAccessIssue]
_VARIABLE = os.fsencode(ENVIRONMENT_VARIABLE)
_choices: dict[tuple[str, torch.device, str | None, bytes | None], str] = {}
"""Choices made: by op, device, and what is forced by a `use_backend` block and by the environment."""


def use_backend(name: str) -> AbstractContextManager[None]:
    """Force the backend of every op inside the `with` block; it outranks SENDVAE_BACKEND, blocks nest.

    The setting is the process's, not the thread's. It decides forward calls; a backward pass runs on the backend of
    its forward pass, wherever it is called.

    Raises:
        UserError: `name` is not a backend. That the backend cannot run is reported by the op that needs it.
    """
    return _forced.use(name)


def forced_backend() -> str | None:
    """The backend that `use_backend` or SENDVAE_BACKEND forces, if one does."""
    return _forced.resolve(_forced.name)[0]


def available_backends(op: str) -> dict[str, str | None]:
    """Every backend of `op`, in the order of `BACKENDS`: None if it can run here, else the reason why it cannot."""
    if op not in OPS:
        raise ValueError(f"no op {op!r}; the ops are {', '.join(OPS)}")
    compiled = library.status()
    if compiled["cpu"] is None and not compiled_op_is_defined(op):
        stale = f"the compiled library is older than this op; {library.REBUILD}"
        compiled = {**compiled, "cpu": stale, "cuda": stale}
    reasons = {"reference": None, "cpu": compiled["cpu"], "triton": _triton_reason(), "cuda": compiled["cuda"]}
    return {name: reason if name in OPS[op] else f"{op} has no {name} backend" for name, reason in reasons.items()}


def chosen_backend(op: str, device: torch.device | str) -> str:
    """The backend that `op` takes for tensors on `device` (float64 apart).

    Raises:
        UserError: the forced backend is unknown or cannot run, and why; or the libraries must be built again.
    """
    return _choose(op, torch.device(device).type, _forced.name)


def backend_for(op: str, tensor: torch.Tensor) -> str:
    """`chosen_backend` for one tensor's device and dtype, remembered.

    Under torch.compile the choice is made while tracing, and made again when `use_backend` has changed it; an error
    then comes wrapped in one of Dynamo's.
    """
    if tensor.dtype == torch.float64:
        return "reference"
    return _remembered(op, tensor.device, _forced.name)


def compiled_op_is_defined(op: str) -> bool:
    """Whether the loaded libraries know `op`: ones built from older sources do not."""
    return hasattr(torch.ops.sendvae, op)


def has_triton() -> bool:
    """Whether the Triton package is installed, so that the kernels can be defined."""
    return importlib.util.find_spec("triton") is not None


# Dynamo calls this while tracing and burns the answer into the graph; `forced` is an argument so that it is guarded.
@constant_when_traced
def _remembered(op: str, device: torch.device, forced: str | None) -> str:
    made_for = (op, device, forced, _environment.get(_VARIABLE))
    choice = _choices.get(made_for)
    if choice is None:
        choice = _choices[made_for] = _choose(op, device.type, forced)
    return choice


def _choose(op: str, device_type: str, forced: str | None) -> str:
    forced, source = _forced.resolve(forced)
    reasons = available_backends(op)
    if (
        forced is not None
        and forced in OPS[op]
        and not (op in DATA_OPS and _is_for_another_device(forced, device_type))
    ):
        reason = _unusable(forced, device_type) or reasons[forced]
        if reason is not None:
            raise cannot_run(op, forced, source, reason)
        return forced
    if (stale := library.stale()) is not None:
        raise UserError(stale)
    candidates = _AUTOMATIC.get(device_type, ("reference",))
    return next(name for name in candidates if reasons[name] is None)


def _unusable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot take tensors of this device, or None."""
    if _is_for_another_device(backend, device_type):
        return f"it takes {backend} tensors, these are on {device_type!r}"
    if backend == "triton" and device_type == "cpu" and not interpreting_triton():
        return "on CPU tensors it needs TRITON_INTERPRET=1, set before Triton is imported"
    return None


def _is_for_another_device(backend: str, device_type: str) -> bool:
    return backend in COMPILED and backend != device_type


def interpreting_triton() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_reason() -> str | None:
    if not has_triton():
        return "the triton package is not installed"
    if not torch.cuda.is_available() and not interpreting_triton():
        return "no CUDA device (on a CPU it runs only under TRITON_INTERPRET=1, for tests)"
    return _wrong_with_the_interpreter() if interpreting_triton() else _missing_for_triton()


def _wrong_with_the_interpreter() -> str | None:
    """Why Triton's interpreter fails in every loop here; None: it does not."""
    import numpy
    import triton

    of_triton, of_numpy = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy))
    if of_triton < (3, 7) and of_numpy >= (2, 4):  # which no longer makes a number of an array of one
        return "before 3.7 Triton's interpreter does not work beside NumPy 2.4: pip install 'numpy<2.4'"
    return None


def _missing_for_triton() -> str | None:
    """What Triton lacks to compile the C code with which it launches kernels, at the first of them; None: nothing."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler: apt install gcc, or set CC"
    if not Path(sysconfig.get_config_var("INCLUDEPY") or "", "Python.h").is_file():
        return "Triton needs Python's headers: apt install python3-dev"
    return None
