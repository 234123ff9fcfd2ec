"""Pictures from a trained SiT: labels, noise, sampler, denormalise, decode.

Everything random is keyed by the sample's id, so the picture of an id is the same in any batch, on any rank.

Shape letters: B batch, C latent channels, H latent size, S picture size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sendvae_fast.engine.streams import CudaGraphRecorder
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.sampling.guidance import LabelledModel, guided
from sendvae_fast.sampling.labels import sample_labels
from sendvae_fast.sampling.replayed_model import ReplayedModel
from sendvae_fast.sampling.samplers import initial_noise, sample
from sendvae_fast.sampling.settings import GenerateConfig

DECODED_AT_ONCE = 64
"""Pictures, however many are sampled at once: at 256 px a map of the f8 decoder takes 4 GiB then."""


class Generated(NamedTuple):
    """A batch of pictures."""

    ids: Tensor  # int64 [B]
    labels: Tensor  # int64 [B]
    images: Tensor  # uint8 [B, 3, S, S]


class LatentDecoder(NamedTuple):
    """The way back from normalised latents to pictures."""

    autoencoder: ImageAutoencoder
    latent_mean: Tensor  # [C]
    latent_std: Tensor  # [C]

    def __call__(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, H, H] to pictures [B, 3, S, S] near [-1, 1]."""
        mean, std = (part.to(latents).view(1, -1, 1, 1) for part in (self.latent_mean, self.latent_std))
        return self.autoencoder.decode(latents * std + mean)


def check_fit(generator: SiTConfig, autoencoder: ImageAutoencoder, config: GenerateConfig) -> None:
    """Raise UserError if the two networks do not belong together, or `config` asks for what the generator cannot do."""
    if autoencoder.config.latent_channels != generator.latent_channels:
        raise UserError(
            f"the generator makes latents of {generator.latent_channels} channels but the autoencoder decodes "
            f"{autoencoder.config.latent_channels}; give the autoencoder whose latents the generator was trained on"
        )
    autoencoder.image_size(generator.latent_shape)  # raises for a shape that it does not decode
    if config.guidance_scale > 1 and generator.label_dropout == 0:
        raise UserError(
            f"guidance_scale is {config.guidance_scale}, but the generator was trained without label dropout and has "
            "no unconditional half to guide away from; give guidance_scale 1"
        )
    check_sampler(generator, config)


def check_sampler(generator: SiTConfig, config: GenerateConfig) -> None:
    """Raise UserError unless the sampler is one of what the generator predicts and guides channels that it has."""
    config.check_channels(generator.latent_channels)
    if generator.diffusion != config.sampler.is_diffusion:
        kind, samplers = ("a DiT", "ddpm or ddim") if generator.diffusion else ("a flow", "sde, euler, heun or dopri5")
        raise UserError(f"sampler.kind is {config.sampler.kind}, but the generator is {kind}: give {samplers}")


class LatentSampler:
    """Draws normalised latents of a generator. Preparations for a batch size serve all batches of that size.

    Raises UserError if the sampler is not one of what the generator predicts, see `check_sampler`.
    """

    def __init__(self, sit: SiT, config: GenerateConfig, device: torch.device) -> None:
        check_sampler(sit.config, config)
        self._sizes, self._config = sit.config, config
        network = copy.deepcopy(sit).to(torch.bfloat16) if config.precision == "bf16" else sit
        self._model: LabelledModel = network.eval()
        self._network_dtype = next(network.parameters()).dtype
        if config.cuda_graphs and device.type == "cuda":
            self._model = ReplayedModel(network, CudaGraphRecorder(device), device)

    @torch.inference_mode()
    def __call__(
        self, sample_ids: Tensor, on_step: Callable[[], object] = lambda: None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Labels int64 [B] and latents float32 [B, C, H, H] of sample ids int64 [B], which are on the device.

        `labels`, where given, are taken in place of those that the configuration draws.
        """
        sizes, config = self._sizes, self._config
        if labels is None:
            labels = sample_labels(config.seed, sample_ids, sizes.num_classes, config.labels)
        # What a DiT says of the variance is never guided.
        channels = config.guidance_channels or (sizes.latent_channels if sizes.diffusion else None)
        velocity = guided(
            self._model, labels, config.guidance_scale, config.guidance_interval, sizes.num_classes, channels
        )
        noise = initial_noise(config.seed, sample_ids, sizes.latent_shape)
        with tensor_cores(config.precision != "fp32"):
            latents = sample(velocity, noise, sample_ids, config.seed, config.sampler, on_step, self._network_dtype)
        return labels, latents


@torch.inference_mode()
def generate(
    sit: SiT,
    decoder: LatentDecoder,
    sample_ids: Tensor,
    config: GenerateConfig,
    on_step: Callable[[int], object] = lambda count: None,
    labels: Tensor | None = None,
) -> Iterator[Generated]:
    """Draw the pictures of `sample_ids` (int64 [N], on the networks' device), batch by batch.

    on_step: called after every sampler step with the number of pictures in the batch.
    labels: int64 [N], the classes of the pictures; drawn as the configuration says where not given.
    """
    if not len(sample_ids):  # of which split makes an empty batch, which would be sampled like any other
        return
    draw = LatentSampler(sit, config, sample_ids.device)
    batches = sample_ids.split(config.batch_size)
    given = [None] * len(batches) if labels is None else labels.split(config.batch_size)
    for ids, classes in zip(batches, given, strict=True):
        classes, latents = draw(ids, lambda ids=ids: on_step(len(ids)), classes)
        with tensor_cores(config.precision != "fp32"):
            parts = [to_uint8(decoder(part), config.rounding) for part in latents.split(DECODED_AT_ONCE)]
        yield Generated(ids, classes, torch.cat(parts))


@contextmanager
def tensor_cores(allow: bool) -> Iterator[None]:
    """Whether fp32 matrix products and convolutions on a GPU may round their inputs to tf32, for the block."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allow
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
