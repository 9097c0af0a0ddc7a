"""Helpers shared by tests: those of images/test_exif.py."""

import struct

from PIL import Image

from colora_peft.images.exif import Entry, integers, pack_directory

ORIENTATION, EXIF, GPS = 0x0112, 0x8769, 0x8825


def block(order="<", orientation=6, thumbnail=None):
    """A block as a camera writes it: own and Exif entries, GPS, notes of the maker, and a thumbnail at the end."""
    below = (
        Entry(33434, 5, 1, struct.pack(f"{order}II", 1, 250)),
        Entry(37380, 10, 1, struct.pack(f"{order}ii", -1, 3)),
        Entry(37500, 7, 11, b"maker notes"),
        integers(order, 40962, 30, kind=3),
        integers(order, 40963, 20),
    )
    position = (Entry(1, 2, 2, b"N\0"), Entry(2, 5, 3, struct.pack(f"{order}6I", 48, 1, 12, 1, 30, 1)))
    entries = [
        Entry(271, 2, 6, b"Canon\0"),
        integers(order, ORIENTATION, orientation, kind=3),
        Entry(315, 2, 4, b"Ann\0"),
        Entry(50000, 2, 8, b"unknown\0"),
        Entry(EXIF, 4, 1, b"", below),
        Entry(GPS, 4, 1, b"", position),
    ]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    data = bytearray(head + pack_directory(entries, order, 8))
    if thumbnail is not None:
        link = 8 + 2 + 12 * len(entries)
        struct.pack_into(f"{order}I", data, link, len(data))
        start = len(data) + 2 + 2 * 12 + 4
        data += pack_directory([integers(order, 513, start), integers(order, 514, len(thumbnail))], order, len(data))
        data += thumbnail
    return bytes(data)


def read(data):
    exif = Image.Exif()
    exif.load(data)
    return dict(exif), dict(exif.get_ifd(EXIF)), dict(exif.get_ifd(GPS))
