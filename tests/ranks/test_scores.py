"""The record of an estimate: its file, what is refused in it, and the mean of several."""

import json
from dataclasses import replace

import numpy as np
import pytest

from colora_peft.ranks import ContributionScores, mean_scores

SCORES = ContributionScores(
    {"0": 0.5, "1": 0.0},
    "probe",
    num_batches=2,
    loss_start=1.0,
    loss_end=0.5,
    path_integral=-0.4,
    num_path_steps=4,
    unreached=("1",),
    source={"model": "x", "seed": 3},
)


def test_json_round_trip(tmp_path):
    SCORES.save(tmp_path / "scores.json")
    assert ContributionScores.load(tmp_path / "scores.json") == SCORES
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["completeness_error"] == SCORES.completeness_error == pytest.approx(0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_numbers_of_numpy_are_scores(tmp_path):
    scores = ContributionScores({"a": np.float32(0.5), "b": np.int64(0)}, "taylor", num_batches=1, loss_start=1.0)
    assert scores.scores == {"a": 0.5, "b": 0.0} and {type(score) for score in scores.scores.values()} == {float}
    scores.save(tmp_path / "scores.json")
    assert ContributionScores.load(tmp_path / "scores.json") == scores
    for wrong in (True, np.True_, np.float32("nan"), "1"):
        with pytest.raises(ValueError, match="layer 'a' is .*finite and >= 0"):
            replace(scores, scores={"a": wrong})


def test_score_files_of_other_versions_are_read(tmp_path):
    path = tmp_path / "scores.json"
    scores = ContributionScores({"a": 0.5}, "taylor", 2, 1.0, num_processes=2, source={"model": "x", "seed": 3})
    scores.save(path)
    assert ContributionScores.load(path) == scores
    content = json.loads(path.read_text())
    older = {name: content[name] for name in ("scores", "method", "num_batches", "loss_start")}
    path.write_text(json.dumps(older))
    assert ContributionScores.load(path) == ContributionScores({"a": 0.5}, "taylor", 2, 1.0)
    path.write_text(json.dumps({**content, "from_the_future": [1], "also": 2}))
    with pytest.warns(UserWarning, match="does not know, which are ignored: 'also', 'from_the_future'"):
        assert ContributionScores.load(path) == scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("method"), "It lacks method: measure again with contribution.py"),
        (lambda content: content.update(loss_end="0.5"), "Its loss_end is '0.5', no number: measure again with"),
        (lambda content: content.update(loss_start=None), "Its loss_start is None, no number: measure again with"),
        (lambda content: content.update(unreached="12"), "Its unreached is '12', no list of layer names: measure"),
        (lambda content: content.update(unreached=[1]), "no list of layer names: measure again with"),
        (lambda content: content["scores"].update({"0": -1.0}), "layer '0' is -1.0"),
        (lambda content: content["scores"].update({"0": float("nan")}), "layer '0' is nan"),
        (lambda content: content.update(scores={}), "no table of layer name to score"),
    ],
)
def test_bad_score_files_are_named(tmp_path, change, message):
    path = tmp_path / "scores.json"
    SCORES.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^The file .*scores.json' holds no usable contribution scores.*{message}"):
        ContributionScores.load(path)


def test_score_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        ContributionScores.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        ContributionScores.load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="no usable contribution scores. It is no table of entries: measure again"):
        ContributionScores.load(tmp_path / "list.json")
    with pytest.raises(ValueError, match="folder .* does not exist"):
        ContributionScores({"a": 1.0}, "faig", num_batches=1, loss_start=1.0).save(tmp_path / "no" / "x.json")


def test_mean_of_scores_does_not_see_their_units():
    def measured(*scores):
        return ContributionScores(
            scores=dict(zip("xyz", scores, strict=False)), method="gradient", num_batches=1, loss_start=1.0
        )

    one, other = measured(1.0, 3.0, 0.0), measured(2.0, 2.0, 4.0)
    mean = mean_scores([one, other])
    assert mean == pytest.approx({"x": 0.25, "y": 0.5, "z": 0.25}) and sum(mean.values()) == pytest.approx(1)
    assert mean_scores([measured(100.0, 300.0, 0.0), other]) == pytest.approx(mean)
    with pytest.raises(ValueError, match="of different networks"):
        mean_scores([one, measured(1.0, 2.0)])
    with pytest.raises(ValueError, match="are all 0"):
        mean_scores([one, measured(0.0, 0.0, 0.0)])
    with pytest.raises(ValueError, match="no contributions to take the mean of"):
        mean_scores([])
