"""Which base model an adapter, a bundle or a file of moments is for, and whether two of them are one.

The one rule, for whoever compares: if both have a hash, the hashes decide. Else the names do, once what says
where a copy lies is taken off. Else nothing is known, and that is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from soppu.errors import AdapterError, SoppuError

CURE = (
    "if they are one model, `--base MODEL` of `soppu compress` and `soppu project` writes its name and hash;"
    " or set base_model_name_or_path in adapter_config.json"
)
_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/[^/]+$")  # of the hub's cache
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What a folder is called when it could hold any model: such names agree only as whole paths.
_ANY_MODEL = re.compile(
    r"|models?|base(_model)?|final|merged|out(put)?s?|latest|best|snapshot|hf|checkpoint(-\d+)?|v?[\d.]+|[0-9a-f]{40}"
)


@dataclass(frozen=True)
class Base:
    """A base model as somebody knows it."""

    name: str = ""  # hub id, folder or alias, "" if unknown
    hash: str = ""  # of its files (`soppu.models.BaseModel.hash`), "" if unknown

    def __str__(self) -> str:
        return f"{self.hash[:12] or 'unknown'} ({self.name or 'no name'})"

    def joined(self, other: Base) -> Base:
        """What both know together, where they are the same model."""
        return Base(self.name or other.name, self.hash or other.hash)


def same(a: Base, b: Base) -> bool:
    """Whether the two are one base model; False where nothing can tell, unless both know nothing at all."""
    if a.hash and b.hash:
        return a.hash == b.hash
    return a == b or bool(a.name and b.name) and _same_name(a.name, b.name)


def check(
    held: Base, expected: Base, *, who: str, whose: str, error: type[SoppuError] = AdapterError
) -> None:
    """Refuse what was made for another base model, or for one that cannot be told apart from another.

    Args:
        who: what holds `held`, for the message.
        whose: who expects `expected`, with a verb: "this server has".

    Raises:
        error: they are not the same; the message says both, and what a person can do where a hash is missing.
    """
    if not same(held, expected):
        cure = "" if held.hash and expected.hash else f"; {CURE}"
        raise error(f"{who}: made for base model {held}, {whose} {expected}{cure}")


def _same_name(a: str, b: str) -> bool:
    """A hub id and a folder of its last part are one; two hub ids are only if they agree as a whole."""
    (one, owner), (two, other) = _parts(a), _parts(b)
    if one != two:
        return False
    if _ANY_MODEL.fullmatch(one):
        return owner == other and _plain(a) == _plain(b)
    return not owner or not other or owner == other


def _parts(name: str) -> tuple[str, str]:
    """Last part of a name, and who owns it on the hub, "" where the name does not say."""
    plain = _plain(name)
    owner, _, leaf = plain.rpartition("/")
    return leaf, owner if _HUB_ID.fullmatch(plain) else ""


def _plain(name: str) -> str:
    """In lower case, without trailing slashes; a snapshot in the hub's cache is the hub id it is of."""
    path = re.sub(r"/(\.?/)+", "/", name.strip().replace("\\", "/").casefold()).rstrip("/")
    found = _SNAPSHOT.search(path)
    return found[1].replace("--", "/", 1) if found else path
