"""Stage: a new user joins a published fleet: a core is trained in its basis, judged, stored, published.

The user's text is read here and nowhere else. Everybody else's bytes in the bundle stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

from soppu import files
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle, joining
from soppu.config import TargetConfig
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import MOST_OWN, CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.data import UserData, load_user
from soppu.errors import BundleError, ConfigError, DataError, GateError
from soppu.evaluate.gate import Verdict, check
from soppu.evaluate.losses import COLUMNS, UserLosses
from soppu.federation.attach import initial_pairs
from soppu.federation.personalise import PERSONAL, Personal, SearchOptions, personalise
from soppu.federation.train import Training, TrainOptions, mean_loss
from soppu.module_names import split_layer
from soppu.progress.telling import Tell
from soppu.stages import join_rules
from soppu.stages.bench import Bench
from soppu.stages.federate import shared_adapter
from soppu.stages.history import refuse_forgotten
from soppu.stages.publish import publish
from soppu.stages.run import Run, open_run
from soppu.stages.targets import open_target, target_settings
from soppu.stages.tradeoff.judge import RULES, unheard
from soppu.user_ids import ALLOWED, is_id

_LOCK = ".join.lock"


@dataclass(frozen=True)
class Newcomer:
    """Who joins, with what, and where they are served."""

    user: str
    file: str  # their text, in any format and layout of `soppu.data`
    own_rank: int = 0  # beside the core, in every module
    target: str = ""  # a serving target of the run; "" is its first
    waive_rules: bool = False  # those of the gate on arms that one user alone has no figure of


@dataclass
class Joined:
    """What came of it; `seconds` has the clock of each part, in order."""

    user: str
    bundle_id: str = ""
    core_id: str = ""
    basis_id: str = ""
    url: str = ""
    steps: int = 0
    numbers: int = 0  # that were trained
    added: int = 0  # bytes of the user's page
    losses: dict[str, float] = field(default_factory=dict)  # held out, nats a token, by arm
    first_token: str = ""
    rules: dict[str, str] = field(default_factory=dict)  # of `gate.rules`: judged, or waived
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Note how long a part takes."""
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started


def join(run_folder: str, newcomer: Newcomer, *, on_progress: Tell | None = None) -> Joined:
    """Train a user's core in the basis of a run's bundle, and serve it. Returns what came of it.

    The bundle is what the run serves at the target, or else, where nothing is live there, what it evaluated
    last. One join of a run at a time stores and publishes; training is done beside. Beside the training it
    costs O(bundle), read twice and written once.

    Raises:
        ConfigError: the run has no bundle yet, or `own_rank` is out of its range.
        BundleError: the user is in the bundle already, its users share no basis, another run's is live, or
            another one went live meanwhile.
        DataError: the user's id is none, or the text cannot be read, or is too little.
        GateError: on held-out text the core is worse than the shared adapter or the base model, or breaks
            a rule of the run's gate, or the gate has refused the bundle, or has a rule on arms that one user
            has no figure of; nothing was stored or published.
        TargetError: the server refused; what was published before goes on being served.
    """
    if not 0 <= newcomer.own_rank <= MOST_OWN:
        raise ConfigError(f"own_rank = {newcomer.own_rank}, allowed: 0 to {MOST_OWN}")
    if not is_id(newcomer.user):
        raise DataError(f"user id {newcomer.user!r}, allowed: {ALLOWED}")
    run = open_run(run_folder)
    at = _At(run, target_settings(run, newcomer.target), on_progress or (lambda _: None))
    shared = shared_adapter(run)
    rules = join_rules.heard(run.config, shared=shared is not None, waive=newcomer.waive_rules)
    joined = Joined(newcomer.user, rules=rules)
    with joined.clock("text and bundle"):
        basis = joining.basis_of(_bundle(at, newcomer.user))
        text = _text(run, newcomer)
    at.tell({"note": "loading the base model", "share": 0.05})
    with joined.clock("base model"):
        bench = Bench(run, layers=min(split[1] for name in basis.sides if (split := split_layer(name))))
        ground = _Ground(bench, text, shared)
    at.tell({"note": f"training in {basis.id}", "share": 0.15})
    with joined.clock("training"):
        best = _trained(ground, _start(run, basis, ground.shared, newcomer))
    joined.steps, joined.numbers = best.steps, best.adapter.core.parameters()
    with files.exclusive(run.folder / _LOCK):
        _admit(at, ground, best.adapter, joined)
    at.tell({"note": "asking for the first token", "share": 0.95})
    with joined.clock("first token"):
        _first_token(at, joined)
    found = {name: getattr(joined, name) for name in ("url", "first_token", "seconds")}
    run.write(_file(joined), run.read(_file(joined)) | found)
    at.tell({"note": f"{newcomer.user} is served", "share": 1.0})
    return joined


@dataclass(frozen=True)
class _At:
    """The run and the target, and who is told how far it is."""

    run: Run
    settings: TargetConfig
    tell: Tell


@dataclass(frozen=True)
class _Ground:
    """What a newcomer is trained and measured on."""

    bench: Bench
    text: UserData
    shared: LoraAdapter | None


def _file(joined: Joined) -> str:
    return f"join-{joined.user}-{joined.core_id}.json"


def _bundle(at: _At, user: str) -> Bundle:
    """What the run serves there, or would; refused if the user is in it, or somebody was forgotten."""
    registry = at.run.registry()
    bundle_id = _live(at) or _evaluated(at.run)
    refuse_forgotten(registry, bundle_id)
    bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
    if user in bundle.users:
        raise BundleError(f"user {user!r} is in bundle {bundle_id[:12]} already: they are served")
    return bundle


def _live(at: _At) -> str:
    """What is live at the target, "" for nothing. BundleError if it is another run's."""
    run, registry, url = at.run, at.run.registry(), at.settings.url
    live = registry.live(url)
    if not live or (owner := registry.bundle(live).run) == run.id:
        return live
    newest = run.newest_evaluation()
    if newest and run.read(newest)["bundle_id"] == live:  # two runs have come to the same bytes
        return live
    raise BundleError(
        f"{url} serves bundle {live[:12]} of run {owner!r}, not of {run.id!r}: a join here would take it from"
        " its users; name that run, or publish a bundle of this one first"
    )


def _evaluated(run: Run) -> str:
    """What the run evaluated last. ConfigError if there is none, GateError if it was not to be published."""
    newest = run.newest_evaluation()
    if not newest:
        raise ConfigError(f"{run.folder}: the run has no bundle yet; let `soppu run` come to its end")
    told = run.read(newest)
    Verdict.from_dict(told["verdict"]).raise_if_refused()
    if rules := unheard(run, newest):
        raise GateError(rules)
    return str(told["bundle_id"])


def _text(run: Run, newcomer: Newcomer) -> UserData:
    """The newcomer's text in its three parts, split as everybody's is."""
    data = replace(run.config.data, source=newcomer.file, users=(newcomer.user,), on_small_user="error")
    return load_user(data, newcomer.user)


def _start(run: Run, basis: CoreBasis, shared: LoraAdapter | None, newcomer: Newcomer) -> CoreInBasis:
    """Where training begins: at the shared adapter, as far as the basis can tell it, or at nothing."""
    core = from_lora(shared, basis, who="the shared adapter").core if shared else cores.zero(basis)
    if newcomer.own_rank:
        own = initial_pairs(basis.module_shapes(), rank=newcomer.own_rank, seed=run.config.seed)
        core = replace(core, own=own)
    return CoreInBasis(core, basis, who=newcomer.user)


def _trained(ground: _Ground, start: CoreInBasis) -> Personal[CoreInBasis]:
    """The best core on the user's validation text, found as a federation's client finds an adapter."""
    bench, config = ground.bench, ground.bench.config
    states, validation = (bench.states(part) for part in (ground.text.train, ground.text.validation))

    def begin(rate: float) -> Training[CoreInBasis]:
        options = TrainOptions.of(config, learning_rate=rate, seed=config.seed)
        return Training(bench.top, bench.plan, states, start=start, options=options)

    def measure(placed: CoreInBasis | None) -> float:
        return mean_loss(bench.top, bench.plan, validation, adapter=placed.to_lora() if placed else None)

    search = SearchOptions.of(config.federation)
    return personalise(begin, measure, start=start, search=search)


def _admit(at: _At, ground: _Ground, placed: CoreInBasis, joined: Joined) -> None:
    """Judge the core as a row of the bundle that is newest now, then store and publish that."""
    run, registry, user = at.run, at.run.registry(), joined.user
    live, before = _live(at), _bundle(at, user)
    made = joining.join(before, user, placed)
    joined.core_id, joined.basis_id, joined.added = placed.core.id, placed.basis.id, made.added
    at.tell({"note": "measuring on held-out text", "share": 0.6})
    with joined.clock("check"):
        losses, verdict = _judged(ground, placed.to_lora(), made, rules=joined.rules)
    joined.losses = {name: getattr(losses, name) for name in COLUMNS if getattr(losses, name) is not None}
    verdict.raise_if_refused()
    if (now := _live(at)) != live:
        raise BundleError(
            f"bundle {now[:12]} went live at {at.settings.url} meanwhile; join that: start again"
        )
    with joined.clock("store"):
        registry.put_basis(placed.basis)
        own = registry.put_adapter(placed.core, user=user, run=run.id)
        members = dict(zip((*before.users, user), (*before.adapter_ids, own), strict=True))
        set_id = registry.freeze(members)
        joined.bundle_id = registry.put_bundle(made.bundle.to_bytes(), set_id=set_id, run=run.id)
    told = asdict(joined) | {RULES: joined.rules, "set_id": set_id}
    told |= {"losses": [losses.to_dict()], "verdict": verdict.to_dict()}
    run.write(_file(joined), told)
    at.tell({"note": f"publishing to {at.settings.url}", "share": 0.7})
    with joined.clock("publication"):
        changed = (user,) if live else ()  # else nobody has been asked there yet
        joined.url = publish(
            str(run.folder), joined.bundle_id, _file(joined), at.settings.label, changed=changed
        )


def _judged(
    ground: _Ground, lora: LoraAdapter, made: joining.Joined, *, rules: Mapping[str, str]
) -> tuple[UserLosses, Verdict]:
    """Held-out losses of the arms, and the verdict on the user as stored: the gate's, and `join_rules`."""
    bench, user = ground.bench, ground.text.user_id
    tried = {"personal": lora, "shared": ground.shared, "compressed": made.bundle.reconstruct(user)}
    losses = bench.losses(ground.text, tried, served=PERSONAL)
    verdict = check([losses], {user: made.error}, bench.config.gate, seed=bench.config.seed)
    reasons = (*verdict.reasons, *join_rules.broken(losses, bench.config, rules))
    return losses, replace(verdict, passed=not reasons, reasons=reasons)


def _first_token(at: _At, joined: Joined) -> None:
    target = open_target(at.run, at.settings)
    asked_as = target.placements(joined.bundle_id).get(joined.user, joined.user)
    joined.first_token = target.complete(at.settings.canary_prompt, user=asked_as, max_new_tokens=1)
