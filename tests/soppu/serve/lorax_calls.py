"""Runs in the LoRAX client's own environment: a few calls, their results as JSON. Not a test itself."""

import asyncio
import json
import sys

import requests
from lorax import AsyncClient, Client
from lorax.errors import GenerationError, ValidationError


def calls(url, prompt, adapters):
    client = Client(url, timeout=60, session=requests.Session(), max_session_retries=0)
    found = {"generate": {}, "stream": {}, "details": {}, "async": {}, "errors": {}}
    for adapter in adapters:
        response = client.generate(prompt, adapter_id=adapter or None, max_new_tokens=8)
        found["generate"][adapter] = response.generated_text
        found["details"][adapter] = json.loads(response.details.model_dump_json())
        events = list(client.generate_stream(prompt, adapter_id=adapter or None, max_new_tokens=8))
        assert events[-1].details.finish_reason == "length", events[-1]
        found["stream"][adapter] = [
            "".join(event.token.text for event in events if not event.token.special),
            events[-1].generated_text,
        ]
        answer = asyncio.run(AsyncClient(url).generate(prompt, adapter_id=adapter or None, max_new_tokens=8))
        found["async"][adapter] = answer.generated_text
    for name, call in {
        "generate": lambda: client.generate(prompt, adapter_id="nobody", max_new_tokens=8),
        "stream": lambda: list(client.generate_stream(prompt, adapter_id="nobody", max_new_tokens=8)),
    }.items():
        try:
            call()
        except GenerationError as error:
            found["errors"][name] = str(error)
    try:
        client.generate(prompt, max_new_tokens=100_000)
    except ValidationError as error:
        found["errors"]["validation"] = str(error)
    return found


if __name__ == "__main__":
    json.dump(calls(sys.argv[1], sys.argv[2], sys.argv[3:]), sys.stdout)
