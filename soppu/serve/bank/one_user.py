"""OneUser: what one user of a bundle changes, in the two forms that are served: cores, and a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.bundle.shelf import Shelf, few
from soppu.serve.bank.from_bundle import Reading, ranks
from soppu.serve.layers.records import Records, pack


@dataclass(frozen=True, eq=False)
class OneUser:
    """A user's numbers: at each module a core in the bases of `cluster`, or some of the record, or none."""

    cluster: int
    cores: Mapping[str, Tensor]  # module -> (k_out, k_in) float32
    record: Records  # of this one user


def read(shelf: Shelf, place: int, how: Reading) -> OneUser:
    """The numbers of the user at `place`. As `from_bundle.read` for all users, with full cores alone.

    Raises:
        BundleError: the user's page is damaged; the message names both.
    """
    cluster, cores, apart = shelf.cluster(place), dict[str, Tensor](), []
    none = torch.zeros(0, dtype=torch.int64)
    for (name, clusters), part in zip(shelf.bases.items(), shelf.components(place), strict=True):
        k_out, k_in = clusters[cluster][0].k, clusters[cluster][1].k
        thin = how.thin and few(len(part), k_out=k_out, k_in=k_in)
        if not len(part) or thin or bool(part.own.any()):
            apart.append(part)
            continue
        left = part.left.coordinates(k_out) * part.gain[:, None]
        cores[name] = left.mT @ part.right.coordinates(k_in)
        apart.append(part.select(none))
    record = pack(apart, users=1, cuts=how.cut(shelf.shapes), ranks=ranks(shelf.bases))
    return OneUser(cluster, cores, record)
