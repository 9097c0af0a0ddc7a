"""Wording that error messages share."""

from collections.abc import Sequence


def some(names: Sequence[str], limit: int = 20) -> str:
    """The first `limit` names, separated by commas, and how many more there are; "none" where there is none."""
    if not names:
        return "none"
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def some_sentences(sentences: Sequence[str], limit: int = 20) -> str:
    """The first `limit` sentences, and one that says how many more there are."""
    more = [f"There are {len(sentences) - limit} more."] if len(sentences) > limit else []
    return " ".join([*sentences[:limit], *more])
