"""README, CONTRIBUTING, CHANGELOG, CITATION.cff and constraints.txt agree with the code; the code is short."""

import ast
import io
import re
import tokenize
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mnist_dist.versions import VERSION
from tests.commands import blocks, check_command
from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"))]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
README = (REPOSITORY / "README.md").read_text()
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()


START = README.split("\n## Start\n")[1].split("\nIt ends with lines like these")[0]


@pytest.mark.parametrize("line", blocks(START))
def test_a_command_in_the_readme_exists(line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(
    "line", [c for c in re.findall(r"`([^`\n]+)`", CONTRIBUTING) if re.match(r"make|pip|python", c)]
)
def test_a_command_in_contributing_exists(line: str) -> None:
    check_command(line)


def test_every_path_in_contributing_is_there() -> None:
    for path in re.findall(r"(?<![\w/])(?:docs|tests|benchmarks|mnist_dist)/[\w./-]*\w", CONTRIBUTING):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_heading_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_every_footnote_is_used_and_defined() -> None:
    for page in PAGES:
        text = page.read_text()
        defined = re.findall(r"^\[\^([\w-]+)\]:", text, re.MULTILINE)
        used = re.findall(r"\[\^([\w-]+)\](?!:)", text)
        assert len(defined) == len(set(defined))
        assert set(defined) == set(used), page


def test_the_readme_shows_each_picture_and_says_what_is_on_it() -> None:
    pictures = sorted(path.name for path in (REPOSITORY / "docs/pictures").glob("*.svg"))
    assert pictures == ["curves-dark.svg", "curves-light.svg", "terminal.svg"]
    for name in pictures:
        assert f"docs/pictures/{name}" in README
        svg = (REPOSITORY / "docs/pictures" / name).read_text()
        ElementTree.fromstring(svg)
        assert not re.search(r"(?:src|href)=\"https?:|url\(\"?https?:|@font-face|@import", svg), "it loads something"
    assert all(len(alt) > 80 for alt in re.findall(r'alt="([^"]*)"', README))


def test_the_citation_is_of_this_version() -> None:
    citation: dict[str, Any] = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["license"]
    assert citation["abstract"] == PROJECT["description"]
    assert {"title", "message", "authors"} <= set(citation)


def test_the_constraints_hold_every_direct_dependency_within_its_range() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins)
    versions = {}
    for pin in pins:
        name, _, version = pin.partition("==")
        assert re.fullmatch(r"[\w.]+", version), pin
        assert name == canonicalize_name(name)
        versions[name] = version
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, but constraints.txt has {version}"


def test_the_changelog_has_the_form_of_keepachangelog() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", version) for version in versions[1:]]
    assert all(released), versions
    assert next(match[1] for match in released if match) == VERSION
    for section in text.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert len(kinds) == len(set(kinds)), "a kind of change is there twice"
        assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
        assert kinds, "changes stand under a kind"


def test_the_short_comparison_in_the_readme_says_what_the_long_one_says() -> None:
    def table(text: str) -> list[dict[str, str]]:
        lines = text.split("## Beside the other ways\n")[-1].split("# Beside the other ways\n")[-1].splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]

    short = table(README.split("\n## What always holds")[0])
    text = (REPOSITORY / "docs/COMPARISON.md").read_text()
    long = table(re.sub(r"\[\^[\w-]+\]", "", text))
    marks = [tuple(row[name] for name in short[0] if name) for row in long]
    for row in short:
        assert tuple(row[name] for name in row if name) in marks, row
    for line in text.splitlines():
        if line.startswith("|"):
            assert not re.search(r"\| (?:yes|no|option)[^\[|]*\|", line), f"a mark without a source: {line}"


def code_lines(path: Path) -> set[int]:
    """The lines that are neither blank nor a comment nor a docstring."""
    text = path.read_text()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def test_the_core_is_read_in_a_quarter_of_an_hour() -> None:
    house = REPOSITORY / "mnist_dist"
    core = [*(house / "training").glob("*.py"), house / "data" / "sampler.py", house / "models.py"]
    assert sum(len(code_lines(path)) for path in core) <= 750


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{path.name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in [REPOSITORY / "train.py", *(REPOSITORY / "mnist_dist").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > 60}
