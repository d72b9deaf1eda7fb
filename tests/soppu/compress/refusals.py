"""How a file that is no sound bundle is refused: by its name, and in words that say why."""

from __future__ import annotations

import pytest

from soppu.compress import Bundle
from soppu.errors import BundleError


def refused(data: bytes, *words: str) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.from_bytes(data, source="some.file")
    message = str(caught.value)
    assert message.startswith("some.file: ") and all(word in message for word in words), message
    return message
