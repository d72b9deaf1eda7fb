"""The built-in corpus: prompt and completion together are the function, cut in the right place."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from pathlib import Path

import pytest

from soppu import corpus


def cut(tmp_path: Path, source: str) -> list[tuple[str, str]]:
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    return list(corpus._from_file(path))


BODY = "    first = one_long_name_of_a_thing(argument)\n    return first + another_long_name\n"


def test_the_prompt_is_signature_and_docstring(tmp_path: Path) -> None:
    head = 'def f(\n    argument,\n):\n    """Say something.\n\n    At length.\n    """\n'
    assert cut(tmp_path, head + BODY) == [(head, BODY)]


def test_a_function_without_docstring_is_cut_after_its_signature(tmp_path: Path) -> None:
    assert cut(tmp_path, "async def f(x):\n" + BODY) == [("async def f(x):\n", BODY)]


def test_methods_lose_their_indentation(tmp_path: Path) -> None:
    source = "class C:\n" + textwrap.indent("def f(self):\n" + BODY, "    ")
    assert cut(tmp_path, source) == [("def f(self):\n", BODY)]


def test_a_form_feed_does_not_move_the_cut(tmp_path: Path) -> None:
    """Python counts lines by newlines; str.splitlines() counts form feeds and others too."""
    source = "x = 1\n\f\ny = '\x1c \x85 \u2028'\n\f\ndef f(x):\n" + BODY
    assert cut(tmp_path, source) == [("def f(x):\n", BODY)]


def test_the_decorator_of_a_nested_function_belongs_to_the_body(tmp_path: Path) -> None:
    body = (
        "    @wraps(one_long_name_of_a_thing)\n    def inner():\n        return argument\n    return inner\n"
    )
    assert cut(tmp_path, "def f(x):\n" + body)[0] == ("def f(x):\n", body)


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): return one_long_name_of_a_thing(x) + another_long_name(x)\n",  # all on one line
        'def f(x):\n    """Only a docstring, and rather a long one at that."""\n',
        "def f(x):\n    return 1\n",  # shorter than MIN_BODY
        "def f(x):\n" + BODY * 20,  # longer than MAX_BODY
        "print 'Python 2'\n",
    ],
)
def test_what_makes_no_example_is_left_out(tmp_path: Path, source: str) -> None:
    assert cut(tmp_path, source) == []


@pytest.mark.parametrize("package", ["json", "email", "asyncio"])
def test_every_example_of_a_package_is_a_function_that_parses(package: str) -> None:
    pairs = corpus.functions(package)
    assert len(pairs) == len(set(pairs)) > 8
    for prompt, completion in pairs:
        tree = ast.parse(prompt + completion)
        assert isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef)
        assert corpus.MIN_BODY <= len(completion) <= corpus.MAX_BODY
        ast.parse(prompt + "    pass\n")  # the cut is not inside a statement


def test_packages_are_sorted_by_how_much_they_have() -> None:
    names = corpus.packages()
    counts = [len(corpus.functions(name)) for name in names]
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0
    assert {"asyncio", "email", "json"} <= set(names)
    assert not {"test", "site-packages", "encodings"} & set(names)


def test_is_package() -> None:
    assert corpus.is_package("email")
    assert not corpus.is_package("test")
    assert not corpus.is_package("no_such_package")
    assert not corpus.is_package("os")  # a module, not a package


def test_public_text_is_nobodys() -> None:
    """Text of a user must not reach the server through the public set."""
    public = set(corpus.public_functions())
    assert len(public) > 100
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert (stdlib / "textwrap.py").exists()
    assert any(prompt.startswith("def dedent(text)") for prompt, _ in public)
    for user in ("asyncio", "email", "json", "tkinter", "unittest"):
        shared = public & set(corpus.functions(user))
        assert len(shared) < 0.02 * len(corpus.functions(user)), shared
