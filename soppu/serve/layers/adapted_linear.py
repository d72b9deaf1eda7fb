"""Layers with per-row adapters: a frozen linear layer plus what the current forward's routing adds.

What is added to which row is `soppu.serve.layers.routing`; generation is `soppu.serve.engine.engine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from soppu.errors import UnsupportedModel
from soppu.models import linear_shape
from soppu.serve.layers.deltas import Layers
from soppu.serve.layers.routing import Routing

# model_type -> layers that transformers feeds with (rows * tokens, features).
_FLAT: Mapping[str, tuple[str, ...]] = {"opt": ("fc1", "fc2")}


class Router:
    """What the adapted layers of one model share: the routing of the current forward."""

    def __init__(self) -> None:
        self.routing: Routing | None = None

    @contextmanager
    def using(self, routing: Routing) -> Iterator[None]:
        """Route the forwards inside the block. One thread runs forwards; this is not reentrant."""
        self.routing = routing
        try:
            yield
        finally:
            self.routing = None


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear` or `Conv1D` plus the change its router asks for, row by row.

    Without a routing it is the base layer, bit for bit. A `flat` layer takes all rows as one matrix (b T, i),
    as transformers' OPT passes them to its MLP.
    """

    def __init__(self, base: nn.Module, *, name: str, router: Router, flat: bool = False) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.flat = flat
        self._router = router
        self._layers = Layers((name,), (linear_shape(base)[0],))

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for model code that reads its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(b, T, i) -> (b, T, o); (b T, i) -> (b T, o) where the layer is flat.

        Raises:
            UnsupportedModel: the layer's input does not keep the batch as its first dimension.
        """
        y: Tensor = self.base(x)
        routing = self._router.routing
        if routing is None or not routing.changes(self._layers):
            return y
        if not self.flat and (x.ndim != 3 or x.shape[0] != routing.rows):
            raise UnsupportedModel(
                f"{self.name}: input of shape {tuple(x.shape)} for a batch of {routing.rows} rows;"
                " per-row adapters need (rows, tokens, features)"
            )
        routing.apply(self._layers, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


def install(model: nn.Module, names: Iterable[str], *, router: Router) -> None:
    """Wrap the named layers of `model` that are not wrapped yet. Base weights stay as they are."""
    flat = _FLAT.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, leaf)
        if not isinstance(layer, AdaptedLinear):
            setattr(parent, leaf, AdaptedLinear(layer, name=name, router=router, flat=leaf in flat))
