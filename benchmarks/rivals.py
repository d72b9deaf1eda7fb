"""What other packages make of the same adapters: bytes on disk, error of every user, seconds and memory.

    sh benchmarks/rivals_env.sh                      # once: .venv-rivals
    python -m benchmarks.rivals gpt2|synthetic OUT.json [PACKAGE ...]

A package is run by `rivals_worker.py` in its own environment and saves its artefact by its own function. All
bytes of that artefact count. Its adapters are rebuilt by a second process from disk and read back here by the
reader that reads the originals, so both sides handle the LoRA scale alike. Errors are taken on the factors.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import fleets
from soppu import adapter as peft
from soppu import files
from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError, ConfigError, SoppuError

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-rivals" / "bin" / "python"
WORKER = ROOT / "benchmarks" / "rivals_worker.py"
# package -> the forms its artefact can take. "copy" compresses nothing: it measures the harness.
STORAGE = {
    "copy": ("float32",),
    "lorashare": ("float32", "float16"),
    "vlora": ("float32", "float16", "nf4"),
}
PACKAGES = ("lorashare", "vlora")
VARIANCES = (0.4, 0.8, 0.95)
# Its eigenproblems do not depend on k and take minutes: a curve solves them once.
TRIMMED = ("lorashare",)
_ALL_STORAGES = 100  # users, up to which float32 artefacts are measured too


@dataclass(frozen=True)
class Setting:
    """How a package is asked to compress.

    Attributes:
        k: components a module and side.
        storage: form of the artefact's tensors, see `STORAGE`.
        variance: for vlora, the variance to explain, from which it chooses k by module and side; 0 uses `k`.
    """

    k: int
    storage: str = "float32"
    variance: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a compression cost.

    Attributes:
        seconds: wall time from the PEFT folders to the saved artefact, without interpreter start and imports.
        cpu_seconds: processor time of the same, all threads; on a busy machine the fairer of the two.
        peak_memory: largest resident size of the process, in bytes.
        baseline_memory: the same before the first adapter was read.
        k_used: components kept; packages lower `k` where there are fewer.
        threads: threads of the linear algebra.
        adaptations: what had to be added to the package's own functions.
    """

    seconds: float
    cpu_seconds: float
    peak_memory: int
    baseline_memory: int
    k_used: int
    threads: int
    adaptations: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class RivalResult:
    """One package at one setting.

    Attributes:
        bytes_on_disk: every file of the artefact.
        tensor_bytes: those of its safetensors files alone.
        seconds: see `Cost`, as is peak_memory.
        reconstructed: user -> adapter, read from disk on every access.
    """

    package: str
    setting: Setting
    bytes_on_disk: int
    tensor_bytes: int
    seconds: float
    peak_memory: int
    cost: Cost
    reconstructed: Mapping[str, LoraAdapter]


@dataclass(frozen=True)
class Errors:
    """Relative errors of a set of adapters, their LoRA scale included.

    Attributes:
        overall: sqrt of the mean over users of a user's squared relative error over all modules.
        pooled: sqrt(sum ||D - D^||^2 / sum ||D||^2) over all users and modules; strong users weigh most.
        worst: the largest error of a user.
        worst_user: who that is.
        users: user -> relative error; 0 for a zero adapter rebuilt as zero, infinite for one that is not.
    """

    overall: float
    pooled: float
    worst: float
    worst_user: str
    users: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One point of a rate-distortion curve; see `RivalResult` and `Errors`."""

    bytes: int
    overall: float
    pooled: float
    worst: float
    worst_user: str
    setting: Setting
    tensor_bytes: int
    k_used: int
    seconds: float
    cpu_seconds: float
    peak_memory: int
    threads: int


class Folders(Mapping[str, LoraAdapter]):
    """User -> adapter, read from its PEFT folder on every access and not kept."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    def __getitem__(self, who: str) -> LoraAdapter:
        """Read one adapter. Raises KeyError or AdapterError."""
        return peft.read(self._folders[who])

    def __iter__(self) -> Iterator[str]:
        """User names, in the order given."""
        return iter(self._folders)

    def __len__(self) -> int:
        """How many users there are."""
        return len(self._folders)


def squared(original: LoraAdapter, made: LoraAdapter) -> tuple[float, float]:
    """(||D - D^||_F^2, ||D||_F^2) summed over modules, in float64. O((o + i) r^2) a module.

    D - D^ is one low-rank product [B, -B^] [A; A^], so equal adapters give round-off squared and not the
    difference of two large numbers.

    Raises:
        AdapterError: the modules are not the same.
    """
    if set(original.pairs) != set(made.pairs):
        odd = sorted(set(original.pairs) ^ set(made.pairs))
        raise AdapterError(f"{len(odd)} modules are in one adapter only, {odd[0]} first")
    difference = total = 0.0
    for name, pair in original.pairs.items():
        b, a = pair.B.double(), pair.A.double()
        other = made.pairs[name]
        difference += _product(torch.cat([b, -other.B.double()], dim=1), torch.cat([a, other.A.double()]))
        total += _product(b, a)
    return difference, total


def _product(b: torch.Tensor, a: torch.Tensor) -> float:
    """||B A||_F^2 through the triangular factors of both."""
    left, right = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.mT, mode="r").R
    return float((left @ right.mT).square().sum())


def errors(originals: Mapping[str, LoraAdapter], reconstructed: Mapping[str, LoraAdapter]) -> Errors:
    """Compare two sets of adapters, one user in memory at a time.

    Raises:
        AdapterError: users or modules are not the same.
    """
    if set(originals) != set(reconstructed):
        raise AdapterError(f"{len(originals)} users before, {len(reconstructed)} after, or other names")
    users, lost, whole = {}, 0.0, 0.0
    for who in originals:
        difference, total = squared(originals[who], reconstructed[who])
        users[who] = math.sqrt(difference / total) if total else (math.inf if difference else 0.0)
        lost, whole = lost + difference, whole + total
    worst = max(users, key=lambda who: users[who])
    overall = math.sqrt(math.fsum(value**2 for value in users.values()) / len(users))
    pooled = math.sqrt(lost / whole) if whole else 0.0
    return Errors(overall, pooled, users[worst], worst, users)


def compress(package: str, folders: Mapping[str, Path], setting: Setting, workdir: Path) -> Cost:
    """Compress PEFT folders with a package into `workdir`/artefact: the call to time and weigh it by.

    Raises:
        ConfigError: no such package or storage, or .venv-rivals is not there.
        SoppuError: the package failed; the message ends with what it said.
    """
    answer = _work("compress", _request(package, folders, setting, workdir), workdir)
    return Cost(**{**answer, "adaptations": tuple(answer["adaptations"])})


def run(package: str, folders: Mapping[str, Path], setting: Setting, workdir: Path) -> RivalResult:
    """Compress, weigh the artefact and rebuild every adapter from it. What was in `workdir` before goes.

    Args:
        package: a key of `STORAGE`.
        folders: user -> PEFT folder; the packages need two or more of one rank and one set of modules.
        setting: k and the storage.
        workdir: a folder for the artefact and what is rebuilt; keep it while `reconstructed` is used.

    Raises:
        ConfigError, SoppuError: see `compress`.
    """
    _clear(workdir)
    cost = compress(package, folders, setting, workdir)
    return _rebuild(package, folders, setting, workdir, cost=cost)


def _rebuild(
    package: str, folders: Mapping[str, Path], setting: Setting, workdir: Path, *, cost: Cost
) -> RivalResult:
    """Weigh the artefact in `workdir` and rebuild every adapter from it."""
    _work("reconstruct", _request(package, folders, setting, workdir), workdir)
    sizes = {path: path.stat().st_size for path in (workdir / "artefact").rglob("*") if path.is_file()}
    return RivalResult(
        package=package,
        setting=setting,
        bytes_on_disk=sum(sizes.values()),
        tensor_bytes=sum(size for path, size in sizes.items() if path.suffix == ".safetensors"),
        seconds=cost.seconds,
        peak_memory=cost.peak_memory,
        cost=cost,
        reconstructed=Folders({who: workdir / "out" / who for who in folders}),
    )


def sweep(package: str, folders: Mapping[str, Path]) -> list[Setting]:
    """Settings from one component to all that can make a difference, every storage of the package.

    The bound is n for vlora, whose components are whole adapters, and for lorashare the smaller of the
    shortest side and n r: past n r - 1 it has no direction left to find, but does not rebuild the mean that
    it subtracts, so an error remains.
    """
    first = peft.read(next(iter(folders.values())))
    if package == "copy":
        most = 1
    elif package == "vlora":
        most = len(folders)
    else:
        shapes = first.shapes().values()
        most = min(min(min(o, i) for o, _, i in shapes), len(folders) * max(r for _, r, _ in shapes))
    ranks = sorted({min(1 << power, most) for power in range(most.bit_length() + 1)})
    # for a large fleet every setting takes minutes, and at equal bytes no point in float32 was ever the best
    storages = (
        STORAGE[package] if len(folders) <= _ALL_STORAGES or package == "copy" else STORAGE[package][1:]
    )
    settings = [Setting(k, storage) for storage in storages for k in ranks]
    if package == "vlora":
        settings += [Setting(most, storage, part) for storage in storages for part in VARIANCES]
    return settings


def curve(
    package: str, folders: Mapping[str, Path], workdir: Path, settings: Sequence[Setting] | None = None
) -> list[Point]:
    """The rate-distortion curve of a package over `settings` (None: `sweep`), by bytes. See `run`.

    A package in `TRIMMED` compresses once, at the largest k, and the other artefacts are cut from that one;
    every point then shows the seconds and the memory of the one compression.
    """
    settings = sweep(package, folders) if settings is None else settings
    originals = Folders(folders)
    if package not in TRIMMED:
        made = (run(package, folders, setting, workdir) for setting in settings)
        return sorted((_point(one, originals) for one in made), key=lambda point: point.bytes)
    _clear(workdir)
    cost = compress(package, folders, Setting(max(setting.k for setting in settings)), workdir)
    full = (workdir / "artefact").rename(workdir / "full")
    points = []
    for setting in settings:
        _clear(workdir)
        asked = _request(package, folders, setting, workdir) | {"full": str(full.resolve())}
        kept = replace(cost, k_used=_work("trim", asked, workdir)["k_used"])
        points.append(_point(_rebuild(package, folders, setting, workdir, cost=kept), originals))
    shutil.rmtree(full)
    return sorted(points, key=lambda point: point.bytes)


def _point(made: RivalResult, originals: Mapping[str, LoraAdapter]) -> Point:
    found = errors(originals, made.reconstructed)
    return Point(
        bytes=made.bytes_on_disk,
        overall=found.overall,
        pooled=found.pooled,
        worst=found.worst,
        worst_user=found.worst_user,
        setting=made.setting,
        tensor_bytes=made.tensor_bytes,
        k_used=made.cost.k_used,
        seconds=made.seconds,
        cpu_seconds=made.cost.cpu_seconds,
        peak_memory=made.peak_memory,
        threads=made.cost.threads,
    )


def _clear(workdir: Path) -> None:
    for part in ("artefact", "out"):
        shutil.rmtree(workdir / part, ignore_errors=True)


def _request(package: str, folders: Mapping[str, Path], setting: Setting, workdir: Path) -> dict[str, Any]:
    if setting.storage not in STORAGE.get(package, ()):
        allowed = {name: list(storage) for name, storage in STORAGE.items()}
        raise ConfigError(f"{package} stored as {setting.storage}: no such choice, allowed: {allowed}")
    return asdict(setting) | {
        "package": package,
        "adapters": {who: str(folder.resolve()) for who, folder in folders.items()},
        "artefact": str((workdir / "artefact").resolve()),
        "out": str((workdir / "out").resolve()),
    }


def _work(step: str, request: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """One call of the worker; its answer."""
    if not PYTHON.exists():
        raise ConfigError(f"{PYTHON}: not there; run sh benchmarks/rivals_env.sh")
    asked, answer = workdir / f"{step}.json", workdir / f"{step}-answer.json"
    files.write_text(asked, json.dumps(request))
    answer.unlink(missing_ok=True)
    told = subprocess.run([PYTHON, WORKER, step, asked, answer], capture_output=True, text=True)
    if told.returncode:
        last = told.stderr.strip().splitlines()[-1:]
        raise SoppuError(f"{request['package']}, {step}: exit {told.returncode}: {' '.join(last)}")
    return dict(json.loads(answer.read_text()))


def main() -> None:
    """Measure all packages on one set of adapters and write the curves."""
    which, target = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        spec = fleets.FleetSpec(100)
        known = {"gpt2": fleets.gpt2_folders, "synthetic": lambda: fleets.write(spec, Path(scratch, "fleet"))}
        if which not in known:
            raise ConfigError(f"{which}: no such adapters, allowed: {', '.join(known)}")
        folders = known[which]()
        result: dict[str, Any] = {"adapters": which, "bytes_before": {}, "curves": {}}
        stored = sum((folder / peft.WEIGHTS_FILE).stat().st_size for folder in folders.values())
        result["bytes_before"] = {"float32": stored, "float16": stored // 2}
        for package in sys.argv[3:] or ("copy", *PACKAGES):
            points = curve(package, folders, Path(scratch, "work"))
            result["curves"][package] = [asdict(point) for point in points]
            for point in points:
                print(f"{package:10} {point.setting} {point.bytes} {point.overall:.4f} {point.worst:.4f}")
            files.write_text(target, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
