"""A reader of tar headers that does not extract, follow or trust anything in the tar.

Formats: POSIX pax and ustar, GNU (https://www.gnu.org/software/tar/manual/html_node/Standard.html). Python's `tarfile`
suits honest archives, but reads headers of any claimed size into memory and cannot say where an archive breaks.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sendvae_fast.errors import UserError

BLOCK = 512
MAX_EXTENSION_BYTES = 2**20
"""Room for a long name or a pax header; honest ones take hundreds of bytes."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REGULAR = b"0\07"
DIRECTORY, SPARSE, GNU_LONG_NAME, PAX = b"5SLx"
EXTENSIONS = b"LKxg"
"""Headers that say more about the next member, or about all."""
PASSED_OVER = {
    ord("1"): "a hard link",
    ord("2"): "a symbolic link",
    ord("3"): "a character device",
    ord("4"): "a block device",
    ord("6"): "a named pipe",
    SPARSE: "a sparse file",
}
WITHOUT_DATA = b"123456"


@dataclass(frozen=True)
class TarMember:
    """One file in a tar."""

    name: str
    offset: int
    """First byte of its contents in the tar."""
    size: int


@dataclass
class TarContents:
    """The readable part of one tar."""

    members: list[TarMember] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    """Members that are no plain files or have unsafe names, one line each."""
    damage: str | None = None
    """Why the tar could not be read to its end, and where."""


class _Damaged(Exception):
    """The tar cannot be read any further."""


def read_tar_headers(path: Path) -> TarContents:
    """List a tar up to its end or to where it is damaged.

    Raises:
        UserError: when it cannot be opened or is compressed.
    """
    contents = TarContents()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _refuse_compressed(path, os.pread(descriptor, 8, 0))
            _walk(descriptor, contents, str(path))
        finally:
            os.close(descriptor)
    except _Damaged as error:
        contents.damage = f"{path}: {error}"
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}; check the path") from error
    return contents


def _refuse_compressed(path: Path, head: bytes) -> None:
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"the shard {path} is compressed ({name}), so that samples in it cannot be read at random; "
                "decompress it: photographs are compressed already"
            )


def _walk(descriptor: int, contents: TarContents, path: str) -> None:
    """Add the members of the tar to `contents`; raises `_Damaged` where it ends too early or makes no sense."""
    end = os.fstat(descriptor).st_size
    position = 0
    extended: dict[str, bytes] = {}  # what the headers before a member say about it
    seen: set[str] = set()
    while True:
        start, header = position, os.pread(descriptor, BLOCK, position)
        if len(header) < BLOCK:
            raise _Damaged(f"cut short at byte {end}: the end mark is missing")
        if not any(header):
            return
        size, kind = _size(header, start), header[156]
        if kind in REGULAR and "size" in extended:
            size = _pax_size(extended["size"], start)
        data_start = start + BLOCK
        if kind == SPARSE:
            data_start = _after_sparse_map(descriptor, header, data_start)
        if kind in WITHOUT_DATA:
            position = data_start
        elif data_start + size > end:
            raise _Damaged(f"cut short at byte {end}: the member at byte {start} claims {size} bytes")
        else:
            position = data_start - size // -BLOCK * BLOCK
        if kind in EXTENSIONS:
            if size > MAX_EXTENSION_BYTES:
                raise _Damaged(f"a header of {size} bytes at byte {start}")
            extended |= _extension(kind, os.pread(descriptor, size, data_start), start)
            continue
        name = _member_name(header, extended).removeprefix("./")
        problem = _problem(kind, name, extended, seen)
        extended = {}
        if kind == DIRECTORY or (kind in REGULAR and name.endswith("/")):
            continue
        if problem:
            contents.passed_over.append(f"{path}: {name!r} at byte {start} is {problem}, passed over")
        else:
            seen.add(name)
            contents.members.append(TarMember(name, data_start, size))


def _problem(kind: int, name: str, extended: dict[str, bytes], seen: set[str]) -> str | None:
    """Why a member is not taken for a file, None when it is."""
    if kind not in REGULAR:
        return PASSED_OVER.get(kind, f"of the unknown type {chr(kind)!r}")
    if any(key.startswith("GNU.sparse.") for key in extended):
        return PASSED_OVER[SPARSE]
    if not name or "\0" in name:
        return "without a usable name"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "outside the archive by its name"
    return "a second member of its name" if name in seen else None


def _size(header: bytes, start: int) -> int:
    """The size field, after a check of the header's sum."""
    unsigned = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    stored = _number(header[148:156])
    if stored != unsigned:
        raise _Damaged(f"no valid header at byte {start}")
    size = _number(header[124:136])
    if size is None or size < 0:
        raise _Damaged(f"no valid size in the header at byte {start}")
    return size


def _number(octets: bytes) -> int | None:
    """A number field: octal text, or with the top bit set a big-endian two's complement (GNU); None for neither."""
    if octets[0] in (0x80, 0xFF):
        return int.from_bytes(octets[1:], "big", signed=False) - (256 ** (len(octets) - 1) if octets[0] == 0xFF else 0)
    try:
        return int(octets.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None


def _extension(kind: int, payload: bytes, start: int) -> dict[str, bytes]:
    """The pax keys in a header for the next member; keys for links or for all members do not matter here."""
    if kind == GNU_LONG_NAME:
        return {"path": payload.split(b"\0")[0]}
    return _pax_records(payload, start) if kind == PAX else {}


def _pax_size(value: bytes, start: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise _Damaged(f"no valid size in the pax header before byte {start}")
    return int(value)


def _pax_records(payload: bytes, start: int) -> dict[str, bytes]:
    r"""`length key=value\n` records, where length counts the whole record."""
    records, position = {}, 0
    while position < len(payload):
        length, space, _ = payload[position : position + 10].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(payload) - position:
            raise _Damaged(f"no valid pax header at byte {start}")
        key, _, value = payload[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        records[key.decode(errors="surrogateescape")] = value
        position += int(length)
    return records


def _after_sparse_map(descriptor: int, header: bytes, data_start: int) -> int:
    """Where the contents of an old GNU sparse member begin: after the blocks that go on with its map."""
    more = header[482]
    while more:
        block = os.pread(descriptor, BLOCK, data_start)
        more = len(block) == BLOCK and block[504]
        data_start += BLOCK
    return data_start


def _member_name(header: bytes, extended: dict[str, bytes]) -> str:
    if "path" in extended:
        name = extended["path"]
    else:
        name = header[:100].split(b"\0")[0]
        prefix = header[345:500].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and prefix:
            name = prefix + b"/" + name
    return os.fsdecode(name)
