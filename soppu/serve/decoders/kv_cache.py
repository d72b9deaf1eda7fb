"""KVCache: keys and values of every running row, in blocks. Not for scheduling: `batch`.

Who has which blocks and what is shared: `pages`, `row_pages`; their memory: `blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from soppu.devices import free_bytes
from soppu.errors import ConfigError
from soppu.serve.decoders.blocks import BLOCK, SPARE
from soppu.serve.decoders.pages import Key, Page, Pages
from soppu.serve.decoders.row_pages import RowPages, Want, blocks_of


@dataclass(frozen=True, eq=False)
class Step:
    """What one forward runs: T tokens each of b rows, through the layers from `first` on."""

    ids: Tensor  # (b, T) int64; a row with fewer tokens than T is padded at its end
    rows: Sequence[int]  # b different rows of the cache, ascending
    starts: Sequence[int]  # how many tokens of each row the cache holds already
    counts: Sequence[int]  # how many of the T tokens are the row's own
    every: bool = False  # logits are wanted after each of the b T tokens, not after every row's last
    silent: bool = False  # no logits are wanted
    first: int = 0
    given: Tensor | None = None  # (b, T, width) the states that `first` begins with, where it is not 0
    keep: frozenset[int] = frozenset()  # layers whose first states are wanted
    kept: dict[int, Tensor] = field(default_factory=dict)  # layer -> (b T, width), filled by the forward

    @property
    def fresh(self) -> bool:
        """True where no row has tokens in the cache, so that the new tokens attend only to each other."""
        return not any(self.starts)

    @cached_property
    def positions(self) -> Tensor:
        """(b, T) int64 place of every token in its row."""
        starts = torch.tensor(self.starts, device=self.ids.device)
        return starts[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)

    @cached_property
    def last(self) -> Tensor:
        """(b,) int64: where each row's last own token is among the b T tokens."""
        width = self.ids.shape[1]
        ends = [row * width + count - 1 for row, count in enumerate(self.counts)]
        return torch.tensor(ends, device=self.ids.device)

    @property
    def seen(self) -> int:
        """Positions of the cache that some row of this step may attend to."""
        return max(start + count for start, count in zip(self.starts, self.counts, strict=True))

    def mask(self, dtype: torch.dtype, *, window: int = 0) -> Tensor:
        """(b, T, seen) to add to scores: 0 where a token may attend, the smallest `dtype` has where not.

        A token sees itself and the `window` - 1 before it; with 0 it sees all.
        """
        keys = torch.arange(self.seen, device=self.ids.device)
        distance = self.positions[:, :, None] - keys
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
            hidden, torch.finfo(dtype).min
        )


@dataclass(frozen=True)
class Sizes:
    """What a decoder keeps of a token: so many layers, and of each keys of so many heads of size d."""

    layers: int
    heads: int = 0  # 0 where layers are not alike, or are not known before they are written
    d: int = 0
    width: int = 0  # of the states between layers
    item: int = 0  # bytes of a number; 0 where that is not known

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token; 0 where that is not known."""
        return 2 * self.layers * self.heads * self.d * self.item

    @property
    def state_blocks(self) -> int:
        """Blocks that the states of BLOCK tokens take."""
        return -(-self.width // (2 * self.heads * self.d)) if self.heads else 0


@dataclass(frozen=True)
class CacheFigures:
    """What a cache holds now, in blocks, and what was looked for and found in it, in prompt tokens."""

    block_tokens: int
    block_bytes: int  # 0 before anything was written
    total: int
    used: int
    cached: int
    asked: dict[str, int]
    reused: dict[str, int]


class KVCache:
    """Keys and values of at most `rows` rows of at most `limit` tokens, in blocks taken as tokens come.

    `tokens` bounds all of them, and those kept for nobody (at most `prefix` tokens in all layers) with them.
    By default it is what all rows could need, but no more than half of the memory that is free, and one row
    at least.
    """

    def __init__(self, rows: int, limit: int, *, tokens: int = 0, prefix: int = 0) -> None:
        self.rows, self.limit, self.prefix = rows, limit, prefix
        self.tokens = tokens or rows * blocks_of(limit) * BLOCK
        self.asked = {"shared": 0, "own": 0}  # prompt tokens that were looked for, and those that were found,
        self.reused = {"shared": 0, "own": 0}  # in the layers of the base model and in those of one user
        self._bounded = bool(tokens)
        self._open: dict[int, RowPages] = {}
        self._index: tuple[Step, dict[tuple[str, int], Tensor]] | None = None
        self.prepare(Sizes(layers=1))

    def prepare(self, sizes: Sizes, *, like: Tensor | None = None) -> None:
        """Called by the decoder before anything is held; `like` is a tensor of what it will write.

        Raises:
            ConfigError: there is no memory for so many blocks.
        """
        if not self._bounded and sizes.token_bytes:
            able = (
                free_bytes(like.device if like is not None else torch.device("cpu")) // 2 // sizes.token_bytes
            )
            self.tokens = max(self.limit, min(self.tokens, able))
        self.sizes = sizes
        idle = blocks_of(min(self.prefix, self.tokens)) * sizes.layers
        self.pages = Pages(blocks_of(self.tokens) * sizes.layers, idle=idle)
        # block of each row, layer, and BLOCK tokens
        self.tables = torch.zeros(self.rows, sizes.layers, blocks_of(self.limit), dtype=torch.int32)
        if like is not None and sizes.token_bytes:
            try:
                self.pages.blocks.store(sizes.heads, sizes.d, like=like)
            except (OSError, OverflowError, RuntimeError) as error:
                raise ConfigError(
                    f"max_batch_total_tokens: {self.tokens} tokens of {sizes.token_bytes} bytes cannot be had"
                    f" ({error}), allowed: {self.limit} (max_total_tokens) and more, or 0 for what fits"
                ) from error

    def figures(self) -> CacheFigures:
        """What is held now. Any thread may ask."""
        pages = self.pages
        held = pages.blocks.count, pages.used, pages.idle
        return CacheFigures(BLOCK, pages.blocks.block_bytes, *held, dict(self.asked), dict(self.reused))

    def fits(self, tokens: int) -> bool:
        """Whether a row that may need so many tokens can begin now."""
        return blocks_of(tokens) * self.sizes.layers <= self.pages.unpromised

    def open(self, row: int, want: Want) -> None:
        """A row begins; it has to fit."""
        sizes = self.sizes
        pages = RowPages(self.pages, want, layers=sizes.layers, states=sizes.state_blocks)
        self._open[row] = pages
        for kind in pages.kinds:
            self.asked[kind] += len(want.prompt)

    def adopt(self, row: int) -> int:
        """Take over what others have read of a row's prompt; how many tokens it holds in all layers then.

        May be called again until the row is read.
        """
        pages = self._open[row]
        before = pages.found
        for block, page in pages.adopt():
            self._note(row, block, page)
        for kind, tokens in pages.found.items():
            self.reused[kind] += tokens - before[kind]
        return pages.covers[-1]

    def stretch(self, row: int, held: int) -> tuple[int, int | None]:
        """(layer, end): the tokens from `held` up to `end` are read from `layer` on; None: up to the last."""
        return self._open[row].stretch(held)

    def next_key(self, row: int, held: int) -> Key | None:
        """What a row would let others find next, if it were read; None for nothing."""
        return self._open[row].next_key(held)

    def close(self, row: int) -> None:
        """A row ends: what may be shared is kept, the rest given back."""
        if row in self._open:
            self._open.pop(row).leave()
            self.tables[row] = 0

    def begin(self, step: Step) -> None:
        """Take the blocks for the tokens of a step. A row that was not opened may need all that a row can."""
        for row, start, count in zip(step.rows, step.starts, step.counts, strict=True):
            if row not in self._open:
                self.open(row, Want(self.limit))
            for block, page in self._open[row].extend(start, start + count):
                self._note(row, block, page)

    @torch.inference_mode()
    def keep(self, step: Step) -> None:
        """Let others find what a step has read of prompts, with the states that it kept."""
        T = step.ids.shape[1]
        for number, row in enumerate(step.rows):
            pages, start, count = self._open[row], step.starts[number], step.counts[number]
            for layer, states in step.kept.items():
                own = states[number * T : number * T + count]
                for first, page in pages.keeping(layer, start, start + count):
                    here = own[max(0, first - start) : first - start + BLOCK]
                    self._keep(page, here, offset=max(0, start - first))
            pages.publish(start + count)

    @torch.inference_mode()
    def states(self, row: int, layer: int, start: int, end: int) -> Tensor:
        """(end - start, width): what `layer` begins with at these tokens, which the row shares."""
        pages = [page.states for _, page in self._open[row].keeping(layer, start, end)]
        blocks = torch.tensor(pages)
        found = self._chunks()[blocks.to(self._chunks().device)]  # (pages, state blocks, BLOCK, chunk)
        found = found.transpose(1, 2).reshape(len(pages) * BLOCK, -1)[:, : self.sizes.width]
        return found[start % BLOCK : start % BLOCK + end - start]

    def _keep(self, page: Page, states: Tensor, *, offset: int) -> None:
        chunks = self._chunks()
        width = chunks.shape[2]
        for number, block in enumerate(page.states):
            part = states[:, number * width : (number + 1) * width]
            chunks[block, offset : offset + len(part), : part.shape[1]] = part

    def _chunks(self) -> Tensor:
        """All blocks as (n, BLOCK, numbers): how states lie in them."""
        store = self.pages.blocks.store(self.sizes.heads, self.sizes.d)
        return store.view(len(store), BLOCK, -1)

    def _note(self, row: int, block: int, page: Page) -> None:
        self.tables[row, page.first : page.end, block] = torch.tensor(page.blocks, dtype=torch.int32)

    def store(self, kv: Tensor) -> Tensor:
        """All blocks (n, 2, heads, BLOCK, d) of layers with keys and values like these (..., heads, d)."""
        return self.pages.blocks.store(kv.shape[-2], kv.shape[-1], like=kv)

    def write(self, layer: int, step: Step, kv: Tensor) -> None:
        """Store keys and values (b, T, 2, heads, d) of the step's tokens."""
        d = kv.shape[4]
        index = self._indexed(step, "write", kv.shape[3])[layer]
        self.store(kv).view(-1, d).index_copy_(0, index, kv.reshape(-1, d))

    def read(self, layer: int, step: Step, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, heads, seen, d) of the step's rows, a copy; `like` (..., heads, d) are some."""
        heads, d = like.shape[-2:]
        index = self._indexed(step, "read", heads)[layer]
        found = self.store(like).view(-1, BLOCK * d).index_select(0, index)
        found = found.view(2, len(step.rows), heads, -1, d)[:, :, :, : step.seen]
        return found[0], found[1]

    def _indexed(self, step: Step, way: str, heads: int) -> Tensor:
        """(layers, ...) where a step writes, or reads, in a store of so many heads; made once for a step."""
        if self._index is None or self._index[0] is not step:
            self._index = (step, {})
        made = self._index[1]
        if (way, heads) not in made:
            places = self._written(step, heads) if way == "write" else self._seen(step, heads)
            made[way, heads] = places.flatten(1).to(step.ids.device)
        return made[way, heads]

    def _written(self, step: Step, heads: int) -> Tensor:
        """(layers, b, T, 2, heads) of rows of d numbers; padding goes to a block that nobody reads."""
        positions = step.positions.cpu()
        tables = self.tables[list(step.rows)].long()
        columns = (positions // BLOCK).clamp_(max=tables.shape[2] - 1)
        columns = columns[:, None].expand(-1, tables.shape[1], -1)
        own = torch.arange(positions.shape[1]) < torch.tensor(step.counts)[:, None]
        blocks = torch.where(own[:, None], tables.gather(2, columns), SPARE).transpose(0, 1)
        sides = blocks[..., None] * 2 + torch.arange(2)
        rows = sides[..., None] * heads + torch.arange(heads)
        return rows * BLOCK + (positions % BLOCK)[..., None, None]

    def _seen(self, step: Step, heads: int) -> Tensor:
        """(layers, 2, b, heads, blocks) of sides of a head."""
        tables = self.tables[list(step.rows), :, : blocks_of(step.seen)].long().transpose(0, 1)
        sides = tables[:, None] * 2 + torch.arange(2)[:, None, None]
        return sides[:, :, :, None] * heads + torch.arange(heads)[:, None]
