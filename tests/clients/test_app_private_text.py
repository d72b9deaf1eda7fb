"""A user's text is in no reply, no state of the node's, and no error message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.common.serde import message_to_proto

from clients.app import app
from soppu import data, models
from soppu.errors import DataError
from tests.clients.orders import Setup, node, ternary_wire

pytestmark = pytest.mark.usefixtures("flower_identity", "fresh_workbench")


def leaks(message: Message, user: data.UserData, ids: list[list[int]]) -> list[str]:
    """Everything of a user's text that is in the bytes a message has on the wire."""
    raw = message_to_proto(message).SerializeToString()
    for array in message.content.array_records.get("arrays", {}).values():
        raw += array.data + array.numpy().tobytes()
    found = []
    for item in (*user.train, *user.validation, *user.heldout):
        for text in (
            item.prompt,
            item.completion,
            item.digest(),
            *item.prompt.split(),
            *item.completion.split(),
        ):
            if len(text) > 8 and text.encode() in raw:
                found.append(text)
    for run in ids:
        for start in range(len(run) - 3):
            window = run[start : start + 4]
            shapes = [np.array(window, dtype=kind).tobytes() for kind in ("<i2", "<i4", "<i8", "<f4", "<f8")]
            shapes += [", ".join(map(str, window)).encode(), ",".join(map(str, window)).encode()]
            found += [str(window) for shape in shapes if shape in raw]
    return found


def test_no_text_and_no_token_of_the_user_is_in_any_reply(setup: Setup, tiny_base: Path) -> None:
    user = data.load_user(setup.config.data, "alice")
    tokenizer = models.load_tokenizer(models.resolve(str(tiny_base), cache=Path("unused")))
    blocks = data.tokenize((*user.train, *user.validation, *user.heldout), tokenizer, max_tokens=96)
    ids = [block.ids.tolist() for block in blocks]
    alice = node(**{"partition-id": 0})
    replies = [app(setup.message("query.hello"), alice)]
    replies += [app(setup.train(mode), alice) for mode in ("shared", "personal")]
    replies.append(app(setup.train("personal", ternary_wire(setup)), alice))
    assert replies[-1].content["who"]["form"] == "ternary"
    for reply in replies:
        assert leaks(reply, user, ids) == []
    # the search does find what it looks for: as text, as numbers in an array, as numbers in a list
    secret = user.train[0].completion
    replies[1].content["who"]["note"] = f"by the way: {secret}"
    assert secret in leaks(replies[1], user, ids)
    replies[2].content["arrays"] = ArrayRecord({"x": torch.tensor(ids[0], dtype=torch.float32)})
    assert str(ids[0][:4]) in leaks(replies[2], user, ids)
    replies[0].content["hello"]["tokens"] = str(ids[1])
    assert str(ids[1][:4]) in leaks(replies[0], user, ids)


def test_the_node_keeps_nothing_in_flowers_state(setup: Setup) -> None:
    context = node(**{"partition-id": 0})
    app(setup.train(), context)
    assert len(context.state) == 0


def test_errors_about_a_users_file_do_not_quote_it(setup: Setup, tmp_path: Path) -> None:
    """An error message travels to the server too."""
    lines = (tmp_path / "users" / "alice.jsonl").read_text().splitlines()
    for bad in (
        '{"user_id": "alice", "prompt": "alice-whisper-99',
        '{"user_id": "alice", "prompt": "alice-whisper-99"}',
    ):
        (tmp_path / "users" / "alice.jsonl").write_text("\n".join([*lines, bad]))
        with pytest.raises(DataError) as caught:
            app(setup.message("query.hello"), node(**{"partition-id": 0}))
        assert "alice.jsonl:15" in str(caught.value)
        assert "whisper" not in str(caught.value) and "secret" not in str(caught.value)
