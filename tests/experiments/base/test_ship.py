"""examples/experiments/base/ship.py: what of a run is shipped, and what its card says."""

import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from examples.experiments.base import ship

RUN = """---
library_name: peft
tags:
- colora
model-index:
- name: {name}
  results: []
---

# {name}

`base` adapted.

```python
model = colora_peft.load("{folder}")
```

![input, restored, target](before_after.png)

![score and rank of each layer](contribution.png)

```
python examples/finetune.py --output_dir {folder} --seed 0 --resume_from_checkpoint latest
```
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Ships a run of a task, in a copy of the tree, and returns the folder of the adapter."""
    monkeypatch.setattr(ship, "EXAMPLES", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)

    def of(name):
        run_dir = tmp_path / "outputs" / name
        shutil.rmtree(run_dir, ignore_errors=True)
        (run_dir / "checkpoint-5").mkdir(parents=True)
        for file in ship.FILES:
            (run_dir / file).write_text("{}")
        Image.new("RGB", (8, 8)).save(run_dir / "before_after.png")
        (run_dir / "README.md").write_text(RUN.format(name=name, folder=f"outputs/{name}"))
        return ship.ship(ship.Path("outputs") / name, name)

    return of


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
def test_the_card_says_what_the_adapter_is_for_and_where_it_lies(shipped, name):
    folder = shipped(name)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "non-commercial-research")
    assert ship.TASKS[name].about in card.content
    place = f"examples/adapters/{name}"
    assert f'colora_peft.load("{place}")' in card.content
    assert f"python examples/finetune.py --output_dir {place} --seed 0\n" in card.content
    assert "outputs/" not in card.content and "resume" not in card.content


def test_what_an_earlier_release_shipped_of_it_is_replaced_whole(shipped):
    folder = shipped("rain")
    (folder / "old.txt").write_text("x")
    shipped("rain")
    assert not (folder / "old.txt").exists()


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--tasks knows underwater, noise, .*, not fog"):
        ship.ShipArguments(tasks_dir="x", tasks=["fog"])


def test_flags_are_those_of_the_first_command_of_the_readme_for_the_shipped_photos(tmp_path):
    args = ship.ShipArguments(tasks_dir=str(tmp_path))
    assert ship.finetune_flags(args, "underwater") == ["--output_dir", "outputs/adapters/underwater"]
