"""examples/export.py: what a user types, what comes out, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.examples import EXAMPLES, load_example
from transformers import HfArgumentParser

from colora_peft import CoLoRAConfig
from colora_peft.export import METADATA_FILE
from colora_peft.hub.networks import load_backbone

export = load_example("export")

NETWORKS = """
import torch
from torch import nn

def network(channels=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 3, 3, padding=1))

def wider():
    return network(5)

def other_weights():
    model = network()
    nn.init.zeros_(model[0].bias)
    return model
"""
RAIN = ["--adapter", "rain", "--model_name_or_path", "small_networks:network"]
SMALL = ["--height", "9", "--width", "14"]


@pytest.fixture(autouse=True)
def rain_adapter(tmp_path, monkeypatch):
    """Works in a folder with the networks and `rain`, an adapter of one of them that changes it."""
    (tmp_path / "small_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = get_peft_model(load_backbone("small_networks:network"), CoLoRAConfig(ranks=1, init_weights=False))
    model.save_pretrained("rain")
    yield
    sys.modules.pop("small_networks", None)


def run(*flags):
    (args,) = HfArgumentParser(export.ExportArguments).parse_args_into_dataclasses(list(flags))
    export.main(args)
    return Path(args.output_file)


@torch.no_grad()
def restored(x, base="small_networks:network"):
    return PeftModel.from_pretrained(load_backbone(base), "rain").eval()(x)


def test_the_file_holds_the_network_with_its_adapter_and_says_so(capsys):
    path = run(*RAIN, "--format", "torch_export", *SMALL)
    assert path == Path("outputs/rain.pt2")
    files = {METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=files).module()
    x = torch.rand(1, 3, 9, 14)
    torch.testing.assert_close(program(x), restored(x), rtol=0, atol=1e-6)
    assert not torch.allclose(program(x), load_backbone("small_networks:network")(x), atol=1e-2)
    metadata = json.loads(files[METADATA_FILE])
    assert (metadata["task"], metadata["adapter"]) == ("rain", "rain")
    assert (metadata["base"], metadata["size"]) == ("small_networks:network", "9 x 14, batch 1")
    assert "1 x 9 x 14: greatest difference to PyTorch" in capsys.readouterr().out


@pytest.mark.slow
def test_an_adapter_that_names_a_folder_needs_nothing_else(tiny_nafnet):
    get_peft_model(load_backbone(str(tiny_nafnet)), CoLoRAConfig(ranks=1)).save_pretrained("haze")
    path = run("--adapter", "haze", "--format", "torch_export", "--height", "8", "--width", "8")
    files = {METADATA_FILE: ""}
    torch.export.load(path, extra_files=files)
    assert json.loads(files[METADATA_FILE])["base"] == str(tiny_nafnet)


@pytest.mark.slow
def test_launched_with_onnx_for_any_size():
    command = [sys.executable, str(EXAMPLES / "export.py"), *RAIN, "--task", "heavy rain"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("greatest difference to PyTorch") == 6
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession("outputs/rain.onnx", providers=["CPUExecutionProvider"])
    x = torch.rand(2, 3, 37, 51)
    (found,) = session.run(["reconstruction"], {"pixel_values": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), restored(x), rtol=0, atol=1e-5)
    assert {entry.key: entry.value for entry in onnx.load("outputs/rain.onnx").metadata_props}["task"] == "heavy rain"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Nothing to export"),
        (["--adapter", "rain", "--height", "9"], "--height and --width need each other"),
        (["--adapter", "rain", "--output_file", "rain.pt"], "does not end in .onnx"),
        (["--adapter", "rain", "--tolerance", "-1"], "tolerance"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--adapter", "rain", "--model_name_or_path", "small_networks:wider"], "rain was trained on another network"),
        (
            ["--adapter", "rain", "--model_name_or_path", "small_networks:wider"],
            "Give --model_name_or_path, the one that it calls 'small_networks:network'.$",
        ),
        # Of the same shape, so that the weights would fit.
        (["--adapter", "rain", "--model_name_or_path", "small_networks:other_weights"], "trained on another network"),
        (
            ["--adapter", "rain"],
            "made by the function small_networks:network.*give --model_name_or_path 'small_n[a-z_:]*'.$",
        ),
        (["--adapter", "rain", "--model_name_or_path", "small_networks:nothing"], "no function nothing"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(*flags, *(SMALL if "--height" not in flags else []))
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == [
        "rain",
        "small_networks.py",
    ]


def test_a_whole_network_is_no_adapter_and_is_exported_by_the_other_flag(tiny_nafnet):
    for given in ([], ["--model_name_or_path", str(tiny_nafnet)]):
        with pytest.raises(ValueError, match="is a whole network, not an adapter: .* as --model_name_or_path"):
            run("--adapter", str(tiny_nafnet), *given, *SMALL)


def test_a_file_that_is_there_is_kept_unless_told_otherwise():
    flags = [*RAIN, "--format", "torch_export", "--output_file", "there.pt2", *SMALL]
    Path("there.pt2").write_text("earlier")
    with pytest.raises(ValueError, match="there.pt2 is there already; add --overwrite"):
        run(*flags)
    assert Path("there.pt2").read_text() == "earlier"
    run(*flags, "--overwrite")
    assert Path("there.pt2").stat().st_size > 1000


def test_an_unknown_format_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        run(*RAIN, "--format", "coreml")
    message = capsys.readouterr().err
    assert "invalid choice: 'coreml'" in message and "onnx" in message and "torch_export" in message
