"""A run: the folder that holds its frozen configuration, its checkpoints, what was measured, its report.

The id of a run is a hash of everything that decides its outcome, so the same configuration on the same
text is the same run, and finds what an earlier attempt left behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soppu import config as configuration
from soppu import files, models
from soppu.compress.options import CompressOptions
from soppu.config import Config
from soppu.data import STDLIB, STDLIB_PUBLIC, source_digest
from soppu.errors import ConfigError
from soppu.federation import privacy
from soppu.federation.emulator import configured_plan
from soppu.models import BaseModel
from soppu.registry import Registry
from soppu.stages import choosing
from soppu.stages import text as texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.toml"
BIRTH = "birth"
FEDERATION = "federation"


# Stage -> the sources of text that its result follows from.
READS: dict[str, Callable[[Config], tuple[str, ...]]] = {
    "federate": lambda config: (*_users_text(config), config.align.source),
    "federate-cohort": lambda config: (*_users_text(config), config.align.source),
    "basis": lambda config: (config.align.source,) if config.compress.whiten else (),
    "compress": lambda config: (config.align.source,) if config.compress.whiten else (),
    "evaluate": lambda config: _users_text(config),
}


_OF_CORES = ("compress", "evaluate")  # what they come to depends on the basis in force


def _users_text(config: Config) -> tuple[str, ...]:
    """Where users' text is read here: nowhere if it is on nodes of its own."""
    return () if config.federation.connection else (config.data.source,)


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    folder: Path
    config: Config

    @property
    def id(self) -> str:
        """Name of the folder: the configuration's name and 12 digits of the hash."""
        return self.folder.name

    @property
    def identity(self) -> str:
        """Names this folder and the registry it writes to; another name once either is made anew."""
        return f"{(self.folder / BIRTH).read_text()} {self.registry().identity()}"

    def inputs(self, stage: str) -> str:
        """Hash of all that a stage reads besides its parameters: settings, base model, registry, text.

        Two calls of a stage with equal parameters and equal inputs give the same result; this is what a
        cached result is known by. KeyError for a stage that has not said which text it reads.
        """
        texts = [source_digest(source) for source in READS[stage](self.config)]
        base = self.base()
        parts = (self.identity, self.config.digest(), base.hash, models.tokenizer_digest(base))
        basis = [self.registry().current_basis(base.base)] if stage in _OF_CORES else []
        probes = self.probes().items() if stage == "evaluate" else ()
        return _digest(stage, *parts, *texts, *basis, *(f"{user} {held}" for user, held in probes))

    def probes(self) -> dict[str, str]:
        """User -> the adapter that they trained freely since the basis in force is; nobody where none is."""
        registry = self.registry()
        basis_id = registry.current_basis(self.base().base)
        most = self.config.basis.probe_users
        return registry.free_since_basis(basis_id, limit=most) if basis_id and most else {}

    def registry(self) -> Registry:
        """The registry this run writes to."""
        return Registry.open(self.config.registry.root, catalogue=self.config.registry.catalogue)

    def base(self) -> BaseModel:
        """The base model of this run."""
        return models.resolve(self.config.base.model, cache=Path(self.config.base.cache))

    def newest_evaluation(self) -> str:
        """The file of the evaluation that was written last; "" where there is none."""
        found = sorted(self.folder.glob("evaluation-*.json"), key=lambda path: path.stat().st_mtime)
        return found[-1].name if found else ""

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder, atomically. Raises StorageError."""
        files.write_text(self.folder / name, json.dumps(dict(values), indent=2))

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file of this run; {} if no stage has written it yet."""
        path = self.folder / name
        return dict(json.loads(path.read_text())) if path.exists() else {}


def open_run(folder: str) -> Run:
    """Open a folder that `prepare` made. Raises ConfigError if it is not one."""
    path = Path(folder)
    if not (path / CONFIG).exists():
        raise ConfigError(f"{folder}: not a run folder, it holds no {CONFIG}")
    return Run(path, configuration.load(path / CONFIG))


def prepare(config_path: str, overrides: Mapping[str, Any] | None = None, *, text: bool = True) -> str:
    """Check the configuration, find base model and users, freeze all of it in a run folder.

    Args:
        config_path: a TOML file.
        overrides: `{"section.key": value}`, stronger than the file.
        text: whether users' text is part of the run's identity; a recompression alone reads none, and where
            the federation has a connection text is on its nodes and none is read here.

    Returns:
        The run folder, absolute.

    Raises:
        ConfigError, DataError, ModelError, UnsupportedModel, RegistryError: what is wrong with settings,
            text, base model, plan or a user's id, before any work is done.
    """
    config = _absolute(configuration.load(config_path, overrides))
    base = models.resolve(config.base.model, cache=Path(config.base.cache))
    privacy.require(config.federation)
    CompressOptions.of(config.compress, seed=config.seed).torch_device()
    texts, found = "", None
    if text:
        model = _check_split(config, base)
        found = texts_of.read(config, model, models.load_tokenizer(base))
        # named, so that all later stages agree on who takes part
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, users=tuple(found.users)))
        texts = " ".join([models.tokenizer_digest(base), *found.public, *found.users.values()])
    basis = choosing.named(config, base) if text else ()
    name = f"{Path(config_path).stem}-{_digest(config.digest(), base.hash, texts, *basis)}"
    folder = Path(config.runs) / name
    files.write_text(folder / CONFIG, configuration.dump(config))
    if not (folder / BIRTH).exists():
        files.write_text(folder / BIRTH, uuid.uuid4().hex)
    if found:
        source = "".join(_users_text(config))
        files.write_text(folder / texts_of.FILE, json.dumps(found.to_dict(source), indent=2))
        # runs that differ only in what comes after the training share its folder, and so its adapters
        training = _digest(config.training_digest(), base.hash, texts, config.registry.root, *basis)
        shared, link = folder.parent / ".federations" / training, folder / FEDERATION
        shared.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(shared, link.parent))
        choosing.choose(config, base, shared)
    return str(folder)


def _check_split(config: Config, base: BaseModel) -> PreTrainedModel:
    """Cut a model without weights, to hear of a wrong plan before a simulation is started; gives it."""
    model = models.skeleton(base)
    configured_plan(config, model, base_hash=base.hash)
    return model


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _absolute(config: Config) -> Config:
    """Every path made absolute: stages run in other processes, with other working directories."""

    def path(text: str, *words: str) -> str:
        return text if not text or text in words or "://" in text else str(Path(text).resolve())

    def folders(target: Mapping[str, Any]) -> dict[str, str]:
        return {key: path(str(target[key])) for key in ("state", "lorax_volume") if key in target}

    replace = dataclasses.replace
    own, targets = vars(config.serve), config.serve.targets
    model = config.base.model if not Path(config.base.model).exists() else path(config.base.model)
    return replace(
        config,
        runs=path(config.runs),
        base=replace(config.base, cache=path(config.base.cache), model=model),
        data=replace(config.data, source=path(config.data.source, STDLIB)),
        align=replace(config.align, source=path(config.align.source, STDLIB_PUBLIC)),
        serve=replace(
            config.serve, **folders(own), targets=tuple({**one, **folders(one)} for one in targets)
        ),
        federation=replace(
            config.federation,
            members=path(config.federation.members),
            client_state=path(config.federation.client_state),
        ),
        registry=replace(config.registry, root=path(config.registry.root)),
    )
