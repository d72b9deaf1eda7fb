"""Stage: every user's held-out loss four ways, and the gate's verdict on them.

Numbers come from a `Measure`. The one here reads held-out text in the process that evaluates: in a simulation
that is the same machine; where users' text may not leave their side, name a source of consented held-out
text, and who is not in it is judged by the error of their adapter alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from soppu import models
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.config import Config
from soppu.data import Example, UserData, list_users, load_user, tokenize
from soppu.devices import torch_device
from soppu.errors import DataError
from soppu.evaluate.gate import check
from soppu.evaluate.losses import COLUMNS, CURRENT, ExampleLosses, UserLosses, example_losses
from soppu.federation import emulator
from soppu.federation.personalise import BASE
from soppu.federation.train import cache_states
from soppu.module_names import split_layer
from soppu.progress import telling
from soppu.progress.telling import Tell
from soppu.stages import elsewhere
from soppu.stages.federate import RESULT, shared_adapter
from soppu.stages.run import Run, open_run

HERE = "on the full model, here"
_log = logging.getLogger(__name__)


class Measure(Protocol):
    """A source of losses: of those among `members` (user -> adapter id) whose text it can have read."""

    def __call__(
        self, run: Run, members: Mapping[str, str], bundle_id: str, *, on_progress: Tell | None = None
    ) -> list[UserLosses]:
        """One entry a user measured; the gate lists the others."""
        ...


def evaluate(run_folder: str, set_id: str, bundle_id: str, *, on_progress: Tell | None = None) -> str:
    """Measure, judge, and write both down; returns the name of the file in the run folder."""
    run = open_run(run_folder)
    with telling.stage(run.folder, "evaluate", on_progress=on_progress) as tell:
        return _evaluate(run, set_id, bundle_id, tell)


def _evaluate(run: Run, set_id: str, bundle_id: str, tell: Tell) -> str:
    # named before text is read: were it changed meanwhile, the name would belong to the text before
    name = f"evaluation-{bundle_id[:16]}-{run.inputs('evaluate')}.json"
    registry = run.registry()
    members = registry.get_set(set_id)
    bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
    losses = source_of(run)(run, members, bundle_id, on_progress=tell)
    verdict = check(losses, bundle.report.relative_error, options=run.config.gate, seed=run.config.seed)
    run.write(
        name,
        {
            "bundle_id": bundle_id,
            "set_id": set_id,
            "adapters": members,
            "measured": elsewhere.WHERE if run.config.federation.connection else HERE,
            "losses": [item.to_dict() for item in losses],
            "verdict": verdict.to_dict(),
        },
    )
    return name


def source_of(run: Run) -> Measure:
    """Who measures for a run: the nodes of its connection, or this process, on the full model."""
    return elsewhere.measure if run.config.federation.connection else measure


def measure(
    run: Run, members: Mapping[str, str], bundle_id: str, *, on_progress: Tell | None = None
) -> list[UserLosses]:
    """Losses on the full model, of everybody whose text is at hand: of the set, and of the run's federation.

    Users of the federation who are served the base model are in no set; they are measured all the same.
    Without a federation a user's own adapter is the current one, and nothing is shared.
    """
    registry, result, shared = run.registry(), run.read(RESULT), shared_adapter(run)
    bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
    lowest = min(parts[1] for name in bundle.shapes if (parts := split_layer(name)))
    bench = _Bench(run, layers=lowest)
    own, served = {**members, **result.get("adapters", {})}, result.get("served", {})
    losses = []
    here = _with_text(run.config, own)
    for number, (user, text) in enumerate(here.items(), start=1):
        what = served.get(user, CURRENT)
        tried = {
            "personal": registry.get_adapter(own[user]),
            "shared": shared,
            "compressed": None if what == BASE else bundle.reconstruct(user),
        }
        losses.append(bench.losses(text, tried, served=what))
        if on_progress:
            on_progress({"note": f"evaluated {user}", "share": number / len(here), "user": user})
    return losses


class _Bench:
    """The full model, split where the lowest adapted layer begins."""

    def __init__(self, run: Run, *, layers: int) -> None:
        base = run.base()
        self.config = run.config
        device = torch_device(run.config.gate.device, key="gate.device")
        self.model = models.load_model(base, dtype=run.config.frozen_dtype, device=device)
        self.tokenizer = models.load_tokenizer(base)
        total = len(emulator.decoder_layers(self.model))
        self.plan = emulator.make_plan(
            self.model,
            base_hash=base.hash,
            adapter_layers=total - layers,
            drop_ratio=0.0,
            target_modules=run.config.lora.target_modules,
        )
        self.top = emulator.TopModel(self.model, self.plan)
        self.bottom = emulator.with_layers(self.model, self.plan.bottom)

    def losses(self, text: UserData, tried: Mapping[str, LoraAdapter | None], *, served: str) -> UserLosses:
        """Losses with the base model and with what is tried, by column; None there is the base model."""
        columns = [name for name in COLUMNS if name != "shared" or tried[name]]
        each = self._measure(text.heldout, {name: tried.get(name) for name in columns})
        again = {name: tried[name] for name in ("shared", "compressed")}
        # where there is little text what was trained on doubles as validation text: nothing is learnt from it
        apart = text.validation and text.validation != text.train and all(again.values())
        # no more of it than is held out: it says only which of two is better
        by = self._measure(text.validation[: len(text.heldout)], again) if apart else None
        return UserLosses(
            text.user_id,
            len(text.heldout),
            base=each.mean("base"),
            personal=each.mean("personal"),
            compressed=each.mean("compressed"),
            shared=each.mean("shared") if tried["shared"] else None,
            served=served,
            validation_shared=by.mean("shared") if by else None,
            validation_compressed=by.mean("compressed") if by else None,
            each=each,
        )

    def _measure(self, examples: Sequence[Example], tried: Mapping[str, LoraAdapter | None]) -> ExampleLosses:
        """Every example with each of the adapters. The layers below them run once."""
        data = self.config.data
        blocks = tokenize(
            examples, self.tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template
        )
        states = cache_states(self.bottom, blocks, pad_id=self.tokenizer.pad_token_id)
        found = {
            name: example_losses(self.top, self.plan, states, adapter=adapter)
            for name, adapter in tried.items()
        }
        tokens = tuple(count for _, count in next(iter(found.values())))
        return ExampleLosses(
            tokens, {name: tuple(loss for loss, _ in pairs) for name, pairs in found.items()}
        )


def _with_text(config: Config, members: Iterable[str]) -> dict[str, UserData]:
    """Text of the members who have enough of it here; the gate lists the others as unmeasured."""
    found = {}
    data = dataclasses.replace(config.data, on_small_user="leave-out")  # one user's fault is not the others'
    for user in sorted(set(data.users or list_users(data)).intersection(members)):
        try:
            found[user] = load_user(data, user)
        except DataError as error:
            _log.warning("not measured: %s", error)
    return found
