"""Batch: rows of different users decoded together, one token a step. Queueing: `soppu.serve.engine`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from soppu.errors import RequestError
from soppu.serve.generation import Generation
from soppu.serve.layers import Router
from soppu.serve.refusals import failed
from soppu.serve.routing import Routing


@dataclass(frozen=True, eq=False)
class Runner:
    """The model as a batch runs it: weights, the router its adapted layers listen to, and the padding id."""

    model: PreTrainedModel
    router: Router
    pad: int

    def forward(self, ids: Tensor, *, mask: Tensor, cache: DynamicCache, routing: Routing) -> Tensor:
        """Logits (b, v), fp32, after the last of `ids` (b, T); `mask` (b, cached + T) is 0 on padding."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self.router.using(routing):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1]
        return logits.float()


class Batch:
    """Rows that share one KV cache, padded on the left. `step` until `rows` is empty."""

    def __init__(self, runner: Runner, rows: Sequence[Generation]) -> None:
        self.rows = list(rows)
        self._runner = runner
        self._device = runner.model.device
        self._cache = DynamicCache(config=runner.model.config)
        width = max(len(row.ids) for row in self.rows)
        padding = [width - len(row.ids) for row in self.rows]
        self._ids = self._tensor(
            [[runner.pad] * p + row.ids for p, row in zip(padding, self.rows, strict=True)]
        )
        self._mask = self._tensor([[0] * p + [1] * (width - p) for p in padding])
        self._routing = self._route()

    @torch.inference_mode()
    def step(self) -> None:
        """One forward: every row gets its next token; rows that are finished or cancelled leave."""
        self._drop_done()
        if not self.rows:
            return
        logits = self._runner.forward(self._ids, mask=self._mask, cache=self._cache, routing=self._routing)
        tokens, logprobs = self._choose(logits)
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            if row.done:  # cancelled during the forward, or failed at its choice
                continue
            if math.isfinite(logprob):
                row.push(token, logprob)
            else:
                row.fail(_not_finite(row))
        self._ids = self._tensor([[token] for token in tokens])
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._drop_done()

    def _choose(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """A token and its logprob for every row; a row that cannot have one fails alone."""
        chosen = logits.argmax(-1)
        finite = logits.logsumexp(-1).isfinite().tolist()  # a single -inf only rules a token out
        for position, row in enumerate(self.rows):
            if not finite[position]:
                row.fail(_not_finite(row))
            elif not row.sampler.is_plain:
                try:
                    chosen[position] = row.sampler.choose(logits[position].cpu(), row.ids)
                except RuntimeError as error:  # torch.multinomial, where the parameters overflow the scores
                    row.fail(failed(f"no token can be chosen with these parameters: {error}"))
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        return chosen.tolist(), logprobs.tolist()

    def _drop_done(self) -> None:
        keep = [position for position, row in enumerate(self.rows) if not row.done]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[position] for position in keep]
        if not self.rows:
            return
        index = self._tensor(keep)
        self._cache.batch_select_indices(index)
        self._ids, self._mask = self._ids[index], self._mask[index]
        self._routing = self._route()

    def _route(self) -> Routing:
        return Routing([row.job.resolved.slot for row in self.rows])

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _not_finite(row: Generation) -> RequestError:
    return failed(f"the logits of adapter {row.job.resolved.adapter_id!r} are not finite")
