"""tradeoff.html: everybody is on it, nothing of theirs is markup, and it needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from soppu.errors import ReportError
from soppu.evaluate import report
from soppu.evaluate.tradeoff import fronts, page, schema
from tests.soppu.evaluate.example import make_report
from tests.soppu.evaluate.tradeoff.example import arm, comparison, row

HOSTILE = "</pre><script>alert(1)</script><img src=http://x onerror=alert(1)>\"'&"
VOID = {"meta", "input", "link", "br", "img", "path", "circle"}


class Parsed(HTMLParser):
    """Tags, attributes and text; fails where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def folder(path: Path, values: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    (path / schema.FILE).write_text(json.dumps(values))
    (path / values["texts"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(user: str, text: str = "said") -> dict[str, Any]:
    texts = {"base": text, "personal": text, "joint@16": text}
    return {"user": user, "prompt": text, "reference": text, "texts": texts, "losses": {"base": 1.25}}


def many(users: list[str]) -> dict[str, Any]:
    """Compression costs the later users more."""
    names = ("base", "personal", "joint@16")
    losses = {"base": 3.0, "personal": 2.0}
    rows = [
        row(user, name, loss=losses.get(name, 2.0 + number / 1000))
        for number, user in enumerate(users)
        for name in names
    ]
    return comparison(arms=[arm("base"), arm("personal", kind="adapter"), arm("joint@16")], rows=rows)


def test_every_arm_and_user_is_there_those_first_whom_compression_cost_most(tmp_path: Path) -> None:
    users = ["ann", "bob", "cleo%40x.org"]
    at = page.write_page(folder(tmp_path, many(users), [line(user) for user in users]))
    text = at.read_text()
    parsed = Parsed(text)
    assert at == tmp_path / "tradeoff.html"
    assert [value for name, value in parsed.attributes if name == "data-name"] == ["cleo@x.org", "bob", "ann"]
    assert "+0.002 nats, joint@16" in parsed.text and "1.250 nats" in parsed.text
    assert all(name in parsed.text for name in ("personal", "joint@16", "left out: codebleu: not asked for"))
    assert text == page.write_page(tmp_path).parent.joinpath("tradeoff.html").read_text()


def test_what_the_report_knows_of_a_user_is_told(tmp_path: Path) -> None:
    folder(tmp_path, many(["alice", "bob"]), [])
    report.write(tmp_path, make_report(users=["alice", "bob"], adapter_ids={"alice": "a-77", "bob": "a-78"}))
    assert "Adapter a-77, served: " in Parsed((tmp_path / "tradeoff.html").read_text()).text


def test_hostile_texts_stay_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    values = many([HOSTILE]) | {"run": HOSTILE, "left_out": {"codebleu": HOSTILE}}
    text = page.write_page(folder(tmp_path, values, [line(HOSTILE, HOSTILE)])).read_text()
    parsed = Parsed(text)
    assert parsed.tags.count("script") == 1 and "img" not in parsed.tags
    assert parsed.text.count(HOSTILE) >= 6
    links = {value for name, value in parsed.attributes if name in ("src", "href")}
    assert links == {"tradeoff.json", values["texts"]}
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert any(f"'sha256-{digest}'" in value for name, value in parsed.attributes if name == "content")


def test_of_very_many_users_the_page_is_bounded_and_says_so(tmp_path: Path) -> None:
    users = [f"user-{number:04}" for number in range(page.USERS + 50)]
    lines = [line(user) for user in users for _ in range(page.EXAMPLES)]
    lines += [line(users[-2], "not shown"), line(users[0], "not shown")]
    lines.insert(0, line(users[-1], "x" * 5000))
    text = page.write_page(folder(tmp_path, many(users), lines)).read_text()
    parsed = Parsed(text)
    assert parsed.tags.count("details") == page.USERS
    assert parsed.text.count("what the user wrote") == page.READ * page.EXAMPLES
    assert "The first 1,000 of 1,050 are here" in parsed.text and "… (5,000 characters)" in parsed.text
    assert "not shown" not in parsed.text and "x" * 1501 not in parsed.text


def test_points_on_the_front_are_marked_and_a_higher_score_is_better() -> None:
    arms = [
        arm("base", bytes_per_user=0.0, bleu=1.0, loss=3.0),
        arm("good", bytes_per_user=10.0, bleu=9.0, loss=2.0),
        arm("beaten", bytes_per_user=1000.0, bleu=8.0, loss=2.5),
        arm("unmeasured", bytes_per_user=5.0, bleu=None, loss=None),
    ]
    found = fronts.panels(schema.check(comparison(arms=arms, rows=[]), source="x"))
    assert "codebleu" not in found
    for metric, better in (("loss", "lower"), ("bleu", "higher")):
        panel = found[metric][0]
        assert panel.better == better
        assert {point.arm.name: point.on_front for point in panel.points} == {
            "base": True,
            "good": True,
            "beaten": False,
        }
        assert all(fronts.LEFT <= point.x <= fronts.RIGHT for point in panel.points)
        assert sorted(panel.points, key=lambda point: point.x) == panel.points


def test_names_of_arms_at_one_place_stand_apart() -> None:
    arms = [arm(f"arm-{number}", bytes_per_user=100.0) for number in range(6)]
    panel = fronts.panels(schema.check(comparison(arms=arms, rows=[]), source="x"))["loss"][0]
    heights = sorted(point.name_y for point in panel.points)
    assert all(above - below >= 11 for below, above in zip(heights, heights[1:], strict=False))


@pytest.mark.parametrize(
    ("content", "said"), [("{", "line 1: not JSON"), ('{"user": "x"}', "prompt"), (None, "cannot be read")]
)
def test_texts_that_are_not_whole_are_refused(tmp_path: Path, content: str | None, said: str) -> None:
    values = many(["ann"])
    folder(tmp_path, values, [])
    path = tmp_path / values["texts"]
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ReportError, match=said):
        page.write_page(tmp_path)


def test_texts_from_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / schema.FILE).write_text(json.dumps(comparison(texts="../secret")))
    with pytest.raises(ReportError, match=r"texts = '\.\./secret'"):
        page.write_page(tmp_path)
