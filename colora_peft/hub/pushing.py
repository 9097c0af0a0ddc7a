"""Sharing the result of a run on the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from .source import ADAPTER_FILES, CLIENT_ERRORS, NETWORK_FILES, Source, in_words

# Files that a training run leaves for others; the images that its card shows are pushed, too.
_ABOUT_IT = ("preprocessor_config.json", "README.md", "metrics.json", "contributions.json")
RESULT_FILES = (*ADAPTER_FILES, *NETWORK_FILES, *_ABOUT_IT)

_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def create_hub_repo(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Makes the repository to push to, unless it is there, and returns its full id.

    Called before a training, it shows that pushing will be allowed.

    Raises:
        OSError: The Hub refuses, or does not answer.
        ValueError: It is to be private but is there and public; or the id is none.
    """
    api, source = HfApi(token=token), Source(repo_id)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_private = api.model_info(repo_id).private if private else None
    except CLIENT_ERRORS as error:
        raise OSError(f"Cannot push to {repo_id}. {in_words(error, source)}") from error
    if private and not is_private:
        raise ValueError(
            f"The repository {repo_id} is there and public: make it private on its page, or name another."
        )
    return repo_id


def push_folder(
    folder: str | Path, repo_id: str, *, token: str | bool | None = None, message: str = "Upload with colora_peft"
) -> str:
    """Pushes the result of a run in one commit: `RESULT_FILES`, and the images that its card shows.

    Args:
        folder: Output folder of `finetune.py` or `pretrain.py`; checkpoints and logs in it stay here.
        repo_id: A repository that is there (`create_hub_repo`).
        token: Default: the one that `hf auth login` has stored.
        message: Message of the commit.

    Returns:
        The hash of the commit.

    Raises:
        OSError: The Hub refuses, or does not answer; nothing was pushed.
        ValueError: There is no result in the folder, or an image of the card is missing.
    """
    files = _files_to_push(Path(folder))
    try:
        commit = HfApi(token=token).upload_folder(
            folder_path=folder, repo_id=repo_id, allow_patterns=list(files), commit_message=message
        )
    except CLIENT_ERRORS as error:
        raise OSError(f"The result in {folder} was not pushed. {in_words(error, Source(repo_id))}") from error
    return commit.oid


def _files_to_push(folder: Path) -> Sequence[str]:
    """Names of the files that `push_folder` pushes.

    Raises:
        ValueError: There is no result in the folder, or an image of the card is missing.
    """
    names = [name for name in RESULT_FILES if (folder / name).is_file()]
    if not any(weights in names for weights in (ADAPTER_FILES[1], NETWORK_FILES[1])):
        raise ValueError(f"There is no adapter and no network in {folder}: push the output folder of a finished run.")
    card = (folder / "README.md").read_text(encoding="utf-8") if "README.md" in names else ""
    for image in dict.fromkeys(_IMAGE.findall(card)):
        if "://" in image:
            continue
        path = (folder / image).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise ValueError(f"The card in {folder} shows {image}, which is not in there: remove it from README.md.")
        names.append(image)
    return names
