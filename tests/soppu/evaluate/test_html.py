"""The page: nothing from outside, nothing that runs, every text as text, every figure of the report on it."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from jinja2 import UndefinedError

from soppu.config import Config
from soppu.evaluate import html, plots, wording
from soppu.evaluate.gate import check
from soppu.evaluate.tradeoff import schema as tradeoff
from tests.soppu.evaluate.example import (
    HOSTILE,
    make_compression,
    make_inputs,
    make_losses,
    make_report,
)
from tests.soppu.evaluate.tradeoff.example import comparison

pytestmark = pytest.mark.usefixtures("drawn_once")

VOID = {"meta", "br", "hr", "img", "input", "link", "area", "base", "col", "embed", "source", "track", "wbr"}


class Page(HTMLParser):
    """Collects tags, attributes and text; checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.data: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.data.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.data)


@functools.cache
def text_for(count: int) -> str:
    return html.page(make_report(count))


def assert_self_contained(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith("#"), (tag, name, value)
        if name == "style":
            assert not re.search(r"url\((?!#)", value)


@pytest.mark.parametrize("count", [1, 8, pytest.param(200, marks=pytest.mark.long)])
def test_the_page_needs_nothing_but_itself(count: int) -> None:
    text = text_for(count)
    assert_self_contained(Page(text))
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_hostile_texts_stay_texts_everywhere() -> None:
    made = make_report(users=[HOSTILE, "other"])
    made["run"] = made["base_model"] = made["hardware"] = made["base_hash"] = HOSTILE
    made["gate"].update(passed=False, reasons=[HOSTILE], worst_user=HOSTILE, unmeasured=[HOSTILE])
    made["federation"]["rounds_log"][0]["mode"] = HOSTILE
    made["federation"]["refused"] = {HOSTILE: HOSTILE}
    made["federation"]["forms"] = {HOSTILE: {"users": 1, "bytes_up": 1}}
    made["serving"].update(target=HOSTILE, prompt=HOSTILE, canaries={HOSTILE: HOSTILE})
    made["serving"]["completions"] = {HOSTILE: HOSTILE}
    made["stages"][0]["name"] = HOSTILE
    modules = made["compression"]["by_module"]
    modules[HOSTILE] = dict(next(iter(modules.values())))
    text = html.page(made)
    page = Page(text)
    assert_self_contained(page)
    assert "\x1b" not in text and "\u202e" not in text
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert page.text.count(shown) >= 10


def test_of_a_completion_line_breaks_stay_and_nothing_else_that_is_not_seen() -> None:
    made = make_report(1)
    made["serving"].update(prompt="\ta\x1b[2J:\r\n", completions={"user-0000": "\n\u202e<b>\n\n  x\n"})
    page = Page(html.page(made))
    assert "    a\ufffd[2J:" in page.data and "\n\ufffd<b>\n\n  x" in page.data


@pytest.mark.parametrize(
    "path", [("hardware",), ("plan", "hash"), ("users", 0, "id"), ("stages", 0, "attempts")]
)
def test_a_field_that_is_not_there_is_never_left_blank(path: tuple[Any, ...]) -> None:
    made = make_report(1)
    place: Any = made
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    with pytest.raises((UndefinedError, KeyError), match=path[-1]):
        html.page(made)


def test_every_user_is_in_the_table_with_their_figures() -> None:
    made = make_report(200)
    page = Page(text_for(200))
    for user in made["users"]:
        start = page.cells.index(user["id"], page.cells.index("gain kept"))
        losses = [f"{user[f'loss_{name}']:.3f}" for name in ("base", "shared", "personal", "compressed")]
        assert page.cells[start + 2 : start + 6] == losses
        assert page.cells[start + 6 : start + 8] == [f"{100 * user['gain_kept']:.1f} %", "personal"]
        gains = [wording.gain(user[f"gain_over_{name}"]) for name in ("base", "shared")]
        assert page.cells[start + 8 : start + 10] == gains and " to " in gains[1]
        assert page.cells[start + 11] == user["adapter_id"]


def test_long_tables_start_folded_and_short_ones_do_not() -> None:
    assert "details" not in Page(text_for(24)).tags
    assert "all 200 users" in Page(text_for(200)).text


def test_all_figures_are_on_it() -> None:
    text = text_for(8)
    for svg in plots.figures(make_report(8)).values():
        assert svg in text
    assert Page(text).tags.count("svg") == 6


def test_the_verdict_comes_with_every_reason() -> None:
    assert "passed" in Page(text_for(8)).data
    made = make_report(2)
    made["gate"].update(passed=False, reasons=["gate.a: one", "gate.b: two"])
    page = Page(html.page(made))
    assert "refused" in page.data and {"gate.a: one", "gate.b: two"} <= set(page.data)


def test_the_federation_table_has_traffic_and_refusals_of_every_round() -> None:
    page = Page(text_for(8))
    start = page.cells.index("refused") + 1
    rounds = [page.cells[start + 11 * number : start + 11 * number + 11] for number in range(3)]
    assert rounds[0][:5] == ["1", "shared", "4.96 MB", "2.48 MB", "20 s"]
    assert rounds[0][5:9] == ["2.400", "2.600", "2.500", "2.700"]
    assert rounds[1][9:] == ["7", "user-0000: user-0000: lora_A holds NaN or Inf"]
    assert rounds[2][1] == "personal" and rounds[2][8] == "–" and rounds[2][10] == "–"
    assert "late: no answer in time" in page.text
    assert "7 as ternary (63 kB up), 1 as float32 (310 kB up)" in page.text
    assert "0.31 before, 0.12 after" in page.text and "0-1, 3, 5" in page.text


def test_the_certificate_is_told_in_words() -> None:
    text = Page(text_for(8)).text
    assert "no number of a user's own, the shared bases leave a relative error of 15.00 %" in text
    assert "No bases of the ranks used can leave less than 14.14 %" in text
    assert "0.86 percentage points" in text and "guarantees 17.32 %" in text
    assert "Numbers of the users' own lie beside the bases" in text


def test_where_nothing_is_shared_no_bound_is_claimed() -> None:
    made = make_report(8)
    made["compression"].update(method="svd", k_used=dict.fromkeys(made["compression"]["by_module"], 0))
    page = Page(html.page(made))
    assert "there is none to certify" in page.text and "No bases of the ranks used" not in page.text
    assert "svd, target 16x, no shared basis" in page.text
    name = "model.layers.26.self_attn.q_proj"
    start = page.cells.index(name)
    assert page.cells[start + 1] == "0" and page.cells[start + 5 : start + 7] == ["–", "–"]


def test_method_target_ranks_and_both_ratios_are_on_the_page() -> None:
    made = make_report(8)
    made["compression"].update(clusters=3, whitened=True)
    text = Page(html.page(made)).text
    assert "residual, target 16x, shared rank 8 to 32 of 64 allowed, 3 clusters, errors weighed by" in text
    assert "9.84 MB of adapters, 1.56 MB of bundle: 6.29× smaller on disk, 3.07× than at 16 bits" in text
    assert "inputs weighed by calibration" in text


def test_several_clusters_have_no_bound() -> None:
    made = make_report(8)
    made["compression"].update(method="cluster", clusters=3)
    page = Page(html.page(made))
    assert "other groups of users and their bases could leave is not known" in page.text
    assert "No bases of the ranks used" not in page.text
    start = page.cells.index("model.layers.26.self_attn.q_proj")
    assert page.cells[start + 5 : start + 7] == ["15.0 %", "–"]


def test_a_bound_that_is_only_likely_says_how_likely() -> None:
    made = make_report(8)
    assert "a probability of" not in Page(html.page(made)).text
    made["compression"]["certificate"]["confidence"] = 1 - 2e-9
    assert (
        "whatever the method (this holds with a probability of 1 - 2e-09 or more)"
        in Page(html.page(made)).text
    )


def test_serving_has_the_curl_line_and_the_sample() -> None:
    text = Page(text_for(8)).text
    assert "curl -s http://127.0.0.1:8099/generate -H 'Content-Type: application/json' -d '{" in text
    assert "8 of 8 users answered as they should" in text
    assert "def main():\n    return {1: '<b>&'}" in text


def test_a_failed_canary_is_named() -> None:
    made = make_report(2)
    made["serving"]["canaries"]["user-0001"] = "no tokens came back"
    text = Page(html.page(made)).text
    assert "1 of 2 users answered" in text and "user-0001: no tokens came back" in text


@pytest.mark.parametrize("changes", [{"federation": None}, {"serving": None}, {"stages": ()}])
def test_what_did_not_happen_is_left_out(changes: dict[str, Any]) -> None:
    page = Page(html.page(make_report(3, **changes)))
    assert_self_contained(page)
    assert "curl" in page.text or changes == {"serving": None}


def test_users_without_losses_are_shown_as_such() -> None:
    inputs = make_inputs(3)
    page = Page(html.page(make_report(3, losses=inputs.losses[:1])))
    start = page.cells.index("user-0002", page.cells.index("gain kept"))
    assert page.cells[start + 1 : start + 6] == ["0", "–", "–", "–", "–"]


def test_the_same_report_gives_the_same_page() -> None:
    assert html.page(make_report(8)) == text_for(8)


def test_both_colour_schemes_define_every_colour_used() -> None:
    text = text_for(8)
    light, dark = (set(re.findall(r"--(\w+): #", part)) for part in text.split("@media (prefers-color", 1))
    used = set(re.findall(r"var\(--(\w+)", text))
    assert used <= light and used <= dark


def test_a_page_without_a_shared_adapter_reads_well() -> None:
    """A recompression: no federation, nothing shared, everybody keeps the adapter they have."""
    losses = [replace(one, shared=None, served="current") for one in make_losses(["alice", "bob"])]
    verdict = check(losses, {"alice": 0.1, "bob": 0.1}, Config().gate)
    made = make_report(users=["alice", "bob"], losses=losses, federation=None, verdict=verdict)
    assert made["gains"]["over_shared"] is made["users"][0]["gain_over_shared"] is None
    page = Page(html.page(made))
    assert "Served: 2 with the adapter they have." in page.text
    users = page.text[: page.text.index("Federation")]
    assert "over the shared adapter" not in users and "Personal adapters" not in users and "None" not in users
    start = page.cells.index("alice", page.cells.index("over shared"))
    assert page.cells[start + 3] == page.cells[start + 9] == "–"


def test_a_user_served_the_base_model_is_shown_without_an_adapter() -> None:
    losses = make_losses(["alice", "bob"])
    losses[1] = replace(losses[1], served="base", compressed=losses[1].base, each=None)
    compression = make_compression(["alice"])
    made = make_report(
        users=["alice", "bob"], losses=losses, adapter_ids={"alice": "a-1"}, compression=compression
    )
    page = Page(html.page(made))
    start = page.cells.index("bob", page.cells.index("over shared"))
    assert page.cells[start + 6 : start + 8] == ["no gain", "base"]
    assert page.cells[start + 10 : start + 12] == ["–", "no adapter: the base model"]


def test_what_compression_lost_is_said() -> None:
    losses = make_losses(["alice", "bob"])
    losses[1] = replace(losses[1], validation_compressed=2.001)
    page = Page(html.page(make_report(users=["alice", "bob"], losses=losses)))
    assert "the shared adapter is better than the compressed one of bob." in page.text
    assert page.text.count("(compression lost)") == 1


def test_arms_that_were_compared_have_a_section_that_needs_only_the_folder() -> None:
    found = tradeoff.check(comparison(), source="x")
    assert "<h2>Arms</h2>" not in text_for(1)
    text = html.page(make_report(1), arms=found)
    links = {value for _, name, value in Page(text).attributes if name == "href" and value[0] != "#"}
    assert links == {"tradeoff.html", "tradeoff.json", found.texts}
    assert "residual@16" in Page(text).text and "left out: codebleu: not asked for" in Page(text).text
    assert 'aria-label="loss, nats a token, of every arm over what it costs"' in text
    assert text == html.page(make_report(1), arms=found)
