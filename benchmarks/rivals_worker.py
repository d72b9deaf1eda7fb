"""Runs one compression package in its own environment: PEFT folders -> its artefact -> PEFT folders again.

    .venv-rivals/bin/python benchmarks/rivals_worker.py compress|trim|reconstruct REQUEST.json ANSWER.json

Every step is a process, so that what is rebuilt comes from disk alone. A request holds `package`, `adapters`
(user -> folder), `k`, `variance`, `storage`, `artefact`, `out`; to trim, `full` too. Nothing of SOPPU is
imported here. A package is driven through its own functions; where that was not enough, `ADAPTATIONS` says
what was added.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTATIONS = {
    "copy": [],
    "lorashare": ["float16: its save has no such option; the tensors it holds were cast before its own save"],
    "vlora": [
        "nf4: the rest of the artefact, means and loadings, was made float16 by its own `to` before its save",
        "it stores no lora_alpha: the original adapter_config.json is put beside what it rebuilds, uncounted",
    ],
}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (not that of the parent, as rusage may give)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def compress_copy(request: dict[str, Any], artefact: Path) -> int:
    """No compression at all: what the harness itself costs and gets wrong."""
    for who, folder in request["adapters"].items():
        (artefact / who).mkdir(parents=True)
        shutil.copy(Path(folder) / CONFIG, artefact / who)
        shutil.copy(Path(folder) / WEIGHTS, artefact / who)
    return 0


def compress_lorashare(request: dict[str, Any], artefact: Path) -> int:
    """PCA of the rows of A and the columns of B, k components a module and side, (k, r) loadings a user."""
    from lorashare import SHAREModel

    made = SHAREModel.from_adapters(request["adapters"], num_components=request["k"], device="cpu")
    if request["storage"] == "float16":
        cast_lorashare(made, torch.float16)
    made.save_pretrained(artefact)
    return int(made.config.num_components)


def trim_lorashare(request: dict[str, Any], artefact: Path) -> int:
    """The first k components of a larger artefact, which is what compressing at k gives, and much cheaper."""
    from lorashare import SHAREModel

    k, made = request["k"], SHAREModel.from_pretrained(request["full"])
    made.components = {key: value[:, :k].contiguous() for key, value in made.components.items()}
    for loadings in made.all_loadings.values():
        loadings.update({key: value[:k].contiguous() for key, value in loadings.items()})
    made.config.num_components = min(k, made.config.num_components)
    if request["storage"] == "float16":
        cast_lorashare(made, torch.float16)
    made.save_pretrained(artefact)
    return int(made.config.num_components)


def cast_lorashare(made: Any, dtype: torch.dtype) -> None:
    """All tensors of a SHAREModel to `dtype`, in place."""
    for tensors in (made.components, *made.all_loadings.values()):
        tensors.update({key: value.to(dtype) for key, value in tensors.items()})


def compress_vlora(request: dict[str, Any], artefact: Path) -> int:
    """PCA over users of A and B as flat vectors, k components a module and side, k numbers a user.

    With a variance to explain it chooses k by module and side instead.
    """
    from vlora import SharedSubspace, load_adapter

    made = SharedSubspace.from_adapters(
        [load_adapter(folder) for folder in request["adapters"].values()],
        task_ids=list(request["adapters"]),
        num_components=request["k"],
        adaptive_k=bool(request.get("variance")),
        variance_threshold=request.get("variance") or 0.6,
    )
    if request["storage"] != "float32":
        made.to(dtype=torch.float16)
    if request["storage"] == "nf4":
        made.save_quantized(artefact)
    else:
        made.save(artefact)
    return int(made.num_components)


def reconstruct_copy(request: dict[str, Any], artefact: Path, out: Path) -> None:
    """The files as they are."""
    shutil.copytree(artefact, out)


def reconstruct_lorashare(request: dict[str, Any], artefact: Path, out: Path) -> None:
    """Its own PEFT folders, from a checkpoint read anew."""
    from lorashare import SHAREModel

    made = SHAREModel.from_pretrained(artefact)
    cast_lorashare(made, torch.float32)
    for who in request["adapters"]:
        made.reconstruct(who, output_dir=out / who)


def reconstruct_vlora(request: dict[str, Any], artefact: Path, out: Path) -> None:
    """Its own PEFT folders, from a subspace read anew, under the configuration of the original."""
    from vlora import SharedSubspace
    from vlora.pipeline import extract_adapter

    made = SharedSubspace.load(artefact).to(dtype=torch.float32)
    for who, folder in request["adapters"].items():
        extract_adapter(made, who, out / who)
        shutil.copy(Path(folder) / CONFIG, out / who / CONFIG)


COMPRESS = {"copy": compress_copy, "lorashare": compress_lorashare, "vlora": compress_vlora}
TRIM = {"lorashare": trim_lorashare}
RECONSTRUCT = {"copy": reconstruct_copy, "lorashare": reconstruct_lorashare, "vlora": reconstruct_vlora}


def warm_up(package: str) -> None:
    """Import the package and wake the linear algebra, so that neither is timed."""
    if package != "copy":
        __import__(package)
    torch.linalg.svd(torch.eye(64))
    torch.linalg.eigh(torch.eye(64))


def main() -> None:
    """Answer one request."""
    step, asked, answer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    request = json.loads(asked.read_text())
    package, artefact = request["package"], Path(request["artefact"])
    warm_up(package)
    baseline = peak_memory()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    if step == "compress":
        k_used = COMPRESS[package](request, artefact)
    elif step == "trim":
        k_used = TRIM[package](request, artefact)
    else:
        k_used = request["k"]
        RECONSTRUCT[package](request, artefact, Path(request["out"]))
    result = {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - begun_cpu,
        "k_used": k_used,
        "peak_memory": peak_memory(),
        "baseline_memory": baseline,
        "threads": torch.get_num_threads(),
        "adaptations": ADAPTATIONS[package],
    }
    answer.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
