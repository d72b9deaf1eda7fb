"""Immutable adapters and bundles, and the catalogue that knows which are current."""

from soppu.registry.bases import BasisRow
from soppu.registry.catalogue import check_user_id
from soppu.registry.ledger import Address, ForgetReport, HistoryRow, UserRow
from soppu.registry.registry import Registry

__all__ = ["Address", "BasisRow", "ForgetReport", "HistoryRow", "Registry", "UserRow", "check_user_id"]
