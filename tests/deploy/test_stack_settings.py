"""What each container of both stacks is told: addresses, probes, times, rights, and no password."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any
from urllib.parse import urlsplit

import pytest
from prefect.settings import get_current_settings

from deploy.stack import POOL
from soppu import config as configuration
from soppu.config import Config
from soppu.serve.api.routes import OPERATIONS
from soppu.serve.stopping import _FLUSH_SECONDS
from tests.deploy.manifests import (
    PROBES,
    Document,
    cluster_containers,
    compose_containers,
    containers_of,
    documents,
    of_kind,
    pod,
    variant,
    workloads,
)
from tests.deploy.stacks import (
    CLUSTER,
    CONTAINERS,
    DEPLOY,
    NEEDED,
    ROOT,
    VARIANTS,
    read_compose,
    targets,
    worker,
)

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time


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
