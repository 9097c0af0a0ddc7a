"""Small helpers that know nothing of images, networks or adapters.

Wording of messages, whole files, processes of a launch, threads, digests and command lines. Every other package may
import this one; it imports none of them.
"""

from .cli import check_at_least, check_seed, flag, print_any_name, run_script
from .digest import digest_of_bytes, digest_of_state, digest_of_weights
from .distributed import Processes, default_device, fill, whole
from .files import (
    PARTIAL,
    check_writable,
    relative_path,
    share_weights,
    write_bytes,
    write_json,
    write_text,
    writing_folder,
    writing_result,
)
from .names import NamePattern, folded, guess_patterns, guess_patterns_side_by_side, match_names, split_names
from .padding import pad_to_multiple, reflected_indices
from .text import some, some_sentences
from .threads import SharedSettings, alone_with, register_for_this_thread
from .wrappers import is_compiled, unwrapped

__all__ = [
    "NamePattern",
    "PARTIAL",
    "Processes",
    "SharedSettings",
    "alone_with",
    "check_at_least",
    "check_seed",
    "check_writable",
    "default_device",
    "digest_of_bytes",
    "digest_of_state",
    "digest_of_weights",
    "fill",
    "flag",
    "folded",
    "guess_patterns",
    "guess_patterns_side_by_side",
    "is_compiled",
    "match_names",
    "pad_to_multiple",
    "print_any_name",
    "reflected_indices",
    "register_for_this_thread",
    "relative_path",
    "run_script",
    "share_weights",
    "some",
    "some_sentences",
    "split_names",
    "unwrapped",
    "whole",
    "write_bytes",
    "write_json",
    "write_text",
    "writing_folder",
    "writing_result",
]
