"""The canonical form of a batch of deltas, in the metric of a whitener if there is one."""

from __future__ import annotations

from torch import Tensor

from soppu.compress.linalg.canonical import Canonical, canonical
from soppu.compress.linalg.whitening import Whitener


def decompose(
    B: Tensor, A: Tensor, *, whitener: Whitener | None = None, overwrite: bool = False
) -> Canonical:
    """X_n diag(s_n) Y_n^T = B_n A_n, or what a whitener makes of it. O(b (o + i) r^2), O(b r i^2) more
    whitened. For `overwrite` see `canonical`.
    """
    if whitener is not None:
        A = whitener.to(A.device).forward(A).to(A.dtype)
    return canonical(B, A, overwrite=overwrite)
