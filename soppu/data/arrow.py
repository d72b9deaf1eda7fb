"""Parquet files and dataset folders (`Dataset.save_to_disk`): read where they lie, in parts, nothing copied.

Both are read by the library `datasets` and the pyarrow beneath it, the extra `soppu[data]`; no cache is
written and no hub asked, since only what is on this disk is opened.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from soppu.errors import DataError, MissingExtra

DATASET = "dataset"
_BATCH = 512
_SPLIT = re.compile(r"(\w+)-\d{5}-of-\d{5}\.parquet")


@dataclass(frozen=True)
class Selection:
    """What to decode: the split of a dataset with several, the columns, and which of them names the user."""

    split: str = "train"
    columns: frozenset[str] = frozenset()
    user: str = ""


def is_dataset(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes, of one split or of several."""
    return path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def split_of(path: Path) -> str:
    """The split that a data file's name says, as the hub's do: train-00000-of-00002.parquet; else ""."""
    named = _SPLIT.fullmatch(path.name)
    return named[1] if named else ""


def choose(split: str, splits: Collection[str], path: Path) -> str:
    """The split to read: the one called `split`, or the only one. DataError names those there are."""
    if split in splits:
        return split
    if len(splits) == 1:
        return next(iter(splits))
    raise DataError(
        f"{path}: has the splits {', '.join(sorted(splits))}; data.split = {split!r} is none of them"
    )


def read_rows(path: Path, selection: Selection) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a Parquet file or a dataset folder; times as ISO 8601, whole-number users as text.

    Raises:
        MissingExtra: the libraries are not installed.
        DataError: it is damaged, or there are several splits and none is the one selected.
    """
    try:
        import datasets  # noqa: PLC0415 - an extra: most text needs none of it
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise MissingExtra(f"reading {path}", package="datasets", extra="data") from None
    number = 0
    try:
        if path.is_dir():
            batches = _of_folder(datasets.load_from_disk(str(path)), path, selection)
        else:
            batches = _of_file(parquet.ParquetFile(path, memory_map=True), selection.columns)
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, {name: _plain(value, name == selection.user) for name, value in row.items()}
    except (pyarrow.ArrowException, FileNotFoundError, OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path}: cannot be read after row {number}: {reason}; write or copy it again"
        ) from None


def _of_file(file: Any, wanted: frozenset[str]) -> Iterator[Any]:
    """Only the wanted columns are decoded; where there is none, all, for a message to name them."""
    names = [name for name in file.schema_arrow.names if name in wanted] or None
    yield from file.iter_batches(batch_size=_BATCH, columns=names)


def _of_folder(loaded: Any, path: Path, selection: Selection) -> Iterator[Any]:
    if isinstance(loaded, dict):  # a DatasetDict
        loaded = loaded[choose(selection.split, loaded, path)]
    names = [name for name in loaded.column_names if name in selection.columns]
    chosen = loaded.select_columns(names) if names else loaded
    yield from chosen.with_format("arrow").iter(batch_size=_BATCH)


def _plain(value: Any, names_user: bool) -> Any:
    """JSON's kinds of value: what a table has beside them are times; a number that names a user is a name."""
    if isinstance(value, date):  # a datetime is one
        return value.isoformat()
    return str(value) if names_user and type(value) is int else value
