"""What the noise in a federation is worth: (epsilon, delta), by the PRV accountant (arXiv 2106.02848).

Gaussian noise on clipped changes, no subsampling. The unit is a user: all their text at once. At the server
(central) neighbours are federations with and without one user: one of n equal weights moves the mean by the
norm over n. At the client (local) they are any two texts of a user: two clipped changes are up to two norms
apart, so the same noise counts for half. Losses and example counts that travel beside are not covered.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

from soppu.errors import ConfigError
from soppu.sharing import SharingSettings

# noise of all releases together: below, epsilon is above 280; beyond, it is 0.06, and more would take minutes
_LEAST, _MOST = 0.05, 50.0
_UNCOVERED = {
    "server": "the server, which every change and every user's own adapter reaches as it is, and whoever is"
    " served with it; losses and example counts",
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
        epsilon: the bound; None without noise, or with so little that it would say nothing.
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
    if settings.dp_noise and importlib.util.find_spec("prv_accountant") is None:
        raise ConfigError(
            f"federation.dp_noise = {settings.dp_noise:g}: prv-accountant, which says its worth, is missing;"
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


def epsilon_of(noise: float, releases: int, delta: float) -> float | None:
    """Epsilon of so many Gaussian releases, at most; noise in units of how far a neighbour moves them.

    None above `_LARGEST`, where it says nothing. Releases of the same noise are one release of less noise.
    """
    from prv_accountant import GaussianMechanism, PRVAccountant  # noqa: PLC0415 - optional

    if not releases:
        return 0.0
    together = min(noise / math.sqrt(releases), _MOST)
    if together < _LEAST:
        return None
    mechanism = GaussianMechanism(together)
    near = 0.01 * max(min(1 / together, 1), 0.5 / together**2)  # of the size of epsilon, or it takes minutes
    accountant = PRVAccountant(
        prvs=[mechanism], max_self_compositions=[1], eps_error=near, delta_error=1e-3 * delta
    )
    _, _, epsilon = accountant.compute_epsilon(delta=delta, num_self_compositions=[1])
    return float(epsilon)
