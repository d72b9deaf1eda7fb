"""Arms: the ways to serve everybody that are compared, and where each one's adapters are.

An arm is base, shared, personal, centralised, or METHOD@RATIO: the run's frozen set, compressed as the stage
would with this method and ratio. Each bundle is made once; what it was made of names it in the run folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.config import METHODS, CompressConfig
from soppu.errors import ConfigError, RegistryError
from soppu.federation.personalise import BASE as SERVED_BASE
from soppu.progress.telling import Tell
from soppu.registry import Registry
from soppu.stages.centralised import FILE as CENTRALISED_FILE
from soppu.stages.centralised import centralised_adapter
from soppu.stages.compress import compressed
from soppu.stages.federate import RESULT, shared_adapter
from soppu.stages.run import FEDERATION, Run
from soppu.tradeoff_settings import BASE, CENTRALISED, PERSONAL, SHARED, parse_arm

FOLDER = "tradeoff"  # of a run: what was measured so far


@dataclass(frozen=True)
class Arm:
    """One way to serve everybody, as JSON values. `what` names its content: equal ones give equal text.

    Attributes:
        adapter_ids: user -> adapter in the registry.
        folder: PEFT folder of one adapter for everybody.
        sizes: user -> bytes of their own on disk; of what is shared, their part.
        size: bytes on disk, together.
        without: users who are served the base model.
        relative_error: user -> error of the compressed adapter.
    """

    name: str
    kind: Literal["base", "adapter", "bundle", "centralised"]
    what: str
    adapter_ids: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    bundle_id: str = ""
    method: str | None = None
    target: float | None = None
    size: int = 0
    without: tuple[str, ...] = ()
    relative_error: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes_per_user(self) -> float:
        """Bytes over the users they serve."""
        return self.size / len(self.sizes) if self.sizes else 0.0


def known(run: Run) -> tuple[str, ...]:
    """What a run has arms of without being asked for a compression."""
    there = [BASE]
    there += [SHARED] if run.read(RESULT) else []
    there += [PERSONAL]
    return (*there, CENTRALISED) if (run.folder / CENTRALISED_FILE).exists() else tuple(there)


def parse(name: str) -> tuple[str, float] | None:
    """(method, ratio) of METHOD@RATIO, None for the other arms. ConfigError where it is neither."""
    try:
        return parse_arm(name, METHODS)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def settings(config: CompressConfig, method: str, ratio: float) -> CompressConfig:
    """The run's own compression with another method and ratio."""
    clusters = config.clusters if method == "cluster" else 1
    asked: dict[str, Any] = {"method": method, "ratio": ratio, "max_bytes": 0, "max_error": 0.0}
    return dataclasses.replace(config, **asked, clusters=clusters)


class Arms:
    """The arms of a run and a frozen set of its users' adapters."""

    def __init__(self, run: Run, set_id: str, *, tell: Tell) -> None:
        self.run = run
        self.registry = run.registry()
        self.set_id = set_id
        result = run.read(RESULT)
        self.members = self.registry.get_set(set_id)
        self.own: dict[str, str] = {**self.members, **result.get("adapters", {})}
        served = result.get("served", {})
        self.without = tuple(sorted(user for user, what in served.items() if what == SERVED_BASE))
        self._tell = tell

    def open(self, names: Iterable[str]) -> list[Arm]:
        """Every arm, the base model first, which the others are compared with.

        Raises:
            ConfigError: an arm that there is not.
        """
        wanted = list(dict.fromkeys((BASE, *names)))
        asked = {name: parse(name) for name in wanted}
        return [self._open(name, compression) for name, compression in asked.items()]

    def _open(self, name: str, compression: tuple[str, float] | None) -> Arm:
        if compression:
            return self._compressed(name, *compression)
        makers = {SHARED: self._shared, PERSONAL: self._personal, CENTRALISED: self._centralised}
        return makers[name]() if name in makers else Arm(BASE, "base", "base")

    def _shared(self) -> Arm:
        adapter = shared_adapter(self.run)
        if adapter is None:
            raise ConfigError(
                f"arm {SHARED!r}: no federation of {self.run.id} has ended, so nothing is shared"
            )
        folder = self.run.folder / FEDERATION / self.run.read(RESULT)["shared"]
        return self._of_everybody(SHARED, "adapter", folder, adapter)

    def _centralised(self) -> Arm:
        adapter = centralised_adapter(self.run)
        if adapter is None:
            raise ConfigError(
                f"arm {CENTRALISED!r}: {self.run.id} holds no {CENTRALISED_FILE}; see `soppu train`"
            )
        folder = self.run.folder / str(self.run.read(CENTRALISED_FILE)["path"])
        return self._of_everybody(CENTRALISED, "centralised", folder, adapter)

    def _of_everybody(self, name: str, kind: Any, folder: Path, adapter: LoraAdapter) -> Arm:
        size = (folder / adapters.WEIGHTS_FILE).stat().st_size
        return Arm(
            name,
            kind,
            f"{name} {adapter.content_hash()}",
            folder=str(folder),
            size=size,
            sizes=dict.fromkeys(self.own, size / len(self.own)),
        )

    def _personal(self) -> Arm:
        sizes = {user: self.registry.adapter_bytes(held) for user, held in self.own.items()}
        return Arm(
            PERSONAL,
            "adapter",
            f"personal {digest(self.own)}",
            adapter_ids=self.own,
            size=sum(sizes.values()),
            sizes=sizes,
        )

    def _compressed(self, name: str, method: str, ratio: float) -> Arm:
        bundle_id = self._bundle(settings(self.run.config.compress, method, ratio))
        bundle = Bundle.load(self.registry.bundle_path(bundle_id), expected_hash=bundle_id)
        size = self.registry.bundle_bytes(bundle_id)
        return Arm(
            name,
            "bundle",
            f"bundle {bundle_id} without {digest(self.without)}",
            bundle_id=bundle_id,
            method=method,
            target=ratio,
            size=size,
            without=self.without,
            relative_error=dict(bundle.report.relative_error),
            sizes=dict.fromkeys(bundle.users, size / len(bundle.users)),
        )

    def _bundle(self, compress: CompressConfig) -> str:
        """The id of the set's bundle, found again where equal ones were made before."""
        base = self.run.base().hash
        made_of = digest([self.set_id, base, self.run.config.seed, dataclasses.asdict(compress)])
        note = f"{FOLDER}/bundle-{made_of}.json"
        bundle_id = str(self.run.read(note).get("bundle_id", ""))
        if bundle_id and self._held(bundle_id):
            return bundle_id
        bundle = compressed(self.run, self.members, compress, tell=self._tell)
        bundle_id = self.registry.put_bundle(bundle.to_bytes(), set_id=self.set_id, run=self.run.id)
        self.run.write(note, {"bundle_id": bundle_id})
        return bundle_id

    def _held(self, bundle_id: str) -> bool:
        try:
            return bool(self.registry.bundle_bytes(bundle_id))
        except (RegistryError, OSError):
            return False


class Held:
    """An arm's adapters, read as they are asked for."""

    def __init__(self, registry: Registry, arm: Arm) -> None:
        self.arm = arm
        self._registry = registry
        self._one = adapters.read(Path(arm.folder)) if arm.folder else None
        self.bundle: Bundle | None = None
        if arm.bundle_id:
            self.bundle = Bundle.load(registry.bundle_path(arm.bundle_id), expected_hash=arm.bundle_id)

    def adapter(self, user: str) -> LoraAdapter | None:
        """What a user is answered with; None is the base model. RegistryError if it is gone."""
        if self.bundle is not None:
            return self.bundle.reconstruct(user) if self.serves(user) else None
        if user in self.arm.adapter_ids:
            return self._registry.get_adapter(self.arm.adapter_ids[user])
        return self._one

    def serves(self, user: str) -> bool:
        """Whether the arm has anything for a user; others are served the base model."""
        if self.bundle is not None:
            return user not in self.arm.without and user in self.bundle.users
        return bool(self.arm.folder) or user in self.arm.adapter_ids

    def modules(self) -> set[str]:
        """Names of what is adapted."""
        if self.bundle is not None:
            return set(self.bundle.shapes)
        some = self._one or next(map(self.adapter, self.arm.adapter_ids), None)
        return set(some.pairs) if some else set()


def digest(value: Any) -> str:
    """16 hex digits of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
