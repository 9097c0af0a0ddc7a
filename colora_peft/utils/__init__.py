"""Small helpers that know nothing of images, networks or adapters.

Wording of messages, whole files, processes of a launch, digests and command lines. Every other package may import this
one; it imports none of them.
"""

from .cli import check_at_least, check_seed, flag, run_script
from .digest import digest_of_bytes, digest_of_state, digest_of_weights
from .distributed import Processes, fill, whole
from .files import (
    PARTIAL,
    relative_path,
    share_weights,
    write_bytes,
    write_json,
    write_text,
    writing_folder,
    writing_result,
)
from .text import some, some_sentences

__all__ = [
    "PARTIAL",
    "Processes",
    "check_at_least",
    "check_seed",
    "digest_of_bytes",
    "digest_of_state",
    "digest_of_weights",
    "fill",
    "flag",
    "relative_path",
    "run_script",
    "share_weights",
    "some",
    "some_sentences",
    "whole",
    "write_bytes",
    "write_json",
    "write_text",
    "writing_folder",
    "writing_result",
]
