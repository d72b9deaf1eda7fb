"""docs/format.md shows the bytes that are written today, and its reader finds what a bundle holds."""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from soppu.compress import Bundle
from soppu.compress.bundle import envelope, schema
from soppu.compress.codec import modes
from soppu.compress.codec.streams import LARGEST_FLOAT
from soppu.compress.linalg.certificate import Certificate
from tests.soppu.compress import handmade
from tests.soppu.compress.mutate import File

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text()
EXAMPLE, DIGEST, READER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def header_length(data: bytes) -> int:
    return int(struct.unpack("<Q", data[:8])[0])


def shown() -> bytes:
    scope: dict[str, Any] = {}
    exec(EXAMPLE, scope)
    return bytes(scope["data"])


def test_the_format_page_shows_a_file_as_it_is_written_today():
    data = shown()
    assert f"{len(data):,} bytes" in PAGE
    bundle = Bundle.from_bytes(data)
    assert bundle.to_bytes() == data
    deltas = {user: bundle.reconstruct(user).pairs["q"].delta() for user in bundle.users}
    for user, (scale, j) in {"ada": (2, 0), "bo": (3, 0), "cy": (1, 1)}.items():
        expected = torch.zeros(4, 3)
        expected[j, j] = scale
        torch.testing.assert_close(deltas[user], expected)


def test_the_format_page_shows_the_bytes_of_its_file_and_names_every_key():
    data = shown()
    rows = re.findall(r"^([0-9a-f]{8}): ((?:[0-9a-f]{2,4} )+)", PAGE, re.MULTILINE)
    assert len(rows) > 15
    for offset, row in rows:
        shown_here = bytes.fromhex(row)
        assert data[int(offset, 16) :][: len(shown_here)] == shown_here
    table, metadata = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))
    header = json.loads(data[8 : 8 + header_length(data)])
    del header["__metadata__"]
    assert table == header
    inner = File.open(data).inner
    assert metadata == inner == json.loads(zlib.decompress(load(data)["meta"].numpy().tobytes()))
    certificate = [field.name for field in fields(Certificate)]
    keys = {*inner, *inner["modules"][0], *inner["report"], *table, *certificate, "format", "content"}
    assert all(f"`{key}`" in PAGE for key in keys)


@pytest.mark.parametrize("name", ["example", *(name for name in handmade.PLANS if name != "ternary")])
def test_the_reader_on_the_format_page_finds_what_a_bundle_holds(name):
    data = shown() if name == "example" else handmade.make(handmade.PLANS[name]).to_bytes()
    scope: dict[str, Any] = {"data": data}
    for snippet in (DIGEST, READER):
        exec(snippet, scope)
    bundle, seen = Bundle.from_bytes(data), 0
    for user in bundle.users:
        for module, pair in bundle.reconstruct(user).pairs.items():
            delta = torch.zeros(bundle.shapes[module])
            for scale, u, v in scope["components"].get((user, module), []):
                delta += scale * torch.outer(torch.tensor(u), torch.tensor(v))
                seen += 1
            torch.testing.assert_close(pair.delta(), delta, rtol=1e-4, atol=1e-4)
    assert seen == sum(len(part) for number in range(len(bundle.pages)) for part in bundle.components(number))


def test_the_format_page_says_the_limits_and_widths_of_the_code():
    for number in (schema.MOST_FEATURES, schema.MOST_U16, LARGEST_FLOAT, envelope.FORMAT):
        assert f"{number:,.0f}" in PAGE
    coords, own = (", ".join(map(str, widths[1:])) for widths in (modes.COORDS_WIDTHS, modes.OWN_WIDTHS))
    assert f"(none, {coords})" in PAGE and f"(none, {own})" in PAGE
    assert f"It holds {4 + len(modes.NUMBERS)} streams in a row" in PAGE
