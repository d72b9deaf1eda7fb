"""Who may import whom, how long files and functions may be, what goes to Flower: read off the sources."""

from __future__ import annotations

import ast
import io
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

ROOT = Path(__file__).parents[1]
# The picture: flows -> tasks -> soppu <- clients, server
LAYERS = {
    "soppu": set(),
    "tasks": {"prefect", "soppu"},
    "flows": {"prefect", "tasks", "soppu"},
    "clients": {"flwr", "soppu", "torch"},
    "server": {"flwr", "soppu", "torch", "safetensors"},
}
TOP_LEVEL = {"flows", "tasks", "clients", "server", "deploy", "tests", "benchmarks", "docs", "configs"}
FRAMEWORKS = {"prefect", "flwr", "ray"}
# What a flow may know of the library: names and settings, nothing that computes.
FLOWS_KNOW = {"soppu.config", "soppu.errors"}
SOURCES = ("soppu", "tasks", "flows", "clients", "server", "deploy", "tests", "benchmarks")
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "lib", "tools"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((node.lineno, f"{dots}{node.module or ''}.{alias.name}") for alias in node.names)


def faults(folder: str, path: Path) -> list[str]:
    """Imports of a file that the picture does not have."""
    found = []
    for line, name in imports(parse(path)):
        top = name.split(".")[0]
        own = top in (folder, "__future__") or top in sys.stdlib_module_names
        if name.startswith("."):
            fault = "relative"
        elif own:
            fault = ""
        elif folder == "soppu":
            fault = "not below soppu" if top in TOP_LEVEL | FRAMEWORKS else ""
        else:
            fault = (
                "" if top in LAYERS[folder] else f"{folder} may import {', '.join(sorted(LAYERS[folder]))}"
            )
        if folder == "flows" and top == "soppu" and ".".join(name.split(".")[:2]) not in FLOWS_KNOW:
            fault = f"flows may import {', '.join(sorted(FLOWS_KNOW))}"
        if fault:
            found.append(f"{path.relative_to(ROOT)}:{line}: {name}: {fault}")
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_follow_the_picture(folder: str) -> None:
    paths = files(folder)
    assert paths, f"{folder} holds no Python file"
    found = [fault for path in paths for fault in faults(folder, path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("soppu", "import prefect"),
        ("soppu", "from flwr.app import Message"),
        ("soppu", "def f():\n    from tasks.federate import federate"),
        ("soppu", "from . import adapter"),
        ("soppu", "from ..clients import app"),
        ("tasks", "import torch"),
        ("tasks", "from flows.pipeline import full_pipeline"),
        ("tasks", "from clients.app import app"),
        ("flows", "import torch"),
        ("flows", "from soppu.registry import Registry"),
        ("flows", "from soppu import emulator"),
        ("clients", "from server.app import app"),
        ("clients", "import prefect.client"),
        ("server", "from clients.workbench import Workbench"),
        ("server", "from prefect import flow"),
    ],
)
def test_an_import_that_is_not_in_the_picture_would_be_found(folder: str, line: str, tmp_path: Path) -> None:
    path = ROOT / folder / "imagined.py"
    tree = ast.parse(line)
    names = [name for _, name in imports(tree)]
    assert names
    copy = tmp_path / "imagined.py"
    copy.write_text(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        assert len(faults(folder, copy)) == len(names), path


def test_all_imports_are_absolute_everywhere() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files(*SOURCES)
        for line, name in imports(parse(path))
        if name.startswith(".")
    ]
    assert not found, "\n".join(found)


def test_files_are_short() -> None:
    found = []
    for path in files(*SOURCES):
        limit = 700 if path.is_relative_to(ROOT / "tests") else 400
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > limit:
            found.append(f"{path.relative_to(ROOT)}: {length} lines, at most {limit}")
    assert not found, "\n".join(found)


def test_functions_are_short() -> None:
    found = []
    for path in files(*SOURCES):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    found.append(
                        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {length} lines, at most 60"
                    )
    assert not found, "\n".join(found)


def test_modules_have_names_that_say_something() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in files(*SOURCES)
        if VAGUE & {path.stem.strip("_"), *(part.strip("_") for part in path.relative_to(ROOT).parts[:-1])}
    ]
    assert not found, "\n".join(found)


def test_every_module_says_what_it_is_for() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in files(*LAYERS, "deploy", "benchmarks")
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(parse(path))
    ]
    assert not found, "\n".join(found)


def test_flower_packs_all_that_clients_and_server_need_and_nothing_else() -> None:
    """By Flower's own builder; it refuses a pattern that matches nothing."""
    everything = [
        *files(*SOURCES),
        ROOT / "pyproject.toml",
        ROOT / ".gitignore",
        *(ROOT / "configs").glob("*.toml"),
    ]
    given = {str(path.relative_to(ROOT)): path.read_bytes() for path in everything}
    with zipfile.ZipFile(io.BytesIO(build_fab_from_files(given)[0])) as bundle:
        packed = {name for name in bundle.namelist() if not name.startswith(".info/")}
    wanted = {str(path.relative_to(ROOT)) for path in files("soppu", "clients", "server")}
    assert packed == wanted | {"pyproject.toml"}


def test_flowers_components_exist() -> None:
    components = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    for reference in components.values():
        module, _, name = reference.partition(":")
        tree = parse(ROOT / f"{module.replace('.', '/')}.py")
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        assert name in [target.id for target in targets if isinstance(target, ast.Name)]


def test_flowers_run_configuration_is_what_the_server_reads() -> None:
    """Flower refuses `--run-config` keys that pyproject.toml does not list."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    source = (ROOT / "server" / "app.py").read_text() + (ROOT / "clients" / "app.py").read_text()
    assert set(re.findall(r"run_config\[\"([^\"]+)\"\]", source)) == set(listed)
    started = (ROOT / "soppu" / "federation" / "simulation.py").read_text()
    assert all(f'"{key}": str(' in started for key in listed)
