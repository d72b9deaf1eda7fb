"""SharedModule: one module's basis and every user's core. Not for fitting it or writing it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soppu.adapter import LoraPair


@dataclass(frozen=True, eq=False)
class SharedModule:
    """D_n ~ norm_n * U @ P_n @ Q_n @ V^T for the n users of one module.

    Attributes:
        U: (o, k) orthonormal columns, up to the rounding of the type they are stored in.
        V: (i, k) orthonormal columns, likewise.
        P: (n, k, c) left core factors of unit-norm deltas; the full cores (n, k, k) where Q is None.
        Q: (n, c, k) right core factors, or None.
        norm: (n,) float32 Frobenius norm of every user's delta; 0 = no adapter there, or one that is zero.
    """

    U: Tensor
    V: Tensor
    P: Tensor
    Q: Tensor | None
    norm: Tensor

    @property
    def k(self) -> int:
        """The shared rank."""
        return int(self.U.shape[1])

    @property
    def c(self) -> int | None:
        """The inner width of the cores, None where they are stored full."""
        return None if self.Q is None else int(self.Q.shape[1])

    def core(self, index: int) -> Tensor:
        """(k, k) float32 core of one user, norm included. O(k^2 c)."""
        core = self.P[index] if self.Q is None else self.P[index] @ self.Q[index]
        return self.norm[index] * core

    def cores(self) -> Tensor:
        """(n, k, k) float32 cores of all users, norm included. O(n k^2 c)."""
        cores = self.P if self.Q is None else self.P @ self.Q
        return self.norm[:, None, None] * cores

    def pair(self, index: int, rank: int) -> LoraPair:
        """One user's delta as LoRA factors: of rank `rank` from thin cores, of rank k from full ones.

        Args:
            rank: the rank of the user's own adapter; columns of thin factors past it are zero and left out.
        """
        if self.Q is None:
            return LoraPair(A=self.V.mT.contiguous(), B=self.U @ self.core(index))
        left, right = self.P[index, :, :rank], self.Q[index, :rank]
        return LoraPair(A=right @ self.V.mT, B=self.U @ (self.norm[index] * left))

    def parameters(self) -> int:
        """How many numbers this module stores: both bases, all cores, all norms."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by the last part of their name in a bundle file."""
        named = {"U": self.U, "V": self.V, "P": self.P, "Q": self.Q, "norm": self.norm}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def rounded(self, dtype: torch.dtype) -> SharedModule:
        """The module as a file of this storage type gives it back: rounded, then float32, on the CPU."""
        kept = {
            name: tensor.to(dtype).to("cpu", torch.float32).contiguous()
            for name, tensor in self.tensors().items()
            if name != "norm"
        }
        return replace(self, **kept, norm=self.norm.to("cpu", torch.float32).contiguous())
