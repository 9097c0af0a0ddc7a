"""The words by which messages ask for the base of an adapter: an argument in Python, a flag in the scripts."""

from __future__ import annotations

from dataclasses import dataclass

from .networks import is_function


@dataclass(frozen=True)
class Asking:
    """How whoever reads a message names the base.

    Attributes:
        way: The words before its name, such as "pass base=".
        forms: What the name can be.
        leave_out: The words for not naming it, so that the name in the adapter counts; "" if they would not help.
        instead: Sentence on an adapter of another network than the one at hand; "" for that of `way` and `leave_out`.
    """

    way: str
    forms: str
    leave_out: str = ""
    instead: str = ""

    def for_base(self) -> str:
        """The clause that asks for the base of an adapter that does not lead to it."""
        return f"{self.way.strip()}, the network that it was trained on ({self.forms})"

    def for_changed(self, name: str) -> str:
        """The sentence that asks for the base that the adapter calls `name`, where that has other weights by now."""
        return f"It calls that {name!r}, which has changed since: {self.way.strip()} with a copy from before."

    def for_other(self, name: str | None) -> str:
        """The sentence that asks for the base that the adapter calls `name`, in place of another."""
        if self.instead:
            return self.instead
        if not name:
            return f"{_capital(self.way.strip())}, the network that it was trained on."
        if self.leave_out and not is_function(name):
            return f"{_capital(self.leave_out)} or give {name!r}."
        return f"{_capital(self.way.strip())}, the one that it calls {name!r}."


BY_ARGUMENT = Asking("pass base=", "a folder, an id on the Hub, or the network itself")
BY_FLAG = Asking("give --model_name_or_path ", "a folder, an id on the Hub, or module:function")
BY_OTHER_FLAG = Asking(BY_FLAG.way, BY_FLAG.forms, leave_out="leave --model_name_or_path out")
"""The flag was given."""


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
