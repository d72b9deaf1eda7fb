"""From a file to its rows: JSONL, JSON, CSV, TSV, Parquet, an Arrow dataset; text formats also as .gz.

A row is given with its number, and as it was decoded: whether it is an example is for `records` to say. A
file that breaks off, or is no text, is a DataError that names it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from soppu.data import arrow
from soppu.data.arrow import Selection
from soppu.errors import DataError

LINES = (".jsonl", ".ndjson")
TEXT = ".txt"
TEXTUAL = (*LINES, ".json", ".csv", ".tsv", TEXT)
FORMATS = (*TEXTUAL, ".parquet")
BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def ending(path: Path) -> str:
    """The format a file's name says, without .gz: ".jsonl"; "" where it is none of `FORMATS`, or hidden."""
    name = path.name.lower()
    if name.startswith("."):
        return ""
    plain = name.removesuffix(".gz")
    kind = os.path.splitext(plain)[1]
    if kind in (TEXTUAL if plain != name else FORMATS):
        return kind
    return arrow.DATASET if arrow.is_dataset(path) else ""


def stem(path: Path) -> str:
    """A file's name without the ending of its format: "alice" of alice.jsonl.gz."""
    name = path.name
    if name.lower().endswith(".gz"):
        name = name[:-3]
    return name if ending(path) == arrow.DATASET else name[: len(name) - len(ending(path))]


def read_rows(path: Path, selection: Selection) -> Iterator[tuple[int, Any]]:
    """(number, row) of a file that is a table; a line that is not JSON comes as its DataError.

    Raises:
        DataError: the file cannot be read, or not to its end.
    """
    kind = ending(path)
    if kind in (".parquet", arrow.DATASET):
        yield from arrow.read_rows(path, selection)
    elif kind in (".csv", ".tsv"):
        yield from _csv_rows(path, "," if kind == ".csv" else "\t")
    elif kind == ".json":
        yield from _json_rows(path)
    else:
        with opened(path) as stream:
            for number, _, line in lines(stream):
                yield number, parse(line, f"{path}:{number}")


def read_text(path: Path) -> str:
    """A whole file as text, without its byte-order mark. DataError if it is not UTF-8."""
    with opened(path) as stream:
        return _decoded(stream.read(), path)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it is .gz; DataError where it breaks off or may not be read."""
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path, "rb") as packed:
                yield io.BufferedReader(packed)
        else:
            with path.open("rb") as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not whole as gzip: {error}; write or copy the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, line) of every line that is not blank; only a newline ends one, as JSONL says."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        start = offset
        offset += len(line)
        if number == 1 and line.startswith(BOM):
            start, line = start + len(BOM), line[len(BOM) :]
        if line.strip():
            yield number, start, line


def parse(line: bytes, where: str) -> Any:
    """A line's JSON value, or the DataError that says why it has none."""
    try:
        value = json.loads(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not JSON in UTF-8: {error}{_hint(line)}")
    return value


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """One array of objects; a file that does not begin as one is one object a line, as the hub has it."""
    with opened(path) as stream:
        content = stream.read()
    if content.removeprefix(BOM).lstrip().startswith(b"["):
        values = parse(content.removeprefix(BOM), str(path))
        if isinstance(values, DataError):
            raise values
        yield from enumerate(values, start=1)
    else:
        for number, _, line in lines(io.BytesIO(content)):
            yield number, parse(line, f"{path}:{number}")


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """A header, then a row for each record, every cell text: "NA" and "007" stay what they are."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if twice := {name for name in header if header.count(name) > 1}:
            raise DataError(f"{path}: column {', '.join(sorted(twice))} twice in the header")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                at = f"{path}:{reader.line_num}"
                yield reader.line_num, DataError(f"{at}: {len(cells)} cells, the header has {len(header)}")
            else:
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: {error}{_hint(content)}") from None


def _hint(content: bytes) -> str:
    return "; it looks like UTF-16, save it as UTF-8" if content.startswith(_UTF16) else ""
