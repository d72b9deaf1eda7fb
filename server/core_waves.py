"""Whom to ask next for a core, and at which node: a user's own, or a simulated one that trains many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Wave = dict[int, tuple[str, ...]]  # node -> users


class Waves:
    """Users who wait, and how they are dealt out.

    Args:
        users: everybody who has no core yet.
        together: how many a simulated node trains at once, at most.
        nodes: node -> user, where each user has a node of their own; None in a simulation.
    """

    def __init__(
        self, users: Sequence[str], *, together: int, nodes: Mapping[int, str] | None = None
    ) -> None:
        self._waiting, self._alone = list(users), list[str]()
        self._together, self._nodes = together, nodes

    def next(self, here: Sequence[int]) -> Wave:
        """The next wave for the nodes that are here; {} when nobody waits any more."""
        if self._nodes is not None:
            waiting, self._waiting = set(self._waiting), []
            return {node: (user,) for node, user in self._nodes.items() if user in waiting}
        if not here:
            return {}
        if not self._waiting:
            chosen, self._alone = self._alone[: len(here)], self._alone[len(here) :]
            return {node: (user,) for node, user in zip(here, chosen, strict=False)}
        each = min(self._together, -(-len(self._waiting) // len(here)))
        wave: Wave = {}
        for node in here:
            if chunk := tuple(self._waiting[:each]):
                wave[node], self._waiting = chunk, self._waiting[each:]
        return wave

    def failed(self, users: tuple[str, ...]) -> tuple[str, ...]:
        """Of users whose client crashed or was silent, those who are lost: of many trained together each is
        asked for once more, alone, since one of them may have been the cause.
        """
        if len(users) == 1:
            return users
        self._alone += users
        return ()
