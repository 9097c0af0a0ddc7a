"""Tables of learning rates: those tried for each task, and what one for all tasks would lose."""

from __future__ import annotations

from statistics import mean

from examples.experiments.grid.cells import Cell
from examples.experiments.methods.plan import label_of
from examples.experiments.tables import markdown_table

RATES = "PSNR on the held-out training pairs, the best bold. Rates without a value were not tried."
ONE_RATE = """PSNR at one learning rate for all tasks minus PSNR at the best rate of each task, mean over the tasks;
the smallest loss is bold. Rates that some task was not run at, or failed at, are left out. *chosen on the others*
takes for each task the rate that is best on the mean of all others. The pairs are those held out of the training
folder. One seed chooses the best of each task, partly by luck."""


def rates_table(tuning: list[Cell]) -> str:
    """Markdown: PSNR on the held-out training pairs by learning rate; the best of each row is bold."""
    rates, groups = sorted({cell["learning_rate"] for cell in tuning}), {}
    for cell in tuning:
        name = f"{cell['task']}, {cell['train_pairs']} pairs, {label_of(cell)}"
        groups.setdefault(name, {})[cell["learning_rate"]] = cell.get("psnr", float("-inf"))
    rows = []
    for name, psnr in groups.items():
        shown = {rate: f"{value:.2f}" if value > 0 else "failed" for rate, value in psnr.items()}
        best = max(psnr, key=psnr.__getitem__)
        shown[best] = f"**{shown[best]}**"
        rows.append([name, *(shown.get(rate, "") for rate in rates)])
    return markdown_table(["dB at learning rate", *(f"{rate:g}" for rate in rates)], rows)


def one_rate_table(tuning: list[Cell]) -> str:
    """Markdown: what one learning rate for all tasks loses to the best of each, on the held-out training pairs.

    "chosen on the others" is the loss on a task at the rate that is best on the mean of all others, mean over the
    tasks: what a user loses who takes a rate from somebody else's tasks. Ways to tune of fewer than three tasks are
    left out, and so are learning rates that not all tasks have. Empty if nothing is left.
    """
    ways: dict[str, dict[str, dict[float, float]]] = {}
    for cell in tuning:
        if "psnr" in cell:
            tasks = ways.setdefault(label_of(cell), {})
            tasks.setdefault(cell["task"], {})[cell["learning_rate"]] = cell["psnr"]
    rates, rows = sorted({cell["learning_rate"] for cell in tuning}), []
    for name, tasks in ways.items():
        common = sorted(set.intersection(*map(set, tasks.values())))
        if len(tasks) < 3 or len(common) < 2:
            continue
        losses = {
            task: {rate: psnr[rate] - max(psnr[other] for other in common) for rate in common}
            for task, psnr in tasks.items()
        }
        by_rate = {rate: mean(own[rate] for own in losses.values()) for rate in common}
        shown = {rate: f"{value:.2f}" for rate, value in by_rate.items()}
        best = max(by_rate, key=by_rate.__getitem__)
        shown[best] = f"**{shown[best]}**"
        elsewhere = mean(losses[task][best_rate_without(losses, task)] for task in losses)
        rows.append([f"{name} ({len(tasks)} tasks)", *(shown.get(rate, "") for rate in rates), f"{elsewhere:.2f}"])
    return markdown_table(["dB", *(f"{rate:g}" for rate in rates), "chosen on the others"], rows) if rows else ""


def best_rate_without(losses: dict[str, dict[float, float]], task: str) -> float:
    """The learning rate that loses least on the mean of all tasks but one."""
    others = [own for name, own in losses.items() if name != task]
    return max(others[0], key=lambda rate: mean(own[rate] for own in others))
