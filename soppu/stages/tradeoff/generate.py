"""One arm's text, and what it costs: the server's own engine, first one prompt at a time, then in batches.

Each arm is served by a process of its own (`python -m soppu.stages.tradeoff.generate JOB`), so that the
memory of one is not counted to another. A batch mixes users, as the server's batches do.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from soppu import files, models
from soppu.devices import torch_device
from soppu.errors import SoppuError
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import Finish, GenerationRequest
from soppu.stages.run import Run, open_run
from soppu.stages.tradeoff.arms import Arm, Held
from soppu.stages.tradeoff.job import DTYPE, Done, Job
from soppu.stages.tradeoff.prompts import Ask

_SAMPLE_S = 0.05


class Speaker:
    """An engine with one arm's adapters, in the order in which they are asked for."""

    def __init__(self, run: Run, arm: Arm, *, tokens: int, batch: int, queue: int) -> None:
        base = run.base()
        device = torch_device(run.config.gate.device, key="gate.device")
        model = models.load_model(base, dtype=DTYPE, device=device)
        self.bank = AdapterBank(model, base_hash=base.hash, base_model=base.name)
        self.device = device
        self._held = Held(run.registry(), arm)
        if self._held.bundle is not None:
            self.bank.stage(self._held.bundle, bundle_id=arm.bundle_id)
        options = EngineOptions(
            max_batch=batch,
            max_queue=max(queue, 1),
            max_input_tokens=0,
            max_total_tokens=tokens,
            prefix_tokens=0,  # every prompt is read: nothing is gained from one that was asked before
        )
        self.engine = Engine(model, models.load_tokenizer(base), self.bank, options)

    def adapter_id(self, user: str) -> str:
        """The id that a user's requests name; "" where they are served the base model."""
        arm = self._held.arm
        if not self._held.serves(user):
            return ""
        if arm.bundle_id:
            return f"{user}@{arm.bundle_id}"
        name = user if user in arm.adapter_ids else arm.name
        if name not in self.bank.adapters():
            adapter = self._held.adapter(user)
            assert adapter is not None  # it serves the user
            self.bank.add(name, adapter)
        return name


def generate(job: Job, *, done: Done) -> dict[str, Any]:
    """Texts in the order of the prompts, and the arm's costs, as JSON values.

    Raises:
        RequestError: the engine refuses a prompt, or an adapter gives numbers that are not finite.
        RegistryError: an adapter is gone.
    """
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    run, asks = open_run(job.run), [Ask(**ask) for ask in job.asks]
    tokens = max(run.config.data.max_tokens, _longest(run, asks)) + job.new_tokens + 1
    speaker = Speaker(run, Arm(**job.arm), tokens=tokens, batch=job.batch, queue=len(asks))
    first = [ask for user in dict.fromkeys(ask.user for ask in asks) for ask in _first(asks, user, job.timed)]
    total = len(first) + len(asks)
    with speaker.engine:
        alone = _alone(speaker, first, job, lambda number: done(number, total))
        with _peak(speaker.device) as peak:
            finishes, seconds = _together(speaker, asks, job, lambda number: done(len(first) + number, total))
    generated = sum(finish.generated_tokens for finish in finishes)
    return {
        "texts": [_text(finish.text, job) for finish in finishes],
        "reasons": [finish.reason for finish in finishes],
        "latency_ms": alone,
        "tokens_s": generated / seconds,
        "memory_bytes": peak(),
    }


def _longest(run: Run, asks: Sequence[Ask]) -> int:
    """Tokens of the longest prompt: problems know nothing of a run's blocks."""
    tokenizer = models.load_tokenizer(run.base())
    ids = tokenizer([ask.inputs for ask in asks], add_special_tokens=False)["input_ids"]
    return max(map(len, ids))


def _request(speaker: Speaker, ask: Ask, **how: Any) -> GenerationRequest:
    # the prompt names its special tokens itself
    adapter_id = speaker.adapter_id(ask.user)
    return GenerationRequest(ask.inputs, adapter_id=adapter_id, add_special_tokens=False, **how)


def _first(asks: Sequence[Ask], user: str, count: int) -> list[Ask]:
    return [ask for ask in asks if ask.user == user][:count]


def _alone(
    speaker: Speaker, asks: Sequence[Ask], job: Job, done: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Milliseconds of prompts that have the engine to themselves, all of the same number of new tokens."""
    requests = [_request(speaker, ask, max_new_tokens=job.timed_tokens, ignore_eos=True) for ask in asks]
    for request in requests[:1]:  # what is made at the first request is no prompt's
        speaker.engine.submit(request).result()
    found = []
    for number, (ask, request) in enumerate(zip(asks, requests, strict=True), start=1):
        _, finish = speaker.engine.submit(request).result()
        found.append({"user": ask.user, "first": 1000 * finish.first, "total": 1000 * finish.total})
        done(number)
    return found


def _together(
    speaker: Speaker, asks: Sequence[Ask], job: Job, done: Callable[[int], None]
) -> tuple[list[Finish], float]:
    """Every prompt, in batches that mix users; and the seconds that took."""
    # one prompt of every user, then the next: neighbours in the queue are of different users
    order = sorted(range(len(asks)), key=lambda n: (asks[n].example, n))
    requests = {n: _request(speaker, asks[n], max_new_tokens=job.new_tokens, stop=job.stop) for n in order}
    started = time.perf_counter()
    running = {n: speaker.engine.submit(request) for n, request in requests.items()}
    finishes = {}
    for number, (n, generation) in enumerate(running.items(), start=1):
        finishes[n] = generation.result()[1]
        done(number)
    seconds = time.perf_counter() - started
    return [finishes[n] for n in range(len(asks))], seconds


def _text(text: str, job: Job) -> str:
    for stop in job.stop:
        text = text.removesuffix(stop)
    return text


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """The most memory that the block takes: of the GPU where there is one, else resident of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    process, over, most = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(_SAMPLE_S):
            most[0] = max(most[0], int(process.memory_info().rss))

    thread = threading.Thread(target=watch, name="soppu-memory", daemon=True)
    most[0] = int(process.memory_info().rss)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        thread.join()


def here(job: Job, _: Path, done: Done) -> dict[str, Any]:
    """`generate` in the process that calls, whose memory is then not the arm's alone."""
    return generate(job, done=done)


def main() -> int:
    """Do the job in the file named; lines of JSON tell how far it is, the last one how it ended."""
    path, out = Path(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed is no line of ours
    job = Job(**json.loads(path.read_text()))

    def tell(told: dict[str, Any]) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    try:
        found = generate(job, done=lambda number, total: tell({"done": number, "of": total}))
    except SoppuError as error:
        tell({"error": str(error)})
        return 1
    files.write_text(path.with_suffix(".out.json"), json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
