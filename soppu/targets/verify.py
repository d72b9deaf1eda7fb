"""verify: every point that a server with users' adapters can get wrong, tried from outside.

A point passes, fails, or is not applicable: then its detail says what was missing to try it. Each fault
belongs to one point: an answer that is the base model's fails `effect`, and is not held against `canary` too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError
from soppu.targets import verify_form
from soppu.targets.canary import Trace, is_close
from soppu.targets.verify_reference import Reference, has_effect
from soppu.targets.verify_server import Reply, Server

Verdict = Literal["pass", "fail", "not applicable"]
POINTS = {  # point -> what passes
    "health": "GET /health is 200",
    "info": "the server names its base model",
    "routes": "every route of LoRAX that a text model has is there",
    "base": "the base model answers, and as the one given",
    "files": "a folder holds adapter_config.json and safetensors, and nothing else that is read",
    "rank": "one rank of 8, 16, 32, 64 and 128 for the whole fleet",
    "alpha": "lora_alpha is r, and nothing else scales",
    "dtype": "float16 or bfloat16",
    "names": "tensors are named and shaped as LoRAX looks for them",
    "uniform": "every projection is on every layer",
    "base name": "the folders name the model that is served",
    "content": "a folder holds what it was named after",
    "id": "5 characters or more, printable ASCII, no comma",
    "answers": "every user is answered",
    "warm": "the first answer, which loads the adapter, comes in time",
    "header": "the answer names the adapter that was asked for",
    "effect": "no user's answer is the base model's",
    "canary": "greedy tokens and logprobs are those of base model and adapter here",
    "missing": "an adapter that is not there is refused, not answered by the base model",
    "alive": "the server is up after all of this",
    "merges": "a merge strategy that is none is refused (ends a bare LoRAX)",
    "control": "a control character in an id is refused (ends a bare LoRAX)",
    "paths": "an id that leaves its folder is refused",
    "drain": "folders are deleted only after the last request for them",
}
_ROUTES = ("generate", "generate_stream", "v1/completions", "v1/chat/completions", "tokenize")
_NOBODY = "adapters/nobody-0/0000000000000000"
_OURS = re.compile(r"[!-+\--~]{5,}")  # printable ASCII without space and comma


@dataclass(frozen=True)
class Point:
    """One line of the report."""

    name: str
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class Subject:
    """A user to try. `folder` and `adapter` are None where what is served is not at hand."""

    user: str
    adapter_id: str
    folder: Path | None = None
    adapter: Callable[[], LoraAdapter] | None = None


@dataclass(frozen=True)
class Trial:
    """What is tried, and how.

    Attributes:
        reference: the base model on this machine; without it no answer is expected.
        tolerance: how far logprobs may be off.
        dangerous: also try what ends a bare LoRAX.
    """

    server: Server
    subjects: Sequence[Subject]
    reference: Reference | None = None
    prompt: str = "The quick brown fox"
    tokens: int = 8
    tolerance: float = 0.5
    dangerous: bool = False


def verify(trial: Trial, *, progress: Callable[[int, int], None] | None = None) -> list[Point]:
    """Try every point, in the order of POINTS: one generation a user, three where it looks like the base's.

    Args:
        progress: called with (users done, users in all).

    Raises:
        BundleError: the bundle that says what is to be expected is damaged.
    """
    server = trial.server
    made = {"info": _judge([], f"{server.kind}, {server.model_id}")}
    made["health"] = _status(server.get("/health"))
    made["routes"] = _routes(server)
    base = server.ask(trial.prompt, "", tokens=trial.tokens)
    made["base"] = _base(trial, base)
    made |= _forms(trial)
    made["id"] = _ids(trial)
    if made["base"].verdict == "pass" or base.trace:
        made |= _users(trial, base, progress)
        made["missing"] = _missing(server, trial)
    made["alive"] = (
        _status(server.get("/health")) if made["health"].verdict == "pass" else _absent("see health")
    )
    made |= _dangers(trial)
    made["drain"] = _absent("who publishes sees to it; nothing shows it from outside")
    why = _absent("the base model does not answer")
    return [_named(name, made.get(name, why)) for name in POINTS]


def _users(trial: Trial, base: Reply, progress: Callable[[int, int], None] | None) -> dict[str, Point]:
    """The points that are tried for each user."""
    faults: dict[str, list[str]] = {name: [] for name in ("answers", "warm", "header", "effect", "canary")}
    slowest, tried = 0.0, 0
    for done, subject in enumerate(trial.subjects, start=1):
        reply = trial.server.ask(trial.prompt, subject.adapter_id, tokens=trial.tokens)
        if reply.status == 0 and not reply.is_late:  # it is down: `alive` says so, nobody else can be tried
            rest = _absent(f"the server went away while {subject.user} was tried: {reply.error}")
            return dict.fromkeys(faults, rest)
        slowest = max(slowest, reply.seconds)
        name = _first_fault(trial, subject, reply, base)
        for point, fault in name.items():
            faults[point].append(f"{subject.user}: {fault}")
        tried += 1
        if progress is not None:
            progress(done, len(trial.subjects))
    answered = tried - len(faults["answers"]) - len(faults["warm"])
    made = {name: _judge(found, f"{answered} users") for name, found in faults.items()}
    made["warm"] = _judge(faults["warm"], f"slowest {slowest:.2f} s")
    if trial.reference is None:
        made["canary"] = _absent("no base model to compare with: give --model")
    elif made["canary"].verdict == "pass":
        made["canary"] = _judge([], f"{answered} users, logprobs within {trial.tolerance:g}")
    if not answered:
        made |= dict.fromkeys(("header", "effect", "canary"), _absent("no user was answered"))
    return made


def _first_fault(trial: Trial, subject: Subject, reply: Reply, base: Reply) -> dict[str, str]:
    """Point -> fault of one user's answer."""
    if reply.is_late:
        return {"warm": reply.error}
    if reply.status != 200 or reply.error or not reply.trace:
        return {"answers": reply.error or "no tokens came back"}
    if not all(math.isfinite(logprob) for _, logprob in reply.trace):
        return {"answers": f"logprobs are not finite: {reply.trace}"}
    made = {}
    wanted = trial.server.named(subject.adapter_id)
    if reply.adapter_id != wanted:
        made["header"] = f"asked for {wanted!r}, answered by {reply.adapter_id!r}"
    own, fault = None, ""
    try:
        own = subject.adapter() if subject.adapter is not None else None
        if trial.reference is not None and own is not None:
            fault = trial.reference.fault(trial.prompt, reply.trace, own, tolerance=trial.tolerance)
    except AdapterError as error:
        fault = str(error)
    if (own is None or has_effect(own)) and _is_base(trial, subject, reply.trace, base.trace):
        return made | {"effect": "the answer is the base model's"}
    return made | ({"canary": fault} if fault else {})


def _is_base(trial: Trial, subject: Subject, trace: Trace, base: Trace) -> bool:
    """Whether an answer is the base model's exactly; both are asked again where rounding may hide it."""
    if trace == base or not is_close(trace, base):
        return trace == base
    again = [trial.server.ask(trial.prompt, name, tokens=trial.tokens) for name in ("", subject.adapter_id)]
    return again[0].trace == again[1].trace


def _base(trial: Trial, base: Reply) -> Point:
    if base.status != 200 or base.error:
        return _judge([base.error], "")
    if trial.reference is None:
        return _judge([], "it answers; whether it is the right one is not known without --model")
    fault = trial.reference.fault(trial.prompt, base.trace, None, tolerance=trial.tolerance)
    return _judge([fault] if fault else [], f"logprobs within {trial.tolerance:g}")


def _forms(trial: Trial) -> dict[str, Point]:
    if trial.server.kind != "lorax" and not trial.server.source:
        return dict.fromkeys(verify_form.RULES, _absent("only LoRAX reads folders by these rules"))
    folders = {one.user: one.folder for one in trial.subjects if one.folder is not None}
    if not folders:
        return dict.fromkeys(verify_form.RULES, _absent("the folders are not at hand: give --volume"))
    shapes = trial.reference.shapes if trial.reference is not None else None
    found = verify_form.check(folders, model_id=trial.server.model_id, shapes=shapes)
    return {rule: _judge(faults, f"{len(folders)} folders") for rule, faults in found.items()}


def _ids(trial: Trial) -> Point:
    if not trial.server.source:
        return _absent("this server takes users' names")
    wrong = [one.adapter_id for one in trial.subjects if not _OURS.fullmatch(one.adapter_id)]
    return _judge([f"{adapter_id!r}" for adapter_id in wrong], f"{len(trial.subjects)} ids")


def _missing(server: Server, trial: Trial) -> Point:
    reply = server.ask(trial.prompt, _NOBODY, tokens=1)
    if reply.status == 0:
        return _absent(reply.error)
    fault = f"HTTP {reply.status}, expected {server.refuses_with}"
    fault += ": the base model answers for it" if reply.status == 200 else ""
    return _judge([] if reply.status == server.refuses_with else [fault], f"HTTP {reply.status}")


def _routes(server: Server) -> Point:
    if server.kind == "vllm":
        return _absent("vLLM has routes of its own")
    replies = {f"POST /{path}": server.post(f"/{path}", {}) for path in _ROUTES}
    replies |= {"POST /": server.post("/", {}), "GET /metrics": server.get("/metrics")}
    gone = [f"{path}: HTTP {reply.status}" for path, reply in replies.items() if reply.status in (404, 405)]
    return _judge(gone, f"{len(replies)} routes")


def _dangers(trial: Trial) -> dict[str, Point]:
    """What ends a bare LoRAX, which has to stand behind something that refuses it."""
    server, names = trial.server, ("merges", "control", "paths")
    if server.kind == "vllm":
        return dict.fromkeys(names, _absent("vLLM has no such requests"))
    if not trial.dangerous:
        return dict.fromkeys(names, _absent("may end the server: give --dangerous"))
    some = trial.subjects[0].adapter_id if trial.subjects else _NOBODY
    merged = {"ids": [some], "weights": [1.0], "merge_strategy": "none-such"}
    first, slash, _ = some.partition("/")
    jump = f"{first if slash else 'x'}/../{some}"  # the same folder, by a way round
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "paths": ("/generate", {"adapter_id": jump}),
        "merges": ("/generate", {"merged_adapters": merged}),
        "control": ("/generate_stream", {"adapter_id": "adapters/a\nb"}),
    }
    made = {}
    for name, (path, parameters) in asked.items():
        reply = server.post(path, {"inputs": trial.prompt, "parameters": {"max_new_tokens": 1} | parameters})
        faults = [] if 400 <= reply.status < 500 else [reply.error or f"HTTP {reply.status}: it was answered"]
        made[name] = _judge(faults, f"HTTP {reply.status}")
        if reply.status == 0:
            break
    return dict.fromkeys(names, _absent("the server has ended before")) | made


def _status(reply: Reply) -> Point:
    return _judge([] if reply.status == 200 else [reply.error or f"HTTP {reply.status}"], "HTTP 200")


def _judge(faults: Sequence[str], detail: str) -> Point:
    """A point that fails with its first faults, or passes."""
    if not faults:
        return Point("", "pass", detail)
    more = f" (and {len(faults) - 2} more)" if len(faults) > 2 else ""
    return Point("", "fail", "; ".join(faults[:2]) + more)


def _absent(why: str) -> Point:
    return Point("", "not applicable", why)


def _named(name: str, point: Point) -> Point:
    return Point(name, point.verdict, point.detail)
