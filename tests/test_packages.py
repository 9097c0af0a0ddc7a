"""The packages as a whole: what is installed, what they say of themselves, how docstrings begin."""

import ast
import importlib
import re
from importlib.metadata import entry_points

import pytest
from support.sources import ROOT, docstrings, sources

PACKAGES = [source for source in sources("colora_peft") + sources("models") if source.is_package]
FILES = sources("colora_peft") + sources("models") + sources("examples")
TESTS = sources("tests")


def test_every_folder_with_an_init_is_installed():
    # Python 3.10 has no tomllib; the list is also one of Python.
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert sorted(ast.literal_eval(listed[1])) == sorted(source.name for source in PACKAGES)


def test_backbones_register_under_the_group_that_other_packages_use():
    """Packages outside this repository name the group, so it must not change."""
    found = {entry_point.value for entry_point in entry_points(group="colora_peft.backbones")}
    assert "colora_peft.models" in found


@pytest.mark.parametrize("source", PACKAGES, ids=lambda source: source.name)
def test_packages_say_what_they_are_and_what_is_public(source):
    package = importlib.import_module(source.name)
    assert package.__doc__ and package.__doc__.strip()
    assert source.public_names and len(set(source.public_names)) == len(source.public_names)
    assert not [name for name in source.public_names if not hasattr(package, name)]


IMPERATIVE = (
    "Adapt|Add|Allocate|Begin|Blend|Blur|Build|Check|Choose|Clip|Compare|Compute|Convert|Convolve|Copy|Count|Create|"
    "Delete|Download|Draw|Drop|Estimate|Evaluate|Fill|Find|Forget|Get|Give|Go|Have|Import|Judge|Keep|Kill|Let|Load|"
    "Make|Measure|Merge|Move|Open|Overwrite|Plot|Pre-train|Print|Push|Put|Raise|Read|Refuse|Register|Remove|Replace|"
    "Restore|Return|Run|Save|Say|Send|Set|Show|Skip|Split|Start|Step|Stop|Store|Take|Train|Unwrap|Update|Upload|Use|"
    "Wait|Write"
)
"""Verbs that a docstring must have in the third person."""
NOUNS = ("Step from", "Step to")
"""Beginnings in which such a word is a noun."""


def test_docstrings_begin_with_a_verb_or_the_thing():
    wrong = [
        f"{source.path}:{line}: {text.splitlines()[0]}"
        for source in FILES + TESTS
        for line, text in docstrings(source)
        if re.match(rf"(Of|What|Around|That|{IMPERATIVE})\b", text) and not text.startswith(NOUNS)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_message_advises_a_package_that_no_index_has():
    advice = re.compile(r"pip install (-\S+ )*[\"']?colora-peft")
    assert advice.search("`pip install -U colora-peft`") and advice.search('pip install "colora-peft[demo]"')
    pages = [path for path in ROOT.rglob("*.md") if not {".git", "outputs"} & set(path.relative_to(ROOT).parts)]
    assert pages
    files = [*pages, *(ROOT / source.path for source in FILES)]
    assert not [path for path in files if advice.search(path.read_text(encoding="utf-8"))]
