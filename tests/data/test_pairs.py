"""Pairs are matched by name, read unharmed through the cache, and every culprit is listed before a run begins."""

import cv2
import numpy as np
import pytest
import tifffile
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from support.pairs import save

from colora_peft.data.pairs import (
    PairedHubDataset,
    PairedImageFolder,
    PairSubset,
    check_pair,
    check_pairs,
    count_in_words,
    draw_pairs,
    hold_out_pairs,
)
from colora_peft.images.reading import read_image


def save_pairs(folder, *names, **size):
    for seed, name in enumerate(names):
        save(folder / "input" / f"{name}.png", seed=seed, **size)
        save(folder / "target" / f"{name}.png", seed=seed + 100, **size)
    return folder


class NumberedPairs:
    """Pairs whose images hold their own index."""

    def __init__(self, count):
        self.names = [f"scene {index}" for index in range(count)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return torch.full((3, 2, 2), float(index)), torch.full((3, 2, 2), float(-index))


# Folders of pairs


def test_a_folder_gives_its_pairs_by_name(tmp_path):
    save_pairs(tmp_path, "b", "a")
    (tmp_path / "target" / "a.png").unlink()
    target = np.random.default_rng(9).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "target" / "a.tif", target, photometric="rgb")
    pairs = PairedImageFolder(tmp_path)
    assert pairs.names == ["a", "b"] and len(pairs) == 2
    degraded, clean = pairs[0]
    assert torch.equal(degraded, read_image(tmp_path / "input" / "a.png"))
    assert torch.equal(clean, read_image(tmp_path / "target" / "a.tif"))
    assert torch.equal(pairs[1][1], read_image(tmp_path / "target" / "b.png"))


def test_names_without_a_partner_are_listed_on_both_sides(tmp_path):
    save_pairs(tmp_path, "common", "lonely", "single")
    (tmp_path / "target" / "lonely.png").unlink()
    (tmp_path / "input" / "single.png").unlink()
    with pytest.raises(ValueError, match=r"lonely \(only in input\), single \(only in target\)\. Add the") as error:
        PairedImageFolder(tmp_path)
    assert "common" not in str(error.value)


def test_two_files_of_one_name_are_refused(tmp_path):
    save_pairs(tmp_path, "a")
    save(tmp_path / "input" / "a.jpg")
    with pytest.raises(ValueError, match=r"input holds a\.jpg and a\.png: keep one"):
        PairedImageFolder(tmp_path)


def save_files(folder, **sides):
    for side, names in sides.items():
        for name in names:
            save(folder / side / f"{name}.png", seed=sum(map(ord, name)))
    return folder


def test_patterns_tell_pairs_whose_names_differ(tmp_path):
    save_files(tmp_path, input=["b_noisy", "A_noisy"], target=["a_clean", "b_clean"])
    pairs = PairedImageFolder(tmp_path, "{}_noisy", "{}_clean")
    assert pairs.names == ["A_noisy", "b_noisy"] and pairs.scenes == [0, 1] and count_in_words(pairs) == "2 pairs"
    for number, name in enumerate(("a", "b")):
        assert torch.equal(pairs[number][1], read_image(tmp_path / "target" / f"{name}_clean.png"))
    with pytest.raises(ValueError, match=r'no partner of the same.* mean --input_pattern "{}_noisy" --target_pattern'):
        PairedImageFolder(tmp_path)
    with pytest.raises(ValueError, match=r"no partner by the patterns {}_x and {}_clean: A_noisy \(only in input\)"):
        PairedImageFolder(tmp_path, "{}_x", "{}_clean")


def test_pairs_may_lie_side_by_side(tmp_path):
    save_files(tmp_path, **{"": ["a_noisy", "a_clean", "b_noisy", "b_clean"]})
    pairs = PairedImageFolder(tmp_path, "{}_noisy", "{}_clean")
    assert pairs.names == ["a_noisy", "b_noisy"]
    assert torch.equal(pairs[1][1], read_image(tmp_path / "b_clean.png"))
    with pytest.raises(FileNotFoundError, match='such as --input_pattern "{}_noisy" --target_pattern "{}_clean"'):
        PairedImageFolder(tmp_path)
    save(tmp_path / "notes.png")
    with pytest.raises(ValueError, match="fit neither {}_noisy nor {}_clean: notes. Change"):
        PairedImageFolder(tmp_path, "{}_noisy", "{}_clean")


def test_several_inputs_of_a_target_are_counted_and_change_the_digest_alone(tmp_path):
    save_files(tmp_path, input=["0_0", "0_1", "1_0", "2_0"], target=["0", "1", "2"])
    pairs = PairedImageFolder(tmp_path, "{}_*")
    assert count_in_words(pairs) == "4 inputs of 3 targets" and pairs.scenes == [0, 0, 1, 2]
    assert torch.equal(pairs[1][1], pairs[0][1]) and not torch.equal(pairs[1][0], pairs[0][0])
    save_files(tmp_path / "b", input=["0", "1", "2"], target=["0", "1", "2"])
    of_one = PairedImageFolder(tmp_path / "b")
    assert of_one.digest == PairedImageFolder(tmp_path / "b", "{}*").digest != pairs.digest


def test_the_digest_of_pairs_of_equal_names_is_that_of_runs_before_there_were_patterns(tmp_path):
    for side in ("input", "target"):
        (tmp_path / side).mkdir()
        for name in ("b", "a"):
            (tmp_path / side / f"{name}.png").write_bytes(name.encode() * 7)
    assert PairedImageFolder(tmp_path).digest == "2 pairs, 9911b6c534692b3a"


def test_inputs_of_one_target_are_held_out_together(tmp_path):
    names = [f"{scene}_{shot}" for scene in range(7) for shot in range(1 + scene % 3)]
    save_files(tmp_path, input=names, target=map(str, range(7)))
    pairs = PairedImageFolder(tmp_path, "{}_*")
    for seed in range(20):
        held_out, others = hold_out_pairs(pairs, 3, seed)
        scenes = [{name[0] for name in side.names} for side in (held_out, others)]
        assert len(scenes[0]) == 2 and not scenes[0] & scenes[1]
        assert sorted(held_out.names + others.names) == pairs.names
        again, _ = hold_out_pairs(others, 5, seed)  # of a part, too
        assert {name for name in others.names if name[0] == again.names[0][0]} == set(again.names)


def test_pairs_of_equal_names_are_held_out_as_they_were_before_there_were_scenes():
    for count in (2, 9, 40):
        for seed in range(5):
            was, now = draw_pairs(NumberedPairs(count), max(1, count // 5), seed), None
            now = hold_out_pairs(NumberedPairs(count), 5, seed)
            assert [side.names for side in was] == [side.names for side in now]
    with pytest.raises(ValueError, match="One pair cannot be split"):
        hold_out_pairs(NumberedPairs(1), 5, 0)


def test_a_side_that_exif_turned_is_named(tmp_path):
    """A phone's photo was exported, and its EXIF lost on the way."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, side in enumerate(("input", "target")):
        (tmp_path / side).mkdir()
        for name, turned in (("a", number == 0), ("b", number == 1)):
            image.save(tmp_path / side / f"{name}.jpg", exif=exif if turned else b"")
        image.rotate(90 * number, expand=True).save(tmp_path / side / "c.jpg")
    with pytest.raises(ValueError) as error:
        check_pairs(PairedImageFolder(tmp_path), 1, "")
    said = str(error.value)
    assert "Pair a: the input is 10x12 pixels but the target 12x10 (the input is turned by its EXIF orient" in said
    assert "Pair b: the input is 12x10 pixels but the target 10x12 (the target is turned by its EXIF orient" in said
    assert "Pair c: the input is 12x10 pixels but the target 10x12 (one of them is turned by 90 degrees); both" in said
    cells = [{side: {"bytes": (tmp_path / side / "a.jpg").read_bytes(), "path": None} for side in ("input", "target")}]
    split = Dataset.from_list(cells, features=Features({side: ImageFeature() for side in ("input", "target")}))
    with pytest.raises(ValueError, match=r"Pair row 0: .* \(the input is turned by its EXIF"):
        PairedHubDataset(split)[0]


def test_missing_and_empty_sides_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere; check the path"):
        PairedImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder .*input; .*holds `input/` and `target/` .*same file names"):
        PairedImageFolder(tmp_path)
    save(tmp_path / "input" / "a.png")
    with pytest.raises(FileNotFoundError, match="no folder .*target"):
        PairedImageFolder(str(tmp_path))
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match="target holds no images"):
        PairedImageFolder(tmp_path)


def test_check_pairs_lists_every_culprit(tmp_path):
    save_pairs(tmp_path, "broken", "good", "small", "uneven", height=16, width=16)
    (tmp_path / "input" / "broken.png").write_bytes((tmp_path / "input" / "broken.png").read_bytes()[:200])
    save(tmp_path / "target" / "uneven.png", 16, 17)
    for side in ("input", "target"):
        save(tmp_path / side / "small.png", 20, 15)
    pairs = PairedImageFolder(tmp_path)
    with pytest.raises(ValueError, match="16x16 pixels but the target 17x16; both") as error:
        check_pairs(pairs, 16, "the training patch")
    for culprit in (
        "input/broken.png cannot be read",
        "Pair small is 15x20 pixels, smaller than the 16 of the training patch",
    ):
        assert culprit in str(error.value)
    assert "good" not in str(error.value)
    with pytest.raises(ValueError, match="Pair uneven"):
        pairs[3]
    check_pairs(PairSubset(pairs, [1]), 16, "the training patch")


def test_a_pair_of_two_sizes_is_refused():
    good = torch.zeros(3, 4, 6)
    assert check_pair("a", good, good) == (good, good)
    with pytest.raises(ValueError, match="Pair a: the input is 6x4 pixels but the target 4x6"):
        check_pair("a", good, good.transpose(1, 2))


# Hugging Face datasets


def hub_split(rows):
    """A split of image columns; each cell the bytes of a PNG file, or None."""
    cells = {
        side: [None if cell is None else {"bytes": cell, "path": None} for cell in rows]
        for side in ("input", "target")
    }
    features = Features({side: ImageFeature() for side in cells})
    return Dataset.from_dict(cells, features=features)


def png(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_a_hub_dataset_gives_its_pairs_with_all_their_bits():
    random = np.random.default_rng(0)
    colour = random.integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    grey = random.integers(0, 256, (6, 8), dtype=np.uint8)
    split = hub_split([png(colour), png(grey)])
    pairs = PairedHubDataset(split.with_format("numpy"))
    assert len(pairs) == 2 and pairs.names == ["row 0", "row 1"]
    expected = torch.from_numpy(colour[..., ::-1].astype(np.float32) / 65535).permute(2, 0, 1)
    torch.testing.assert_close(pairs[0][0], expected, atol=1e-6, rtol=0)
    assert torch.equal(pairs[1][1], torch.from_numpy(grey / np.float32(255)).expand(3, 6, 8))
    check_pairs(pairs, 6, "the training patch")
    assert split.features["input"].decode  # the caller's dataset is as it was


def test_a_hub_dataset_may_hold_pillow_images_or_paths(tmp_path):
    path = save(tmp_path / "a.png")
    image = Image.open(path)
    split = Dataset.from_dict(
        {"input": [image], "target": [str(path)]},
        features=Features({"input": ImageFeature(), "target": ImageFeature()}),
    )
    degraded, target = PairedHubDataset(split)[0]
    assert torch.equal(degraded, read_image(path))
    assert torch.equal(target, read_image(path))


def test_hub_rows_that_cannot_be_used_are_named():
    good = png(np.zeros((8, 8, 3), np.uint8))
    pairs = PairedHubDataset(hub_split([good, good[:60], None]))
    with pytest.raises(ValueError, match="image of row 1, input cannot be read.*image of row 2, input is missing"):
        check_pairs(pairs, 8, "the training patch")
    other = Dataset.from_dict(
        {
            "input": [{"bytes": good, "path": None}],
            "target": [{"bytes": png(np.zeros((8, 9), np.uint8)), "path": None}],
        },
        features=Features({"input": ImageFeature(), "target": ImageFeature()}),
    )
    with pytest.raises(ValueError, match="Pair row 0: the input is 8x8 pixels but the target 9x8"):
        PairedHubDataset(other)[0]


def test_hub_columns_must_be_there_and_hold_images():
    split = hub_split([png(np.zeros((8, 8, 3), np.uint8))])
    with pytest.raises(ValueError, match=r"\['noisy', 'target'\]; rename.*missing: input"):
        PairedHubDataset(split.rename_column("input", "noisy"))
    with pytest.raises(ValueError, match=r"`target` holds Value.*cast_column\(\"target\""):
        PairedHubDataset(
            Dataset.from_dict(
                {"input": [None], "target": ["a.png"]},
                features=Features({"input": ImageFeature(), "target": Value("string")}),
            )
        )
    with pytest.raises(ValueError, match="split is empty"):
        PairedHubDataset(split.select([]))


# Subsets and draws


def test_a_subset_holds_the_pairs_it_names():
    subset = PairSubset(NumberedPairs(10), [7, 2])
    assert len(subset) == 2 and subset.names == ["scene 7", "scene 2"]
    assert [subset[index][0].unique().item() for index in range(2)] == [7, 2]
    nested = PairSubset(subset, [1])
    assert nested.names == ["scene 2"] and nested[0][1].unique().item() == -2


def test_draws_are_disjoint_complete_and_depend_on_the_seed_alone():
    pairs = NumberedPairs(40)
    drawn, rest = draw_pairs(pairs, 16, seed=3)
    assert len(drawn) == 16
    assert sorted(drawn.names + rest.names) == sorted(pairs.names)
    assert drawn.names == draw_pairs(pairs, 16, seed=3)[0].names
    torch.manual_seed(1)
    assert drawn.names == draw_pairs(pairs, 16, seed=3)[0].names
    assert drawn.names != draw_pairs(pairs, 16, seed=4)[0].names
    # A larger draw of the same seed holds the smaller one: studies over N compare like with like.
    assert set(drawn.names) < set(draw_pairs(pairs, 32, seed=3)[0].names)


def test_every_pair_is_drawn_equally_often():
    times = {name: 0 for name in NumberedPairs(8).names}
    for seed in range(400):
        for name in draw_pairs(NumberedPairs(8), 2, seed)[0].names:
            times[name] += 1
    # 100 times each, give or take five standard deviations of a binomial.
    assert all(abs(count - 100) < 5 * 8.7 for count in times.values())


def test_all_pairs_may_be_drawn_but_not_more_nor_none():
    drawn, rest = draw_pairs(NumberedPairs(5), 5, seed=0)
    assert len(drawn) == 5 and len(rest) == 0
    for count in (6, 0, -1):
        with pytest.raises(
            ValueError, match=f"Cannot draw {count} training pairs from 5.*--max_train_samples.* 1 and 5"
        ):
            draw_pairs(NumberedPairs(5), count, seed=0)


# Digests


def test_a_digest_follows_the_files_and_the_drawn_pairs(tmp_path):
    pairs = PairedImageFolder(save_pairs(tmp_path, "a", "b", "c"))
    first, _ = draw_pairs(pairs, 2, seed=0)
    found = {pairs.digest, first.digest}
    assert first.digest == PairSubset(PairedImageFolder(tmp_path), first._indices).digest
    found.add(PairSubset(pairs, [index for index in (0, 1, 2) if index != first._indices[0]]).digest)
    save(tmp_path / "target" / "b.png", 14, 14)
    found.add(PairedImageFolder(tmp_path).digest)
    assert len(found) == 4 and all(name.startswith(("3 pairs, ", "2 pairs, ")) for name in found)
    assert PairSubset(NumberedPairs(2), [0]).digest is None
