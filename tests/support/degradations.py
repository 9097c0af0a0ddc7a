"""Helpers shared by tests: those of prod/test_degradations.py."""

RAIN = {
    "length_px": 12.0,
    "angle_deg": 0.0,
    "density": 0.01,
    "opacity": 0.8,
    "brightness": 0.9,
    "focus_blur_px": 1.5,
    "layers": 2,
    "seed": 5,
}
