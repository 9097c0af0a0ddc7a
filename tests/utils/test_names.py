"""Names belong together by patterns: to the letter first, then without case and Unicode form, and never by chance."""

import unicodedata

import pytest

from colora_peft.utils import NamePattern, guess_patterns, guess_patterns_side_by_side, match_names, split_names


def matched(inputs, targets, input_pattern="{}", target_pattern="{}"):
    patterns = NamePattern(input_pattern, "--input_pattern"), NamePattern(target_pattern, "--target_pattern")
    return match_names(inputs, targets, *patterns)


def test_names_that_differ_by_a_word_belong_together():
    assert matched(["b_noisy", "a_noisy"], ["a_clean", "b_clean"], "{}_noisy", "{}_clean") == {
        "a_noisy": "a_clean",
        "b_noisy": "b_clean",
    }
    inputs, targets = [[f"000{scene}_{side}_SRGB_01{shot}" for scene in (1, 2) for shot in (0, 1)]
                       for side in ("NOISY", "GT")]  # fmt: skip
    found = matched(inputs, targets, "{}_NOISY_SRGB_{}", "{}_GT_SRGB_{}")
    assert found == {name: name.replace("NOISY", "GT") for name in inputs}


def test_what_is_special_elsewhere_stands_for_itself():
    assert matched(["a.b+(1)"], ["a.b+[1]"], "{}.b+(1)", "{}.b+[1]") == {"a.b+(1)": "a.b+[1]"}
    assert not matched(["axb+(1)"], ["a.b+[1]"], "{}.b+(1)", "{}.b+[1]")


def test_several_inputs_have_one_target_where_a_star_allows_it():
    names = ["scene_1_0", "scene_1_1", "scene_2_0"]
    expected = dict(zip(names, ["scene_1", "scene_1", "scene_2"], strict=True))
    assert matched(names, ["scene_1", "scene_2"], "{}_*") == expected
    assert matched(["a_1", "A_2"], ["a"], "{}_*") == {"a_1": "a", "A_2": "a"}


def test_case_and_unicode_form_do_not_matter_where_nothing_fits_to_the_letter():
    composed = "caf\u00e9"
    apart = unicodedata.normalize("NFD", composed)
    assert composed != apart and matched([composed], [apart]) == {composed: apart}
    assert matched(["IMG_1"], ["img_1"]) == {"IMG_1": "img_1"}
    assert matched(["A_Noisy"], ["a_CLEAN"], "{}_noisy", "{}_clean") == {"A_Noisy": "a_CLEAN"}
    both = [composed, apart, "a", "A"]
    assert matched(both, both[::-1]) == {name: name for name in both}
    assert matched(["a", "A"], ["a"]) == {"a": "a"}  # what fits to the letter is taken


@pytest.mark.parametrize(
    ("inputs", "targets", "patterns", "said"),
    [
        (["Ab"], ["ab", "AB"], (), "Ab fits several targets: ab, AB; keep one."),
        (["Ab", "aB"], ["ab"], (), "ab fits several inputs: Ab, aB; keep one."),
        (["a_1"], ["a_x", "a_y"], ("{}_1", "{}_*"), "a_1 fits several targets: a_x, a_y"),
        (["a_b"], ["a"], ("{}_{}", "{}"), "need as many {} as each other"),
        (["a"], ["a"], ("noisy", "{}"), "--input_pattern noisy has no {}, which stands for what both names"),
    ],
)
def test_what_is_ambiguous_is_refused_with_the_names(inputs, targets, patterns, said):
    with pytest.raises(ValueError) as error:
        matched(inputs, targets, *patterns)
    assert said in str(error.value)


def test_names_side_by_side_go_to_the_pattern_that_says_more():
    patterns = NamePattern("{}_noisy", ""), NamePattern("{}", "")
    assert split_names(["a", "a_noisy", "b_NOISY"], *patterns) == (["a_noisy", "b_NOISY"], ["a"], [])
    patterns = NamePattern("{}_noisy", ""), NamePattern("{}_clean", "")
    assert split_names(["a_clean", "a_noisy", "notes"], *patterns) == (["a_noisy"], ["a_clean"], ["notes"])
    with pytest.raises(ValueError, match="a_b fits both patterns, {}_b and a_{}: make"):
        split_names(["a_b"], NamePattern("{}_b", ""), NamePattern("a_{}", ""))


@pytest.mark.parametrize(
    ("inputs", "targets", "guess"),
    [
        (["a_noisy", "b_noisy"], ["a_clean", "b_clean"], ("{}_noisy", "{}_clean")),
        (["0001_NOISY_SRGB_010"], ["0001_GT_SRGB_010"], ("{}_NOISY_{}", "{}_GT_{}")),
        (["0_0", "0_1", "1_0", "1_1"], ["0", "1"], ("{}_*", "{}")),
        (["noisy1", "noisy2"], ["clean1", "clean2"], ("noisy{}", "clean{}")),
        (["img-1"], ["img-1-gt"], ("{}", "{}-gt")),
        (["x", "y"], ["p", "q"], None),
        (["x"], [], None),
    ],
)
def test_patterns_are_guessed_from_names(inputs, targets, guess):
    assert guess_patterns(inputs, targets) == guess
    if guess is not None:
        assert matched(inputs, targets, *guess).keys() == set(inputs)


def test_the_sides_of_names_side_by_side_are_guessed_from_words():
    assert guess_patterns_side_by_side(["a_GT", "a_low", "b_GT", "b_low"]) == ("{}_low", "{}_GT")
    assert guess_patterns_side_by_side(["a", "b"]) is None
