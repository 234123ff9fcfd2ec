"""Reading weight files safely and saying what does not fit."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sendvae_fast.errors import UserError
from sendvae_fast.models.weights import load_weights, read_weights


class Payload:
    """Unpickling an instance leaves a trace."""

    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_reads_both_kinds(tmp_path):
    state = {"weight": torch.arange(3.0)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert torch.equal(read_weights(tmp_path / name)["weight"], state["weight"])


def test_never_runs_what_a_file_holds(tmp_path):
    torch.save({"weight": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(UserError, match="more than tensors"):
            read_weights(tmp_path / name)
    assert not Payload.ran


def test_missing_broken_and_unnamed_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        read_weights(tmp_path)
    for name in ("broken.pth", "broken.safetensors"):
        for content in (b"", b"not a weight file at all", b"PK\x03\x04 cut"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match="is broken"):
                read_weights(tmp_path / name)
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor"):
        read_weights(tmp_path / "tensor.pth")


def test_complex_numbers_are_refused_wherever_they_stand(tmp_path):
    """Loaded into a real parameter they would lose their imaginary part, NaN or not, for a warning."""
    for number, content in enumerate((torch.full((2,), 1 + 2j), {"layers": [torch.ones(2, dtype=torch.complex64)]})):
        torch.save({"weight": content}, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=r"holds sparse, quantised, complex or empty tensors: save plain ones$"):
            read_weights(tmp_path / f"{number}.pth")


def test_names_what_does_not_fit_in_one_line():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    state = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2), "other": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        load_weights(module, state, "file.pth")
    assert str(error.value).startswith(
        "file.pth does not fit Sequential: 4 missing (1.weight, 1.bias, 2.weight, ...); 1 unexpected (other); "
        "1 of another shape (0.weight 2x3 instead of 2x2)."
    )


def test_loads_what_fits_across_dtypes():
    module = nn.Linear(2, 2)
    load_weights(module, {"weight": torch.full((2, 2), 0.5, dtype=torch.float16), "bias": torch.ones(2)}, "x")
    assert module.weight.dtype == torch.float32 and module.weight.eq(0.5).all() and module.bias.eq(1).all()
