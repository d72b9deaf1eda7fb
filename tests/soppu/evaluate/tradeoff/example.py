"""A stored comparison as `soppu evaluate` writes it: two users, two arms."""

from __future__ import annotations

from typing import Any

SCORES = {
    "loss": 2.0,
    "bleu": 10.0,
    "chrf": 20.0,
    "codebleu": None,
    "exact_match": 0.0,
    "valid": 0.5,
    "latency_ms_p50": 100.0,
    "latency_ms_p99": 120.0,
}


def arm(name: str, **changed: Any) -> dict[str, Any]:
    values = {
        **SCORES,
        "name": name,
        "kind": "base" if name == "base" else "bundle",
        "method": None,
        "target": None,
        "bundle_id": None,
        "bytes": 0,
        "bytes_per_user": 0.0,
        "relative_error": None,
        "memory_bytes": 1000,
        "pass_at_1": None,
        "first_token_ms_p50": 5.0,
        "tokens_s": 30.0,
        "intervals": {},
    }
    return values | changed


def row(user: str, name: str, **changed: Any) -> dict[str, Any]:
    return {**SCORES, "user": user, "arm": name, "bytes": 0.0, "interval": None} | changed


def comparison(**changed: Any) -> dict[str, Any]:
    over = {"over": "base", "mean": 0.5, "low": 0.1, "high": 0.9}
    gained = {"metric": "loss", **over}
    values = {
        "format": 1,
        "run": "demo-0123456789ab",
        "created": "2026-01-01T00:00:00+00:00",
        "soppu": "0.1.0",
        "environment": {
            "hardware": "Linux, 2 cores",
            "python": "3.11.9",
            "torch": "2.9.0",
            "transformers": "5.0.0",
            "packages": {"sacrebleu": "2.5.1"},
            "device": "cpu",
            "dtype": "float32",
            "threads": 2,
            "seed": 0,
            "base_model": "tiny",
            "base_hash": "ab" * 32,
        },
        "generation": {
            "greedy": True,
            "max_new_tokens": 48,
            "batch": 8,
            "stop": ["\nclass "],
            "seed": 0,
            "prompts_per_user": 4,
            "timed_prompts": 2,
            "timed_tokens": 16,
            "problems": 0,
        },
        "arms": [
            arm("base"),
            arm("residual@16", method="residual", target=16.0, loss=1.5, bleu=20.0, intervals={"loss": over}),
        ],
        "left_out": {"codebleu": "not asked for"},
        "rows": [
            row(user, name, interval=None if name == "base" else gained)
            for user in ("alice", "bob")
            for name in ("base", "residual@16")
        ],
        "texts": "tradeoff-texts-0123456789ab.jsonl",
    }
    return values | changed
