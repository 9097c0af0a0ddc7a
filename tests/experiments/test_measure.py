"""Helpers that all measurements share."""

from examples.experiments.measure import median_ratio, take_turns


def test_each_round_runs_all_in_turns_and_the_first_does_not_count():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = take_turns(runs, 3)
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert {name: len(own) for name, own in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_the_median_of_the_ratios_within_rounds():
    assert median_ratio([1.0, 8.0, 3.0], [1.0, 2.0, 1.0]) == 3
