"""Tokens a second of one vLLM server: plain, with our plugin and 1,000 users, and vLLM's own multi-LoRA.

    make vllm && python -m benchmarks.vllm_serving [--dtype bfloat16] [--rounds 5] [--no-stock]

All servers stay up and take turns, a round each: the machine's other work meets them alike. Every request of
a round is of another user. Writes benchmarks/results/vllm_<dtype>.json; the ratios are what to read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import requests
import torch

from benchmarks import record
from soppu import adapter as adapters
from soppu import models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import compress
from soppu.compress.bundle import Bundle
from soppu.compress.options import CompressOptions

ROOT = record.ROOT
WORK = ROOT / ".soppu" / "bench-vllm"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
RANK, TOKENS, CONCURRENT, REQUESTS, LAYERS = 16, 64, 16, 64, 30
MODULES = (("q_proj", 576), ("v_proj", 192))
HIDDEN = 576
PORTS = {"plain": 8841, "soppu": 8842, "stock": 8843}


def user(number: int, base_hash: str) -> LoraAdapter:
    """A LoRA adapter of rank 16 on q and v of every layer, in subspaces all users share."""
    own = torch.Generator().manual_seed(number)
    pairs = {}
    for layer in range(LAYERS):
        for leaf, o in MODULES:
            common = torch.Generator().manual_seed(1000 * layer + o)
            U = torch.linalg.qr(torch.randn(o, RANK, generator=common))[0]
            V = torch.linalg.qr(torch.randn(HIDDEN, RANK, generator=common))[0]
            core = torch.randn(RANK, RANK, generator=own) / 4
            pairs[f"model.layers.{layer}.self_attn.{leaf}"] = LoraPair(
                V.mT.contiguous(), (U @ core).contiguous()
            )
    return LoraAdapter(pairs, base_model="smollm2-135m", base_hash=base_hash)


def bundle(n: int, base_hash: str) -> Path:
    """The users' bundle, kept between runs."""
    path = WORK / f"users-{n}.soppu"
    if not path.exists():
        members = {f"user-{number}": user(number, base_hash) for number in range(n)}
        compress(members, CompressOptions(method="joint", rank=RANK, device="cpu")).save(path)
    return path


@contextmanager
def server(kind: str, base: models.BaseModel, options: list[str], variables: dict[str, str]) -> Iterator[str]:
    """A vLLM server that is up; ended afterwards."""
    url, log = f"http://127.0.0.1:{PORTS[kind]}", WORK / f"{kind}.log"
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", base.path]
    command += ["--served-model-name", "base", "--port", str(PORTS[kind]), "--max-model-len", "1024"]
    command += ["--max-num-seqs", "32", *options]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # vLLM chooses its own number of threads
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SOPPU_") and k != "OMP_NUM_THREADS"}
    with log.open("wb") as stream:
        running = subprocess.Popen(command, stdout=stream, stderr=stream, env=kept | quiet | variables)
    try:
        _wait(url, running, log)
        yield url
    finally:
        running.terminate()
        running.wait(60)


def _wait(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and running.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(1)
    raise SystemExit(f"the server did not come up; see {log}")


def measure(url: str, names: list[str]) -> float:
    """Generated tokens a second, 16 requests at a time, one for each name."""

    def ask(place: int) -> int:
        body = {
            "model": names[place],
            "prompt": f"def function_{place}(value, other):\n    return",
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        response = requests.post(f"{url}/v1/completions", json=body, timeout=600)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    begin = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        made = sum(pool.map(ask, range(len(names))))
    return made / (time.perf_counter() - begin)


def load_stock(url: str, names: list[str], base_hash: str) -> None:
    """Bring the round's adapters to vLLM's own LoRA, before the clock starts."""
    for name in names:
        folder = WORK / "adapters" / name
        if not folder.exists():
            adapters.write(user(int(name.removeprefix("user-")), base_hash), folder)
        body = {"lora_name": name, "lora_path": str(folder)}
        requests.post(f"{url}/v1/load_lora_adapter", json=body, timeout=600).raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--no-stock", action="store_true", help="leave vLLM's own multi-LoRA out")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    base = models.resolve("smollm2-135m", cache=ROOT / ".soppu" / "models")
    path = bundle(asked.users, base.hash)
    names = [f"user-{number * asked.users // REQUESTS}" for number in range(REQUESTS)]
    speeds = run(asked, base, path, names)
    medians = {kind: statistics.median(found) for kind, found in speeds.items()}
    values = {
        "what": f"SmolLM2-135M, vLLM for CPUs, q and v of all layers, rank {RANK}, {asked.users} users",
        "load": {"requests": REQUESTS, "concurrent": CONCURRENT, "new_tokens": TOKENS, "dtype": asked.dtype},
        "tokens_per_second": speeds,
        "median": medians,
        "of_plain": {kind: median / medians["plain"] for kind, median in medians.items()},
        "bundle_bytes": path.stat().st_size,
        "core_share": core_share(Bundle.load(path)),
        **record.circumstances(seed=0),
    }
    print(record.store(f"vllm_{asked.dtype}", values), medians, values["of_plain"])


def core_share(made: Bundle) -> float:
    """Numbers in all users' core tables over numbers in their adapters."""
    cores = len(made.users) * sum(max(o.k, i.k) ** 2 for pairs in made.bases.values() for o, i in pairs[:1])
    return cores / made.report.parameters_before


def run(
    asked: argparse.Namespace, base: models.BaseModel, path: Path, names: list[str]
) -> dict[str, list[float]]:
    """Tokens a second of every server in every round, the servers taking turns."""
    dtype = ["--dtype", asked.dtype]
    lora = ["--enable-lora", "--max-loras", str(CONCURRENT), "--max-lora-rank", str(RANK)]
    lora += ["--max-cpu-loras", str(len(names))]
    with ExitStack() as stack:
        urls = {
            "plain": stack.enter_context(server("plain", base, dtype, {})),
            "soppu": stack.enter_context(server("soppu", base, dtype, {"SOPPU_BUNDLE": str(path)})),
        }
        if not asked.no_stock:
            allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
            urls["stock"] = stack.enter_context(server("stock", base, [*dtype, *lora], allowed))
            load_stock(urls["stock"], names, base.hash)
        models_of = {kind: ["base"] * len(names) if kind == "plain" else names for kind in urls}
        for kind, url in urls.items():
            measure(url, models_of[kind][:CONCURRENT])  # not counted: everything is warm after it
        speeds: dict[str, list[float]] = {kind: [] for kind in urls}
        for number in range(asked.rounds):
            for kind, url in urls.items():
                speeds[kind].append(measure(url, models_of[kind]))
                print(number, kind, round(speeds[kind][-1], 1), flush=True)
    return speeds


if __name__ == "__main__":
    main()
