"""Lists in error messages are cut and counted."""

from colora_peft.utils.text import some, some_sentences


def test_names_are_listed_up_to_the_limit():
    assert some([]) == "none"
    assert some(["a", "b"], limit=2) == "a, b"
    assert some(["a", "b", "c", "d"], limit=2) == "a, b and 2 more"


def test_sentences_are_listed_up_to_the_limit():
    assert some_sentences(["A.", "B."], limit=2) == "A. B."
    assert some_sentences(["A.", "B.", "C."], limit=1) == "A. There are 2 more."
