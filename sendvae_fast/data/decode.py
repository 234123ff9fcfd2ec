"""Examination and decoding of encoded pictures by Pillow, the reference for every other decoder.

The verdicts "bad" (refused) and "odd" (decoded, but out of the ordinary) are made here alone, from the bytes and the
name alone, so that a picture has the same verdict in a folder, a tar shard and a parquet file.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image

from sendvae_fast.data import limits
from sendvae_fast.errors import UserError

FORMAT_OF_EXTENSION = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
"""File name endings taken for images, whatever their case, and the format they promise."""
FORMATS = tuple(dict.fromkeys(FORMAT_OF_EXTENSION.values()))
"""The only formats tried: some of Pillow's other plugins run programs or never end."""
ORIENTATION_TAG = 0x0112
MAX_REASON = 200
ODD_MODES = {"1": "black and white", "L": "grey", "P": "palette", "I;16": "16-bit", "I;16B": "16-bit", "I": "16-bit"}
ODD_JPEG_FRAMES = {0xC3: "lossless", 0xC9: "arithmetic coding", 0xCA: "arithmetic coding", 0xCB: "arithmetic coding"}


class UnreadableImage(UserError):
    """A picture that cannot be read or decoded; `path` (where it lies) and `reason` are kept for lists of them."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"cannot read the image {path}: {reason}; remove or replace it and run the same command again, "
            "or raise max_bad_fraction to pass over unreadable images"
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)  # an exception is pickled by its message alone otherwise


@dataclass(frozen=True)
class PictureFacts:
    """The facts about an encoded picture that `examine` found."""

    verdict: str
    """"ok", "odd: <why>" (it decodes, but other decoders may differ), or "bad: <reason>"."""
    width: int = 0
    height: int = 0
    mode: str = ""
    """Pillow's mode as stored, before the conversion to RGB."""
    format: str = ""


def read_encoded(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a picture's file.

    Raises:
        UnreadableImage: when it is missing, not a regular file, not readable or absurdly large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a FIFO would otherwise wait for ever
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            limits.check_size(status.st_size)
            return file.read()
    except (OSError, ValueError) as error:
        raise UnreadableImage(os.fspath(path), failure_reason(error)) from error


def decode_rgb(source: bytes | str | os.PathLike[str], where: str = "in memory") -> Image.Image:
    """Decode a picture of any mode, from its bytes or from a file, to RGB as Pillow's `convert("RGB")` does.

    EXIF orientation is ignored, as the ADM protocol does; of an animation the first frame counts. Truncated files are
    refused, not padded with grey.

    Args:
        source: the encoded bytes, or the path of a file with them.
        where: the name of bytes in messages; a path needs none.

    Raises:
        UnreadableImage: when the file is missing, broken, truncated, not an image, or over `data.limits`.
    """
    if not isinstance(source, bytes):
        source, where = read_encoded(source), os.fspath(source)
    try:
        with _open(source) as image:
            return _pixels(image, source)
    except Exception as error:  # Pillow's plugins raise nearly every type for a broken file, SyntaxError included
        raise UnreadableImage(where, failure_reason(error)) from error


def examine(data: bytes, name: str, quick: bool = False) -> PictureFacts:
    """Examine the picture `data`; the ending of `name` tells the expected format. Never raises.

    Args:
        quick: look at the header only, so that damage further on goes unseen.
    """
    try:
        with _open(data) as image:
            facts = {"width": image.width, "height": image.height, "mode": image.mode, "format": image.format or ""}
            oddities = _oddities(image, data, name)  # before `load`, which may change the mode
            if not quick:
                _pixels(image, data)
    except Exception as error:  # as in `decode_rgb`
        return PictureFacts(f"bad: {failure_reason(error)}")
    return PictureFacts(f"odd: {', '.join(oddities)}" if oddities else "ok", **facts)


def failure_reason(error: Exception) -> str:
    """One line for the message: Pillow's own words, without the path that they may repeat."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: more than {limits.MAX_PIXELS} pixels"
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, MemoryError):
        return "decoding it takes too much memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split()) or type(error).__name__
    return words[:MAX_REASON].encode("ascii", "backslashreplace").decode()  # they may repeat bytes of the file


def check(data: bytes, where: str) -> str:
    """The format of the picture `data`, by its header, after all limits of `data.limits` have been looked at.

    Raises:
        UnreadableImage: it is over one of them, or no picture.
    """
    try:
        with _open(data) as image:
            return image.format or ""
    except Exception as error:  # as in `decode_rgb`
        raise UnreadableImage(where, failure_reason(error)) from error


def _open(data: bytes) -> Image.Image:
    """Parse the header; refuse a picture that would take too long or too much memory to decode.

    Raises:
        ValueError: for a picture over the limits; Pillow's own errors for a broken one.
    """
    num_scans = limits.check_encoded(data)
    image = Image.open(limits.CountedReads(data), formats=FORMATS)
    limits.check_opened(image, data, num_scans)
    return image


def _pixels(image: Image.Image, data: bytes) -> Image.Image:
    """Decode an opened picture to RGB."""
    if image.format == "PNG":  # Pillow decodes PNGs without looking at the checksums of their pixels
        with Image.open(limits.CountedReads(data), formats=("PNG",)) as again:
            again.verify()
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy one that is RGB already


def _oddities(image: Image.Image, data: bytes, name: str) -> list[str]:
    """Why a picture is not a plain RGB one of the format that its name promises."""
    found = []
    file_format = "JPEG" if image.format == "MPO" else image.format
    extension = PurePosixPath(name).suffix
    if FORMAT_OF_EXTENSION.get(extension.lower(), file_format) != file_format:
        found.append(f"{file_format} named {extension}")
    if image.mode == "CMYK" and image.info.get("adobe_transform") == 2:
        found.append("YCCK")
    elif image.mode != "RGB":
        found.append(ODD_MODES.get(image.mode, image.mode))
    elif file_format == "PNG" and data[24] == 16:  # Pillow drops the low bytes: its mode does not tell
        found.append("16-bit")
    if file_format == "JPEG":
        found += _jpeg_oddities(image, data)
    if "transparency" in image.info and image.mode != "RGBA":
        found.append("transparent colour")
    if _has_more_frames(image):
        found.append("several frames, the first counts")
    orientation = _orientation(image)
    if orientation not in (None, 1):
        found.append(f"EXIF orientation {orientation} is ignored")
    return found


def _jpeg_oddities(image: Image.Image, data: bytes) -> list[str]:
    found = []
    frame = _jpeg_frame_type(data)
    if frame in ODD_JPEG_FRAMES:
        found.append(ODD_JPEG_FRAMES[frame])
    component_ids = bytes(component[0] for component in image.layer)  # pyright: ignore[reportAttributeAccessIssue] - a JPEG has it
    if image.mode == "RGB" and (image.info.get("adobe_transform") == 0 or component_ids == b"RGB"):
        found.append("stored as RGB, not YCbCr")
    return found


def _jpeg_frame_type(data: bytes) -> int | None:
    """The marker of a JPEG's first frame header (SOF0 is 0xC0), None when there is none."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:
            position += 1
        elif marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD9:  # without a segment
            position += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # damage in frames after the first does not matter
        return False


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damage in the EXIF data does not matter
        return None
