"""Certificates for large fleets: how much of C = sum_n D_n D_n^T / ||D_n||^2 any k directions can hold.

The sum of the k largest eigenvalues of C is bounded from what C does to a block. Let Q be orthonormal,
P = I - Q Q^T, H = Q^T C Q, R = P C Q, and mu at least the largest eigenvalue of P C P. Then

    C  <=  [ H   R^T  ]   in the Loewner order, so no eigenvalue of C is above its counterpart on the right
           [ R   mu I ]   (Weyl's monotonicity; Horn, Johnson, Matrix Analysis, corollary 4.3.12).

For mu take probes Z = P Omega (d, p), Omega standard normal and independent of Q and C. Let v be the leading
eigenvector of P C P and mu its eigenvalue: v^T (P C P)^a Z = mu^a g^T, and g = Omega^T v is a standard normal
vector whatever v is. Since v has length one,

    ( g^T sum_a mu^a c_a )^2  <=  || sum_a (P C P)^a Z c_a ||^2      for all c_0 .. c_q in R^p,

which is || T(mu) g || <= 1 for a known T. But ||g||^2 is chi-squared with p degrees of freedom, below x with
a known small probability. So, but for that, every t with sigma_min(T(t)) > 1 / sqrt(x) is ruled out. Lemma
4.1 of Halko, Martinsson, Tropp (SIAM Review 53(2), 2011) on a power of P C P is the case of a single c_q and
one probe at a time. All polynomials and all combinations of probes at once are far sharper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.linalg.sketch import Image, ImagePass, Steps

FAILURE = 5e-11  # of the bound of one side; both hold with 1 - 1e-10
_BISECTIONS = 60
_MARGIN = 0.1  # share of the energy of a combination of probes that round-off may have taken away
_SLACK = 64  # in units of the round-off of the deltas and of the trace


@dataclass(frozen=True)
class TopSum:
    """At most `value` is the sum of the k largest eigenvalues of C, with probability `confidence` or more."""

    value: float
    confidence: float


def top_sum(image: Image, k: int, *, trace: float, eps: float) -> TopSum:
    """Bound from one pass: the probes of `image`, if it has any, have seen C once. O(d (K + p)^2).

    For all bounds `trace` is that of C, the number of deltas that are not zero, and `eps` the round-off of
    the numbers they were given in.
    """
    powers = [image.probes, _outside(image.basis, image.applied_probes)]
    return _bound(image, powers, k, trace=trace, eps=eps)


@dataclass(frozen=True)
class Effort:
    """What a bound may cost."""

    probes: int = 32  # p; without any the bound is certain, and weak
    powers: int = 3  # passes q
    # Up to so many features, or columns of all deltas, a Gram matrix is summed up: nothing is left to chance.
    exact_side: int = 1500
    seed: int = 1  # of the probes; Q must not depend on them


def sharper_top_sum(
    basis: Tensor, k: int, *, out: bool, trace: float, eps: float, effort: Effort
) -> Steps[TopSum]:
    """Bound from `effort.powers` passes over the deltas, the first of which sees Q too.

    Args:
        basis: Q (d, K), K > k: directions close to the leading ones.
        out: whether C is C_out.
    """
    generator = torch.Generator().manual_seed(effort.seed)
    drawn = torch.randn((len(basis), effort.probes), generator=generator, dtype=torch.float64).to(basis)
    powers = [_outside(basis, drawn)]
    seen = yield from _applied(torch.cat([basis, powers[0]], 1), out=out)
    image = Image(basis, seen[:, : basis.shape[1]], seen[:, basis.shape[1] :], powers[0])
    powers.append(_outside(basis, image.applied_probes))
    for _ in range(effort.powers - 1):
        seen = yield from _applied(powers[-1], out=out)
        powers.append(_outside(basis, seen))
    return _bound(image, powers, k, trace=trace, eps=eps)


def _applied(block: Tensor, *, out: bool) -> Steps[Tensor]:
    """C times a block, one pass."""
    image = ImagePass(block, out=out)
    yield image, 1
    return image.finish()


def exact_top_sum(gram: Tensor, k: int, *, trace: float, eps: float) -> TopSum:
    """From C itself, or a Gram matrix (m, m) with the same eigenvalues, up to its round-off. O(m^3)."""
    values = torch.linalg.eigvalsh(gram.double()).flip(0)
    return TopSum(min(float(values[:k].clamp(min=0).sum()) + _SLACK * eps * trace, trace), 1.0)


def _bound(image: Image, powers: list[Tensor], k: int, *, trace: float, eps: float) -> TopSum:
    """The k-sum of the matrix on the right of the Loewner order above."""
    inner = image.basis.mT @ image.applied
    inner = (inner + inner.mT) / 2
    rest = torch.linalg.qr(_outside(image.basis, image.applied), mode="r").R
    mu, confidence = max(trace - float(inner.trace()), 0.0), 1.0
    if image.basis.shape[1] >= len(image.basis):
        mu = 0.0
    elif powers[0].shape[1]:
        noise = _SLACK * eps * float(torch.linalg.matrix_norm(inner, 2))
        drawn = norm_bound(powers, most=mu, noise=noise, failure=FAILURE)
        if drawn < mu:
            mu, confidence = drawn, 1 - FAILURE
    corner = mu * torch.eye(len(rest), dtype=inner.dtype, device=inner.device)
    above = torch.cat([torch.cat([inner, rest.mT], 1), torch.cat([rest, corner], 1)])
    values = torch.linalg.eigvalsh(above).flip(0)
    values = torch.cat([values, values.new_full((k,), mu)]).sort(descending=True).values
    return TopSum(min(float(values[:k].sum()) + _SLACK * eps * trace, trace), confidence)


def norm_bound(powers: list[Tensor], *, most: float, noise: float, failure: float) -> float:
    """At least the largest eigenvalue of P C P, but for a chance of `failure`.

    It is the top of what is not ruled out: past the largest Ritz value of the block Krylov space
    sigma_min(T(t)) rises, so bisection finds it. O(d (q p)^2 + 60 (q p)^2 p).

    Args:
        powers: (P C P)^a Z (d, p) for a = 0..q; P C P must not depend on the numbers behind Z.
        most: a bound that is certain.
        noise: of P C P as it was applied, in the spectral norm.
    """
    sizes = [float(torch.linalg.matrix_norm(z, 2)) for z in powers]
    if sizes[0] == 0 or most <= 0:
        return most
    q, p = len(powers) - 1, powers[0].shape[1]
    scale = max(max(after / before for before, after in zip(sizes, sizes[1:], strict=False)), noise)
    if scale == 0:
        return 0.0
    scaled = [z / (sizes[0] * scale**a) for a, z in enumerate(powers)]
    root = _root(scaled, noise / scale)
    least = math.sqrt(chi_squared_quantile(p, failure) / (1 + _MARGIN)) / sizes[0]

    def ruled_out(t: float) -> bool:
        stacked = torch.cat([t**a * torch.eye(p, dtype=root.dtype, device=root.device) for a in range(q + 1)])
        turned = torch.linalg.solve_triangular(root.mT, stacked, upper=False)
        return float(torch.linalg.svdvals(turned)[-1]) * least > 1

    low, high = min(_largest_ritz(scaled), most / scale), most / scale
    if not ruled_out(high):
        return most
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high) if low > 0 else high / 2
        low, high = (low, middle) if ruled_out(middle) else (middle, high)
    return high * scale


def _root(scaled: list[Tensor], noise: float) -> Tensor:
    """R with ||R c|| at least what || sum_a Z_a c_a || is without round-off, but for the _MARGIN.

    An error of `noise` in each application makes one of a noise in Z_a, and
    (x + y)^2 <= (1 + h) x^2 + (1 + 1/h) y^2.
    """
    p = scaled[0].shape[1]
    floor = [
        max(a * noise, torch.finfo(scaled[0].dtype).eps) * math.sqrt((1 + 1 / _MARGIN) * len(scaled))
        for a in range(len(scaled))
    ]
    ridge = torch.cat([scaled[0].new_full((p,), size) for size in floor])
    return torch.linalg.qr(torch.cat([torch.cat(scaled, 1), torch.diag(ridge)]), mode="r").R


def _largest_ritz(scaled: list[Tensor]) -> float:
    """The largest Ritz value of the space of Z_0 .. Z_{q-1}; never above the largest eigenvalue."""
    block = torch.cat(scaled[:-1], 1)
    left, values, right = torch.linalg.svd(block, full_matrices=False)
    kept = values > 1e-6 * values[0]
    image = torch.cat(scaled[1:], 1) @ (right[kept].mT / values[kept])
    return max(float(torch.linalg.eigvalsh(left[:, kept].mT @ image)[-1]), 0.0)


def chi_squared_quantile(freedom: int, probability: float) -> float:
    """The x below which a chi-squared variable is with `probability`, from below, by bisection."""
    low, high = 0.0, float(freedom)
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        below = float(torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64)))
        low, high = (middle, high) if below < probability else (low, middle)
    return low


def _outside(basis: Tensor, block: Tensor) -> Tensor:
    """P times a block (d, p), twice for the last digits."""
    rest = block - basis @ (basis.mT @ block)
    return rest - basis @ (basis.mT @ rest)
