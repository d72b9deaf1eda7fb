"""The load of `soak.py`, made by the real client libraries in their own environments, without ours.

    PYTHON soak_client.py openai|lorax URL SECONDS WORKERS USERS.json OUT.jsonl [STOP]

Every line of the output is one request: when it began and ended, whose it was, what was asked and came back.
It ends after SECONDS, or when there is a file STOP.
"""

import json
import os
import random
import sys
import threading
import time

TOKENS = int(os.environ.get("SOAK_TOKENS", "6"))  # of an answer
PROMPTS = ("def read_file(path):\n", "Once upon a time", "The garden was", "import socket\n", "Dear Sir,")


def openai_calls(url):
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def whole(user, prompt):
        made = client.completions.create(
            model=user or "base",
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return made.choices[0].text

    def hang_up(user, prompt):
        with client.completions.create(
            model=user or "base", prompt=prompt, max_tokens=200, temperature=0, stream=True
        ) as stream:
            next(iter(stream))

    return whole, hang_up


def lorax_calls(url):
    from lorax import Client

    client = Client(url, timeout=120)

    def whole(user, prompt):
        extra = {"adapter_id": user} if user else {}
        return client.generate(prompt, max_new_tokens=TOKENS, ignore_eos_token=True, **extra).generated_text

    def hang_up(user, prompt):
        extra = {"adapter_id": user} if user else {}
        stream = client.generate_stream(prompt, max_new_tokens=200, **extra)
        next(stream)
        stream.close()

    return whole, hang_up


def work(calls, users, going, seed, write):
    whole, hang_up = calls
    draw = random.Random(seed)
    while going():
        kind = draw.choices(("user", "base", "hang up"), (0.8, 0.1, 0.1))[0]
        user, prompt = "" if kind == "base" else draw.choice(users), draw.choice(PROMPTS)
        line = {"kind": kind, "user": user, "prompt": prompt, "began": time.time()}
        try:
            line["text"] = (hang_up if kind == "hang up" else whole)(user, prompt)
        except Exception as error:  # whatever went wrong is a failed request, and is told
            line["error"] = f"{type(error).__name__}: {error}"
            time.sleep(0.2)
        write(line | {"ended": time.time()})


def main():
    api, url, seconds, workers, users, out, *stop = sys.argv[1:]
    names = json.load(open(users))
    lock, stream = threading.Lock(), open(out, "w")

    def write(line):
        with lock:
            stream.write(json.dumps(line) + "\n")

    calls = {"openai": openai_calls, "lorax": lorax_calls}[api](url)
    until = time.time() + float(seconds)

    def going():
        return time.time() < until and not any(map(os.path.exists, stop))

    threads = [
        threading.Thread(target=work, args=(calls, names, going, seed, write)) for seed in range(int(workers))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
