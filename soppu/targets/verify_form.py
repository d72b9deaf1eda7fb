"""Folders as LoRAX needs them: what in a PEFT folder it would get wrong without an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from soppu import files
from soppu.adapter import CONFIG_FILE
from soppu.compress.lorax_export import RANKS
from soppu.errors import AdapterError
from soppu.module_names import split_layer
from soppu.targets.lorax_store import sums_of
from soppu.targets.lorax_volume import address

RULES = ("files", "rank", "alpha", "dtype", "names", "uniform", "base name", "content")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_ADDRESS = re.compile(r"[0-9a-f]{16}")
_OFF = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform")
Shape = tuple[int, ...]


@dataclass
class Folder:
    """What a folder holds, without its numbers."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[Shape, str]] = field(default_factory=dict)  # name -> shape and dtype
    faults: list[str] = field(default_factory=list)  # of its files

    def ranks(self) -> set[int]:
        """All ranks of its tensors."""
        return {shape[0 if "lora_A" in name else -1] for name, (shape, _) in self.tensors.items() if shape}


def check(
    folders: Mapping[str, Path], *, model_id: str, shapes: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, list[str]]:
    """Rule -> what breaks it, user by user.

    Args:
        model_id: what the server calls its base model.
        shapes: module -> (o, i) of the base model; None leaves unchecked what only it can tell.
    """
    faults: dict[str, list[str]] = {rule: [] for rule in RULES}
    seen: dict[str, Folder] = {user: _open(path) for user, path in folders.items()}
    for user, one in seen.items():
        for rule, fault in _faults(one, model_id=model_id, shapes=shapes):
            faults[rule].append(f"{user}: {fault}")
    ranks = sorted({one.config.get("r", 0) for one in seen.values() if not one.faults})
    if len(ranks) > 1:
        faults["rank"].append(f"ranks {ranks} in one fleet: batches of several ranks take the slow path")
    return faults


def _open(path: Path) -> Folder:
    made = Folder(path)
    try:
        made.config = files.read_object(path / CONFIG_FILE, error=AdapterError, cure="export it again")
    except (OSError, AdapterError) as error:
        made.faults.append(f"{CONFIG_FILE}: {error}")
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stream:
                if "total_size" in (stream.metadata() or {}):
                    made.faults.append(f"{file.name}: total_size in its metadata ends LoRAX's size check")
                for name in stream.keys():
                    part = stream.get_slice(name)
                    made.tensors[name] = tuple(part.get_shape()), str(part.get_dtype())
        except (SafetensorError, OSError) as error:
            made.faults.append(f"{file.name}: {error}")
    if not made.tensors:
        made.faults.append("no tensors in *.safetensors")
    made.faults += [f"{file.name}: LoRAX would read it too" for file in path.glob("*") if _is_read(file.name)]
    return made


def _is_read(name: str) -> bool:
    return name.endswith(".bin") or name in ("config.json", "special_tokens_map.json") or "token" in name


def _faults(
    one: Folder, *, model_id: str, shapes: Mapping[str, tuple[int, int]] | None
) -> Iterator[tuple[str, str]]:
    yield from (("files", fault) for fault in one.faults)
    if one.path.is_dir() and _ADDRESS.fullmatch(one.path.name):
        if address(sums_of(one.path)) != one.path.name:
            yield "content", f"{one.path} does not hold what it was named after"
    if not one.config or not one.tensors:
        return
    r = one.config.get("r")
    if r not in RANKS or one.ranks() != {r}:
        yield "rank", f"r {r}, tensors of rank {sorted(one.ranks())}; allowed: {', '.join(map(str, RANKS))}"
    if one.config.get("lora_alpha") != r:
        yield "alpha", f"lora_alpha {one.config.get('lora_alpha')}, r {r}: the scale is not folded in"
    for name in _OFF:
        if one.config.get(name):
            yield "alpha", f"{name} = {json.dumps(one.config[name])[:60]} is not read by LoRAX"
    if kinds := sorted({dtype for _, dtype in one.tensors.values()} - {"F16", "BF16"}):
        yield "dtype", f"{', '.join(kinds)}; allowed: F16, BF16"
    named = one.config.get("base_model_name_or_path")
    if named not in (None, "", model_id):
        yield "base name", f"base_model_name_or_path {named!r}, the server's model is {model_id!r}"
    yield from _module_faults(one, shapes)


def _module_faults(one: Folder, shapes: Mapping[str, tuple[int, int]] | None) -> Iterator[tuple[str, str]]:
    modules: dict[str, dict[str, Shape]] = {}
    for name, (shape, _) in one.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or len(shape) != 2:
            yield "names", f"{name} {list(shape)} is ignored by LoRAX"
        else:
            modules.setdefault(match["module"], {})[match["side"]] = shape
    for module, half in modules.items():
        if len(half) < 2:
            yield "names", f"{module}: lora_{'B' if 'A' in half else 'A'} is missing"
            continue
        found = half["B"][0], half["A"][1]
        if shapes is not None and shapes.get(module) != found:
            yield "names", f"{module} {found}: the base model has {shapes.get(module, 'no such module')}"
    parts = [split for module in modules if (split := split_layer(module))]
    known = [split[1] for module in shapes or modules if (split := split_layer(module))]
    for kind in sorted({(before, after) for before, _, after in parts}):
        layers = {layer for before, layer, after in parts if (before, after) == kind}
        if missing := sorted(set(range(1 + max(known))) - layers):
            yield "uniform", f"{kind[1].strip('.')} is missing on layers {missing}: LoRAX drops it on all"
