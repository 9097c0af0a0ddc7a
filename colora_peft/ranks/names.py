"""Names of layers that users write, and the message on one that the network does not have."""

import difflib
from collections.abc import Iterable


def check_known_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Checks that every name in `given`, which messages call `what`, is in `known`.

    Raises:
        ValueError: A name is not; the message has up to three close matches.
    """
    known = dict.fromkeys(known)
    for name in given:
        if name not in known:
            raise ValueError(
                f"The name {name!r} in `{what}` is not that of a layer that can be adapted here "
                f"({names_hint(name, known)})."
            )


def check_same_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Checks that `given`, which messages call `what`, names every layer of `known` and no other.

    Raises:
        ValueError: A name is unknown or missing; the message names the first.
    """
    given, known = dict.fromkeys(given), dict.fromkeys(known)
    check_known_names(given, known, what)
    missing = [name for name in known if name not in given]
    if missing:
        raise ValueError(
            f"The targeted layer {missing[0]!r} is missing from `{what}` ({len(missing)} of {len(known)} are): "
            "add it, or exclude it with `exclude_modules`."
        )


def names_hint(name: str, known: Iterable[str]) -> str:
    """Returns up to three close matches of `name` as a question, or where to find the names."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "use the names of model.named_modules()"
