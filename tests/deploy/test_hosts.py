"""A federation on machines of its own: SuperLink, four nodes, TLS, registered keys, and what can go wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from soppu import config as configuration
from soppu.federation import members
from soppu.registry import Registry
from tests.deploy.network import PYTHON, ROOT, Host, hosts, missing, until

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why := missing()), reason=f"machines of a test: {why}"),
]

LINK, USERS = "link", ("alice", "bob", "carol")
IMPOSTOR, STRANGER = (
    "dave",
    "mallory",
)  # dave is registered and says that he is alice; mallory is not registered
UIDS = {name: 61000 + n for n, name in enumerate((LINK, *USERS, IMPOSTOR, STRANGER))}
DEPLOY = ROOT / "deploy" / "federation"
PORT = "8000"
PIPELINE = """
import json, sys
from soppu.stages import compress, evaluate, federate, run as runs
say = lambda said: print(json.dumps(said), flush=True)
run = runs.prepare(sys.argv[1])
say({"run": run})
federation = federate.federate(run, on_progress=say)
chosen = federate.collect(run, federation)
bundle = compress.compress_set(run, chosen)
say({"evaluation": evaluate.evaluate(run, chosen, bundle, on_progress=say), "bundle": bundle})
"""


@dataclass(frozen=True)
class Ended:
    """The run as it ended, for tests that only look at it."""

    machines: dict[str, Host]
    nodes: dict[str, int]
    refusals: dict[str, str]
    run: Path
    registry: Path
    evaluation: dict[str, Any]

    @property
    def link(self) -> Host:
        return self.machines[LINK]

    @property
    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "federation" / "result.json").read_text()))


@pytest.fixture(scope="module")
def ended(tiny_base: Path, write_users: Callable[[Path, Mapping[str, int]], Path]) -> Iterator[Ended]:
    folder = Path(tempfile.mkdtemp(prefix="soppu-hosts-"))
    try:
        with hosts(folder, UIDS) as machines:
            base = folder / "base"
            shutil.copytree(tiny_base, base)
            for path in base.iterdir():
                path.chmod(0o644)
            for name in (*USERS, IMPOSTOR):
                give_text(machines[name], write_users)
            yield federate(machines, base, write_users(folder / "public", {"nobody": 5}))
    finally:
        shutil.rmtree(folder)


def claimed(host: Host) -> str:
    """Who a machine says it is."""
    return "alice" if host.name == IMPOSTOR else host.name


def give_text(host: Host, write_users: Callable[[Path, Mapping[str, int]], Path]) -> None:
    """A folder with the user's text that nobody but the user can read."""
    data = write_users(host.home / "text", {claimed(host): 12})
    for path in (data, *data.iterdir()):
        shutil.chown(path, host.uid, host.uid)
        path.chmod(0o700 if path.is_dir() else 0o600)


def federate(machines: dict[str, Host], base: Path, public: Path) -> Ended:
    link = machines[LINK]
    certificates = link.home / "certificates"
    link.run(str(DEPLOY / "certificates.sh"), str(certificates), link.address)
    authority = base.parent / "ca.crt"
    shutil.copy(certificates / "ca.crt", authority)
    for name in (*USERS, IMPOSTOR, STRANGER):
        make_key(machines[name])
    link.start(str(DEPLOY / "superlink.sh"), log="superlink.log", CERTIFICATES=str(certificates), PORT=PORT)
    until(
        lambda: "Uvicorn running" in link.said("superlink.log"),
        seconds=240,
        why=lambda: link.said("superlink.log"),
    )
    for host in (link, machines[STRANGER]):
        connect(host, authority, "127.0.0.1" if host is link else link.address)
    nodes = register(machines, base.parent)
    for name in (*USERS, IMPOSTOR):
        start_node(machines[name], link.address, authority, base, number=nodes[name])
    refusals = strangers(machines[STRANGER], link.address, authority)
    config = write_config(link, base, public)
    pipeline = link.start(PYTHON, "-c", PIPELINE, str(config), log="pipeline.log")
    disturb(machines, pipeline)
    assert pipeline.wait(timeout=900) == 0, trouble(machines)
    said = [json.loads(line) for line in link.said("pipeline.log").splitlines() if line.startswith("{")]
    run = Path(said[0]["run"])
    evaluation = json.loads((run / said[-1]["evaluation"]).read_text())
    return Ended(machines, nodes, refusals, run, link.home / "registry", evaluation)


def key(host: Host) -> Path:
    return host.home / "key"


def make_key(host: Host) -> None:
    """As a node's owner does it; here by root, since ssh-keygen wants its user in /etc/passwd."""
    command = [
        "ssh-keygen",
        "-q",
        "-t",
        "ecdsa",
        "-b",
        "384",
        "-N",
        "",
        "-C",
        host.name,
        "-f",
        str(key(host)),
    ]
    subprocess.run(command, check=True)
    for path in (key(host), host.home / "key.pub"):
        shutil.chown(path, host.uid, host.uid)


def connect(host: Host, authority: Path, address: str) -> None:
    """Flower's own configuration of a connection, of an operator or of somebody who would be one."""
    text = f'[superlink.ours]\naddress = "{address}:{PORT}"\nroot-certificates = "{authority}"\n'
    host.run("sh", "-c", 'mkdir -p "$FLWR_HOME" && printf %s "$1" > "$FLWR_HOME/config.toml"', "sh", text)


def register(machines: dict[str, Host], folder: Path) -> dict[str, int]:
    """As the operator does it, each key under its user's name."""
    link, table = machines[LINK], machines[LINK].home / "members.toml"
    running = []
    for name in (*USERS, IMPOSTOR):
        public = folder / f"{name}.pub"
        shutil.copy(machines[name].home / "key.pub", public)
        public.chmod(0o644)
        command = ("soppu.cli", "federation", "register", str(public), "ours", "--user", name)
        registering = (PYTHON, "-m", *command, "--members", str(table))
        running.append(link.start(*registering, log="register.log"))
    assert {process.wait(timeout=400) for process in running} == {0}, link.said("register.log")
    return {user: node for node, user in members.read(table).items()}


def start_node(host: Host, address: str, authority: Path, base: Path, *, number: int) -> None:
    """A SuperNode that something keeps alive."""
    variables = {
        "SUPERLINK": f"{address}:{PORT}",
        "CA": str(authority),
        "KEY": str(key(host)),
        "NODE": str(number),
        "USER_ID": claimed(host),
        "DATA": str(host.home / "text"),
        "CACHE": str(host.home / "models"),
        "STATE": str(host.home / "own"),
        "MODEL": str(base),
    }
    host.start(str(DEPLOY / "supernode.sh"), "forever", log="node.log", **variables)


def strangers(host: Host, address: str, authority: Path) -> dict[str, str]:
    """What somebody hears who has certificate and address, and a key that nobody registered."""
    where = ["--superlink", f"{address}:{PORT}", "--root-certificates", str(authority)]
    tried = {
        "node": ["flower-supernode", *where, "--auth-supernode-private-key", str(key(host))],
        "register": ["flwr", "supernode", "register", f"{key(host)}.pub", "ours"],
        "run": ["flwr", "run", str(ROOT), "ours"],
    }
    found = {}
    for name, command in tried.items():
        code, found[name] = host.run(*command, check=False)
        assert code != 0, name
    return found


def write_config(link: Host, base: Path, public: Path) -> Path:
    values = {
        "runs": str(link.home / "runs"),
        "base": {"model": str(base), "cache": str(link.home / "models")},
        "data": {"train_examples": 6, "heldout_examples": 2, "min_examples": 4, "max_tokens": 48},
        "plan": {"adapter_layers": 2, "drop_ratio": 0.34},
        "lora": {"rank": 2, "alpha": 4.0},
        "align": {"source": str(public), "warmup_steps": 4, "round_steps": 1, "rank": 2},
        "federation": {
            "connection": "ours",
            "members": str(link.home / "members.toml"),
            "rounds": 0,
            "personal_steps": 3,
            "batch_size": 2,
            "min_users": 2,
            "hello_timeout_s": 120,
            "round_timeout_s": 400,
            "timeout_s": 800,
        },
        "compress": {"ratio": 2.0},
        "registry": {"root": str(link.home / "registry")},
    }
    path = link.home / "hosts.toml"
    path.write_text(configuration.dump(configuration.from_dict(values)))
    path.chmod(0o644)
    return path


def disturb(machines: dict[str, Host], pipeline: subprocess.Popen[bytes]) -> None:
    """While all train, carol's node is killed, and bob's cable is out for ten seconds."""
    carol, bob = machines["carol"], machines["bob"]

    def training(host: Host) -> bool:
        assert pipeline.poll() is None, trouble(machines)
        return "Receiving: train message" in host.said("node.log")

    until(lambda: training(carol) and training(bob), seconds=2400, why=lambda: trouble(machines))
    bob.cable(plugged=False)
    node = next(
        child
        for child in psutil.Process(carol.processes[-1].pid).children(recursive=True)
        if any("flower-supernode" in word for word in child.cmdline())
    )
    node.kill()
    time.sleep(10)
    bob.cable(plugged=True)
    until(
        lambda: carol.said("node.log").count("SuperNode ID") == 2,
        seconds=240,
        why=lambda: carol.said("node.log"),
    )


def trouble(machines: dict[str, Host]) -> str:
    """The ends of all logs."""
    return "\n".join(
        f"--- {host.name} {path.name}\n{path.read_text(errors='replace')[-3000:]}"
        for host in machines.values()
        for path in sorted(host.home.glob("*.log"))
    )


def test_every_user_who_is_left_has_an_adapter(ended: Ended) -> None:
    assert set(ended.result["adapters"]) == set(USERS)
    registry = Registry.open(str(ended.registry))
    for user, adapter in ended.result["adapters"].items():
        assert user in registry.owner(adapter)


def test_nobody_trains_under_anothers_name(ended: Ended) -> None:
    assert "alice" in ended.result["refused"][IMPOSTOR]


def test_a_key_that_nobody_registered_opens_nothing(ended: Ended) -> None:
    assert "Failed to activate SuperNode" in ended.refusals["node"]
    assert all("own machine" in ended.refusals[name] for name in ("register", "run"))


def test_losses_are_measured_on_the_nodes(ended: Ended) -> None:
    assert "nodes" in ended.evaluation["measured"]
    assert {one["user"] for one in ended.evaluation["losses"]} == set(USERS)
    assert all(one["examples"] > 0 for one in ended.evaluation["losses"])


def test_no_text_was_outside_its_node(ended: Ended) -> None:
    """The files' owners see to it, and nothing of a text is found on another machine or on the wire."""
    for owner in (*USERS, IMPOSTOR):
        text = next((ended.machines[owner].home / "text").iterdir())
        secret = f"{claimed(ended.machines[owner])}-whisper".encode()
        assert secret in text.read_bytes()
        for other in ended.machines.values():
            readable = other.run("cat", str(text), check=False)[0] == 0
            assert readable == (other.name == owner), (owner, other.name)
            files = [p for p in other.home.rglob("*") if p.is_file() and p.parent.name != "text"]
            assert [p for p in files if secret in p.read_bytes()] == [], owner


def test_the_operator_sees_who_is_there_and_shuts_a_node_out(ended: Ended) -> None:
    """Last: the federation is not what it was afterwards."""
    where = ("ours", "--members", str(ended.link.home / "members.toml"))
    federation = (PYTHON, "-m", "soppu.cli", "federation")
    _, said = ended.link.run(*federation, "members", *where)
    lines = [line.split() for line in said.splitlines()]
    for user in (*USERS, IMPOSTOR):
        assert [user, str(ended.nodes[user]), "online"] in lines
    code, said = ended.link.run(*federation, "unregister", "--user", STRANGER, *where, check=False)
    assert code == 1 and "no node of user 'mallory'" in said
    ended.link.run(*federation, "unregister", "--user", IMPOSTOR, *where)
    assert IMPOSTOR not in members.read(ended.link.home / "members.toml").values()
    node = ended.machines[IMPOSTOR]
    until(
        lambda: "SuperNode terminated" in node.said("node.log"),
        seconds=240,
        why=lambda: node.said("node.log"),
    )
