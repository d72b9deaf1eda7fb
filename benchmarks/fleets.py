"""Adapters to measure compression on: a synthetic fleet with published statistics, and three real adapters.

The synthetic fleet follows what is known of large public collections of LoRA adapters: about half of the
users start from one random A and move it by a quarter of its length; the energies of the singular values fall
like j^-1.5; norms are log-normal with p90 / p10 between 6 and 9; and a part of every output direction lies in
a subspace of 48 dimensions that all users share. With the defaults, one basis over 100 users of rank 16
leaves the squared errors measured on such collections. Every user is made alone, from the seed and its index,
so a fleet of any size can be streamed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from soppu import adapter as peft
from soppu.adapter import LoraAdapter, LoraPair
from soppu.errors import AdapterError, ConfigError

ROOT = Path(__file__).resolve().parents[1]
GPT2_ADAPTERS = ("legal", "medical", "sports")
DEFAULT_SHAPES = {f"model.layers.0.self_attn.{name}": (1024, 1024) for name in ("q_proj", "v_proj")}
_SHARED, _USER, _MODULE = range(3)  # independent streams of random numbers

Array = NDArray[np.float32]


@dataclass(frozen=True)
class FleetSpec:
    """What a synthetic fleet looks like.

    Attributes:
        n: users.
        r: LoRA rank.
        shapes: module -> (o, i).
        seed: of every random number.
        p_seed: fraction of users whose A began as the one shared A0; they are spread evenly over the indices.
        movement: least and largest ||A - A0|| / ||A0|| of those users.
        decay: the j-th singular value of a delta holds energy in proportion to j^-decay.
        norm_median: median Frobenius norm of a delta.
        norm_sigma: standard deviation of the logarithm of that norm over users; 0.776 gives p90 / p10 = 7.3.
        output_width: dimensions of the output subspace that all users share.
        output_decay: energy of its m-th dimension, in proportion to m^-output_decay.
        output_share: fraction of the energy of an output direction that lies in that subspace.
    """

    n: int
    r: int = 16
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: dict(DEFAULT_SHAPES))
    seed: int = 0
    p_seed: float = 0.45
    movement: tuple[float, float] = (0.22, 0.32)
    decay: float = 1.5
    norm_median: float = 0.5
    norm_sigma: float = 0.776
    output_width: int = 48
    output_decay: float = 0.5
    output_share: float = 0.32

    def __post_init__(self) -> None:
        """Refuse what has no fleet. Raises ConfigError."""
        if self.n < 1 or self.r < 1 or not self.shapes:
            raise ConfigError(f"n {self.n}, r {self.r}, {len(self.shapes)} modules: each must be at least 1")
        for module, shape in self.shapes.items():
            if min(shape) < self.r:
                raise ConfigError(f"{module}: shape {shape} has a side below the rank {self.r}")
        for name in ("p_seed", "output_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)}, allowed: 0 to 1")


def name(index: int) -> str:
    """The user's name; names sort like indices up to 100,000 users."""
    return f"user{index:05d}"


def shares_seed(spec: FleetSpec, index: int) -> bool:
    """Whether this user's A began as the shared A0. Of the first m users, whatever m, floor(m p_seed) do."""
    return math.floor((index + 1) * spec.p_seed + 1e-9) > math.floor(index * spec.p_seed + 1e-9)


def user(spec: FleetSpec, index: int) -> LoraAdapter:
    """One user's adapter in float32, independent of n and of the other users. O((o + i) r (r + 48)) a module.

    Raises:
        ConfigError: an index outside 0 to n - 1.
    """
    if not 0 <= index < spec.n:
        raise ConfigError(f"user {index}: the fleet has 0 to {spec.n - 1}")
    # A strong user is strong in most modules: four fifths of the variance of log norm belong to the user.
    level = math.sqrt(0.8) * _stream(spec, _USER, index).standard_normal()
    pairs = {module: _pair(spec, index, module, level) for module in spec.shapes}
    return LoraAdapter(pairs, base_model="synthetic")


class Fleet(Mapping[str, LoraAdapter]):
    """User name -> adapter, made anew on every access; only what all users share is kept."""

    def __init__(self, spec: FleetSpec) -> None:
        self.spec = spec
        self._index = {name(index): index for index in range(spec.n)}

    def __getitem__(self, who: str) -> LoraAdapter:
        """Make one user's adapter. Raises KeyError."""
        return user(self.spec, self._index[who])

    def __iter__(self) -> Iterator[str]:
        """User names, in the order of the indices."""
        return iter(self._index)

    def __len__(self) -> int:
        """How many users there are."""
        return len(self._index)


def write(spec: FleetSpec, folder: Path) -> dict[str, Path]:
    """Write one PEFT folder a user, holding one user at a time; user -> folder. Raises StorageError."""
    folders = {}
    for who, made in Fleet(spec).items():
        folders[who] = folder / who
        peft.write(made, folders[who])
    return folders


def gpt2_folders(folder: Path | None = None) -> dict[str, Path]:
    """PEFT folders of the three GPT-2 adapters (rank 8, 36 modules): legal, medical, sports.

    Args:
        folder: what holds `gpt2-legal` and its two neighbours; None takes the environment variable
            SOPPU_ADAPTERS, or else `../shared/data/adapters` beside the repository.

    Raises:
        AdapterError: a folder is not there.
    """
    if folder is None:
        folder = Path(os.environ.get("SOPPU_ADAPTERS") or ROOT.parent / "shared" / "data" / "adapters")
    folders = {who: folder / f"gpt2-{who}" for who in GPT2_ADAPTERS}
    if missing := [str(path) for path in folders.values() if not path.is_dir()]:
        raise AdapterError(f"{', '.join(missing)}: no such folder; name the parent in SOPPU_ADAPTERS")
    return folders


def gpt2(folder: Path | None = None) -> dict[str, LoraAdapter]:
    """The three real GPT-2 adapters, their LoRA scale folded into B. See `gpt2_folders`."""
    return {who: peft.read(path) for who, path in gpt2_folders(folder).items()}


def _stream(spec: FleetSpec, kind: int, index: int, module: str = "") -> np.random.Generator:
    """Random numbers of one user in one module: by the module's name, so other modules change nothing."""
    return np.random.default_rng([spec.seed, kind, index, crc32(module.encode())])


def _pair(spec: FleetSpec, index: int, module: str, level: float) -> LoraPair:
    """D = norm * X diag(s) R Q, Q the orthonormal rows of A; B is the one factor that makes D from A."""
    o, i = spec.shapes[module]
    random = _stream(spec, _MODULE, index, module)
    start, subspace = _shared(spec.seed, module, (o, i, spec.r), (spec.output_width, spec.output_decay))
    if shares_seed(spec, index):
        A = start + _moved(random, start, spec.movement)
    else:
        A = _fresh(random, (spec.r, i))
    q, triangle = np.linalg.qr(A.T)
    turn = np.linalg.qr(random.standard_normal((spec.r, spec.r)))[0]
    energy = np.arange(1, spec.r + 1, dtype=np.float64) ** -spec.decay
    log_norm = spec.norm_sigma * (level + math.sqrt(0.2) * random.standard_normal())
    scale = spec.norm_median * math.exp(log_norm) * np.sqrt(energy / energy.sum())
    x = _outputs(random, subspace, spec)
    B = x.astype(np.float64) * scale @ np.linalg.solve(triangle.astype(np.float64), turn).T
    return LoraPair(A=torch.from_numpy(A), B=torch.from_numpy(B.astype(np.float32)))


def _outputs(random: np.random.Generator, subspace: Array, spec: FleetSpec) -> Array:
    """Orthonormal output directions X (o, r), each with its share of energy in the shared subspace."""
    o, width = subspace.shape
    common = subspace @ random.standard_normal((width, spec.r), dtype=np.float32)
    common /= np.linalg.norm(common, axis=0)
    own = random.standard_normal((o, spec.r), dtype=np.float32) / np.float32(math.sqrt(o))
    mixed = math.sqrt(spec.output_share) * common + math.sqrt(1 - spec.output_share) * own
    return np.asarray(np.linalg.qr(mixed)[0], dtype=np.float32)


def _moved(random: np.random.Generator, start: Array, movement: tuple[float, float]) -> Array:
    step = random.standard_normal(start.shape, dtype=np.float32)
    length = random.uniform(*movement) * float(np.linalg.norm(start))
    return step * np.float32(length / float(np.linalg.norm(step)))


def _fresh(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """A as PEFT begins it: uniform within 1 / sqrt(i)."""
    return (random.random(shape, dtype=np.float32) * 2 - 1) / np.float32(math.sqrt(shape[1]))


@lru_cache(maxsize=512)
def _shared(
    seed: int, module: str, sizes: tuple[int, int, int], output: tuple[int, float]
) -> tuple[Array, Array]:
    """What all users of a module share: A0 (r, i) and the weighted output subspace (o, min(width, o))."""
    (o, i, r), (width, decay) = sizes, output
    random = np.random.default_rng([seed, _SHARED, 0, crc32(module.encode())])
    start = _fresh(random, (r, i))
    basis = np.linalg.qr(random.standard_normal((o, min(width, o)), dtype=np.float32))[0]
    weight = np.arange(1, basis.shape[1] + 1, dtype=np.float32) ** np.float32(-decay / 2)
    return start, np.asarray(basis * weight, dtype=np.float32)
