"""The table of CoLoRA as finetune.py has it without a flag, beside others at their own best rate."""

from __future__ import annotations

from statistics import mean

from examples.experiments.grid.results import Results
from examples.experiments.methods.plan import COLORA_DEFAULT, FULL_CHECKERBOARD, PEFT_LORA, PEFT_LORA_CHECKERBOARD
from examples.experiments.tables import markdown_table

Way = tuple[str, str, float | None]
"""Network, method and parameter budget."""


def default_table(
    results: Results, ssim: Results, inputs: dict[str, tuple[float, float]], tasks: list[str], pairs: int
) -> str:
    """Markdown: PSNR of each task, its mean and mean SSIM: of full tuning, PEFT's LoRA and CoLoRA at each budget.

    PEFT's LoRA has the largest of these budgets. Tasks are left out that one of these ways lacks, or has with other
    seeds; empty if none is left. Full tuning and PEFT's LoRA with the loss of CoLoRA, and the decoder or the biases
    alone, have a line each where they have all tasks that are left.

    Args:
        results: PSNR of all ways.
        ssim: The same keys with SSIM.
        inputs: PSNR and SSIM of the inputs of each task.
        tasks: Tasks in the order of the columns.
        pairs: Number of training pairs.
    """
    needed, others, defaults = ways_of(results)
    seeds = {key: frozenset(result.psnr) for key, result in results.items()}

    def alike(task: str, *ways: Way) -> bool:
        own = {seeds.get((task, pairs, *way)) for way in ways}
        return len(own) == 1 and None not in own

    complete = [task for task in tasks if defaults and alike(task, *needed.values(), *defaults.values())]
    if not complete:
        return ""
    first = next(iter(defaults.values()))
    shown = {name: way for name, way in others.items() if all(alike(task, way, first) for task in complete)}
    rows = {"input": [inputs[task] for task in complete]}
    for name, way in (needed | shown | defaults).items():
        keys = [(task, pairs, *way) for task in complete]
        rows[name] = [(mean(results[key].psnr.values()), mean(ssim[key].psnr.values())) for key in keys]
    lines = []
    for name, values in rows.items():
        decibels, similarities = zip(*values, strict=True)
        lines.append([name, *(f"{value:.2f}" for value in (*decibels, mean(decibels))), f"{mean(similarities):.3f}"])
    return markdown_table(["", *complete, "mean", "mean SSIM"], lines)


def ways_of(results: Results) -> tuple[dict[str, Way], dict[str, Way], dict[str, Way]]:
    """By name: full tuning and PEFT's LoRA; ways that may be missing; CoLoRA at each budget, the largest first.

    All empty without CoLoRA.
    """
    networks = [key[2] for key in results if key[3] == COLORA_DEFAULT]
    if not networks:
        return {}, {}, {}
    network = networks[0]
    defaults = sorted({key[2:] for key in results if key[2:4] == (network, COLORA_DEFAULT)}, key=lambda way: -way[2])
    largest = defaults[0][2]
    return (
        {"full fine-tuning": (network, "full", None), "PEFT's LoRA": (network, PEFT_LORA, largest)},
        {
            "full fine-tuning, loss of CoLoRA": (network, FULL_CHECKERBOARD, None),
            "PEFT's LoRA, loss of CoLoRA": (network, PEFT_LORA_CHECKERBOARD, largest),
            "decoder alone": (network, "decoder", None),
            "biases alone": (network, "bias", None),
        },
        {f"CoLoRA, {100 * way[2]:g}% budget": way for way in defaults},
    )
