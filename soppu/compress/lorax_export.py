"""A bundle's users as PEFT folders that LoRAX serves correctly.

LoRAX takes a folder it does not understand without an error and serves the base model instead, so the folders
keep to what its kernels and its loader know: one rank out of five for the whole fleet, to which every
module is padded here, not by LoRAX; scale 1; every projection on every decoder layer, with zeros where a user
has none; and two files that hold only what LoRAX reads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from soppu import files
from soppu.adapter import CONFIG_FILE, WEIGHTS_FILE, LoraPair
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.numbers.components import Components
from soppu.errors import BundleError, ConfigError, StorageError
from soppu.module_names import split_layer

RANKS = (8, 16, 32, 64, 128)  # of LoRAX's decode kernels; any other fails at the first token, or is rescaled
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


_BASIS_SCALE = 1 / 16  # of a shared factor; what is left of the user's scale is then in float16's range too
_A, _B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    folders: dict[str, Path]  # of every user
    rank: int  # the one rank of all of them
    modules: int  # how many each has
    layers: int  # decoder layers the modules were spread over; 0 where modules have no layer
    bytes: int  # of all weights files


class Form:
    """What all folders made of a bundle have in common, and the tensors of each.

    Args:
        users: whose folders; everybody's, if nobody is named.
        dtype: "float16", "bfloat16" or "float32".
        layers: decoder layers of the base model; 0 takes the highest that the bundle names.
        base_model: `base_model_name_or_path` of the folders, to be the name the server was started with; None
            takes the bundle's.

    Raises:
        BundleError: a user the bundle does not hold, or whose rank is above 128, or name no folder can have;
            nothing of all these users; a projection with two shapes, or a layer beyond `layers`.
        ConfigError: a dtype that is not one of the three.
    """

    def __init__(
        self, bundle: Bundle, *, users: Sequence[str], dtype: str, layers: int, base_model: str | None
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r}, allowed: {', '.join(DTYPES)}")
        self.users = tuple(dict.fromkeys(users)) or bundle.users
        for user in self.users:
            bundle.index(user)
        if self.users and set(self.users) <= set(bundle.report.lost_users):
            raise BundleError(
                f"nothing of {', '.join(self.users[:5])} is in the bundle; compress with more bytes"
            )
        named = [parts[1] for name in bundle.shapes if (parts := split_layer(name))]
        self.rank = _rank(bundle, self.users)
        self.layers = layers or 1 + max(named, default=-1)
        self.shapes = spread(bundle.shapes, layers=self.layers)
        self.config = _config(bundle, self.shapes, self.rank, base_model)
        self._bundle, self._dtype = bundle, DTYPES[dtype]

    def tensors(self, user: str) -> dict[str, Tensor]:
        """Tensor name -> tensor, every factor padded with zeros to the one rank. O(bytes).

        Raises:
            BundleError: numbers leave the dtype.
        """
        pairs = self._bundle.reconstruct(user).pairs
        made: dict[str, Tensor] = {}
        for name in self.shapes:
            A, B = self._factors(name, pairs.get(name), who=user)
            made |= {_A.format(name): A, _B.format(name): B}
        return made

    def split(self, user: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same change as `tensors`, with one factor of a module in the basis where that can be.

        Returns the tensors that are the same for every user of the basis, and the user's own. What is shared
        is the larger side of a module, V^T in A or U in B, and never makes the rank higher; so are the zeros
        of layers the bundle does not have. Raises as `tensors`.
        """
        shared: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        parts, plain = self._bundle.of(user), self._bundle.reconstruct(user).pairs
        for name in self.shapes:
            side, pair = self._on_basis(user, name, parts.get(name))
            A, B = self._factors(name, pair if side else plain.get(name), who=user)
            (shared if "A" in side else own)[_A.format(name)] = A
            (shared if "B" in side else own)[_B.format(name)] = B
        return shared, own

    def _on_basis(self, user: str, name: str, part: Components | None) -> tuple[str, LoraPair | None]:
        """Which factor of a module is the basis, "A", "B" or "" for none, and the pair; "AB": both are 0."""
        if name not in self._bundle.shapes:
            return "AB", None
        place = self._bundle.index(user)
        u, v = self._bundle.matrices(name, int(self._bundle.cluster[place]))
        o, i = self.shapes[name]
        for side in "AB" if i >= o else "BA":
            basis = v if side == "A" else u
            kept = None if part is None else part.right if side == "A" else part.left
            if basis is None or basis.shape[1] > self.rank or (kept is not None and kept.own_width.any()):
                continue
            shared = basis.mT * _BASIS_SCALE
            if part is None or kept is None or not len(part):
                rest = shared.new_zeros((basis.shape[1], o if side == "A" else i))
            else:
                other = part.left.vectors(u) if side == "A" else part.right.vectors(v)
                scale = part.gain * self._bundle.norm[place] / _BASIS_SCALE
                rest = (kept.coordinates(basis.shape[1]) * scale[:, None]).mT @ other
            pair = LoraPair(A=shared, B=rest.mT) if side == "A" else LoraPair(A=rest, B=shared.mT)
            return side, pair
        return "", None

    def _factors(self, name: str, pair: LoraPair | None, *, who: str) -> tuple[Tensor, Tensor]:
        (o, i), dtype = self.shapes[name], self._dtype
        A, B = torch.zeros((self.rank, i), dtype=dtype), torch.zeros((o, self.rank), dtype=dtype)
        if pair is not None:
            A[: pair.rank], B[:, : pair.rank] = pair.A.to(dtype), pair.B.to(dtype)
            if bool(pair.A.any() and pair.B.any()) and not bool(A.any() and B.any()):
                raise BundleError(f"{who}: {name}: numbers too small for {dtype} become 0; use float32")
        if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise BundleError(f"{who}: {name}: numbers beyond the range of {dtype}; bfloat16 has a wider one")
        return A, B


def export(
    bundle: Bundle,
    out: Path,
    *,
    users: Sequence[str] = (),
    dtype: str = "float16",
    layers: int = 0,
    base_model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write `out`/USER for every user, all or nothing; a folder that is there already is left alone.

    A user's bytes are (o + i) R numbers for every module and layer, R the rank written. O(bytes).

    Args:
        users: whom to write; this and the next three as `Form` takes them.
        progress: called with (users done, users in all).

    Raises:
        BundleError: as `Form` and `Form.tensors`.
        ConfigError: a dtype that is not one of the three.
        StorageError: `out` is there already, or the disk refused; nothing is left of the export then.
    """
    form = Form(bundle, users=users, dtype=dtype, layers=layers, base_model=base_model)
    written = 0
    with _folder(out) as work:
        for done, user in enumerate(form.users, start=1):
            data = save(form.tensors(user))
            files.write_bytes(work / user / WEIGHTS_FILE, data)
            files.write_text(work / user / CONFIG_FILE, form.config)
            written += len(data)
            if progress is not None:
                progress(done, len(form.users))
    folders = {user: out / user for user in form.users}
    return Exported(folders, form.rank, len(form.shapes), form.layers, written)


def spread(shapes: Mapping[str, tuple[int, int]], *, layers: int) -> dict[str, tuple[int, int]]:
    """Every projection on each decoder layer: module -> (o, i), layer by layer, then what has no layer.

    Raises:
        BundleError: a projection with two shapes, or a layer that is not one of `layers`.
    """
    kinds: dict[tuple[str, str], str] = {}
    for name, shape in shapes.items():
        parts = split_layer(name)
        if parts is None:
            continue
        if parts[1] >= layers:
            raise BundleError(f"{name}: the base model was said to have {layers} layers, 0 to {layers - 1}")
        other = kinds.setdefault((parts[0], parts[2]), name)
        if shapes[other] != shape:
            raise BundleError(
                f"{name}: shape {shape}, {other} has {shapes[other]}; LoRAX takes one shape a kind"
            )
    made = {f"{a}{layer}{b}": shapes[name] for layer in range(layers) for (a, b), name in kinds.items()}
    return made | {name: shape for name, shape in shapes.items() if not split_layer(name)}


def _rank(bundle: Bundle, users: Sequence[str]) -> int:
    """The smallest of RANKS that holds every component of these users."""
    places = torch.tensor([bundle.index(user) for user in users])
    for user in users:
        if not files.is_name(user):
            raise BundleError(f"user {user!r}: cannot be the name of a folder")
    most = 0
    for number in range(len(bundle.pages)):
        for name, part in zip(bundle.shapes, bundle.components(number), strict=True):
            counts = torch.bincount(part.user, minlength=len(bundle.users))[places]
            found = int(counts.max())
            if found > RANKS[-1]:
                who = users[int(counts.argmax())]
                raise BundleError(f"{who}: {name}: rank {found}, LoRAX serves ranks up to {RANKS[-1]}")
            most = max(most, found)
    return next(rank for rank in RANKS if rank >= most)


def _config(bundle: Bundle, shapes: Mapping[str, tuple[int, int]], rank: int, base_model: str | None) -> str:
    """What PEFT and LoRAX (which has PEFT 0.4.0) read; alpha is r, since the scale is in the tensors."""
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": bundle.base_model if base_model is None else base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bundle.fan_in_fan_out,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "inference_mode": True,
    }
    return json.dumps(values, indent=2)


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block is through, and is gone if it is not."""
    if out.exists():
        raise StorageError(f"{out}: is there already; an export goes into a folder of its own")
    work = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        yield work
        work.chmod(0o755)  # mkdtemp makes it 0700, which another user's server could not read
        files.sync(work)
        work.rename(out)
        files.sync(out.parent)
    except OSError as error:
        raise StorageError(f"{out}: write failed, nothing was exported: {error}") from error
    finally:
        if work is not None and work.exists():
            shutil.rmtree(work)
