"""Who may import whom, and how little `import colora_peft` loads."""

import subprocess
import sys

import pytest
from support.sources import imports, sources

MAY_IMPORT = {
    "utils": "",
    "ranks": "utils",
    "contribution": "ranks utils",
    "tuner": "ranks utils",
    "images": "utils",
    "prod": "images utils",
    "data": "images prod utils",
    "inference": "utils",
    "export": "inference utils",
    "evaluation": "data images inference utils",
    "hub": "tuner utils",
    "training": "utils ranks contribution tuner data inference evaluation hub",
    "restore": "hub tuner inference images evaluation utils",
    "models": "utils",
    "": "tuner ranks contribution inference hub",
}
"""For each package of colora_peft ("" is its own `__init__`), the packages that it may import.

Nothing imports `training` and `restore`: they serve scripts. The method and the backbones do not import each other.
"""

SCRIPTS_MAY_IMPORT = {"tasks": "finetune"}
"""Exceptions to the rule that no user script imports another."""

LIBRARY = sources("colora_peft") + sources("models")
SCRIPTS = [source for source in sources("examples") if len(source.path.parts) == 2]
PUBLIC = {source.name: set(source.public_names) for source in LIBRARY if source.is_package}
MODULES = {source.name for source in LIBRARY}


def unit(module: str) -> str:
    """The package of colora_peft that a module belongs to: `ranks` for `colora_peft.ranks.scores`."""
    return module.split(".")[1] if "." in module else ""


def own_imports(source):
    return [found for found in imports(source) if found.module.split(".")[0] == "colora_peft"]


def complaint(source, found, reason):
    statement = f"from {found.module} import {found.name}" if found.name else f"import {found.module}"
    return f"{source.path}:{found.line}: {statement}: {reason}"


def across_packages(found):
    """Complaint about an import of another package than one's own: '' if nothing is wrong."""
    if found.module not in PUBLIC and found.module != "colora_peft.export":
        return "import the package, not a module of it"
    if found.module in PUBLIC and found.name and found.name not in PUBLIC[found.module]:
        return "not in the package's __all__"
    return ""


def test_the_table_names_every_package():
    assert {unit(name) for name in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_in_one_direction(package):
    """Across packages public names of the package are imported; inside one, names of its modules."""
    wrong = []
    for source in (source for source in LIBRARY if unit(source.name) == package):
        for found in own_imports(source):
            other = unit(found.module)
            if other == package:
                is_module = found.module in MODULES and not (found.module in PUBLIC and found.module.count(".") <= 1)
                reason = "" if is_module else "inside a package import the module"
            elif other not in MAY_IMPORT[package].split():
                reason = f"{package or 'colora_peft'} may import {MAY_IMPORT[package] or 'nothing'}"
            else:
                reason = across_packages(found)
            if reason:
                wrong.append(complaint(source, found, reason))
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_examples_or_bare_models():
    foreign = ("examples", "models", "tests")
    wrong = [
        complaint(source, found, "not installed")
        for source in LIBRARY
        for found in imports(source)
        if found.module.split(".")[0] in foreign
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", SCRIPTS, ids=lambda source: source.path.stem)
def test_user_scripts_import_public_names_and_no_other_script(source):
    wrong = [complaint(source, found, reason) for found in own_imports(source) if (reason := across_packages(found))]
    scripts = {script.path.stem for script in SCRIPTS} | {"examples"}
    scripts -= set(SCRIPTS_MAY_IMPORT.get(source.path.stem, "").split())
    wrong += [
        complaint(source, found, "another script")
        for found in imports(source)
        if found.module.split(".")[0] in scripts
    ]
    assert not wrong, "\n".join(wrong)


def test_test_modules_share_only_what_lies_in_support():
    wrong = [
        complaint(source, found, "move what is shared to tests/support")
        for source in sources("tests")
        for found in imports(source)
        if found.module.split(".")[-1].startswith("test_")
    ]
    assert not wrong, "\n".join(wrong)


def test_import_of_colora_peft_is_light():
    """PIL is loaded by transformers before us, so our own packages stand for it."""
    heavy = {"cv2", "matplotlib", "datasets", "tensorboard", "gradio", "onnx", "onnxruntime", "deepspeed"}
    heavy |= {f"colora_peft.{name}" for name in ("images", "data", "prod", "evaluation", "training", "restore")}
    heavy |= {"colora_peft.models", "colora_peft.export"}
    code = "import sys, colora_peft; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "colora_peft.tuner" in loaded and not heavy & loaded
