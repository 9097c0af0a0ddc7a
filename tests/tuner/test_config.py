"""CoLoRAConfig: what it refuses, and that it survives its file."""

import json
import math

import numpy as np
import pytest
from peft import PeftConfig, PeftType

from colora_peft import CoLoRAConfig, ContributionScores
from colora_peft.tuner.peft_internals import SAVES_BIASES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameter_budget": 0}, r"parameter_budget is 0.*\(0, 1\]"),
        ({"parameter_budget": 1.01}, "parameter_budget is 1.01"),
        ({"parameter_budget": math.nan}, "parameter_budget is nan"),
        ({"beta": -0.5}, "beta is -0.5"),
        ({"beta": math.inf}, "beta is inf"),
        ({"delta_min": 1.5}, "delta_min is 1.5"),
        ({"colora_alpha": 0}, "colora_alpha is 0"),
        ({"ranks": -1}, "rank of 'every layer' is -1"),
        ({"ranks": 2.0}, "rank of 'every layer' is 2.0"),
        ({"ranks": True}, "is True"),
        ({"ranks": {"conv": 2, "body": None}}, "rank of 'body' is None"),
        ({"contributions": {"conv": -1.0}}, "'conv' is -1.0"),
        ({"contributions": {"conv": math.nan}}, "'conv' is nan"),
        ({"contributions": {"conv": math.inf}}, "'conv' is inf"),
        ({"contributions": {"conv": "1"}}, "'conv' is '1'"),
        ({"contributions": {}}, "no table of layer name to score"),
        ({"contributions": [1.0]}, r"contributions are \[1.0\].*ContributionScores.scores"),
        ({"min_rank_pattern": {"conv": -1}}, "'conv' in min_rank_pattern is -1"),
        ({"max_rank_pattern": {"conv": 1.5}}, "'conv' in max_rank_pattern is 1.5"),
        ({"max_rank_pattern": {"conv(": 1}}, r"'conv\(' in max_rank_pattern is not a regular expression"),
        ({"max_rank_pattern": ["conv"]}, r"max_rank_pattern is \['conv'\]"),
        ({"ranks": 4, "max_rank_pattern": {"conv": 1}}, "max_rank_pattern has no effect with ranks=4"),
        ({"bias": "lora_only"}, "bias is 'lora_only'.*colora_only"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "blocks"}, "layers_pattern needs"),
    ],
)
def test_out_of_range_is_one_sentence_that_names_the_culprit(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        CoLoRAConfig(**settings)
    assert str(caught.value)[0].isupper() and str(caught.value).endswith(".")


def test_bias_is_refused_where_peft_would_lose_it(monkeypatch):
    monkeypatch.setattr("colora_peft.tuner.config.SAVES_BIASES", False)
    with pytest.raises(ValueError, match="bias is 'all'.*peft>=0.21"):
        CoLoRAConfig(bias="all")
    CoLoRAConfig(bias="none")


@pytest.mark.parametrize("settings", [{"parameter_budget": 1}, {"ranks": 0}, {"ranks": {}}, {"beta": 0}])
def test_borders_of_the_ranges_are_allowed(settings):
    config = CoLoRAConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_file_round_trip_through_the_general_class(tmp_path):
    config = CoLoRAConfig(
        target_modules=["intro", "ending", "body"],
        exclude_modules=["norm"],
        ranks={"intro": 3, "ending": 0},
        contributions={"intro": 0.125, "ending": 1e-9},
        parameter_budget=0.02,
        beta=0.25,
        delta_min=0.001,
        min_rank_pattern={"ending": 2},
        max_rank_pattern={r"body\.\d+": 5},
        colora_alpha=2.0,
        bias="colora_only" if SAVES_BIASES else "none",
        modules_to_save=["head"],
        layers_to_transform=[1, 2],
        layers_pattern="blocks",
        init_weights=False,
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is CoLoRAConfig and loaded == config
    assert loaded.peft_type is PeftType.COLORA
    assert isinstance(loaded.ranks["intro"], int)


def test_equal_configurations_give_equal_files(tmp_path):
    names = [f"layer{i}" for i in range(30)]
    for folder, order in (("one", names), ("two", names[::-1])):
        CoLoRAConfig(target_modules=order).save_pretrained(tmp_path / folder)
    one, two = ((tmp_path / folder / "adapter_config.json").read_text() for folder in ("one", "two"))
    assert one == two
    assert json.loads(one)["target_modules"] == sorted(names)


def test_field_of_a_newer_version_is_dropped_with_a_warning(tmp_path):
    CoLoRAConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path) == CoLoRAConfig()


SCORES = ContributionScores({"conv": 0.25, "body": 0.0}, "taylor", num_batches=1, loss_start=0.5)


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "path"])
def test_contributions_are_read_from_a_file_once(kind, tmp_path):
    path = tmp_path / "contributions.json"
    SCORES.save(path)
    config = CoLoRAConfig(contributions=kind(path))
    path.unlink()
    assert config == CoLoRAConfig(contributions=SCORES.scores)
    config.save_pretrained(tmp_path / "adapter")
    assert "contributions.json" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert PeftConfig.from_pretrained(tmp_path / "adapter").contributions == SCORES.scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["scores"].update(conv=math.nan), "contributions.json.*'conv' is nan"),
        (lambda content: content["scores"].update(body=-math.inf), "contributions.json.*'body' is -inf"),
        (
            lambda content: content.pop("num_batches"),
            "contributions.json.*lacks num_batches: measure again",
        ),
    ],
)
def test_a_file_of_contributions_that_cannot_be_used_is_named(change, message, tmp_path):
    path = tmp_path / "contributions.json"
    SCORES.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CoLoRAConfig(contributions=path)
    with pytest.raises(ValueError, match="Cannot read contribution scores from 'nowhere.json'"):
        CoLoRAConfig(contributions="nowhere.json")


def test_contributions_may_be_numbers_of_numpy(tmp_path):
    config = CoLoRAConfig(contributions={"conv": np.float32(0.25), "body": np.int64(0)})
    assert config == CoLoRAConfig(contributions=SCORES.scores)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).contributions == SCORES.scores


def test_a_configuration_of_before_the_rank_patterns_loads(tmp_path):
    CoLoRAConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    assert content.pop("min_rank_pattern") == content.pop("max_rank_pattern") == {}
    file.write_text(json.dumps(content))
    assert PeftConfig.from_pretrained(tmp_path) == CoLoRAConfig()
