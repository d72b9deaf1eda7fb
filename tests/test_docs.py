"""What the documents say is so: commands and files exist, figures are the measured ones."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import (
    compression_page,
    dashboard_page,
    demo,
    federation_page,
    gateway_page,
    pages,
    personal_page,
    serve_page,
)
from docs import generate_lorax
from docs.generate_cli import PAGE
from soppu import __version__
from soppu.cli import COMMANDS, main
from soppu.serve.api.requests import PARAMETERS, Parameters

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: str) -> list[list[str]]:
    """Every command line in a fenced block without a language, split as a shell would."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(make|\.venv/bin/)", line)]


def test_the_cli_page_is_what_the_commands_say() -> None:
    # in a process of its own: click keeps a command's help option from the first time it was asked
    code = "import sys; from docs.generate_cli import render; sys.stdout.write(render())"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert PAGE.read_text() == said.stdout, "run `make docs`"


def test_the_lorax_page_is_what_the_lists_give_and_has_no_empty_cell() -> None:
    assert generate_lorax.PAGE.read_text() == generate_lorax.render(), "run `make docs`"
    assert generate_lorax.LORAX.keys() == PARAMETERS.keys() == Parameters.model_fields.keys()
    rows = [line for line in generate_lorax.PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert len(rows) > 100 and all(len(line) in (3, 4) and all(line) for line in cells)
    with pytest.raises(ValueError, match="empty cell"):
        generate_lorax._table(("route", "LoRAX"), [("`/x`", " ")])


@pytest.mark.parametrize("words", [c for c in commands(README) if c[0] == ".venv/bin/soppu"], ids=" ".join)
def test_soppu_commands_of_the_readme_exist(words: list[str]) -> None:
    assert words[1] in COMMANDS
    known = CliRunner().invoke(main, [words[1], "--help"]).output
    for option in (word for word in words[2:] if word.startswith("--")):
        assert option in known, option


@pytest.mark.parametrize("words", [c for c in commands(README) if c[0] == "make"], ids=" ".join)
def test_make_targets_of_the_readme_exist(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_prefect_commands_of_the_readme_name_real_deployments_and_files() -> None:
    deployed = (ROOT / "deploy" / "prefect.yaml").read_text()
    flows = "".join(path.read_text() for path in (ROOT / "flows").glob("*.py"))
    found = [c for c in commands(README) if c[0].endswith("prefect")]
    assert len(found) >= 2
    for words in found:
        flow, name = words[words.index("run") + 1].split("/")
        assert f'@flow(name="{flow}"' in flows
        assert f"- name: {name}" in deployed
        for value in (word.partition("=")[2] for word in words if word.startswith("config=")):
            assert (ROOT / value).is_file()


def test_links_and_the_file_tour_point_at_things_that_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    tour = README.split("## File tour")[1].split("\n## ")[0]
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", tour):
        assert (ROOT / name).exists(), name


def test_the_index_has_every_page() -> None:
    there = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"^\| \[([\w.]+)\]", (ROOT / "docs" / "README.md").read_text(), re.M)) == there


def test_the_glossary_defines_every_term_once_and_says_where_it_lives() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.M
    )
    terms = [
        re.sub(r" \(([A-Z]|r|[A-Z],.*|[A-Z] or .*)\)$", "", term) for term, _, _ in rows if term != "term"
    ]
    assert len(terms) == len(set(terms))
    assert {"adapter", "core", "basis", "bundle", "page", "residual"} <= set(terms)
    assert all("](" in where for term, _, where in rows if term != "term")


def test_where_a_change_goes_names_things_that_are_there() -> None:
    section = CONTRIBUTING.split("## Where does")[1].split("\n## ")[0]
    places = re.findall(r"`([\w./]+(?:\.py|\.toml|\.md|/))`", section)
    assert len(places) > 15
    assert not [place for place in places if place != "hooks.py" and not (ROOT / place).exists()]


def test_the_one_test_recipe_runs_a_test_that_is_there() -> None:
    words = next(
        c for c in (line.split() for line in CONTRIBUTING.splitlines()) if "-k" in c and "pytest" in c
    )
    path, name = next(word for word in words if word.startswith("tests/")), words[words.index("-k") + 1]
    assert re.search(rf"def test_\w*{name}", (ROOT / path).read_text())


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    makefile = (ROOT / "Makefile").read_text()
    started = makefile.split("\nlint:")[1].split("\n\n")[0]
    targets = re.findall(r"^(lint-\w+):\n((?:\t.*\n)+)", makefile, re.M)
    assert targets and all(name in started for name, _ in targets)
    linters = {word for _, lines in targets for word in re.findall(r"\$\(BIN\)/(\S+)", lines)}
    hooks = re.findall(r"entry: \.venv/bin/(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {"ruff", "mypy", "lint-imports"} <= set(hooks) <= linters


def test_the_readmes_figures_are_the_measured_ones() -> None:
    result = json.loads(demo.RESULT.read_text())
    assert demo.with_block(README, demo.block(result)) == README, "run `make bench`"


def test_the_figures_on_compression_are_the_measured_ones() -> None:
    made = compression_page.blocks()
    for page in (ROOT / "README.md", ROOT / "docs" / "compression.md"):
        text = page.read_text()
        marks = set(re.findall(r"<!-- ([\w-]+):begin -->", text)) - {"demo", *serve_page.MARKS}
        marks -= set(personal_page.MARKS)
        assert marks and marks <= set(compression_page.MARKS), page
        assert pages.with_blocks(text, made) == text, "run `python -m benchmarks.compression page`"


def test_the_figures_on_the_live_page_are_the_measured_ones() -> None:
    text, made = dashboard_page.PAGE.read_text(), dashboard_page.blocks()
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", text)) == set(dashboard_page.MARKS)
    assert pages.with_blocks(text, made) == text, "run `python -m benchmarks.dashboard_page`"


def test_the_figures_on_the_gateway_are_the_measured_ones() -> None:
    text, made = gateway_page.PAGE.read_text(), gateway_page.blocks()
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", text)) == set(gateway_page.MARKS)
    assert pages.with_blocks(text, made) == text, "run `python -m benchmarks.gateway_page`"


def test_the_figures_on_personal_forms_are_the_measured_ones() -> None:
    texts, made = [page.read_text() for page in personal_page.PAGES], personal_page.blocks()
    assert set(made) <= set(personal_page.MARKS)
    found = {mark for text in texts for mark in re.findall(r"<!-- ([\w-]+):begin -->", text)}
    assert found >= set(personal_page.MARKS)
    for text in texts:
        assert pages.with_blocks(text, made) == text, "run `python -m benchmarks.personal_page`"


def test_the_figures_on_serving_are_the_measured_ones() -> None:
    made = serve_page.blocks()
    for page in serve_page.PAGES:
        text = page.read_text()
        assert set(re.findall(r"<!-- ([\w-]+):begin -->", text)) & set(serve_page.MARKS)
        assert pages.with_blocks(text, made) == text, "run `python -m benchmarks.serve_page`"


def test_configuration_keys_named_in_the_documents_exist() -> None:
    default = tomllib.loads((ROOT / "configs" / "default.toml").read_text())
    sections = [name for name, value in default.items() if isinstance(value, dict)]
    other_words = {"report.md", "format.md", "operate.md"}  # fields of their own, with a test of their own
    for page in (page for page in PAGES if page.name not in other_words):
        for section, key in re.findall(rf"`({'|'.join(sections)})\.(\w+)`", page.read_text()):
            if (ROOT / "soppu" / section / f"{key}.py").exists() or key in ("py", "Client"):
                continue
            assert key in default[section], f"{page.name}: {section}.{key}"


def test_version_and_changelog_agree() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_the_tables_of_federations_are_those_of_the_result_files() -> None:
    text = federation_page.PAGE.read_text()
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", text)) == set(federation_page.MARKS)
    made = federation_page.blocks()
    assert pages.with_blocks(text, made) == text, "run `python -m benchmarks.federation_page`"
