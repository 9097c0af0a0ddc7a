"""Draw what PROD does to a photo of yours, to judge its ranges by eye.

python -m colora_peft.prod --photo path/to/clean/photo.jpg --output_file degradations.jpg
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from colora_peft.images import read_image

from .contact_sheet import draw_contact_sheet
from .random_order import RandomOrderDegradation


@dataclass
class SheetArguments:
    """Flags of the contact sheet."""

    photo: str = field(metadata={"help": "A clean photo; its middle is shown."})
    output_file: str = field(default="degradations.jpg", metadata={"help": "Where the sheet goes; .jpg or .png."})
    resolution: int = field(default=256, metadata={"help": "Side of the square that is shown, in pixels."})
    recipes: int = field(default=4, metadata={"help": "Random recipes below the single degradations."})
    seed: int = field(default=0, metadata={"help": "Of everything that is drawn at random."})


def main(args: SheetArguments) -> None:
    """Write the sheet.

    Raises:
        ValueError: if the photo is unreadable or smaller than the square, or the output's ending is no format's.
    """
    output_file = Path(args.output_file)
    if output_file.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"--output_file {output_file} must end in .jpg or .png.")
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
    output_file.parent.mkdir(parents=True, exist_ok=True)
    draw_contact_sheet(clean, recipes, args.seed).save(output_file, quality=85)
    print(f"wrote {output_file}")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(SheetArguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"colora_peft.prod: {error}")
