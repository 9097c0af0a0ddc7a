"""Files are written whole or not at all."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from colora_peft.utils.files import relative_path, write_bytes, write_json, write_text, writing_result


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_text_that_cannot_be_encoded_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "card.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["card.md"]


def test_paths_are_named_from_the_working_directory_if_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(relative_path(tmp_path / "a" / "b")) == Path("a/b")
    assert relative_path(tmp_path.parent) == str(tmp_path.parent.resolve())


def test_bytes_that_cannot_be_put_in_place_leave_nothing(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        write_bytes(tmp_path / "a.png", b"content")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    write_bytes(tmp_path / "b.png", b"content")
    write_bytes(tmp_path / "b.png", b"\0\n\r\n")
    assert (tmp_path / "b.png").read_bytes() == b"\0\n\r\n"


def test_a_result_that_cannot_be_written_says_that_the_training_is_not_lost(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")):
        with pytest.raises(OSError, match="No space left.*last checkpoint unharmed.*--resume_from_checkpoint latest"):
            with writing_result(tmp_path):
                raise error


def test_another_error_in_writing_a_result_is_itself(tmp_path):
    with pytest.raises(ConnectionError, match="^away$"):
        with writing_result(tmp_path):
            raise ConnectionError("away")


def test_everybody_reads_a_result_who_reads_new_files_here(tmp_path):
    with writing_result(tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "new").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
