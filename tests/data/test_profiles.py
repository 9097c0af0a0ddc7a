"""Pairs whose input and target have profiles of other colours are pointed out before a run begins."""

import struct

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from support.icc import srgb

from colora_peft.data import PairedHubDataset, PairedImageFolder, PairSubset, note_on_profiles
from colora_peft.images import describe_same_colours, profile_name, read_profile


def named(name, primaries=None):
    """The profile of sRGB under another name; `primaries` exchanges those of green and red for wider ones."""
    data = bytearray(srgb())
    assert len(name) == len("sRGB built-in")
    at = data.index("sRGB built-in".encode("utf-16-be"))
    data[at : at + 2 * len(name)] = name.encode("utf-16-be")
    for tag, xyz in (primaries or {}).items():
        (offset,) = struct.unpack_from(">I", data, data.index(tag, 128) + 4)
        struct.pack_into(">3i", data, offset + 8, *(round(value * 65536) for value in xyz))
    return bytes(data)


P3 = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2920, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}
WIDE, OTHER_SRGB = named("Display P3  .", P3), named("IEC 61966-2-1")


def write(folder, name, of_input, of_target, suffix=".png"):
    for side, profile in (("input", of_input), ("target", of_target)):
        (folder / side).mkdir(exist_ok=True)
        Image.new("RGB", (12, 10), (20, 80, 160)).save(folder / side / f"{name}{suffix}", icc_profile=profile)


def test_profiles_are_compared_by_their_colours_and_not_by_their_names():
    assert describe_same_colours(None, srgb()) and describe_same_colours(srgb(), OTHER_SRGB)
    assert not describe_same_colours(None, WIDE) and not describe_same_colours(WIDE, OTHER_SRGB)
    assert describe_same_colours(b"damaged", WIDE)
    names = [profile_name(profile) for profile in (WIDE, OTHER_SRGB, None, b"damaged")]
    assert names == ["Display P3  .", "IEC 61966-2-1", "no profile", "a damaged profile"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_pairs_of_two_profiles_are_counted_and_the_first_is_named(tmp_path, suffix):
    write(tmp_path, "a", None, srgb(), suffix)
    write(tmp_path, "b", OTHER_SRGB, WIDE, suffix)
    write(tmp_path, "c", WIDE, WIDE, suffix)
    write(tmp_path, "d", WIDE, None, suffix)
    assert read_profile(tmp_path / "input" / f"b{suffix}") == OTHER_SRGB
    pairs = PairedImageFolder(tmp_path)
    note = note_on_profiles(pairs)
    assert note.startswith("Note: the colour profiles of input and target differ in 2 of 4 pairs (in b: IEC 61966-2-1")
    assert "and Display P3" in note and "learn to convert colours" in note
    assert "in 1 of 2 pairs (in d: Display P3  . and no profile)" in note_on_profiles(PairSubset(pairs, [0, 3]))
    assert note_on_profiles(PairSubset(pairs, [0, 2])) is None


def test_pairs_of_a_dataset_are_checked_alike(tmp_path):
    write(tmp_path, "a", None, WIDE)
    cells = [(tmp_path / side / "a.png").read_bytes() for side in ("input", "target")]
    rows = Dataset.from_dict({"input": [{"bytes": cells[0]}], "target": [{"bytes": cells[1]}]})
    pairs = PairedHubDataset(rows.cast_column("input", ImageFeature()).cast_column("target", ImageFeature()))
    assert "1 of 1 pairs (in row 0: no profile and Display P3" in note_on_profiles(pairs)


def test_pairs_of_an_unknown_kind_and_damaged_files_are_left_to_others(tmp_path):
    assert note_on_profiles([]) is None
    write(tmp_path, "a", None, WIDE)
    (tmp_path / "target" / "a.png").write_bytes(b"damaged")
    assert note_on_profiles(PairedImageFolder(tmp_path)) is None
