"""What every arm makes of prompts that nobody's adapter was trained on: the columns a router is fitted from.

Losses are measured where the gate measures its own, `soppu.stages.bench`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.config import Config
from soppu.data import IGNORE, Block, Example, tokenize
from soppu.errors import RouterError
from soppu.evaluate.losses import example_losses
from soppu.federation.train import CachedBlock, cache_states
from soppu.progress.telling import Tell
from soppu.serve.router import states
from soppu.serve.router.measured import Floats, Measured, Questions
from soppu.stages.bench import Bench, with_text


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


def untrained(config: Config, members: Iterable[str], *, prompts: int) -> dict[str, list[Example]]:
    """At most `prompts` of every member who has text here: held out first, nothing that is trained on."""
    data = dataclasses.replace(config.data, heldout_examples=prompts, validation_examples=prompts)
    trained = {user: set(text.train) for user, text in with_text(config, members).items()}
    texts = with_text(dataclasses.replace(config, data=data), trained)
    return {
        user: [
            item for item in dict.fromkeys((*text.heldout, *text.validation)) if item not in trained[user]
        ][:prompts]
        for user, text in texts.items()
    }


def measure(
    bench: Bench, forms: Mapping[str, Bundle], *, prompts: int, on_progress: Tell | None = None
) -> Measured:
    """At most `prompts` of every user who is in all of the bundles: the base model's arm, then the bundles'.

    Cost: one forward of the lower layers over every prompt, and two of the upper ones for each arm.
    Raises RouterError where fewer than two different prompts are found.
    """
    members = set.intersection(*(set(bundle.users) for bundle in forms.values()))
    texts = untrained(bench.config, members, prompts=prompts)
    columns = _Columns()
    for number, (user, examples) in enumerate(texts.items(), start=1):
        tried = {name: bundle.reconstruct(user) for name, bundle in forms.items()}
        _add(columns, bench, user, examples, tried)
        if on_progress:
            on_progress({"note": f"measuring: {user}", "share": number / len(texts), "user": user})
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
