import subprocess
import sys

import pytest
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.ops import available_backends, chosen_backend, cosine_align, dispatch, library, use_backend


@pytest.fixture
def built(monkeypatch):
    """Set which backends can run, whatever this machine has."""
    monkeypatch.delenv("SENDVAE_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_choices", {})

    def set_reasons(cpu=None, triton=None, cuda=None):
        monkeypatch.setattr(library, "status", lambda: {"cpu": cpu, "cuda": cuda, "host": None})
        monkeypatch.setattr(dispatch, "_triton_reason", lambda: triton)

    return set_reasons


@pytest.mark.parametrize(
    ("reasons", "on_cuda", "on_cpu"),
    [
        (dict(), "cuda", "cpu"),
        (dict(cuda="x"), "triton", "cpu"),
        (dict(cuda="x", triton="x"), "reference", "cpu"),
        (dict(cpu="x"), "cuda", "reference"),
        (dict(cpu="x", cuda="x", triton="x"), "reference", "reference"),
    ],
)
def test_automatic_choice(built, reasons, on_cuda, on_cpu):
    built(**reasons)
    for op in (op for op, backends in dispatch.OPS.items() if backends == dispatch.BACKENDS):
        assert chosen_backend(op, "cuda") == on_cuda
        assert chosen_backend(op, torch.device("cpu")) == on_cpu
        assert chosen_backend(op, "meta") == "reference"


def test_available_backends_names_the_reasons(built):
    built(cpu="not built", cuda="no device")
    expected = {"reference": None, "cpu": "not built", "triton": None, "cuda": "no device"}
    assert available_backends("noise_inject") == expected
    with pytest.raises(ValueError, match="noise_inject"):
        available_backends("attention")


def test_forced_backend_wins_or_fails(built, monkeypatch):
    built(cpu="not built (pip)")
    with use_backend("reference"):
        assert chosen_backend("cosine_align", "cuda") == "reference"
        with use_backend("triton"):
            assert chosen_backend("cosine_align", "cuda") == "triton"
        assert chosen_backend("cosine_align", "cuda") == "reference"
    assert chosen_backend("cosine_align", "cuda") == "cuda"
    with use_backend("cpu"), pytest.raises(UserError, match=r"cosine_align: .*use_backend.*not built \(pip\)"):
        chosen_backend("cosine_align", "cpu")
    with use_backend("cuda"), pytest.raises(UserError, match="takes cuda tensors"):
        chosen_backend("cosine_align", "cpu")
    with use_backend("cpu"), pytest.raises(UserError, match="takes cpu tensors"):
        chosen_backend("cosine_align", "cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(UserError, match="TRITON_INTERPRET"):
        chosen_backend("cosine_align", "cpu")


def test_op_without_the_forced_backend_keeps_its_own_choice(built, monkeypatch):
    built()
    monkeypatch.setitem(dispatch.OPS, "cosine_align", ("reference", "cpu"))
    assert available_backends("cosine_align")["triton"] == "cosine_align has no triton backend"
    with use_backend("triton"):
        assert chosen_backend("cosine_align", "cpu") == "cpu"
        assert chosen_backend("cosine_align", "cuda") == "reference"
        assert chosen_backend("noise_inject", "cuda") == "triton"


def test_library_older_than_the_op(built, monkeypatch):
    built()
    monkeypatch.setitem(dispatch.OPS, "an_op_of_tomorrow", dispatch.BACKENDS)
    assert chosen_backend("an_op_of_tomorrow", "cpu") == "reference"
    with use_backend("cpu"), pytest.raises(UserError, match="older than this op"):
        chosen_backend("an_op_of_tomorrow", "cpu")


def test_an_interpreter_that_fails_in_loops_is_named(built, monkeypatch):
    """Triton 3.6 converts an array of one number by int, which NumPy 2.4 refuses."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    reason = dispatch._triton_reason.__wrapped__  # asked anew each time
    built()
    monkeypatch.setattr(dispatch, "_triton_reason", reason)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for versions, works in ((("3.6.0", "2.4.6"), False), (("3.6.1", "2.3.5"), True), (("3.7.0", "2.10.0"), True)):
        for module, version in zip((triton, numpy), versions, strict=True):
            monkeypatch.setattr(module, "__version__", version)
        with use_backend("triton"):
            if works:
                assert chosen_backend("group_norm_silu", "cpu") == "triton"
                continue
            with pytest.raises(UserError, match=r"group_norm_silu: .*interpreter does not work beside NumPy 2\.4: pip"):
                chosen_backend("group_norm_silu", "cpu")


def test_environment_forces(built, monkeypatch):
    built(cpu="not built (pip)")
    monkeypatch.setenv("SENDVAE_BACKEND", "reference")
    assert chosen_backend("noise_inject", "cuda") == "reference"
    with use_backend("cuda"):
        assert chosen_backend("noise_inject", "cuda") == "cuda"
    monkeypatch.setenv("SENDVAE_BACKEND", "cpu")
    with pytest.raises(UserError, match="SENDVAE_BACKEND.*not built"):
        chosen_backend("noise_inject", "cpu")
    monkeypatch.setenv("SENDVAE_BACKEND", "")
    assert chosen_backend("noise_inject", "cpu") == "reference"


def test_calls_follow_the_environment_and_the_block(built, monkeypatch):
    """A call's choice is remembered, but not beyond a change of what it was made for."""
    built(cpu="not built")
    x = torch.randn(3, 4)
    cosine_align(x, x)
    for _ in range(2):
        monkeypatch.setenv("SENDVAE_BACKEND", "cpu")
        with pytest.raises(UserError, match="forced by SENDVAE_BACKEND"):
            cosine_align(x, x)
        with use_backend("reference"):
            cosine_align(x, x)
        monkeypatch.delenv("SENDVAE_BACKEND")
        with use_backend("cpu"), pytest.raises(UserError, match="forced by use_backend"):
            cosine_align(x, x)
        cosine_align(x, x)


def test_unknown_backend(built, monkeypatch):
    built()
    with pytest.raises(UserError, match="unknown backend 'gpu'.*reference, cpu, triton, cuda"), use_backend("gpu"):
        pass
    monkeypatch.setenv("SENDVAE_BACKEND", "gpu")
    with pytest.raises(UserError, match="SENDVAE_BACKEND: unknown backend 'gpu'"):
        chosen_backend("noise_inject", "cpu")


def test_backend_is_restored_after_an_error(built):
    built()
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert chosen_backend("noise_inject", "cpu") == "cpu"


def test_float64_takes_the_reference(built):
    built(cpu="not built")
    x = torch.randn(3, 4, dtype=torch.float64)
    with use_backend("cpu"):
        assert cosine_align(x, x).dtype == torch.float64
        with pytest.raises(UserError):
            cosine_align(x.float(), x.float())


def test_compiled_function_follows_a_change(built):
    built(cpu="not built")
    torch._dynamo.reset()
    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: cosine_align(x, 2 * x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), torch.tensor(0.0), rtol=0, atol=1e-6)
    # Dynamo wraps the UserError in its own exception, with the message.
    with use_backend("cpu"), pytest.raises(Exception, match="cosine_align: backend 'cpu' is forced .* not built"):
        compiled(x)


@pytest.mark.slow
def test_import_needs_neither_triton_nor_compiled_ops():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sendvae_fast.ops import cosine_align, available_backends, library\n"
        "x = torch.randn(2, 3); print(cosine_align(x, x).item() < 1e-6, available_backends('cosine_align')['triton'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split(maxsplit=1) == ["True", "the triton package is not installed\n"]


def test_triton_without_a_c_compiler_is_not_chosen(built, monkeypatch, tmp_path):
    """Triton compiles the code that launches its kernels when the first one is launched: it would fail there."""
    reason = dispatch._triton_reason.__wrapped__  # asked anew each time
    built(cpu="not built", cuda="not built")
    monkeypatch.setattr(dispatch, "_triton_reason", reason)
    monkeypatch.setattr(dispatch, "interpreting_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.sysconfig, "get_config_var", {"INCLUDEPY": str(tmp_path)}.get)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    assert "apt install gcc" in available_backends("adaln")["triton"]
    assert chosen_backend("adaln", "cuda") == "reference"
    (tmp_path / "gcc").touch(0o755)
    assert available_backends("adaln")["triton"] is None and chosen_backend("adaln", "cuda") == "triton"
    (tmp_path / "gcc").rename(tmp_path / "mine")
    monkeypatch.setenv("CC", str(tmp_path / "mine"))
    assert available_backends("adaln")["triton"] is None
    (tmp_path / "Python.h").unlink()
    assert "apt install python3-dev" in available_backends("adaln")["triton"]
