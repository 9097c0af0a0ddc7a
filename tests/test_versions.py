"""Continuous integration: it tests both ends of the allowed versions, and a file that is skipped fails it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.skipped_files import FLAG

ROOT = Path(__file__).parents[1]
CI = (ROOT / ".ci" / "run").read_text()

FILES = {
    "all": "import pytest\npytestmark = pytest.mark.skip\ndef test(): pass\n",
    "module": "import pytest\npytest.importorskip('no_such_module')\ndef test(): pass\n",
    "some": "import pytest\n@pytest.mark.skip\ndef test(): pass\ndef test_that_runs(): pass\n",
    "slow": "import pytest\n@pytest.mark.skip\n@pytest.mark.slow\ndef test(): pass\ndef test_that_runs(): pass\n",
    "quick": "import pytest\n@pytest.mark.skip\ndef test(): pass\n@pytest.mark.slow\ndef test_slow(): pass\n",
    "failing": "import pytest\n@pytest.mark.xfail\ndef test(): assert False\n",
}


# --- skipped files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([FLAG, "-m", "not slow"], ["all", "module", "quick"]),
        ([FLAG, "-m", "slow"], ["module"]),
        (["-m", "not slow"], []),
    ],
    ids=["quick", "slow", "without"],
)
def test_a_file_that_is_skipped_whole_fails_the_run_and_is_named(flags, named, tmp_path):
    (tmp_path / "conftest.py").write_text("from support.skipped_files import *\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    for name, text in FILES.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    done = run_pytest(tmp_path, *flags)
    assert done.returncode == bool(named), done.stdout + done.stderr
    assert re.findall(r"^ERROR test_(\w+)\.py: all of its tests were skipped", done.stdout, re.MULTILINE) == named


def test_a_run_that_collects_nothing_else_fails(tmp_path):
    (tmp_path / "conftest.py").write_text("from support.skipped_files import *\n")
    (tmp_path / "test_module.py").write_text(FILES["module"])
    assert run_pytest(tmp_path, FLAG).returncode == pytest.ExitCode.TESTS_FAILED


def run_pytest(folder, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_run_of_continuous_integration_fails_on_skipped_files():
    runs = [line for line in CI.splitlines() if re.search(r"^((setsid )?taskset .* )?pytest\b", line)]
    assert len(runs) == 4 and all(FLAG in line for line in runs)


# --- versions -------------------------------------------------------------------------------------------------------


def allowed():
    """Bounds of pyproject.toml, by the name of the package."""
    # Python 3.10 has no tomllib.
    listed = re.findall(r'"([\w-]+>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    return {requirement.name: requirement.specifier for requirement in map(Requirement, listed)}


def pinned(end):
    """Versions that continuous integration installs at one end of what is allowed, by name."""
    lines = (ROOT / ".ci" / f"{end}.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement.specifier for requirement in requirements}


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_both_ends_are_installed_and_allowed(end):
    assert f"-r .ci/{end}.txt" in CI
    pins = pinned(end)
    assert {"peft", "transformers"} <= pins.keys()
    for name, specifier in pins.items():
        (pin,) = specifier
        assert pin.operator == "==" and allowed()[name].contains(pin.version), name


def test_the_oldest_versions_are_the_lower_bounds():
    pins = pinned("oldest")
    for name, specifier in pins.items():
        (lowest,) = (bound.version for bound in allowed()[name] if bound.operator == ">=")
        assert Version(next(iter(specifier)).version) == Version(lowest), name
