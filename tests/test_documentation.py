"""The commands and examples that the documentation shows are real."""

import re
import shlex
from pathlib import Path

import pytest

import cryoai
from cryoai.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


COMMANDS = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if "cryoai " in line]
EXAMPLES = [pytest.param(block, id=page.name) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_shown_is_understood(line):
    program, *tokens = shlex.split(line, comments=True)
    assert program == "cryoai"
    app.parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("code", [p for p in EXAMPLES if "toy/" not in p.values[0]])
def test_every_example_that_needs_no_files_runs(code):
    exec(compile(code, "example", "exec"), {})


@pytest.mark.parametrize("code", [p for p in EXAMPLES if "toy/" in p.values[0]])
def test_every_example_with_files_names_what_the_package_has(code):
    for name in re.findall(r"cryoai\.(\w+)", code):
        assert hasattr(cryoai, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_changelog_tells_of_every_command():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for command in [name for name in app if not name.startswith("-")]:
        assert f"cryoai {command}" in text
