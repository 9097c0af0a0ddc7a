"""EXIF blocks change where they must and stay as they were to the byte elsewhere."""

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image
from support.exif import EXIF, GPS, ORIENTATION, block, read

from colora_peft.images.exif import block_entries, block_of_tiff, integers, pack_directory, upright

THUMBNAIL = b"\xff\xd8 the image as it was \xff\xd9"


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_block_that_fits_stays_as_it_was_to_the_byte(order):
    once = upright(block(order), 20, 30)
    assert upright(once, 20, 30) == once
    assert len(once) == len(block(order))


@pytest.mark.parametrize("order", ["<", ">"])
def test_only_orientation_and_size_change(order):
    before, after = read(block(order)), read(upright(block(order), 20, 30))
    assert before[0].pop(ORIENTATION) == 6 and after[0].pop(ORIENTATION) == 1
    assert (before[1].pop(40962), before[1].pop(40963)) == (30, 20)
    assert (after[1].pop(40962), after[1].pop(40963)) == (20, 30)
    assert before == after
    assert (
        after[1][37500] == b"maker notes" and after[2][2] == (48, 12, 30) and after[1][37380] == pytest.approx(-1 / 3)
    )


@pytest.mark.parametrize("tail", [b"", b"notes that lie behind"])
def test_the_thumbnail_is_gone_and_nothing_else(tail):
    cleaned = upright(block(thumbnail=THUMBNAIL) + tail, 20, 30)
    assert b"as it was" not in cleaned and cleaned.endswith(tail)
    assert read(cleaned) == read(upright(block(), 20, 30))
    exif = Image.Exif()
    exif.load(cleaned)
    assert not exif.get_ifd(0x014A) and 513 not in exif.get_ifd(1)


def test_a_thumbnail_that_is_no_jpeg_does_not_wipe_what_it_points_to():
    data = bytearray(block(thumbnail=THUMBNAIL))
    struct.pack_into("<I", data, len(data) - len(THUMBNAIL) - 4 - 12 - 4, 8)  # its offset: the first directory
    assert read(upright(bytes(data), 20, 30)) == read(upright(block(), 20, 30))


@pytest.mark.parametrize("data", [b"", b"II*\0", b"garbage", block()[:60], b"II*\0\xff\xff\xff\0"])
def test_damage_is_refused(data):
    with pytest.raises(ValueError):
        (upright(data, 1, 1), block_entries(data))


def test_any_damaged_byte_is_refused_or_harmless():
    good, random = block(thumbnail=THUMBNAIL), np.random.default_rng(0)
    accepted = 0
    for _ in range(300):
        bad = bytearray(good)
        bad[random.integers(len(bad))] = random.integers(256)
        for function in (lambda data: upright(data, 20, 30), block_entries):
            try:
                function(bytes(bad))
                accepted += 1
            except ValueError:
                pass
    assert accepted > 300  # of 600: most bytes are values, which may be any


def tiff_of(*directories):
    """A file with directories one behind the other, each of (tag, type, count, value or offset); -1: where it ends."""
    data = b"II*\0" + struct.pack("<I", 8)
    for entries in directories:
        end = len(data) + 2 + 12 * len(entries) + 4
        table = [struct.pack("<HHII", *entry[:3], end if entry[3] == -1 else entry[3]) for entry in entries]
        data += struct.pack("<H", len(entries)) + b"".join(table) + bytes(4)
    return data


BACK_AT_ITSELF = tiff_of([(EXIF, 4, 1, 8)])
BACK_MANY_TIMES = tiff_of([(EXIF, 4, 1, 8)] * 4000)
BELOW_MANY_TIMES = tiff_of([(EXIF, 4, 1, -1)], [(EXIF, 4, 1, 26)] * 4000)
TOO_MANY = tiff_of([(EXIF, 4, 1, -1)], [(tag, 4, 1, 0) for tag in range(5000)])
# A thousand values that are the same hundred thousand bytes.
TOO_LARGE = tiff_of([(EXIF, 4, 1, -1)], [(tag, 7, 100_000, 8) for tag in range(1000)]) + bytes(100_000)


@pytest.mark.parametrize("data", [BACK_AT_ITSELF, BACK_MANY_TIMES, BELOW_MANY_TIMES, TOO_MANY, TOO_LARGE])
def test_a_small_file_does_not_grow_without_end(data):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"twice|more than"):
        block_of_tiff(data)
    assert time.perf_counter() - start < 2


def test_a_block_with_a_tag_many_times_is_refused_at_once():
    start = time.perf_counter()
    with pytest.raises(ValueError, match="stands twice"):
        upright(tiff_of([(EXIF, 4, 1, -1)] * 5000, [(40962, 4, 1, 0)] * 5000), 1, 1)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("order", ["<", ">"])
def test_descriptive_entries_come_out_of_a_tiff_as_they_were(order):
    entries = block_entries(block(order))
    assert [entry.tag for entry in entries] == [271, 315, EXIF, GPS]  # neither the orientation nor what is unknown
    layout = [integers(order, 256, 4), integers(order, 257, 5), integers(order, 273, 8)]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    tiff = mark + struct.pack(f"{order}I", 8) + pack_directory([*layout, *entries], order, 8)
    found = block_of_tiff(tiff)
    assert [entry.tag for entry in block_entries(found)] == [271, 315, EXIF, GPS]
    own, below, position = read(block(order))
    assert read(found) == ({tag: own[tag] for tag in own if tag in (271, 315)} | pointers(found), below, position)


def pointers(data):
    """Where the directories lie, which differs."""
    exif = Image.Exif()
    exif.load(data)
    return {tag: value for tag, value in dict(exif).items() if tag in (EXIF, GPS)}


def test_a_tiff_without_descriptions_has_no_block():
    buffer = io.BytesIO()
    Image.new("L", (3, 3)).save(buffer, "TIFF")
    assert block_of_tiff(buffer.getvalue()) is None
