"""A profile is kept whole where it describes what is written, and left out where it does not."""

import struct

import pytest
from support.icc import profile, srgb

from colora_peft.images.icc import fitting_profile


def test_a_profile_that_fits_is_kept_to_the_byte():
    assert fitting_profile(srgb(), 3) == (srgb(), None)
    assert fitting_profile(profile(b"GRAY"), 1) == (profile(b"GRAY"), None)
    assert fitting_profile(srgb() + b"padding", 3) == (srgb(), None)
    assert fitting_profile(None, 3) == (None, None)


@pytest.mark.parametrize(
    ("data", "channels", "said"),
    [(srgb(), 1, "describes RGB, not the grey"), (profile(b"CMYK"), 3, "CMYK"), (profile(b"GRAY"), 3, "not the RGB")],
)
def test_a_profile_of_something_else_is_left_out(data, channels, said):
    kept, note = fitting_profile(data, channels)
    assert kept is None and said in note


def test_a_damaged_profile_is_left_out():
    outside = bytearray(srgb())
    struct.pack_into(">I", outside, 132 + 4, len(outside))
    many = bytearray(srgb())
    struct.pack_into(">I", many, 128, 2**31)
    for data in (b"", b"garbage" * 40, srgb()[:-1], srgb()[:100], bytes(outside), bytes(many)):
        assert fitting_profile(data, 3)[0] is None
        assert "damaged" in fitting_profile(data, 3)[1]
