"""The linear path between data and noise, and the stochastic process that runs it backwards.

`t` is the noise level: 1 is pure noise, 0 is data. `z` is a latent, `x` a state on the path. Every function is
elementwise: `t` is a number or broadcasts against the tensors.

The SDE is the one behind SiT's published samples ("sigma" diffusion, norm 1) and, unchanged, REPA's and REPA-E's. In
SiT's own clock, where data sits at 1, the same process reads differently; here only `t` as above is used.
"""

from torch import Tensor

Time = Tensor | float


def interpolate(z: Tensor, noise: Tensor, t: Time) -> Tensor:
    """x_t = (1 - t) z + t ε."""
    return (1 - t) * z + t * noise


def velocity_target(z: Tensor, noise: Tensor) -> Tensor:
    """v = dx_t/dt = ε - z, what the generator learns to predict from x_t."""
    return noise - z


def score(x: Tensor, velocity: Tensor, t: Time) -> Tensor:
    """∇ log p_t(x) = -E[ε | x] / t = -((1 - t) v + x) / t, for t > 0.

    Follows from x = (1 - t) z + t ε and v = ε - z: (1 - t) v + x = ε.
    """
    return -((1 - t) * velocity + x) / t


def sde_diffusion(t: Time) -> Time:
    """w(t) = 2 t, the variance of the noise that the reverse SDE adds per unit of time."""
    return 2 * t


def sde_drift(x: Tensor, velocity: Tensor, t: Time) -> Tensor:
    """d = v - w(t)/2 · score = v - t · score = v + (1 - t) v + x.

    The reverse SDE dx = d dt + sqrt(w) dB, run from t = 1 to 0, has the same marginals p_t as the ODE dx = v dt.
    Written without the division by t, so it is exact at t = 0.
    """
    return (2 - t) * velocity + x
