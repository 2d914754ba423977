"""Members of zip and tar archives as streams: nothing is written to disk, and a member's name is only a label.

zip  [local header | name | data]* [directory]      a member is found through the directory at the end
tar  [512-byte header | data, padded to 512]* 0...0  members follow each other

*Source.* APPNOTE.TXT 6.3 (zip) 4.3.7, 4.3.9; POSIX.1-2008 pax and the GNU tar manual (tar).
*Why.* A zip that was cut short has no directory: its members are found by walking from header to header, and those before
the damage are read. The library's tar reader takes a damaged header for the end of the archive; here the two zero blocks
decide.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from zero2llm.data.readers.engines import ENGINES, Stored
from zero2llm.data.readers.streams import BLOCK, Inflated, Opened, Part, buffered

LOCAL = struct.Struct("<4s5H3I2H")  # signature version flags method time date crc packed size name extra
SPARE = 1 << 20  # a long name or a pax header is never longer
METHODS = {8: ENGINES["deflate"], 12: ENGINES[".bz2"], 93: ENGINES[".zst"]}


@dataclass(frozen=True)
class Entry:
    """A member of a zip. ``header`` is its local header's place; size or crc are None where only its end would tell."""

    name: str
    header: int
    size: int | None
    method: int
    crc: int | None
    encrypted: bool


def zip_entries(path: str) -> list[Entry]:
    """Raises ValueError if the directory cannot be read."""
    state = Path(path).stat()
    return list(_directory(path, state.st_size, state.st_mtime_ns).values())


@lru_cache(maxsize=4)
def _directory(path: str, size: int, changed: int) -> dict[int, Entry]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [i for i in archive.infolist() if not i.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, OSError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(str(error)) from None
    return {
        i.header_offset: Entry(i.filename, i.header_offset, i.compress_size, i.compress_type, i.CRC, bool(i.flag_bits & 1))
        for i in infos
    }


def zip_member(path: str, header: int) -> Entry:
    zip_entries(path)
    state = Path(path).stat()
    return _directory(path, state.st_size, state.st_mtime_ns)[header]


def open_zip_member(path: str, entry: Entry) -> Opened:
    """Raises ValueError if the member is encrypted or packed by a rare method."""
    if entry.encrypted:
        raise ValueError("is encrypted; unpack it first")
    if entry.method and entry.method not in METHODS:
        raise ValueError(f"is packed by method {entry.method}, which is not read; unpack it first")

    def packed() -> Opened:
        file = open(path, "rb")
        file.seek(entry.header)
        _, start = _local_header(file, entry.header)
        file.seek(start)
        return buffered(Part(file, entry.size))

    if entry.size == 0:
        return Opened(io.BufferedReader(io.BytesIO()))
    make = METHODS.get(entry.method, lambda: Stored(entry.size))
    return buffered(Inflated(packed, make, several=False, crc=entry.crc))


def _local_header(file: BinaryIO, at: int) -> tuple[Entry | None, int]:
    """(entry or None if there is no header, where its data begins)."""
    raw = file.read(LOCAL.size)
    if len(raw) < LOCAL.size or raw[:4] != b"PK\3\4":
        return None, at
    _, _, flags, method, _, _, crc, packed, size, n_name, n_extra = LOCAL.unpack(raw)
    name, extra = file.read(n_name), file.read(n_extra)
    while len(extra) >= 4:  # zip64: the true sizes, in the order size, packed
        tag, n = struct.unpack_from("<HH", extra)
        if tag == 1 and n >= 16 and packed == 0xFFFFFFFF:
            packed = struct.unpack_from("<8xQ", extra, 4)[0]
        extra = extra[4 + n :]
    start, later = at + LOCAL.size + n_name + n_extra, bool(flags & 8)
    text = name.decode("utf-8" if flags & 0x800 else "cp437", "replace")
    return Entry(text, at, None if later else packed, method, None if later else crc, bool(flags & 1)), start


def walk_zip(path: str) -> Iterator[Entry]:
    """The members of a zip without a directory, from header to header, until nothing follows that can be found."""
    with open(path, "rb") as file:
        at = 0
        while True:
            file.seek(at)
            entry, start = _local_header(file, at)
            if entry is None:
                return
            file.seek(start)
            size = entry.size if entry.size is not None else _deflated_size(file) if entry.method == 8 else None
            if not entry.name.endswith("/"):
                yield Entry(entry.name, at, size, entry.method, entry.crc, entry.encrypted)
            if size is None:
                return
            at = start + size
            if entry.size is None:  # a descriptor of 12 to 24 bytes follows the data
                file.seek(at)
                at += max(file.read(28).find(b"PK\3\4"), 0)


def _deflated_size(file: BinaryIO) -> int | None:
    """Length of the deflate stream that begins here; None if it does not end."""
    inflate, taken = zlib.decompressobj(-15), 0
    try:
        while data := file.read(BLOCK):
            taken += len(data)
            while data and not inflate.eof:
                inflate.decompress(data, 1 << 20)
                data = inflate.unconsumed_tail
            if inflate.eof:
                return taken - len(inflate.unused_data)
    except zlib.error:
        pass
    return None


@dataclass
class TarMember:
    """``start`` is where its data begins. It must be read before the next one is asked for."""

    name: str
    start: int
    size: int
    part: Part


def walk_tar(file: BinaryIO) -> Iterator[TarMember]:
    """Regular files in order. Raises ValueError at a damaged header, or if the archive ends without its end mark."""
    at, common, own = 0, {}, {}
    while (info := _tar_header(file, at)) is not None:
        at += 512
        if info.type in b"LKxgX":
            fields = _tar_fields(file, info, at)
            common, own = (common | fields, own) if info.type == b"g" else (common, own | fields)
            size = info.size
        else:
            fields, own = common | own, {}
            if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in fields):
                raise ValueError(f"{info.name} is a sparse file, which is not read; unpack the archive")
            size = 0 if info.type in b"123456" else int(fields.get("size", info.size))  # links, folders, devices
            part = Part(file, size, own=False)
            if info.isreg():
                yield TarMember(fields.get("path", info.name), at, size, part)
            _skip(file, part.left + -size % 512)
        at += size + -size % 512


def _tar_header(file: BinaryIO, at: int) -> tarfile.TarInfo | None:
    raw = file.read(512)
    try:
        return tarfile.TarInfo.frombuf(raw, "utf-8", "replace")
    except tarfile.EOFHeaderError:
        return None
    except tarfile.HeaderError as error:
        what = "it ends without its end mark" if len(raw) < 512 else f"the header at byte {at}: {error}"
        raise ValueError(f"{what}; the archive is damaged or cut short") from None


def _tar_fields(file: BinaryIO, info: tarfile.TarInfo, at: int) -> dict[str, str]:
    """What a header in front of the header says of the next member."""
    if info.size > SPARE:
        raise ValueError(f"a header of {info.size} bytes at byte {at}; the archive is damaged")
    data = file.read(info.size + -info.size % 512)[: info.size]
    if info.type == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "replace")}
    return {} if info.type == b"K" else _pax(data)


def _pax(data: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n", the length counting itself."""
    fields = {}
    while data and data[:1].isdigit():
        length, _, rest = data.partition(b" ")
        n = int(length) if length.isdigit() else 0
        if n <= len(length) + 1:
            raise ValueError("a pax header is damaged")
        key, _, value = data[len(length) + 1 : n - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[n:]
    return fields


def _skip(file: BinaryIO, n: int) -> None:
    if file.seekable():
        file.seek(n, io.SEEK_CUR)
        return
    while n > 0 and (data := file.read(min(n, BLOCK))):
        n -= len(data)
