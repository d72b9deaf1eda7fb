"""Text held to a JSON schema: valid whatever the model wants to say, and nobody else's text is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from soppu.errors import RequestError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.engine.grammar import Grammars
from soppu.serve.engine.sampling import Sampling
from tests.soppu.serve import tiny

PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["user", "bot"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["age", "kind", "tags"],
    "additionalProperties": False,
}
WAYS = {
    "greedy": Sampling(),
    "sampled": Sampling(do_sample=True, temperature=1.5, top_k=20, top_p=0.9, typical_p=0.9, seed=3),
    "with penalties": Sampling(repetition_penalty=1.5, frequency_penalty=2.0, presence_penalty=2.0),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    torch.set_num_threads(1)
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.add("alice", tiny.lora(model, seed=1))
    with Engine(model, tiny.tokenizer(), bank, EngineOptions(gather_seconds=0.1)) as engine:
        yield engine


def request(schema: object, **options: Any) -> GenerationRequest:
    return GenerationRequest("the quick", schema=json.dumps(schema), **{"max_new_tokens": 100, **options})


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        set(person) == {"age", "kind", "tags"}
        and person["age"] in range(100)
        and person["kind"] in ("user", "bot")
        and len(person["tags"]) in (1, 2)
        and all(tag in (True, False) for tag in person["tags"])
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_text_is_what_its_schema_says_and_the_others_are_what_they_were(way: str, engine: Engine) -> None:
    held = [
        engine.submit(request(PERSON, adapter_id=who, sampling=replace(WAYS[way])))
        for who in ("", "alice") * 2
    ]
    free = [engine.submit(GenerationRequest("the quick", max_new_tokens=20)) for _ in range(2)]
    for generation in held:
        tokens, finish = generation.result()
        assert is_person(finish.text) and finish.reason == "eos_token"
        assert finish.generated_tokens == len(tokens)
    expected = tiny.peft_text(tiny.llama(), "the quick", None, tokens=20)
    assert [generation.result()[1].text for generation in free] == [expected] * 2


def test_every_one_of_several_texts_is_what_the_schema_says(engine: Engine) -> None:
    hot = Sampling(do_sample=True, temperature=1.5)
    tokens, finish = engine.submit(request(PERSON, best_of=2, sampling=hot)).result()
    texts = [finish.text, *(told[-1].finish.text for told in finish.others if told[-1].finish)]
    assert len(texts) == 2 and all(map(is_person, texts))


def test_a_held_text_ends_with_its_grammar_or_with_its_limit(engine: Engine) -> None:
    _, finish = engine.submit(request(PERSON, ignore_eos=True)).result()
    assert is_person(finish.text) and finish.reason == "eos_token"
    _, finish = engine.submit(request({"type": "object"}, max_new_tokens=3)).result()
    assert finish.text.startswith("{") and finish.reason == "length"
    _, finish = engine.submit(request(PERSON, stop=('"age"',))).result()
    assert finish.text.endswith('"age"') and finish.reason == "stop_sequence"


leaves = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"const": "žluťoučký 🦊"},
        {"enum": [1, "two", None, [3]]},
        {"type": "integer", "minimum": -5, "maximum": 5},
        {"type": "string", "pattern": "^[ab]{1,3}$"},
        {"type": "string", "maxLength": 3},
    ]
)


@settings(max_examples=8)
@given(
    schemas=st.dictionaries(st.sampled_from("abc語"), leaves, min_size=1, max_size=3), seed=st.integers(0, 99)
)
def test_objects_of_many_schemas_have_their_fields(
    engine: Engine, schemas: dict[str, Any], seed: int
) -> None:
    schema = {
        "type": "object",
        "properties": schemas,
        "required": sorted(schemas),
        "additionalProperties": False,
    }
    hot = Sampling(do_sample=True, temperature=1.3, seed=seed)
    _, finish = engine.submit(request(schema, sampling=hot, max_new_tokens=115)).result()
    if finish.reason == "length":  # long names, and few tokens
        assert finish.text.startswith("{")
        return
    value = json.loads(finish.text)
    assert sorted(value) == sorted(schemas)
    for name, leaf in schemas.items():
        assert value[name] in leaf.get("enum", [value[name]])
        assert value[name] == leaf.get("const", value[name])
        assert len(value[name]) <= 3 if "maxLength" in leaf or "pattern" in leaf else True


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"$ref": "#/nowhere"}, "Pointer '/nowhere' does not exist"),
        ({"$ref": "http://elsewhere/schema"}, "http://elsewhere/schema"),
        ({"type": "string", "pattern": "((("}, "unclosed group"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength (3) is greater than maxLength (2)"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "incompatible types"),
        ({"type": "integer", "multipleOf": 9_999_991, "minimum": 3}, "fuel exhausted"),
        ({"enum": []}, "anyOf is empty"),
        ({"anyOf": [{"properties": {f"p{n}": {"type": "null"}}} for n in range(2000)]}, "too big"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_its_fault(
    schema: object, words: str, engine: Engine
) -> None:
    with pytest.raises(RequestError) as caught:
        engine.submit(request(schema))
    assert (caught.value.status, caught.value.error_type) == (422, "validation")
    assert "`response_format.schema` cannot be followed: " in str(caught.value)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_schema_that_costs_too_much_later_fails_its_own_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dear = {"anyOf": [{"type": "object", "properties": {f"p{n}": {"type": "null"}}} for n in range(50)]}
    schema = {"type": "array", "items": dear, "minItems": 1}
    good = engine.submit(request(PERSON))
    monkeypatch.setattr("soppu.serve.engine.grammar._LIMITS", LLParserLimits(step_max_items=100))
    bad = engine.submit(request(schema))
    with pytest.raises(RequestError, match="no token can be chosen with these parameters: .*Too many items"):
        bad.result()
    assert is_person(good.result()[1].text)


def test_a_vocabulary_without_an_end_cannot_be_held() -> None:
    grammars = Grammars(tiny.tokenizer(), eos=frozenset(), width=300)
    with pytest.raises(RequestError, match="`response_format` needs a fast tokenizer and an end-of-text"):
        grammars.matcher("{}")


def test_ids_beyond_the_tokenizers_vocabulary_are_never_allowed() -> None:
    size, eos = len(tiny.tokenizer()), tiny.tokenizer().eos_token_id
    matcher = Grammars(tiny.tokenizer(), eos=frozenset([eos]), width=size + 50).matcher('{"type": "string"}')
    for width in (size + 50, size + 90, size):  # the logits of a model may have more columns, or fewer
        allowed = matcher.allowed(width)
        assert allowed.shape == (width,) and allowed[:size].any() and not allowed[size:].any()
    twin = matcher.copy()
    quote = int(allowed.nonzero()[0])
    matcher.push(quote)
    assert not torch.equal(matcher.allowed(size), twin.allowed(size))
