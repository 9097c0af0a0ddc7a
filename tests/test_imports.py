"""The method and the backbones know nothing of each other, and nothing of the examples."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(file: Path, package: str) -> set[str]:
    """Full names of all modules that a file imports, at any place in it; `package` is the one that it lies in."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "colora_peft").rglob("*.py")), ids=lambda path: path.stem)
def test_the_method_imports_no_backbone(file):
    package = ".".join(file.parent.relative_to(ROOT).parts)
    assert not [
        name for name in imported(file, package) if name.startswith(("colora_peft.models", "models", "examples"))
    ]


@pytest.mark.parametrize("file", sorted((ROOT / "models").rglob("*.py")), ids=lambda path: path.stem)
def test_backbones_import_nothing_of_the_method(file):
    package = ".".join(["colora_peft", *file.parent.relative_to(ROOT).parts])
    own = [name for name in imported(file, package) if name.startswith("colora_peft.")]
    assert all(name.startswith("colora_peft.models") for name in own), own
