"""Settings of the basis that users' cores are told in: when it is to be fitted anew."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from soppu.settings import Natural, Real, settings


@settings("basis")
class BasisConfig:
    """When the basis in force no longer fits: what users who train freely beside it have to show."""

    probe_users: Natural = 4
    max_error: Annotated[Real, Field(ge=0.0, le=1.0)] = 1.0
    min_gain_kept: Annotated[Real, Field(ge=-10.0, le=1.0)] = 0.9
    max_short_users: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.25
