"""Conversion of official checkpoints, on files made here: every wrapping, every variant, every kind of bad file."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import save_file
from support.official_shapes import PUBLISHED_NAFNETS, nafnet_shapes, random_weights, restormer_shapes
from transformers import AutoImageProcessor, AutoModelForImageToImage

from colora_peft.models import NAFNetForImageRestoration, RestorationImageProcessor, RestormerForImageRestoration
from colora_peft.models.convert_official import convert, main
from colora_peft.models.official_architectures import read_nafnet_config, read_restormer_config

TINY_NAFNET = {"width": 8, "encoder": (1, 2), "middle": 1, "decoder": (1, 1)}
TINY_RESTORMER = {"width": 8, "blocks": (1, 2, 1, 1), "refinement": 2}
COMMAND = [sys.executable, "-m", "colora_peft.models.convert_official"]
VARIANTS = {
    "NAFNet": (nafnet_shapes, TINY_NAFNET),
    "NAFNet of grey images": (nafnet_shapes, {**TINY_NAFNET, "num_channels": 1}),
    "Restormer": (restormer_shapes, TINY_RESTORMER),
    "Restormer for denoising": (restormer_shapes, {**TINY_RESTORMER, "norm_bias": False}),
    "Restormer of grey images": (
        restormer_shapes, {**TINY_RESTORMER, "norm_bias": False, "num_channels": 1, "num_output_channels": 1}),
    "Restormer of dual pixels": (restormer_shapes, {**TINY_RESTORMER, "num_channels": 6, "dual_pixel": True}),
    "Restormer with all else": (restormer_shapes, {**TINY_RESTORMER, "bias": True, "heads": (2, 1, 8, 4), "ffn": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def nafnet_weights():
    return random_weights(nafnet_shapes(**TINY_NAFNET))


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shapes", "settings"), VARIANTS.values(), ids=VARIANTS.keys())
def test_the_converted_network_has_all_weights_and_settings(shapes, settings, tmp_path):
    weights = random_weights(shapes(**settings))
    torch.save({"params": weights}, tmp_path / "official.pth")
    convert(tmp_path / "official.pth", tmp_path / "out")
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path / "out")
    expected_class = NAFNetForImageRestoration if shapes is nafnet_shapes else RestormerForImageRestoration
    assert type(loaded) is expected_class and loaded.dtype == torch.float32
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    config = loaded.config
    if shapes is nafnet_shapes:
        found = {"width": config.width, "encoder": tuple(config.encoder_blocks), "middle": config.middle_blocks,
                 "decoder": tuple(config.decoder_blocks), "num_channels": config.num_channels}  # fmt: skip
    else:
        found = {"width": config.width, "blocks": tuple(config.num_blocks), "refinement": config.num_refinement_blocks,
                 "heads": tuple(config.num_heads), "ffn": config.ffn_expansion, "bias": config.bias,
                 "norm_bias": config.norm_bias, "num_channels": config.num_channels,
                 "num_output_channels": config.num_output_channels, "dual_pixel": config.dual_pixel}  # fmt: skip
        settings = {"ffn": 2.66, **settings}
    assert settings.items() <= found.items()
    assert restored_is_finite(loaded)


@torch.no_grad()
def restored_is_finite(model):
    return model(torch.rand(1, model.config.num_channels, 9, 8)).reconstruction.isfinite().all()


@pytest.mark.parametrize(("settings", "parameters"), PUBLISHED_NAFNETS.values(), ids=PUBLISHED_NAFNETS.keys())
def test_published_nafnets_are_read_to_their_size(settings, parameters):
    shapes = nafnet_shapes(**settings)
    with torch.device("meta"):
        model = NAFNetForImageRestoration(read_nafnet_config(shapes))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize("factor", [1, 2, 2.5, 2.66, 2.667, 4])
def test_the_published_width_of_the_feed_forward_networks_is_read_exactly(factor):
    shapes = restormer_shapes(ffn=factor)
    read = read_restormer_config(shapes).ffn_expansion
    assert restormer_shapes(ffn=read) == shapes
    assert len(str(read)) <= len(str(float(factor)))


def with_prefix(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


WRAPPINGS = {
    "bare": lambda w: w,
    "params": lambda w: {"params": w},
    "averages preferred": lambda w: {"params": {name: -tensor for name, tensor in w.items()}, "params_ema": w},
    "no averages": lambda w: {"params_ema": None, "params": w},
    "training state": lambda w: {"epoch": 3, "state_dict": with_prefix(w), "optimizer": {"lr": 1e-3}},
    "twice": lambda w: {"state_dict": {"params": with_prefix(with_prefix(w))}},
    "doubles": lambda w: {"params": {name: tensor.double() for name, tensor in w.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_every_wrapping_comes_off(wrap, nafnet_weights, tmp_path):
    torch.save(wrap(nafnet_weights), tmp_path / "official.pth")
    assert_equal_weights(convert(tmp_path / "official.pth", tmp_path / "out"), nafnet_weights)


def test_safetensors_and_the_old_format_of_torch_are_read(nafnet_weights, tmp_path):
    save_file(nafnet_weights, tmp_path / "official.safetensors")
    assert_equal_weights(convert(tmp_path / "official.safetensors", tmp_path / "one"), nafnet_weights)
    torch.save({"params": nafnet_weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal_weights(convert(tmp_path / "old.pth", tmp_path / "two"), nafnet_weights)


def assert_equal_weights(model, weights):
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("shapes", "licence", "words"),
    [
        (nafnet_shapes(**TINY_NAFNET), "mit", "MIT licence"),
        (restormer_shapes(**TINY_RESTORMER), "other", "non-commercial use only"),
    ],
    ids=["NAFNet", "Restormer"],
)
def test_the_card_tells_the_licence_and_that_the_task_is_unknown(shapes, licence, words, tmp_path):
    torch.save(random_weights(shapes), tmp_path / "official.pth")
    convert(tmp_path / "official.pth", tmp_path / "out")
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "out"), RestorationImageProcessor)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == licence and words in card.content
    assert "task is unknown" in card.content and "`official.pth`" in card.content and "| width | 8 |" in card.content


def test_the_command_converts_and_says_bad_news_in_one_sentence(nafnet_weights, tmp_path, monkeypatch):
    file, out = str(tmp_path / "official.pth"), str(tmp_path / "out")
    torch.save(nafnet_weights, file)
    done = subprocess.run([*COMMAND, file, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "task unknown" in done.stdout and f"from_pretrained({out!r})" in done.stdout
    monkeypatch.setattr(sys, "argv", ["convert_official", file, out])
    with pytest.raises(SystemExit, match=r"^convert_official: .*out is there already and is not overwritten.*\.$"):
        main()

    def full_disk(self, folder):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(sys, "argv", ["convert_official", file, str(tmp_path / "new")])
    monkeypatch.setattr(NAFNetForImageRestoration, "save_pretrained", full_disk)
    with pytest.raises(SystemExit, match="^convert_official: No space left"):
        main()


# --- bad files ------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("this-folder-shows-that-code-ran",)


def left_over(weights):
    return weights | {"encoders.0.0.se.weight": torch.rand(3)}


def missing(weights):
    return {name: tensor for name, tensor in weights.items() if name != "downs.1.bias"}


def of_another_shape(weights):
    return weights | {"ending.weight": torch.rand(4, 8, 3, 3)}


BAD_CONTENTS = {
    "code": (lambda w: {"params": w, "extra": Evil()}, r"mkdir.*not loaded"),
    "an object": (lambda w: {"params": w, "options": slice}, r"slice.*not loaded"),
    "left over": (left_over, r"looks like NAFNet, but left over are encoders\.0\.0\.se\.weight"),
    "missing": (missing, r"looks like NAFNet, but missing are downs\.1\.bias"),
    "shape": (of_another_shape, r"of another shape are ending\.weight \(\(4, 8, 3, 3\), not \(3, 8, 3, 3\)\)"),
    "a stage without a number": (
        lambda w: w | {"encoders.foo.weight": torch.rand(3)}, r"left over are encoders\.foo\.weight"),
    "unknown": (lambda w: {"conv.weight": torch.rand(2)}, r"no known architecture: NAFNet has intro\.weight.* conv"),
    "no weights": (lambda w: {"epoch": 3, "lr": 0.1}, r"epoch, lr are no weights"),
    "integers": (lambda w: w | {"step": torch.tensor(3)}, r"step are no weights"),
    "a list": (lambda w: list(w.values()), r"no weights under names"),
    "empty": (lambda w: {"params": {}}, r"no weights under names"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "culprit"), BAD_CONTENTS.values(), ids=BAD_CONTENTS.keys())
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_bad_contents_are_refused_and_nothing_is_written(make, culprit, zipped, nafnet_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(make(nafnet_weights), "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=culprit) as caught:
        convert("bad.pth", "out")
    assert str(caught.value).startswith("bad.pth cannot be converted: ") and "\n" not in str(caught.value)
    assert os.listdir() == ["bad.pth"]


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"params": Evil()}, protocol=2))


def an_image(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4)


def text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def nothing(path):
    path.write_bytes(b"")


def truncated(path):
    torch.save(random_weights(nafnet_shapes(**TINY_NAFNET)), path)
    path.write_bytes(path.read_bytes()[:-3000])


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
@pytest.mark.parametrize("spoil", [plain_pickle, an_image, text, nothing, truncated])
def test_files_that_are_no_checkpoint_are_refused(spoil, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / name)
    culprit = "safetensors" if name.endswith("safetensors") else "mkdir" if spoil is plain_pickle else "no checkpoint"
    with pytest.raises(ValueError, match=culprit) as caught:
        convert(name, "out")
    assert "\n" not in str(caught.value)
    assert os.listdir() == [name]


def test_a_restormer_that_lacks_what_its_settings_are_read_from(tmp_path):
    weights = random_weights(restormer_shapes(**TINY_RESTORMER))
    del weights["encoder_level2.0.attn.temperature"]
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"looks like Restormer.*'encoder_level2\.0\.attn\.temperature' is missing"):
        convert(tmp_path / "bad.pth", tmp_path / "out")


def test_what_is_there_is_not_overwritten(nafnet_weights, tmp_path):
    torch.save(nafnet_weights, tmp_path / "official.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for out in ("out", "official.pth"):
        with pytest.raises(FileExistsError, match="not overwritten"):
            convert(tmp_path / "official.pth", tmp_path / out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        convert(tmp_path / "nowhere.pth", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "official.pth", tmp_path / "empty")
    modes = {path.stat().st_mode for path in (tmp_path / "empty").iterdir()}
    assert modes == {(tmp_path / "official.pth").stat().st_mode}  # whoever reads new files here reads these


@pytest.mark.parametrize("there", [False, True])
def test_files_that_arrive_during_the_conversion_stay(there, nafnet_weights, tmp_path, monkeypatch):
    torch.save(nafnet_weights, tmp_path / "official.pth")
    out, save = tmp_path / "out", NAFNetForImageRestoration.save_pretrained
    if there:
        out.mkdir()

    def save_late(self, folder):
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("mine")
        save(self, folder)

    monkeypatch.setattr(NAFNetForImageRestoration, "save_pretrained", save_late)
    with pytest.raises(FileExistsError, match="out is there already and is not overwritten"):
        convert(tmp_path / "official.pth", out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("config.json", "mine")]


def test_a_failure_while_writing_leaves_nothing(nafnet_weights, tmp_path, monkeypatch):
    torch.save(nafnet_weights, tmp_path / "official.pth")

    def full_disk(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(NAFNetForImageRestoration, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "official.pth", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["official.pth"]
