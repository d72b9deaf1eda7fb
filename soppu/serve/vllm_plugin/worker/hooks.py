"""What hangs in vLLM's engine and workers, by names in `contacts`; the API server: `frontend.hooks`.

Into workers, of model runner V1 and V2:
    LOAD_MODEL, COMPUTE_HASH               wrapping the adapted layers
    PREPARE_V1, PREPARE_V2, DUMMY_RUN      which rows the tokens of a pass use
    ENGINE_WORKER                          changes asked for by the API server (`soppu_call`)
Into the engine:
    INIT_EXECUTOR                          a worker's refusal ends the engine without a traceback
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from soppu.compress.bundle.shelf import Shelf
from soppu.errors import SoppuError
from soppu.serve.layers import kernels
from soppu.serve.vllm_plugin import contacts, refusal, state
from soppu.serve.vllm_plugin.contacts import load, replace
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.worker import step
from soppu.serve.vllm_plugin.worker.resident import Form, Linear, Part
from soppu.serve.vllm_plugin.worker.static import Limits
from soppu.serve.vllm_plugin.worker.worker import Worker

_LOG = logging.getLogger("vllm.soppu")  # only loggers below "vllm" are shown
# Attention reads these weights itself, so it never sees a change of the layer's output.
_ABSORBED = ("kv_b_proj",)


class _Fingerprint:
    value = ""


def install(settings: Settings) -> None:
    """Define the operator, and replace what vLLM runs in its engine and workers."""
    step.register()
    on_cpu = load(contacts.CURRENT_PLATFORM).is_cpu()
    for which, contact in contacts.LOAD_MODEL.items():
        if on_cpu or which != "V1 CPU":  # which cannot be imported elsewhere
            replace(contact, functools.partial(_load_model, settings))
    for contact in contacts.DUMMY_RUN:
        replace(contact, _dummy_run)
    replace(contacts.PREPARE_V1, _prepare_v1)
    replace(contacts.PREPARE_V2, _prepare_v2)
    replace(contacts.COMPUTE_HASH, _compute_hash)
    load(contacts.ENGINE_WORKER).soppu_call = _call
    executor, name = contacts.owner(contacts.INIT_EXECUTOR)
    setattr(executor, name, refusal.noted()(executor.__init__))


def _load_model(settings: Settings, original: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    original(runner, *args, **kwargs)
    with refusal.noted():
        runner.soppu = _attach(runner, settings)


def _attach(runner: Any, settings: Settings) -> Worker:
    config = runner.vllm_config
    form = Form(dtype=config.model_config.dtype, device=runner.device, spare=settings.spare_rows)
    layers = dict(_linears(runner.model))
    bundles, limit = state.kept_bundles(), settings.resident_mib << 20
    how: Any
    if settings.kernel == "static" or form.device.type != "cpu":
        how = _limits(config, bundles)
    else:
        how = kernels.choose(settings.kernel, device=form.device, dtype=form.dtype)
    worker = Worker([line for line, _ in layers.values()], how, form, bundles=bundles, limit=limit)
    for number, linear in enumerate(worker.step.linears):
        layer = layers[linear.name][1]
        layer.quant_method = _adapted(layer.quant_method, number)
    # what of this worker shows in a compiled graph: which layers call the operator
    _Fingerprint.value = " ".join(linear.name for linear in worker.step.linears)
    users = ", ".join(f"{bundle.bundle_id[:12]} ({len(bundle.users)} users)" for bundle in bundles)
    how_much = f"{len(worker.step.linears)} of {len(layers)} layers adapted"
    _LOG.info("bundles %s: %s, %s kernel", users, how_much, getattr(how, "__name__", "static"))
    return worker


def _limits(config: Any, bundles: Sequence[Shelf]) -> Limits:
    """Buffers for the longest pass, padded ones included, and bases for one bundle more than there are."""
    scheduler, recorded = config.scheduler_config, config.compilation_config.max_cudagraph_capture_size
    tokens = max(scheduler.max_num_batched_tokens, recorded or 0)
    clusters = [bundle.clusters for bundle in bundles]
    return Limits(tokens, requests=scheduler.max_num_seqs, bases=sum(clusters) + max(clusters))


def _linears(model: Any) -> Iterator[tuple[str, tuple[Linear, Any]]]:
    base, row_parallel = load(contacts.LINEAR), load(contacts.ROW_LINEAR)
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    for name, layer in model.named_modules():
        prefix, dot, leaf = name.rpartition(".")
        if isinstance(layer, base) and leaf not in _ABSORBED:
            names = [f"{prefix}{dot}{part}" for part in packed.get(leaf, [leaf])]
            row = isinstance(layer, row_parallel)
            size = layer.input_size_per_partition if row else layer.input_size
            first = layer.tp_rank * size if row else 0
            parts = tuple(_parts(layer, names))
            out = parts[-1].at + parts[-1].size
            yield name, (Linear(name, first=first, size=size, out=out, parts=parts), layer)


def _parts(layer: Any, names: list[str]) -> Iterator[Part]:
    """The modules of one layer, as this rank holds them; nothing where they cannot be told apart."""
    sharded = isinstance(layer, load(contacts.COLUMN_LINEAR))
    size, rank = (layer.tp_size, layer.tp_rank) if sharded else (1, 0)
    wholes = list(getattr(layer, "output_sizes", None) or [layer.output_size])
    if len(names) == 1:
        wholes = [sum(wholes)]  # one module in the base model too, for instance c_attn
    at = 0
    for number, (name, whole) in enumerate(zip(names, wholes, strict=True)):
        local, first = whole // size, rank * (whole // size)
        if (
            isinstance(layer, load(contacts.QKV_LINEAR)) and number > 0
        ):  # few KV heads are copied to several ranks
            whole //= layer.num_kv_head_replicas
            first = rank // layer.num_kv_head_replicas * local
        yield Part(name, shape=(whole, layer.input_size), first=first, size=local, at=at)
        at += local


def _adapted(method: Any, number: int) -> Any:
    """The layer's own method with the users' change on top: before any all-reduce."""
    base = type(method)

    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        y = base.apply(self, layer, x, bias)
        torch.ops.soppu.apply(x, y, number)
        return y

    adapted = copy.copy(method)
    adapted.__class__ = type(f"Adapted{base.__name__}", (base,), {"apply": apply})
    return adapted


def _prepare_v1(original: Any, runner: Any, output: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
    rows = runner.input_batch.request_lora_mapping[: runner.input_batch.num_reqs]
    runner.soppu.step.begin(rows, counts)
    return original(runner, output, counts, *args, **kwargs)


def _prepare_v2(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """The batch is sorted in `original`, and says how; a request's slot is where its number lies."""
    batch = original(runner, *args, **kwargs)
    runner.soppu.step.begin(runner.lora_state.lora_ids[batch.idx_mapping_np], batch.num_scheduled_tokens)
    return batch


def _dummy_run(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    runner.soppu.step.clear()
    return original(runner, *args, **kwargs)


def _call(self: Any, method: str, *args: Any) -> list[Any]:
    """One method of our Worker; a refusal is returned, as vLLM takes exceptions for engine faults."""
    try:
        return ["", getattr(self.model_runner.soppu, method)(*args)]
    except SoppuError as error:
        return [str(error), None]


def _compute_hash(original: Any, config: Any, *args: Any, **kwargs: Any) -> str:
    """Compiled graphs are cached by this hash: one with our operator must not meet one without."""
    whole = f"{original(config, *args, **kwargs)} soppu 1 {_Fingerprint.value}"
    return hashlib.sha256(whole.encode()).hexdigest()[:10]
