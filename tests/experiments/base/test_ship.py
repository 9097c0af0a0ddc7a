"""examples/experiments/base/ship.py: what of a run is shipped, and what its card says."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from support.examples import EXAMPLES, write_pairs

from colora_peft.hub import AdaptedNetwork, RunFacts, TuningMetrics, adapted_card
from colora_peft.tuner import base_fingerprint
from examples.experiments.base import ship

METRICS = json.loads((EXAMPLES / "adapters" / "rain" / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_nafnet):
    """A tree with a base and no adapters, as the working folder."""
    base = shutil.copytree(tiny_nafnet, tmp_path / "examples" / ship.BASE)
    monkeypatch.setattr(ship, "EXAMPLES", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return base


def make_run(name, base, monkeypatch):
    """Writes what finetune.py leaves in outputs/NAME, with the card that it writes."""
    run_dir = Path("outputs", name)
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "checkpoint-5").mkdir(parents=True)
    for file in ship.FILES:
        (run_dir / file).write_text("{}")
    config = {"base_fingerprint": base_fingerprint(ship.load_backbone(str(base)))}
    (run_dir / "adapter_config.json").write_text(json.dumps(config))
    (run_dir / "metrics.json").write_text(json.dumps(METRICS))
    Image.new("RGB", (8, 8)).save(run_dir / "before_after.png")
    flags = ship.finetune_flags(ship.ShipArguments("/some/machine/tasks", output_dir="outputs"), name)
    command = ["examples/finetune.py", *flags, "--resume_from_checkpoint", "latest"]
    monkeypatch.setattr(sys, "argv", command)
    images = {"before_after.png": "input, restored, target", "contribution.png": "score and rank of each layer"}
    result = AdaptedNetwork(name, str(run_dir), f"examples/{ship.BASE}", None, True, images)
    facts = RunFacts(ship.TASKS[name].data, "a laptop", 1.0, 1)
    (run_dir / "README.md").write_text(adapted_card(result, TuningMetrics(**METRICS), facts))
    return run_dir


@pytest.fixture
def shipped(place, monkeypatch):
    """Ships a run of a task and returns the folder of the adapter."""
    monkeypatch.setattr(ship, "PairedImageFolder", lambda folder: range(100))
    return lambda name: ship.ship(make_run(name, place, monkeypatch), name, "/some/machine/tasks")


@pytest.mark.parametrize("name", ship.TASKS)
def test_images_are_shipped_only_where_their_licence_allows_it(shipped, name):
    folder = shipped(name)
    files = {path.name for path in folder.iterdir()}
    images = {"before_after.jpg"} if name == "underwater" else set()
    assert files == {*ship.FILES, "README.md"} | images
    card = (folder / "README.md").read_text()
    assert ("before_after" in card) == bool(images) and "before_after.png" not in card
    assert ("no photo is shown" in card.lower()) != bool(images)


@pytest.mark.parametrize("name", ship.TASKS)
def test_the_card_says_what_the_adapter_is_for_and_names_no_path_of_the_machine(shipped, name):
    card = ModelCard.load(shipped(name) / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "non-commercial-research")
    assert ship.TASKS[name].about in card.content
    place = f"examples/adapters/{name}"
    assert f'colora_peft.load("{place}")' in card.content
    assert f"python examples/finetune.py --output_dir {place}" in card.content
    assert not any(text in card.content for text in ("outputs/", "machine", "resume", str(Path.cwd())))
    assert ("--train_dir data/" in card.content) == (name != "underwater")


def test_words_of_the_card_stay_that_are_those_of_the_folder_of_tasks(place, monkeypatch):
    monkeypatch.setattr(ship, "PairedImageFolder", lambda folder: range(100))
    run_dir = make_run("rain", place, monkeypatch)
    text = (run_dir / "README.md").read_text()
    assert "photos" in text and ship.card(text, "rain", str(run_dir), "photos").count("photos") >= text.count("photos")


def test_what_an_earlier_release_shipped_of_it_is_replaced_whole(shipped):
    folder = shipped("rain")
    (folder / "old.txt").write_text("x")
    shipped("rain")
    assert not (folder / "old.txt").exists()


def test_an_adapter_of_another_base_or_a_card_of_another_form_replaces_nothing(shipped, place, monkeypatch):
    folder = shipped("rain")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run_dir = make_run("rain", place, monkeypatch)
    (run_dir / "README.md").write_text("# rain\n")
    with pytest.raises(ValueError, match="card of outputs/rain has no 'model-index:'"):
        ship.ship(run_dir, "rain", "tasks")
    (run_dir / "adapter_config.json").write_text('{"base_fingerprint": "another"}')
    with pytest.raises(ValueError, match="outputs/rain holds an adapter of another network than .*: delete it"):
        ship.ship(run_dir, "rain", "tasks")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_finished_run_is_not_repeated(place, monkeypatch, capsys):
    monkeypatch.setattr(ship, "PairedImageFolder", lambda folder: range(100))
    make_run("rain", place, monkeypatch)
    monkeypatch.setattr(ship.subprocess, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    ship.main(ship.ShipArguments("tasks", tasks=["rain"], output_dir="outputs"))
    assert f"| {METRICS['psnr_after']:.2f} dB |" in capsys.readouterr().out


def test_a_task_has_64_pairs_where_there_are_so_many_and_underwater_those_of_the_readme(tmp_path):
    for name, count in (("rain", 66), ("shadow", 5)):
        write_pairs(tmp_path / name / "train", count)
    args = ship.ShipArguments(tasks_dir=str(tmp_path))
    for name, pairs in (("rain", "64"), ("shadow", "5")):
        flags = ship.finetune_flags(args, name)
        assert flags[flags.index("--max_train_samples") + 1] == pairs
        assert flags[-2:] == ["--data_card", ship.TASKS[name].data]
    assert ship.finetune_flags(args, "underwater") == ["--output_dir", "outputs/adapters/underwater"]


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--tasks knows underwater, noise, .*, not fog"):
        ship.ShipArguments(tasks_dir="x", tasks=["fog"])
