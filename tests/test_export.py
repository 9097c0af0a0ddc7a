"""Files of a network for other runtimes: read by these, and compared with PyTorch."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support.any_network import swin2sr
from support.tiny_networks import tiny_nafnet
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.export import METADATA_FILE, ExportError, ExportSettings, export_network
from colora_peft.inference.network import reconstruct

FORMATS = ["onnx", "torch_export"]


class Pads(nn.Module):
    """The parts of a restoration network that matter here: padding to a stride, pooling over the image, skips."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, stride=4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.up = nn.Sequential(nn.Conv2d(8, 48, 1), nn.PixelShuffle(4))

    def forward(self, x):
        height, width = x.shape[-2:]
        y = self.down(F.pad(x, (0, -width % 4, 0, -height % 4)))
        return x + self.up(y * self.pool(y))[..., :height, :width]


def network(make=Pads):
    torch.manual_seed(0)
    return make().eval()


def run_file(path, images):
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["reconstruction"], {"pixel_values": images.numpy()})[0])
    return torch.export.load(path).module()(images)


def metadata_of(path):
    if path.suffix == ".onnx":
        import onnx

        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    files = {METADATA_FILE: ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files[METADATA_FILE])


def path_of(tmp_path, form):
    return tmp_path / ("network.onnx" if form == "onnx" else "network.pt2")


@torch.no_grad()
def assert_file_restores_as(path, model, shapes, atol=1e-5):
    for shape in shapes:
        x = torch.rand(*shape)
        torch.testing.assert_close(run_file(path, x), reconstruct(model, x), rtol=0, atol=atol)


OTHER_SIZES = [(1, 3, 32, 32), (1, 3, 201, 55), (4, 3, 33, 80)]


@pytest.mark.parametrize("form", FORMATS)
def test_the_file_restores_images_of_sizes_that_nobody_checked(form, tmp_path):
    model, path = network(), path_of(tmp_path, form)
    checks = export_network(model, path, ExportSettings(form, metadata={"task": "rain"}))
    assert_file_restores_as(path, model, OTHER_SIZES)
    assert all(check.max_difference <= 1e-4 for check in checks)
    assert {check.batch for check in checks} == {1, 2, 3}
    assert min(check.height for check in checks) == 3
    assert any(check.height % 2 and check.width % 2 for check in checks)
    found = metadata_of(path)
    assert found["task"] == "rain" and found["precision"] == "float32"
    assert found["size"] == "any of at least 3 pixels a side"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


class Mirrors(Pads):
    """Pads by reflection, and otherwise where images are too small for that: a trace holds one of both."""

    def forward(self, x):
        if min(x.shape[-2:]) >= 8:
            return super().forward(F.pad(x, (0, 7, 0, 7), mode="reflect"))[..., :-7, :-7]
        return super().forward(F.pad(x, (0, 7, 0, 7), mode="replicate"))[..., :-7, :-7]


class Large(Pads):
    def forward(self, x):
        assert min(x.shape[-2:]) >= 8
        return super().forward(x)


@pytest.mark.parametrize("make", [Mirrors, Large])
def test_a_file_that_is_not_right_for_small_images_says_so(make, tmp_path):
    path = tmp_path / "network.pt2"
    checks = export_network(network(make), path, ExportSettings("torch_export"))
    assert metadata_of(path)["size"] == "any of at least 64 pixels a side"
    assert min(check.height for check in checks) == 64


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_nafnet_is_exported_for_any_size_with_its_adapter(form, tmp_path):
    bare = tiny_nafnet()
    x = torch.rand(1, 3, 20, 20)
    expected = bare(x).reconstruction
    adapted = get_peft_model(tiny_nafnet(), CoLoRAConfig(ranks=2, init_weights=False)).merge_and_unload()
    assert not torch.allclose(adapted(x).reconstruction, expected, atol=1e-2)
    path = path_of(tmp_path, form)
    export_network(adapted, path, ExportSettings(form))
    assert_file_restores_as(path, adapted, [*OTHER_SIZES, (1, 3, 8, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_windows_of_attention_are_exported_for_one_size(form, tmp_path):
    path = path_of(tmp_path, form)
    export_network(swin2sr(), path, ExportSettings(form, fixed_size=(19, 30)))
    assert_file_restores_as(path, swin2sr(), [(1, 3, 19, 30)])


def test_half_precision_halves_the_file_and_is_compared_with_float32(tmp_path):
    class Wide(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 96, 3, padding=1), nn.Conv2d(96, 3, 1))

    model = network(Wide)
    full = export_network(model, tmp_path / "full.onnx", ExportSettings(fixed_size=(24, 20)))
    half = export_network(model, tmp_path / "half.onnx", ExportSettings(fixed_size=(24, 20), half_precision=True))
    assert (tmp_path / "half.onnx").stat().st_size < 0.55 * (tmp_path / "full.onnx").stat().st_size
    assert full[0].max_difference < half[0].max_difference < 2e-2
    assert metadata_of(tmp_path / "half.onnx")["precision"] == "float16"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_file_restores_as(tmp_path / "half.onnx", model, [(1, 3, 24, 20)], atol=2e-2)


def test_a_network_of_some_multiple_is_exported_with_its_padding(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.needs_multiple_of = nn.Conv2d(3, 12, 2, stride=2), 2

        def forward(self, x):
            return F.pixel_shuffle(self.conv(x), 2)

    path = tmp_path / "network.pt2"
    export_network(network(Halves), path, ExportSettings("torch_export"))
    assert_file_restores_as(path, network(Halves), OTHER_SIZES)


# ------------------------------------------------------------------------------------------------------- what fails


class Bright(nn.Module):
    """Asks for a value while it runs, which no exporter can follow."""

    def forward(self, x):
        return x + 1 if x.mean() > 0.5 else x


def test_a_layer_that_cannot_be_exported_is_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Bright())
    with pytest.raises(ExportError, match=r"The layer '1' \(Bright\) cannot be exported"):
        export_network(model, tmp_path / "network.pt2", ExportSettings("torch_export"))
    assert not list(tmp_path.iterdir())


def test_windows_of_attention_ask_for_a_fixed_size(tmp_path):
    with pytest.raises(ExportError, match="Swin2SRFor.* fixed_size .*--height and --width"):
        export_network(swin2sr(), tmp_path / "network.pt2", ExportSettings("torch_export"))
    assert not list(tmp_path.iterdir())


def test_a_layer_without_form_in_onnx_is_told(tmp_path):
    class Inverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) + torch.linalg.qr(x)[1].sum()

    with pytest.raises(ExportError, match="ONNX has no form.*qr.*torch_export"):
        export_network(Inverse(), tmp_path / "network.onnx", ExportSettings(fixed_size=(8, 8)))
    assert not list(tmp_path.iterdir())


def test_a_result_that_differs_is_not_written_and_what_was_there_stays(tmp_path):
    path = tmp_path / "network.pt2"
    path.write_text("earlier")
    settings = ExportSettings("torch_export", fixed_size=(8, 8), half_precision=True, tolerance=1e-9)
    with pytest.raises(ExportError, match="differs from PyTorch by .* 1 x 8 x 8 .*tolerance of 1e-09: leave half"):
        export_network(network(), path, settings)
    assert path.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


def test_missing_packages_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("colora_peft.export.find_spec", lambda name: None if name == "onnxscript" else sys)
    with pytest.raises(ImportError, match=r"needs further packages: pip install onnxscript\."):
        export_network(network(), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "coreml"}, "'coreml': choose one of onnx, torch_export"),
        ({"fixed_size": (0, 8)}, "at least 1 pixel"),
        ({"tolerance": 0.0}, "above 0"),
        ({"tolerance": float("nan")}, "above 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ExportSettings(**wrong)
