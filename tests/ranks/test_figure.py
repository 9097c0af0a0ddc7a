"""Figures and the allocation table: written, of the size promised, and honest about zeros and unknown names."""

import subprocess
import sys

import pytest
from PIL import Image

from colora_peft.ranks.figure import _layer_groups, plot_contributions
from colora_peft.ranks.table import format_allocation_table

SHAPES = {"intro": (8, 27), "encoders.0.0.conv1": (16, 8), "encoders.0.0.conv3": (8, 8), "ending": (3, 72)}
SCORES = {"intro": 2e-4, "encoders.0.0.conv1": 3e-7, "encoders.0.0.conv3": 0.0, "ending": 1e-4}
RANKS = {"intro": 8, "encoders.0.0.conv1": 2, "encoders.0.0.conv3": 0, "ending": 1}


def many_layers(num_blocks):
    names = [f"net.body.{block}.conv{i}" for block in range(num_blocks) for i in range(5)]
    return {name: (64, 64) for name in names}


@pytest.mark.parametrize("scores", [SCORES, None])
def test_contribution_figure_is_drawn(tmp_path, scores):
    plot_contributions(scores, RANKS, SHAPES, tmp_path / "contribution.png")
    with Image.open(tmp_path / "contribution.png") as image:
        assert image.size[0] >= 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_contribution_figure_takes_130_layers_and_all_zeros(tmp_path):
    shapes = many_layers(26)
    zeros = dict.fromkeys(shapes, 0)
    plot_contributions(zeros, zeros, shapes, tmp_path / "zeros.png")
    assert (tmp_path / "zeros.png").stat().st_size > 0


def test_the_figure_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys, colora_peft.ranks.figure as f; assert not any(m.startswith('matplotlib') for m in sys.modules)\n"
        f"f.plot_contributions(None, {RANKS}, {SHAPES}, {str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stages_are_grouped_by_prefix():
    layers = ["net.intro", "net.encoders.0.0.a", "net.encoders.0.1.a", "net.encoders.1.0.a", "net.encoders.1.0.b"]
    layers += ["net.ups.0.0", "net.ups.1.0"]
    assert _layer_groups(layers) == [("intro", 0, 1), ("encoders.0", 1, 2), ("encoders.1", 3, 2), ("ups", 5, 2)]
    groups = _layer_groups([f"blocks.{i}.{j}" for i in range(60) for j in range(2)])
    assert len(groups) == 60 and [name for name, _, _ in groups if name] == [str(i) for i in range(0, 60, 3)]


def test_matplotlib_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r'^Figures need matplotlib: run `pip install matplotlib`, or .* `pip install -e "\.\[examples\]"`\.$'
    with pytest.raises(ValueError, match=message):
        plot_contributions(SCORES, RANKS, SHAPES, tmp_path / "x.png")


def test_table_fits_and_adds_up():
    table = format_allocation_table(SCORES, RANKS, SHAPES)
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert "dense" in rows["intro"] and "100.0%" in rows["intro"] and rows["intro"].endswith(" 216")
    assert "3.00e-07" in rows["encoders.0.0.conv1"] and rows["encoders.0.0.conv1"].endswith(" 48")
    assert rows["encoders.0.0.conv3"].split()[-4:] == ["0", "0.0%", "-", "0"]
    # 216 + 48 + 0 + 75 of 216 + 128 + 64 + 216
    assert "54.33%" in table.splitlines()[-1] and "339 of 624" in table.splitlines()[-1]
    long = {f"{'stage.' * 15}{name}": shape for name, shape in SHAPES.items()}
    wide = format_allocation_table(None, dict.fromkeys(long, 1), long)
    assert max(map(len, wide.splitlines())) <= 100 and "encoders.0.0.conv3" in wide


def test_names_must_agree(tmp_path):
    with pytest.raises(ValueError, match="'ending' is missing from `ranks`"):
        format_allocation_table(None, {name: 1 for name in SHAPES if name != "ending"}, SHAPES)
    with pytest.raises(ValueError, match="'outro'"):
        format_allocation_table(None, {**RANKS, "outro": 1}, SHAPES)
    with pytest.raises(ValueError, match="'intro' is missing from `scores`"):
        plot_contributions({}, RANKS, SHAPES, tmp_path / "x.png")
    with pytest.raises(ValueError, match="no layer to report"):
        format_allocation_table(None, {}, {})
    assert not list(tmp_path.iterdir())
