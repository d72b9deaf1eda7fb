"""The vLLM plugin: a whole bundle of users in one vLLM server. Not for our own server: `soppu.serve.server`.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its
processes. Without SOPPU_BUNDLE in the environment it does nothing at all. Only the two files called `hooks`
import vLLM: `frontend.hooks` for its API server, `worker.hooks` for its engine and workers.
"""

from __future__ import annotations

import os

__all__ = ["register"]


def register() -> None:
    """Prepare this vLLM process to serve the bundle that SOPPU_BUNDLE names.

    Raises:
        ConfigError: a SOPPU_ variable has a value that is not allowed, or this vLLM is not one the plugin was
            written for.
    """
    if not (os.environ.get("SOPPU_BUNDLE") or os.environ.get("SOPPU_FOLLOW")):
        return
    from soppu.serve.vllm_plugin import host, refusal, settings  # an idle plugin costs vLLM no import

    refusal.prepare()
    with refusal.noted():
        host.check_version()
        chosen = settings.read(os.environ)
    host.share_environment()
    from soppu.serve.vllm_plugin.frontend import hooks as frontend
    from soppu.serve.vllm_plugin.worker import hooks as worker

    worker.install(chosen)
    frontend.install(chosen)
