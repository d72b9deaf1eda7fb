"""How long files and functions may be, and what modules are called and say: read off the sources."""

from __future__ import annotations

import ast

from tests.sources import APPLICATIONS, ROOT, SOURCES, files, parse

VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "lib", "tools"}


def test_files_are_short() -> None:
    found = []
    for path in files(*SOURCES):
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > 400:
            found.append(f"{path.relative_to(ROOT)}: {length} lines, at most 400")
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
        for path in files(*APPLICATIONS, "deploy", "benchmarks")
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(parse(path))
    ]
    assert not found, "\n".join(found)
