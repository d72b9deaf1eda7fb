"""LlamaDecoder: the forward of the families built like Llama, written for few rows and many steps on a CPU.

Projections that share an input are one product in oneDNN's layout; keys and values are written once, and a
query head uses its group's keys without repeating them. Adapters are added to the products' outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from soppu.serve.decoders import attention as kernel
from soppu.serve.decoders.kv_cache import KVCache, Sizes, Step
from soppu.serve.decoders.row_pages import Part
from soppu.serve.decoders.sharing import Sharing
from soppu.serve.layers.deltas import Layers
from soppu.serve.layers.factors import Slot
from soppu.serve.layers.packed_linear import PackedLinear
from soppu.serve.layers.routing import Routing

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY = ("default", "linear", "llama3", "yarn")  # kinds whose angles do not depend on the length
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def obstacle(model: PreTrainedModel, *, limit: int) -> str:
    """Why `LlamaDecoder` cannot run this model on rows of up to `limit` tokens; "" where it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r}, not one of {', '.join(FAMILIES)}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r}, not 'silu'"
    kind = model.model.rotary_emb.rope_type
    if kind not in _ROTARY:
        return f"rotary embedding {kind!r}, not one of {', '.join(_ROTARY)}"
    window = getattr(config, "sliding_window", None) or limit
    if window < limit:
        return f"a sliding window of {window}, below the {limit} tokens of a row"
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.endswith(("_proj", "lm_head")) and not (
            isinstance(weight, Tensor) and weight.is_floating_point()
        ):
            return f"{name} has no plain weight"
    return ""


@dataclass(frozen=True, eq=False)
class _Heads:
    """Query heads, key heads, and the size of each."""

    q: int
    kv: int
    d: int


@dataclass(frozen=True, eq=False)
class _Projection:
    """Linear layers of one input as one product, and the names adapters have for them."""

    layers: Layers
    linear: PackedLinear

    @classmethod
    def of(cls, parent: nn.Module, prefix: str, leaves: tuple[str, ...]) -> _Projection:
        modules: list[Any] = [parent.get_submodule(leaf) for leaf in leaves]
        widths = tuple(module.weight.shape[0] for module in modules)
        return cls(Layers(tuple(f"{prefix}{leaf}" for leaf in leaves), widths), PackedLinear.of(modules))

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor | None = None) -> Tensor:
        """(m, i) -> (m, o), with the change of every row's adapter, and the residual where there is one."""
        y = self.linear(x) if residual is None else self.linear.plus(x, residual)
        routing.apply(self.layers, x, y)
        return y


class _Block:
    """One decoder layer."""

    def __init__(self, layer: Any, name: str, heads: _Heads) -> None:
        attention, self._heads = layer.self_attn, heads
        self._qkv = _Projection.of(attention, f"{name}.self_attn.", _QKV)
        self._o = _Projection.of(attention, f"{name}.self_attn.", ("o_proj",))
        self._gate_up = _Projection.of(layer.mlp, f"{name}.mlp.", _GATE_UP)
        self._down = _Projection.of(layer.mlp, f"{name}.mlp.", ("down_proj",))
        self._norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._head_norms: tuple[_Norm, _Norm] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = _Norm(attention.q_norm), _Norm(attention.k_norm)

    def forward(
        self, h: Tensor, attention: _Attention, routing: Routing, *, only: Tensor | None = None
    ) -> Tensor:
        """(m, d) -> (m, d); of the tokens `only` alone, one a row, where that is all that is wanted."""
        seen = attention(*self._read(h, attention, routing))
        if only is not None:
            h, seen = h.index_select(0, only), seen.index_select(0, only)
        h = self._o(seen, routing, residual=h)
        gate, up = self._gate_up(self._norms[1](h), routing).chunk(2, dim=1)
        return self._down(F.silu(gate).mul_(up), routing, residual=h)

    def remember(self, h: Tensor, attention: _Attention, routing: Routing) -> None:
        """Keys and values of the tokens (m, d), and nothing else."""
        attention.write(*self._read(h, attention, routing))

    def _read(self, h: Tensor, attention: _Attention, routing: Routing) -> tuple[Tensor, Tensor]:
        """Queries and keys (m, q + kv, d), turned, and values (m, kv, d)."""
        heads = self._heads
        qkv = self._qkv(self._norms[0](h), routing).view(-1, heads.q + 2 * heads.kv, heads.d)
        qk, v = qkv[:, : heads.q + heads.kv], qkv[:, heads.q + heads.kv :]
        if self._head_norms is not None:
            q_norm, k_norm = self._head_norms
            qk = torch.cat((q_norm(qk[:, : heads.q]), k_norm(qk[:, heads.q :])), dim=1)
        return attention.turn(qk), v


class _Norm:
    """RMSNorm over the last dimension."""

    def __init__(self, norm: Any) -> None:
        self._weight = norm.weight.detach()
        self._eps = float(norm.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class _Attention:
    """What all layers of one step share: angles, places in the cache, and the attention mask."""

    def __init__(self, step: Step, cache: KVCache, heads: _Heads, angles: tuple[Tensor, Tensor]) -> None:
        self._step, self._cache, self._heads = step, cache, heads
        cos, sin = (angle.view(-1, 1, heads.d) for angle in angles)
        half = heads.d // 2
        self._cos, self._sin = cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._layer = step.first
        self._kernel: kernel.Attending | None = None
        if kernel.runs(cos.dtype, cos.device, heads.d):
            self._kernel = kernel.Attending(step, cache)
        elif not step.fresh:
            self._bias = self._seen_by(cos.dtype)

    def turn(self, qk: Tensor) -> Tensor:
        """Rotary positions for queries and keys (m, heads, d) at once: q cos + rotate_half(q) sin."""
        swapped = qk.roll(self._heads.d // 2, -1)  # halves swapped; `_sin` holds the sign
        return torch.addcmul(qk * self._cos, swapped, self._sin)

    def write(self, qk: Tensor, v: Tensor) -> None:
        """Keep the next layer's keys and values, arguments as in a call."""
        if self._kernel is not None:
            self._kernel.write(self._layer, qk[:, self._heads.q :], v)
        else:
            self._cache.write(self._layer, self._step, self._pairs(qk, v))
        self._layer += 1

    def __call__(self, qk: Tensor, v: Tensor) -> Tensor:
        """Queries and keys (m, q + kv, d), values (m, kv, d) of the next layer -> (m, q d)."""
        heads, (b, T) = self._heads, self._step.ids.shape
        self._layer += 1
        if self._kernel is not None:
            return self._kernel(self._layer - 1, qk[:, : heads.q], qk[:, heads.q :], v)
        kv = self._pairs(qk, v)
        self._cache.write(self._layer - 1, self._step, kv)
        q = qk[:, : heads.q].reshape(b, T, heads.q, heads.d)
        seen = self._among_themselves(q, kv) if self._step.fresh else self._over_cache(q)
        return seen.reshape(b * T, -1)

    def _pairs(self, qk: Tensor, v: Tensor) -> Tensor:
        """(b, T, 2, kv, d): keys and values side by side."""
        b, T = self._step.ids.shape
        kv = torch.stack((qk[:, self._heads.q :], v), dim=1)
        return kv.view(b, T, 2, self._heads.kv, self._heads.d)

    def _among_themselves(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attention (b, T, q, d) of rows with nothing in the cache."""
        k, v = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        gqa = self._heads.q != self._heads.kv
        seen = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=gqa)
        return seen.transpose(1, 2)

    def _over_cache(self, q: Tensor) -> Tensor:
        """Attention (b, T, q, d) over the cache: a group's queries are stacked over the group's keys."""
        heads, (b, T) = self._heads, q.shape[:2]
        group = heads.q // heads.kv
        keys, values = self._cache.read(self._layer - 1, self._step, like=q[:, :, : heads.kv])
        q = q.view(b, T, heads.kv, group, heads.d).permute(0, 2, 3, 1, 4).reshape(b, heads.kv, -1, heads.d)
        seen = self._weigh(q, keys, values)
        return seen.view(b, heads.kv, group, T, heads.d).permute(0, 3, 1, 2, 4)

    def _weigh(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(b, kv, queries, d) each: softmax(q k^T / sqrt(d) + bias) v."""
        if q.dtype != torch.float32 or q.device.type != "cpu":
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._bias)
        # two small products are faster than torch's fused kernel here
        shape, bias = q.shape, self._bias.expand(-1, self._heads.kv, -1, -1).flatten(0, 1)
        q, keys, values = (rows.flatten(0, 1) for rows in (q, keys, values))
        weights = torch.baddbmm(bias, q, keys.mT, alpha=self._heads.d**-0.5).softmax(-1)
        return torch.bmm(weights, values).view(shape)

    def _seen_by(self, dtype: torch.dtype) -> Tensor:
        """(b, 1, 1 or group T, seen)."""
        mask = self._step.mask(dtype)
        if mask.shape[1] > 1:
            mask = mask.repeat(1, self._heads.q // self._heads.kv, 1)
        return mask[:, None]


class LlamaDecoder:
    """See `decoders.decoder.Decoder`. Holds a packed copy of the linear weights: twice their memory."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self.cache = cache
        self._model: Any = model
        attention = model.model.layers[0].self_attn
        config = model.config
        self._heads = _Heads(config.num_attention_heads, config.num_key_value_heads, attention.head_dim)
        layers = enumerate(model.model.layers)
        self._blocks = [_Block(layer, f"model.layers.{n}", self._heads) for n, layer in layers]
        self._norm = _Norm(model.model.norm)
        self._head = _Projection.of(model, "", ("lm_head",))
        self._sharing = Sharing(len(self._blocks))
        item = model.dtype.itemsize
        sizes = Sizes(len(self._blocks), self._heads.kv, self._heads.d, config.hidden_size, item)
        cache.prepare(sizes, like=torch.empty(0, dtype=model.dtype, device=model.device))

    def parts(self, slot: Slot | None) -> tuple[Part, ...]:
        """What of a row's keys and values others may use: everything, in parts."""
        return self._sharing.parts(slot) if self.cache.prefix else ()

    @torch.inference_mode()
    def forward(self, step: Step, routing: Routing) -> Tensor:
        """Logits (b, v), fp32; (b T, v) where the step wants every one, (0, v) where none."""
        self.cache.begin(step)
        if step.given is None:
            h = F.embedding(step.ids.view(-1), self._model.model.embed_tokens.weight)
        else:
            h = step.given.flatten(0, 1)
        angles = self._model.model.rotary_emb(h, step.positions)
        attention = _Attention(step, self.cache, self._heads, angles)
        only = None if step.every or step.ids.shape[1] == 1 else step.last
        for number in range(step.first, len(self._blocks) - 1):
            h = self._blocks[number].forward(h, attention, routing)
            if number + 1 in step.keep:
                step.kept[number + 1] = h
        if step.silent:
            self._blocks[-1].remember(h, attention, routing)
            return h.new_empty(0, self._model.lm_head.weight.shape[0], dtype=torch.float32)
        h = self._blocks[-1].forward(h, attention, routing, only=only)
        return self._logits(self._norm(h), routing).float()

    def _logits(self, x: Tensor, routing: Routing) -> Tensor:
        head = self._model.lm_head
        if head._forward_hooks:  # as in transformers' own forward, hooks are called
            logits: Tensor = head(x)
            routing.apply(self._head.layers, x, logits)
            return logits
        return self._head(x, routing)
