"""Helpers shared by tests: those of images/test_reading.py."""

import struct
import zlib


def png_bytes(pixels, colour_type, *chunks):
    """A PNG written by hand, of any integer depth and with any further chunks (name, data)."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    depth = pixels.dtype.itemsize * 8
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    parts = [chunk(b"IHDR", header), *(chunk(*part) for part in chunks), chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")
