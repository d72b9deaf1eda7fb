"""report.json: what is in it, that it is whole, that it says which field is not."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from server.strategy import Received, RoundLog
from soppu.compress.bundle.report import CompressionReport
from soppu.errors import ReportError, SoppuError, StorageError
from soppu.evaluate import gains, report, schema
from soppu.evaluate.losses import UserLosses
from soppu.evaluate.report import ReportInputs, build
from tests.soppu.evaluate.example import HOSTILE, make_inputs, make_report, make_serving, make_stage

pytestmark = pytest.mark.usefixtures("drawn_once")

ROOT = Path(__file__).parents[3]


def test_every_figure_arrives_where_it_belongs() -> None:
    inputs = make_inputs(3)
    made = build(inputs)
    first, losses = made["users"][0], inputs.losses[0]
    over = {
        name: gains.by_user(inputs.losses, "compressed", over=name, seed=0) for name in ("base", "shared")
    }
    assert first == {
        "id": "user-0000",
        "examples": 16,
        "measured_on": "full model",
        "loss_base": losses.base,
        "loss_shared": losses.shared,
        "loss_personal": losses.personal,
        "loss_compressed": losses.compressed,
        "served": "personal",
        "compression_lost": False,
        "gain_kept": losses.gain_kept,
        "gain_over_base": asdict(over["base"]["user-0000"]),
        "gain_over_shared": asdict(over["shared"]["user-0000"]),
        "relative_error": inputs.compression.relative_error["user-0000"],
        "adapter_id": "a-0000000000000000",
    }
    assert made["plan"] == {"kept": [0, 1, 3, 5], "adapter_layers": [6, 7], "hash": "c" * 64}
    assert made["align"]["before"]["l2"] == 0.31
    federation = made["federation"]
    assert federation["rounds"] == len(federation["rounds_log"]) == 3
    assert federation["bytes_up"] == 3 * 3 * 310_000 and federation["bytes_down"] == 3 * 3 * 620_000
    assert federation["seconds"] == pytest.approx(61.5)
    assert federation["refused"] == {"late": "no answer in time"}
    assert federation["forms"] == {
        "float32": {"users": 1, "bytes_up": 310_000},
        "ternary": {"users": 2, "bytes_up": 18_000},
    }
    assert federation["rounds_log"][2]["received"]["user-0000"]["loss_ternary"] == 2.305
    compression = made["compression"]
    assert compression["ratio"] == pytest.approx(3_690_000 / 1_399_000)
    assert compression["ratio_16_bit"] == pytest.approx(3 * 300_000 * 2 / 1_399_000)
    assert (compression["k"], compression["target"], compression["dtype"]) == (
        64,
        "16x",
        "integers of 2 to 8 bits, entropy coded",
    )
    assert compression["k_used"] == inputs.compression.k_used
    assert (compression["clusters"], compression["whitened"]) == (1, False)
    errors = inputs.compression.relative_error.values()
    assert compression["relative_error"]["rms"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / 3))
    assert compression["lower_bound"] == pytest.approx(math.sqrt(0.02))
    assert compression["certificate"]["relative_achieved"] == pytest.approx(0.15)
    assert compression["certificate"]["total"] == pytest.approx(16 * 3)
    assert compression["relative_error"]["max"] == max(inputs.compression.relative_error.values())
    assert compression["by_module"] == inputs.compression.module_error
    assert made["gate"] == inputs.verdict.to_dict()
    assert made["serving"]["canaries_ok"] is True
    assert made["stages"][0] == {"name": "federate", "seconds": 171.0, "attempts": 2}
    assert made["config_digest"] == inputs.config.digest()


def test_building_is_pure() -> None:
    inputs = make_inputs(3)
    before = copy.deepcopy(asdict(inputs))
    assert build(inputs) == build(inputs)
    assert asdict(inputs) == before


def test_the_clock_and_the_machine_fill_what_is_left_out() -> None:
    told = {
        name: value for name, value in vars(make_inputs(1)).items() if name not in ("created", "hardware")
    }
    made = build(ReportInputs(**told))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["created"])
    assert "cores" in made["hardware"]


def test_a_recompression_has_no_federation() -> None:
    made = make_report(3, federation=None, serving=None)
    assert made["plan"] is made["align"] is made["federation"] is made["serving"] is None


def test_a_round_log_of_the_server_fits_as_it_is() -> None:
    told = dict(make_inputs(2).federation or {})
    came = {"user-0000": Received("ternary", 5, loss_float32=2.0, loss_ternary=2.5)}
    log = RoundLog(1, "personal", bytes_up=5, accepted=["user-0000"], received=came)
    log.refused["user-0001"] = "late"
    made = make_report(2, federation={**told, "rounds": [asdict(log)]})
    assert made["federation"]["rounds"] == 1 and made["federation"]["bytes_up"] == 5
    assert made["federation"]["forms"] == {"ternary": {"users": 1, "bytes_up": 5}}


@pytest.mark.parametrize("field", ["plan", "align", "rounds", "refused"])
def test_a_result_that_lacks_something_is_refused_by_name(field: str) -> None:
    told = dict(make_inputs(2).federation or {})
    del told[field]
    with pytest.raises(ReportError, match=field):
        make_report(2, federation=told)


def test_a_round_that_lacks_something_is_refused_by_name() -> None:
    told = copy.deepcopy(dict(make_inputs(2).federation or {}))
    del told["rounds"][1]["bytes_up"]
    with pytest.raises(ReportError, match=re.escape("federation.rounds_log[1].bytes_up: missing")):
        make_report(2, federation=told)


def test_a_round_that_does_not_say_how_adapters_came_is_refused_by_name() -> None:
    told = copy.deepcopy(dict(make_inputs(2).federation or {}))
    del told["rounds"][2]["received"]
    with pytest.raises(ReportError, match=re.escape("federation.rounds_log[2].received: missing")):
        make_report(2, federation=told)


def test_numbers_that_are_not_finite_become_null() -> None:
    inputs = make_inputs(2)
    losses = [inputs.losses[0], UserLosses("user-0001", 16, 3.0, 2.5, math.nan)]
    compression = replace(inputs.compression, relative_error={"user-0000": 0.1, "user-0001": math.inf})
    made = build(replace(inputs, losses=losses, compression=compression))
    broken = made["users"][1]
    assert broken["loss_compressed"] is broken["gain_kept"] is broken["relative_error"] is None
    assert broken["loss_personal"] == 2.5
    assert made["compression"]["relative_error"] == {"rms": None, "mean": None, "max": None}
    json.dumps(made, allow_nan=False)


def test_a_user_of_the_bundle_who_was_not_measured_is_listed() -> None:
    inputs = make_inputs(3)
    made = build(replace(inputs, losses=inputs.losses[:2]))
    last = made["users"][2]
    assert (last["id"], last["examples"]) == ("user-0002", 0)
    assert last["loss_base"] is last["loss_compressed"] is last["gain_kept"] is None
    assert last["adapter_id"] and last["relative_error"] is not None


def test_the_report_of_a_bundle_read_from_a_file_fits_too() -> None:
    inputs = make_inputs(2)
    through_json = CompressionReport.from_dict(json.loads(json.dumps(inputs.compression.to_dict())))
    assert build(replace(inputs, compression=through_json)) == build(inputs)


def test_canaries_decide_whether_serving_is_in_order() -> None:
    assert make_report(2)["serving"]["canaries_ok"] is True
    canaries = {"user-0000": "", "user-0001": "no tokens came back"}
    bad = make_serving(["user-0000"]) | {"canaries": canaries}
    assert make_report(2, serving=bad)["serving"]["canaries_ok"] is False
    assert make_report(2, serving=bad | {"canaries": {}})["serving"]["canaries_ok"] is False
    del bad["canaries"]
    with pytest.raises(ReportError, match=re.escape("serving.canaries: missing")):
        make_report(2, serving=bad)


def test_a_publication_changes_nothing_else() -> None:
    inputs = make_inputs(2)
    before = build(replace(inputs, serving=None, stages=()))
    kept = copy.deepcopy(before)
    after = build(replace(inputs, stages=[make_stage("publish", 1.0)]))
    assert before == kept
    assert after["serving"] == build(inputs)["serving"]
    assert [stage["name"] for stage in after["stages"]] == ["publish"]
    assert {**after, "serving": None, "stages": []} == before


@pytest.mark.parametrize("user", ["plain", HOSTILE, "日本語", "\ud800"])
def test_what_is_written_is_read_back(tmp_path: Path, user: str) -> None:
    made = make_report(users=[user, "other"])
    json_path, html_path = report.write(tmp_path / "run", made)
    assert report.read(json_path) == made
    assert html_path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["report.html", "report.json"]


def test_writing_again_replaces_and_a_bad_report_writes_nothing(tmp_path: Path) -> None:
    json_path, _ = report.write(tmp_path, make_report(2))
    other = make_report(2, run="run-2")
    report.write(tmp_path, other)
    assert report.read(json_path) == other
    with pytest.raises(ReportError, match="gate"):
        report.write(tmp_path, {name: value for name, value in other.items() if name != "gate"})
    assert report.read(json_path) == other


def test_a_refused_write_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(StorageError):
        report.write(tmp_path, make_report(1))


def _paths(kind: dict[str, Any], path: str = "") -> dict[str, str]:
    """Path -> type of everything a JSON schema speaks of, in the words of docs/report.md."""
    types = kind.get("anyOf", [kind])
    (kind,) = (_resolved(item) for item in types if item.get("type") != "null")
    word = {"string": "text", "boolean": "flag", "integer": "count", "array": "list"}.get(
        kind["type"], kind["type"]
    )
    found = {path: word + "?" * (len(types) - 1)} if path else {}
    for name, part in kind.get("properties", {}).items():
        found |= _paths(part, f"{path}.{name}".lstrip("."))
    if "items" in kind:
        found |= _paths(kind["items"], f"{path}[]")
    if isinstance(kind.get("additionalProperties"), dict):
        found |= _paths(kind["additionalProperties"], f"{path}{{}}")
    return found


def _resolved(kind: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][kind["$ref"].rsplit("/", 1)[-1]] if "$ref" in kind else kind


SCHEMA = schema.Report.model_json_schema()
FIELDS = _paths(SCHEMA)


def _without(value: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """A copy without the first value the path points at, and the name of that value."""
    changed = copy.deepcopy(value)
    steps = re.findall(r"\[\]|\{\}|[^.\[\]{}]+", path)
    place, name = changed, ""
    for step in steps[:-1]:
        key: Any = 0 if step == "[]" else next(iter(place)) if step == "{}" else step
        place, name = place[key], name + (f".{key}" if str(key).isidentifier() else f"[{key!r}]")
    del place[steps[-1]]
    return changed, f"{name}.{steps[-1]}".lstrip(".")


LATER = {"basis"}  # reports from before there was such a thing are read all the same


@pytest.mark.parametrize("path", [path for path in FIELDS if not path.endswith(("[]", "{}"))])
def test_every_field_that_is_missing_is_named(tmp_path: Path, path: str) -> None:
    file = tmp_path / "report.json"
    lacking, name = _without(make_report(1), path)
    file.write_text(json.dumps(lacking))
    if path in LATER:
        assert path not in report.read(file)
        return
    with pytest.raises(SoppuError) as caught:
        report.read(file)
    assert str(caught.value) == f"{file}: {name}: missing"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("users", 0, "loss_base"), "low", "users[0].loss_base = 'low', allowed: a number"),
        (("users", 0, "examples"), -1, "users[0].examples = -1, allowed: at least 0"),
        (("users", 0, "examples"), True, "users[0].examples = True, allowed: a whole number"),
        (("users", 0), None, "users[0] = None, allowed: an object"),
        (("gate", "passed"), 1, "gate.passed = 1, allowed: true or false"),
        (("gate", "reasons"), "none", "gate.reasons = 'none', allowed: a list"),
        (("compression",), [], "compression = [], allowed: an object"),
        (("compression", "ratio"), None, "compression.ratio = None, allowed: a number"),
        (("compression", "ratio"), True, "compression.ratio = True, allowed: a number"),
        (("compression", "ratio"), math.nan, "compression.ratio = nan, allowed: a finite number"),
        (("gate", "limits", "x"), math.inf, "gate.limits.x = inf, allowed: a finite number"),
        (("gate", "mean_gain_kept"), True, "gate.mean_gain_kept = True, allowed: a number"),
        (("gate", "unmeasured"), [1], "gate.unmeasured[0] = 1, allowed: a text"),
        (("stages", 0, "attempts"), True, "stages[0].attempts = True, allowed: a whole number"),
        (("gate",), None, "gate = None, allowed: a table"),
        (("plan", "kept", 2), 1.5, "plan.kept[2] = 1.5, allowed: a whole number"),
        (
            ("serving", "canaries", "user-0000"),
            False,
            "serving.canaries['user-0000'] = False, allowed: a text",
        ),
    ],
)
def test_every_field_of_another_type_is_named(path: tuple[Any, ...], value: object, told: str) -> None:
    made = make_report(1)
    place: Any = made
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ReportError, match=re.escape(told)):
        schema.check(made, source="x")


def test_all_faults_are_told_at_once() -> None:
    made = make_report(1)
    del made["run"], made["users"][0]["id"]
    with pytest.raises(ReportError, match=r"(?s)x: run: missing.*x: users\[0\]\.id: missing"):
        schema.check(made, source="x")


def test_of_many_faults_the_first_are_told_and_the_rest_counted() -> None:
    made = make_report(30)
    for user in made["users"]:
        user["examples"] = "x" * 100
    with pytest.raises(ReportError) as caught:
        schema.check(made, source="x")
    *lines, last = str(caught.value).splitlines()
    assert len(lines) == 20 and last == "x: and 10 more"
    assert max(map(len, lines)) < 130


def test_unknown_fields_are_let_through_and_another_format_is_not() -> None:
    made = make_report(1) | {"new": 1}
    assert schema.check(made, source="x") is made
    with pytest.raises(ReportError, match="format = 2, allowed: 1"):
        schema.check(made | {"format": 2}, source="x")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(ReportError, match=r"report\.json"):
        report.read(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no such file"):
        report.read(tmp_path / "report.json")


def test_the_schema_and_the_documentation_list_the_same_fields_and_types() -> None:
    told = dict(
        re.findall(r"^\| `([^`]+)` \| (\w+\??) \|", (ROOT / "docs/report.md").read_text(), re.MULTILINE)
    )
    assert told == FIELDS


def test_the_schema_covers_everything_that_is_built() -> None:
    free = {path[:-2] for path in FIELDS if path.endswith("{}")}

    def paths(value: object, label: str) -> set[str]:
        if isinstance(value, dict):
            parts = [(f"{label}{{}}" if label in free else f"{label}.{key}", v) for key, v in value.items()]
        else:
            parts = [(f"{label}[]", item) for item in value] if isinstance(value, list) else []
        return {label}.union(*(paths(item, name.lstrip(".")) for name, item in parts))

    assert paths(make_report(2), "") - {""} == set(FIELDS) - {"gate.reasons[]", "gate.unmeasured[]"}
