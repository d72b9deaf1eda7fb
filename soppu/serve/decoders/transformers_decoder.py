"""GeneralDecoder: any decoder-only model of transformers, by its own code, over the rows of a `KVCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from soppu.errors import UnsupportedModel
from soppu.serve.decoders.kv_cache import KVCache, Sizes, Step
from soppu.serve.decoders.row_pages import Part
from soppu.serve.layers.adapted_linear import Router
from soppu.serve.layers.factors import Slot
from soppu.serve.layers.routing import Routing

_LAYERS = ("full_attention", "sliding_attention")


class GeneralDecoder:
    """See `soppu.serve.decoders.decoder.Decoder`. The model's adapted layers listen to `router`.

    Raises:
        UnsupportedModel: a layer keeps a state other than keys and values of all tokens.
    """

    def __init__(self, model: PreTrainedModel, router: Router, cache: KVCache) -> None:
        config = model.config
        if odd := sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYERS)):
            raise UnsupportedModel(
                f"{config.model_type}: layers of type {odd[0]}; served are {', '.join(_LAYERS)}"
            )
        placed = model._can_compile_fullgraph and not getattr(config, "alibi", False)
        if not placed or config.model_type == "bloom":
            raise UnsupportedModel(
                f"{config.model_type}: it does not run over a static cache with positions row by row"
            )
        self.cache = cache
        cache.prepare(Sizes(layers=config.get_text_config().num_hidden_layers))
        self._model = model
        self._router = router

    def parts(self, slot: Slot | None) -> tuple[Part, ...]:
        """Nothing is shared: transformers' forward begins with the first layer."""
        return ()

    @torch.inference_mode()
    def forward(self, step: Step, routing: Routing) -> Tensor:
        """Logits (b, v), fp32; (b T, v) where the step wants every one."""
        self.cache.begin(step)
        last = step.last % step.ids.shape[1]
        padded = len(set(step.counts)) > 1
        with self._router.using(routing):
            output = self._model(
                input_ids=step.ids,
                attention_mask=self._masks(step),
                position_ids=step.positions,
                past_key_values=_Slots(self.cache, step),
                use_cache=True,
                logits_to_keep=0 if padded or step.every else 1,
            )
        if step.every:
            return output.logits.flatten(0, 1).float()
        logits = output.logits[torch.arange(len(last)), last] if padded else output.logits[:, -1]
        return logits.float()

    def _masks(self, step: Step) -> Tensor | dict[str, Tensor]:
        """4D masks, which transformers uses as they are; one for each kind of layer where it has kinds."""
        config, dtype = self._model.config, self._model.dtype
        window = getattr(config, "sliding_window", None) or 0
        kinds = set(getattr(config, "layer_types", None) or ())
        if "sliding_attention" not in kinds:
            return step.mask(dtype, window=0 if kinds else window)[:, None]
        windows = {"full_attention": 0, "sliding_attention": window}
        return {kind: step.mask(dtype, window=windows[kind])[:, None] for kind in kinds}


class _Slots(Cache):
    """The cache as transformers sees it in one forward."""

    def __init__(self, store: KVCache, step: Step) -> None:
        super().__init__(layers=[])
        self._store = store
        self._step = step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (b, heads, T, d) of one layer; what its queries attend to, (b, heads, seen, d)."""
        kv = torch.stack((key_states, value_states), dim=1).permute(0, 3, 1, 2, 4)
        self._store.write(layer_idx, self._step, kv)
        if self._step.fresh:
            return key_states, value_states
        return self._store.read(layer_idx, self._step, like=key_states.transpose(1, 2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this forward, of the longest row."""
        return max(self._step.starts)
