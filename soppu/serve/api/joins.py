"""Routes for users who join at the server itself: the basis to train in, the core that comes back, and a
registry that takes over who has come. Part of the admin routes.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from soppu.cores import basis_file
from soppu.cores.folder import CONFIG_FILE, WEIGHTS_FILE
from soppu.errors import RequestError
from soppu.serve.api.changes import changed
from soppu.serve.api.requests import parse_json
from soppu.serve.api.uploads import Contents, unpack, uploaded
from soppu.serve.bank.newcomers import Asked, Newcomers, Record
from soppu.serve.bank.served import Served

METRICS_FILE = "metrics.json"
CONTENTS = Contents((WEIGHTS_FILE, CONFIG_FILE, METRICS_FILE), (WEIGHTS_FILE, CONFIG_FILE))
_MOST_METRICS, _METRIC = 32, re.compile(r"[\w.-]{1,64}")
_BYTES = "application/octet-stream"


class JoinApi:
    """Handlers of one application; `api.admin` guards them."""

    def __init__(self, served: Callable[[], Served], *, probe: Callable[[str], None] | None = None) -> None:
        self._served = served
        self._newcomers = Newcomers(served, probe=probe)

    async def basis(self, request: Request) -> Response:
        """The basis of the active bundle as a file, of one `cluster` of it; headers say which."""
        active, bases = await changed(self._newcomers.bases)
        asked = request.query_params.get("cluster", "0")
        if not asked.isdecimal() or not asked.isascii() or int(asked[:9]) >= len(bases):
            raise _invalid(f"`cluster` {asked[:80]!r}, allowed: 0 to {len(bases) - 1}")
        basis = bases[int(asked)]
        headers = {"x-bundle-id": active, "x-basis-id": basis.id, "x-clusters": str(len(bases))}
        return Response(await run_in_threadpool(basis_file.encode, basis), media_type=_BYTES, headers=headers)

    async def join(self, request: Request) -> Response:
        """Add a `user` to the active bundle by their core, and serve it; the body is a tar of its folder."""
        user, replace = request.query_params.get("user", ""), request.query_params.get("replace", "false")
        if replace not in ("true", "false"):
            raise _invalid(f"`replace` {replace[:80]!r}, allowed: true, false")
        limit = await changed(self._newcomers.most_bytes)
        async with uploaded(request, self._served().incoming, limit=limit) as (path, _):
            folder = path.with_name("core")
            await changed(unpack, path, folder, CONTENTS, limit=limit)
            asked = Asked(user, folder, replace == "true", _metrics(folder / METRICS_FILE))
            record, new = await changed(self._newcomers.take, asked)
        return JSONResponse(_told(record) | {"new": new}, status_code=201 if new else 200)

    async def joined(self, _: Request) -> Response:
        """Everybody who joined here and is in no registry yet, in order."""
        records = await changed(self._newcomers.records)
        return JSONResponse({"joined": [{"number": n} | _told(one) for n, one in records.items()]})

    async def core(self, request: Request) -> Response:
        """The core of a join as it came: an uncompressed tar of its folder."""
        folder = await changed(self._newcomers.folder, _number(request))
        return Response(await run_in_threadpool(packed, folder), media_type=_BYTES)

    async def forget(self, request: Request) -> Response:
        """Let go of a join that a registry has taken over. The user goes on being served."""
        number = _number(request)
        await changed(self._newcomers.forget, number)
        return JSONResponse({"deleted": str(number)})


def packed(folder: Path, *, metrics: dict[str, float] | None = None) -> bytes:
    """A core's folder as the tar that `POST /soppu/v1/join` takes, `metrics` in it where there are some."""
    made = BytesIO()
    parts = {name: (folder / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)}
    if metrics:
        parts[METRICS_FILE] = json.dumps(metrics).encode()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return made.getvalue()


def _metrics(path: Path) -> dict[str, float]:
    """What the client has measured; {} where it says nothing. RequestError 422 for anything but numbers."""
    if not path.exists():
        return {}
    values = parse_json(path.read_bytes())
    for name, value in values.items():
        number = type(value) in (int, float) and math.isfinite(value)
        if not number or not _METRIC.fullmatch(name) or len(values) > _MOST_METRICS:
            raise _invalid(
                f"{METRICS_FILE}: {name[:80]!r} = {value!r:.80}, allowed: at most {_MOST_METRICS} finite"
                " numbers by names of letters, digits, . _ -"
            )
    return {name: float(value) for name, value in values.items()}


def _told(record: Record) -> dict[str, object]:
    return record.model_dump(exclude={"format"})


def _number(request: Request) -> int:
    number: str = request.path_params["number"]
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise _invalid(f"a join's number is 1 to 9 digits. Given: {number[:80]!r}")
    return int(number)


def _invalid(message: str) -> RequestError:
    return RequestError(message, status=422, error_type="validation")
