"""Stage: held-out text as lm-eval tasks, with users' adapters and the gate's own figures beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soppu import adapter as adapters
from soppu import files, models
from soppu.data import list_users, load_user, tokenize
from soppu.errors import ConfigError
from soppu.evaluate.tradeoff import lm_eval
from soppu.stages import text
from soppu.stages.federate import RESULT
from soppu.stages.run import Run, open_run

ADAPTERS, OURS = "adapters", "ours.json"


@dataclass(frozen=True)
class Exported:
    """What was written: user -> task, user -> folder of their own adapter, and what the gate measured.

    `ours` is user -> column ("base", "personal") -> nats a token; empty where nothing was evaluated yet.
    """

    tasks: Mapping[str, str]
    adapters: Mapping[str, Path]
    ours: Mapping[str, Mapping[str, float]]
    model: Path


def export_tasks(run_folder: str, folder: Path) -> Exported:
    """Write tasks, tokenizer, and PEFT folders into `folder`, which has to be empty or absent.

    Raises:
        ConfigError: the folder holds something, or users' text is on nodes of its own.
        DataError: a user's text has changed since the run was prepared.
        RegistryError: a user's adapter is gone.
    """
    run = open_run(run_folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty; give a folder that is, or the name of a new one")
    text.check_here(run.config)
    text.check_unchanged(run.config.data, run.read(text.FILE))
    data, base = run.config.data, run.base()
    tokens = models.load_tokenizer(base)
    blocks = {
        user: tokenize(
            load_user(data, user).heldout,
            tokens,
            max_tokens=data.max_tokens,
            chat_template=data.chat_template,
        )
        for user in list_users(data)
    }
    rows = models.skeleton(base).get_input_embeddings().weight.shape[0]
    words = lm_eval.tokenizer(int(rows), eos=int(tokens.eos_token_id))
    names = lm_eval.export(blocks, folder, words=words)
    ours = _ours(run)
    files.write_text(folder / OURS, json.dumps(ours, indent=2))
    return Exported(dict(zip(blocks, names, strict=True)), _adapters(run, folder), ours, base.path)


def _adapters(run: Run, folder: Path) -> dict[str, Path]:
    """Everybody's own adapter, as `measure` reads them, written as a PEFT folder."""
    registry, own = run.registry(), run.read(RESULT).get("adapters", {})
    found = {}
    for user, adapter_id in own.items():
        found[user] = folder / ADAPTERS / user
        adapters.write(registry.get_adapter(adapter_id), found[user])
    return found


def _ours(run: Run) -> dict[str, dict[str, float]]:
    """What the newest evaluation of the run measured."""
    made = sorted(run.folder.glob("evaluation-*.json"), key=lambda path: path.stat().st_mtime)
    if not made:
        return {}
    told = run.read(made[-1].name)
    return {one["user"]: {name: one[name] for name in ("base", "personal")} for one in told["losses"]}
