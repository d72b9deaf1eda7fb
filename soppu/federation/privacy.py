"""What the noise in a federation is worth: (epsilon, delta), added up over its releases by Opacus.

Gaussian noise on clipped changes, no subsampling. The unit is a user: all their text at once. At the server
(central) neighbours are federations with and without one user: one of n equal weights moves the mean by the
norm over n. At the client (local) they are any two texts of a user: two clipped changes are up to two norms
apart, so the same noise counts for half. Losses and example counts that travel beside are not covered.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from soppu.errors import ConfigError
from soppu.sharing import SharingSettings

_ORDERS = [1.001, 1.01, *(1 + step / 20 for step in range(1, 200)), *range(11, 256), *range(256, 4096, 64)]
_UNCOVERED = {
    "server": "from outsiders and other users alone: every change, and every user's own adapter, reaches the"
    " server as it is; losses and example counts",
    "client": "losses and example counts",
}


@dataclass(frozen=True)
class Spent:
    """What a federation has given away.

    Attributes:
        at: where it was clipped and noised: "server" or "client".
        clip, noise: the norm, and the noise's standard deviation in norms.
        releases: how often something that depends on a user's text was released.
        delta: the chance that epsilon does not hold.
        epsilon: the bound; None without noise, where there is none.
        not_covered: what it does not speak of.
    """

    at: str
    clip: float
    noise: float
    releases: int
    delta: float
    epsilon: float | None
    not_covered: str


def require(settings: SharingSettings) -> None:
    """ConfigError if noise is wanted, and the accountant that says what it is worth is not installed."""
    if settings.dp_noise and importlib.util.find_spec("opacus") is None:
        raise ConfigError(
            f"federation.dp_noise = {settings.dp_noise:g}: Opacus, which accounts for it, is not installed;"
            ' run: pip install "soppu[privacy]"; or set federation.dp_noise to 0'
        )


def spent(settings: SharingSettings, releases: int) -> Spent | None:
    """After so many rounds in which something clipped was sent. None where no privacy option is on."""
    if not settings.dp_clip:
        return None
    epsilon = None
    if settings.dp_noise:
        noise = settings.dp_noise / 2 if settings.noisy_users else settings.dp_noise
        epsilon = epsilon_of(noise, releases, settings.dp_delta)
    return Spent(
        settings.dp_at,
        settings.dp_clip,
        settings.dp_noise,
        releases,
        settings.dp_delta,
        epsilon,
        _UNCOVERED[settings.dp_at],
    )


def epsilon_of(noise: float, releases: int, delta: float) -> float:
    """Epsilon of so many Gaussian releases, at most; noise in units of how far a neighbour moves them."""
    from opacus.accountants.analysis import rdp  # noqa: PLC0415 - optional, and slow to import

    if not releases:
        return 0.0
    divergence: Any = rdp.compute_rdp(q=1.0, noise_multiplier=noise, steps=releases, orders=_ORDERS)
    return float(rdp.get_privacy_spent(orders=_ORDERS, rdp=divergence, delta=delta)[0])
