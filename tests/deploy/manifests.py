"""The manifests of both stacks as they are read, and what no schema sees in them: names that have to meet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# What kustomize does more than put files together would have to be done here as well.
_KUSTOMIZATION = {"apiVersion", "kind", "namespace", "resources", "images"}


@dataclass(frozen=True)
class Container:
    """A container of either stack."""

    where: str
    image: str
    words: tuple[str, ...]  # its command line, without what the image's entry point says
    environment: Mapping[str, str]  # variables with values; "" where a secret gives it
    grace: (
        float  # seconds between the order to stop and the end, of which `waits` go by before it hears of it
    )
    waits: float = 0.0


def documents(path: Path) -> list[Document]:
    """Every document of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def variant(folder: Path) -> list[Document]:
    """What a kustomization puts together."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    assert kustomization.keys() <= _KUSTOMIZATION, kustomization.keys() - _KUSTOMIZATION
    gathered: list[Document] = []
    for name in kustomization["resources"]:
        place = folder / name
        gathered += variant(place) if place.is_dir() else documents(place)
    return gathered


def of_kind(stack: Sequence[Document], *kinds: str) -> dict[str, Document]:
    return {document["metadata"]["name"]: document for document in stack if document["kind"] in kinds}


def workloads(stack: Sequence[Document]) -> dict[str, Document]:
    return of_kind(stack, "Deployment", "StatefulSet")


def pod(workload: Document) -> Document:
    """A workload's pod specification."""
    return dict(workload["spec"]["template"]["spec"])


def containers_of(workload: Document) -> list[Document]:
    return [*pod(workload).get("initContainers", ()), *pod(workload)["containers"]]


def cluster_containers(stack: Sequence[Document]) -> Iterator[Container]:
    for name, workload in workloads(stack).items():
        for each in containers_of(workload):
            before = (
                each.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
            )
            assert before[0] == "sleep"
            yield Container(
                where=f"{name}/{each['name']}",
                image=each["image"],
                words=(*each.get("command", ()), *each.get("args", ())),
                environment={item["name"]: item.get("value", "") for item in each.get("env", ())},
                grace=pod(workload).get("terminationGracePeriodSeconds", 30),
                waits=float(before[1]),
            )


def compose_containers(stack: Document) -> Iterator[Container]:
    for name, service in stack["services"].items():
        yield Container(
            where=name,
            image=service["image"],
            words=tuple(service.get("command", ())),
            environment={key: value or "" for key, value in service.get("environment", {}).items()},
            grace=float(service.get("stop_grace_period", "10s").removesuffix("s")),
        )


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """Compose's ${NAME:-default} and ${NAME:?message}. KeyError for one that has to be given and is not."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        return values.get(name) or (rest if kind == "-" else values[name])

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text)


def faults(stack: Sequence[Document], secrets: Mapping[str, set[str]]) -> list[str]:
    """Everything in a variant that refers to nothing; `secrets` are those that people are told to make."""
    maps = {name: set(document["data"]) for name, document in of_kind(stack, "ConfigMap").items()}
    lines = list(_services(stack))
    for name, workload in workloads(stack).items():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        if not workload["spec"]["selector"]["matchLabels"].items() <= labels.items():
            lines.append(f"{name}: its selector matches no pod of its own")
        if "serviceName" in workload["spec"] and workload["spec"]["serviceName"] not in of_kind(
            stack, "Service"
        ):
            lines.append(f"{name}: no Service {workload['spec']['serviceName']}")
        if pod(workload).get("enableServiceLinks") is not False:
            lines.append(f"{name}: variables of Services' names are read as settings")
        lines += _volumes(name, workload, maps, set(of_kind(stack, "PersistentVolumeClaim")))
        for each in containers_of(workload):
            lines += _references(f"{name}/{each['name']}", each, secrets, maps)
    return lines


def _services(stack: Sequence[Document]) -> Iterator[str]:
    for name, service in of_kind(stack, "Service").items():
        wanted = service["spec"]["selector"].items()
        behind = [
            workload
            for workload in workloads(stack).values()
            if wanted <= workload["spec"]["template"]["metadata"]["labels"].items()
        ]
        if len(behind) != 1:
            yield f"Service {name}: selects {len(behind)} workloads"
        for workload in behind:
            known = {port for each in pod(workload)["containers"] for port in _ports(each)}
            for port in service["spec"]["ports"]:
                if (target := port.get("targetPort", port["port"])) not in known:
                    yield f"Service {name}: no port {target} behind it"


def _ports(container: Document) -> set[Any]:
    return {
        value for port in container.get("ports", ()) for value in (port.get("name"), port["containerPort"])
    }


def _volumes(name: str, workload: Document, maps: Mapping[str, Any], claims: set[str]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod(workload).get("volumes", ())}
    own = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
    mounted = {mount["name"] for each in containers_of(workload) for mount in each.get("volumeMounts", ())}
    for volume in mounted ^ (own | set(volumes)):
        yield f"{name}: volume {volume} is {'not there' if volume in mounted else 'mounted nowhere'}"
    for volume in volumes.values():
        if (claim := volume.get("persistentVolumeClaim", {}).get("claimName")) and claim not in claims:
            yield f"{name}: no PersistentVolumeClaim {claim}"
        if (source := volume.get("configMap", {}).get("name")) and source not in maps:
            yield f"{name}: no ConfigMap {source}"


def _references(
    where: str, container: Document, secrets: Mapping[str, set[str]], maps: Mapping[str, set[str]]
) -> Iterator[str]:
    for probe in (container[kind] for kind in PROBES if kind in container):
        if "httpGet" in probe and probe["httpGet"]["port"] not in _ports(container):
            yield f"{where}: probes port {probe['httpGet']['port']}, which it has not"
    for kind, known in (("secretKeyRef", secrets), ("configMapKeyRef", maps)):
        for item in container.get("env", ()):
            reference = item.get("valueFrom", {}).get(kind)
            if reference and reference["key"] not in known.get(reference["name"], ()):
                yield f"{where}: {item['name']}: no {reference['name']}.{reference['key']}"
    for kind, known in (("secretRef", secrets), ("configMapRef", maps)):
        for item in container.get("envFrom", ()):
            if kind in item and item[kind]["name"] not in known:
                yield f"{where}: nothing is called {item[kind]['name']}"
