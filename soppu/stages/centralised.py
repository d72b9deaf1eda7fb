"""The centralised training of a run, as it lies in the run folder: what `train` writes and others read."""

from __future__ import annotations

from soppu import adapter as adapters
from soppu.adapter import LoraAdapter
from soppu.errors import AdapterError
from soppu.stages.run import Run

FILE = "centralised.json"
FOLDER = "centralised"  # the PEFT folder


def identify(adapter: LoraAdapter) -> str:
    """Its id, as the registry would give it."""
    return f"a-{adapter.content_hash()[:16]}"


def centralised_adapter(run: Run) -> LoraAdapter | None:
    """The adapter of a run's centralised training; None where none has ended.

    Raises:
        AdapterError: the folder is damaged, or not the one that `FILE` speaks of.
    """
    told = run.read(FILE)
    if not told:
        return None
    adapter = adapters.read(run.folder / str(told.get("path", FOLDER)))
    if (found := identify(adapter)) != told.get("adapter_id"):
        raise AdapterError(
            f"{run.folder / FOLDER}: holds adapter {found}, {FILE} says {told.get('adapter_id')}"
        )
    return adapter
