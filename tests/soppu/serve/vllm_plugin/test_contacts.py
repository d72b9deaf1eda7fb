"""Every name of vLLM's that the plugin hangs into is in the wheels it supports; read, not installed."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from soppu.serve.vllm_plugin import contacts, host
from soppu.serve.vllm_plugin.contacts import Contact
from tests.soppu.serve.vllm_plugin.wheels import Wheel

HOOKS = [Path(host.__file__).parent / side / "hooks.py" for side in ("frontend", "worker")]
ALL = (*contacts.REPLACED, *contacts.USED, *contacts.READ)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parsed(wheel: Wheel, module: str) -> ast.Module:
    return ast.parse(wheel.source(module))


def members(node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """(name, definition) of all that a module or class has, attributes set by its methods included."""
    body = [*node.body, *(one for child in node.body if isinstance(child, ast.If) for one in child.body)]
    for child in body:
        if isinstance(child, ast.ClassDef | Function):
            yield child.name, child
        elif isinstance(child, ast.ImportFrom | ast.Import):
            yield from ((alias.asname or alias.name, child) for alias in child.names)
        else:
            targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
            yield from ((target.id, child) for target in targets if isinstance(target, ast.Name))
    if isinstance(node, ast.ClassDef):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                    yield inner.attr, inner


def fault(contact: Contact, wheel: Wheel) -> str:
    """What is not as the contact says; "" if all of it is."""
    place = contact.place(wheel.version)
    module, _, path = place.partition(":")
    if not place:
        return ""
    node: ast.AST = parsed(wheel, module)
    for name in path.split("."):
        found = [one for known, one in members(node) if known == name]  # type: ignore[arg-type]
        if not found:
            return f"vLLM {wheel.version}: {place}: no {name}"
        node = found[0]
    if contact.takes is None:
        return ""
    if not isinstance(node, Function):
        return f"vLLM {wheel.version}: {place}: no function"
    given = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
    named = {*given, *(one.arg for one in node.args.kwonlyargs)}
    if tuple(given[: len(contact.takes)]) != contact.takes or set(contact.named) - named:
        return f"vLLM {wheel.version}: {place} takes {given}"
    return ""


@pytest.mark.long  # asks the package index, and reads wheels there
@pytest.mark.parametrize("version", contacts.WHEELS)
def test_every_contact_is_in_the_wheel_with_the_parameters_relied_on(version: str) -> None:
    wheel = Wheel(version)
    assert [said for contact in ALL if (said := fault(contact, wheel))] == []


@pytest.mark.long
def test_a_name_or_parameter_that_is_not_there_would_be_found() -> None:
    wheel = Wheel(contacts.WHEELS[0])
    wrong = (
        replace(contacts.CREATE_CONFIG, where="vllm.engine.arg_utils:EngineArgs.make_engine_config"),
        replace(contacts.PREPARE_V1, takes=("self", "counts")),
        Contact("vllm.lora.request:LoRARequest.rank_of_nobody"),
        Contact("vllm.v1.worker.gpu.lora_utils:LoraState.rows"),
        Contact("vllm.no_such_module:anything"),
        replace(contacts.ATTACH_ROUTES, before=None),  # where 0.32 has it, it was not in 0.27
    )
    assert all(fault(contact, wheel) for contact in wrong)


def test_there_is_a_wheel_of_each_supported_version_and_none_else() -> None:
    assert [f"{version.rpartition('.')[0]}." for version in contacts.WHEELS] == list(host.SUPPORTED)
    for version in contacts.WHEELS:
        host.check_version(version)


def test_hooks_reach_vllm_by_the_table_alone() -> None:
    """No import of vLLM's, and every name of the table that is replaced or used is one they take from it."""
    texts = [path.read_text() for path in HOOKS]
    assert not [
        line for text in texts for line in text.splitlines() if re.match(r"\s*(from|import) vllm", line)
    ]
    taken = set(re.findall(r"contacts\.([A-Z_0-9]+)", "".join(texts)))
    held = {name for name, one in vars(contacts).items() if isinstance(one, Contact)}
    assert held - {"ATTACH_ROUTES"} <= taken | {"LOAD_MODEL", "DUMMY_RUN"}
