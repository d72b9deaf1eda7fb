"""Stage: every user's held-out loss four ways, and the gate's verdict on them.

Held-out text is read here, in the process that evaluates. In a simulation that is the same machine; where
users' text may not leave their side, name a source of consented held-out text, and who is not in it is
judged by the error of their adapter alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from soppu import adapter as adapters
from soppu import models
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.config import Config
from soppu.data import Example, list_users, load_user, tokenize
from soppu.devices import torch_device
from soppu.errors import DataError
from soppu.evaluate.gate import check
from soppu.evaluate.losses import UserLosses
from soppu.federation import emulator
from soppu.federation.personalise import BASE, PERSONAL, SHARED
from soppu.federation.train import cache_states, mean_loss
from soppu.module_names import split_layer
from soppu.stages import elsewhere
from soppu.stages.federate import RESULT
from soppu.stages.run import FEDERATION, Run, open_run

COMPRESSED = "compressed"
HERE = "on the full model, here"
_log = logging.getLogger(__name__)


def evaluate(
    run_folder: str,
    set_id: str,
    bundle_id: str,
    *,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> str:
    """Measure, judge, and write both down; returns the name of the file in the run folder."""
    run = open_run(run_folder)
    # named before text is read: were it changed meanwhile, the name would belong to the text before
    name = f"evaluation-{bundle_id[:16]}-{run.inputs('evaluate')}.json"
    registry = run.registry()
    members = registry.get_set(set_id)
    bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
    losses = (elsewhere.measure if run.config.federation.connection else measure)(
        run, members, bundle_id, on_progress=on_progress
    )
    verdict = check(losses, bundle.report.relative_error, options=run.config.gate)
    run.write(
        name,
        {
            "bundle_id": bundle_id,
            "set_id": set_id,
            "adapters": members,
            "measured": elsewhere.WHERE if run.config.federation.connection else HERE,
            "losses": [dataclasses.asdict(item) for item in losses],
            "verdict": verdict.to_dict(),
        },
    )
    return name


def measure(
    run: Run,
    members: Mapping[str, str],
    bundle_id: str,
    *,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[UserLosses]:
    """Losses on the full model, here, of everybody whose held-out text is at hand."""
    registry = run.registry()
    bundle = Bundle.load(registry.bundle_path(bundle_id), expected_hash=bundle_id)
    lowest = min(parts[1] for name in bundle.shapes if (parts := split_layer(name)))
    bench = _Bench(run, layers=lowest)
    losses = []
    measured = _with_text(run.config, {**members, **run.read(RESULT).get("adapters", {})})
    result = run.read(RESULT)
    own, served = result.get("adapters", {}), result.get("served", {})
    shared = adapters.read(run.folder / FEDERATION / result["shared"]) if result else None
    for number, (user, heldout) in enumerate(measured.items(), start=1):
        what = served.get(user, PERSONAL)
        tried = {
            PERSONAL: registry.get_adapter(own.get(user, members.get(user))),
            SHARED: shared,
            COMPRESSED: bundle.reconstruct(user) if what != BASE else None,
        }
        losses.append(bench.losses(user, heldout, tried, served=what))
        if on_progress:
            on_progress({"note": f"evaluating {user}", "share": number / len(measured)})
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

    def losses(
        self, user: str, held: Sequence[Example], tried: Mapping[str, LoraAdapter | None], *, served: str
    ) -> UserLosses:
        """Losses with the base model, and with the adapters given; None measures the base model."""
        data = self.config.data
        blocks = tokenize(held, self.tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template)
        states = cache_states(self.bottom, blocks, pad_id=self.tokenizer.pad_token_id)
        base, personal, shared, compressed = (
            mean_loss(self.top, self.plan, states, adapter=adapter)
            for adapter in (None, *(tried[name] for name in (PERSONAL, SHARED, COMPRESSED)))
        )
        common = shared if tried[SHARED] else None
        return UserLosses(user, len(held), base, personal, compressed, shared=common, served=served)


def _with_text(config: Config, members: Iterable[str]) -> dict[str, tuple[Example, ...]]:
    """Held-out text of the members who have enough of it here; the gate lists the others as unmeasured."""
    found = {}
    data = dataclasses.replace(config.data, on_small_user="leave-out")  # one user's fault is not the others'
    for user in sorted(set(data.users or list_users(data)).intersection(members)):
        try:
            found[user] = load_user(data, user).heldout
        except DataError as error:
            _log.warning("not measured: %s", error)
    return found
