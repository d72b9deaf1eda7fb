"""Held-out losses of every user with every arm, on the gate's bench; what was measured once is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from soppu.adapter import LoraAdapter
from soppu.data import UserData, tokenize
from soppu.data.tokens import IGNORE, collate
from soppu.evaluate.losses import ExampleLosses
from soppu.federation.attach import attached
from soppu.module_names import split_layer
from soppu.progress.telling import Tell
from soppu.stages.bench import Bench
from soppu.stages.run import Run
from soppu.stages.tradeoff.arms import FOLDER, Arm, Held, digest

if TYPE_CHECKING:
    from soppu.data.tokens import Block

_ROWS = 8
# the fewest layers that a bench keeps below the adapted ones
_LEAST = 2


class Losses:
    """Measures and keeps: user -> arm's name -> the losses of each held-out block."""

    def __init__(self, run: Run, arms: Sequence[Arm], texts: Mapping[str, UserData], *, tell: Tell) -> None:
        self._run = run
        self._arms = arms
        self._texts = texts
        self._tell = tell
        self._base = run.base().hash

    def measure(self) -> dict[str, ExampleLosses]:
        """Every user with every arm. What an earlier call measured is read, arm by arm.

        Cost: one forward pass of the frozen layers a user with an arm that is new, one of the adapted ones
        for each such arm.
        """
        found = {user: self._kept(text) for user, text in self._texts.items()}
        lacking = {user: [arm for arm in self._arms if arm.what not in found[user]] for user in found}
        wanted = {user: arms for user, arms in lacking.items() if arms}
        if wanted:
            names = {arm.name for arms in wanted.values() for arm in arms}
            held = {arm.name: Held(self._run.registry(), arm) for arm in self._arms if arm.name in names}
            lowest = {name: _lowest(one) for name, one in held.items()}
            usual = min((at for at in lowest.values() if at is not None and at >= _LEAST), default=_LEAST)
            bench = Bench(self._run, layers=usual)
            for number, (user, arms) in enumerate(wanted.items(), start=1):
                pairs = {arm.name: held[arm.name].adapter(user) for arm in arms}
                below = {name for name in pairs if (at := lowest[name]) is not None and at < usual}
                measured = self._of_user(bench, self._texts[user], pairs, below)
                found[user] |= {arm.what: measured[arm.name] for arm in arms}
                self._keep(self._texts[user], found[user])
                self._tell({"note": f"losses: {user}", "share": number / len(wanted)})
        return {
            user: ExampleLosses(
                next(iter(kept.values()))[0], {arm.name: kept[arm.what][1] for arm in self._arms}
            )
            for user, kept in found.items()
        }

    def _of_user(
        self, bench: Bench, text: UserData, tried: Mapping[str, LoraAdapter | None], below: set[str]
    ) -> dict[str, _Kept]:
        usual = {name: adapter for name, adapter in tried.items() if name not in below}
        each = bench.measure(text.heldout, usual) if usual else ExampleLosses((), {})
        found = {name: (each.tokens, sums) for name, sums in each.sums.items()}
        for name in below:
            data = self._run.config.data
            blocks = tokenize(
                text.heldout, bench.tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template
            )
            found[name] = whole_losses(bench, blocks, tried[name])
        return found

    def _file(self, text: UserData) -> str:
        config = self._run.config
        # what the losses of a text follow from, beside the arm
        made_of = [text.digest(), self._base, config.frozen_dtype, config.gate.device, vars(config.data)]
        return f"{FOLDER}/losses-{digest(repr(made_of))}.json"

    def _kept(self, text: UserData) -> dict[str, _Kept]:
        kept = self._run.read(self._file(text))
        return {what: (tuple(one["tokens"]), tuple(one["sums"])) for what, one in kept.items()}

    def _keep(self, text: UserData, found: Mapping[str, _Kept]) -> None:
        values = {what: {"tokens": tokens, "sums": sums} for what, (tokens, sums) in found.items()}
        self._run.write(self._file(text), values)


_Kept = tuple[tuple[int, ...], tuple[float, ...]]  # tokens of each block, and its summed loss


@torch.no_grad()
def whole_losses(bench: Bench, blocks: Sequence[Block], adapter: LoraAdapter | None) -> _Kept:
    """Of an adapter that begins below where a bench can be cut: the whole model, block by block.

    Cost: one forward pass of all layers. Raises AdapterError for an adapter of another model.
    """
    tokens: list[int] = []
    sums: list[float] = []
    with attached(bench.model, adapter):
        for start in range(0, len(blocks), _ROWS):
            ids, mask, labels = collate(blocks[start : start + _ROWS], pad_id=bench.tokenizer.pad_token_id)
            device = bench.model.device
            logits = bench.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1]
            target = labels[:, 1:].to(device)
            each = cross_entropy(logits.mT.float(), target, ignore_index=IGNORE, reduction="none").double()
            sums += each.sum(1).tolist()
            tokens += (target != IGNORE).sum(1).tolist()
    return tuple(tokens), tuple(sums)


def _lowest(held: Held) -> int | None:
    """The lowest layer that an arm adapts; None for none."""
    layers = [parts[1] for name in held.modules() if (parts := split_layer(name))]
    return min(layers, default=None)
