"""Settings of the basis that users' cores are told in: when it no longer fits, and what is done then."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from soppu.settings import Count, Natural, Real, settings


@settings("basis")
class BasisConfig:
    """When the basis in force no longer fits, by users who train freely beside it, and what follows."""

    probe_users: Natural = 4
    max_error: Annotated[Real, Field(ge=0.0, le=1.0)] = 1.0
    min_gain_kept: Annotated[Real, Field(ge=-10.0, le=1.0)] = 0.9
    max_short_users: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.25
    refit: Literal["report", "grow"] = "report"
    min_probes: Count = 2
    grow_by: Count = 8
    max_rank: Count = 128
