"""Restores images with a network and adapters.

    python examples/restore.py --input photo.jpg folder "more/**/*.tif" --adapter outputs/finetune

The same program is installed as `colora-restore`, which knows no network but those that the flags name.

Folders are searched with all below them. Results are files of the same kind under the same names in --output_dir, with
EXIF, colour profile, transparency and 16 bits kept where the format holds them (colora_peft/images/image_file.py says
what else is decided). A run that was interrupted goes on where it was: results that are there are kept.

Several adapters, with the bare network ("none") beside them, side by side and measured against targets:

    python examples/restore.py --input test/input --targets test/target --adapter none outputs/a outputs/b --compare

The exit code is 1 if an image failed; the others are written all the same.
"""

from __future__ import annotations

from pathlib import Path

from colora_peft.restore import RestoreArguments, restore_images
from colora_peft.utils import run_script

SHIPPED_NETWORK = str(Path(__file__).resolve().parent / "checkpoints" / "nafnet-small-prod")


def main(args: RestoreArguments) -> int:
    """Restores all images and returns the exit code."""
    return restore_images(args, SHIPPED_NETWORK)


if __name__ == "__main__":
    run_script(main, RestoreArguments, words="input")
