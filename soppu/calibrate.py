"""Second moments of layer inputs: what `linalg.whitening` has to know of a base model, and its file.

They are taken once a base model, on public text, without any adapter, and serve all users. The file is a
working file of whoever compresses; no bundle and no server needs it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers  # its names are asked for where they are used: importing one takes seconds
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from soppu import files
from soppu.base_identity import Base, check
from soppu.compress.linalg import whitening
from soppu.data import Block
from soppu.errors import BundleError, ConfigError, ModelError, UnsupportedModel

FORMAT = 1
_METADATA_KEY = "soppu-moments"


class _Tally:
    """Sums of x and x x^T in float64. Modules given one and the same tensor share the sums of the first."""

    def __init__(self, *, skip: int) -> None:
        self.leader: dict[str, str] = {}
        self.squares: dict[str, Tensor] = {}
        self._skip = skip
        self._sums: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()
        self._last: tuple[Tensor, int, str] | None = None

    def see(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Count the input of the module of that name: its forward pre-hook."""
        x, leader = args[0], name
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            leader = self._last[2]
        if self.leader.setdefault(name, leader) != leader:
            raise UnsupportedModel(
                f"{name}: shares its input with another layer in one text and not in the next"
            )
        if leader != name:
            return
        self._last = (x, x._version, name)
        rows = x.detach().reshape(-1, x.shape[-1])[self._skip :].double()
        if name not in self.squares:
            self.squares[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._sums[name] = rows.new_zeros(rows.shape[1])
        self.squares[name].addmm_(rows.T, rows)
        self._sums[name].add_(rows.sum(0))
        self._tokens[name] += len(rows)

    def moments(self, name: str, *, centred: bool) -> Tensor:
        """The mean of x x^T of a module that leads, about the mean of x or about zero. float32."""
        if not self._tokens[name]:
            raise ModelError(f"{name}: no token of the text counts for this layer; texts need two or more")
        C = self.squares[name] / self._tokens[name]
        if centred:
            mean = self._sums[name] / self._tokens[name]
            C = C - torch.outer(mean, mean)
        if not bool(torch.isfinite(C.float()).all()):
            raise ModelError(f"{name}: its input holds NaN or Inf, or numbers whose squares leave float32")
        return C.float()


def linear_names(model: nn.Module) -> list[str]:
    """Every layer with an input to take moments of: nn.Linear and Conv1D, the output head left out."""
    head = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D) and module is not head
    ]


def select(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that a pattern fits, in the order of `names`; all of them without patterns.

    A pattern is a regular expression for a whole name, or for its end after a dot, as in PEFT: `q_proj` fits
    that layer everywhere, a full name only itself.

    Raises:
        ConfigError: a pattern that is not a regular expression, or fits nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)}
        except re.error as error:
            raise ConfigError(f"modules: {pattern!r} is not a regular expression: {error}") from None
        if not found:
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ConfigError(f"modules: {pattern!r} fits no linear layer of the model; it has {leaves}")
        chosen |= found
    return [name for name in names if name in chosen or not patterns]


@torch.no_grad()
def second_moments(
    model: transformers.PreTrainedModel,
    blocks: Sequence[Block],
    modules: Sequence[str],
    *,
    centred: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """C = E[(x - m)(x - m)^T], m = E[x], of the input x of every named layer, or C = E[x x^T].

    The first token of a text is left out where C is centred: decoders park attention on it, and a layer may
    see it tens of times as large as any other. That token and the mean input can make up most of E[x x^T],
    and an error weighed by them can shrink while the loss of the compressed adapter grows.

    Blocks run one at a time, so there is no padding to leave out. Products and sums are float64 and the
    result is rounded once. Cost: a forward pass, and O(i^2) a token and 8 i^2 bytes for each different input;
    layers fed with one tensor, such as q_proj, k_proj and v_proj, share one sum and one tensor of the result.

    Args:
        model: the base model, without an adapter.
        modules: names of nn.Linear or Conv1D layers.
        centred: about the mean, over all tokens but the first of each text; otherwise about zero, over all.
        progress: called with (blocks done, blocks in all) after every block.

    Returns:
        module -> (i, i) float32, symmetric, on the model's device; in the order of `modules`.

    Raises:
        ModelError: a module the model lacks or never runs, no blocks, or an input with NaN or Inf.
        UnsupportedModel: layers that share their input in one text and not in another.
    """
    layers = _layers(model, modules)
    if not blocks:
        raise ModelError("no text to take second moments of; at least one block is needed")
    # the head is a large part of a small model's forward, and is left out where that will do
    prefix = f"{model.base_model_prefix}."
    body = model.base_model if all(name.startswith(prefix) for name in modules) else model
    tally = _Tally(skip=1 if centred else 0)
    hooks = [layer.register_forward_pre_hook(partial(tally.see, name)) for name, layer in layers.items()]
    try:
        for done, block in enumerate(blocks, start=1):
            body(input_ids=block.ids[None].to(model.device), use_cache=False)
            if progress is not None:
                progress(done, len(blocks))
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [name for name in modules if name not in tally.leader]:
        raise ModelError(f"{unseen[0]}: no token of the text has reached this layer")
    squares = {leader: tally.moments(leader, centred=centred) for leader in tally.squares}
    return {name: squares[tally.leader[name]] for name in modules}


def save(
    moments: Mapping[str, Tensor],
    path: Path,
    *,
    base_hash: str,
    base_model: str = "",
    examples: int,
    tokens: int,
    centred: bool = True,
) -> None:
    """Write `second_moments` to a safetensors file, atomically: upper triangles in float32, shared ones once.

    That is 2 i (i + 1) bytes for each different input; float16 as a square takes as much and loses digits.

    Args:
        base_hash: hash of the base model's files, and `base_model` its name; `load` compares them.
        examples: how many texts were seen; this, `tokens` and `centred` are for whoever reads the file.

    Raises:
        StorageError: the disk refused the write.
    """
    keys: dict[int, str] = {}
    names = {name: keys.setdefault(id(C), name) for name, C in moments.items()}
    triangles = {key: _upper(moments[key]) for key in sorted(set(names.values()))}
    facts = {
        "format": FORMAT,
        "base_hash": base_hash,
        "base_model": base_model,
        "examples": examples,
        "tokens": tokens,
        "centred": centred,
        "modules": names,
    }
    metadata = {_METADATA_KEY: json.dumps(facts, sort_keys=True)}
    files.write_bytes(path, save_tensors(triangles, metadata=metadata))


def load(
    path: Path, *, base_hash: str, base_model: str = "", modules: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Read and check what `save` wrote. O(i^3) for each different input.

    Args:
        base_hash: of the base model the moments must be of; `base_model` is its name. "" where unknown.
        modules: those that must be there; only they are returned. All, if none is named.

    Returns:
        module -> (i, i) float32; modules that shared a tensor share it again.

    Raises:
        BundleError: no such file, not this format, damaged, a module missing, or a tensor that is not finite,
            symmetric and positive semidefinite up to rounding.
        ModelError: another base model.
    """
    facts, tensors = _read(path)
    held = Base(facts.get("base_model", ""), facts["base_hash"])
    check(held, Base(base_model, base_hash), who=str(path), whose="expected", error=ModelError)
    keys: Mapping[str, str] = facts["modules"]
    if missing := [name for name in modules if name not in keys]:
        raise BundleError(f"{path}: no second moments of {missing[0]}; it holds {len(keys)} other modules")
    asked = {name: keys[name] for name in modules or keys}
    squares = {key: _square(tensors.get(key), f"{path}: {key}") for key in set(asked.values())}
    return {name: squares[key] for name, key in asked.items()}


def _layers(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Module]:
    if not modules:
        raise ModelError("no modules to take second moments of; at least one is needed")
    there = dict(model.named_modules())
    for name in modules:
        if not isinstance(there.get(name), nn.Linear | transformers.pytorch_utils.Conv1D):
            kind = type(there[name]).__name__ if name in there else "no such module"
            raise ModelError(f"{name}: the base model has {kind} there, expected an nn.Linear or a Conv1D")
    return {name: there[name] for name in modules}


def _upper(C: Tensor) -> Tensor:
    return C.detach().cpu().float()[torch.ones(C.shape, dtype=torch.bool).triu()]


def _square(triangle: Tensor | None, source: str) -> Tensor:
    i = 0 if triangle is None else (int((8 * triangle.numel() + 1) ** 0.5) - 1) // 2
    if triangle is None or triangle.ndim != 1 or triangle.dtype != torch.float32 or not i:
        raise BundleError(f"{source}: no float32 vector of that name in the file")
    if triangle.numel() != i * (i + 1) // 2:
        raise BundleError(f"{source}: {triangle.numel()} numbers are no upper triangle")
    C = torch.zeros(i, i)
    C[torch.ones(i, i, dtype=torch.bool).triu()] = triangle
    C = C + C.triu(1).T
    if reason := whitening.fault(C):
        raise BundleError(f"{source}: {reason}")
    return C


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        data = path.read_bytes()
        tensors = load_tensors(data)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise BundleError(f"{path}: truncated or not safetensors: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(_METADATA_KEY)
    if text is None:
        raise BundleError(f"{path}: no {_METADATA_KEY!r} in the metadata: not a file of second moments")
    facts = json.loads(text)
    if facts["format"] != FORMAT:
        raise BundleError(f"{path}: format version {facts['format']!r}, this reader knows {FORMAT}")
    return facts, tensors
