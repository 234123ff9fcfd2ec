"""libjpeg-turbo's warnings about a JPEG: what decoders paint over where a scan is damaged, and Pillow does not tell.

A byte that changed in a JPEG's scan mostly leaves a file that decodes: from there on blocks have wrong pixels.
libjpeg notices when the codes that follow make no sense, end early or leave bytes over, and goes on with grey or
shifted blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage, failure_reason
from sendvae_fast.errors import needs_extra

COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""What simplejpeg decodes the modes of Pillow to, which the catalog knows."""
QUEUED = 1024
"""Pictures that are given to the threads at once."""


def jpeg_warning(data: bytes, mode: str = "RGB") -> str | None:
    """The first warning of libjpeg-turbo, in its words, or None.

    Damage after which the codes happen to make sense again and to end where they should gives no warning.

    Args:
        data: a JPEG that decodes.
        mode: Pillow's mode of it.
    """
    import simplejpeg

    try:
        # At an eighth of the size, which is quicker and reads all codes nevertheless.
        simplejpeg.decode_jpeg(data, COLOURS[mode], min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return failure_reason(error)
    return None


def jpegs_with_warnings(catalog: Catalog, num_threads: int) -> Iterator[tuple[int, str | None]]:
    """(sample id, `jpeg_warning`) of every JPEG of an indexed catalog that decodes, in order.

    Raises:
        UserError: simplejpeg is not installed.
    """
    with needs_extra("data", "looking for libjpeg's warnings"):
        import simplejpeg  # noqa: F401 - before the first of many pictures
    assert catalog.facts is not None and catalog.verdicts is not None, "not an indexed catalog"
    formats, modes = (catalog.facts[name].to_pylist() for name in ("format", "mode"))
    ids = [i for i in range(len(catalog)) if formats[i] == "JPEG" and modes[i] in COLOURS and not catalog.is_bad[i]]

    def warning(sample_id: int) -> str | None:
        try:
            return jpeg_warning(catalog.read(sample_id), modes[sample_id])
        except UnreadableImage as error:
            return error.reason

    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(ids), QUEUED):
            part = ids[start : start + QUEUED]
            yield from zip(part, pool.map(warning, part), strict=True)
