"""LoraxDouble: what a real LoRAX does with adapters, over real HTTP, on a tiny model. Not its speed.

It computes its answers: a folder below its root is read and added to the model, so what lies there counts.
What LoRAX does by nature is always so:

- an id is an adapter for ever: a folder that changes while its adapter is resident is not noticed;
- after `evict` tensors are read again, but the configuration is the one read first;
- tensors that are named otherwise are ignored, and so is a projection that one layer lacks: the base model
  answers;
- a rank is padded to 8 or a multiple of 16, with the wrong scale on all projections but the first;
- a rank that the decode kernels do not know fails at the first token, with all requests under way;
- a merge strategy that is none, and a control character in the id of a stream, end the process.

What can be switched on is in `Faults`.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import uvicorn
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from soppu.serve.port import claim_port
from tests.soppu.serve import tiny

_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
_KERNELS = (8, 16, 32, 64, 128)
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_OTHER_ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize")  # there, but no body suits them
_MERGES = ("linear", "ties", "dare_linear", "dare_ties")


@dataclass
class Faults:
    """What goes wrong from now on; set the fields of `LoraxDouble.faults` at any time."""

    silent_base: set[str] = field(default_factory=set)  # ids answered by the base model, with 200
    refused: set[str] = field(default_factory=set)  # ids answered with 424
    load_seconds: float = 0.0  # an adapter takes to load; everybody waits
    dies_after: int = -1  # generations it still answers; in the one after that all connections are cut
    fails_batch: bool = False  # every generation is answered with 424
    unhealthy: bool = False
    base_for_missing: bool = False  # as TGI does: an id nobody knows is the base model
    no_header: bool = False  # x-adapter-id is not sent


class GenerationError(Exception):
    """What LoRAX answers with 424."""


@dataclass
class Adapter:
    """A folder as it was read first; its configuration and its keys are never read again."""

    folder: Path
    config: dict[str, Any]
    keys: dict[str, Path]  # tensor name -> file


class LoraxDouble:
    """A server on a port of its own, in a thread: `with LoraxDouble(root, model, tokenizer) as double`.

    Attributes:
        url: where it listens, also after `restart`.
        faults: switches.
        asked: (adapter id, prompt) of every generation, in order.
        loads: adapter id -> how often its tensors were read.
    """

    def __init__(
        self,
        root: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        model_id: str = "tiny",
        bucket: str = "",
    ) -> None:
        """`root` is its /data; `bucket` an fsspec protocol such as "memory", for the source s3."""
        self.root, self.faults, self.model_id = root, Faults(), model_id
        self.asked: list[tuple[str, str]] = []
        self.loads: Counter[str] = Counter()
        self._model, self._tokenizer, self._bucket = model, tokenizer, bucket
        self._cache = tempfile.TemporaryDirectory()
        self._known: dict[str, Adapter] = {}
        self._resident: dict[str, dict[str, Tensor]] = {}
        self._lock = threading.Lock()
        self._port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> LoraxDouble:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._cache.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def is_alive(self) -> bool:
        """Whether the process, so to say, runs."""
        return self._server is not None and not self._server.should_exit

    def restart(self) -> None:
        """Start it afresh, on the port it had: it knows no adapter, and `faults.dies_after` is off."""
        self.stop()
        self._known.clear()
        self._resident.clear()
        self.faults.dies_after = -1
        listener = claim_port("127.0.0.1", self._port)
        self._port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(self._app(), log_level="critical", timeout_graceful_shutdown=1)
        )
        self._server = server
        self._thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not server.started and self._thread.is_alive():
            time.sleep(0.005)

    def stop(self) -> None:
        """End it in order."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
        self._server = self._thread = None

    def kill(self) -> None:
        """End it as SIGKILL does: connections are cut, and nothing is answered until `restart`."""
        assert self._loop is not None and self._thread is not None
        self._loop.call_soon_threadsafe(self._cut)
        self._thread.join()

    def evict(self, adapter_id: str) -> None:
        """Take an adapter off the GPU, as LoRAX does when another one is wanted."""
        self._resident.pop(adapter_id, None)

    def _app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self._loop = asyncio.get_running_loop()
            yield

        return Starlette(
            lifespan=lifespan,
            routes=[
                Route("/health", self._health),
                Route("/info", self._info),
                Route("/generate", self._generate, methods=["POST"]),
                Route("/generate_stream", self._generate, methods=["POST"]),
                Route("/", self._generate, methods=["POST"]),
                *(Route(path, self._elsewhere, methods=["POST"]) for path in _OTHER_ROUTES),
                Route("/metrics", self._health),
            ],
        )

    async def _health(self, _: Request) -> Response:
        if self.faults.unhealthy:
            return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)
        return Response()

    async def _elsewhere(self, _: Request) -> Response:
        return Response("Failed to deserialize the JSON body into the target type: missing field", 422)

    async def _info(self, _: Request) -> Response:
        return JSONResponse(
            {"model_id": self.model_id, "model_sha": None, "model_dtype": "torch.float16"}
            | {"model_device_type": "cuda", "model_pipeline_tag": None, "max_concurrent_requests": 1024}
            | {"max_best_of": 2, "max_stop_sequences": 4, "max_input_length": 64, "max_total_tokens": 128}
            | {"version": "0.1.0", "sha": None, "docker_label": None, "eager_prefill": False}
        )

    async def _generate(self, request: Request) -> Response:
        try:
            asked = json.loads(await request.body())
            prompt, parameters = asked["inputs"], asked.get("parameters", {})
            adapter_id = parameters.get("adapter_id") or ""
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return Response(f"Failed to deserialize the JSON body into the target type: {error}", 422)
        streams = request.url.path == "/generate_stream" or bool(asked.get("stream"))
        merge = parameters.get("merged_adapters") or {}
        if merge.get("merge_strategy", "linear") not in _MERGES or (
            streams and any(ord(character) < 32 for character in adapter_id)
        ):
            return await self._die()
        if not prompt:
            return self._refused(422, "validation", "Input validation error: `inputs` cannot be empty")
        self.asked.append((adapter_id, prompt))
        if self.faults.dies_after == 0:
            return await self._die()
        self.faults.dies_after -= self.faults.dies_after > 0
        try:
            answer = await run_in_threadpool(self._answer, prompt, adapter_id, parameters)
        except GenerationError as error:
            text = f"Request failed during generation: Server error: {error}"
            return self._refused(424, "generation", text, streams=streams)
        headers = {"x-model-id": self.model_id}
        if adapter_id and not self.faults.no_header:
            source = parameters.get("adapter_source") or "local"
            headers |= {"x-adapter-id": adapter_id, "x-adapter-source": source}
        if streams:
            return StreamingResponse(_events(answer), media_type="text/event-stream", headers=headers)
        if not parameters.get("details"):
            del answer["details"]
        return JSONResponse([answer] if request.url.path == "/" else answer, headers=headers)

    def _cut(self) -> None:
        assert self._server is not None
        self._server.should_exit = self._server.force_exit = True
        for listener in self._server.servers:
            listener.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _die(self) -> Response:
        self._cut()
        await asyncio.sleep(60)  # its connection is gone before that
        raise AssertionError("unreachable")

    def _refused(self, status: int, kind: str, text: str, *, streams: bool = False) -> Response:
        body = {"error": text, "error_type": kind}
        if streams and status == 424:
            return Response(f"data: {json.dumps(body)}\n\n", media_type="text/event-stream")
        return JSONResponse(body, status)

    def _answer(self, prompt: str, adapter_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:  # one batch at a time, and loading stops it
            if self.faults.fails_batch:
                raise GenerationError("CUDA error: an illegal memory access was encountered")
            if adapter_id in self.faults.refused:
                raise GenerationError("Failed to load adapter")
            source = (parameters.get("adapter_source") or "local").lower()
            deltas = self._deltas(adapter_id, source) if adapter_id else {}
            before = {name: self._model.get_submodule(name).weight.clone() for name in deltas}
            try:
                for name, delta in deltas.items():
                    self._model.get_submodule(name).weight += delta
                return self._decode(prompt, parameters)
            finally:
                for name, weight in before.items():
                    self._model.get_submodule(name).weight.copy_(weight)

    def _decode(self, prompt: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        begin, eos = ids.shape[1], self._tokenizer.eos_token_id
        tokens: list[dict[str, Any]] = []
        reason = "length"
        for _ in range(parameters.get("max_new_tokens") or 20):
            with torch.no_grad():
                logprobs = torch.log_softmax(self._model(input_ids=ids).logits[0, -1].float(), -1)
            token = int(logprobs.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            text, special = self._tokenizer.decode([token]), token in self._tokenizer.all_special_ids
            spoken = {"id": token, "text": text, "logprob": float(logprobs[token]), "special": special}
            tokens.append({**spoken, "skipped": False})
            if token == eos and not parameters.get("ignore_eos_token"):
                reason = "eos_token"
                break
        details = {"finish_reason": reason, "prompt_tokens": begin, "generated_tokens": len(tokens)}
        details |= {"skipped_tokens": 0, "seed": None, "prefill": [], "tokens": tokens}
        text = self._tokenizer.decode(ids[0, begin:], skip_special_tokens=True)
        return {"generated_text": text, "details": details}

    def _deltas(self, adapter_id: str, source: str) -> dict[str, Tensor]:
        if adapter_id not in self._resident:
            self._resident[adapter_id] = self._load(adapter_id, source)
        return {} if adapter_id in self.faults.silent_base else self._resident[adapter_id]

    def _load(self, adapter_id: str, source: str) -> dict[str, Tensor]:
        time.sleep(self.faults.load_seconds)
        if adapter_id not in self._known:
            folder = self._download(adapter_id, source)
            if not (folder / "adapter_config.json").is_file():
                if self.faults.base_for_missing:
                    return {}
                raise GenerationError("No valid adapter config file found: tried None and None")
            config = json.loads((folder / "adapter_config.json").read_text())
            if config.get("base_model_name_or_path") not in ("", None, self.model_id):
                raise GenerationError(
                    f"Adapter '{adapter_id}' is not compatible with model '{self.model_id}'"
                )
            keys = {name: file for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
            self._known[adapter_id] = Adapter(folder, config, keys)
        self.loads[adapter_id] += 1
        return self._merged(self._known[adapter_id])

    def _download(self, adapter_id: str, source: str) -> Path:
        if source == "local":
            if len(adapter_id) < 5:
                raise GenerationError(f"Adapter id {adapter_id!r} is too short")
            return self.root / adapter_id
        if source != "s3" or not self._bucket:
            raise GenerationError(f"Invalid source '{source}' when downloading adapter '{adapter_id}'")
        folder = Path(self._cache.name, adapter_id.replace("/", "--"))
        if not folder.exists():  # never refreshed
            system = fsspec.filesystem(self._bucket)
            folder.mkdir()
            for path in system.find(f"/{adapter_id}"):
                system.get_file(path, str(folder / Path(path).name))
        return folder

    def _merged(self, known: Adapter) -> dict[str, Tensor]:
        """Module -> delta, with LoRAX's own mistakes."""
        try:
            files = {file: load_file(file) for file in set(known.keys.values())}
            tensors = {name: files[file][name].float() for name, file in known.keys.items()}
        except (OSError, KeyError) as error:
            raise GenerationError(f"{known.folder}: {error}") from error
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if match := _KEY.fullmatch(name):
                pairs.setdefault(match[1], {})[match[2]] = tensor
        layers = self._model.config.num_hidden_layers
        made: dict[str, Tensor] = {}
        for kind in _TYPES:
            targets = [name for name, _ in self._model.named_modules() if name.rpartition(".")[2] == kind]
            mine = {name: pairs[name] for name in targets if set(pairs.get(name, ())) == {"A", "B"}}
            if not mine or len(mine) < min(len(targets), layers):
                continue  # one layer lacks it: the whole type is inactive
            rank, config = next(iter(mine.values()))["A"].shape[0], known.config
            scale = config["lora_alpha"] / config["r"]
            padded = 8 if rank <= 8 else -(-rank // 16) * 16
            config["r"] = padded  # the scale bug: what comes after this type is divided by the padded rank
            if padded not in _KERNELS:
                raise GenerationError("No suitable kernel. dtype=Half")
            made |= {name: scale * pair["B"] @ pair["A"] for name, pair in mine.items()}
        return made


def _events(answer: Mapping[str, Any]) -> Iterator[str]:
    tokens = answer["details"]["tokens"]
    for place, token in enumerate(tokens):
        last = place == len(tokens) - 1
        text = answer["generated_text"] if last else None
        yield f"data: {json.dumps({'token': token, 'generated_text': text, 'details': None})}\n\n"


@pytest.fixture
def double(tmp_path: Path) -> Iterator[LoraxDouble]:
    (tmp_path / "data").mkdir()
    with LoraxDouble(tmp_path / "data", tiny.llama(), tiny.tokenizer()) as made:
        yield made
