"""Files of format 2 stay readable: those that earlier code wrote are read to the same numbers."""

from __future__ import annotations

import pytest
import torch

from soppu.compress import Bundle
from soppu.config import METHODS
from soppu.errors import BundleError
from tests.soppu.compress import stored
from tests.soppu.compress.mutate import File

every_kind = pytest.mark.parametrize("kind", stored.SAMPLES)


def test_every_method_has_a_file():
    assert {stored.bundle(kind).report.method for kind in stored.SAMPLES} == set(METHODS)


@every_kind
def test_every_delta_is_the_one_that_was_written(kind):
    sample, bundle = stored.SAMPLES[kind], stored.bundle(kind)
    assert sorted(bundle.users) == sorted(sample["deltas"])
    for user, modules in sample["deltas"].items():
        again = bundle.reconstruct(user)
        assert again.pairs.keys() == modules.keys()
        for name, delta in modules.items():
            expected = torch.tensor(delta, dtype=torch.float64)
            found = again.pairs[name].B.double() @ again.pairs[name].A.double()
            assert float((found - expected).norm()) <= 1e-6 * float(expected.norm()), name


@every_kind
def test_the_report_is_kept(kind):
    bundle = stored.bundle(kind)
    assert bundle.report.relative_error == pytest.approx(stored.SAMPLES[kind]["relative_error"])
    assert list(bundle.report.relative_error) == list(bundle.users)


@every_kind
def test_what_was_read_is_written_as_the_same_parts(kind):
    before = File.open(stored.data(kind)).tensors
    after = File.open(stored.bundle(kind).to_bytes()).tensors
    assert after == before
    assert Bundle.from_bytes(stored.bundle(kind).to_bytes()).users == stored.bundle(kind).users


def test_a_file_of_format_1_is_refused_by_name():
    file = File.open(stored.data("joint"))
    file.meta["format"] = 1
    with pytest.raises(BundleError, match=r"^old\.soppu: format version 1, .* reads 2; compress"):
        Bundle.from_bytes(file.close(), source="old.soppu")
