"""The files of an adapter or a network, from a folder or from the Hub, and the words for failures.

Only JSON and safetensors are asked for, by fixed names: no pickle is fetched, no code, and no name that a repository
chose becomes a path here.
"""

from __future__ import annotations

import glob
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from colora_peft.utils import some

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NETWORK_FILES = ("config.json", "model.safetensors")

# What to do with files of the kind that was not asked for, in Python and in the scripts, some of which take one kind.
_INSTEAD = {
    ADAPTER_FILES: (
        "an adapter, not a whole network: load it by colora_peft.load, or give it to a script as --adapter or, to "
        "finetune.py, as --adapter_name_or_path"
    ),
    NETWORK_FILES: (
        "a whole network, not an adapter: load it by colora_peft.load, or give it to a script as --model_name_or_path"
    ),
}

# HTTPError is the root of the errors of the library below the client: requests, httpx or httpx2, by its version.
CLIENT_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)


@dataclass(frozen=True)
class Source:
    """Origin of an adapter or a network: a folder, or a repository on the Hub at a revision; and the folder inside."""

    name_or_path: str
    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.subfolder).parts
        if self.subfolder.startswith("/") or "\\" in self.subfolder or ".." in parts:
            raise ValueError(f"The subfolder {self.subfolder!r} leads out of {self.name_or_path}: name one inside.")

    def __str__(self) -> str:
        return self.name_or_path + (f"/{self.subfolder}" if self.subfolder else "")

    @property
    def prefix(self) -> str:
        """Beginning of the names of its files in a repository."""
        return f"{PurePosixPath(self.subfolder)}/" if self.subfolder else ""

    @property
    def is_folder(self) -> bool:
        return Path(self.name_or_path).is_dir()

    @property
    def is_hub_id(self) -> bool:
        """Whether it can be an id on the Hub and is not a folder."""
        try:
            validate_repo_id(self.name_or_path)
        except HFValidationError:
            return False
        return not self.is_folder


def fetch(source: Source, kinds: tuple[tuple[str, str], ...] = (ADAPTER_FILES, NETWORK_FILES)) -> Path:
    """The folder, on this machine, with the files of an adapter or else of a network.

    From the Hub it is a snapshot in the client's cache; what is there already is not fetched again. Where the Hub does
    not answer, the cached snapshot is used.

    Args:
        source: Where from.
        kinds: Pairs of configuration and weights that will do; the first whose configuration is there counts.

    Raises:
        OSError: There is no such folder or repository, access is refused, the Hub does not answer, or a download was
            cut short.
        ValueError: It holds none of the pairs, or one without its weights in safetensors; or an adapter where a
            network is wanted, or the other way round.

    Warns:
        UserWarning: The Hub does not answer and the cached snapshot is used.
    """
    if source.is_folder:
        folder = Path(source.name_or_path) / source.subfolder
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {source.subfolder!r} in {source.name_or_path}.")
        _choose(source, {path.name for path in folder.iterdir()}, kinds)
        return folder
    if not source.is_hub_id:
        raise FileNotFoundError(
            f"There is no folder {source.name_or_path}, nor can the Hub have a model of that name: check the name."
        )
    try:
        return _download(source, kinds)
    except OfflineModeIsEnabled as error:
        folder = _cached(source, kinds)
        if folder is None:
            raise FileNotFoundError(
                f"{source} is not in the cache of this machine and HF_HUB_OFFLINE is set: load it once while online."
            ) from error
        return folder
    except CLIENT_ERRORS as error:
        folder = _cached(source, kinds) if _is_unreachable(error) else None
        if folder is None:
            raise OSError(in_words(error, source)) from error
        warnings.warn(f"{in_words(error, source)} The copy in the cache is used.", stacklevel=3)
        return folder


def _download(source: Source, kinds: tuple[tuple[str, str], ...]) -> Path:
    """The snapshot's folder with both files of one commit, even where somebody pushes another meanwhile."""
    info = HfApi().model_info(
        source.name_or_path, revision=source.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT, token=source.token
    )
    siblings = [sibling.rfilename for sibling in info.siblings or []]
    inside = {name.removeprefix(source.prefix) for name in siblings if name.startswith(source.prefix)}
    names = _choose(source, inside, kinds)
    folder = _snapshot(source, names)
    if not _is_whole(folder, names):  # the client falls back to what it has where a later request fails
        raise OSError(f"{' or '.join(names)} did not arrive")
    return folder


def _is_whole(folder: Path, names: tuple[str, str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _snapshot(source: Source, names: tuple[str, str], is_offline: bool = False) -> Path:
    snapshot = snapshot_download(
        source.name_or_path,
        revision=source.revision,
        allow_patterns=[glob.escape(source.prefix + name) for name in names],
        local_files_only=is_offline,
        token=source.token,
    )
    return Path(snapshot) / source.subfolder


def _cached(source: Source, kinds: tuple[tuple[str, str], ...]) -> Path | None:
    """The folder of the newest snapshot known of that revision, if it holds all that is needed."""
    for names in kinds:
        try:
            folder = _snapshot(source, names, is_offline=True)
        except LocalEntryNotFoundError:
            return None
        if _is_whole(folder, names):
            return folder
    return None


def _choose(source: Source, names: set[str], kinds: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """The first of `kinds` that is among `names`.

    Raises:
        ValueError: None is, those of the other kind are, or its weights are missing or a pickle.
    """
    for config, weights in kinds:
        if config not in names:
            continue
        if weights in names:
            return config, weights
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
        if pickles:
            raise ValueError(
                f"{source} has its weights in {some(pickles, 3)} only, a pickle, which can run code when it is "
                f"opened. It is not opened: ask for {weights}."
            )
        raise ValueError(f"{source} has {config} but no {weights}: it is incomplete, ask who made it.")
    for other, remedy in _INSTEAD.items():
        if other[0] in names:
            raise ValueError(f"{source} is {remedy}.")
    if "run.json" in names and any(name.startswith("checkpoint-") for name in names):
        raise ValueError(
            f"{source} has the checkpoints of a run without its result: finish it by the same command and "
            "--resume_from_checkpoint latest."
        )
    wanted = " or ".join(config for config, _ in kinds)
    raise ValueError(f"{source} holds no {wanted}, so there is nothing to load: check the name and the subfolder.")


def _is_unreachable(error: Exception) -> bool:
    """Whether the Hub gave no answer, or reported an error of its own."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500


def in_words(error: Exception, source: Source) -> str:
    """One sentence on why the Hub did not give `source`, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"{source} is gated: ask for access on its page, then log in (`hf auth login` or HF_TOKEN)."
    if isinstance(error, RevisionNotFoundError):
        return f"{source} has no revision {source.revision!r}: check the name of the branch, tag or commit."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model {source.name_or_path} on the Hub, or it is private: check the name, or log in "
            "(`hf auth login` or HF_TOKEN)."
        )
    if status in (401, 403):
        return f"The Hub refused access to {source} ({status}): check your token and what it may do."
    if status is not None:
        return f"The Hub answered {status} when asked for {source}: try again later."
    return (
        f"{source} is no folder on this machine and could not be fetched from {constants.ENDPOINT} "
        f"({type(error).__name__}: {error}): check the name, or the connection and try again."
    )
