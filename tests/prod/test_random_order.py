"""PROD draws every subset and every order equally often, and what it drew can be replayed."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from scipy.stats import chisquare

from colora_peft.prod import (
    JPEG,
    GaussianBlur,
    Noise,
    RandomOrderDegradation,
    default_degradations,
    light_degradations,
)

# A fair draw falls below this once in a million; the seed is fixed, so a pass stays a pass.
UNLIKELY = 1e-6


@dataclass(frozen=True)
class Add:
    """A degradation that leaves its mark in the order of its digits: x -> 10 x + digit."""

    digit: int
    name: ClassVar[str] = ""

    def __post_init__(self):
        object.__setattr__(self, "name", f"add {self.digit}")

    def draw(self, generator):
        return {"amount": self.digit}

    def apply(self, image, amount):
        return 10 * image + amount


POOL = (Add(1), Add(2), Add(3))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orders_drawn(degradation, count):
    source = generator()
    return Counter(tuple(step["degradation"] for step in degradation.draw(source)) for _ in range(count))


def test_the_pool_begins_with_the_five_of_prod():
    assert RandomOrderDegradation().names[:5] == ["blur", "noise", "rain", "jpeg", "motion"]
    assert RandomOrderDegradation().mode == "prod"


def test_every_subset_is_equally_likely_and_every_order_of_a_subset():
    drawn = orders_drawn(RandomOrderDegradation(POOL), 4000)
    subsets = Counter()
    for order, count in drawn.items():
        subsets[frozenset(order)] += count
    assert len(subsets) == 8
    assert chisquare(list(subsets.values())).pvalue > UNLIKELY
    names = [degradation.name for degradation in POOL]
    for size in (2, 3):
        for subset in itertools.combinations(names, size):
            counts = [drawn[order] for order in itertools.permutations(subset)]
            assert min(counts) > 0
            assert chisquare(counts).pvalue > UNLIKELY


def test_all_orders_of_a_pair_of_the_pool_occur_equally_often():
    drawn = orders_drawn(RandomOrderDegradation(), 3000)
    for first, second in itertools.combinations(RandomOrderDegradation().names, 2):
        together = [
            (order.index(first) < order.index(second), n) for order, n in drawn.items() if {first, second} <= {*order}
        ]
        counts = [sum(n for before, n in together if before is side) for side in (True, False)]
        assert 600 < sum(counts) < 900  # both take part in a quarter of the draws
        assert chisquare(counts).pvalue > UNLIKELY


def test_single_draws_one_at_a_time_equally_often():
    drawn = orders_drawn(RandomOrderDegradation(POOL, mode="single"), 1500)
    assert set(drawn) == {(degradation.name,) for degradation in POOL}
    assert chisquare(list(drawn.values())).pvalue > UNLIKELY


def test_fixed_draws_all_in_the_order_of_the_pool_with_fresh_parameters():
    degradation = RandomOrderDegradation(mode="fixed")
    source = generator()
    recipes = [degradation.draw(source) for _ in range(5)]
    for recipe in recipes:
        assert [step["degradation"] for step in recipe] == degradation.names
    assert len({json.dumps(recipe) for recipe in recipes}) == 5


def test_steps_are_applied_in_the_order_of_the_recipe():
    recipe = [{"degradation": f"add {digit}", "amount": digit} for digit in (3, 1, 2)]
    assert RandomOrderDegradation(POOL).apply(torch.zeros(3, 1, 1), recipe).unique().item() == 312


def test_the_empty_recipe_leaves_the_image_alone():
    image = torch.rand(3, 8, 8, generator=generator())
    assert torch.equal(RandomOrderDegradation().apply(image, []), image)


@pytest.mark.parametrize("mode", ["prod", "single", "fixed"])
def test_a_recipe_replays_exactly_after_json(mode):
    degradation = RandomOrderDegradation(mode=mode)
    image = torch.rand(3, 33, 40, generator=generator())
    before = image.clone()
    for seed in range(8):
        recipe = degradation.draw(generator(seed))
        assert recipe == degradation.draw(generator(seed))
        replayed = RandomOrderDegradation().apply(image, json.loads(json.dumps(recipe)))
        assert torch.equal(replayed, degradation.apply(image, recipe))
        assert replayed.min() >= 0 and replayed.max() <= 1
        assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("recipe", "culprit"), [([{"degradation": "fog", "density": 1}], "'fog'"), ([{"quality": 30}], "None")]
)
def test_a_recipe_with_an_unknown_name_is_refused(recipe, culprit):
    with pytest.raises(ValueError, match=rf"{culprit}.*\['blur', 'jpeg'\]"):
        RandomOrderDegradation((GaussianBlur(), JPEG())).apply(torch.zeros(3, 8, 8), recipe)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="prod, single, fixed.*'shuffled'"):
        RandomOrderDegradation(mode="shuffled")


@pytest.mark.parametrize("pool", [(), (Noise(), Noise(std_255=(1, 2)))])
def test_an_empty_or_ambiguous_pool_is_refused(pool):
    with pytest.raises(ValueError, match="different names"):
        RandomOrderDegradation(pool)


def test_shares_are_untouched_and_light_and_the_rest_is_prod():
    degradation = RandomOrderDegradation(POOL, untouched_share=0.25, light_share=0.25, light=(Add(3),))
    drawn = orders_drawn(degradation, 4000)
    untouched = 4000 * (1 / 4 + 1 / 4 / 2 + 1 / 2 / 8)  # left alone, light with nothing drawn, PROD with nothing drawn
    only_the_third = 4000 * (1 / 4 / 2 + 1 / 2 / 8)
    rest = 4000 - drawn[()] - drawn["add 3",]
    expected = [untouched, only_the_third, 4000 - untouched - only_the_third]
    assert chisquare([drawn[()], drawn["add 3",], rest], expected).pvalue > UNLIKELY


def test_without_shares_every_draw_is_as_before_them():
    """The recipe that this seed gave when there were no shares."""
    recipe = RandomOrderDegradation().draw(generator(3))
    assert recipe == RandomOrderDegradation(light=()).draw(generator(3))
    source = generator(3)
    chosen, order = torch.rand(5, generator=source) < 0.5, torch.randperm(5, generator=source).tolist()
    pool = default_degradations()
    first = next(pool[i] for i in order if chosen[i])
    assert recipe[0] == {"degradation": first.name, **first.draw(source)}


def test_light_degradations_are_weaker_on_the_mean_in_every_kind():
    image = torch.rand(3, 64, 64, generator=generator()) * 0.8 + 0.1
    for strong, light in zip(default_degradations(), light_degradations(), strict=True):
        errors = [
            sum((kind.apply(image, **kind.draw(generator(seed))) - image).abs().mean() for seed in range(20))
            for kind in (strong, light)
        ]
        assert strong.name == light.name and errors[1] < errors[0]


@pytest.mark.parametrize("shares", [{"untouched_share": -0.1}, {"light_share": 0.6, "untouched_share": 0.5}])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="together at most 1"):
        RandomOrderDegradation(**shares)


def test_light_degradations_that_could_not_be_replayed_are_refused():
    with pytest.raises(ValueError, match="'add 1'.* not among"):
        RandomOrderDegradation(light=(Add(1),), light_share=0.5)
