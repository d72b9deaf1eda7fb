"""LoraxTarget: publishing users' reconstructed adapters to a LoRAX server, or to ours by LoRAX's own API.

LoRAX knows no users and has no way to be told of an adapter: an adapter is a directory in the volume it
reads, loaded when a request first names its path, and an id once seen means the same bytes for ever. So a
version of a user is a directory of its own, a canary is what loads it, and who is served which version is
kept by the registry (`Registry.resolve`), not by the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from soppu import base_identity
from soppu.base_identity import Base
from soppu.compress import Bundle
from soppu.errors import TargetError
from soppu.targets.canary import Answered
from soppu.targets.http import HttpTarget, body, request
from soppu.targets.lorax_volume import Volume


@dataclass(frozen=True)
class LoraxModel:
    """The base model that a LoRAX has to serve."""

    name: str  # what it was started with; its own /info says the same
    base: Base  # who else that may be
    layers: int  # decoder layers: every projection is written on each of them


class LoraxTarget(HttpTarget):
    """One LoRAX at `url` that reads `volume`.

    Args:
        live: gives the id of the bundle that the registry says is served here, "" for none.
        dtype: of the tensors written: "float16" or "bfloat16".
        timeout: seconds a single answer may take; loading the adapter counts.
    """

    SERVER, KIND, WHO = "", "LoRAX server", "/info"
    TAKES_JOINS = False
    GENERATE = "/generate"

    def __init__(
        self,
        url: str,
        *,
        volume: Volume,
        model: LoraxModel,
        live: Callable[[], str],
        dtype: str = "float16",
        timeout: float = 120.0,
    ) -> None:
        super().__init__(url, timeout=timeout)
        self._volume = volume
        self._model = model
        self._live = live
        self._dtype = dtype

    def publish(self, path: Path, *, bundle_id: str) -> bool:
        """Write every user's adapter into the volume. False if all of them were there.

        Raises:
            TargetError: the volume refused, or LoRAX could not serve what is in the bundle.
        """
        self._volume.sweep()  # what publications that were killed have left
        there = bundle_id in self.bundles()
        self._volume.stage(
            Bundle.load(path, expected_hash=bundle_id),
            bundle_id=bundle_id,
            base_model=self._served_name(),
            layers=self._model.layers,
            dtype=self._dtype,
        )
        return not there

    def bundles(self) -> tuple[str, ...]:
        """Ids of the bundles whose users' adapters are all in the volume."""
        return self._volume.staged()

    def placements(self, bundle_id: str) -> dict[str, str]:
        """User -> the id that LoRAX knows the user's adapter of this bundle by. TargetError if not staged."""
        return self._volume.placements(bundle_id)

    def activate(self, bundle_id: str, *, instead_of: str = "") -> None:
        """Nothing to tell the server: recording the publication is the switch. TargetError if not staged."""
        self.placements(bundle_id)

    def active(self) -> str:
        """Id of the bundle that the registry says is served here, "" for none."""
        return self._live()

    def rollback(self, previous_id: str) -> None:
        """As `activate`; "" is nothing to do either."""
        if previous_id:
            self.activate(previous_id)

    def drop(self, bundle_id: str) -> None:
        """Delete a bundle's adapters from the volume, but for those that other bundles share."""
        self._volume.drop(bundle_id)

    def _is_ours(self, info: Mapping[str, Any]) -> bool:
        return bool(info.get("model_id"))

    def _check_base(self, info: Mapping[str, Any]) -> None:
        served = Base(str(info["model_id"]), str(info.get("base_hash", "")))
        if served.name != self._model.name and not base_identity.same(served, self._model.base):
            raise TargetError(
                f"{self.url}: serves base model {served}, expected {self._model.base}, there called"
                f" {self._model.name!r}"
            )

    def _served_name(self) -> str:
        try:
            return str(body(request("GET", f"{self.url}{self.WHO}", timeout=self._timeout))["model_id"])
        except (requests.RequestException, KeyError) as error:
            raise TargetError(f"{self.url}: does not say what its base model is called: {error}") from error

    def _asked_as(self, users: Sequence[str], bundle_id: str) -> list[str]:
        placed = self.placements(bundle_id)  # read once: it has a line for every user
        if absent := [user for user in users if user not in placed]:
            raise TargetError(
                f"{absent[0]}: bundle {bundle_id[:12]} has no adapter of that user in the volume"
            )
        return [placed[user] for user in users]

    def _version(self, bundle_id: str) -> str:
        return ""  # LoRAX tells none: an id is a version

    def _asked(self, prompt: str, adapter_id: str, max_new_tokens: int) -> dict[str, Any]:
        asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "details": True, "do_sample": False}
        if adapter_id:
            asked |= {"adapter_id": adapter_id, "adapter_source": self._volume.source}
        return {"inputs": prompt, "parameters": asked}

    def _answered(self, response: requests.Response) -> Answered:
        answer = body(response)
        tokens = (answer.get("details") or {}).get("tokens", ())
        return Answered(
            adapter_id=response.headers.get("x-adapter-id", ""),
            trace=tuple((int(token["id"]), float(token["logprob"])) for token in tokens),
            text=str(answer.get("generated_text", "")),
        )
