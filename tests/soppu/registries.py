"""A registry on this machine, on a share or with a server, what is put in it and what is found there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.registry import Registry
from soppu.registry.catalogue import Base as Tables
from soppu.registry.catalogue import Publication
from tests.share import share

BASE = "b" * 64
MODEL = Base("tiny", BASE)


def make_adapter(seed: int, *, features: int = 8, rank: int = 2) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj": LoraPair(
            torch.randn(rank, features, generator=generator), torch.randn(features, rank, generator=generator)
        )
        for layer in range(2)
    }
    return LoraAdapter(pairs, base_model="tiny", base_hash=BASE)


def freeze(registry: Registry, adapter_ids: Mapping[str, str]) -> str:
    """A set of these alone: nobody's adapter is of the base it is for."""
    return registry.freeze_current(Base("nobody's", "0" * 64), chosen=adapter_ids)


def folder_of(registry: Registry, adapter_id: str) -> Path:
    """Where the adapter's PEFT folder lies on this machine."""
    registry.get_adapter(adapter_id)  # makes the local copy of a remote one
    return registry._blobs.here / "adapters" / adapter_id


def published(registry: Registry, target: str, url: str = "") -> Publication | None:
    """What a target serves; the newest of any URL if none is given."""
    return next((p for p in registry.publications() if p.target == target and url in ("", p.url)), None)


# A database to run these tests on as well: each empties it, so without `-n`.
SERVER = os.environ.get("SOPPU_TEST_CATALOGUE", "")


def empty_server() -> None:
    engine = sa.create_engine(SERVER)
    Tables.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture(params=["local", "share", *(["server"] if SERVER else [])])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    if request.param == "local":
        yield Registry.open(tmp_path / "registry")
        return
    if request.param == "server":
        empty_server()
        server = Registry.open(tmp_path / "registry", catalogue=SERVER)
        yield server
        server.close()
        return
    root = share(tmp_path / "share")
    yield Registry.open(root, catalogue=f"sqlite:///{tmp_path}/c.db", cache=tmp_path / "cache")


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry")


def tree(root: Path) -> dict[str, bytes]:
    """Every file below root but the catalogue's."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith("catalogue.db")
    }
