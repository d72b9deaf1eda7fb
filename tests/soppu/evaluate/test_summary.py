"""The terminal summary and the Markdown: aligned, harmless, and a curl line that works in a shell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from soppu.evaluate import summary, wording
from tests.soppu.evaluate.example import HOSTILE, make_inputs, make_losses, make_report


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that remembers what was posted to /generate."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append({"path": self.path, "type": self.headers["content-type"], "body": body})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"generated_text": "hi"}')

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", seen
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_the_table_has_a_line_for_every_user() -> None:
    made = make_report(6)
    head, rule, *lines = summary.text(made).splitlines()
    heads = "user examples base shared personal compressed over shared gain kept served adapter"
    assert head.split() == heads.split()
    assert set(rule) == {"-", " "}
    for user, line in zip(made["users"], lines, strict=False):
        losses = [f"{user[f'loss_{name}']:.3f}" for name in ("base", "shared", "personal", "compressed")]
        kept = [f"{user['gain_over_shared']['mean']:+.3f}", f"{100 * user['gain_kept']:.1f}", "%"]
        assert line.split() == [user["id"], "16", *losses, *kept, "personal", user["adapter_id"]]


def test_columns_stay_aligned_with_wide_names() -> None:
    lines = summary.text(make_report(users=["a", "日本語", "café", "cafe\u0301"])).splitlines()[2:6]
    assert [line.split()[0] for line in lines] == ["a", "日本語", "café", "cafe\u0301"]
    widths = [wording_width(line[: line.index(" a-")]) for line in lines]
    assert len(set(widths)) == 1


def wording_width(text: str) -> int:
    """Columns on a terminal, for the characters used here."""
    return sum(0 if c == "\u0301" else 2 if c in "日本語" else 1 for c in text)


def test_of_many_users_those_who_keep_least_are_shown() -> None:
    made = make_report(200)
    made["users"][117]["gain_kept"] = 0.123
    lines = summary.text(made).splitlines()
    assert lines[2].startswith("user-0117") and "12.3 %" in lines[2]
    assert "200 users; these 20 keep the least, the report lists all" in lines
    assert sum(line.startswith("user-") for line in lines) == 20


def test_compression_verdict_and_places_follow() -> None:
    text = summary.text(make_report(6), report_path="runs/x/report.html", prefect_url="http://localhost:4200")
    assert "7.38 MB -> 1.5 MB (4.93× smaller on disk, 2.40× than at 16 bits a number)" in text
    assert "the shared bases alone leave 15.0 %, none of their ranks less than 14.1 %" in text
    assert "gate passed: all users together keep 9" in text
    assert re.search(r"^report: +runs/x/report\.html$", text, re.MULTILINE)
    assert re.search(r"^Prefect: http://localhost:4200$", text, re.MULTILINE)
    assert re.search(r"^server: +http://127\.0\.0\.1:8099$", text, re.MULTILINE)


def test_without_a_shared_basis_the_line_has_no_bound() -> None:
    made = make_report(6)["compression"]
    made["k_used"] = dict.fromkeys(made["k_used"], 0)
    line = summary.compression_line(made)
    assert line.startswith("residual, target 16x, no shared basis: 7.38 MB") and "alone" not in line


def test_a_refusal_says_why() -> None:
    made = make_report(2)
    made["gate"].update(passed=False, reasons=["gate.max_relative_error: bob\x1b[2J"])
    text = summary.text(made)
    assert "gate REFUSED" in text and "  - gate.max_relative_error: bob\ufffd[2J" in text


def test_places_nobody_named_are_left_out() -> None:
    text = summary.text(make_report(2, serving=None))
    assert "server:" not in text and "Prefect:" not in text and "curl" not in text


def test_the_curl_line_is_lorax_json() -> None:
    made = make_report(2)
    made["serving"]["url"] = "http://host:1/"
    line = wording.curl(made)
    assert line.startswith("curl -s http://host:1/generate -H 'Content-Type: application/json' -d '")
    body = json.loads(line.split(" -d ", 1)[1].strip("'"))
    assert body == {
        "inputs": "def main():",
        "parameters": {"adapter_id": "user-0000", "max_new_tokens": 24},
    }


def test_a_vllm_server_is_asked_as_it_is_asked() -> None:
    made = make_report(2)
    made["serving"].update(target="vllm", url="http://host:1/")
    line = wording.curl(made)
    assert line.startswith("curl -s http://host:1/v1/completions -H ")
    body = json.loads(line.split(" -d ", 1)[1].strip("'"))
    assert body == {"model": "user-0000", "prompt": "def main():", "max_tokens": 24}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "user", ["alice", HOSTILE, "a'b; touch pwned #", "$(touch pwned)", "日本語", "-d @/etc/passwd"]
)
def test_the_curl_line_works_in_a_shell_for_any_user(
    user: str, server: tuple[str, list[dict[str, Any]]], tmp_path: Any
) -> None:
    url, seen = server
    made = make_report(users=[user])
    made["serving"]["url"] = url
    line = summary.text(made).splitlines()[-1]
    told = subprocess.run(
        ["sh", "-c", line.replace("curl", "curl --noproxy '*'", 1)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout) == {"generated_text": "hi"}
    assert seen[0]["path"] == "/generate" and seen[0]["type"] == "application/json"
    assert seen[0]["body"]["parameters"]["adapter_id"] == user
    assert not list(tmp_path.iterdir())


def test_nothing_a_user_is_called_reaches_the_terminal() -> None:
    made = make_report(users=["\x1b]0;owned\x07", "a\rb\nc\td", "\u202egnp.exe", "x" * 300])
    text = summary.text(made)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text.splitlines()[:6]) == 6 and max(map(len, text.splitlines()[:6])) < 140


def test_markdown_is_one_table_row_a_user_whatever_they_are_called() -> None:
    lines = summary.markdown_users(make_report(users=["a|b", "`x`\n| y |", HOSTILE, "*_[l](u)"]))
    lines, said = lines.split("\n\n", 1)[0].splitlines(), lines.split("\n\n", 1)[1]
    assert not re.search(r"(?<!\\)[`*_\[\]<>|]", said)
    assert len(lines) == 6
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 11
        assert not re.search(r"(?<!\\)[`*_\[\]<>]", line)


def test_markdown_of_the_compression_has_figures_certificate_and_verdict() -> None:
    made = make_report(6)
    made["gate"].update(passed=False, reasons=["gate.x: <b>"])
    text = summary.markdown_compression(made)
    assert "| bytes | 7.38 MB | 1.5 MB |" in text and "| parameters | 1,800,000 | 696,000 |" in text
    assert "No bases of the ranks used" in text and "root mean square, mean" in text
    assert "Gate: **refused**" in text and "- gate.x: &lt;b&gt;" in text


def markdown_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    heads, _, *rows = (
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in summary.markdown_users(report).split("\n\n")[0].splitlines()
    )
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_rows_for_a_table_artifact() -> None:
    rows = markdown_rows(make_report(3))
    assert [row["user"] for row in rows] == ["user-0000", "user-0001", "user-0002"]
    losses = {"base", "shared", "personal", "compressed"}
    assert set(rows[0]) == {"user", "examples", "over shared", "gain kept", "served", "adapter"} | losses


def test_users_without_a_gain_or_without_losses_are_told_apart() -> None:
    inputs = make_inputs(3)
    made = make_report(3, losses=inputs.losses[:2])
    made["users"][1].update(loss_personal=9.0, gain_kept=0.0)
    rows = markdown_rows(made)
    assert [row["gain kept"] for row in rows[1:]] == ["no gain", "–"]


def test_how_many_are_served_what_is_counted() -> None:
    losses = make_losses(["a", "b", "c", "d"])
    losses[1], losses[2] = replace(losses[1], served="shared"), replace(losses[2], served="base")
    made = make_report(users=["a", "b", "c", "d"], losses=losses)
    assert "served: 2 personal, 1 shared, 1 base" in summary.text(made).splitlines()
    made["users"][0]["served"] = "current"  # took no part in this federation
    assert wording.served(made) == "1 personal, 1 shared, 1 base, 1 with the adapter they have"


def test_the_base_model_is_no_adapter_to_ask_for() -> None:
    made = make_report(users=["a", "b"])
    made["users"][0].update(served="base", adapter_id="")
    made["serving"].update(completions={}, asked_as={"b": "b"})
    assert markdown_rows(made)[0]["adapter"] == "no adapter: the base model"
    assert '"adapter_id": "b"' in wording.curl(made)


@pytest.mark.parametrize(
    ("gain", "told"),
    [
        ((0.04, 0.01, 0.07), "Personal adapters beat one shared adapter here: +0.040"),
        ((0.04, -0.01, 0.07), "Personal adapters are not shown to beat one shared adapter here: +0.040"),
        ((0.04, None, None), "Personal adapters are not shown to beat one shared adapter here: +0.040"),
        ((-0.01, -0.03, 0.01), "Personal adapters do not beat one shared adapter here: -0.010 nats"),
        ((0.0, 0.0, 0.0), "Personal adapters do not beat one shared adapter here: +0.000 nats"),
    ],
)
def test_what_personal_training_is_worth_is_said_plainly(gain: tuple[Any, ...], told: str) -> None:
    made = make_report(3)
    made["gains"]["personal_over_shared"] |= dict(zip(("mean", "low", "high"), gain, strict=True))
    (line,) = [line for line in summary.text(made).splitlines() if line.startswith("Personal")]
    assert line.startswith(told) and "better for 3 of 3 users; the worst is user-000" in line
    assert (" interval " in line) is (gain[1] is not None)


def test_losses_of_an_emulator_are_told_as_such() -> None:
    made = make_report(3)
    assert wording.measured_on(made) == "the full model"
    made["users"][1]["measured_on"] = "emulator at the client"
    assert wording.measured_on(made) == "the full model (2 users), the emulator at the client (1 users)"


def test_how_the_shared_rounds_ended_is_told() -> None:
    federation = make_report(1)["federation"]
    assert wording.patience(federation).startswith(
        "patience ended the shared rounds after 2 of at most 3: 2 in"
    )
    assert (
        wording.patience(federation | {"max_shared_rounds": 2}) == "2 shared rounds, as many as are allowed"
    )


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (999_499, "999 kB"), (999_500, "1 MB")]
    + [(12.3e9, "12.3 GB"), (1.5e12, "1.5e+03 GB")],
)
def test_sizes_read_well(count: float, told: str) -> None:
    assert wording.size(count) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (171, "2 min 51 s")]
    + [(7290, "2 h 1 min")],
)
def test_durations_read_well(seconds: float, told: str) -> None:
    assert wording.duration(seconds) == told
