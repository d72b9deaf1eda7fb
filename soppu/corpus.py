"""The built-in corpus: the functions of Python's own standard library, one package = one user.

Real text that every machine has, of many authors with habits of their own. A prompt is a signature with
its docstring, the completion is the body.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

MIN_BODY = 40
MAX_BODY = 1200
_NOT_USERS = {"test", "tests", "site-packages", "ensurepip", "encodings", "__pycache__", "pydoc_data"}


def packages(*, least: int = 1) -> list[str]:
    """Packages with at least `least` examples, most examples first, then by name."""
    counts = {
        folder.name: len(functions(folder.name)) for folder in _root().iterdir() if is_package(folder.name)
    }
    return sorted((name for name in counts if counts[name] >= least), key=lambda name: (-counts[name], name))


@cache
def functions(package: str) -> tuple[tuple[str, str], ...]:
    """(prompt, completion) of every usable function in a package, in file order, without repeats."""
    paths = (
        path
        for path in sorted((_root() / package).rglob("*.py"))
        if not _NOT_USERS.intersection(path.relative_to(_root()).parts)
    )
    return _from_files(paths)


@cache
def by_file(*, least: int = 1) -> dict[str, tuple[tuple[str, str], ...]]:
    """Path below the library -> the functions of that file, of every file that has at least `least`."""
    found = {}
    for path in sorted(_root().rglob("*.py")):
        name = path.relative_to(_root())
        pairs = () if _NOT_USERS.intersection(name.parts) else _from_files([path])
        if len(pairs) >= least:
            found[name.as_posix()] = pairs
    return found


@cache
def public_functions() -> tuple[tuple[str, str], ...]:
    """The same from the single-file modules, which are nobody's: public text for the server."""
    paths = (path for path in sorted(_root().glob("*.py")) if path.stem in sys.stdlib_module_names)
    return _from_files(paths)


def is_package(name: str) -> bool:
    """Whether the standard library has a package of that name that may be a user."""
    return name not in _NOT_USERS and (_root() / name / "__init__.py").exists()


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _from_files(paths: Iterable[Path]) -> tuple[tuple[str, str], ...]:
    return tuple(dict.fromkeys(pair for path in paths for pair in _from_file(path)))


def _from_file(path: Path) -> Iterator[tuple[str, str]]:
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except SyntaxError:  # lib2to3 ships Python 2 samples
        return
    lines = source.split("\n")  # as ast counts them; str.splitlines() also breaks at a form feed
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pair = _split(node, lines)
            if pair is not None:
                yield pair


def _split(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body or body[0].lineno <= node.lineno or node.end_lineno is None:
        return None
    decorators = getattr(body[0], "decorator_list", [])  # of a nested function: above its own line number
    start = min(item.lineno for item in (body[0], *decorators)) - 1
    indent = " " * node.col_offset
    first = indent + lines[node.lineno - 1].lstrip()
    text = textwrap.dedent("\n".join([first, *lines[node.lineno : node.end_lineno]]))
    head = start - node.lineno + 1
    prompt = "\n".join(text.split("\n")[:head]) + "\n"
    completion = "\n".join(text.split("\n")[head:]) + "\n"
    return (prompt, completion) if MIN_BODY <= len(completion) <= MAX_BODY else None
