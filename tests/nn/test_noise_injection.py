"""`NoiseInjection` against its equations. More on its statistics is in tests/models/test_send_vae.py."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sendvae_fast.nn import NoiseInjection
from sendvae_fast.ops import philox

C = 3


def moments():
    torch.manual_seed(0)
    return torch.randn(4, C, 6, 6), torch.randn(4, C, 6, 6) - 2


def test_equations():
    mean, logvar = moments()
    module = NoiseInjection(C, "fixed")
    offset, scale = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 2.0, 1.0])
    module.set_statistics(offset, scale)
    key, ids = philox.make_key(3, 5), torch.tensor([7, 1, 0, 12])
    out = module(mean, logvar, key, ids)
    posterior, noise = (
        philox.normal(key, stream, ids, mean.shape[1:])
        for stream in (philox.Stream.POSTERIOR, philox.Stream.INTERPOLANT)
    )
    z = mean + (0.5 * logvar).exp() * posterior
    normalised = (z - offset.view(C, 1, 1)) / scale.view(C, 1, 1)
    t = out.t.view(-1, 1, 1, 1)
    assert ((t > 0) & (t < 1)).all() and len(t.unique()) == 4
    assert_close(out.z, z)
    assert_close(out.z_t, (1 - t) * normalised + t * noise)
    assert_close(out.velocity, noise - normalised)
    clean = module(mean, logvar, key, ids, torch.zeros(4), patch_size=2)
    assert_close(clean.z_t, nn.functional.unfold(normalised, 2, stride=2).mT)


def test_statistics_run_in_training_only():
    mean, logvar = moments()
    module = NoiseInjection(C)
    arguments = mean, logvar, philox.make_key(0, 0), torch.arange(4)
    module.eval()(*arguments)
    assert torch.equal(module.running_mean, torch.zeros(C))
    module.train()(*arguments)
    assert_close(module.statistics()[0], mean.mean((0, 2, 3)))
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3)) + module.eps
    assert_close(module.statistics()[1], variance.sqrt())


def test_its_state_dict_is_batch_norms():
    module, batch_norm = NoiseInjection(C), nn.BatchNorm2d(C, affine=False)
    module.set_statistics(torch.arange(3.0), torch.tensor([1.0, 2.0, 3.0]))
    batch_norm.load_state_dict(module.state_dict())
    assert batch_norm.running_var.tolist() == [1, 4, 9]
    again = NoiseInjection(C)
    again.load_state_dict(batch_norm.state_dict())
    assert again.statistics()[1].tolist() == [1, 2, 3]


def test_it_compiles_into_one_graph():
    mean, logvar = moments()
    module = NoiseInjection(C, "fixed")
    arguments = mean, logvar, philox.make_key(0, 0), torch.arange(4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    for x, y in zip(compiled, module(*arguments), strict=True):
        assert torch.equal(x, y)


def test_what_does_not_fit_is_refused():
    mean, logvar = moments()
    with pytest.raises(ValueError, match="running, fixed, none, got 'learned'"):
        NoiseInjection(C, "learned")
    with pytest.raises(ValueError, match="latent_mean"):
        NoiseInjection(C + 1, "fixed")(mean, logvar, philox.make_key(0, 0), torch.arange(4))
