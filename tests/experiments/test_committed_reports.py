"""Every committed report is what its program makes of the committed cells."""

import json
import re
import shutil

import pytest
from support.examples import EXAMPLES

from examples.experiments.base import adapt, evaluate
from examples.experiments.checkerboard import run as checkerboard
from examples.experiments.contributions import report as contributions
from examples.experiments.methods import report as methods
from examples.experiments.methods.steps import steps_table
from examples.experiments.prod_speed import run as prod_speed
from examples.experiments.restormer import run as restormer
from examples.experiments.scaling import run as scaling
from examples.experiments.speed import run as speed
from examples.experiments.start import report as start
from examples.experiments.tiles import run as tiles

EXPERIMENTS = EXAMPLES / "experiments"
PROGRAMS = {"speed": speed, "prod_speed": prod_speed, "restormer": restormer, "tiles": tiles}
MEASURED = [
    path for folder in PROGRAMS for path in sorted((EXPERIMENTS / folder).glob("*.json")) if "memory" not in path.name
]
GRIDS = [
    *sorted(path.parent for path in (EXPERIMENTS / "methods").glob("*/cells.json")),
    EXPERIMENTS / "contributions",
]


def test_every_program_has_committed_cells():
    assert {path.parent.name for path in MEASURED} == set(PROGRAMS) and len(GRIDS) > 1


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_measurement_gives_its_report(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == PROGRAMS[path.parent.name].report(results)


@pytest.mark.parametrize(("name", "program"), [("base", evaluate), ("adapt", adapt)])
def test_the_figures_of_the_networks_give_their_page_and_the_tables_of_the_readme(name, program):
    folder = EXPERIMENTS / "base"
    page = program.report(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    assert (folder / f"{name}.md").read_text(encoding="utf-8") == page
    assert page.partition("\n\n")[2] in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", GRIDS, ids=lambda folder: folder.name)
def test_the_cells_of_a_tuned_grid_give_its_report(folder, tmp_path):
    again = shutil.copytree(folder, tmp_path / "again")
    (contributions if folder.name == "contributions" else methods).write_report(again)
    assert (again / "report.md").read_text(encoding="utf-8") == (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "program"),
    [("scaling", scaling), ("start", start), ("start/places", start), ("checkerboard", checkerboard)],
)
def test_the_cells_of_a_comparison_give_its_report(name, program):
    cells = json.loads((EXPERIMENTS / name / "cells.json").read_text(encoding="utf-8"))
    assert (EXPERIMENTS / name / "report.md").read_text(encoding="utf-8") == program.report(cells)


def test_the_page_of_results_has_the_means_of_the_ways_to_begin():
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    means = (EXPERIMENTS / "start" / "report.md").read_text(encoding="utf-8").split("learning rate:\n\n")[1]
    assert means in page
    places = (
        (EXPERIMENTS / "start" / "places" / "report.md").read_text(encoding="utf-8").split("learning rate:\n\n")[1]
    )
    # one column of the two: the other rate is of two draws
    rows = [line.split(" | ")[:2] for line in places.splitlines() if "|  |" in line and "±" in line]
    assert len(rows) == 4 and all(" | ".join(row) + " |\n" in page for row in rows)


def test_the_table_of_the_grid_on_smooth_areas_is_that_of_the_report():
    report = (EXPERIMENTS / "checkerboard" / "report.md").read_text(encoding="utf-8")
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    _, gain_psnr, _, gain_ssim, *grids = re.findall(r"\n\| (?:0|5) \|(.*)", report)
    for title, row in (
        ("grid at weight 0, RMS in grey levels", grids[0]),
        ("grid at weight 5", grids[1]),
        ("SSIM at 5 minus SSIM at 0", gain_ssim),
        ("PSNR at 5 minus PSNR at 0 (dB)", gain_psnr),
    ):
        assert f"| {title} |{row}\n" in page


@pytest.mark.parametrize("folder", [EXAMPLES.parent, EXPERIMENTS], ids=["readme", "results"])
def test_the_table_of_defaults_is_that_of_the_report(folder):
    report = (EXPERIMENTS / "methods" / "defaults" / "report.md").read_text(encoding="utf-8")
    table = report.split("on the mean absolute error, of those tried:\n\n")[1].partition("\n\n")[0]
    assert "| CoLoRA, 7% budget |" in table and table in (folder / "README.md").read_text(encoding="utf-8")


def test_the_differences_of_the_defaults_are_those_of_the_report():
    report = (EXPERIMENTS / "methods" / "defaults" / "report.md").read_text(encoding="utf-8")
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    for title, claim in (
        ("CoLoRA, 7%, minus PEFT's LoRA", "CoLoRA 0.07 as finetune.py has it minus PEFT's LoRA"),
        ("CoLoRA, 7%, minus full tuning", "CoLoRA 0.07 as finetune.py has it minus full tuning"),
        (
            "CoLoRA, 7%, minus PEFT's LoRA with the same loss",
            "CoLoRA 0.07 as finetune.py has it minus PEFT's LoRA with the same loss",
        ),
        (
            "CoLoRA, 7%, minus full tuning with the same loss",
            "CoLoRA 0.07 as finetune.py has it minus full tuning with the same loss",
        ),
        (
            "CoLoRA, 7%, on mean absolute error minus one rank for all",
            "CoLoRA 0.07 on mean absolute error alone minus one rank for all",
        ),
        (
            "CoLoRA, 7%, minus the same on mean absolute error",
            "CoLoRA 0.07 as finetune.py has it minus the same on mean absolute error alone",
        ),
        (
            "CoLoRA, 7%, on mean absolute error minus PEFT's LoRA",
            "CoLoRA 0.07 on mean absolute error alone minus PEFT's LoRA",
        ),
        ("CoLoRA, 7%, minus the decoder alone", "CoLoRA 0.07 as finetune.py has it minus tuning the decoder alone"),
        ("CoLoRA, 7%, minus the biases alone", "CoLoRA 0.07 as finetune.py has it minus tuning the biases alone"),
        ("CoLoRA, 2% minus 7%", "CoLoRA as finetune.py has it, 0.02 minus 0.07"),
    ):
        psnr, ssim = (re.findall(r"([^|]+) \(\d+ tasks\) ", line) for line in re.findall(rf"{claim} \|.*", report))
        assert f"| {title} |{psnr[0]} |{psnr[1]} |{ssim[0]} |\n" in page
        if title.endswith("alone"):
            assert f"{psnr[0].split()[0][1:]} dB" in page.split("The decoder alone, 17%")[1].partition("\n\n")[0]


def test_the_sentences_below_the_table_of_defaults_have_the_figures_of_the_report():
    report = (EXPERIMENTS / "methods" / "defaults" / "report.md").read_text(encoding="utf-8")
    decibels, hundredths = report.split("SSIM in hundredths")
    claim = r"CoLoRA 0.07 as finetune.py has it minus {} \| (\S+) .* \| (\S+) ± (\S+) \(10 tasks\) \| (\S+) ± \S+ \(9"
    peft, with_loss, full = (
        re.search(claim.format(other), decibels).groups()
        for other in ("PEFT's LoRA", "PEFT's LoRA with the same loss", "full tuning with the same loss")
    )
    times = [
        re.search(rf"prod \+ {way} 0.07 \| [\d,]+ \| \S+ \| (\d+) \| \S+ \| (.*) \|", report).groups()
        for way in ("colora_default", "peft_lora")
    ]
    readme, page = (
        " ".join((folder / "README.md").read_text(encoding="utf-8").split())
        for folder in (EXAMPLES.parent, EXPERIMENTS)
    )
    behind = f"CoLoRA is {-float(peft[1]):.2f} ± {peft[2]} dB behind PEFT's LoRA, all of it on underwater photos"
    assert float(peft[3]) > 0 and f"Over ten tasks {behind}" in readme
    assert (
        f"mean of CoLoRA is {-float(peft[1]):.2f} dB behind that of PEFT's LoRA, and level without the under" in page
    )
    (mine, machine), (theirs, other_machine) = times
    assert machine == other_machine and f"CoLoRA took {int(mine) / int(theirs):.1f} of the time" in readme
    assert f"On the underwater task CoLoRA is {-float(peft[0]):.1f} dB behind PEFT's LoRA on the mean absolute" in page
    of_ssim = re.search(claim.format("PEFT's LoRA with the same loss"), hundredths).groups()
    for average, error in (with_loss[1:3], of_ssim[1:3]):
        assert abs(float(average)) < 2 * float(error) and "cannot be told apart in either measure" in page
    ssim = {row: float(value) for row, value in re.findall(r"\n\| ([^|]+) \|[^\n]* \| (0\.\d+) \|(?=\n)", report)}
    for way in ("full fine-tuning", "PEFT's LoRA"):
        assert 0.015 <= ssim[f"{way}, loss of CoLoRA"] - ssim[way] < 0.025 and "by about 0.02." in page
    assert max(ssim, key=ssim.get) == "full fine-tuning, loss of CoLoRA" and "highest means of all" in page
    lead = f"{-float(full[1]):.2f} ± {full[2]} dB ahead of CoLoRA and has the highest means"
    assert f"Full fine-tuning with that loss is {lead}" in readme


def test_the_table_of_64_pairs_has_the_figures_of_the_report():
    folder = EXPERIMENTS / "methods"
    report = (folder / "defaults-64-pairs" / "report.md").read_text(encoding="utf-8")
    page = (folder / "README.md").read_text(encoding="utf-8")
    decibels, similarity = report.split("SSIM (input", 1)
    for title, row in (
        ("PEFT's LoRA, 7%", "peft_lora"),
        ("PEFT's LoRA, 7%, loss of CoLoRA", "peft_lora_checkerboard"),
        ("CoLoRA, 7%", "colora_default"),
    ):
        lines = [re.search(rf"prod \+ {row} 0.07 \|(.*)", part)[1] for part in (decibels, similarity)]
        psnr, ssim = (re.findall(r"([\d.]+) ± ", line) for line in lines)
        assert len(psnr) == 3 and f"| {title} | {' | '.join((*psnr, *ssim))} |\n" in page
    text = " ".join((EXPERIMENTS / "README.md").read_text(encoding="utf-8").split())
    for title, claim, words in (
        ("CoLoRA minus PEFT's LoRA", "", "CoLoRA is {} dB ahead of PEFT's LoRA on lowlight and {} dB behind on rain"),
        ("the same, with the loss of CoLoRA", " with the same loss", "With the same loss these are {} and {} dB"),
    ):
        psnr, ssim = (
            re.findall(r"(\S+) ± (\S+) \(3\)", line)
            for line in re.findall(rf"has it minus PEFT's LoRA{claim} \|(.*)", report)
        )
        hundredths = [f"{float(mean) / 100:+.3f} ± {float(error) / 100:.3f}" for mean, error in ssim]
        assert f"| {title} | {' | '.join([*map(' ± '.join, psnr), *hundredths])} |\n" in page
        (lowlight, _), (rain, _) = psnr[1:]
        assert float(lowlight) > 0 > float(rain) and words.format(lowlight[1:], rain[1:]) in text


def test_the_underwater_table_has_the_figures_of_the_report():
    report = (EXPERIMENTS / "methods" / "defaults" / "report.md").read_text(encoding="utf-8")
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    matched = report.split("errors of colour and brightness. ")[1]
    psnr, without = (
        re.search(pattern, report)[1] for pattern in (r"\| input \| (\S+) ", r"Input: underwater ([\d.]+\d)")
    )
    assert f"| input | {psnr} | {without} |\n" in page
    for title, row in (
        ("full fine-tuning", "full"),
        ("PEFT's LoRA", "peft_lora 0.07"),
        ("full fine-tuning, loss of CoLoRA", "full_checkerboard"),
        ("PEFT's LoRA, loss of CoLoRA", "peft_lora_checkerboard 0.07"),
        ("CoLoRA, 7% budget", "colora_default 0.07"),
        ("CoLoRA, 2% budget", "colora_default 0.02"),
    ):
        psnr = re.search(rf"prod \+ {row} \| (\S+) ±", report)[1]
        without = re.search(rf"prod \+ {row} \| (\S+) ±", matched)[1]
        assert f"| {title} | {psnr} | {without} |\n" in page


def test_the_table_of_fewer_steps_is_that_of_the_cells():
    folder = EXPERIMENTS / "methods"
    table = steps_table(folder / "defaults", folder / "defaults-120")
    assert table in (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
