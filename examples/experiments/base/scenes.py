"""Checks that no test scene of any task is among the training photos.

    python -m examples.experiments.base.scenes --train_dir path/to/photos --tasks_dir path/to/tasks

Small grey copies of all images are compared, those of the training photos as they are and mirrored. Two images of
one scene correlate nearly perfectly, however they are scaled or compressed. The highest value of each task is printed.
An image that shows only a part of a training photo is not found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from colora_peft.images import list_images
from colora_peft.utils import flag, run_script, write_json

SIDE_PX = 32


@dataclass
class SceneArguments:
    """Flags of the check."""

    train_dir: str = flag(help="Folder of training photos, those in folders below it included.")
    tasks_dir: str = flag(help="Folder whose folders TASK/test hold input/ and target/.")
    highest_correlation: float = flag(0.95, "Correlation above which two images count as one scene, below 1.")
    output_file: str | None = flag(None, "JSON file for the highest value of each task.")


def thumbnail(path: Path) -> np.ndarray:
    """Small grey copy of an image as a vector of mean 0 and length 1; zeros where the image has one colour."""
    with Image.open(path) as image:
        small = image.convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    values = np.asarray(small, np.float32)
    values = values - values.mean()
    return (values / max(float(np.linalg.norm(values)), 1e-6)).ravel()


def thumbnails(paths: list[Path], description: str) -> np.ndarray:
    return np.stack([thumbnail(path) for path in tqdm(paths, desc=description, leave=False)])


def mirrored(vectors: np.ndarray) -> np.ndarray:
    return vectors.reshape(-1, SIDE_PX, SIDE_PX)[:, :, ::-1].reshape(len(vectors), -1)


def closest(train: np.ndarray, test: np.ndarray) -> tuple[float, int, int]:
    """Highest correlation between a training photo, mirrored or not, and a test image, and the numbers of both."""
    correlations = np.maximum(train @ test.T, mirrored(train) @ test.T)
    first, second = np.unravel_index(correlations.argmax(), correlations.shape)
    return float(correlations[first, second]), int(first), int(second)


def compare_tasks(args: SceneArguments) -> dict[str, dict[str, object]]:
    """The closest pair of images by task.

    Raises:
        ValueError: there is no task.
    """
    train_paths = list_images(args.train_dir, nested=True)
    train, rows = thumbnails(train_paths, "training photos"), {}
    for folder in sorted(Path(args.tasks_dir).glob("*/test")):
        paths = list_images(folder, nested=True)
        value, photo, image = closest(train, thumbnails(paths, folder.parent.name))
        rows[folder.parent.name] = {
            "correlation": round(value, 4),
            "training_photo": str(train_paths[photo].relative_to(args.train_dir)),
            "test_image": str(paths[image].relative_to(folder)),
            "test_images": len(paths),
        }
    if not rows:
        raise ValueError(f"{args.tasks_dir} has no folder TASK/test.")
    return rows


def main(args: SceneArguments) -> None:
    """Prints the table.

    Raises:
        ValueError: a test image is too close to a training photo.
    """
    rows = compare_tasks(args)
    for task, row in rows.items():
        print(f"{task:12} {row['correlation']:.3f}  {row['training_photo']}  {row['test_image']}")
    if args.output_file is not None:
        write_json(Path(args.output_file), rows)
    shared = {task: row for task, row in rows.items() if row["correlation"] > args.highest_correlation}
    if shared:
        raise ValueError(
            f"These tasks share a scene with the training photos: {', '.join(shared)}. Remove the photos."
        )


if __name__ == "__main__":
    run_script(main, SceneArguments)
