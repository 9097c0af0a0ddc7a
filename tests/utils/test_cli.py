"""A script ends with its code, or with one sentence on what its user can change."""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest

from colora_peft.utils import check_at_least, cli, flag, run_script


@dataclass
class Arguments:
    steps: int = flag(1, "Number of steps.")
    names: list[str] = flag(help="Names.", factory=lambda: ["a"])

    def __post_init__(self):
        check_at_least(self, "steps", 1)


def ending(monkeypatch, main, *flags, expected=()):
    monkeypatch.setattr("sys.argv", ["examples/script.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_script(main, Arguments, *expected)
    return end.value.code


def test_the_exit_code_is_that_of_the_work(monkeypatch):
    assert ending(monkeypatch, lambda args: args.steps, "--steps", "3") == 3
    assert ending(monkeypatch, lambda args: args.names == ["a"] and None) is None


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_work():
    """As with `> log.txt` on Windows, whose encoding knows few characters; and a name of bytes that are no text."""
    program = "import os\nfrom colora_peft.utils import run_script\nfrom dataclasses import make_dataclass\n"
    program += "run_script(lambda args: print('\u65e5.png', os.fsdecode(b'\\xff.png')), make_dataclass('A', []))"
    for encoding in ("cp1252", "ascii", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        shown = "\u65e5" if encoding == "utf-8" else r"\u65e5"
        assert done.stdout.decode().rstrip() == rf"{shown}.png \udcff.png"


def test_warnings_of_ours_are_their_sentence_and_others_have_their_place(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    ending(monkeypatch, lambda args: None)
    ours, other = (warnings.formatwarning("It rises.", UserWarning, file, 3) for file in (cli.__file__, "/a/b.py"))
    assert ours == "Warning: It rises.\n" and other == "/a/b.py:3: UserWarning: It rises.\n"


def test_errors_of_the_user_become_one_sentence(monkeypatch):
    assert ending(monkeypatch, print, "--steps", "0") == "script.py: --steps must be at least 1, got 0."

    def fail(args):
        raise LookupError("The loss diverged.")

    assert ending(monkeypatch, fail, expected=(LookupError,)) == "script.py: The loss diverged."
    with pytest.raises(LookupError):
        ending(monkeypatch, fail)
