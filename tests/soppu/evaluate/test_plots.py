"""The figures: well-formed, the same bytes every time, every user shown or summed up, ids only as text."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from soppu.evaluate import plots
from tests.soppu.evaluate.example import HOSTILE, make_inputs, make_report

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

ROOT = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["losses", "over_shared", "rounds", "errors", "sizes", "stages"]


@functools.cache
def drawn(count: int) -> dict[str, str]:
    return plots.figures(make_report(count))


def texts(svg: str) -> list[str]:
    return ["".join(item.itertext()) for item in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    "count", [1, pytest.param(6, marks=pytest.mark.long), pytest.param(24, marks=pytest.mark.long), 25, 200]
)
def test_every_figure_is_drawn_for_any_number_of_users(count: int) -> None:
    assert list(drawn(count)) == NAMES
    for svg in drawn(count).values():
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
        assert len(svg) < 200_000
    assert sum(map(len, drawn(count).values())) < 300_000


def test_few_users_are_named_and_many_are_not() -> None:
    few = texts(drawn(24)["losses"])
    assert {f"user-{number:04d}" for number in range(24)} <= set(few)
    many = texts(drawn(25)["losses"])
    assert not [one for one in many if one.startswith("user-")]
    assert "users, by the gain of their personal adapter" in many


def test_axes_carry_units() -> None:
    found = {name: texts(svg) for name, svg in drawn(6).items()}
    assert found["losses"].count("nats a token") == 2
    assert "relative error (%)" in found["errors"] and found["errors"].count("layer") == 3
    assert "wall time (s)" in found["stages"] and "2 min 51 s, 2 attempts" in found["stages"]
    assert any(one.startswith("bytes on disk") for one in found["sizes"])


def test_bars_have_the_heights_of_the_losses() -> None:
    users = make_report(3)["users"]
    above, below = plots.losses(users).axes
    heights = [[bar.get_height() for bar in bars] for bars in above.containers]
    assert heights == [
        [user[f"loss_{name}"] for user in users] for name in ("base", "shared", "personal", "compressed")
    ]
    gains = [[bar.get_height() for bar in bars] for bars in below.containers]
    assert gains[2] == pytest.approx([user["loss_base"] - user["loss_compressed"] for user in users])
    assert above.get_ylim()[0] == 0  # bars that do not start at zero exaggerate


def test_without_a_shared_adapter_three_ways_are_drawn() -> None:
    users = [user | {"loss_shared": None} for user in make_report(3)["users"]]
    above, below = plots.losses(users).axes
    assert [bars.get_label() for bars in above.containers] == ["base", "personal", "compressed"]
    assert len(below.containers) == 2


def test_gains_over_the_shared_adapter_come_with_their_intervals_or_as_a_histogram() -> None:
    users = make_report(3)["users"]
    axes = plots.over_shared(users).axes[0]
    spans, dots, zero = [list(line.get_ydata()) for line in axes.lines[:3]], axes.lines[3], axes.lines[4]
    assert spans == [[user["gain_over_shared"][end] for end in ("low", "high")] for user in users]
    assert list(dots.get_ydata()) == [user["gain_over_shared"]["mean"] for user in users]
    assert list(zero.get_ydata()) == [0, 0]
    many = plots.over_shared(make_report(40)["users"]).axes[0]
    assert sum(bar.get_height() for bar in many.containers[0]) == 40


def test_losses_over_the_rounds_are_drawn_where_the_adapter_had_them() -> None:
    """What clients say of the adapter they were sent is a round behind what the server says of it."""
    federation = make_report(2)["federation"]
    axes = plots.round_losses(federation).axes[0]
    validation, public, own, end = axes.lines
    assert (list(validation.get_xdata()), list(public.get_xdata())) == ([0, 1, 2], [1, 2])
    assert list(validation.get_ydata()) == [log["shared_loss"] for log in federation["rounds_log"]]
    assert list(own.get_xdata()) == [3] and list(end.get_xdata()) == [2, 2]
    assert axes.get_title().startswith(
        "Losses over the rounds: patience ended the shared rounds after 2 of at most 3"
    )


def test_a_round_in_which_nobody_counted_has_no_loss() -> None:
    told = make_inputs(2).federation
    assert told
    empty = {**told["rounds"][1], "accepted": [], "train_loss": 0.0, "shared_loss": 0.0, "emulator_loss": 0.0}
    made = make_report(2, federation={**told, "rounds": [told["rounds"][0], empty]})
    log = made["federation"]["rounds_log"][1]
    assert log["train_loss"] is log["shared_loss"] is log["emulator_loss"] is None
    validation = plots.round_losses(made["federation"]).axes[0].lines[0]
    assert list(validation.get_xdata()) == [0]


@pytest.mark.parametrize("count", [4, 40])
def test_error_bars_are_means_with_a_dot_or_a_range(count: int) -> None:
    by_module = make_report(count)["compression"]["by_module"]
    figure = plots.errors(by_module)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == [
        "q_proj",
        "v_proj",
        "the rest",
    ]
    values = list(by_module["model.layers.27.self_attn.v_proj"].values())
    bars = [bar.get_height() for bars in figure.axes[1].containers for bar in bars if bar.get_height()]
    assert bars[1] == pytest.approx(100 * sum(values) / count)
    shown = [line.get_ydata() for line in figure.axes[1].lines]
    if count <= plots.FEW:
        assert sorted(shown[1]) == pytest.approx(sorted(100 * value for value in values))
    else:
        assert list(shown[2]) == pytest.approx([100 * min(values), 100 * max(values)])


def test_two_modules_of_one_name_in_a_layer_get_a_bar_each() -> None:
    names = ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"]
    axes = plots.errors(dict(zip(names, ({"alice": 0.1}, {"alice": 0.3}), strict=True))).axes[0]
    heights = [bar.get_height() for bars in axes.containers for bar in bars if bar.get_height()]
    assert heights == pytest.approx([10, 30])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["attn.c_proj", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("modules", "panels"),
    [
        (["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"], ["the rest"]),
        (["gpt_neox.layers.3.attention.query_key_value", "gpt_neox.layers.3.mlp.dense"], ["the rest"]),
        (["model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.q_proj"], ["q_proj", "v_proj"]),
        (["lm_head"], ["the rest"]),
        ([f"model.layers.{layer}.self_attn.q_proj" for layer in range(32)], ["q_proj"]),
        (
            [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(32) for leaf in "ovq"],
            ["q_proj", "v_proj", "the rest"],
        ),
    ],
)
def test_other_families_and_many_layers_find_their_panel(modules: list[str], panels: list[str]) -> None:
    figure = plots.errors({name: {"alice": 0.1, "bob": None} for name in modules})
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == panels
    assert plots.draw(lambda: plots.errors({name: {"alice": 0.1} for name in modules}), name="e", label="")


def test_missing_and_odd_figures_are_drawn_around() -> None:
    made = make_report(3)
    made["users"][0].update(loss_compressed=None, gain_kept=None)
    made["users"][1].update(dict.fromkeys(("loss_base", "loss_personal", "loss_compressed", "gain_kept")))
    made["compression"]["by_module"]["model.layers.26.self_attn.q_proj"]["user-0000"] = None
    made["compression"].update(bytes_before=0, bytes_after=0, parameters_before=0, parameters_after=0)
    made["stages"] = [{"name": "nothing", "seconds": 0.0, "attempts": 1}]
    found = plots.figures(made)
    assert list(found) == NAMES
    assert "user-0001" not in texts(found["losses"])
    made["stages"], made["compression"]["by_module"] = [], {}
    made["users"], made["federation"] = [made["users"][1] | {"gain_over_shared": None}], None
    assert list(plots.figures(made)) == ["sizes"]


def test_another_process_draws_the_same_bytes_and_needs_neither_pyplot_nor_torch() -> None:
    program = (
        "import hashlib, json, sys; from soppu.evaluate import plots;"
        "drawn = plots.figures(json.load(sys.stdin));"
        "print(hashlib.sha256(json.dumps(drawn).encode()).hexdigest(),"
        " *sorted({'matplotlib.pyplot', 'torch'} & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(make_report(8)),
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        told.stdout == hashlib.sha256(json.dumps(plots.figures(make_report(8))).encode()).hexdigest() + "\n"
    )


def test_nothing_of_this_moment_is_in_the_file() -> None:
    for svg in drawn(6).values():
        assert "<metadata" not in svg and "<?xml" not in svg and "<!DOCTYPE" not in svg
        assert not re.search(r"20\d\d-\d\d-\d\dT", svg)


def test_ids_are_unique_in_a_page_and_references_point_at_them() -> None:
    joined = "".join(drawn(6).values())
    for name, svg in drawn(6).items():
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids)) and all(one.startswith(f"{name}-") for one in ids)
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {(one, "") for one in ids} | {
            ("", one) for one in ids
        }
    every = re.findall(r'\bid="([^"]+)"', joined)
    assert len(every) == len(set(every))


def test_colours_follow_the_page() -> None:
    for svg in drawn(6).values():
        bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", svg)
        assert not re.findall(r"#[0-9a-f]{6}(?=[;\"])", bare)
        assert "var(--ink, " in svg


def test_user_ids_are_only_text() -> None:
    users = [HOSTILE, "$\\frac{1$", "日本語の利用者", "a\x00b\nc", "x" * 300, ""]
    report = make_report(users=[*users, "other"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plots.figures(report)["losses"]
    tags = {item.tag for item in ElementTree.fromstring(svg).iter()}
    assert tags <= {
        f"{SVG}{tag}" for tag in ("svg", "defs", "style", "g", "path", "use", "text", "clipPath", "rect")
    }
    assert max(map(len, texts(svg))) < 60


def test_colours_stay_apart_for_colour_blind_eyes_and_in_grey() -> None:
    def channels(colour: str) -> tuple[float, ...]:
        return matplotlib.colors.to_rgb(colour)

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    # Machado, Oliveira and Fernandes 2009, severity 1: protanopia, deuteranopia, tritanopia.
    simulations: list[list[list[float]]] = [
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    ]
    shown = (plots.BASE, plots.SHARED, plots.PERSONAL, plots.COMPRESSED)
    for matrix in simulations:
        seen = [
            [sum(weight * value for weight, value in zip(row, channels(one), strict=True)) for row in matrix]
            for one in shown
        ]
        for first, second in itertools.combinations(range(4), 2):
            assert sum((a - b) ** 2 for a, b in zip(seen[first], seen[second], strict=True)) > 0.05
    brightness = sorted(map(luminance, shown))
    assert all(b / a > 1.3 for a, b in zip(brightness, brightness[1:], strict=False))


def test_drawing_leaves_no_trace() -> None:
    def snapshot() -> dict[str, Any]:
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    before = snapshot()
    plots.figures(make_report(2))
    assert snapshot() == before
