"""Every image has one place to go to, and whatever would be lost is refused before anything runs."""

import os
from collections import Counter
from pathlib import Path

import pytest

from colora_peft.restore.plan import plan_jobs


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/ with images on two levels, and things that are none."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "below/a.JPG", "below/deep/c.tiff", "notes.txt", "._a.jpg", ".thumbs/a.png"):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def plan(*inputs, output_dir="out", subfolders=("",), **settings):
    return plan_jobs(inputs, output_dir, subfolders, **settings)


def results(jobs):
    return [job.results[0].as_posix() for job in jobs]


def test_folders_keep_their_structure_and_hidden_files_are_left_out(photos):
    jobs = plan("photos")
    assert [job.name for job in jobs] == ["a.JPG", "b.png", "below/a.JPG", "below/deep/c.tiff"]
    assert results(jobs) == [f"out/{job.name}" for job in jobs]
    assert jobs[0].comparison == Path("out/comparisons/a.JPG.jpg")
    assert plan(str(photos / "photos"))[2].name == "below/a.JPG"


def test_patterns_keep_what_lies_below_their_fixed_part(photos):
    assert results(plan("photos/**/*.JPG")) == ["out/a.JPG", "out/below/a.JPG"]
    assert results(plan("photos/below/*")) == ["out/a.JPG", "out/deep/c.tiff"]
    assert results(plan("photos/below/deep/c.tiff", "photos/b.png")) == ["out/c.tiff", "out/b.png"]


def test_a_file_that_is_given_twice_is_restored_once(photos):
    assert results(plan("photos/b.png", "photos/b.png", "photos")) == [
        "out/b.png", "out/a.JPG", "out/below/a.JPG", "out/below/deep/c.tiff"
    ]  # fmt: skip

    given = ["photos/below/deep/c.tiff", "photos", str(photos / "photos" / "b.png"), "photos/below/*"]
    assert results(plan(*given)) == ["out/c.tiff", "out/a.JPG", "out/b.png", "out/below/a.JPG"]
    os.symlink("photos", "link")
    assert len(plan("link", "photos")) == 4


def test_each_adapter_has_a_folder_and_a_format_changes_the_suffix_where_it_must(photos):
    (job,) = plan("photos/b.png", subfolders=["haze", "rain"], file_format="jpeg")
    assert [path.as_posix() for path in job.results] == ["out/haze/b.jpg", "out/rain/b.jpg"]
    assert results(plan("photos", file_format="tiff"))[3] == "out/below/deep/c.tiff"
    assert results(plan("photos/a.JPG", file_format="jpeg")) == ["out/a.JPG"]


@pytest.mark.parametrize("given", ["photos", "photos/**/*", "photos/*", "photos/o*/*"])
def test_results_are_no_input_of_the_next_run(photos, given):
    Path("photos/other").mkdir()
    Path("photos/other/d.png").touch()
    before = [job.name for job in plan(given, output_dir="photos/out")]
    for name in ("a.JPG", "comparisons/a.JPG.jpg"):
        path = Path("photos/out", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert before and [job.name for job in plan(given, output_dir="photos/out")] == before


def test_targets_are_found_by_path_then_by_stem(photos):
    for name in ("a.png", "below/a.webp", "elsewhere/c.png"):
        path = Path("clean", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    targets = [job.target and job.target.as_posix() for job in plan("photos", targets="clean")]
    assert targets == ["clean/a.png", None, "clean/below/a.webp", "clean/elsewhere/c.png"]
    Path("clean/c.jpg").touch()
    with pytest.raises(
        ValueError, match=r"Several targets have the name of below/deep/c\.tiff: clean/c\.jpg, clean/els"
    ):
        plan("photos", targets="clean")
    with pytest.raises(ValueError, match="None of the images has a target of the same name in clean"):
        plan("photos/b.png", targets="clean")


def test_no_image_is_measured_against_the_target_of_another(photos):
    for name in ("photos/day/1.png", "photos/night/1.png", "clean/day/1.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    found = {job.name: job.target and job.target.as_posix() for job in plan("photos", targets="clean")}
    assert found["day/1.png"] == "clean/day/1.png" and found["night/1.png"] is None
    Path("clean/1.png").touch()  # of which of the two?
    (Path("clean/day/1.png")).unlink()
    with pytest.raises(ValueError, match="None of the images has a target"):
        plan("photos", targets="clean")
    assert plan("photos/night", targets="clean")[0].target == Path("clean/1.png")


# What is refused


@pytest.mark.parametrize(
    ("inputs", "settings", "said"),
    [
        (["photos/gone.png"], {}, "There is no file or folder photos/gone.png"),
        (["photos/*.gif"], {}, r"No file matches photos/\*\.gif"),
        ([], {}, "nothing to restore"),
        (["photos"], {"targets": "gone"}, "no folder gone of targets"),
        (
            ["photos/a.JPG", "photos/below/a.JPG"],
            {},
            "photos/a.JPG and photos/below/a.JPG would both be written to out/a",
        ),
        (["photos/b.png", "photos"], {"file_format": "jpeg", "output_dir": "photos/b.png/x"}, "b.png is in the way"),
    ],
)
def test_mistakes_are_named(photos, inputs, settings, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        plan(*inputs, **settings)


def test_an_empty_folder_is_named(photos):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="The folder empty holds no images"):
        plan("empty")


def test_two_formats_of_one_name_collide_where_one_is_asked_for(photos):
    Path("photos/b.webp").touch()
    assert len(plan("photos")) == 5
    with pytest.raises(ValueError, match=r"b\.png and photos/b\.webp would both be written to out/b\.png"):
        plan("photos", file_format="png")


def test_no_input_and_no_target_is_ever_overwritten(photos):
    for output_dir in ("photos", photos / "photos", "photos/below/.."):
        with pytest.raises(ValueError, match=r"result of .* would overwrite photos/"):
            plan("photos", output_dir=output_dir)
    os.symlink("photos", "link")
    with pytest.raises(ValueError, match=r"would overwrite"):
        plan("photos", output_dir="link")
    Path("out").mkdir()
    os.link("photos/b.png", "out/b.png")
    with pytest.raises(ValueError, match=r"would overwrite photos/b\.png"):
        plan("photos")
    Path("clean").mkdir()
    Path("clean/a.JPG").touch()
    with pytest.raises(ValueError, match=r"would overwrite clean/a\.JPG"):
        plan("photos/a.JPG", output_dir="clean", targets="clean")


def test_targets_are_told_by_patterns_case_and_unicode_form(photos):
    for name in ("in/a_noisy.png", "in/Caf\u00e9_noisy.png", "in/day/a_noisy.png", "clean/day/A_gt.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for name in ("clean/a_GT.png", "clean/cafe\u0301_gt.png"):
        Path(name).touch()
    jobs = plan("in", targets="clean", patterns=("{}_noisy", "{}_gt"))
    targets = ["clean/cafe\u0301_gt.png", "clean/a_GT.png", "clean/day/A_gt.png"]
    assert [job.target.as_posix() for job in jobs] == targets
    Path("clean/A_Gt.png").touch()
    with pytest.raises(ValueError, match="Several targets have the name of a_noisy.png: .*A_Gt.*a_GT.*keep one"):
        plan("in", targets="clean", patterns=("{}_noisy", "{}_gt"))
    Path("clean/a_gt.png").touch()  # fits to the letter
    assert plan("in", targets="clean", patterns=("{}_noisy", "{}_gt"))[1].target == Path("clean/a_gt.png")


def test_other_files_of_folders_and_patterns_are_counted(photos):
    Path("photos/below/a.heic2").touch()
    for inputs in (["photos"], ["photos/**/*"]):
        left_out = Counter()
        plan(*inputs, left_out=left_out)
        assert left_out == {".txt": 1, ".heic2": 1}


def test_results_of_kinds_that_are_not_written_are_png(photos):
    assert results(plan("photos/b.png")) == ["out/b.png"]
    for name in ("c.HEIC", "d.avif"):
        Path(name).touch()
    assert results(plan("c.HEIC", "d.avif")) == ["out/c.png", "out/d.png"]
    assert results(plan("c.HEIC", file_format="tiff")) == ["out/c.tif"]
