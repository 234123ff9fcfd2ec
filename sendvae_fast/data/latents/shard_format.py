"""The latent cache on disk: how a source is described, and how shard headers and `cache.json` are read."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sendvae_fast import checks
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.errors import UserError
from sendvae_fast.reading import read_json, reading

SCHEMA_VERSION = 1
CACHE_FILE = "cache.json"
SHARD_PATTERN = re.compile(r"latents_(\d{5})\.safetensors")
SHARD_KEY = "shard"
"""Key of a shard's metadata that holds its description, as JSON."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


@dataclass(kw_only=True, frozen=True)
class LatentSource:
    """The source that latents were computed from. Two caches may be mixed only when all but `image_root` agree.

    Raises `UserError` for a value out of range.
    """

    autoencoder_sha256: str
    """`weights_sha256` of the autoencoder."""
    autoencoder_config: dict[str, Any]
    """Its configuration, as JSON can hold it."""
    image_root: str
    """Folder of the images; recorded, but free to move."""
    file_list_sha256: str
    """Of the images' names, in order."""
    num_samples: int
    image_size: int
    dtype: str = "float32"
    """Storage of mean and std: float32 or bfloat16."""
    shard_size: int = 4096
    """Samples per shard."""
    flips: bool = False
    """Whether the latents of the mirrored images are there too."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"the latent cache cannot store {self.dtype}; choose one of {', '.join(DTYPES)}")
        checks.at_least(1, self, "shard_size")

    @classmethod
    def of_catalog(
        cls,
        catalog: Catalog,
        image_size: int,
        autoencoder_sha256: str,
        autoencoder_config: dict[str, Any],
        **storage: Any,
    ) -> "LatentSource":
        """Describe latents of `catalog`; `storage` may hold `dtype` and `shard_size`."""
        return cls(
            autoencoder_sha256=autoencoder_sha256,
            autoencoder_config=autoencoder_config,
            image_root=str(catalog.root),
            file_list_sha256=file_list_sha256(catalog),
            num_samples=len(catalog),
            image_size=image_size,
            **storage,
        )

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_size)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First sample id of a shard, and the one after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_samples)

    def check_same(self, found: Mapping[str, Any], where: Path) -> None:
        """Raise a UserError when `found`, the description in the file `where`, is of another source."""
        for name, value in json.loads(json.dumps(asdict(self))).items():  # through JSON: tuples become lists, as found
            if name != "image_root" and found.get(name) != value:
                raise UserError(
                    f"{where} was made with {name} {found.get(name)}, not {value}; give another cache directory, "
                    f"or remove {where.parent} to make it anew"
                )


def file_list_sha256(catalog: Catalog) -> str:
    """Hash of a catalog's names, in order: which id is which image."""
    return hashlib.sha256("\n".join(catalog.names).encode(errors="surrogateescape")).hexdigest()


def shard_header(path: Path) -> dict[str, Any] | None:
    """The header of a shard: its `source`, the `sums` for the statistics [3, C], and the latents' `shape` [C, H, W].

    None when the file is missing, cut short or broken.
    """
    try:
        with reading(path, "write it again"), safe_open(path, framework="pt") as file:
            note, shape = json.loads(file.metadata()[SHARD_KEY]), file.get_slice("mean").get_shape()[1:]
            sums = torch.tensor(note["sums"], dtype=torch.float64)
            if sums.shape != (3, shape[0]) or not sums.isfinite().all() or not isinstance(note["source"], dict):
                return None
            return {"source": note["source"], "sums": sums, "shape": shape}
    except UserError:
        return None


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file and where they lie, so that rows can be read without mapping the file.

    The format: the header's length as a 64-bit number, the header as JSON, the tensors; offsets count from the end of
    the header. safetensors itself has checked the header (no overlap, nothing outside the file) before it is read here.

    Raises:
        SafetensorError, OSError: the file is not a whole safetensors file.
    """
    with safe_open(path, framework="pt"):
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: TensorPlace(_SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _SAFETENSORS_DTYPES
        for begin in entry["data_offsets"][:1]
    }


def read_cache_file(directory: Path) -> dict[str, Any]:
    """The contents of `cache.json`.

    Raises:
        UserError: when it is missing (the cache is unfinished), damaged or of another schema version.
    """
    path = directory / CACHE_FILE
    if not path.exists():
        raise UserError(
            f"{directory} is not a finished latent cache ({CACHE_FILE} is missing); "
            "run `sendvae cache-latents` to make or to finish it"
        )
    note = read_json(path, "remove it and run `sendvae cache-latents` again")
    version = note.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            f"remove {directory} and run `sendvae cache-latents` again"
        )
    return note
