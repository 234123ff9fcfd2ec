"""`attention`: every backend that runs on this CPU against float64 truth, what it picks, and its table on disk."""

import json
import math
import sys
import types
import warnings

import pytest
import torch
from everything import EVERYTHING, in_turn
from op_cases.attention import CASES, AttentionCase, check
from torch._dynamo.backends.common import aot_autograd

from sendvae_fast.errors import UserError
from sendvae_fast.ops import (
    AttentionShape,
    attention,
    attention_reference,
    available_attention,
    tune_attention,
    use_attention,
    use_backend,
)
from sendvae_fast.ops.attention import backends as attention_backends
from sendvae_fast.ops.attention import table as attention_table
from sendvae_fast.ops.attention import tuning as attention_tuning

CPU = torch.device("cpu")
ON_CPU = ("sdpa", "flash", "math")
PACKAGES = ("flash2", "flash3", "flash4", "xformers")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = AttentionShape(batch=3, heads=2, tokens=9, head_dim=8, dtype=torch.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A table of the test's own, and nothing forced from outside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("SENDVAE_ATTENTION", "SENDVAE_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    attention_table.choices.cache_clear()
    yield
    attention_table.choices.cache_clear()


@pytest.fixture
def spies(monkeypatch):
    """The names of the backends that compute, in order."""
    called = []

    def spy(name, run):
        def spied(*qkv):
            called.append(name)
            return run(*qkv)

        return spied

    for name, backend in attention_backends.BACKENDS.items():
        replaced = attention_backends.AttentionBackend(**{**vars(backend), "run": spy(name, backend.run)})
        monkeypatch.setitem(attention_backends.BACKENDS, name, replaced)
    return called


def inputs(shape=(3, 2, 9, 8), dtype=torch.float32, *, requires_grad=False):
    return [x.detach().requires_grad_(requires_grad) for x in AttentionCase(shape).inputs(dtype, "cpu", 0)]


def table(**choices) -> None:
    """A table that prefers these backends for shapes like SMALL, by whether they train."""
    for kind, name in choices.items():
        shape = AttentionShape(**{**vars(SMALL), "training": kind == "training"})
        attention_table.save(CPU, [attention_table.Measurement(shape, {name: 1.0, "math": 5.0, "flash": 5.0})])


# ---- Numbers ----


def test_enough_shapes():
    assert len(CASES) >= 20 and {64, 72, 512} <= {case.shape[3] for case in CASES}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    "case, dtype", [(case, dtype) for number, case in enumerate(CASES) for dtype in in_turn(DTYPES, number)], ids=str
)
def test_close_to_truth(case, backend, dtype):
    check(case, dtype, backend, "cpu")


def test_reference_is_the_formula():
    q, k, v = (x[0, 0].double() for x in inputs((1, 1, 5, 3)))
    for i in range(5):
        scores = [sum(q[i, d] * k[j, d] for d in range(3)) / math.sqrt(3) for j in range(5)]
        weights = [math.exp(s) / sum(math.exp(r) for r in scores) for s in scores]
        expected = sum(w * row for w, row in zip(weights, v, strict=True))
        actual = attention_reference(q[None, None], k[None, None], v[None, None])[0, 0, i]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_reference_gradcheck():
    assert torch.autograd.gradcheck(
        attention_reference, [x.double().detach().requires_grad_() for x in inputs((1, 2, 4, 3))]
    )


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("where", ["q", "k", "v", "qkv"])
def test_nan_goes_where_the_reference_has_it(backend, where):
    qkv = dict(zip("qkv", inputs((2, 2, 5, 8)), strict=True))
    for name in where:
        qkv[name][1, 0, 2, 3] = math.nan
    with use_attention(backend):
        actual = attention(**qkv).isnan()
    expected = attention_reference(**qkv).isnan()
    assert expected.any()
    if "q" in where and backend != "math":  # see the docstring
        actual[1, 0, 2] = expected[1, 0, 2]
    assert torch.equal(actual, expected)


# ---- Choice ----


def test_without_a_table_pytorch_chooses(spies):
    attention(*inputs())
    assert spies == ["sdpa"]


def test_the_fastest_measured_backend_is_taken(spies):
    table(forward="math", training="flash")
    attention(*inputs())
    out = attention(*inputs(requires_grad=True))
    with torch.no_grad():
        attention(*inputs(requires_grad=True))
    assert spies == ["math", "flash", "math"] and "FlashAttention" in str(out.grad_fn)


@pytest.mark.parametrize("shape", [(4, 2, 9, 8), (3, 2, 9, 8)])
def test_batches_of_a_class_share_a_measurement(spies, shape):
    table(forward="math")
    attention(*inputs(shape))
    assert spies == ["math"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 2, 9, 8), torch.float32), ((2, 2, 9, 8), torch.float32), ((0, 2, 9, 8), torch.float32),
        ((3, 1, 9, 8), torch.float32), ((3, 2, 10, 8), torch.float32), ((3, 2, 9, 16), torch.float32),
        ((3, 2, 9, 8), torch.bfloat16),
    ],
)  # fmt: skip
def test_another_shape_is_left_to_pytorch(spies, shape, dtype):
    table(forward="math")
    attention(*inputs(shape, dtype))
    assert spies == ["sdpa"]


def test_reference_backend_means_plain_pytorch(spies):
    table(forward="math")
    with use_backend("reference"):
        attention(*inputs())
    assert spies == ["sdpa"]


def test_forcing(spies, monkeypatch):
    table(forward="flash")
    monkeypatch.setenv("SENDVAE_ATTENTION", "math")
    attention(*inputs())
    with use_attention("sdpa"):
        attention(*inputs())
        with use_attention("flash"):
            attention(*inputs())
        attention(*inputs())
    attention(*inputs())
    assert spies == ["math", "sdpa", "flash", "sdpa", "math"]


def test_a_forced_backend_that_cannot_run_is_an_error(monkeypatch):
    with use_attention("flash3"), pytest.raises(UserError, match="'flash3' is forced by use_attention .* no cpu"):
        attention(*inputs())
    monkeypatch.setenv("SENDVAE_ATTENTION", "cudnn")
    with pytest.raises(UserError, match="'cudnn' is forced by SENDVAE_ATTENTION but cannot run"):
        attention(*inputs())
    # What the limits let pass, PyTorch may still refuse.
    monkeypatch.setenv("SENDVAE_ATTENTION", "efficient")
    allowed = attention_backends.AttentionBackend(attention_backends.BACKENDS["efficient"].run, on_cpu=True)
    monkeypatch.setitem(attention_backends.BACKENDS, "efficient", allowed)
    with pytest.raises(UserError, match="'efficient' .* no such kernel for torch.float32"):
        attention(*inputs())


def test_unknown_names(monkeypatch):
    with pytest.raises(UserError, match="use_attention: unknown attention backend 'flash5'"), use_attention("flash5"):
        pass
    monkeypatch.setenv("SENDVAE_ATTENTION", "fast")
    with pytest.raises(UserError, match="SENDVAE_ATTENTION: unknown attention backend 'fast'; choose one of sdpa, "):
        attention(*inputs())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(q=torch.zeros(2, 3, 4)), "q must"),
        (dict(q=torch.zeros(3, 2, 9, 8, dtype=torch.int64)), "q must"),
        (dict(k=torch.zeros(3, 2, 10, 8)), "k must"),
        (dict(v=torch.zeros(3, 2, 9, 8).half()), "v must"),
        (dict(v=torch.zeros(3, 2, 9, 8, device="meta")), "v must"),
    ],
)
def test_bad_input_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        attention(**(dict(zip("qkv", inputs(), strict=True)) | changed))


# ---- torch.compile ----


def compiled_kernels(*, dynamic=False):
    """A compiled `attention` and the list of attention kernels in the graphs it was compiled into."""
    kernels = []

    def look(graph, _):
        names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        kernels.append("flash" if any("flash_attention" in name for name in names) else "math")
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look)
    return torch.compile(attention, fullgraph=True, backend=backend, dynamic=dynamic), kernels


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_choice_is_made_while_tracing(dynamic):
    table(forward="math")
    compiled, kernels = compiled_kernels(dynamic=dynamic)
    with torch.no_grad():
        for qkv in (inputs(), inputs((3, 2, 10, 8))):  # the second is not in the table
            torch.testing.assert_close(compiled(*qkv), attention_reference(*qkv))
        with use_attention("flash"):
            compiled(*inputs())
    assert kernels == ["math", "flash", "flash"]


def test_a_symbolic_batch_is_compiled_once_for_a_class():
    table(forward="math")
    compiled, kernels = compiled_kernels(dynamic=True)
    with torch.no_grad():
        for batch in (4, 3, 5, 6, 4):
            compiled(*inputs((batch, 2, 9, 8)))
    assert kernels == ["math", "flash"]


def test_compiled_error_names_the_forced_backend():
    compiled, _ = compiled_kernels()
    with use_attention("xformers"), pytest.raises(Exception, match="'xformers' is forced .* no cpu tensors"):
        compiled(*inputs())


# ---- Optional packages ----


@pytest.fixture
def packages_on_cpu(monkeypatch):
    """The packages' backends as if they took CPU tensors, on stand-in modules that compute [B, N, heads, head_dim]."""

    def plain(q, k, v):
        return attention_reference(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()

    stand_ins = {
        "flash_attn": dict(flash_attn_func=lambda q, k, v, deterministic: plain(q, k, v)),
        "flash_attn_interface": dict(flash_attn_func=lambda q, k, v, deterministic: (plain(q, k, v), None)),
        "flash_attn.cute": dict(flash_attn_func=lambda q, k, v, deterministic: (plain(q, k, v), None)),
        "xformers.ops": dict(memory_efficient_attention=plain),
    }
    for name, functions in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    for name in PACKAGES:
        backend = attention_backends.BACKENDS[name]
        changed = attention_backends.AttentionBackend(**{**vars(backend), "on_cpu": True})
        monkeypatch.setitem(attention_backends.BACKENDS, name, changed)
    attention_backends.import_module.cache_clear()
    attention_backends.failure.cache_clear()
    yield
    attention_backends.import_module.cache_clear()
    attention_backends.failure.cache_clear()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_available_if_it_computes(packages_on_cpu, monkeypatch, name):
    """On a GPU `unavailable` asks so; some packages can be imported beside a CUDA that their kernels do not fit."""

    def no_kernel(*qkv):
        raise NotImplementedError("No operator found\nfor these inputs")

    def reason(run=None):
        backend = attention_backends.BACKENDS[name]
        with monkeypatch.context() as patched:
            changed = attention_backends.AttentionBackend(**{**vars(backend), "run": run or backend.run})
            patched.setitem(attention_backends.BACKENDS, name, changed)
            attention_backends.failure.cache_clear()
            return attention_backends.failure(name, "cpu", None)

    assert reason() is None
    assert reason(no_kernel) == "it is installed, but a small call fails (NotImplementedError: No operator found)"
    assert reason(lambda q, k, v: 0 * v) == "it is installed, but attends to ones with a result other than 1"
    with pytest.raises(torch.OutOfMemoryError):
        reason(lambda *qkv: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))


def test_flash_attention_4_alone_is_no_flash_attention_2(packages_on_cpu, monkeypatch):
    """Both are called flash_attn, and Python imports the folder of the one as the package of the other."""
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_func")
    assert "has no attribute 'flash_attn_func'" in attention_backends.failure("flash2", "cpu", None)
    assert attention_backends.failure("flash4", "cpu", None) is None


def test_what_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(attention_backends, "import_module", lambda name: f"not installed (No module named {name!r})")
    for name in PACKAGES:
        reason = attention_backends.unavailable(name, "cuda", 0)
        assert reason.startswith("not installed") and reason.endswith(attention_backends.BACKENDS[name].install)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert attention_backends.unavailable("flash4", "cuda", 0) == "it has no kernels for compute capability 8.0"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_are_given_their_layout(packages_on_cpu, backend, case):
    check(case, torch.float32, backend, "cpu")


def test_packages_are_told_to_be_deterministic(packages_on_cpu, monkeypatch):
    asked = []

    def function(q, k, v, deterministic):
        asked.append(deterministic)
        return q

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", function)
    with use_attention("flash2"):
        attention(*inputs())
        torch.use_deterministic_algorithms(True)
        try:
            attention(*inputs())
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_limits_on_cuda():
    def reason(name, dtype, head_dim):
        return attention_backends.unsupported(name, "cuda", dtype, head_dim)

    for name in ("flash", "flash2", "flash3", "flash4"):
        assert reason(name, torch.bfloat16, 72) is None
        assert reason(name, torch.bfloat16, 512) == "its head dim is at most 256"
        assert reason(name, torch.float32, 64) == "it takes no torch.float32"
    assert reason("flash3", torch.float16, 65) == "its head dim must be a multiple of 8"
    assert reason("efficient", torch.float32, 512) is None
    assert reason("math", torch.float64, 3) is None


def test_a_package_that_does_not_load_says_why(monkeypatch):
    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "flash_attn":
                raise OSError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    attention_backends.import_module.cache_clear()
    assert attention_backends.import_module("flash_attn") == "does not load: undefined symbol: _ZN3c10"
    missing = attention_backends.import_module("no_such_package.ops")
    assert missing == "not installed (No module named 'no_such_package')"
    attention_backends.import_module.cache_clear()


def test_available_on_a_cpu():
    reasons = available_attention("cpu")
    assert {name for name, reason in reasons.items() if reason is None} == set(ON_CPU)
    assert reasons["flash2"] == "it takes no cpu tensors"


# ---- Measuring ----


def test_tuning_makes_the_table(spies):
    shapes = [SMALL, AttentionShape(**{**vars(SMALL), "training": True}), AttentionShape(1, 1, 4, 512, torch.bfloat16)]
    attention(*inputs())  # what was read before is read again
    measurements = tune_attention(shapes, "cpu")
    assert [m.shape for m in measurements] == shapes == [m.shape for m in attention_table.load(CPU)]
    for m in measurements:
        assert m.times_us.keys() == {"flash", "math"} and all(t > 0 for t in m.times_us.values())
        assert m.failures["flash2"] == "it takes no cpu tensors" and m.untraceable == ()
    spies.clear()
    attention(*inputs())
    assert spies == [measurements[0].fastest(traced=False)]


def test_a_measurement_that_is_stopped_keeps_what_it_has(monkeypatch):
    def shapes():
        yield SMALL
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_attention(shapes(), "cpu")
    assert [m.shape for m in attention_table.load(CPU)] == [SMALL]


def test_tuning_notes_what_fails_lies_or_does_not_trace(packages_on_cpu, monkeypatch):
    def failing(q, k, v, deterministic):
        raise AssertionError("head dim 8 is not compiled in\nand more")

    def lying(q, k, v):
        return 1.1 * attention_reference(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def untraceable(q, k, v, deterministic):
        torch._dynamo.graph_break()
        return attention_reference(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", failing)
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", lying)
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_func", untraceable)
    training = AttentionShape(**{**vars(SMALL), "training": True})
    for m in tune_attention([SMALL, training], "cpu"):
        assert m.times_us.keys() == {"flash", "math", "flash3", "flash4"} and m.untraceable == ("flash3",)
        assert m.failures["flash2"] == "AssertionError: head dim 8 is not compiled in"
        assert m.failures["xformers"].startswith("wrong result")


@pytest.mark.slow
def test_a_package_that_traces_is_noted_as_such(packages_on_cpu):
    shapes = [
        AttentionShape(3, 2, tokens, head_dim, dtype, training)
        for tokens, head_dim, dtype in ((9, 8, DTYPES[0]), (9, 8, DTYPES[1]), (4, 16, DTYPES[2]))
        for training in (False, True)
    ]  # fmt: skip
    for m in tune_attention(shapes if EVERYTHING else [shapes[1], shapes[2], shapes[4]], "cpu"):
        assert m.untraceable == () and set(PACKAGES) <= m.times_us.keys()


def test_tracing_takes_the_fastest_that_traces(spies):
    attention_table.save(CPU, [
        attention_table.Measurement(SMALL, {"sdpa": 1.0, "math": 2.0, "flash": 3.0}, {}, ("sdpa",))
    ])  # fmt: skip
    compiled, kernels = compiled_kernels()
    with torch.no_grad():
        attention(*inputs())
        compiled(*inputs())
    assert spies[0] == "sdpa" and kernels == ["math"]


def test_model_shapes_are_the_papers():
    shapes = attention_tuning.model_shapes(torch.bfloat16)
    assert {(s.heads, s.tokens, s.head_dim) for s in shapes} == {
        (12, 256, 64), (16, 256, 64), (16, 256, 72), (1, 256, 512), (1, 1024, 512),
    }  # fmt: skip
    assert len({attention_table.choice_key(s) for s in shapes}) == len(shapes)


# ---- The file ----


def test_saving_merges_and_replaces():
    other = AttentionShape(**{**vars(SMALL), "tokens": 10})
    attention_table.save(CPU, [attention_table.Measurement(SMALL, {"math": 1.0}, {"flash2": "absent"}, ("flash3",))])
    attention_table.save(CPU, [attention_table.Measurement(other, {"flash": 2.0})])
    same_class = AttentionShape(**{**vars(SMALL), "batch": 4})
    path = attention_table.save(CPU, [attention_table.Measurement(same_class, {"flash": 3.0})])
    assert [(m.shape, m.times_us) for m in attention_table.load(CPU)] == [
        (same_class, {"flash": 3.0}), (other, {"flash": 2.0}),
    ]  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays"


def entry(**shape):
    return {"shape": {**vars(SMALL), "dtype": "float32", **shape}, "times_us": {}, "failures": {}, "untraceable": []}


def change(**changes):
    def corrupt(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return corrupt


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda path: path.write_text(path.read_text()[:40]),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[]"),
        lambda path: (path.unlink(), path.mkdir()),
        change(schema=0),
        change(device="another machine"),
        change(versions={"torch": "1.0"}),
        change(entries=None),
        change(entries=[{"shape": {}}]),
        change(entries=[entry(dtype="save")]),
        change(entries=[entry(batch=0)]),
        change(entries=[entry() | {"times_us": {"gone": 1.0}}]),
        change(entries=[entry() | {"times_us": {"math": "fast"}}]),
    ],
    ids=range(13),
)
def test_a_broken_or_foreign_file_is_ignored_with_one_warning(spies, corrupt):
    table(forward="math")
    corrupt(attention_table.table_path(CPU))
    attention_table.choices.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attention(*inputs())
        attention(*inputs())
    assert spies == ["sdpa", "sdpa"]
    assert len(caught) == 1 and "is ignored" in str(caught[0].message)


def test_a_table_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="cannot write .* set XDG_CACHE_HOME"):
            tune_attention([SMALL], "cpu")
