"""When a basis is due for a refit: limits, what is noise, and that nothing is known without a probe."""

from __future__ import annotations

import dataclasses

import pytest

from soppu.basis_settings import BasisConfig
from soppu.evaluate import html, report, summary, wording
from soppu.evaluate.refit import Probe, decide
from tests.soppu.evaluate.example import make_report

SETTINGS = BasisConfig(max_error=0.6, min_gain_kept=0.8, max_short_users=0.25)


def probe(user: str, error: float = 0.5, gain: float | None = 0.1, core: float | None = 0.1) -> Probe:
    return Probe(user, f"a-{user}", error, gain, core)


def test_without_a_probe_nothing_is_known_and_none_is_due() -> None:
    found = decide("u-1", [], SETTINGS)
    assert not found.due and found.reasons == () and found.measured == 0
    assert (found.error_mean, found.gain_kept, found.short_share) == (None, None, None)


@pytest.mark.parametrize(("error", "due"), [(0.59, False), (0.6, False), (0.61, True)])
def test_the_mean_error_has_a_limit_that_may_be_reached(error: float, due: bool) -> None:
    found = decide("u-1", [probe("a", error - 0.1), probe("b", error + 0.1)], SETTINGS)
    assert found.due is due and found.error_mean == pytest.approx(error)
    assert found.error_worst == pytest.approx(error + 0.1)
    assert all("basis.max_error" in one and "0.61" in one and "0.6" in one for one in found.reasons)


def test_users_whose_cores_keep_too_little_are_named_and_their_share_has_a_limit() -> None:
    probes = [probe("a"), probe("b"), probe("c"), probe("d", core=0.079)]
    found = decide("u-1", probes, SETTINGS)
    assert not found.due and found.short_users == ("d",) and found.short_share == 0.25
    assert found.gain_kept == pytest.approx((0.3 + 0.079) / 0.4)
    worse = decide("u-1", [*probes, probe("e", core=-0.2)], SETTINGS)
    assert worse.due and worse.short_users == ("d", "e")
    (said,) = worse.reasons
    assert "2 of 5 (d, e)" in said and "basis.max_short_users" in said and "0.25" in said
    assert decide("u-1", [probe("a", core=0.081)], SETTINGS).short_users == ()


def test_a_probe_that_gains_nothing_or_is_not_measured_says_nothing_of_cores() -> None:
    silent = [
        probe("a", gain=0.01, core=-1.0),
        probe("b", gain=-0.3, core=-1.0),
        probe("c", gain=None, core=None),
    ]
    found = decide("u-1", silent, SETTINGS)
    assert found.measured == 0 and not found.due and found.gain_kept is None and found.error_mean == 0.5


def test_the_report_its_page_and_its_summary_say_it() -> None:
    inputs = make_report()
    probes = [probe("a", 0.7), probe("b", 0.7, core=0.01)]
    told = decide("u-1", probes, dataclasses.replace(SETTINGS, max_short_users=0.5))
    made = report.schema.check(inputs | {"basis": report._plain(told.to_dict())}, source="report")
    assert made["basis"]["due"] and made["basis"]["probes"][1]["core_gain"] == 0.01
    said = "\n".join(wording.refit(made))
    assert (
        "basis u-1 is DUE FOR A REFIT: 2 probes, relative error 70.0 %" in said and "55.0 % of their" in said
    )
    assert said in summary.text(made) and "DUE FOR A REFIT" in html.page(made)
    assert "DUE FOR A REFIT" in summary.markdown_compression(made)
    nobody = inputs | {"basis": report._plain(decide("u-1", [], SETTINGS).to_dict())}
    assert "nobody trained freely" in summary.text(report.schema.check(nobody, source="report"))
    older = {name: value for name, value in inputs.items() if name != "basis"}
    assert wording.refit(report.schema.check(older, source="report")) == []
