"""What the page on operating a gateway says of its settings is so, and what is shipped can be read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from soppu.gateway import settings as gateway_settings
from soppu.gateway.settings import GatewaySettings, Target
from tests.soppu.gateway.attempts import ATTEMPTS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "operate.md").read_text()
SHIPPED = ROOT / "deploy" / "gateway.toml"


def keys(values: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every key with its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            found |= keys(value, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = value
    return found


def test_every_setting_is_on_the_page_and_nothing_else() -> None:
    table = PAGE.split("## Settings")[1].split("\n\n")[2]
    told = set(
        re.findall(
            r"`((?:registry|targets|tls|jwt|limits)\.\w+|[a-z_]+)`",
            "".join(row.split("|")[1] for row in table.splitlines()),
        )
    )
    known = set(keys(GatewaySettings()))
    known |= {f"targets.{field.name}" for field in dataclasses.fields(Target)} | {"registry.create"}
    assert told | {"registry.create"} == known


def test_defaults_on_the_page_are_the_defaults() -> None:
    default = keys(GatewaySettings())
    for row in re.findall(
        r"^\| (`[^|]+) \| ([^|]+) \|", PAGE.split("## Settings")[1].split("\n## ")[0], re.M
    ):
        names = re.findall(r"`([\w.]+)`", row[0])
        values = [value.strip().strip("`") for value in row[1].split(",")]
        for name, value in zip(names, values, strict=False):
            if value in ("", "none") or name.startswith(("targets", "registry", "jwt.algorithms")):
                continue
            told = {"1 MiB": 1 << 20, "false": False}.get(value, value)
            assert str(default[name]).removesuffix(".0") == str(told), name


def test_what_is_shipped_is_read_and_the_cluster_has_the_same() -> None:
    gateway_settings.load(SHIPPED)
    manifest = (ROOT / "deploy" / "kubernetes" / "base" / "gateway.yaml").read_text()
    (held,) = [one for one in yaml.safe_load_all(manifest) if one["kind"] == "ConfigMap"]
    assert held["data"]["gateway.toml"] == SHIPPED.read_text()


def test_the_page_counts_attempts_as_there_are() -> None:
    assert "more than a hundred requests" in PAGE and len(ATTEMPTS) > 100


def test_nothing_but_the_gateway_and_prefect_is_open_to_the_outside() -> None:
    """The servers trust names: in compose they publish no port, in the cluster a policy is on them."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert {name for name, one in compose["services"].items() if one.get("ports")} == {
        "gateway",
        "prefect-server",
    }
    for folder in ("base", "embedded", "lorax"):
        for path in (ROOT / "deploy" / "kubernetes" / folder).glob("*.yaml"):
            for one in yaml.safe_load_all(path.read_text()):
                if one["kind"] == "Service":
                    assert one["spec"].get("type", "ClusterIP") == "ClusterIP"
                if one["kind"] == "NetworkPolicy":
                    assert one["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "serving"}
                    assert one["spec"]["policyTypes"] == ["Ingress"]
                    (rule,) = one["spec"]["ingress"]
                    (peer,) = rule["from"]
                    (chosen,) = peer["podSelector"]["matchExpressions"]
                    assert chosen["values"] == ["gateway", "worker"]
