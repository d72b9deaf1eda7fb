"""Stage: all adapters of a set into one bundle: fitted, or, of users who are told in a basis, as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from soppu import calibrate, models
from soppu.adapter import AdaptersOnDemand, LoraAdapter
from soppu.compress import Bundle, CompressOptions, compress, compress_cores
from soppu.config import CompressConfig
from soppu.data import load_public, tokenize
from soppu.progress import telling
from soppu.progress.telling import Tell
from soppu.stages import told
from soppu.stages.run import Run, open_run


def compress_set(run_folder: str, set_id: str, *, on_progress: Tell | None = None) -> str:
    """Compress a frozen set into a bundle, store it, and note its sizes; returns the bundle's id.

    Adapters are read from the registry in every pass, so memory does not grow with their number. A set that
    is told in a basis (`told.of_set`) is not fitted: its cores are kept as they are.

    Raises:
        RegistryError: a set of cores in several bases, none of which is in force.
    """
    run = open_run(run_folder)
    with telling.stage(run.folder, "compress", on_progress=on_progress) as tell:
        return _compress(run, set_id, tell)


def _compress(run: Run, set_id: str, tell: Tell) -> str:
    registry = run.registry()
    members = registry.get_set(set_id)
    basis_id = told.of_set(registry, set_id, run.base().base)
    if basis_id:
        bundle = kept(run, members, basis_id, tell=tell)
    else:
        bundle = compressed(run, members, run.config.compress, tell=tell)
    bundle_id = registry.put_bundle(bundle.to_bytes(), set_id=set_id, run=run.id)
    report = bundle.report.to_dict()
    report["bytes_before"] = sum(registry.adapter_bytes(adapter_id) for adapter_id in members.values())
    report["bytes_after"] = registry.bundle_bytes(bundle_id)
    run.write(f"compression-{bundle_id[:16]}.json", report)
    lost = bundle.report.lost_users
    how = f" in basis {basis_id}" if basis_id else ""
    said = f"{how}, nothing is left of {', '.join(lost)}" if lost else how
    tell({"note": f"compressed {len(members)} users{said}", "share": 1.0})
    return bundle_id


def compressed(run: Run, members: Mapping[str, str], settings: CompressConfig, *, tell: Tell) -> Bundle:
    """A bundle of adapters in the registry, user -> adapter id, with the run's seed and its moments."""
    adapters = AdaptersOnDemand(members, run.registry().get_adapter)
    return compress(
        adapters,
        CompressOptions.of(settings, seed=run.config.seed),
        adapter_ids=members,
        moments=_moments(run, adapters, tell) if settings.whiten else None,
        progress=lambda what, done, total: tell(_said(what, "users", done, total)),
    )


def kept(run: Run, members: Mapping[str, str], basis_id: str, *, tell: Tell) -> Bundle:
    """A bundle of users who are told in a basis: cores as they are, adapters as far as it spans them.

    Cores of an older basis are carried over. A batch of users is in memory at a time.
    """
    registry = run.registry()
    return compress_cores(
        AdaptersOnDemand(members, lambda held: told.read(registry, held)),
        registry.get_basis(basis_id),
        CompressOptions.of(run.config.compress, seed=run.config.seed),
        adapter_ids=members,
        older=registry.get_basis,
        progress=lambda what, done, total: tell(_said(what, "users", done, total)),
    )


def _said(what: str, things: str, done: int, total: int) -> dict[str, Any]:
    # a pass that ends is not the end: how many there will be is not known before the last
    return {"note": f"{what}: {done} of {total} {things}", "share": done / (total + 1)}


def _moments(run: Run, adapters: Mapping[str, LoraAdapter], tell: Tell) -> dict[str, Tensor]:
    """Second moments of every adapted module's input; kept in the run folder, named by what decides them."""
    modules = sorted({name for adapter in adapters.values() for name in adapter.pairs})
    base, config = run.base(), run.config
    texts = load_public(config.align.source, limit=config.compress.calibration_examples, config=config.data)
    parts = [
        base.hash,
        models.tokenizer_digest(base),
        str(config.data.max_tokens),
        config.data.chat_template,
        models.dtype_name(config.frozen_dtype),
        *modules,
        *(t.digest() for t in texts),
    ]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    path = run.folder / f"moments-{digest}.safetensors"
    if not path.exists():
        model = models.load_model(base, dtype=config.frozen_dtype)
        blocks = tokenize(
            texts,
            models.load_tokenizer(base),
            max_tokens=config.data.max_tokens,
            chat_template=config.data.chat_template,
        )
        found = calibrate.second_moments(
            model,
            blocks,
            modules,
            progress=lambda done, total: tell(_said("calibrating", "texts", done, total)),
        )
        tokens = sum(len(block.ids) for block in blocks)
        calibrate.save(
            found, path, base_hash=base.hash, base_model=base.name, examples=len(blocks), tokens=tokens
        )
    return calibrate.load(path, base_hash=base.hash, base_model=base.name, modules=modules)
