"""Both stacks in containers as the repository has them: their files, containers, image targets."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.deploy.manifests import (
    Container,
    Document,
    cluster_containers,
    compose_containers,
    containers_of,
    interpolated,
    variant,
    workloads,
)

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLUSTER = DEPLOY / "kubernetes"
COMPOSE = DEPLOY / "compose.yaml"
PAGE = (ROOT / "docs" / "deployment.md").read_text()
VARIANTS = ("embedded", "lorax")
NEEDED = {"SOPPU_POSTGRES_PASSWORD": "secret", "SOPPU_ADMIN_TOKEN": "token"}


def read_compose() -> Document:
    return dict(yaml.safe_load(interpolated(COMPOSE.read_text(), NEEDED)))


def every_container() -> dict[str, Container]:
    """Of both stacks, by a name that says which."""
    found = {f"compose: {each.where}": each for each in compose_containers(read_compose())}
    for name in VARIANTS:
        found |= {f"{name}: {each.where}": each for each in cluster_containers(variant(CLUSTER / name))}
    return found


CONTAINERS = every_container()


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


def worker(stack: list[Document]) -> Document:
    return dict(containers_of(workloads(stack)["worker"])[0])
