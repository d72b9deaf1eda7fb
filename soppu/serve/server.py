"""One server process: port, model, state, engine and HTTP put together. Command: `soppu.commands.serve`."""

from __future__ import annotations

import gc
import logging
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch

from soppu.models import load_model, load_tokenizer, resolve
from soppu.serve import admin_token as tokens
from soppu.serve.api.http import ServerInfo, create_app
from soppu.serve.bank.bank import AdapterBank, Mount
from soppu.serve.bank.resident import DEFAULT_RESIDENT
from soppu.serve.bank.store import ServerState
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.layers.packed_linear import fastest_dtype
from soppu.serve.port import claim_port
from soppu.serve.router import deciding
from soppu.serve.router.deciding import RouterOptions
from soppu.serve.stopping import DrainingServer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """How a server is started."""

    model: str  # see `soppu.models.resolve`
    cache: Path  # where converted models are kept
    state: Path  # folder that remembers what was served
    host: str = "127.0.0.1"
    port: int = 8080  # 0 takes a free one
    bundle: Path | None = None  # a bundle file to stage and activate before the first request
    adapters: tuple[tuple[str, Path], ...] = ()  # (name, PEFT folder) pairs to load before the first request
    dtype: str = "float32"  # of the weights; "auto" takes the faster one, see `fastest_dtype`
    device: str = "auto"  # "auto" is cuda if there is one, else cpu
    threads: int = 0  # torch threads; 0 leaves torch's default
    engine: EngineOptions = field(default_factory=EngineOptions)
    grace: float = 10.0  # seconds that requests under way get when the server is told to stop
    mount: Path | None = None  # a folder of adapters that requests name by their path below it
    max_active_adapters: int = Mount.max_active
    resident_mib: int = DEFAULT_RESIDENT >> 20  # MiB of bundles' users that stay in memory
    read_ahead: bool = True  # so many of them before they ask
    router: RouterOptions = field(default_factory=RouterOptions)
    admin_token: str = field(default="", repr=False)  # "" takes the one kept in the state folder


def run(options: ServeOptions) -> None:
    """Serve until the process is told to stop.

    Raises:
        PortTaken: before anything is loaded.
        ModelError: the base model cannot be had.
        TargetError: the state folder is in use, or belongs to another base model.
        BundleError: a bundle is damaged or does not fit.
        AdapterError: an adapter is damaged or does not fit.
        RouterError: the router is of another base model or bundle.
    """
    with claim_port(options.host, options.port) as listener:
        if options.threads:
            torch.set_num_threads(options.threads)
        base = resolve(options.model, cache=options.cache)
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = fastest_dtype(device) if options.dtype == "auto" else options.dtype
        model = load_model(base, dtype=dtype).to(device)
        mount = Mount(options.mount, options.max_active_adapters) if options.mount else None
        resident = options.resident_mib << 20
        bank = AdapterBank(model, base_hash=base.hash, base_model=base.name, mount=mount, resident=resident)
        state = ServerState.open(options.state, bank)
        try:
            _preload(state, options)
            if options.read_ahead:
                bank.read_ahead()
            engine = Engine(model, load_tokenizer(base), bank, options.engine)
            token = options.admin_token or tokens.ensure(tokens.token_file(options.state))
            info = ServerInfo(base.name, base.hash, dtype=dtype, device=device, admin_token=token)
            router = deciding.opened(options.router, engine=engine, model=model)
            app = create_app(engine, info=info, state=state, router=router)
            server = DrainingServer(app, engine, grace=options.grace)
            gc.collect()
            gc.freeze()  # what is here stays: no answer waits while garbage is looked for in it
            _announce(options, bank, listener)
            server.run(sockets=[listener])
            _LOG.info("stopped")
            if server.gave_up:  # a thread that is still at it must not outlive the lock of the state folder
                logging.shutdown()
                os._exit(0)
        finally:
            state.close()


def _preload(state: ServerState, options: ServeOptions) -> None:
    if options.bundle is not None:
        state.activate(state.add_file(options.bundle))
    for name, folder in options.adapters:
        state.add_adapter(name, folder)


def _announce(options: ServeOptions, bank: AdapterBank, listener: socket.socket) -> None:
    _LOG.info(
        "serving %s with %d users and %d single adapters at http://%s:%d",
        options.model,
        len(bank.bundles().get(bank.active, ())),
        len(bank.adapters()),
        options.host,
        listener.getsockname()[1],
    )
