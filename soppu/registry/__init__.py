"""Immutable adapters and bundles, and the catalogue that knows which are current."""

from soppu.registry.catalogue import check_user_id
from soppu.registry.ledger import BundleRow, ForgetReport, HistoryRow, Publication, UserRow
from soppu.registry.registry import Registry

__all__ = [
    "BundleRow",
    "ForgetReport",
    "HistoryRow",
    "Publication",
    "Registry",
    "UserRow",
    "check_user_id",
]
