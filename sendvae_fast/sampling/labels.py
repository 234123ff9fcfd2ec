"""The class of each sample id."""

from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.ops import philox
from sendvae_fast.sampling.settings import LabelSampling


def sample_labels(seed: int, sample_ids: Tensor, num_classes: int, sampling: LabelSampling = "equal") -> Tensor:
    """The label of each sample id: int64 [B], a function of (seed, id) alone. sample_ids int64 [B].

    `equal`: id modulo num_classes, so 50,000 ids hold 50 of each of 1000 classes (RAE measures about 0.1 lower FID
    with it); `random`: independent and uniform, as ADM, DiT and the first REPA numbers.
    """
    if sampling == "equal":
        return sample_ids % num_classes
    if sampling == "random":
        key = philox.make_key(seed, 0, sample_ids.device)
        return philox.integers(key, philox.Stream.SAMPLER_LABEL, sample_ids, 1, num_classes)[:, 0]
    raise UserError(f"label sampling is {sampling!r}; give equal or random")
