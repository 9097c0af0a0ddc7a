"""Names of files that belong together, told by patterns such as `{}_noisy` and `{}_clean`.

A pattern describes a whole name without its suffix. `{}` stands for text that both names of a pair share, `*` for text
that does not count, and all else for itself. With several `{}` the first takes as much as it can, and the texts of
both names must be the same in order.

Names belong together by upper and lower case and by Unicode form, too (é as one character from Linux, as two from a
Mac), but only where no name fits to the letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

from .text import some

Key = tuple[str, ...]

_GUESSED_FROM = 3  # names of inputs
_LOOKED_THROUGH = 1_000  # names of targets
_WORD = re.compile(r"\d+|[^\W\d_]+|[\W_]+")
_TARGET_WORDS = frozenset("clean gt target sharp hr reference ref truth groundtruth original orig".split())


def folded(text: str) -> str:
    """The text without its case and in one Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


class NamePattern:
    """Pattern of names.

    Args:
        text: The pattern.
        flag: Name of its flag.

    Raises:
        ValueError: It has no `{}`.
    """

    def __init__(self, text: str, flag: str) -> None:
        self.text = text
        self.is_of_many = "*" in text
        self.fields = text.count("{}")
        self.literals = len(text.replace("{}", "").replace("*", ""))
        if not self.fields:
            raise ValueError(f"{flag} {text} has no {{}}, which stands for what both names of a pair share.")
        self._exact, self._folded = _compiled(text), _compiled(folded(text))

    def exact_key(self, name: str) -> Key | None:
        """The texts of `{}` in a name that fits to the letter; None of another name."""
        match = self._exact.fullmatch(name)
        return match and match.groups()

    def folded_key(self, name: str) -> Key | None:
        """The same without case and Unicode form."""
        match = self._folded.fullmatch(folded(name))
        return match and match.groups()


def _compiled(text: str) -> re.Pattern[str]:
    kinds = {"{}": "(.+)", "*": ".*"}
    return re.compile("".join(kinds.get(part, re.escape(part)) for part in re.split(r"(\{\}|\*)", text)), re.DOTALL)


def match_names(
    inputs: Sequence[str], targets: Sequence[str], of_inputs: NamePattern, of_targets: NamePattern
) -> dict[str, str]:
    """The target of each input that has one.

    A target has several inputs only where the pattern of inputs has a `*`.

    Raises:
        ValueError: Several names fit where one must, or the patterns have different numbers of `{}`.
    """
    if of_inputs.fields != of_targets.fields:
        raise ValueError(f"The patterns {of_inputs.text} and {of_targets.text} need as many {{}} as each other.")
    partners: dict[str, str] = {}
    for key_of_input, key_of_target in (
        (of_inputs.exact_key, of_targets.exact_key),
        (of_inputs.folded_key, of_targets.folded_key),
    ):
        taken = set() if of_inputs.is_of_many else set(partners.values())
        by_key = _grouped((name for name in targets if name not in taken), key_of_target)
        left = _grouped((name for name in inputs if name not in partners), key_of_input)
        for key in left.keys() & by_key.keys():
            if len(by_key[key]) > 1:
                raise ValueError(f"{left[key][0]} fits several targets: {some(by_key[key])}; keep one.")
            if len(left[key]) > 1 and not of_inputs.is_of_many:
                raise ValueError(f"{by_key[key][0]} fits several inputs: {some(left[key])}; keep one.")
            partners.update(dict.fromkeys(left[key], by_key[key][0]))
    return partners


def _grouped(names: Iterable[str], key_of: Callable[[str], Key | None]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for name in names:
        if (key := key_of(name)) is not None:
            groups.setdefault(key, []).append(name)
    return groups


def split_names(
    names: Iterable[str], of_inputs: NamePattern, of_targets: NamePattern
) -> tuple[list[str], list[str], list[str]]:
    """Inputs, targets, and what is neither, of names that lie side by side.

    A name that fits both patterns belongs to the one with more letters of its own.

    Raises:
        ValueError: Names fit both, and neither pattern has more.
    """
    sides: tuple[list[str], list[str], list[str]] = ([], [], [])
    for name in names:
        fits = [pattern.folded_key(name) is not None for pattern in (of_inputs, of_targets)]
        if all(fits) and of_inputs.literals == of_targets.literals:
            raise ValueError(
                f"{name} fits both patterns, {of_inputs.text} and {of_targets.text}: make one of them more exact."
            )
        if all(fits):
            fits = [of_inputs.literals > of_targets.literals, of_targets.literals > of_inputs.literals]
        sides[fits.index(True) if any(fits) else 2].append(name)
    return sides


# ------------------------------------------------------------------------------------------------------------ guesses


def guess_patterns(inputs: Sequence[str], targets: Sequence[str]) -> tuple[str, str] | None:
    """Patterns by which most of the inputs, at least half, would have a target, found on a few of them; or None."""
    best, most = None, (len(inputs) - 1) // 2
    for name in sorted(inputs)[:_GUESSED_FROM] if targets else ():
        (nearest,) = get_close_matches(name, sorted(targets)[:_LOOKED_THROUGH], n=1, cutoff=0)
        for many in (False, True):
            patterns = _patterns_of(name, nearest, many)
            try:
                found = len(match_names(inputs, targets, *(NamePattern(text, "") for text in patterns)))
            except ValueError:
                continue
            if found > most:
                best, most = patterns, found
    return best


def guess_patterns_side_by_side(names: Sequence[str]) -> tuple[str, str] | None:
    """The same of names that lie in one folder, some of which have a word such as `clean`."""
    targets = [name for name in names if _TARGET_WORDS & set(_WORD.findall(folded(name)))]
    return guess_patterns([name for name in names if name not in targets], targets)


def _patterns_of(name: str, target: str, many: bool) -> tuple[str, str]:
    """Patterns that fit two names: `{}` for the words that they share, and, for many inputs, `*` for the others."""
    sides = _WORD.findall(name), _WORD.findall(target)
    patterns = ["", ""]
    for kind, *spans in SequenceMatcher(None, *([folded(word) for word in side] for side in sides)).get_opcodes():
        texts = [side[start:end] for side, start, end in zip(sides, spans[::2], spans[1::2], strict=True)]
        ends = [end == len(side) for side, end in zip(sides, spans[1::2], strict=True)]
        if kind == "equal":
            before = texts[0][0] if any(patterns) and not texts[0][0].isalnum() else ""
            after = texts[0][-1] if not all(ends) and not texts[0][-1].isalnum() else ""
            shared = len(texts[0]) > bool(before) + bool(after)
            text = f"{before}{{}}{after}" if shared else "".join(texts[0])
            patterns = [pattern + text for pattern in patterns]
        else:
            if many and texts[0]:
                texts[0] = [*([] if texts[0][0].isalnum() else texts[0][:1]), "*"]
            patterns = [pattern + "".join(text) for pattern, text in zip(patterns, texts, strict=True)]
    return patterns[0], patterns[1]
