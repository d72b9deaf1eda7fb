"""A frozen model with one LoRA on it, as one `nn.Module`: what Accelerate and DeepSpeed can prepare.

PEFT puts the factors in; scale 1, A and B start as a client's do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from soppu.adapter import LoraPair
from soppu.data import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sample = tuple[Tensor, Tensor]
"""What a model reads, ids (t,) or the states (t, d) below its lowest layer, and labels (t,)."""


class Decoder(Protocol):
    """A whole model or the top of one: `soppu.federation.emulator.TopModel` is one."""

    model: PreTrainedModel

    def hidden(self, below: Tensor, mask: Tensor) -> Tensor:
        """Final-norm output (b, t, d) of inputs (b, t) or (b, t, d) and their mask (b, t)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., v) of final-norm outputs (..., d)."""
        ...


class WholeModel:
    """All layers, fed with token ids: where nothing can be computed ahead."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def hidden(self, below: Tensor, mask: Tensor) -> Tensor:
        """See `Decoder`."""
        return self.model.get_decoder()(
            input_ids=below, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        return self.model.get_output_embeddings()(hidden)


class Pooled(nn.Module):
    """The model under training; calling it gives a batch's summed loss.

    Args:
        decoder: its model is changed: LoRA modules take the place of what `start` names.
        start: the factors it begins with, by module of `decoder.model`; copied, and kept in float32.
        fan_in_fan_out: whether the family stores weights as (i, o).
    """

    def __init__(
        self, decoder: Decoder, start: Mapping[str, LoraPair], *, fan_in_fan_out: bool = False
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - servers import no PEFT

        super().__init__()
        rank = next(iter(start.values())).rank
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(start), fan_in_fan_out=fan_in_fan_out
        )
        self.model: nn.Module = inject_adapter_in_model(config, decoder.model)
        self._decoder, self.names = decoder, tuple(start)
        for name, pair in start.items():
            for side, factor in (("A", pair.A), ("B", pair.B)):
                self._half(name, side).weight = nn.Parameter(factor.detach().float().clone())

    def forward(self, inputs: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Summed next-token cross-entropy (nats) over the labels (b, t) that are not IGNORE.

        The head runs only where a label counts: O(labels x v).
        """
        hidden = self._decoder.hidden(inputs, mask)[:, :-1]
        target = labels[:, 1:]
        counted = target != IGNORE
        return cross_entropy(self._decoder.logits(hidden[counted]).float(), target[counted], reduction="sum")

    def side(self, side: str) -> list[nn.Parameter]:
        """Every A, or every B, in the order of `names`."""
        return [self._half(name, side).weight for name in self.names]

    def pairs(self) -> dict[str, LoraPair]:
        """A copy of the factors as they are now, float32 on the CPU."""
        sides = (self.side("A"), self.side("B"))
        return {
            name: LoraPair(A.detach().cpu().clone(), B.detach().cpu().clone())
            for name, A, B in zip(self.names, *sides, strict=True)
        }

    @torch.no_grad()
    def load(self, pairs: Mapping[str, LoraPair]) -> None:
        """Give the factors other values, in place."""
        for name, A, B in zip(self.names, self.side("A"), self.side("B"), strict=True):
            A.copy_(pairs[name].A)
            B.copy_(pairs[name].B)

    def _half(self, name: str, side: str) -> Any:
        return getattr(self.model.get_submodule(name), f"lora_{side}")["default"]


def padded(samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, mask (b, t) and labels (b, t) of one batch on a device, padded to one length."""
    inputs = pad_sequence([inputs for inputs, _ in samples], batch_first=True)
    labels = pad_sequence([labels for _, labels in samples], batch_first=True, padding_value=IGNORE)
    lengths = torch.tensor([len(labels) for _, labels in samples])
    mask = (torch.arange(labels.shape[1])[None, :] < lengths[:, None]).long()
    return inputs.to(device), mask.to(device), labels.to(device)


def counted(sample: Sample) -> int:
    """Labels of a sample that a loss counts."""
    return int((sample[1][1:] != IGNORE).sum())
