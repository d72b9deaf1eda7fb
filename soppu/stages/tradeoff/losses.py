"""Held-out losses of every user with every arm, on the gate's bench; what was measured once is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from soppu import models
from soppu.data import UserData
from soppu.evaluate.losses import ExampleLosses
from soppu.module_names import split_layer
from soppu.progress.telling import Tell
from soppu.stages.bench import Bench
from soppu.stages.run import Run
from soppu.stages.tradeoff.arms import FOLDER, Arm, Held, digest

_LEAST = 2  # layers that a bench keeps below the adapted ones, at least


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
            bench = Bench(self._run, layers=_lowest(held.values()))
            for number, (user, arms) in enumerate(wanted.items(), start=1):
                pairs = {arm.name: held[arm.name].adapter(user) for arm in arms}
                each = bench.measure(self._texts[user].heldout, pairs)
                found[user] |= {arm.what: (each.tokens, each.sums[arm.name]) for arm in arms}
                self._keep(self._texts[user], found[user])
                self._tell({"note": f"losses: {user}", "share": number / len(wanted)})
        return {
            user: ExampleLosses(
                next(iter(kept.values()))[0], {arm.name: kept[arm.what][1] for arm in self._arms}
            )
            for user, kept in found.items()
        }

    def _file(self, text: UserData) -> str:
        config = self._run.config
        dtype = models.dtype_name(config.frozen_dtype)
        # what the losses of a text follow from, beside the arm
        made_of = [text.digest(), self._base, dtype, config.gate.device, vars(config.data)]
        return f"{FOLDER}/losses-{digest(repr(made_of))}.json"

    def _kept(self, text: UserData) -> dict[str, _Kept]:
        kept = self._run.read(self._file(text))
        return {what: (tuple(one["tokens"]), tuple(one["sums"])) for what, one in kept.items()}

    def _keep(self, text: UserData, found: Mapping[str, _Kept]) -> None:
        values = {what: {"tokens": tokens, "sums": sums} for what, (tokens, sums) in found.items()}
        self._run.write(self._file(text), values)


_Kept = tuple[tuple[int, ...], tuple[float, ...]]  # tokens of each block, and its summed loss


def _lowest(held: Iterable[Held]) -> int:
    """The lowest layer that somebody's own adapter is on: where the gate cuts, whatever else is compared."""
    layers = {
        parts[1]
        for one in held
        if one.arm.kind != "centralised"
        for name in one.modules()
        if (parts := split_layer(name))
    }
    return max(min(layers, default=_LEAST), _LEAST)
