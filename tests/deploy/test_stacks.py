"""Both stacks in containers: valid by their schemas, every name meets its like, every command line is one."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import cyclopts
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from prefect.cli._app import _app as prefect_app
from prefect.settings import get_current_settings

from deploy.base_model import main as base_model
from deploy.stack import POOL
from soppu import config as configuration
from soppu.cli import main as soppu
from soppu.config import Config, TargetConfig
from soppu.evaluate.tradeoff.texts import EXTRA, NEEDS
from soppu.serve.api.routes import OPERATIONS
from soppu.serve.stopping import _FLUSH_SECONDS
from tests.deploy.manifests import (
    PROBES,
    Container,
    Document,
    cluster_containers,
    compose_containers,
    containers_of,
    documents,
    faults,
    interpolated,
    of_kind,
    pod,
    variant,
    workloads,
)

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLUSTER = DEPLOY / "kubernetes"
COMPOSE = DEPLOY / "compose.yaml"
PAGE = (ROOT / "docs" / "deployment.md").read_text()
VARIANTS = ("embedded", "lorax")
NEEDED = {"SOPPU_POSTGRES_PASSWORD": "secret", "SOPPU_ADMIN_TOKEN": "token"}
# The Secrets that the page tells people to make, with their keys.
SECRETS = {
    name: set(re.findall(r"--from-literal=([\w-]+)=", rest))
    for name, rest in re.findall(r"kubectl create secret generic (\S+)(.*)", PAGE)
}


@pytest.fixture(params=VARIANTS)
def stack(request: pytest.FixtureRequest) -> list[Document]:
    return variant(CLUSTER / request.param)


@pytest.fixture(scope="module")
def compose() -> Document:
    return read_compose()


def every_container() -> dict[str, Container]:
    """Of both stacks, by a name that says which."""
    found = {f"compose: {each.where}": each for each in compose_containers(read_compose())}
    for name in VARIANTS:
        found |= {f"{name}: {each.where}": each for each in cluster_containers(variant(CLUSTER / name))}
    return found


def read_compose() -> Document:
    return dict(yaml.safe_load(interpolated(COMPOSE.read_text(), NEEDED)))


CONTAINERS = every_container()

# --- schemas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(CLUSTER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CLUSTER))
)
def test_every_document_is_valid_by_the_clusters_own_schema(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        if document["kind"] != "Kustomization":  # kubectl's own, in no cluster; `variant` reads it
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("Deployment", lambda it: it["spec"]["template"]["spec"].update(enableServiceLink=False)),
        ("StatefulSet", lambda it: it["spec"].pop("selector")),
        ("Service", lambda it: it["spec"]["ports"][0].update(port="http")),
    ],
)
def test_the_schema_refuses_what_is_misspelt_missing_or_mistyped(
    kind: str, spoil: Callable[[Document], object]
) -> None:
    document = copy.deepcopy(next(iter(of_kind(variant(CLUSTER / "embedded"), kind).values())))
    spoil(document)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_kustomize_puts_together_what_we_read(name: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip(
            "kubectl is not installed: kustomize itself was left out, its files are read by our own code"
        )
    done = subprocess.run(
        ["kubectl", "kustomize", CLUSTER / name], capture_output=True, text=True, check=True
    )
    rendered = [document for document in yaml.safe_load_all(done.stdout) if document]
    for document in rendered:
        if document["kind"] != "Namespace":
            assert document["metadata"].pop("namespace") == "soppu"
    ours = variant(CLUSTER / name)
    assert sorted(rendered, key=json.dumps) == sorted(ours, key=json.dumps)


def check(stack: Document) -> None:
    PyCompose.from_yaml(yaml.safe_dump(stack)).validate()


def test_the_compose_file_is_valid_by_the_specification(compose: Document) -> None:
    check(compose)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda it: it["services"]["worker"].update(healthchecks={}),
        lambda it: it["services"]["worker"].update(ports=["eighty:80"]),
        lambda it: it["services"]["worker"]["depends_on"]["base-model"].update(condition="ended"),
    ],
    ids=["misspelt", "mistyped", "no such condition"],
)
def test_the_specification_refuses_what_is_wrong(
    compose: Document, spoil: Callable[[Document], object]
) -> None:
    spoilt = copy.deepcopy(compose)
    spoil(spoilt)
    with pytest.raises(ValueError):
        check(spoilt)


def compose_command() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            if not subprocess.run([*command, "version"], capture_output=True, check=False).returncode:
                return command
    pytest.skip("neither docker compose nor docker-compose is installed: only the specification was checked")


def test_docker_compose_reads_the_file_and_says_which_variable_is_missing(tmp_path: Path) -> None:
    command, variables = compose_command(), tmp_path / "env"
    profiles = ["--profile", "embedded", "--profile", "lorax"]
    words = [*command, "--env-file", str(variables), "--file", str(COMPOSE), *profiles, "config"]
    variables.write_text("".join(f"{name}={value}\n" for name, value in NEEDED.items()))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services.keys() == read_compose()["services"].keys()
    assert services["worker"]["environment"]["SOPPU_ADMIN_TOKEN"] == "token"
    variables.write_text((DEPLOY / "env.example").read_text())
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode and "env.example" in done.stderr


# --- names that have to meet -----------------------------------------------------------------------------


def test_every_name_in_the_cluster_meets_its_like(stack: list[Document]) -> None:
    assert SECRETS.keys() == {"soppu", "soppu-s3"}
    assert faults(stack, SECRETS) == []


def worker(stack: list[Document]) -> Document:
    return dict(containers_of(workloads(stack)["worker"])[0])


def claim_nothing(stack: list[Document]) -> None:
    stack.remove(of_kind(stack, "PersistentVolumeClaim")["soppu"])


def configure_nothing(stack: list[Document]) -> None:
    stack.remove(of_kind(stack, "ConfigMap")["soppu-pipeline"])


def serve(stack: list[Document]) -> Document:
    return dict(of_kind(stack, "Service")["serving"]["spec"])


def spec(stack: list[Document], name: str) -> Document:
    found: Document = workloads(stack)[name]["spec"]
    return found


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda it: spec(it, "serving")["selector"]["matchLabels"].update(x="y"), "selector matches no"),
        (lambda it: serve(it)["selector"].update(x="y"), "selects 0 workloads"),
        (lambda it: serve(it)["ports"][0].update(targetPort=81), "no port 81"),
        (lambda it: spec(it, "postgres").update(serviceName="pg"), "no Service pg"),
        (lambda it: worker(it)["env"][-1]["valueFrom"]["secretKeyRef"].update(key="x"), "no soppu.x"),
        (lambda it: worker(it)["envFrom"][0]["secretRef"].update(name="s4"), "nothing is called s4"),
        (lambda it: worker(it)["livenessProbe"].update(httpGet={"port": "x"}), "probes port x"),
        (lambda it: worker(it)["volumeMounts"].pop(), "mounted nowhere"),
        (lambda it: worker(it)["volumeMounts"][0].update(name="x"), "volume x is not there"),
        (configure_nothing, "no ConfigMap soppu-pipeline"),
        (claim_nothing, "no PersistentVolumeClaim soppu"),
        (lambda it: spec(it, "worker")["template"]["spec"].pop("enableServiceLinks"), "read as settings"),
    ],
)
def test_a_name_that_meets_nothing_is_said(spoil: Callable[[list[Document]], object], said: str) -> None:
    spoilt = copy.deepcopy(variant(CLUSTER / "embedded"))
    spoil(spoilt)
    assert any(said in line for line in faults(spoilt, SECRETS)), faults(spoilt, SECRETS)


def test_compose_waits_for_services_that_can_be_waited_for(compose: Document) -> None:
    services = compose["services"]
    waited = 0
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            waited += 1
            assert not services[other].get("profiles"), f"{name} waits for {other}, which may not be up"
            if how["condition"] == "service_healthy":
                assert services[other].get("healthcheck"), (
                    f"{name} waits for {other}, which never gets healthy"
                )
            else:
                assert services[other]["restart"] == "no", f"{name} waits for the end of {other}"
    assert waited >= 5
    assert {profile for service in services.values() for profile in service.get("profiles", ())} == set(
        VARIANTS
    )


def test_compose_declares_the_volumes_and_networks_that_are_used(compose: Document) -> None:
    services = compose["services"].values()
    sources = {text.split(":")[0] for service in services for text in service.get("volumes", ())}
    assert {name for name in sources if "/" not in name} == compose["volumes"].keys()
    assert {name for service in services for name in service["networks"]} == compose["networks"].keys()
    for path in (name for name in sources if "/" in name):
        assert (DEPLOY / path).exists(), path


def test_every_variable_of_compose_is_told_and_those_without_a_default_are_empty() -> None:
    told = dict(re.findall(r"^(?:# )?([A-Z_]+)=(\S*)", (DEPLOY / "env.example").read_text(), re.M))
    text = COMPOSE.read_text()
    asked = {name: rest for name, kind, rest in re.findall(r"\$\{(\w+):([-?])([^}]*)\}", text) if kind == "-"}
    assert told.keys() == asked.keys() | NEEDED.keys() | {"COMPOSE_PROJECT_NAME"}
    assert all(told[name] == default for name, default in asked.items())
    assert not any(told[name] for name in NEEDED)
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "deploy/.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0  # passwords stay out of the repository


def test_images_are_those_that_are_built_here_or_pulled_by_their_official_names() -> None:
    script = (DEPLOY / "image.sh").read_text()
    assert "name=${1:-soppu-$kind:latest}" in script and "server | evaluator | worker) ;;" in script
    built = {"soppu-server:latest", "soppu-worker:latest"}
    postgres = {each.image for each in CONTAINERS.values() if each.image.startswith("postgres")}
    assert len(postgres) == 1
    assert {each.image for each in CONTAINERS.values()} == built | postgres | {TargetConfig().lorax_image}
    for name in built:
        assert name in (DEPLOY / "worker.Dockerfile").read_text() + PAGE


def targets() -> dict[str, dict[str, str]]:
    """Target of deploy/Dockerfile -> its USER, ENTRYPOINT and so on, or its base's; "" is the default."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    found: dict[str, dict[str, str]] = {}
    name = ""
    for word, rest in re.findall(r"^([A-Z]+) +(.*)$", text, re.M):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = dict(found.get(base, {}))
        elif name in found:
            found[name][word] = rest
    return found


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


# --- what is told where ----------------------------------------------------------------------------------


def test_deployments_are_those_of_one_machine_but_for_their_configuration() -> None:
    (here,), (contained,) = (documents(DEPLOY / f"{name}.yaml") for name in ("prefect", "prefect-container"))
    told = {item["name"]: item.pop("parameters", None) for item in contained["deployments"]}
    assert told.pop("join") is None  # of which run is for who starts it to say
    where = {json.dumps(parameters) for parameters in told.values()}
    for item in here["deployments"]:
        item.pop("parameters")
    assert here["deployments"] == contained["deployments"]
    assert here["prefect-version"] == contained["prefect-version"]
    assert where == {'{"config": "/etc/soppu/pipeline.toml"}'}
    mounts = [
        mount
        for mount in worker(variant(CLUSTER / "lorax"))["volumeMounts"]
        if mount["name"] == "configuration"
    ]
    assert mounts[0]["mountPath"] == "/etc/soppu"
    assert any(
        ":/etc/soppu/pipeline.toml:ro" in text for text in read_compose()["services"]["worker"]["volumes"]
    )
    assert f"--pool {POOL} " in (DEPLOY / "worker.sh").read_text()


def pipelines() -> dict[str, tuple[dict[str, Any], dict[str, str], str]]:
    """Variant -> (configuration as TOML has it, the server's variables, the address it has inside)."""
    compose = read_compose()
    found = {}
    for name in VARIANTS:
        stack = variant(CLUSTER / name)
        values = tomllib.loads(of_kind(stack, "ConfigMap")["soppu-pipeline"]["data"]["pipeline.toml"])
        port = of_kind(stack, "Service")["serving"]["spec"]["ports"][0]["port"]
        found[name] = (values, dict(CONTAINERS[f"{name}: serving/server"].environment), f"serving:{port}")
    service = compose["services"]["embedded"]
    (alias,) = service["networks"]["soppu"]["aliases"]
    values = tomllib.loads((ROOT / "configs" / "compose.toml").read_text())
    found["compose"] = (values, service["environment"], f"{alias}:{service['environment']['PORT']}")
    return found


@pytest.mark.parametrize("name", [*VARIANTS, "compose"])
def test_the_pipeline_is_configured_for_the_server_beside_it(name: str) -> None:
    values, variables, address = pipelines()[name]
    config: Config = configuration.from_dict(values, source=name)
    assert config.base.model == variables["MODEL_ID"]
    (target,) = config.serve.each()
    assert urlsplit(target.url).netloc == address
    assert target.lorax_image == ""  # a container starts none
    volume = target.lorax_volume
    assert volume.startswith("s3://") if name == "lorax" else volume == variables["HUGGINGFACE_HUB_CACHE"]
    assert (variables.get("DEFAULT_ADAPTER_SOURCE", "local") == "s3") == volume.startswith("s3://")
    for path in (config.runs, config.base.cache, config.registry.root, target.state):
        assert path.startswith("/soppu/"), path


def test_the_clusters_configurations_are_copies_of_that_of_compose() -> None:
    read = pipelines()
    assert read["embedded"][0] == read["compose"][0]
    own, other = (configuration.from_dict(read[name][0]) for name in ("compose", "lorax"))
    a, b = configuration.to_dict(own), configuration.to_dict(other)
    differing = {
        f"{section}.{key}"
        for section in a
        if isinstance(a[section], dict)
        for key in a[section]
        if a[section][key] != b[section][key]
    }
    assert differing == {"base.model", "serve.form", "serve.lorax_volume"}


def test_prefect_and_its_database_are_found_where_they_are(stack: list[Document], compose: Document) -> None:
    services = of_kind(stack, "Service")
    ports = {name: service["spec"]["ports"][0]["port"] for name, service in services.items()}
    for each in (*cluster_containers(stack), *compose_containers(compose)):
        if url := each.environment.get("PREFECT_API_URL"):
            parts = urlsplit(url)
            assert ports[str(parts.hostname)] == parts.port and parts.path == "/api"
            assert str(parts.hostname) in compose["services"]
        if host := each.environment.get("PREFECT_SERVER_DATABASE_HOST"):
            assert str(ports[host]) == each.environment["PREFECT_SERVER_DATABASE_PORT"]
            assert host in compose["services"]
            assert str(ports["prefect-server"]) == each.words[each.words.index("--port") + 1]


def test_probes_ask_for_routes_that_are_there(stack: list[Document]) -> None:
    routes = {operation.path for operation in OPERATIONS if operation.method == "GET"}
    health = get_current_settings().worker.webserver
    asked: dict[str, set[str]] = {}
    for name, workload in workloads(stack).items():
        for each in pod(workload)["containers"]:
            assert all(kind in each for kind in PROBES), name
            asked[name] = {each[kind].get("httpGet", {}).get("path", "") for kind in PROBES}
    assert asked["serving"] == {"/startup", "/health"} <= routes
    assert asked["prefect-server"] == {"/api/health"}
    assert asked["worker"] == {"/health"}
    assert "--with-healthcheck" in (DEPLOY / "worker.sh").read_text()
    assert worker(stack)["ports"][0]["containerPort"] == health.port


@pytest.mark.parametrize("where", [name for name, each in CONTAINERS.items() if "--grace" in each.words])
def test_the_server_is_given_the_time_its_drain_takes(where: str) -> None:
    each = CONTAINERS[where]
    drain = float(each.words[each.words.index("--grace") + 1]) + _FLUSH_SECONDS
    assert each.grace >= each.waits + drain + 2


def test_pods_of_ours_run_as_nobody_in_particular(stack: list[Document]) -> None:
    user = targets()[""]["USER"].partition(":")[0]
    for name, workload in workloads(stack).items():
        assert pod(workload)["automountServiceAccountToken"] is False
        ours = [each for each in containers_of(workload) if each["image"].startswith("soppu")]
        if ours:
            assert pod(workload)["securityContext"]["runAsNonRoot"] is True, name
            assert pod(workload)["securityContext"]["runAsUser"] == int(user), name
        for each in ours:
            rights = each["securityContext"]
            assert rights["readOnlyRootFilesystem"] and rights["capabilities"] == {"drop": ["ALL"]}, name
            assert not rights["allowPrivilegeEscalation"], name
            assert "memory" in each["resources"]["limits"] and "cpu" in each["resources"]["requests"], name


def test_no_password_stands_in_a_manifest(stack: list[Document], compose: Document) -> None:
    assert not of_kind(stack, "Secret")
    names = re.compile(r"PASSWORD|TOKEN|SECRET|KEY")
    for each in cluster_containers(stack):
        assert not [name for name, value in each.environment.items() if names.search(name) and value]
    for each in compose_containers(compose):
        given = {value for name, value in each.environment.items() if names.search(name) and value}
        assert given <= set(NEEDED.values())
