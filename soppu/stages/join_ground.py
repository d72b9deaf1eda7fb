"""What a newcomer is trained and judged on: the full model, and their text behind its frozen part, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from soppu.adapter import LoraAdapter
from soppu.config import Config
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.data import UserData, load_user
from soppu.evaluate.gate import Verdict, check
from soppu.evaluate.losses import UserLosses
from soppu.federation import wire_core
from soppu.federation.attach import initial_pairs
from soppu.federation.personalise import PERSONAL, Personal, SearchOptions, personalise
from soppu.federation.train import Training, TrainOptions, mean_loss
from soppu.module_names import lowest_layer
from soppu.progress.telling import Tell
from soppu.stages import join_rules
from soppu.stages.bench import Bench
from soppu.stages.joined import Joined, Newcomer
from soppu.stages.run import Run


@dataclass(frozen=True)
class Ground:
    """The bench, a newcomer's text, and the shared adapter of the run, where it has one."""

    bench: Bench
    text: UserData
    shared: LoraAdapter | None

    @classmethod
    def of(
        cls, run: Run, text: UserData, bases: Sequence[CoreBasis], *, shared: LoraAdapter | None
    ) -> Ground:
        """Loads the base model, cut where the lowest module of the bases lies."""
        lowest = lowest_layer(name for basis in bases for name in basis.sides)
        return cls(Bench(run, layers=lowest, keep=True), text, shared)

    def best_basis(self, bases: Sequence[CoreBasis], *, own_rank: int) -> int:
        """Which of some bases the user's validation text is best in, at the first look of a training in each.

        O(bases) short trainings; none where there is one basis.
        """
        if len(bases) == 1:
            return 0
        search = SearchOptions.of(self.bench.config.federation)
        once = replace(search, learning_rates=search.learning_rates[:1], steps=search.check_every, shares=())
        losses = [self.trained(basis, own_rank=own_rank, search=once).personal for basis in bases]
        return min(range(len(bases)), key=losses.__getitem__)

    def trained(
        self, basis: CoreBasis, *, own_rank: int, search: SearchOptions | None = None
    ) -> Personal[CoreInBasis]:
        """The best core on the user's validation text, found as a federation's client finds an adapter."""
        bench, config = self.bench, self.bench.config
        start = self._start(self._trained_in(basis), own_rank)
        states, validation = bench.states(self.text.train), bench.states(self.text.validation)

        def begin(rate: float) -> Training[CoreInBasis]:
            options = TrainOptions.of(config, learning_rate=rate, seed=config.seed)
            return Training(bench.trains, bench.plan, states, start=start, options=options)

        def measure(placed: CoreInBasis | None) -> float:
            return mean_loss(
                bench.trains, bench.plan, validation, adapter=placed.to_lora() if placed else None
            )

        search = search or SearchOptions.of(config.federation)
        best = personalise(begin, measure, start=start, search=search)
        core = replace(best.adapter.core, basis_id=basis.id)
        return replace(best, adapter=CoreInBasis(core, basis, who=self.text.user_id))

    def _trained_in(self, basis: CoreBasis) -> CoreBasis:
        """The basis, of which nothing is in common where nobody says what that would come to."""
        return basis if self.shared else replace(basis, common=0)

    def _start(self, basis: CoreBasis, own_rank: int) -> CoreInBasis:
        """Where training begins: at the shared adapter, as far as the basis can tell it, or at nothing."""
        core = (
            from_lora(self.shared, basis, who="the shared adapter").core if self.shared else cores.zero(basis)
        )
        if own_rank:
            own = initial_pairs(basis.module_shapes(), rank=own_rank, seed=self.bench.config.seed)
            core = replace(core, own=own)
        return CoreInBasis(core, basis, who=self.text.user_id)

    def core(self, joined: Joined, bases: Sequence[CoreBasis], *, tell: Tell) -> CoreInBasis:
        """The core of a join, trained in the best of some bases; `joined` gets how, and the clock."""
        tell({"note": f"{len(self.text.train)} examples through the frozen layers", "share": 0.1})
        with joined.clock("frozen layers"):
            self.bench.states(self.text.examples)
        if len(bases) > 1:
            tell({"note": f"looking for the best of {len(bases)} bases", "share": 0.15})
            with joined.clock("choice of a basis"):
                joined.cluster = self.best_basis(bases, own_rank=joined.own_rank)
        basis = bases[joined.cluster]
        tell({"note": f"training in {basis.id}", "share": 0.2})
        with joined.clock("training"):
            best = self.trained(basis, own_rank=joined.own_rank)
        joined.steps = best.steps
        joined.numbers = wire_core.numbers(self._trained_in(basis), own_rank=joined.own_rank)
        tell({"note": "measuring on held-out text", "share": 0.6})
        return best.adapter

    def judged(
        self, lora: LoraAdapter, stored: LoraAdapter, *, error: float, rules: Mapping[str, str]
    ) -> tuple[UserLosses, Verdict]:
        """Held-out losses of the arms; the verdict on the user as stored: the gate's, and `join_rules`."""
        bench, user = self.bench, self.text.user_id
        tried = {"personal": lora, "shared": self.shared, "compressed": stored}
        losses = bench.losses(self.text, tried, served=PERSONAL)
        verdict = check([losses], {user: error}, bench.config.gate, seed=bench.config.seed)
        reasons = (*verdict.reasons, *join_rules.broken(losses, bench.config, rules))
        return losses, replace(verdict, passed=not reasons, reasons=reasons)


def text_of(config: Config, newcomer: Newcomer) -> UserData:
    """The newcomer's text in its three parts, split as everybody's is. DataError: it cannot be."""
    data = replace(config.data, source=newcomer.file, users=(newcomer.user,), on_small_user="error")
    return load_user(data, newcomer.user)
