"""What goes to Flower: the files it packs, its two components, and the configuration of a run."""

from __future__ import annotations

import ast
import io
import re
import tomllib
import zipfile

from flwr.cli.build import build_fab_from_files

from tests.sources import ROOT, SOURCES, files, parse


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
    started = {
        name: (ROOT / "soppu" / "federation" / name).read_text()
        for name in ("simulation.py", "connection.py")
    }
    assert all(f'"{key}": str(' in started["connection.py"] for key in listed)
    assert all(f'"{key}": str(' in started["simulation.py"] for key, default in listed.items() if not default)
