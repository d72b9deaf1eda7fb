"""RowPages: the pages of one running row, block after block of its tokens; which of them others made.

A prompt is the same for everybody below the lowest layer that its user changes. So the layers are cut in
parts, and the pages of a part are found by the tokens up to their end and by whose part it is.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from soppu.serve.decoders.blocks import BLOCK
from soppu.serve.decoders.pages import Key, Owner, Page, Pages

BASE: Owner = (0, 0)  # whose part it is where it is everybody's


@dataclass(frozen=True)
class Part:
    """The layers from `first` up to `end`, as the base model computes them or as one slot does."""

    first: int
    end: int
    whose: Owner = BASE


@dataclass(frozen=True)
class Want:
    """What a row is going to need: `tokens` at most, prompt and answer; `parts` () shares nothing."""

    tokens: int
    prompt: Sequence[int] = ()
    parts: tuple[Part, ...] = ()

    def keys(self) -> list[bytes]:
        """What names the tokens up to the end of each full block of the prompt. O(prompt)."""
        named, keys = b"", []
        for start in range(0, len(self.prompt) - BLOCK + 1, BLOCK) if self.parts else ():
            tokens = array.array("q", self.prompt[start : start + BLOCK]).tobytes()
            keys.append(named := hashlib.sha256(named + tokens).digest())
        return keys


class RowPages:
    """See the module. `states` is how many blocks the states of one page take."""

    def __init__(self, pages: Pages, want: Want, *, layers: int, states: int) -> None:
        self.parts = want.parts or (Part(0, layers),)
        self.covers = [0] * len(self.parts)  # tokens of each part that others have computed; falling
        self._pages, self._layers, self._states = pages, layers, states
        self._names = want.keys()
        # blocks that others may have computed: a row reads its last token itself
        self._most = min((len(want.prompt) - 1) // BLOCK, len(self._names))
        self._held: list[list[Page | None]] = []  # by block, then by part
        self._promised = blocks_of(want.tokens) * layers
        pages.promise(self._promised)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which layers are looked for: those of the base model, those of one user."""
        if not self._names:
            return ()
        return tuple({"shared" if part.whose == BASE else "own": 0 for part in self.parts})

    @property
    def found(self) -> dict[str, int]:
        """Tokens that others have computed, by kind: in any of its layers or in all that are the user's."""
        covers = {"shared": self.covers[0], "own": self.covers[-1]}
        return {kind: covers[kind] for kind in self.kinds}

    def adopt(self) -> Iterator[tuple[int, Page]]:
        """Use what others have computed of the prompt: (block, page) of each; `covers` grows.

        May be called again until the row takes pages of its own.
        """
        most = self._most
        for number in range(len(self.parts)):
            count = self.covers[number] // BLOCK
            while count < most and (page := self._pages.find(self._key(count, number))):
                if not self._pages.share(page):
                    break
                self._promised -= page.end - page.first
                self._put(count, number, page)
                yield count, page
                count += 1
            self.covers[number], most = count * BLOCK, count

    def stretch(self, held: int) -> tuple[int, int | None]:
        """(layer, end): the tokens from `held` up to `end` are read from `layer` on; None: up to the last."""
        for part, cover in enumerate(self.covers):
            if cover <= held:
                return self.parts[part].first, self.covers[part - 1] if part else None
        raise AssertionError("more tokens held than read")

    def next_key(self, held: int) -> Key | None:
        """What another row would have to publish to spare this one its next block; None for nothing."""
        part = next(number for number, cover in enumerate(self.covers) if cover <= held)
        block = held // BLOCK
        return self._key(block, part) if block < self._most else None

    def extend(self, start: int, end: int) -> Iterator[tuple[int, Page]]:
        """Take the pages that the tokens from `start` up to `end` are missing: (block, page) of each."""
        for block in range(start // BLOCK, blocks_of(end)):
            if block >= len(self._names) or self.parts[-1].first == 0:
                if block == len(self._held) or self._held[block][0] is None:
                    yield block, self._take(block, 0, Part(0, self._layers))
                continue
            for number, part in enumerate(self.parts):
                if block == len(self._held) or self._held[block][number] is None:
                    yield block, self._take(block, number, part)

    def publish(self, held: int) -> None:
        """Let others find the prompt's blocks whose tokens are all held."""
        for block in range(min(held // BLOCK, len(self._names))):
            for number, part in enumerate(self.parts):
                page = self._held[block][number]
                if page is not None and (part.end == self._layers or page.states):
                    self._pages.publish(page, self._key(block, number))

    def keeping(self, layer: int, start: int, end: int) -> Iterator[tuple[int, Page]]:
        """(first token, page) of the pages of these tokens that keep the states which `layer` begins with."""
        number = next((n for n, part in enumerate(self.parts) if part.end == layer), None)
        if number is None:
            return
        for block in range(start // BLOCK, min(blocks_of(end), len(self._names))):
            page = self._held[block][number]
            if page is not None and page.states:
                yield block * BLOCK, page

    def leave(self) -> None:
        """Give all pages up, the last ones to be forgotten first."""
        for held in reversed(self._held):
            for page in reversed(held):
                if page is not None:
                    self._pages.leave(page)
        self._pages.promise(-self._promised)
        self._held, self._promised = [], 0

    def _key(self, block: int, part: int) -> Key:
        layers = self.parts[part]
        return self._names[block], layers.first, layers.end, layers.whose

    def _take(self, block: int, number: int, part: Part) -> Page:
        named = block < len(self._names) and part.end < self._layers
        page = self._pages.take(part.first, part.end, states=self._states if named else 0)
        self._promised -= part.end - part.first
        self._put(block, number, page)
        return page

    def _put(self, block: int, part: int, page: Page) -> None:
        while len(self._held) <= block:
            self._held.append([None] * len(self.parts))
        self._held[block][part] = page


def blocks_of(tokens: int) -> int:
    """How many blocks that many tokens of a layer take."""
    return -(-tokens // BLOCK)
