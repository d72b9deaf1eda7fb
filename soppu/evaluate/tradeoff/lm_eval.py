"""Held-out text as tasks of EleutherAI's lm-eval, so that anybody checks a loss with the field's own tool.

lm-eval encodes context and continuation together, and moves spaces from one to the other: a text's tokens,
and so its loss, would be others than the gate's. So the documents are the token ids themselves, written as
numbers, beside a tokenizer whose words are those numbers. Model, adapter and arithmetic are lm-eval's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from soppu import files
from soppu.data import IGNORE, Block

METRIC = "nats_per_token"
TOKENS, TASKS = "tokenizer", "tasks"  # folders of an export
SCORE = "score.py"
_SCORE = '''"""What lm-eval asks of one document, and how its answers become one number."""


def one(doc, results):
    """(summed log-likelihood, tokens) of a document."""
    (likelihood, _), = results
    return {"nats_per_token": (likelihood, doc["tokens"])}


def nats_per_token(items):
    """Mean over the tokens of all documents."""
    return -sum(likelihood for likelihood, _ in items) / sum(tokens for _, tokens in items)
'''


def documents(blocks: Sequence[Block]) -> Iterator[dict[str, str | int]]:
    """Every stretch of labels that a loss counts, with all that stands before it in its block.

    The sum of their log-likelihoods is the blocks' loss: the first token of a block follows from nothing.
    """
    for block in blocks:
        learned = [place > 0 and label != IGNORE for place, label in enumerate(block.labels.tolist())]
        for start, end in _stretches(learned):
            ids = block.ids.tolist()
            target = f" {_words(ids[start:end])}"
            yield {"context": _words(ids[:start]), "target": target, "tokens": end - start}


def tokenizer(vocabulary: int, *, eos: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are numbers below `vocabulary`; `eos` is the model's own end-of-text token."""
    numbers = {_word(number): number for number in range(vocabulary)}
    words = Tokenizer(models.WordLevel(numbers, unk_token=_word(eos)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=_word(eos), pad_token=_word(eos))


def export(
    texts: Mapping[str, Sequence[Block]], folder: Path, *, words: PreTrainedTokenizerFast
) -> list[str]:
    """Write a task for every user, and the tokenizer; returns the names of the tasks.

    Args:
        texts: user -> blocks of held-out text, as the gate measures them.
    """
    names = []
    for user, blocks in texts.items():
        name = task_name(user)
        place = folder.resolve() / TASKS / f"{name}.jsonl"
        lines = "".join(f"{json.dumps(document)}\n" for document in documents(blocks))
        files.write_text(place, lines)
        files.write_text(place.with_suffix(".yaml"), _task(name, place))
        names.append(name)
    files.write_text(folder / TASKS / SCORE, _SCORE)
    words.save_pretrained(folder / TOKENS)
    return names


def task_name(user: str) -> str:
    """What lm-eval calls a user's text."""
    return f"soppu_{user}"


def command(folder: Path, tasks: Sequence[str], *, model: Path, adapter: Path | None = None) -> list[str]:
    """The words that have lm-eval measure tasks, with the base model or with an adapter on it."""
    peft = f",peft={adapter}" if adapter else ""
    arguments = f"pretrained={model}{peft},tokenizer={folder / TOKENS},dtype=float32"
    place = ["--tasks", ",".join(tasks), "--include_path", str(folder / TASKS)]
    return [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        arguments,
        *place,
        "--device",
        "cpu",
        "--batch_size",
        "8",
    ]


def _task(name: str, documents: Path) -> str:
    """A task's YAML, of which JSON is a part; the functions it names are those of `SCORE` beside it."""
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    lines += ["process_results: !function score.one", "metric_list:", f"  - metric: {METRIC}"]
    lines += ["    aggregation: !function score.nats_per_token", "    higher_is_better: false"]
    return "".join(f"{line}\n" for line in lines)


def _words(ids: Sequence[int]) -> str:
    return " ".join(map(_word, ids))


def _word(number: int) -> str:
    return f"<{number}>"  # special tokens are looked for inside words: none of these lies in another


def _stretches(learned: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of every run of true values."""
    start = None
    for place, one in enumerate([*learned, False]):
        if one and start is None:
            start = place
        elif not one and start is not None:
            yield start, place
            start = None
