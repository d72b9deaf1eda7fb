"""RequestRouter: from a request that names a user to the arm that answers it, in a running server.

There is something to decide where a request names a user of the active bundle by their plain name. One that
names nobody is the base model's; one that names a version, or a single adapter, gets what it names.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from soppu.errors import RequestError, RouterError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.names import split_version
from soppu.serve.router import file as files
from soppu.serve.router import policies, states
from soppu.serve.router.figures import RouterFigures
from soppu.serve.router.file import RouterFile
from soppu.serve.router.measured import BASE, PERSONAL, Floats, Questions
from soppu.user_ids import spellings

_LOG = logging.getLogger(__name__)
MODES = ("off", "shadow", "ab", "on")
SPLITS = ("users", "requests")
_CONTROL = "control"
_AS_NAMED = "as named"  # what a request names answers, whatever that is


@dataclass(frozen=True)
class RouterOptions:
    """How a server routes. Nothing is read where the mode is off."""

    file: Path | None = None
    mode: str = "off"
    policy: str = ""  # "" is the file's own
    share: float = 0.5  # of users or requests that are routed in the mode ab
    split: str = "users"  # what is drawn in the mode ab
    seed: int = 0  # of that draw


@dataclass(frozen=True)
class Decision:
    """What became of a request. Where there was nothing to decide `choice` and `policy` are "": see `why`."""

    mode: str
    arm: str  # that answers
    adapter_id: str  # that the request names now
    policy: str = ""
    choice: str = ""
    why: str = ""
    seconds: float = 0.0

    @property
    def told(self) -> dict[str, str]:
        """What an answer says of it."""
        said = {"mode": self.mode, "arm": self.arm, "policy": self.policy, "choice": self.choice}
        return {name: value for name, value in {**said, "why": self.why}.items() if value}


class RequestRouter:
    """Decides request by request. Every method may be called from any thread."""

    def __init__(
        self, found: RouterFile, options: RouterOptions, *, engine: Engine, model: PreTrainedModel
    ) -> None:
        self.file, self.options = found, options
        self.figures: RouterFigures | None = None
        self._engine, self._bank = engine, engine.bank
        self._name = options.policy or found.policy
        self._policy = found.fitted(self._name)
        vectors = "vectors" in self._policy.needs
        self._pool = states.Pool(model, layers=found.layer) if vectors else None
        empty, plain = (
            engine.tokenizer("x", add_special_tokens=added)["input_ids"] for added in (True, False)
        )
        self._special = len(empty) - len(plain)

    def decide(self, request: GenerationRequest) -> Decision:
        """Which arm answers; may run the model. Never raises: the engine says what is wrong with it."""
        why = self._nothing_to_decide(request.adapter_id)
        if why:
            return self._passed(request, why)
        begun = time.perf_counter()
        try:
            expected = self._policy.expect(self._question(request))
        except RequestError:
            return self._passed(request, "refused")
        options = self.file.options
        choice = options.arms[int(policies.choose(expected, options)[0])]
        if choice.name not in (BASE, PERSONAL) and not self._served(choice.adapter_id(request.adapter_id)):
            return self._passed(request, "arm not served")
        routed = self.options.mode == "on" or (self.options.mode == "ab" and self._drawn(request))
        seconds = time.perf_counter() - begun
        decision = Decision(
            self.options.mode,
            choice.name if routed else PERSONAL,
            choice.adapter_id(request.adapter_id) if routed else request.adapter_id,
            self._name,
            choice.name,
            "" if routed or self.options.mode != "ab" else _CONTROL,
            seconds,
        )
        self._note(request, decision)
        return decision

    def _nothing_to_decide(self, adapter_id: str) -> str:
        """Why a request is not routed, "" where it is."""
        if not adapter_id:
            return "no user"
        if adapter_id in self._bank.adapters():
            return "single adapter"
        active = self._bank.active
        users = self._bank.bundles().get(active, ())
        if not any(name in users for name in spellings(adapter_id)):
            return "version named" if split_version(adapter_id)[1] else "not a user"
        return "" if active == self.file.bundle_id else "another bundle"

    def _question(self, request: GenerationRequest) -> Questions:
        """What the policy asks for, and no more."""
        needs, arms = self._policy.needs, self.file.options.arms
        vectors, reading = np.zeros((1, 0)), np.zeros((1, len(arms)))
        ids: tuple[int, ...] = ()
        if needs & {"lengths", "vectors"}:
            ids = self._engine.read(request)
        if self._pool is not None:
            limit = self.file.prompt_tokens
            special = self._special if request.add_special_tokens else 0
            vectors = self._pool(states.last(ids, special=special, limit=limit))[None]
        if "reading" in needs:
            reading = self._reading(request)
        user = next(name for name in spellings(request.adapter_id) if self._known(name))
        return Questions([user], np.array([len(ids)]), vectors, reading)

    def _known(self, name: str) -> bool:
        return name in self._bank.bundles()[self.file.bundle_id]

    def _reading(self, request: GenerationRequest) -> Floats:
        """(1, arms) nats a token of the prompt: one request an arm, side by side in the engine's batch."""
        asked = GenerationRequest(
            request.inputs,
            max_new_tokens=1,
            truncate=min(self.file.prompt_tokens, self._engine.max_input_tokens),
            add_special_tokens=request.add_special_tokens,
            prefill_details=True,
        )
        names = [arm.adapter_id(request.adapter_id) for arm in self.file.options.arms]
        rows = [self._engine.submit(replace(asked, adapter_id=name)) for name in names]
        told = [row.result()[1].prefill[1:] for row in rows]
        return np.array([[-np.mean([token.logprob or 0.0 for token in one] or [0.0]) for one in told]])

    def _served(self, adapter_id: str) -> bool:
        user, bundle_id = split_version(adapter_id)
        return user in self._bank.bundles().get(bundle_id, ())

    def _drawn(self, request: GenerationRequest) -> bool:
        """Whether a user, or a request, is among those routed: by hash, so that it stays so."""
        options = self.options
        what = request.adapter_id if options.split == "users" else f"{request.adapter_id}\0{request.inputs}"
        told = hashlib.sha256(f"{options.seed}\0{what}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(told[:8], "big") < options.share * 2**64

    def _passed(self, request: GenerationRequest, why: str) -> Decision:
        arm = BASE if not request.adapter_id else _AS_NAMED
        if self.figures:
            self.figures.passed(why)
        return Decision(self.options.mode, arm, request.adapter_id, why=why)

    def _note(self, request: GenerationRequest, decision: Decision) -> None:
        if self.figures:
            self.figures.decided(
                decision.policy,
                decision.choice,
                arm=decision.arm,
                mode=decision.mode,
                seconds=decision.seconds,
            )
        if decision.mode == "shadow":
            user, choice = request.adapter_id, decision.choice
            _LOG.info(
                "router: %s is answered by %s; %s would take %s", user, decision.arm, self._name, choice
            )


def opened(options: RouterOptions, *, engine: Engine, model: PreTrainedModel) -> RequestRouter | None:
    """The router a server was asked for; None where the mode is off.

    Raises:
        RouterError: no file is named, it cannot be read, or it is of another base model or bundle.
    """
    if options.mode == "off":
        return None
    if options.file is None:
        raise RouterError(f"router mode {options.mode!r} needs a router: --router FILE")
    found = files.read(options.file)
    check(found, engine.bank, who=str(options.file))
    return RequestRouter(found, options, engine=engine, model=model)


def check(found: RouterFile, bank: AdapterBank, *, who: str) -> None:
    """Refuse a router that was fitted on other adapters than are served. Raises RouterError."""
    if found.base_hash != bank.base.hash:
        raise RouterError(
            f"{who}: made for the base model {found.base_name} ({found.base_hash[:12]}), this server has"
            f" {bank.base.name or 'one'} ({bank.base.hash[:12]}); fit a router for it with `soppu router fit`"
        )
    if found.bundle_id != bank.active:
        active = f"bundle {bank.active[:12]} is active" if bank.active else "no bundle is active"
        raise RouterError(
            f"{who}: made for bundle {found.bundle_id[:12]}, but {active} on this server; serve that bundle"
            " (--bundle), or fit a router for this one with `soppu router fit`"
        )
