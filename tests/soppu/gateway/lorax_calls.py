"""Runs in the LoRAX client's own environment: calls through a gateway, results as JSON. No test itself."""

import json
import sys

import requests
from lorax import Client


def calls(url, prompt, keys):
    found = {}
    for user, key in keys.items():
        headers = {"Authorization": f"Bearer {key}"}
        client = Client(url, headers=headers, timeout=60, session=requests.Session(), max_session_retries=0)
        events = list(client.generate_stream(prompt, max_new_tokens=8))
        refused = []
        for other in keys.keys() - {user}:
            for call in (client.generate, client.generate_stream):
                try:
                    list(call(prompt, adapter_id=other, max_new_tokens=8))
                except Exception as error:  # whichever of its classes
                    refused.append(type(error).__name__)
        found[user] = {
            "unnamed": client.generate(prompt, max_new_tokens=8).generated_text,
            "named": client.generate(prompt, adapter_id=user, max_new_tokens=8).generated_text,
            "stream": events[-1].generated_text,
            "refused": refused,
        }
    return found


if __name__ == "__main__":
    json.dump(calls(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])), sys.stdout)
