"""Both stacks in containers: valid by their schemas, and every name meets its like."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from tests.deploy.manifests import Document, documents, faults, of_kind, variant, workloads
from tests.deploy.stacks import CLUSTER, COMPOSE, DEPLOY, NEEDED, PAGE, ROOT, VARIANTS, read_compose, worker

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

# The Secrets that the page tells people to make, with their keys.
SECRETS = {
    name: set(re.findall(r"--from-literal=([\w-]+)=", rest))
    for name, rest in re.findall(r"kubectl create secret generic (\S+)(.*)", PAGE)
}


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
