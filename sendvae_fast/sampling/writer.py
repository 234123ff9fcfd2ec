"""Pictures out: a folder of PNGs that resumes, and the npz of the ADM evaluator.

Shape letters: B batch, N images, H W picture height and width. Pictures are uint8 [B, 3, H, W].
"""

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.files import remove_unfinished, staged_output
from sendvae_fast.png import is_whole_png, read_png

NUM_THREADS = min(8, os.cpu_count() or 1)
"""For PNG files: zlib and the disk work without Python's lock."""


class PngFolder:
    """A folder of samples, `%06d.png` by sample id. Files appear whole or not at all, so an interrupted run resumes.

    Raises UserError if `root` is a file.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give a folder for the PNG files")

    def path(self, sample_id: int) -> Path:
        return self.root / f"{sample_id:06d}.png"

    def write(self, sample_ids: Sequence[int], images: Tensor) -> None:
        """images uint8 [B, 3, H, W], one per id, on any device."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
        pairs = list(zip(sample_ids, pixels, strict=True))
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            # list(): an iterator would keep the exceptions of the threads to itself
            list(pool.map(lambda pair: self._write_one(*pair), pairs))

    def missing(self, sample_ids: Sequence[int]) -> list[int]:
        """Those of the ids that have no PNG yet, or a damaged one."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            is_whole = pool.map(lambda sample_id: is_whole_png(self.path(sample_id)), sample_ids)
            return [sample_id for sample_id, whole in zip(sample_ids, is_whole, strict=True) if not whole]

    def remove_unfinished(self) -> None:
        """Remove what a killed run was writing. Nobody may be writing into the folder."""
        remove_unfinished(self.root)

    def sample_ids(self) -> list[int]:
        """Ids of the PNGs there are, ascending."""
        names = (re.fullmatch(r"(\d{6,})\.png", path.name) for path in self.root.glob("*.png"))
        return sorted(int(name[1]) for name in names if name)

    def batches(self, sample_ids: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """The pictures of the ids in that order: uint8 [<= batch_size, 3, H, W]. A missing file is a UserError."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for first in range(0, len(sample_ids), batch_size):
                yield torch.stack(list(pool.map(self._read_one, sample_ids[first : first + batch_size])))

    def _write_one(self, sample_id: int, pixels: np.ndarray) -> None:
        with staged_output(self.path(sample_id)) as unfinished:
            Image.fromarray(pixels).save(unfinished, format="PNG")

    def _read_one(self, sample_id: int) -> Tensor:
        path = self.path(sample_id)
        try:
            return torch.from_numpy(read_png(path)).permute(2, 0, 1)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error}); sample again to fill the gap") from error


def write_npz(path: str | os.PathLike[str], batches: Iterable[Tensor], num_images: int) -> None:
    """Write the sample file of the ADM evaluator: `arr_0`, uint8 [num_images, H, W, 3], uncompressed, as np.savez does.

    batches: uint8 [B, 3, H, W] each, `num_images` in all; only one is in memory at a time. The file appears under
    `path` when it is complete. Raises ValueError if the pictures are not `num_images` or differ in size.
    """
    with (
        staged_output(path) as unfinished,
        zipfile.ZipFile(unfinished, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        size, written = None, 0
        for images in batches:
            if size is None:
                size = images.shape[2:]
                shape = (num_images, *size, 3)
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(int(n) for n in shape)}
                np.lib.format.write_array_header_1_0(array, header)
            if images.shape[2:] != size:
                raise ValueError(f"pictures of {tuple(size)} and {tuple(images.shape[2:])} in one npz")
            array.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
            written += len(images)
        if written != num_images:
            raise ValueError(f"npz of {num_images} pictures was given {written}")
