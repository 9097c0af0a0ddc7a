"""Messages ask for a base in the words of whoever reads them: no flag in Python, no argument in a script."""

from dataclasses import replace

import pytest

from colora_peft.hub.asking import BY_ARGUMENT, BY_FLAG, BY_OTHER_FLAG

NAMES = [None, "nets/base", "my_networks:network"]


def sentences(asking):
    return [asking.for_base(), asking.for_changed("nets/base"), *map(asking.for_other, NAMES)]


def test_python_hears_of_arguments_and_scripts_of_flags():
    for sentence in sentences(BY_ARGUMENT):
        assert "base=" in sentence and "--" not in sentence
    for sentence in [*sentences(BY_FLAG), *sentences(BY_OTHER_FLAG)]:
        assert "--model_name_or_path" in sentence and "base=" not in sentence and "network itself" not in sentence


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_is_left_out_only_where_it_was_given_and_the_adapter_leads_to_its_base(name):
    assert ("out or" in BY_OTHER_FLAG.for_other(name)) == (name == "nets/base")
    assert "out or" not in BY_FLAG.for_other(name)


def test_a_sentence_of_the_script_s_own_takes_the_place_of_all():
    asking = replace(BY_OTHER_FLAG, instead="Run each by itself.")
    assert {asking.for_other(name) for name in NAMES} == {"Run each by itself."}
