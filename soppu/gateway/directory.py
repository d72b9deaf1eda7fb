"""Where a user is served now, and by which name there: as the catalogue says at the moment of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from soppu.errors import RegistryError
from soppu.gateway.refusals import Refused
from soppu.gateway.settings import GatewaySettings, Target
from soppu.registry import Registry

_KINDS = ("embedded", "lorax", "vllm")


@dataclass(frozen=True)
class Place:
    """A user's version, or the base model, at the servers that have it."""

    target: Target
    replicas: tuple[str, ...]
    asked_as: str  # what a request names there; "" is the base model
    version: str  # the id of the user's adapter; "" for the base model


class Directory:
    """What the catalogue says; it is asked at each request, so that nothing here is ever old."""

    def __init__(self, registry: Registry, settings: GatewaySettings) -> None:
        self._registry = registry
        self._named = {one.url.rstrip("/"): one for one in settings.targets}
        self._base = settings.without_adapter == "base"

    def place(self, user: str) -> Place:
        """Where this user's requests go. Blocks: one look into the catalogue.

        The version that was published last is the user's; servers that have the same one share the requests.

        Raises:
            Refused: 404, the user has no adapter and gets no base model; 503, no server is known, or the
                catalogue cannot be read.
        """
        try:
            served = [one for one in self._registry.addresses(user) if one.url]
            if self._named:
                served = [one for one in served if one.url.rstrip("/") in self._named]
            if not served:
                return self._without(user)
        except RegistryError:
            raise Refused(503, "the catalogue cannot be read now", after=2) from None
        last = max(served, key=lambda one: one.since)
        same = [one for one in served if (one.adapter_id, one.asked_as) == (last.adapter_id, last.asked_as)]
        urls = [(one.url, one.target) for one in same]
        return Place(
            self._target(*urls[same.index(last)]), self._replicas(urls), last.asked_as, last.adapter_id
        )

    def replicas(self) -> tuple[str, ...]:
        """Every address that requests may go to. RegistryError if the catalogue cannot be read."""
        return self._replicas(self._places())

    def _without(self, user: str) -> Place:
        if not self._base:
            raise Refused(404, f"user {user!r} has no model here")
        places = self._places()
        if not places:
            raise Refused(503, "no server is known: nothing was published yet", after=30)
        return Place(self._target(*places[0]), self._replicas(places[:1]), "", "")

    def _places(self) -> list[tuple[str, str]]:
        """URL and kind of every target: those of the settings, or those published to, the last one first."""
        if self._named:
            return [(url, one.kind) for url, one in self._named.items()]
        return [(url, kind) for kind, url in self._registry.targets_in_force() if url]

    def _target(self, url: str, kind: str) -> Target:
        known = self._named.get(url.rstrip("/"))
        return known or Target(url=url, kind=kind if kind in _KINDS else "embedded")  # type: ignore[arg-type]

    def _replicas(self, places: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        targets = [self._target(*place) for place in places]
        urls = [url.rstrip("/") for one in targets for url in one.replicas or (one.url,)]
        return tuple(dict.fromkeys(urls))
