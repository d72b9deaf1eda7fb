"""Pages: who has which blocks, what may be shared, and what is kept for the next who asks.

A page is BLOCK tokens' keys and values in some layers. Rows take pages as their tokens come. A page with a
key may be found by other rows while its first row runs, and afterwards, until its blocks are needed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from soppu.serve.decoders.blocks import Blocks

Owner = tuple[int, int]
Key = tuple[bytes, int, int, Owner]  # all tokens up to the page's end, its layers from and to, whose it is


@dataclass(eq=False, slots=True)
class Page:
    """The blocks of the layers from `first` up to `end`, and those of the states that leave them, if any."""

    first: int
    end: int
    blocks: list[int]
    states: list[int]
    rows: int = 1  # that use it
    key: Key | None = field(default=None)

    @property
    def size(self) -> int:
        """In blocks."""
        return len(self.blocks) + len(self.states)


class Pages:
    """Pages of at most `count` blocks, of which at most `idle` are kept for nobody. One thread changes them.

    A row is promised the blocks that it may need at most before it begins, so that none is ever without:
    blocks in use and blocks promised are never more than all.
    """

    def __init__(self, count: int, *, idle: int) -> None:
        self.blocks = Blocks(count)
        self.used = self.promised = self.idle = 0
        self._most_idle = idle
        self._known: dict[Key, Page] = {}
        self._idle: OrderedDict[Key, Page] = OrderedDict()  # least recently used first

    @property
    def unpromised(self) -> int:
        """Blocks that a new row could be promised."""
        return self.blocks.count - self.used - self.promised

    def promise(self, count: int) -> None:
        """Keep so many blocks for one row; negative to release it of them."""
        self.promised += count
        assert self.promised >= 0 <= self.unpromised

    def take(self, first: int, end: int, *, states: int = 0) -> Page:
        """A new page, its layers out of what was promised; `states` blocks more, where that many are left."""
        self.promise(first - end)
        states = states if self.unpromised >= end - first + states else 0
        self._make_room(end - first + states)
        blocks = self.blocks.take(end - first + states)
        page = Page(first, end, blocks[: end - first], blocks[end - first :])
        self.used += page.size
        return page

    def find(self, key: Key) -> Page | None:
        """The page of that key, if somebody uses it or it was kept."""
        return self._known.get(key)

    def share(self, page: Page) -> bool:
        """One more row uses a page, whose blocks it was promised. False where the states have no room."""
        if not page.rows:
            if self.unpromised < len(page.states):
                return False
            assert page.key is not None
            del self._idle[page.key]
            self.idle -= page.size
            self.used += page.size
        self.promise(page.first - page.end)
        page.rows += 1
        return True

    def publish(self, page: Page, key: Key) -> None:
        """Let others find a page that is full. Where another has the key, this one stays its row's own."""
        if page.key is None and key not in self._known:
            page.key = key
            self._known[key] = page

    def leave(self, page: Page) -> None:
        """One row less uses a page: it is kept, if it has a key, or its blocks are given back."""
        page.rows -= 1
        if page.rows:
            return
        self.used -= page.size
        if page.key is None:
            self.blocks.give_back([*page.blocks, *page.states])
            return
        self.idle += page.size
        self._idle[page.key] = page
        while self.idle > self._most_idle:
            self._forget()

    def _make_room(self, count: int) -> None:
        while self.blocks.free < count:
            self._forget()

    def _forget(self) -> None:
        key, page = self._idle.popitem(last=False)
        del self._known[key]
        self.idle -= page.size
        self.blocks.give_back([*page.blocks, *page.states])
