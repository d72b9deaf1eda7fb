"""Does everybody say the same? Greedy text of 50 users x 5 prompts: benchmarks/results/serve_equality.json.

    make vllm && python -m benchmarks.serve_equality
    python -m benchmarks.serve_equality --shape pipeline --method residual   # beside it in the file

The plugin in vLLM, the embedded server, and `peft` with the reconstructed adapter on transformers' own model,
in float32 and in bfloat16. The servers answer 16 requests of different users at a time, `peft` one by one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import served
from benchmarks.record import RESULTS, circumstances, store
from benchmarks.serve import embedded, vllm
from soppu import adapter
from soppu.targets.embedded import EmbeddedTarget
from soppu.targets.http import HttpTarget
from soppu.targets.vllm import VllmTarget

PROMPTS = (
    "def read_file(path):\n    ",
    "The quick brown fox",
    "import socket\n\nclass Server:\n    def __init__(self, port):\n",
    "Once upon a time there was a",
    "The three most important things about a garden are",
)
Texts = dict[tuple[str, int], str]


def by_peft(fleet: served.Served, folder: Path, *, dtype: torch.dtype, tokens: int) -> Texts:
    """What transformers says with every user's reconstructed adapter, loaded by `peft`."""
    tokenizer = AutoTokenizer.from_pretrained(fleet.base.path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(fleet.base.path, dtype=dtype, local_files_only=True).eval()
    texts: Texts = {}
    for user in fleet.bundle.users:
        adapter.write(fleet.bundle.reconstruct(user), folder / user)
        with torch.inference_mode():
            wrapped = PeftModel.from_pretrained(model, folder / user).to(dtype)
            for number, prompt in enumerate(PROMPTS):
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                made = wrapped.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
                texts[user, number] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            model = wrapped.unload()
    return texts


def by_server(target: HttpTarget, users: tuple[str, ...], *, tokens: int) -> Texts:
    """What a server says, 16 requests at a time; neighbours in a batch are different users."""
    wanted = [(user, number) for number in range(len(PROMPTS)) for user in users]

    def one(key: tuple[str, int]) -> str:
        return target.complete(PROMPTS[key[1]], user=key[0], max_new_tokens=tokens)

    with ThreadPoolExecutor(16) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def compared(texts: Mapping[str, Texts]) -> dict[str, Any]:
    """How many texts are the same, and of those that are not, how many characters into the text they part."""
    reference = texts["peft"]
    told: dict[str, Any] = {"texts": len(reference), "different": len(set(reference.values()))}
    for name, found in texts.items():
        if name != "peft":
            apart = {key: text for key, text in reference.items() if found[key] != text}
            told[name] = {"same": len(reference) - len(apart), "parted_at": list(_parted(apart, found))}
    return told


def _parted(apart: Texts, found: Texts) -> Iterator[int]:
    for key, text in apart.items():
        pairs = zip(text, found[key], strict=False)
        yield next((place for place, (one, other) in enumerate(pairs) if one != other), len(text))


def measured(fleet: served.Served, folder: Path, *, dtype: str, tokens: int) -> dict[str, Any]:
    """All three in one type of numbers."""
    texts = {"peft": by_peft(fleet, folder / "peft-all", dtype=getattr(torch, dtype), tokens=tokens)}
    base, users = fleet.base.hash, fleet.bundle.users
    with ExitStack() as stack:
        system = vllm(stack, folder, fleet, name="soppu", options=("--dtype", dtype))
        target = VllmTarget(system.endpoint.url, base_hash=base)
        texts["vllm plugin"] = by_server(target, users, tokens=tokens)
    with ExitStack() as stack:
        endpoint = embedded(stack, folder, fleet, dtype=dtype)["embedded"].endpoint
        own = EmbeddedTarget(endpoint.url, base_hash=base)
        texts["embedded"] = by_server(own, users, tokens=tokens)
    return compared(texts)


@click.command()
@click.option("--users", default=50, show_default=True)
@click.option("--tokens", default=24, show_default=True, help="New tokens of a text.")
@click.option("--shape", type=click.Choice(list(served.FORMS)), default="qv30", show_default=True)
@click.option("--method", type=click.Choice(served.METHODS), default="cores", show_default=True)
def main(users: int, tokens: int, shape: str, method: str) -> None:
    """Compare, and write the result file; what it holds of other bundles stays."""
    kind = served.Kind(shape, method)
    made = circumstances(seed=0) | {
        "what": "greedy texts of every user and prompt, compared with those of peft",
        "users": users,
        "prompts": list(PROMPTS),
        "tokens": tokens,
    }
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as name:
            fleet = served.write(Path(name), users=users, folders=0, kind=kind)
            made[dtype] = measured(fleet, Path(name), dtype=dtype, tokens=tokens)
        click.echo(f"{dtype}: {json.dumps(made[dtype])}")
    path = RESULTS / "serve_equality.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    others = held.pop("others", {})
    if kind != served.Kind():
        others, made = others | {f"{shape} {method}": made}, held
    click.echo(f"written: {store('serve_equality', made | ({'others': others} if others else {}))}")


if __name__ == "__main__":
    main()
