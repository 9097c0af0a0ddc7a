"""The sources of the repository as syntax trees: who imports what, public names, docstrings."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Source:
    """A Python file of the repository.

    Attributes:
        path: Path relative to the root of the repository.
        name: Name under which it is imported, `colora_peft.ranks.scores`; of a package, that of its `__init__`.
    """

    path: Path
    name: str

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def tree(self) -> ast.Module:
        return _parse(ROOT / self.path)

    @property
    def public_names(self) -> list[str]:
        """The entries of `__all__`, empty without one."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "__all__" for name in node.targets):
                return ast.literal_eval(node.value)
        return []


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name`, or `import module` with an empty name."""

    module: str
    name: str
    line: int


def sources(folder: str) -> list[Source]:
    """All Python files below a folder; those of `models` under the name by which they are installed."""
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        path = file.relative_to(ROOT)
        parts = [*path.parent.parts, *([] if path.stem == "__init__" else [path.stem])]
        prefix = ["colora_peft"] if folder == "models" else []
        found.append(Source(path, ".".join(prefix + parts)))
    return found


def imports(source: Source) -> Iterator[Import]:
    """All imports of a file, at any place in it, with relative ones made absolute."""
    parents = source.name.split(".") + ([""] if source.is_package else [])
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (Import(module, alias.name, node.lineno) for alias in node.names)


def docstrings(source: Source) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below constants and fields included."""
    for node in ast.walk(source.tree):
        for statement in getattr(node, "body", None) or [] if not isinstance(node, (ast.Lambda, ast.IfExp)) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                if isinstance(statement.value.value, str):
                    yield statement.lineno, statement.value.value
