"""The bare wheel in an environment that holds it, what it requires, and nothing else.

The environment is not filled by pip: fetching torch takes minutes, and would test the package index. It gets
a link to every file of every distribution that the wheel's requirements lead to, out of the environment of
the tests. So what the library uses and does not require is not there, exactly as after `pip install soppu`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from soppu.cli import COMMANDS
from soppu.evaluate import html
from tests.soppu.evaluate.example import make_report

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
OF_EXTRAS = {
    "datasets",
    "pyarrow",
    "pandas",
    "prefect",
    "flwr",
    "ray",
    "starlette",
    "uvicorn",
    "fastapi",
    "docker",
    "pytest",
}


def pip(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, words)], check=True, cwd=ROOT)


def needed(holder: Distribution, extras: set[str]) -> Iterator[Requirement]:
    """What a distribution requires here, with these extras of it."""
    for requirement in map(Requirement, holder.requires or ()):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def closure(wheel: Distribution) -> dict[str, Distribution]:
    """Name -> every distribution that the wheel's requirements lead to, as installed here."""
    reached: dict[str, Distribution] = {}
    asked: set[tuple[str, frozenset[str]]] = set()
    waiting = list(needed(wheel, set()))
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in asked:
            asked.add(key)
            reached[key[0]] = distribution(requirement.name)
            assert requirement.specifier.contains(reached[key[0]].version, prereleases=True), requirement
            waiting += needed(reached[key[0]], set(requirement.extras))
    return reached


def link(holder: Distribution, site: Path) -> None:
    """A link to every file, and to what Python compiled beside them: compiling that again takes a minute."""
    for file in holder.files or ():
        if not {"..", "__pycache__"} & set(file.parts):  # scripts lie outside
            place, source = site / file, Path(str(holder.locate_file(file))).resolve()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source)
            compiled = source.with_name("__pycache__")
            if compiled.is_dir() and not place.with_name("__pycache__").exists():
                place.with_name("__pycache__").symlink_to(compiled)


class Bare:
    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.bin = folder / "env" / "bin"
        pip("wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
        (wheel,) = folder.glob("soppu-*.whl")
        pip("--python", self.bin / "python", "install", "--no-deps", wheel)
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        (installed,) = distributions(path=[str(site)])
        self.holds = closure(installed)
        for holder in self.holds.values():
            link(holder, site)

    def run(self, program: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        line = [str(self.bin / program), *map(str, words)]
        return subprocess.run(line, cwd=cwd, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    return Bare(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory, make_model) -> tuple[PreTrainedModel, Path]:
    """A model, and a folder of two users' adapters as PEFT itself writes them."""
    folder = tmp_path_factory.mktemp("users")
    make_model("llama").save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    for seed, user in enumerate(("alice", "bob")):
        model = make_model("llama", seed=seed)
        model.name_or_path = str(folder / "base")
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(
            folder / "users" / user
        )
    return make_model("llama"), folder


def test_the_library_requires_neither_server_nor_pipeline(bare: Bare, tmp_path: Path) -> None:
    assert {"torch", "transformers", "click"} <= bare.holds.keys()
    assert not OF_EXTRAS & bare.holds.keys()
    program = f"import importlib.util as i; print([n for n in {sorted(OF_EXTRAS)} if i.find_spec(n)])"
    assert bare.run("python", "-c", program, cwd=tmp_path).stdout == "[]\n"


def test_the_environment_runs_the_wheel_and_not_this_tree(bare: Bare, tmp_path: Path) -> None:
    told = bare.run("python", "-c", "import soppu; print(soppu.__file__)", cwd=tmp_path)
    assert Path(told.stdout.strip()).is_relative_to(bare.bin.parent)


def test_compress_inspect_and_export(bare: Bare, users: tuple[PreTrainedModel, Path]) -> None:
    model, folder = users
    done = bare.run(
        "soppu", "compress", folder / "users", "--out", "b.safetensors", "--max-error", 0.5, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    done = bare.run("soppu", "inspect", "b.safetensors", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["users"]) == {"alice", "bob"}
    assert all(error <= 0.5 for error in told["report"]["relative_error"].values())
    done = bare.run("soppu", "export", "b.safetensors", "--out", "lorax", cwd=folder)
    assert done.returncode == 0, done.stderr
    for user in ("alice", "bob"):
        config = json.loads((folder / "lorax" / user / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"]
        assert config["r"] in (8, 16, 32, 64, 128)
        wrapped = PeftModel.from_pretrained(model, folder / "lorax" / user, adapter_name=user)
        assert user in wrapped.peft_config


def test_report_renders_the_page(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(make_report(2)))
    done = bare.run("soppu", "report", "--open", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip()).read_text(encoding="utf-8")
    assert page == html.page(make_report(2))


def test_every_command_but_serve_loads(bare: Bare, tmp_path: Path) -> None:
    program = (
        "import json; from click.testing import CliRunner; from soppu.cli import COMMANDS, main;"
        "print(json.dumps({n: CliRunner().invoke(main, [n, '--help']).exit_code for n in COMMANDS}))"
    )
    told = bare.run("python", "-c", program, cwd=tmp_path)
    assert json.loads(told.stdout) == {name: 2 if name == "serve" else 0 for name in COMMANDS}, told.stderr


def test_serve_says_what_to_install(bare: Bare, tmp_path: Path) -> None:
    done = bare.run("soppu", "serve", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"Error: soppu serve needs \w+: pip install 'soppu\[serve\]'\n", done.stderr)
