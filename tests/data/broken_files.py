"""Makes pictures that are odd, broken or hostile: kinds of them, at least three of each, and their verdicts."""

import struct
import zlib

from pictures import encoded, picture
from PIL import Image, ImageCms

SOF0, SOF9 = b"\xff\xc0", b"\xff\xc9"
DHT, DQT, SOS, EOI, EXIF = b"\xff\xc4", b"\xff\xdb", b"\xff\xda", b"\xff\xd9", b"\xff\xe1"
ORIENTATION = 0x0112


def broken_files():
    """Kind to (beginning of the verdict, files); the files are to be called something.JPEG."""
    seeds = range(3)
    jpegs = [encoded(picture(64 + 17 * k, 64 - 3 * k, seed=k)) for k in seeds]
    small = [picture(40, 30, seed=k) for k in seeds]
    pngs = [encoded(image, "PNG") for image in small]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cut = "bad: image file is truncated"
    return {
        "empty": ("bad: the file is empty", [b""] * 3),
        "one byte": ("bad: not an image", [b"\xff", b"\0", b"G"]),
        "start of image only": ("bad", [b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0"]),
        "text": ("bad: not an image", [b"hello\n", b"a,b\n" * 1000, "Öl".encode("utf-16")]),
        "HTML error page": ("bad: not an image", [b"<!DOCTYPE html><p>404", b"<html>\r\n", b"\n<HTML>"]),
        "documents": ("bad: not an image", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", b"%PDF-1", b"<svg/>"]),
        "JPEG cut at 10%": ("bad", [data[: len(data) // 10] for data in jpegs]),
        "JPEG cut at 50%": (cut, [data[: len(data) // 2] for data in jpegs]),
        "JPEG cut at 90%": (cut, [data[: len(data) * 9 // 10] for data in jpegs]),
        "JPEG cut at 99%": (cut, [data[: len(data) * 99 // 100] for data in jpegs]),
        "JPEG without end mark": ("bad", [data[:-2] for data in jpegs]),
        "64 bytes overwritten": ("", [overwritten(data, k) for k, data in enumerate(jpegs)]),
        "wrong Huffman table": ("", [patched(data, DHT, 30 + k, b"\x7f") for k, data in enumerate(jpegs)]),
        "impossible Huffman table": ("bad", [patched(data, DHT, 5, b"\xff\xff") for data in jpegs]),
        "bad segment length": ("bad", [patched(jpegs[0], DQT, 2, size) for size in (b"\xff\xff", b"\x7f\0", b"\0\1")]),
        "garbage after the end": ("ok", [data + b"garbage" * 99 for data in jpegs]),
        "broken EXIF": (
            "ok",
            [
                with_exif(jpegs[0], junk)
                for junk in (b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 20)
            ],
        ),
        "thousands of scans": ("bad: more than 64 scans", [many_scans(number) for number in (65, 1024, 4000)]),
        "JPEG bomb": (
            "bad: decompression bomb",
            [framed(jpegs[0], *size) for size in ((65500, 65500), (8193, 8192), (9000, 9000))],
        ),
        "JPEG of no size": ("bad", [framed(jpegs[0], *size) for size in ((0, 64), (64, 0), (0, 0))]),
        "CMYK": ("odd: CMYK", [encoded(image.convert("CMYK")) for image in small]),
        "YCCK": ("odd: YCCK", [patched(encoded(image.convert("CMYK")), b"Adobe", 11, b"\2") for image in small]),
        "grey": ("odd: grey", [encoded(image.convert("L")) for image in small]),
        "grey with ICC profile": ("odd: grey", [encoded(image.convert("L"), icc_profile=profile) for image in small]),
        "4:4:0 and 4:1:1": (
            "ok",
            [
                resampled(1, (64, 32), (32, 64), 0x12),
                resampled(2, (64, 64), (128, 32), 0x41),
                resampled(2, (64, 64), (32, 128), 0x14),
            ],
        ),
        "12-bit": ("bad", [patched(data, SOF0, 4, b"\x0c") for data in jpegs]),
        "arithmetic coding": ("odd: arithmetic coding", [data.replace(SOF0, SOF9) for data in jpegs]),
        "RGB without transform": ("odd: stored as RGB", [encoded(image, keep_rgb=True) for image in small]),
        "EXIF orientation": ("odd: EXIF orientation", [turned(small[0], number) for number in range(2, 9)]),
        "progressive": ("ok", [encoded(image, progressive=True) for image in small]),
        "PNG": ("odd: PNG named .JPEG", pngs),
        "WebP": ("odd: WEBP named .JPEG", [encoded(image, "WEBP") for image in small]),
        "GIF": ("odd: GIF named .JPEG, palette", [encoded(image, "GIF") for image in small]),
        "BMP": ("odd: BMP named .JPEG", [encoded(image, "BMP") for image in small]),
        "animation": (
            "odd: GIF named .JPEG, palette, several frames",
            [encoded(small[0], "GIF", save_all=True, append_images=small[1:] * number) for number in (1, 2, 9)],
        ),
        "RGBA": ("odd: PNG named .JPEG, RGBA", [encoded(image.convert("RGBA"), "PNG") for image in small]),
        "palette with transparency": (
            "odd: PNG named .JPEG, palette, transparent",
            [encoded(image.convert("P"), "PNG", transparency=k) for k, image in enumerate(small)],
        ),
        "16-bit": (
            "odd: PNG named .JPEG, 16-bit",
            [
                png(9, 7, 16, 0, bytes(7 * (1 + 2 * 9))),
                png(9, 7, 16, 2, bytes(7 * (1 + 6 * 9))),
                encoded(Image.new("I;16", (9, 7), 300), "PNG"),
            ],
        ),
        "truncated PNG": ("bad", [data[:-1000] for data in pngs]),
        "PNG with a wrong checksum": ("bad: broken PNG", [overwritten(data, k) for k, data in enumerate(pngs)]),
        "truncated WebP": ("bad", [encoded(image, "WEBP")[:-200] for image in small]),
        "truncated GIF": ("bad", [encoded(image, "GIF")[:-900] for image in small]),
        "PNG bomb": ("bad: decompression bomb", [png(side, side, 8, 0, bytes(10**6)) for side in (8193, 20000, 2**31)]),
        "GIF bomb": (
            "bad: decompression bomb",
            [gif_bomb(encoded(small[0], "GIF"), side) for side in (8193, 30000, 65535)],
        ),
        "text bomb": ("bad", [text_bomb(pngs[0], size) for size in (2**24, 2**26, 2**28)]),
        "TIFF of tags": ("bad", [b"II*\0\x08\0\0\0\xff\xff" + bytes(size) for size in (0, 2000, 10**6)]),
        "1 x 1": ("ok", [encoded(picture(1, 1, seed=k)) for k in seeds]),
        "1 x 20000": ("bad: 1 x 20000 pixels are too unequal", [encoded(picture(1, 20000, seed=k)) for k in seeds]),
    }


def patched(data, mark, after, value):
    """`data` with `value` written `after` bytes behind the first `mark`."""
    position = data.index(mark) + after
    return data[:position] + value + data[position + len(value) :]


def overwritten(data, seed):
    middle = len(data) * 2 // 3
    return data[:middle] + bytes((37 * k + seed) % 251 for k in range(64)) + data[middle + 64 :]


def with_exif(jpeg, payload):
    payload = b"Exif\0\0" + payload
    return jpeg[:2] + EXIF + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def turned(image, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, exif=exif)


def framed(jpeg, width, height):
    """A JPEG whose header claims another size."""
    return patched(jpeg, SOF0, 5, struct.pack(">HH", height, width))


def resampled(subsampling, size, claimed_size, factors):
    """A JPEG with sampling factors that Pillow does not write: as many blocks in as many units, arranged otherwise."""
    jpeg = framed(encoded(picture(*size), subsampling=subsampling), *claimed_size)
    return patched(jpeg, SOF0, 11, bytes([factors]))


def many_scans(number):
    """A progressive JPEG that claims 4096 x 8192 grey pixels and repeats its last scan."""
    jpeg = encoded(Image.new("L", (64, 64)), progressive=True)
    jpeg = patched(jpeg, b"\xff\xc2", 5, struct.pack(">HH", 8192, 4096))
    last = jpeg[jpeg.rindex(SOS) : jpeg.rindex(EOI)]
    return jpeg[:-2] + last * number + EOI


def png(width, height, depth, colour, raw):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def gif_bomb(gif, side):
    """A GIF whose canvas and first frame claim `side` x `side` pixels."""
    size = struct.pack("<HH", side, side)
    return patched(patched(gif, b"GIF8", 6, size), b"\x2c\0\0\0\0", 5, size)


def compressed_zeros(num_mebibytes):
    """A zlib stream of zero bytes: one MiB is compressed and repeated, as all would take seconds at each import."""
    compressor = zlib.compressobj()
    header = compressor.compress(b"") + compressor.flush(zlib.Z_FULL_FLUSH)
    mebibyte = compressor.compress(bytes(2**20)) + compressor.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    end = compressor.flush()[:-4]
    adler32 = num_mebibytes * 2**20 % 65521 << 16 | 1
    return header + mebibyte * num_mebibytes + end + adler32.to_bytes(4, "big")


def text_bomb(data, size):
    """A PNG with a compressed comment of `size` bytes, a multiple of 2^20, in front of its pixels."""
    payload = b"Comment\0\0" + compressed_zeros(size // 2**20)
    chunk = struct.pack(">I", len(payload)) + b"zTXt" + payload + struct.pack(">I", zlib.crc32(b"zTXt" + payload))
    return data[:33] + chunk + data[33:]
