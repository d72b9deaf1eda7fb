"""Users who join at a server itself, from outside it: the basis is fetched, a core is sent, and a registry
asks who has come. The server's side: `soppu.serve.api.joins`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from pydantic import ValidationError

from soppu.cores import basis_file
from soppu.cores import folder as core_folder
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter
from soppu.errors import TargetError
from soppu.serve.api.answers import KeptJoin
from soppu.serve.api.joins import CONTENTS, packed
from soppu.serve.api.uploads import unpack
from soppu.targets.http import HttpTarget, body

_MOST_BYTES = 1 << 30  # of a core that a server hands over


@dataclass(frozen=True, eq=False)
class LiveBasis:
    """A basis of the bundle that is live at a server."""

    basis: CoreBasis
    bundle_id: str
    clusters: int  # how many bases the bundle has


def live_basis(target: HttpTarget, *, cluster: int = 0) -> LiveBasis:
    """Fetch a basis, and hold it against its id. O(basis).

    Raises:
        TargetError: no bundle is active there, or what came is not the basis that was named.
        AdapterError: what came is no basis.
    """
    answer = target.admin("GET", f"basis?cluster={cluster}")
    named = answer.headers.get("x-basis-id", "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basis.safetensors"
        path.write_bytes(answer.content)
        basis = basis_file.read(path)
    if basis.id != named:
        raise TargetError(f"{target.url}: sent basis {basis.id}, and named {named!r}")
    return LiveBasis(basis, answer.headers["x-bundle-id"], int(answer.headers["x-clusters"]))


def send(
    target: HttpTarget, user: str, folder: Path, *, replace: bool = False, metrics: dict[str, float]
) -> KeptJoin:
    """Have a server add a user by the core in a folder, and serve them; what it says of it.

    Raises:
        TargetError: the server refused; the message says why.
    """
    query = urlencode({"user": user, "replace": str(replace).lower()})
    told = body(target.admin("POST", f"join?{query}", data=packed(folder, metrics=metrics)))
    return _join(target, {"number": 0} | told)


def kept(target: HttpTarget) -> list[KeptJoin]:
    """Who joined at the server and is in no registry yet, in order; nobody where it takes no joins."""
    if not target.TAKES_JOINS:
        return []
    return [_join(target, one) for one in body(target.admin("GET", "joined")).get("joined", ())]


def core_of(target: HttpTarget, join: KeptJoin) -> CoreAdapter:
    """The core of a join, held against its id. TargetError: it is another; AdapterError: it is none."""
    with tempfile.TemporaryDirectory() as temporary:
        archive, folder = Path(temporary) / "core.tar", Path(temporary) / "core"
        archive.write_bytes(target.admin("GET", f"joined/{join.number}").content)
        unpack(archive, folder, CONTENTS, limit=_MOST_BYTES)
        core = core_folder.read(folder)
    if core.id != join.core_id:
        raise TargetError(f"{target.url}: sent core {core.id} of {join.user!r}, and named {join.core_id}")
    return core


def forget(target: HttpTarget, join: KeptJoin) -> None:
    """Tell the server that a registry has a join. TargetError."""
    target.admin("DELETE", f"joined/{join.number}")


def _join(target: HttpTarget, told: dict[str, object]) -> KeptJoin:
    try:
        return KeptJoin.model_validate(told)
    except ValidationError as error:
        fault = error.errors()[0]
        raise TargetError(f"{target.url}: told of a join, {fault['loc'][0]}: {fault['msg']}") from None
