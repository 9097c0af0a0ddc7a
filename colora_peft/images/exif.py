"""EXIF blocks: made to fit an image that now stands upright, taken out of TIFF files and put into them.

An EXIF block is a small TIFF file: a header, and directories of entries (tag, type, count, value or offset). It is
edited in place, so that all else stays as it was to the byte: the notes of camera makers hold offsets and would break
when moved. TIFF files have no block; their entries stand among those that describe the pixels, and are copied raw.

EXIF 2.32 (CIPA DC-008-2019), TIFF 6.0 (Adobe, 1992).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_HEADER_BYTES = 8
_ENTRY_BYTES = 12
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SHORT, _LONG = 3, 4

# Limits of one file, in all directories. Cameras write some hundred entries, and notes of a few megabytes.
_MOST_ENTRIES, _MOST_BYTES = 4096, 1 << 25

_WIDTH, _HEIGHT, _ORIENTATION, _THUMBNAIL, _THUMBNAIL_BYTES = 256, 257, 274, 513, 514
_EXIF, _GPS, _INTEROPERABILITY, _EXIF_WIDTH, _EXIF_HEIGHT = 34665, 34853, 40965, 40962, 40963
_DIRECTORIES = frozenset({_EXIF, _GPS, _INTEROPERABILITY})

# Entries of a TIFF file that are copied: description, make, model, resolution, software, date, artist, host, white
# point, primaries, rating, copyright, and the titles of Windows. The others describe how pixels are stored.
_DESCRIPTIVE = frozenset({270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 318, 319, 18246, 18249, 33432})
_DESCRIPTIVE |= frozenset({*range(40091, 40096), _EXIF, _GPS})


@dataclass(frozen=True)
class Entry:
    """Entry of a directory: `value` is the bytes as they stand in the file, `entries` those of a directory below."""

    tag: int
    kind: int
    count: int
    value: bytes
    entries: tuple[Entry, ...] | None = None


def integers(order: str, tag: int, *values: int, kind: int = _LONG) -> Entry:
    """Returns an entry of whole numbers, LONG (4) or SHORT (3), in the byte order "<" or ">"."""
    letter = {_SHORT: "H", _LONG: "I"}[kind]
    return Entry(tag, kind, len(values), struct.pack(f"{order}{len(values)}{letter}", *values))


def upright(block: bytes, width: int, height: int) -> bytes:
    """Returns the block for an image whose orientation was applied: orientation 1, its size, and no thumbnail.

    Args:
        block: Block from the byte order mark on, without the "Exif" that JPEG puts before.
        width: Width of the image as it stands now, in pixels.
        height: Height, likewise.

    Raises:
        ValueError: It is damaged.
    """
    order, data = _byte_order(block), bytearray(block)
    first = _offset(data, order, 4)
    for position, tag, _ in _entries_at(data, order, first):
        if tag == _ORIENTATION:
            struct.pack_into(f"{order}HIHH", data, position + 2, _SHORT, 1, 1, 0)
        elif tag in (_WIDTH, _HEIGHT):
            _set_integer(data, order, position, width if tag == _WIDTH else height)
        elif tag == _EXIF:
            for below, tag_below, _ in _entries_at(data, order, _offset(data, order, position + 8)):
                if tag_below in (_EXIF_WIDTH, _EXIF_HEIGHT):
                    _set_integer(data, order, below, width if tag_below == _EXIF_WIDTH else height)
    return bytes(_without_thumbnail(data, order, first))


def _without_thumbnail(data: bytearray, order: str, first: int) -> bytearray:
    """Unlinks the second directory, and blanks the JPEG that it points to, which shows the image as it was."""
    link = first + 2 + _ENTRY_BYTES * _number_of_entries(data, order, first)
    if link + 4 > len(data):  # some writers leave out the link
        return data
    second = _offset(data, order, link)
    struct.pack_into(f"{order}I", data, link, 0)
    try:
        places = {tag: _offset(data, order, at + 8) for at, tag, _ in _entries_at(data, order, second or len(data))}
    except ValueError:  # a broken thumbnail is no loss
        return data
    start, length = places.get(_THUMBNAIL, 0), places.get(_THUMBNAIL_BYTES, 0)
    if start and data[start : start + 2] == b"\xff\xd8":
        if start + length >= len(data):
            del data[start:]
        else:
            data[start : start + length] = bytes(length)
    return data


def _set_integer(data: bytearray, order: str, position: int, value: int) -> None:
    """Sets the number of the entry at `position`, as LONG, which every reader must take for these tags."""
    struct.pack_into(f"{order}HII", data, position + 2, _LONG, 1, value)


# ------------------------------------------------------------------------------------------------ raw directories


def block_of_tiff(data: bytes) -> bytes | None:
    """Returns the descriptive entries of a TIFF file as an EXIF block; None if there are none.

    Raises:
        ValueError: They are damaged, or the file is a BigTIFF.
    """
    order = _byte_order(data)
    entries = block_entries(data)
    if not entries:
        return None
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", _HEADER_BYTES) + pack_directory(entries, order, _HEADER_BYTES)


def block_entries(block: bytes) -> tuple[Entry, ...]:
    """Returns the descriptive entries of an EXIF block or a TIFF file, with the directories below.

    Raises:
        ValueError: It is damaged.
    """
    order = _byte_order(block)
    entries = _Directories(block, order).read(_offset(block, order, 4), depth=0)
    return tuple(entry for entry in entries if entry.tag in _DESCRIPTIVE)


def pack_directory(entries: Sequence[Entry], order: str, start: int) -> bytes:
    """Returns a directory that stands at the even offset `start`, with its values and the directories below."""
    entries = sorted(entries, key=lambda entry: entry.tag)
    table, values = struct.pack(f"{order}H", len(entries)), b""
    values_start = start + 2 + _ENTRY_BYTES * len(entries) + 4
    for entry in entries:
        value = entry.value
        if entry.entries is not None:
            value = struct.pack(f"{order}I", values_start + len(values))
            values += pack_directory(entry.entries, order, values_start + len(values))
        elif len(value) > 4:
            place = struct.pack(f"{order}I", values_start + len(values))
            values, value = values + value + bytes(len(value) % 2), place  # on word boundaries, says TIFF 6.0
        table += struct.pack(f"{order}HHI", entry.tag, entry.kind, entry.count) + value.ljust(4, b"\0")
    return table + bytes(4) + values


class _Directories:
    """Reader of directories with those below, each once and within limits.

    A directory that points at itself, or many values that are the same bytes, would grow a small file without end.
    """

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order = data, order
        self._visited: set[int] = set()
        self._entries_left, self._bytes_left = _MOST_ENTRIES, _MOST_BYTES

    def read(self, offset: int, depth: int) -> Iterator[Entry]:
        data, order = self._data, self._order
        if offset in self._visited:
            raise ValueError("a directory is pointed to twice")
        self._visited.add(offset)
        for position, tag, (kind, count) in _entries_at(data, order, offset):
            if depth == 0 and tag not in _DESCRIPTIVE:
                continue
            size = _TYPE_BYTES.get(kind, 0) * count
            at = position + 8 if size <= 4 else _offset(data, order, position + 8)
            if at + size > len(data):
                raise ValueError(f"the value of tag {tag} lies outside")
            self._entries_left, self._bytes_left = self._entries_left - 1, self._bytes_left - size
            if self._entries_left < 0 or self._bytes_left < 0:
                raise ValueError(f"it holds more than {_MOST_ENTRIES} entries or {_MOST_BYTES} bytes")
            below = None
            if tag in _DIRECTORIES and depth < 2:
                below = tuple(self.read(_offset(data, order, position + 8), depth + 1))
            if size:
                yield Entry(tag, kind, count, bytes(data[at : at + size]), below)


def _byte_order(data: bytes) -> str:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(data[:4]))
    if order is None:
        raise ValueError("it does not begin as TIFF files do")
    return order


def _offset(data: bytes, order: str, position: int) -> int:
    if position + 4 > len(data):
        raise ValueError("it is cut off")
    return struct.unpack_from(f"{order}I", data, position)[0]


def _number_of_entries(data: bytes, order: str, offset: int) -> int:
    if offset + 2 > len(data):
        raise ValueError("a directory lies outside")
    return struct.unpack_from(f"{order}H", data, offset)[0]


def _entries_at(data: bytes, order: str, offset: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yields (position of the entry, tag, (type, count)) of a directory.

    Raises:
        ValueError: It lies outside, or has a tag twice.
    """
    number = _number_of_entries(data, order, offset)
    if offset + 2 + _ENTRY_BYTES * number > len(data):
        raise ValueError("a directory is cut off")
    seen: set[int] = set()
    for position in range(offset + 2, offset + 2 + _ENTRY_BYTES * number, _ENTRY_BYTES):
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, position)
        if tag in seen:
            raise ValueError(f"tag {tag} stands twice in a directory")
        seen.add(tag)
        yield position, tag, (kind, count)
