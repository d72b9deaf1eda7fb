"""Fitting a router on a finished run: prompts, what each arm makes of them, and which policy that speaks for.

Prompts are text that nobody's adapter was trained on: what is held out, then validation text. Losses are
measured where the gate measures its own, `soppu.stages.bench`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.data import IGNORE, Block, Example, tokenize
from soppu.errors import RouterError
from soppu.evaluate.losses import UserLosses, example_losses
from soppu.federation.personalise import BASE as SERVED_BASE
from soppu.federation.train import CachedBlock, cache_states
from soppu.module_names import split_layer
from soppu.progress.telling import Tell
from soppu.serve.router import crossed, states
from soppu.serve.router import file as files
from soppu.serve.router.file import RouterFile
from soppu.serve.router.measured import BASE, PERSONAL, Arm, Floats, Measured, Questions
from soppu.serve.router.policies import FITTED, NEIGHBOURS, TOLERANCE, Options
from soppu.stages import router_table
from soppu.stages.bench import Bench, with_text
from soppu.stages.run import Run, open_run

FILE = "router.json"
CHEAPER = "cheaper"


@dataclass(frozen=True)
class FitOptions:
    """What a fit is asked for; `policy` "" leaves the choice to cross-validation."""

    prompts: int = 48  # of a user, at most
    neighbours: int = NEIGHBOURS
    tolerance: float = TOLERANCE
    policy: str = ""
    cheaper: Path | None = None  # another bundle of the same users, as a third arm
    folds: int = crossed.FOLDS


@dataclass(eq=False)
class _Columns:
    """Prompts as they are measured, one entry each."""

    users: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    vectors: list[Floats] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    reading: list[list[float]] = field(default_factory=list)

    def measured(self) -> Measured:
        numbers = np.array(self.lengths), np.stack(self.vectors), np.array(self.reading)
        asked = Questions(self.users, *numbers)
        return Measured(asked, self.digests, np.array(self.tokens), np.array(self.losses))


def fit(
    run_folder: str, path: Path, options: FitOptions | None = None, *, on_progress: Tell | None = None
) -> RouterFile:
    """Measure, judge by cross-validation, and write the router; gives what was written.

    Cost: one forward of the lower layers over every prompt, and two of the upper ones for each arm.

    Raises:
        RouterError: the run has no evaluation, or no user of its bundle has prompts here.
        ConfigError, BundleError: the folder is none of a run, or a bundle is gone, damaged or another's.
    """
    options = options or FitOptions()
    run = open_run(run_folder)
    evaluation = newest_evaluation(run)
    bundle_id = str(evaluation["bundle_id"])
    bundle = Bundle.load(run.registry().bundle_path(bundle_id), expected_hash=bundle_id)
    forms = {PERSONAL: bundle} | ({CHEAPER: Bundle.load(options.cheaper)} if options.cheaper else {})
    arms = _arms(forms, options)
    layers = min(parts[1] for name in bundle.shapes if (parts := split_layer(name)))
    measured = _measure(Bench(run, layers=layers), forms, options, on_progress=on_progress)
    chosen = Options(arms, options.neighbours, options.tolerance, _prior(evaluation, bundle, arms))
    table = router_table.rows(measured, chosen, folds=options.folds, seed=run.config.seed)
    policy, why = router_table.verdict(table)
    base = run.base()
    found = RouterFile(
        base_name=base.name,
        base_hash=base.hash,
        bundle_id=bundle_id,
        run=run.id,
        layer=layers,
        prompt_tokens=run.config.data.max_tokens // 2,
        policy=_known(options.policy) or policy,
        why="asked for" if options.policy else why,
        prior_from=str(evaluation["name"]) if chosen.prior else "the prompts",
        options=chosen,
        measured=measured,
        table=tuple(table),
    )
    return dataclasses.replace(found, id=files.write(path, found))


def newest_evaluation(run: Run) -> dict[str, Any]:
    """The evaluation that a run wrote last, with its `name`. RouterError where there is none."""
    name = run.newest_evaluation()
    if not name:
        raise RouterError(
            f"{run.folder}: holds no evaluation-*.json; a router is fitted on a run whose bundle was judged"
        )
    try:
        return {**run.read(name), "name": name}
    except ValueError as error:
        raise RouterError(f"{run.folder / name}: not JSON: {error}; evaluate the run again") from None


def _known(policy: str) -> str:
    if policy and policy not in FITTED:
        raise RouterError(f"router policy {policy!r}, allowed: {', '.join(FITTED)}")
    return policy


def _arms(forms: Mapping[str, Bundle], options: FitOptions) -> list[Arm]:
    """Base and what the bundles hold. `bytes`: of a user's own numbers, which is all that they have alone."""
    arms = [Arm(BASE, "", 0.0)]
    for name, bundle in forms.items():
        own = sum(len(page.data) for page in bundle.pages) / len(bundle.users)
        adapter = "{user}"
        if name == CHEAPER and options.cheaper:
            adapter = "{user}@" + hashlib.sha256(options.cheaper.read_bytes()).hexdigest()
        arms.append(Arm(name, adapter, own))
    return arms


def _prior(evaluation: Mapping[str, Any], bundle: Bundle, arms: Sequence[Arm]) -> dict[str, Sequence[float]]:
    """Nats a token of every user of the bundle that the run's own evaluation has; it knows two arms."""
    if len(arms) > 2:
        return {}
    losses = [UserLosses.from_dict(item) for item in evaluation["losses"]]
    there = set(bundle.users)
    return {
        item.user: (item.base, item.compressed)
        for item in losses
        if item.user in there and item.served != SERVED_BASE
    }


def _measure(
    bench: Bench, forms: Mapping[str, Bundle], options: FitOptions, *, on_progress: Tell | None
) -> Measured:
    data = dataclasses.replace(
        bench.config.data, heldout_examples=options.prompts, validation_examples=options.prompts
    )
    members = set.intersection(*(set(bundle.users) for bundle in forms.values()))
    trained = {user: text.train for user, text in with_text(bench.config, members).items()}
    texts = with_text(dataclasses.replace(bench.config, data=data), trained)
    columns = _Columns()
    for number, (user, text) in enumerate(texts.items(), start=1):
        seen = set(trained[user])
        untrained = [item for item in dict.fromkeys((*text.heldout, *text.validation)) if item not in seen]
        tried = {name: bundle.reconstruct(user) for name, bundle in forms.items()}
        _add(columns, bench, user, untrained[: options.prompts], tried)
        if on_progress:
            on_progress({"note": f"measuring {user}", "share": number / len(texts), "user": user})
    if len(set(columns.digests)) < 2:
        raise RouterError(
            f"{len(columns.digests)} prompts of {len(texts)} users, needed: two different ones; text without"
            " a prompt (plain text) says nothing of what would be asked"
        )
    return columns.measured()


def _add(
    columns: _Columns, bench: Bench, user: str, examples: Sequence[Example], tried: Mapping[str, LoraAdapter]
) -> None:
    """Measure a user's prompts under every arm."""
    data, tokenizer = bench.config.data, bench.tokenizer
    blocks, lengths = [], []
    for item in examples:
        block = tokenize([item], tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template)[0]
        if not item.plain and _read(block):
            blocks.append(block)
            lengths.append(len(tokenizer.encode(item.prompt)) if item.prompt else _read(block))
    if not blocks:
        return
    cached = cache_states(bench.bottom, blocks, pad_id=tokenizer.pad_token_id)
    prompts = [
        CachedBlock(held.states[: _read(block)], block.ids[: _read(block)])
        for held, block in zip(cached, blocks, strict=True)
    ]
    adapters = [None, *tried.values()]
    losses, reading = (
        [example_losses(bench.top, bench.plan, part, adapter=one) for one in adapters]
        for part in (cached, prompts)
    )
    columns.users += [user] * len(blocks)
    columns.lengths += lengths
    columns.digests += [hashlib.sha256(str(held.labels.tolist()).encode()).hexdigest() for held in prompts]
    columns.vectors += [states.pooled(held.states) for held in prompts]
    columns.tokens += [count for _, count in losses[0]]
    columns.losses += [[arm[place][0] for arm in losses] for place in range(len(blocks))]
    columns.reading += [[arm[n][0] / max(arm[n][1], 1) for arm in reading] for n in range(len(blocks))]


def _read(block: Block) -> int:
    """Tokens before the first that is learned: the prompt."""
    return int((block.labels != IGNORE).int().argmax())
