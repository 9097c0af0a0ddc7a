"""examples/restore.py: launched as a user would, then its laws and its complaints in one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from support.examples import EXAMPLES, load_example
from support.exif import block
from support.formats import pixels
from support.icc import srgb
from support.reading import png_bytes
from support.tiny_networks import tiny_nafnet as new_nafnet
from transformers import HfArgumentParser

from colora_peft import CoLoRAConfig
from colora_peft.data.pairs import PairedImageFolder
from colora_peft.evaluation.evaluate import evaluate
from colora_peft.evaluation.metrics import ssim
from colora_peft.hub import load_backbone
from colora_peft.images import kinds
from colora_peft.images.image_file import read_image_file
from colora_peft.images.reading import read_image
from colora_peft.restore import run as restore_run

restore = load_example("restore")

# A network that returns its input, and one that turns red into blue, by `module:function`.
NETWORKS = """
import torch
from torch import nn

class Identity(nn.Module):
    def forward(self, x):
        return x

class Flipped(nn.Module):
    def forward(self, x):
        return x.flip(1)

class Broken(nn.Module):
    def forward(self, x):
        return x / 0

def weighted():
    return nn.Conv2d(3, 3, 1)

def seeded(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 3, 1))

def other():
    return seeded(1)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: photos/ with one image of each kind, and networks for tests."""
    monkeypatch.chdir(tmp_path)
    Path("networks_for_restore.py").write_text(NETWORKS)
    Path("photos/below").mkdir(parents=True)
    Image.fromarray(pixels(np.uint8, 3)).save("photos/a.png", exif=block(), icc_profile=srgb())
    Path("photos/below/deep.png").write_bytes(png_bytes(pixels(np.uint16, 3), 2))
    yield tmp_path
    sys.modules.pop("networks_for_restore", None)


def run(*flags):
    """The exit code of the script in this process."""
    flags = ["--device", "cpu", *map(str, flags)]
    (args,) = HfArgumentParser(restore.RestoreArguments).parse_args_into_dataclasses(flags)
    return restore.main(args)


def identity(*flags):
    return run("--input", "photos", "--model_name_or_path", "networks_for_restore:Identity", *flags)


def summary(output_dir="outputs/restored"):
    return json.loads(Path(output_dir, "summary.json").read_text())["results"]


def stamps(output_dir="outputs/restored"):
    return {path: path.stat().st_mtime_ns for path in Path(output_dir).rglob("*.png")}


def test_the_identity_gives_back_the_same_images_with_all_that_describes_them(folder, capsys):
    assert identity() == 0
    for name in ("a.png", "below/deep.png"):
        source, result = (read_image_file(Path(parent, name)) for parent in ("photos", "outputs/restored"))
        assert torch.equal(source.colour, result.colour) and source.bits == result.bits
        assert (source.exif, source.icc_profile) == (result.exif, result.icc_profile)
    assert "2 written, 0 kept as they were, 0 failed." in capsys.readouterr().out


def test_a_rerun_keeps_what_is_there_and_overwrite_makes_it_again(folder, capsys):
    identity()
    before = stamps()
    Path("outputs/restored/a.png").unlink()
    assert identity() == 0
    after = stamps()
    assert after[Path("outputs/restored/below/deep.png")] == before[Path("outputs/restored/below/deep.png")]
    assert "1 written, 1 kept as they were" in capsys.readouterr().out
    assert [row["kept"] for row in summary()] == [False, True]
    assert identity("--overwrite") == 0
    assert all(stamps()[path] > stamp for path, stamp in after.items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--self_ensemble"], "self_ensemble was False, is True"),
        (["--model_name_or_path", "networks_for_restore:weighted"], "weights was"),
    ],
)
def test_results_of_another_run_are_neither_kept_nor_overwritten(folder, flags, said):
    identity()
    before = stamps()
    with pytest.raises(ValueError, match=rf"a\.png is there, but not as this run would make it \({said}.*--overwrite"):
        identity(*flags)
    assert stamps() == before
    Path("outputs/restored/restored.jsonl").unlink()
    with pytest.raises(ValueError, match="no run wrote it"):
        identity()


def test_results_of_another_input_of_the_same_name_are_not_kept(folder):
    identity()
    before = stamps()
    Path("others").mkdir()
    Image.new("RGB", (9, 9), "teal").save("others/a.png")
    with pytest.raises(ValueError, match=r"a\.png is there, but not as this run would make it \(input was"):
        identity("--input", "others")
    shutil.copy("others/a.png", "photos/a.png")
    with pytest.raises(ValueError, match=r"a\.png is there, but not as this run would make it \(input was"):
        identity()
    assert stamps() == before
    Path("outputs/restored/a.png").unlink()
    assert identity() == 0


def test_an_overwrite_that_fails_leaves_the_old_results_for_what_they_are(folder, monkeypatch, capsys):
    def full(*args):
        raise OSError("No space left on device")

    identity()
    before = stamps()
    with monkeypatch.context() as patch:
        patch.setattr(restore_run, "write_bytes", full)
        assert identity("--overwrite", "--model_name_or_path", "networks_for_restore:Flipped") == 1
    assert stamps() == before
    with pytest.raises(ValueError, match=r"\(weights was"):
        run("--input", "photos", "--model_name_or_path", "networks_for_restore:Flipped")
    capsys.readouterr()
    assert identity() == 0 and "0 written, 2 kept as they were" in capsys.readouterr().out


def test_pooling_decides_what_is_kept_and_reaches_the_network(folder, tiny_nafnet):
    Image.fromarray(pixels(np.uint8, 3, 70, 90)).save("photos/wide.png")
    flags = ["--input", "photos/wide.png", "--model_name_or_path", tiny_nafnet, "--tile", 48, "--overlap", 16]
    assert run(*flags) == 0
    means = read_image("outputs/restored/wide.png")
    with pytest.raises(ValueError, match="pooling was picture, is tile"):
        run(*flags, "--pooling", "tile")
    for more in (["--pooling", "tile"], ["--pooling", "local", "--pooling_window", 64]):
        assert run(*flags, *more, "--overwrite") == 0
        assert not torch.equal(read_image("outputs/restored/wide.png"), means)
    with pytest.raises(ValueError, match=r"batch_size was 1, is 3, .*statistics_passes was 2, is 1"):
        run(*flags, "--statistics_passes", 1, "--batch_size", 3)


def test_one_bad_file_fails_alone(folder, capsys):
    Path("photos/bad.png").write_text("no image")
    shutil.copy("photos/a.png", "photos/half.png")
    Path("photos/half.png").write_bytes(Path("photos/half.png").read_bytes()[:600])
    Path("notes.txt").touch()
    assert identity("--input", "photos", "notes.txt") == 1
    output = capsys.readouterr().out
    assert "2 written, 0 kept as they were, 3 failed." in output and "Failed: bad.png, half.png, notes.txt." in output
    for reason in (
        "bad.png cannot be read as an image (unknown format)",
        "half.png cannot be",
        "notes.txt would be of",
    ):
        assert reason in output
    assert {path.name for path in stamps()} == {"a.png", "deep.png"}
    assert identity("--input", "photos") == 1


def test_links_to_nothing_and_results_that_cannot_be_compared_fail_alone(folder, capsys):
    Path("photos/gone.png").symlink_to("nowhere.png")
    Path("photos/loop.png").symlink_to("loop.png")
    assert identity() == 1
    output = capsys.readouterr().out
    assert "2 written, 0 kept as they were, 2 failed." in output
    assert "photos/gone.png cannot be read (No such file or directory); check that the file is there." in output
    assert identity("--input", "photos/gone.png", "photos/a.png") == 1
    assert identity("--input", "photos/*") == 1

    before = stamps()
    Path("photos/a.png").rename("a.png")
    Path("photos/a.png").symlink_to("nowhere.png")  # its result is there, and it cannot be read now
    capsys.readouterr()
    assert identity() == 1
    assert "0 written, 1 kept as they were, 3 failed." in capsys.readouterr().out and stamps() == before
    assert [row["error"] is None for row in summary()] == [False, True, False, False]


def test_names_that_are_no_text_are_restored_and_recorded(folder, tiny_nafnet):
    name = os.fsdecode(b"ph\xf6t\xff.png")
    shutil.copy("photos/a.png", Path("photos", name))
    Path("photos/\u65e5.png").symlink_to("nowhere.png")
    command = [sys.executable, EXAMPLES / "restore.py", "--input", "photos", "--model_name_or_path", tiny_nafnet]
    command = [*map(str, command), "--device", "cpu", "--compare"]
    for kept in (0, 3):
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 1, done.stderr.decode()
        assert f"{3 - kept} written, {kept} kept as they were, 1 failed.".encode() in done.stdout
        assert rb"ph\udcf6t\udcff.png" in done.stdout and rb"Failed: \u65e5.png" in done.stdout
    assert read_image(Path("outputs/restored", name)).shape == read_image("photos/a.png").shape
    assert name in [row["file"] for row in summary()]


def test_a_destination_that_cannot_be_written_is_found_out_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(restore_run, "restore_image", None)
    Path("file").touch()
    for output_dir in ("file", "file/below"):
        with pytest.raises(ValueError, match="cannot be written: file is "):
            identity("--output_dir", output_dir)
    with pytest.raises(ValueError, match=r"--output_dir /proc/results cannot be written \(.*\); choose another"):
        identity("--output_dir", "/proc/results")


def test_a_network_that_fails_leaves_nothing_behind(folder, capsys):
    assert run("--input", "photos", "--model_name_or_path", "networks_for_restore:Broken") == 1
    assert "0 written, 0 kept as they were, 2 failed." in capsys.readouterr().out
    assert not stamps()


def test_other_files_are_counted_and_the_advice_for_one_of_them_leads_on(folder, capsys, monkeypatch):
    for name in ("b.xyz", "c.dng"):
        Path("photos", name).touch()
    assert identity() == 0
    assert "2 files left out: 1 .dng, 1 .xyz. Develop raw files" in capsys.readouterr().out
    Path("d.heic").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setitem(kinds._ADVICE, ".heic", "HEIC files are read after `pip install pillow-heif`")
    for flags in ([], ["--format", "png"]):
        assert identity("--input", "d.heic", "photos/c.dng", "--output_dir", "out", *flags) == 1
        output = capsys.readouterr().out
        assert "d.heic cannot be read: HEIC files are read after `pip install pillow-heif`." in output
        assert "photos/c.dng cannot be read: develop raw files to TIFF or PNG first." in output
    monkeypatch.delitem(kinds._ADVICE, ".heic")  # the advice was followed
    shutil.copy("photos/a.png", "d.heic")
    assert identity("--input", "d.heic", "--output_dir", "out") == 0
    assert torch.equal(read_image("out/d.png"), read_image("photos/a.png"))


def test_an_image_above_the_limit_is_refused_and_the_limit_can_be_raised(folder, capsys):
    assert identity("--max_pixels", 100) == 1
    assert "17 x 13 pixels are more than the limit of 100" in capsys.readouterr().out.replace("13 x 17", "17 x 13")
    assert identity("--max_pixels", 17 * 13) == 0


def test_an_interrupted_run_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(restore_run, "restore_image", interrupted)
        assert identity() == 130
    assert "Interrupted: 2 are left; the same command goes on" in capsys.readouterr().out
    assert identity() == 0


def test_figures_are_those_of_the_kept_file_and_without_padding_those_of_the_evaluation(
    folder, eval_dir, tiny_nafnet, capsys
):
    from transformers import AutoModelForImageToImage

    flags = ["--input", eval_dir / "input", "--targets", eval_dir / "target", "--model_name_or_path", tiny_nafnet]
    assert run(*flags) == 0
    rows, pairs = summary(), PairedImageFolder(eval_dir)
    expected = evaluate(AutoModelForImageToImage.from_pretrained(tiny_nafnet), pairs, torch.device("cpu"), "")
    for name, value in expected.items():  # images of 48 x 48 are one tile, without a border to be extended
        assert np.mean([row[name] for row in rows]) == pytest.approx(value, abs=1e-3)
    output = capsys.readouterr().out
    assert f"{expected['psnr_input']:.2f}" in output.split("mean")[1] and f"{expected['ssim']:.3f}" in output
    assert run(*flags) == 0
    assert [row["psnr"] for row in summary()] == [row["psnr"] for row in rows]
    assert all(row["kept"] for row in summary())


def test_a_target_of_another_size_fails_and_a_missing_one_is_said(folder, capsys):
    Path("clean").mkdir()
    Image.new("RGB", (4, 4)).save("clean/a.png")
    assert identity("--targets", "clean") == 1
    output = capsys.readouterr().out
    assert "2 written" in output and "clean/a.png is 4 x 4 pixels, photos/a.png 13 x 17" in output
    assert "Without a target: below/deep.png." in output


def test_several_adapters_write_and_compare_side_by_side(folder, train_dir, eval_dir, tiny_nafnet, capsys):
    from transformers import AutoModelForImageToImage

    model = get_peft_model(AutoModelForImageToImage.from_pretrained(tiny_nafnet), CoLoRAConfig(ranks=1))
    model.save_pretrained("adapters/zero")
    for name, parameter in model.named_parameters():
        if "colora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained("adapters/other")
    flags = ["--input", eval_dir / "input", "--model_name_or_path", tiny_nafnet, "--compare", "--output_dir", "out"]
    assert run(*flags, "--adapter", "none", "adapters/zero", "adapters/other") == 0
    for name in ("scene0.png", "scene1.png"):
        bare, zero, other = (read_image(Path("out", label, name)) for label in ("none", "zero", "other"))
        assert torch.equal(bare, zero) and not torch.equal(bare, other)
        width, _ = Image.open(f"out/comparisons/{name}.jpg").size
        assert width == 4 * (140 + 8) + 8
    assert run(*flags, "--adapter", "none", "adapters/other") == 0
    assert "0 written, 4 kept as they were" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["colora", "lora"])
def test_an_adapter_brings_its_base_unless_another_is_named(folder, tiny_nafnet, kind, capsys):
    from peft import LoraConfig
    from transformers import AutoModelForImageToImage

    base = AutoModelForImageToImage.from_pretrained(tiny_nafnet)
    config = CoLoRAConfig(ranks=1) if kind == "colora" else LoraConfig(r=1, target_modules=["intro"])
    get_peft_model(base, config).save_pretrained("adapter")
    assert run("--input", "photos/a.png", "--adapter", "adapter") == 0
    assert run("--input", "photos/a.png", "--model_name_or_path", tiny_nafnet, "--output_dir", "bare") == 0
    assert torch.equal(read_image("outputs/restored/a.png"), read_image("bare/a.png"))
    capsys.readouterr()
    with pytest.raises(ValueError, match="adapter cannot be loaded"):
        run("--input", "photos/a.png", "--adapter", "adapter", "--model_name_or_path", restore.SHIPPED_NETWORK)
    shutil.rmtree("outputs")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(
        OSError, match=r"\./gone, is not on this machine: give --model_name_or_path, [^=]*function\)\.$"
    ):
        run("--input", "photos/a.png", "--adapter", "adapter")
    assert not Path("outputs").exists()


@pytest.fixture
def two_bases(folder):
    """Adapters in a and b on networks of one shape, in nets/a and nets/b, with other weights."""
    for seed, name in enumerate("ab"):
        new_nafnet(seed).save_pretrained(f"nets/{name}")
        get_peft_model(load_backbone(f"nets/{name}"), CoLoRAConfig(ranks=1)).save_pretrained(name)


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--adapter", "a", "--model_name_or_path", "nets/b"], "Leave --model_name_or_path out or give 'nets/a'."),
        (["--adapter", "a", "b"], "Adapters of different networks need a run each, with an --output_dir of its own."),
        (
            ["--adapter", "a", "b", "--model_name_or_path", "nets/a"],
            "Leave --model_name_or_path out or give 'nets/b'.",
        ),
    ],
)
def test_another_base_is_asked_for_by_the_flags_of_the_command(two_bases, flags, remedy):
    with pytest.raises(ValueError, match=f"trained on another network .*the weights differ. {remedy}$"):
        run("--input", "photos/a.png", *flags)
    assert not Path("outputs").exists()
    for name in "ab":  # what the messages ask for
        assert run("--input", "photos/a.png", "--adapter", name, "--output_dir", f"outputs/{name}") == 0


def test_a_base_that_has_changed_is_not_asked_for_by_the_name_that_leads_to_it(two_bases):
    shutil.rmtree("nets/a")
    shutil.copytree("nets/b", "nets/a")
    changed = (
        "the weights differ. It calls that 'nets/a', which has changed since: give --model_name_or_path with a copy"
    )
    for flags in ([], ["--model_name_or_path", "nets/a"]):
        with pytest.raises(ValueError, match=changed):
            run("--input", "photos/a.png", "--adapter", "a", *flags)


def test_the_function_of_an_adapter_s_base_is_asked_for_by_the_flag(folder):
    name = "networks_for_restore:seeded"
    get_peft_model(load_backbone(name), CoLoRAConfig(ranks=1)).save_pretrained("adapter")
    flags = ["--input", "photos/a.png", "--adapter", "adapter"]
    with pytest.raises(ValueError, match=f"if you trust it, give --model_name_or_path '{name}'.$"):
        run(*flags)
    with pytest.raises(ValueError, match=f"Give --model_name_or_path, the one that it calls '{name}'.$"):
        run(*flags, "--model_name_or_path", "networks_for_restore:other")
    assert run(*flags, "--model_name_or_path", name) == 0


def test_a_network_that_was_tuned_as_a_whole_is_no_adapter_and_restores_as_network(folder, tiny_nafnet):
    for given in ([], ["--model_name_or_path", tiny_nafnet]):
        with pytest.raises(ValueError, match="is a whole network, not an adapter: .* as --model_name_or_path"):
            run("--input", "photos/a.png", "--adapter", tiny_nafnet, *given)
    assert not Path("outputs").exists()
    assert run("--input", "photos/a.png", "--model_name_or_path", tiny_nafnet) == 0


def test_the_comparison_shows_input_and_result(folder):
    Image.new("RGB", (300, 200), (255, 0, 0)).save("photos/red.png")
    flags = ["--input", "photos/red.png", "--model_name_or_path", "networks_for_restore:Flipped", "--compare"]
    assert run(*flags) == 0
    sheet = np.array(Image.open("outputs/restored/comparisons/red.png.jpg")).astype(int)
    assert sheet[100, 150, 0] - sheet[100, 150, 2] > 200 and sheet[100, 458, 2] - sheet[100, 458, 0] > 200
    Path("outputs/restored/comparisons/red.png.jpg").unlink()
    assert run(*flags) == 0  # made again from what was kept
    assert Path("outputs/restored/comparisons/red.png.jpg").exists()


def test_ssim_in_strips_is_ssim(monkeypatch):
    monkeypatch.setattr(restore_run, "_STRIP_PIXELS", 300)
    first, second = torch.rand(2, 3, 61, 40, generator=torch.Generator().manual_seed(0))
    assert restore_run.ssim_of(first, second) == pytest.approx(ssim(first[None], second[None]).item(), abs=1e-6)
    assert restore_run.ssim_of(first[:, :10], second[:, :10]) is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quality", 0], "--quality must be between 1 and 100"),
        (["--tile", -1], "--tile must be at least 0"),
        (["--tile", 64, "--overlap", 64], "An overlap of 64 pixels leaves tiles of 64 no step"),
        (["--statistics_passes", 0], "--statistics_passes must be at least 1"),
        (["--pooling", "local"], "--pooling local and --pooling_window go together"),
        (["--device", "tpu9"], "--device tpu9 cannot be used"),
        (["--output_dir", "photos"], "would overwrite photos/a.png"),
        (["--adapter", "nowhere"], "There is no folder nowhere with an adapter"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(folder, flags, said):
    before = sorted(folder.rglob("*.png"))
    with pytest.raises(ValueError, match=said):
        identity(*flags)
    assert sorted(folder.rglob("*.png")) == before and not Path("outputs").exists()


def test_launched_as_a_user_would(folder, tiny_nafnet):
    Path("photos/bad.png").write_text("no image")
    command = [sys.executable, EXAMPLES / "restore.py", "--input", "photos", "--model_name_or_path", tiny_nafnet]
    done = subprocess.run([*map(str, command), "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "2 written, 0 kept as they were, 1 failed. Results are in outputs/restored." in done.stdout
    assert "Traceback" not in done.stderr
