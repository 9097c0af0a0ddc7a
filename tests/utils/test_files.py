"""Files are written whole or not at all."""

import errno
import itertools
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from colora_peft.utils import (
    check_writable,
    files,
    relative_path,
    write_bytes,
    write_json,
    write_text,
    writing_folder,
    writing_result,
)


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_bytes_of_a_name_that_are_no_text_are_written_as_escapes(tmp_path):
    """A card that names a folder is written after the training, which must not be lost."""
    name = os.fsdecode(b"r\xe9sultat")
    write_text(tmp_path / "card.md", f"# {name}, \u00e9")
    assert (tmp_path / "card.md").read_bytes() == b"# r\\udce9sultat, \xc3\xa9"
    write_json(tmp_path / "run.json", {"output_dir": name})
    assert json.loads((tmp_path / "run.json").read_text())["output_dir"] == name


# Destinations


def test_a_folder_that_can_be_written_into_is_as_before(tmp_path):
    for folder in (tmp_path, tmp_path / "not" / "yet", os.path.relpath(tmp_path / "new")):
        check_writable(folder)
    (tmp_path / "there").mkdir()
    os.symlink("there", tmp_path / "link")
    check_writable(tmp_path / "link" / "below")
    assert {entry.name for entry in tmp_path.rglob("*")} == {"there", "link"}


def test_a_folder_that_cannot_be_written_into_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.symlink("nowhere", tmp_path / "link")
    for name in ("file", "file/below", "file/below/deeper"):
        with pytest.raises(ValueError, match=rf"^--output_dir .*/{name} cannot be written: .*/file is a file; choose"):
            check_writable(tmp_path / name)
    with pytest.raises(ValueError, match="--logs .*/link/below cannot be written: .*/link is a link to nothing"):
        check_writable(tmp_path / "link" / "below", "--logs")
    with pytest.raises(ValueError, match=r"cannot be written \(File name too long\); choose another folder"):
        check_writable(tmp_path / ("a" * 300))

    def full(path, content):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"--output_dir .*/new cannot be written \(Read-only file system\); choose"):
        check_writable(tmp_path / "new")


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


def test_two_writers_of_one_file_do_not_take_each_other_s_partial_file(tmp_path, monkeypatch):
    """The second writes while the first has not put its file in place yet."""
    path, replace = tmp_path / "run.json", os.replace

    def replace_late(*names):
        monkeypatch.setattr(files.os, "replace", replace)
        other = threading.Thread(target=write_bytes, args=(path, b"second"))
        other.start()
        other.join()
        assert path.read_bytes() == b"second"
        replace(*names)

    monkeypatch.setattr(files.os, "replace", replace_late)
    write_bytes(path, b"first")
    assert path.read_bytes() == b"first" and [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    mine = files.partial_path(path)
    monkeypatch.setattr(files.os, "getpid", lambda: -1)
    assert files.partial_path(path) != mine and mine.name.endswith(files.PARTIAL) and mine.name.startswith(".")


def test_a_file_may_have_the_longest_name(tmp_path):
    path = tmp_path / ("ä" * 125 + ".png")
    write_bytes(path, b"content")
    assert path.read_bytes() == b"content" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_replaced_whole_with_the_permissions_of_new_files(tmp_path, there):
    path = tmp_path / "below" / "result"
    if there:
        path.mkdir(parents=True)
        (path / "old").touch()
    with writing_folder(path) as folder:
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
        assert [entry.name for entry in path.glob("*")] == (["old"] if there else [])
    assert [entry.name for entry in path.iterdir()] == ["model.safetensors"]
    assert [entry.name for entry in path.parent.iterdir()] == ["result"]
    (tmp_path / "new").mkdir()
    (tmp_path / "file").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
    assert (path / "model.safetensors").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_other_files_of_a_folder_can_be_kept(tmp_path):
    for name in ("old", "both"):
        (tmp_path / name).write_text("old")
    with writing_folder(tmp_path, keep_others=True) as folder:
        (folder / "both").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "old", "both": "new"}


def test_a_folder_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "old").touch()
    with pytest.raises(OSError, match="full"):
        with writing_folder(tmp_path / "result") as folder:
            (folder / "new").touch()
            raise OSError("full")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["result", "old"]


@pytest.mark.parametrize("keep_others", [True, False])
def test_a_link_to_a_folder_stays_one(tmp_path, keep_others):
    (tmp_path / "disk" / "result").mkdir(parents=True)
    (tmp_path / "disk" / "result" / "old").touch()
    os.symlink(tmp_path / "disk" / "result", tmp_path / "link")
    with writing_folder(tmp_path / "link", keep_others) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["result"]
    assert set(os.listdir(tmp_path / "disk" / "result")) == ({"old", "new"} if keep_others else {"new"})
    assert set(os.listdir(tmp_path)) == {"disk", "link"}


@pytest.mark.parametrize("keep_others", [True, False])
def test_a_file_is_not_replaced_by_a_folder(tmp_path, keep_others):
    (tmp_path / "result").write_text("mine")
    with pytest.raises(NotADirectoryError, match="result is a file; name a folder"):
        with writing_folder(tmp_path / "result", keep_others):
            pytest.fail("the work began")
    assert (tmp_path / "result").read_text() == "mine" and os.listdir(tmp_path) == ["result"]


def test_files_go_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with writing_folder(".", keep_others=True) as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("keep_others", [True, False])
def test_folders_with_names_that_begin_alike_are_written_side_by_side(tmp_path, keep_others):
    names = [tmp_path / ("a" * 50 + end) for end in "xy"]
    with writing_folder(names[0], keep_others) as outer, writing_folder(names[1], keep_others) as inner:
        (outer / "outer").touch()
        (inner / "inner").touch()
    assert [os.listdir(name) for name in names] == [["outer"], ["inner"]] and len(os.listdir(tmp_path)) == 2


def test_a_folder_left_by_a_killed_process_of_the_same_number_is_in_nobody_s_way(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_numbers", itertools.count())
    files.partial_path(tmp_path / "result").mkdir()
    monkeypatch.setattr(files, "_numbers", itertools.count())
    with writing_folder(tmp_path / "result") as folder:
        (folder / "mine").touch()
    assert os.listdir(tmp_path / "result") == ["mine"]


def test_files_that_are_kept_with_others_need_no_folder_beside_theirs(tmp_path, monkeypatch):
    """The folder above may be read-only, or on another disk, as above a mount point."""
    made, mkdir = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *args, **kwargs: made.append(path) or mkdir(path, *args, **kwargs))
    with writing_folder(tmp_path, keep_others=True):
        assert [path.parent for path in made] == [tmp_path.resolve()]


def test_a_new_folder_of_kept_files_is_gone_after_an_error(tmp_path):
    with pytest.raises(OSError, match="full"):
        with writing_folder(tmp_path / "result", keep_others=True) as folder:
            (folder / "new").touch()
            raise OSError("full")
    assert not os.listdir(tmp_path)


def test_the_old_folder_is_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "old").touch()

    def refused(*names):
        raise OSError("busy")

    monkeypatch.setattr(files.os, "replace", refused)
    with pytest.raises(OSError, match="busy"):
        with writing_folder(tmp_path / "result"):
            pass
    assert os.listdir(tmp_path) == ["result"] and os.listdir(tmp_path / "result") == ["old"]
