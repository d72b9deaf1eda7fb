"""Decoder: one forward of the base model with every row's adapter over a `KVCache`. Two ways to run it.

`LlamaDecoder` runs the families built like Llama and is several times faster on a CPU; `GeneralDecoder` runs
transformers' own code for all others. Both choose the same greedy tokens.
"""

from __future__ import annotations

import logging
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from soppu.serve.decoders.kv_cache import KVCache, Step
from soppu.serve.decoders.llama import LlamaDecoder, obstacle
from soppu.serve.decoders.row_pages import Part
from soppu.serve.decoders.transformers_decoder import GeneralDecoder
from soppu.serve.layers.adapted_linear import Router
from soppu.serve.layers.factors import Slot
from soppu.serve.layers.routing import Routing

_LOG = logging.getLogger(__name__)


class Decoder(Protocol):
    """What the batch runs. `cache` holds the rows' keys and values between forwards."""

    cache: KVCache

    def forward(self, step: Step, routing: Routing) -> Tensor:
        """Logits (b, v), fp32, after every row's last own token in `step`; `routing` is of these rows.

        (b T, v) after each of the tokens, padding too, where the step wants `every` one. Where it is `silent`
        they may be anything.
        """
        ...

    def parts(self, slot: Slot | None) -> tuple[Part, ...]:
        """The layers of a row of this adapter, cut where others may use what was read of a prompt; () not."""
        ...


def make_decoder(model: PreTrainedModel, router: Router, cache: KVCache) -> Decoder:
    """The fastest decoder that runs this model; the log says why it is the slower one.

    Raises:
        UnsupportedModel: neither runs it.
    """
    why = obstacle(model, limit=cache.limit)
    if not why:
        return LlamaDecoder(model, cache)
    _LOG.info("transformers' own forward is used, which is slower: %s", why)
    return GeneralDecoder(model, router, cache)
