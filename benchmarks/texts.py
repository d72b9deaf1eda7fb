"""The texts of the federation study: a built-in corpus, and another of another kind.

`docstrings` is English: the users are installed libraries, a prompt is a function's signature, the
completion its docstring. Which libraries a machine has is fixed by constraints.txt.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from soppu import files

CORPORA = ("stdlib", "docstrings")
LIBRARIES = (
    *("torch", "transformers", "peft", "prefect", "sqlalchemy", "numpy", "ray", "flwr"),
    *("matplotlib", "httpx", "fsspec", "rich", "click", "pydantic"),
)
STDLIB_USERS = (
    *("asyncio", "email", "idlelib", "multiprocessing", "tkinter", "unittest", "urllib", "xml"),
    *("json", "logging", "http", "concurrent", "importlib", "distutils", "lib2to3", "ctypes"),
)
_SHORT, _LONG = 60, 900  # characters of a docstring
_FOLDER = ROOT / ".soppu" / "study"


def settings(corpus: str, *, users: int) -> dict[str, Any]:
    """The keys of a configuration that name a corpus."""
    if corpus == "stdlib":
        return {"data.source": "stdlib", "data.users": list(STDLIB_USERS[:users])}
    names = [name for name in LIBRARIES if len(docstrings(name)) >= 80][:users]
    folder = _FOLDER / "docstrings"
    for name in names:
        lines = [
            json.dumps({"user_id": name, "prompt": prompt, "completion": completion})
            for prompt, completion in docstrings(name)
        ]
        files.write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    return {"data.source": str(folder), "data.users": names}


@cache
def docstrings(library: str) -> tuple[tuple[str, str], ...]:
    """(signature, docstring) of a library's functions, in file order; none without the library."""
    root = Path(sysconfig.get_paths()["purelib"]) / library
    pairs: dict[tuple[str, str], None] = {}
    for path in sorted(root.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):
            continue  # templates and samples of older Pythons
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if _SHORT <= len(text) <= _LONG:
                    pairs[f"def {node.name}({ast.unparse(node.args)}):\n", f'"""{text}"""\n'] = None
    return tuple(pairs)
