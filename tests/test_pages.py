"""The pages: links that exist, code that compiles, a README that can be read in one go."""

import re
import subprocess

import pytest
from support.sources import ROOT


def committed_pages():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split() if (ROOT / path).is_file()]


PAGES = committed_pages() if (ROOT / ".git").exists() else []
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text):
    """GitHub's anchors of the headings in a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text_of(page))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    assert not wrong, f"{page}: {', '.join(wrong)}"


@pytest.mark.parametrize("page", PAGES)
def test_python_on_the_pages_compiles(page):
    for number, (language, code) in enumerate(FENCED.findall(text_of(page)), start=1):
        if language == "python":
            compile(code, f"{page}, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_modules_that_commands_name_exist(page):
    commands = " ".join(code for language, code in FENCED.findall(text_of(page)) if language == "bash")
    scripts = re.findall(r"\bexamples/[\w/]+\.(?:py|yaml)\b", commands)
    modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (examples[\w.]+)", commands)]
    assert not [path for path in scripts + modules if not (ROOT / path).exists()]


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 180
