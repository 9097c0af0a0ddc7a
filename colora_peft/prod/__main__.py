"""Draws what PROD does to a photo of yours, to judge its ranges by eye.

python -m colora_peft.prod --photo path/to/clean/photo.jpg --output_file degradations.jpg
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from colora_peft.images import read_image, save_sheet
from colora_peft.utils import flag, run_script

from .contact_sheet import draw_contact_sheet
from .random_order import RandomOrderDegradation


@dataclass
class SheetArguments:
    """Flags of the contact sheet."""

    photo: str = flag(help="Path to a clean photo; its middle is shown.")
    output_file: str = flag("degradations.jpg", "File of the sheet, .jpg or .png.")
    resolution: int = flag(256, "Side of the square that is shown, in pixels.")
    recipes: int = flag(4, "Number of random recipes below the single degradations.")
    seed: int = flag(0, "Seed of everything that is drawn at random.")


def main(args: SheetArguments) -> None:
    """Writes the sheet.

    Raises:
        ValueError: The photo is unreadable or smaller than the square, or the output has another ending.
    """
    image = read_image(args.photo)
    height, width = image.shape[1:]
    if not 1 <= args.resolution <= min(height, width):
        raise ValueError(
            f"{args.photo} is {width}x{height} pixels; choose a --resolution between 1 and {min(height, width)}."
        )
    top, left = (height - args.resolution) // 2, (width - args.resolution) // 2
    clean = image[:, top : top + args.resolution, left : left + args.resolution].contiguous()
    generator = torch.Generator().manual_seed(args.seed)
    recipes = [RandomOrderDegradation().draw(generator) for _ in range(args.recipes)]
    save_sheet(draw_contact_sheet(clean, recipes, seed=args.seed), args.output_file)
    print(f"wrote {args.output_file}")


if __name__ == "__main__":
    sys.argv[0] = "colora_peft.prod"  # the name in messages
    run_script(main, SheetArguments)
