"""The picture of the arms: a file of its own that is well-formed, the same points as on the page."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from soppu.evaluate.tradeoff import fronts, page, plot, schema
from tests.soppu.evaluate.tradeoff.example import arm, comparison, row

SVG = "{http://www.w3.org/2000/svg}"


def test_it_draws_what_the_page_draws_of_the_loss() -> None:
    found = schema.check(comparison(), source="x")
    picture = plot.svg(found)
    whole = page.page(found, page.users_of(found))
    for panel in fronts.panels(found)["loss"]:
        assert f'd="{panel.line}"' in picture and f'd="{panel.line}"' in whole
        for point in panel.points:
            assert f'cx="{point.x:.1f}" cy="{point.y:.1f}"' in picture
    assert picture == plot.svg(found)


def test_alone_it_is_a_whole_file_that_brings_its_colours_and_hostile_names_stay_text() -> None:
    name = "<script>alert(1)</script>&\x1b[2J"
    arms = [arm("base"), arm(name, loss=1.5)]
    found = schema.check(comparison(arms=arms, rows=[row("alice", name)]), source="x")
    root = ET.fromstring(plot.svg(found, alone=True))
    assert root.tag == f"{SVG}svg" and "--paper:" in (root.find(f"{SVG}style").text or "")  # type: ignore[union-attr]
    assert not list(root.iter(f"{SVG}script"))
    names = [one.text or "" for one in root.iter(f"{SVG}text")]
    assert sum("<script>" in one and "\x1b" not in one for one in names) == 3  # over three costs
    assert "--paper:" not in plot.svg(found)


def test_without_a_loss_it_is_of_the_first_score_and_without_any_there_is_none() -> None:
    arms = [arm(name, loss=None, intervals={}) for name in ("base", "residual@16")]
    found = schema.check(comparison(arms=arms), source="x")
    assert 'aria-label="bleu, of every arm over what it costs"' in plot.svg(found)
    nothing = dict.fromkeys(("loss", "bleu", "chrf", "exact_match", "valid"))
    bare = [one | nothing for one in arms]
    assert plot.svg(schema.check(comparison(arms=bare), source="x")) == ""
