"""Images of both stacks are ours or official, and every command line is one that its program takes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import cyclopts
import pytest
from prefect.cli._app import _app as prefect_app

from deploy.base_model import main as base_model
from soppu.cli import main as soppu
from soppu.config import TargetConfig
from soppu.evaluate.tradeoff.texts import EXTRA, NEEDS
from tests.deploy.manifests import Container, documents
from tests.deploy.stacks import CONTAINERS, DEPLOY, PAGE, targets

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time


def lines_of(each: Container) -> Iterator[list[str]]:
    """The command lines that a container's own comes down to."""
    words = list(each.words)
    if each.image.startswith("soppu-server"):
        words = [*json.loads(targets()[""]["ENTRYPOINT"]), *words]
    if words != ["deploy/worker.sh"] and words:
        yield words
    elif each.image.startswith("soppu-worker"):
        script = (DEPLOY / "worker.sh").read_text()
        yield from (
            shlex.split(line.removeprefix("exec "))
            for line in re.findall(r"^(?:exec )?prefect.*", script, re.M)
        )


def parse(words: list[str]) -> None:
    """Hand a command line to the program's own parser, and run nothing. Raises what that raises."""
    if words[0] == "prefect":
        prefect_app.parse_args(
            [w for w in words[1:] if w != "--no-prompt"], exit_on_error=False, print_error=False
        )
        return
    python, dash, module, *rest = words
    assert (python, dash) == ("python3", "-m")
    command: click.Command = {"soppu.cli": soppu, "deploy.base_model": base_model}[module]
    context = command.make_context(module, rest)
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        found.make_context(name, rest, parent=context)


# --- images -----------------------------------------------------------------------------------------------


def test_images_are_those_that_are_built_here_or_pulled_by_their_official_names() -> None:
    script = (DEPLOY / "image.sh").read_text()
    assert "name=${1:-soppu-$kind:latest}" in script and "server | evaluator | worker) ;;" in script
    built = {"soppu-server:latest", "soppu-worker:latest"}
    postgres = {each.image for each in CONTAINERS.values() if each.image.startswith("postgres")}
    assert len(postgres) == 1
    assert {each.image for each in CONTAINERS.values()} == built | postgres | {TargetConfig().lorax_image}
    for name in built:
        assert name in (DEPLOY / "worker.Dockerfile").read_text() + PAGE


def test_the_default_image_is_the_server_and_no_image_runs_as_root() -> None:
    found = targets()
    assert found[""] == found["server"]
    assert {name: found[name]["USER"] for name in ("server", "evaluator")} == dict.fromkeys(
        ("server", "evaluator"), "1000:1000"
    )
    command = [*json.loads(found["evaluator"]["ENTRYPOINT"]), *json.loads(found["evaluator"]["CMD"])]
    with pytest.raises(click.exceptions.Exit):  # after its help
        parse(command)


def test_the_evaluator_holds_what_scores_text_and_programs() -> None:
    assert f'gather "$context-scores" {EXTRA},humaneval\n' in (DEPLOY / "image.sh").read_text()
    assert set(NEEDS.values()) <= set(re.findall(r"\w+", (DEPLOY / "Dockerfile").read_text()))


# --- command lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", [name for name, each in CONTAINERS.items() if each.image.startswith("soppu")]
)
def test_every_command_line_is_one_that_its_program_takes(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in CONTAINERS[where].environment.items():
        if name != "PREFECT_API_URL":
            monkeypatch.setenv(name, value.replace("/soppu", str(tmp_path)))
    (tmp_path / "lorax").mkdir()
    lines = list(lines_of(CONTAINERS[where]))
    assert lines
    for words in lines:
        parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "prefect worker start --polo soppu",
        "prefect server begin",
        "python3 -m soppu.cli serve --gracious 3",
        "python3 -m soppu.cli server",
        "python3 -m deploy.base_model --create x",
    ],
)
def test_a_command_line_with_a_slip_is_refused(line: str) -> None:
    with pytest.raises((click.ClickException, cyclopts.CycloptsError)):
        parse(line.split())


def test_prefects_commands_on_the_page_are_taken_and_name_what_is_deployed() -> None:
    deployed = {item["name"] for item in documents(DEPLOY / "prefect-container.yaml")[0]["deployments"]}
    found = re.findall(r"(prefect deployment run .*)$", PAGE, re.M)
    assert len(found) >= 2
    for line in found:
        words = shlex.split(line)
        parse(words)
        assert words[3].partition("/")[2] in deployed
