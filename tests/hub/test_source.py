"""Files that are not of the kind that was asked for are named, with the call and the flag that take them."""

import pytest

from colora_peft.hub import Source, fetch, load_backbone, load_base, load_for_training
from colora_peft.hub.source import ADAPTER_FILES, NETWORK_FILES

AS_ADAPTER = r"is an adapter, not a whole network: load it by .* --adapter .* --adapter_name_or_path\.$"
AS_NETWORK = r"is a whole network, not an adapter: load it by colora_peft\.load, .* as --model_name_or_path\.$"


def folder_with(tmp_path, *names):
    for name in names:
        (tmp_path / name).touch()
    return str(tmp_path)


def test_an_adapter_in_place_of_a_network(tmp_path):
    folder = folder_with(tmp_path, *ADAPTER_FILES)
    with pytest.raises(ValueError, match=f"^{folder} {AS_ADAPTER}"):
        load_backbone(folder)


@pytest.mark.parametrize("load", [load_base, load_for_training])
def test_a_network_in_place_of_an_adapter(tmp_path, load):
    folder = folder_with(tmp_path, *NETWORK_FILES)
    with pytest.raises(ValueError, match=f"^{folder} {AS_NETWORK}"):
        load(folder)


def test_a_run_that_has_not_ended_is_told_from_nothing(tmp_path):
    folder = folder_with(tmp_path, "run.json", "checkpoint-3")
    with pytest.raises(ValueError, match=f"^{folder} has the checkpoints of a run without its result: finish it by"):
        fetch(Source(folder), (ADAPTER_FILES,))


def test_neither_is_said_to_be_nothing(tmp_path):
    for kinds, wanted in (
        ((ADAPTER_FILES,), "adapter_config.json"),
        ((NETWORK_FILES,), "config.json"),
        ((ADAPTER_FILES, NETWORK_FILES), "adapter_config.json or config.json"),
    ):
        with pytest.raises(ValueError, match=f"holds no {wanted}, so there is nothing to load"):
            fetch(Source(folder_with(tmp_path, "README.md")), kinds)


def test_what_was_asked_for_is_taken_from_a_folder_with_both(tmp_path):
    source = Source(folder_with(tmp_path, *ADAPTER_FILES, *NETWORK_FILES))
    for kinds in ((ADAPTER_FILES,), (NETWORK_FILES,)):
        assert fetch(source, kinds) == tmp_path
