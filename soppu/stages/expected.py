"""What users' adapters of a bundle answer here, to hold a server against that cannot say what it loaded."""

from __future__ import annotations

from collections.abc import Sequence

from soppu.compress import Bundle
from soppu.models import BaseModel, load_model, load_tokenizer
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.targets.canary import Trace

_BATCH = 16
_VERSION = "expected"


def expected_traces(
    base: BaseModel, bundle: Bundle, users: Sequence[str], *, prompt: str, tokens: int
) -> dict[str, Trace]:
    """User -> greedy (token id, logprob) after `prompt`, by this library's engine in float32.

    Loads the base model; O(users / 16 x tokens) forwards of it. Raises ModelError, BundleError.
    """
    if not users:
        return {}
    model = load_model(base)
    bank = AdapterBank(model, base_hash=base.hash, base_model=base.name)
    bank.stage(bundle, bundle_id=_VERSION)
    bank.activate(_VERSION)
    options = EngineOptions(max_batch=_BATCH, max_queue=len(users))
    with Engine(model, load_tokenizer(base), bank, options) as engine:
        asked = [
            engine.submit(GenerationRequest(prompt, adapter_id=user, max_new_tokens=tokens)) for user in users
        ]
        answers = [generation.result()[0] for generation in asked]
    return {
        user: tuple((token.id, token.logprob) for token in answer)
        for user, answer in zip(users, answers, strict=True)
    }
