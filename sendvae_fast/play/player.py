"""What the controls of `sendvae play` do with the runs' networks, as pictures with captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageOps

from sendvae_fast.data.crop import center_crop
from sendvae_fast.data.decode import decode_rgb
from sendvae_fast.errors import UserError
from sendvae_fast.play.networks import RunNetworks

MAX_SLIDERS = 40
ANY_CLASS = -1

Rows = dict[str, list[tuple[np.ndarray, str]]]
"""By the name of a run pictures uint8 [S, S, 3], each with its caption."""
Crops = dict[int, np.ndarray]
"""The picture that is played with, cropped to every size that a run wants: uint8 [3, S, S]."""


class Player:
    """What the page's controls do. networks: at least one."""

    def __init__(self, networks: Sequence[RunNetworks]) -> None:
        self.networks = {one.name: one for one in networks}
        self.sliders = slider_names(networks)
        self.catalog = next((one.catalog for one in networks if one.catalog is not None), None)

    def open(self, path: str) -> Crops:
        """A picture from a file, upright and cropped for every run. Raises UserError if it is none."""
        picture = decode_rgb(path)
        ImageOps.exif_transpose(picture, in_place=True)
        return self._crops(picture)

    def example(self, number: int) -> Crops:
        """A picture of the first run that has some; another number is another picture. Raises UserError without any."""
        if self.catalog is None:
            raise UserError("none of these runs says where its pictures are: open one of yours")
        place = int(np.random.default_rng(number).integers(len(self.catalog)))
        return self._crops(decode_rgb(self.catalog.read(place), self.catalog.locate(place)))

    def reconstruct_and_move(self, crops: Crops, names: Sequence[str], amounts: Sequence[float]) -> Rows:
        """The picture, what each run makes of it, and where sliders are moved that moved.

        Args:
            crops: the picture; empty for none.
            names: of the runs that are ticked.
            amounts: of `self.sliders`, in their order.
        """
        rows: Rows = {}
        for one in [self.networks[name] for name in names if crops]:
            original = crops[one.image_size]
            reconstruction, psnr_db = one.reconstruct(original)
            shown = [(original, "original"), (reconstruction, f"decoded, {psnr_db:.1f} dB")]
            asked = {name: amount for name, amount in zip(self.sliders, amounts, strict=True) if amount}
            if known := {name: amount for name, amount in asked.items() if name in one.attribute_shares}:
                said = ", ".join(f"{_in_words(name)} {amount:+g}" for name, amount in known.items())
                shown.append((one.move(original, known), said))
            rows[one.name] = _channels_last(shown)
        return rows

    def generate(
        self, names: Sequence[str], label: int, num_pictures: float, seed: float, guidance: float, num_steps: float
    ) -> Rows:
        """Pictures of every run that has a generator; a page's numbers may come as floats.

        Raises:
            UserError: none has, or one cannot do what is asked for.
        """
        able = [self.networks[name] for name in names if self.networks[name].class_names]
        if not able:
            raise UserError("no run that is ticked has a generator: give a run of stage 2, or a demo's folder")
        rows: Rows = {}
        for one in able:
            chosen = None if label == ANY_CLASS else label
            drawn = one.generate(int(num_pictures), chosen, int(seed), guidance, int(num_steps))
            classes = range(len(drawn)) if chosen is None else [chosen] * len(drawn)
            captions = [_in_words(one.class_names[label % len(one.class_names)]) for label in classes]
            rows[one.name] = _channels_last(zip(drawn, captions, strict=True))
        return rows

    def _crops(self, picture: Image.Image) -> Crops:
        sizes = {one.image_size for one in self.networks.values()}
        return {size: center_crop(picture, size).transpose(2, 0, 1) for size in sizes}


def slider_names(networks: Sequence[RunNetworks]) -> list[str]:
    """The attributes of any run; of more than `MAX_SLIDERS` those that are nearest to half of the pictures."""
    shares = {name: share for one in networks for name, share in one.attribute_shares.items()}
    if len(shares) <= MAX_SLIDERS:
        return list(shares)
    kept = set(sorted(shares, key=lambda name: abs(shares[name] - 0.5))[:MAX_SLIDERS])
    return [name for name in shares if name in kept]


def _channels_last(shown: Iterable[tuple[np.ndarray, str]]) -> list[tuple[np.ndarray, str]]:
    return [(picture.transpose(1, 2, 0), caption) for picture, caption in shown]


def _in_words(name: str) -> str:
    return name.replace("_", " ")
