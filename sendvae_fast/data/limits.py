"""Limits of an encoded picture, counted in bytes, pixels and pieces, never in seconds.

Whatever stays under them is decoded within about two seconds and a gigabyte on a machine of 2020; whatever does not is
refused by every reader on every machine: the index, `data check`, training, and before DALI.
"""

import io
import re
import struct

from PIL import Image

MAX_FILE_BYTES = 2**28
MAX_PIXELS = 2**26
"""Room for ImageNet's largest picture (61 megapixels)."""
MAX_PYTHON_PIXELS = 2**17
"""Pixels of a picture in a coding that Pillow decodes in Python, at a megapixel a second."""
PYTHON_DECODERS = ("ppm", "ppm_plain", "bmp_rle")
MAX_ASPECT = 100
"""A longer strip is refused: its centre crop would first enlarge it to too much memory."""
MAX_READS = 2**17
"""Reads of one file by Pillow: every segment, chunk, block or pixel that its Python code looks at costs one to four."""
MAX_JPEG_SCANS = 64
"""Encoders write about ten; every scan costs a pass over the whole picture, however small it is."""
MAX_SCANNED_PIXELS = 2**30
"""Pixels times scans of a JPEG."""
MAX_JPEG_SEGMENTS = 2**12
MAX_DESCRIBING_SEGMENTS = 64
"""Segments of EXIF and of Photoshop, whose contents are taken apart when the file is opened; honest files have two."""
MAX_PACKED_CHUNKS = 256
"""Chunks of a PNG that each unfold to up to a megabyte: colour profiles and compressed texts."""
MAX_COMMENTS = 2**10
"""Comments in a PPM in plain text."""
MAX_TIFF_VALUES = 2**20
"""Numbers in the tags of a TIFF: offsets and sizes of strips and tiles."""
TIFF_CODINGS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate")

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""The next marker of a JPEG, in the data of a scan, too: a stuffed zero or a restart is none."""
_END_OF_IMAGE, _START_OF_SCAN, _APP1, _APP13, _NO_SEGMENT = 0xD9, 0xDA, 0xE1, 0xED, 0x01
_SEQUENTIAL_FRAMES = (0xC0, 0xC1, 0xC9)
_DESCRIBING = (b"Exif\0\0", b"Photoshop 3.0\0")
_TIFF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value, by the type of a TIFF's tag (TIFF 6.0, and BigTIFF)."""


class CountedReads(io.BytesIO):
    """A picture's bytes for Pillow, which raise a ValueError at the read after `MAX_READS`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._num_left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._num_left -= 1
        if self._num_left < 0:
            raise ValueError(f"more than {MAX_READS} pieces to read")
        return super().read(size)


def check_size(num_bytes: int) -> None:
    """Raise a ValueError when a picture has too many bytes to be read."""
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"{num_bytes} bytes are too many for a picture")


def check_encoded(data: bytes) -> int:
    """Look at what costs time or memory as soon as Pillow opens a picture; returns the scans of a JPEG.

    Raises:
        ValueError: it is over a limit. What is broken is left to Pillow, which has better words for it.
    """
    check_size(len(data))
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"\xff\xd8\xff"):
        return _num_scans(data)
    if data.startswith(b"\x89PNG"):
        if sum(map(data.count, (b"iCCP", b"zTXt", b"iTXt"))) > MAX_PACKED_CHUNKS:
            raise ValueError(f"more than {MAX_PACKED_CHUNKS} compressed texts and profiles in one PNG")
    elif data.startswith((b"II", b"MM")):
        _check_tiff_tags(data)
    return 0


def check_opened(image: Image.Image, data: bytes, num_scans: int) -> None:
    """Look at what decoding the opened picture would cost; `num_scans` is what `check_encoded` returned.

    Raises:
        ValueError: it is over a limit.
    """
    width, height = image.size
    short, long = sorted(image.size)
    # Progressive JPEGs and WebP are decoded through further buffers as large as the picture.
    doubled = image.format == "WEBP" or "progressive" in image.info
    if width * height * (2 if doubled else 1) > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {width} x {height} pixels")
    if long > MAX_ASPECT * short:
        raise ValueError(f"{width} x {height} pixels are too unequal for a centre crop")
    if num_scans * width * height > MAX_SCANNED_PIXELS:
        raise ValueError(f"{num_scans} scans are too many for {width} x {height} pixels")
    decoders = {tile[0] for tile in getattr(image, "tile", ())[:1]}
    if width * height > MAX_PYTHON_PIXELS and not decoders.isdisjoint(PYTHON_DECODERS):
        raise ValueError(f"{width} x {height} pixels are too many for a {image.format} in so slow a coding")
    if "ppm_plain" in decoders and data.count(b"#") > MAX_COMMENTS:
        raise ValueError(f"more than {MAX_COMMENTS} comments")
    if image.format == "TIFF":
        _check_tiff_layout(image)


def _num_scans(data: bytes) -> int:
    """The scans of the first picture in a JPEG file, found by its markers as a decoder finds them.

    Where the first scan holds all of the picture a decoder takes no other, and none is looked for.

    Raises:
        ValueError: there are too many, or too many segments.
    """
    position, scans, segments, describing = 2, 0, 0, 0
    num_components = None  # of a picture that the first scan may hold all of
    while match := _MARKER.search(data, position):
        position, marker = match.end(), data[match.end() - 1]
        if marker == _END_OF_IMAGE:
            break
        if marker == _NO_SEGMENT:
            continue
        segments += 1
        describing += marker in (_APP1, _APP13) and data.startswith(_DESCRIBING, position + 2)
        if segments > MAX_JPEG_SEGMENTS or describing > MAX_DESCRIBING_SEGMENTS:
            raise ValueError(f"{segments} segments are too many for a JPEG")
        if marker in _SEQUENTIAL_FRAMES:
            num_components = data[position + 7 : position + 8]
        elif marker == _START_OF_SCAN:
            scans += 1
            if data[position + 2 : position + 3] == num_components:
                break
            if scans > MAX_JPEG_SCANS:
                raise ValueError(f"more than {MAX_JPEG_SCANS} scans in one JPEG")
        position += max(int.from_bytes(data[position : position + 2], "big"), 2)
    return scans


def _check_tiff_tags(data: bytes) -> None:
    """ValueError where the first directory's tags have too many values, or more bytes than the file."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:3] == b"+"  # BigTIFF: every count and offset has 64 bits
    entry = struct.Struct(order + ("HHQ8x" if is_big else "HHL4x"))
    try:
        (directory,) = struct.unpack_from(order + ("Q" if is_big else "L"), data, 8 if is_big else 4)
        (num_tags,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, directory)
        first = directory + (8 if is_big else 2)
        tags = [entry.unpack_from(data, first + number * entry.size) for number in range(min(num_tags, 2**16))]
    except (struct.error, OverflowError):
        return  # cut short: Pillow refuses it
    values = sum(count for _, kind, count in tags if _TIFF_UNITS.get(kind, 1) > 1)
    if values > MAX_TIFF_VALUES:
        raise ValueError(f"{values} values are too many for the tags of a TIFF")
    if sum(count * _TIFF_UNITS.get(kind, 0) for _, kind, count in tags) > len(data):
        raise ValueError("the tags of the TIFF have more bytes than the file")


def _check_tiff_layout(image: Image.Image) -> None:
    coding, tags = image.info.get("compression"), image.tag_v2  # pyright: ignore[reportAttributeAccessIssue] - a TIFF has it
    if coding not in TIFF_CODINGS:
        raise ValueError(f"a TIFF compressed by {coding}: it may be one of {', '.join(TIFF_CODINGS)}")
    tile = tags.get(322, 1), tags.get(323, 1)  # tile width and length
    if not all(isinstance(side, int) and side <= MAX_PIXELS for side in tile) or tile[0] * tile[1] > MAX_PIXELS:
        raise ValueError(f"decompression bomb: tiles of {tile[0]} x {tile[1]} pixels")
