from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu.compress.codec import basis, streams
from soppu.compress.codec.basis import Basis
from soppu.compress.numbers.quantise import FLOATS, QUANTISERS
from soppu.errors import BundleError

WIDTHS = (*QUANTISERS, *FLOATS)


def made(width: int, k: int, d: int, seed: int = 0) -> Basis:
    generator = torch.Generator().manual_seed(seed)
    return Basis.make(torch.randn(d, k, generator=generator), width)


def shape(one: Basis) -> tuple[int, int, int]:
    return one.width, one.k, one.rows.shape[1]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=7)
)
def test_decode_inverts_encode(sizes):
    bases = [made(width, min(k, d), d, seed) for seed, (width, k, d) in enumerate(sizes)]
    data = basis.encode(bases)
    again = basis.decode(data, [shape(one) for one in bases], source="x")
    for one, other in zip(bases, again, strict=True):
        assert one.width == other.width and torch.equal(one.rows, other.rows)
    assert basis.encode(again) == data


@pytest.mark.parametrize("width", WIDTHS)
def test_columns_have_length_one_and_point_where_they_did(width):
    columns = torch.linalg.qr(torch.randn(200, 5, generator=torch.Generator().manual_seed(1)))[0]
    matrix = Basis.make(columns, width).matrix()
    assert matrix is not None and matrix.dtype == torch.float32 and matrix.is_contiguous()
    torch.testing.assert_close(matrix.norm(dim=0), torch.ones(5))
    cosines = (matrix * columns).sum(0)
    lost = QUANTISERS[width].distortion if width in QUANTISERS else 2.0**-20
    assert (1 - cosines.square() < 1.3 * lost).all()


def test_a_basis_without_vectors_has_no_matrix_and_no_bytes():
    empty = made(5, 0, 7)
    assert (empty.width, empty.k, empty.matrix()) == (0, 0, None)
    assert basis.encode([empty]) == streams.join([b""] * 8)
    (again,) = basis.decode(basis.encode([empty]), [(0, 0, 7)], source="x")
    assert again.rows.shape == (0, 7)


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 3, 6), (16, 2, 5)],
        [(4, 2, 5), (16, 2, 5)],
        [(4, 2, 6)],
        [(4, 2, 6), (32, 2, 5)],
        [(4, 2, 6), (16, 2, 6)],
        [(4, 1 << 24, 1 << 24), (16, 2, 5)],
        [(4, 2, 6), (16, 1 << 24, 1 << 24)],
    ],
)
def test_other_sizes_than_announced_are_refused(shapes):
    data = basis.encode([made(4, 2, 6), made(16, 2, 5)])
    with pytest.raises(BundleError, match=r"^x: "):
        basis.decode(data, shapes, source="x")


def test_nan_in_a_basis_is_refused():
    data = basis.encode([made(32, 1, 2)])
    with pytest.raises(BundleError, match="NaN"):
        basis.decode(data[:-4] + b"\xff\xff\xff\x7f", [(32, 1, 2)], source="x")
    with pytest.raises(BundleError, match="NaN"):
        basis.encode([Basis(32, torch.tensor([[float("nan"), 1.0]]))])


@given(st.binary(max_size=120))
def test_any_bytes_give_bases_or_an_error(data):
    shapes = [(2, 1, 3), (0, 0, 4), (16, 1, 2)]
    try:
        found = basis.decode(data, shapes, source="x")
    except BundleError:
        return
    assert [shape(one) for one in found] == shapes


@pytest.mark.parametrize("width", WIDTHS)
def test_a_new_basis_lies_in_memory_as_one_that_was_read(width):
    one = made(width, 3, 8)  # or the two would differ in the last bit of every product
    (again,) = basis.decode(basis.encode([one]), [shape(one)], source="x")
    assert one.rows.is_contiguous() and one.rows.stride() == again.rows.stride()
