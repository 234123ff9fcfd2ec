"""What is done with one run's networks: reconstruct a picture, move its attributes, generate pictures.

Shape letters: N pictures, S picture size, A attributes, d numbers of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.probing.directions import attribute_directions
from sendvae_fast.evaluation.probing.encoding import encoded_rows, feature_folder, posterior_means
from sendvae_fast.evaluation.probing.linear_fit import fit_linear
from sendvae_fast.evaluation.reconstruction_quality import psnr
from sendvae_fast.evaluation.settings import Direction, ProbeConfig
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.play.places import RunPlaces
from sendvae_fast.pretrained import load_autoencoder, load_generator
from sendvae_fast.sampling.settings import SamplerConfig

BATCH_SIZE = 64


class LabelledPictures(NamedTuple):
    """Pictures whose attributes are known, for directions in latent space."""

    catalog: Catalog
    values: np.ndarray
    """uint8 [n, A] of 0 and 1."""
    names: tuple[str, ...]
    """Of the A attributes."""


class RunNetworks:
    """An autoencoder, the generator on its latents where there is one, and directions of attributes. For one thread.

    Args:
        places: where they are.
        image_size: S.
        device: where they work.
        catalog: pictures to show, and for the names of classes; None where there are none.
        labelled: pictures with attributes, which the sliders move; None where there are none.
        direction: of the sliders.

    Raises:
        UserError: weights are missing, broken, or do not belong together, or S does not fit the autoencoder.
    """

    def __init__(
        self,
        places: RunPlaces,
        image_size: int,
        device: torch.device,
        catalog: Catalog | None = None,
        labelled: LabelledPictures | None = None,
        direction: Direction = "pattern",
    ) -> None:
        self.name, self.image_size, self.catalog = places.name, image_size, catalog
        self._labelled = labelled
        self._direction: Direction = direction
        self._autoencoder = load_autoencoder(places.autoencoder).to(device)
        try:
            self._autoencoder.network.latent_shape(image_size)
        except UserError as error:
            raise UserError(f"pictures of {image_size} pixels do not fit {places.autoencoder}: {error}") from None
        self._generator = None if places.generator is None else load_generator(places.generator).to(device)
        self._device = device

    @property
    def attribute_shares(self) -> dict[str, float]:
        """Of the attributes that `move` knows: the share of pictures that have each."""
        known = self._labelled
        return {} if known is None else dict(zip(known.names, known.values.mean(axis=0).tolist(), strict=True))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes that `generate` knows; none without a generator."""
        if self._generator is None:
            return ()
        num = self._generator.network.config.num_classes
        known = () if self.catalog is None else self.catalog.class_names
        return known if len(known) == num else tuple(f"class {number}" for number in range(num))

    @torch.inference_mode()
    def reconstruct(self, picture: np.ndarray) -> tuple[np.ndarray, float]:
        """A picture uint8 [3, S, S] encoded (the mean of its posterior) and decoded, and its PSNR in dB."""
        images = self._images(picture)
        decoded = to_uint8(self._autoencoder.network.decode(self._encode(images)), "round")
        return decoded[0].cpu().numpy(), psnr(images, decoded).item()

    @torch.inference_mode()
    def move(self, picture: np.ndarray, amounts: Mapping[str, float]) -> np.ndarray:
        """The picture with its latent moved along directions of attributes, decoded: uint8 [3, S, S].

        Args:
            picture: uint8 [3, S, S].
            amounts: by the attribute's name, in deviations of its logit; attributes that are not named stay.

        Raises:
            UserError: an attribute is not known, or nothing is known of attributes.
        """
        names = list(self.attribute_shares)
        unknown = set(amounts) - set(names)
        if unknown:
            raise UserError(f"{self.name} knows no direction of {min(unknown)}: give pictures with it as --attributes")
        latents = self._encode(self._images(picture))
        amount = torch.tensor([amounts.get(name, 0.0) for name in names], device=self._device)
        step = amount @ self.directions
        return to_uint8(self._autoencoder.network.decode(latents + step.view_as(latents)), "round")[0].cpu().numpy()

    @torch.inference_mode()
    def generate(
        self, num_pictures: int, label: int | None, seed: int, guidance_scale: float, num_steps: int
    ) -> np.ndarray:
        """Pictures from the generator: uint8 [N, 3, S, S].

        Args:
            num_pictures: N.
            label: class of all; None: one after the other.
            seed: of the noise.
            guidance_scale: 1 is no guidance.
            num_steps: of the stochastic sampler.

        Raises:
            UserError: there is no generator, or it cannot do what is asked for.
        """
        if self._generator is None:
            raise UserError(f"{self.name} has no generator: give a run of stage 2, or a demo's folder")
        num_classes = self._generator.network.config.num_classes
        drawn = self._generator.sample(
            self._autoencoder,
            num_pictures,
            [number % num_classes for number in range(num_pictures)] if label is None else label,
            seed=seed,
            guidance_scale=guidance_scale,
            sampler=SamplerConfig(num_steps=num_steps),
        )
        return drawn.images.cpu().numpy()

    @cached_property
    def directions(self) -> Tensor:
        """A step of one deviation for each attribute, float32 [A, d]; the first time, probes are fitted for it."""
        labelled = self._labelled
        assert labelled is not None  # whoever names an attribute has some
        here = Distributed(device=self._device)
        pictures = CatalogPictures(labelled.catalog, self.image_size)
        encode = posterior_means(self._autoencoder.network)
        with torch.inference_mode(False), feature_folder(None, here) as folder:
            rows = encoded_rows(encode, "latents", pictures, folder, BATCH_SIZE, here)
            model = fit_linear(
                rows, torch.from_numpy(labelled.values), len(labelled.names), ProbeConfig(), distributed=here
            )
            return attribute_directions(model, rows, self._direction)

    def _images(self, picture: np.ndarray) -> Tensor:
        return torch.from_numpy(picture)[None].to(self._device)

    def _encode(self, images: Tensor) -> Tensor:
        return posterior_means(self._autoencoder.network)(images)
