from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from soppu.compress import joint
from soppu.compress.metrics import Certificate, CompressionReport, relative_errors, squared_errors
from soppu.compress.shared import SharedModule


def stored(outs: list[Tensor], ins: list[Tensor], *, rank: int, dtype: torch.dtype) -> SharedModule:
    fit = joint.fit(outs, ins, rank=rank)
    p, q = joint.split_cores(fit, [b.shape[1] for b in outs])
    return SharedModule(fit.U, fit.V, p, q, fit.norm).rounded(dtype)


def dense_errors(outs: list[Tensor], ins: list[Tensor], module: SharedModule) -> list[float]:
    whole = [b.double() @ a.double() for b, a in zip(outs, ins, strict=True)]
    u, v, cores = module.U.double(), module.V.double(), module.P.double()
    cores = cores if module.Q is None else cores @ module.Q.double()
    return [
        float((d - norm * u @ core @ v.T).norm() / d.norm())
        for d, core, norm in zip(whole, cores, module.norm.double(), strict=True)
    ]


def residual_error(b: Tensor, a: Tensor, left: Tensor, right: Tensor) -> float:
    """|| B A - L R ||_F as a product of two triangular factors, an independent way to the same number."""
    _, r_out = torch.linalg.qr(torch.cat([b, -left], 1))
    _, r_in = torch.linalg.qr(torch.cat([a, right], 0).mT)
    return float((r_out @ r_in.mT).norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [2, 5, 8, 11])
def test_errors_are_those_of_the_stored_tensors(factors, rank, dtype):
    outs, ins = factors((3, 2, 3, 3), 25, 19)
    module = stored(outs, ins, rank=rank, dtype=dtype)
    norm = torch.stack([(b @ a).norm() for b, a in zip(outs, ins, strict=True)])
    found = relative_errors(squared_errors(outs, ins, module), norm).tolist()
    assert found == pytest.approx(dense_errors(outs, ins, module), rel=1e-9, abs=1e-13)


def test_coarser_storage_shows_in_the_error(factors):
    outs, ins = factors((3, 2, 3), 25, 19)
    errors = {
        dtype: float(squared_errors(outs, ins, stored(outs, ins, rank=8, dtype=dtype)).max().sqrt())
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert errors[torch.bfloat16] > 2 * errors[torch.float16] > 200 * errors[torch.float32] > 0


def test_an_exact_reconstruction_reports_round_off_not_its_root(factors):
    outs, ins = factors((3, 3, 3), 40, 30)
    fit = joint.fit(outs, ins, rank=9)
    p, q = joint.split_cores(fit, [3, 3, 3])
    error = squared_errors(outs, ins, SharedModule(fit.U, fit.V, p, q, fit.norm)).sqrt() / fit.norm
    assert float(error.max()) < 1e-13


def test_small_errors_agree_with_the_triangular_residual(factors):
    outs, ins = factors((3, 3), 30, 20)
    fit = joint.fit(outs, ins, rank=6)
    p, q = joint.split_cores(fit, [3, 3])
    for size in (1e-3, 1e-7, 1e-11):
        module = SharedModule(fit.U, fit.V, p * (1 + size), q, fit.norm)
        found = squared_errors(outs, ins, module).sqrt()
        for n in range(2):
            left = (
                module.U @ (module.P[n] if module.Q is None else module.P[n] @ module.Q[n]) * module.norm[n]
            )
            expected = residual_error(outs[n], ins[n], left, module.V.mT)
            assert float(found[n]) == pytest.approx(expected, rel=1e-2)
            assert float(found[n]) == pytest.approx(size * float(fit.norm[n]), rel=1e-2)


def test_swapped_cores_raise_the_error(factors):
    outs, ins = factors((3, 3, 3), 25, 19)
    module = stored(outs, ins, rank=8, dtype=torch.float32)
    right = squared_errors(outs, ins, module)
    assert module.Q is not None
    swapped = SharedModule(module.U, module.V, module.P.flip(0), module.Q.flip(0), module.norm)
    wrong = squared_errors(outs, ins, swapped)
    assert (wrong[[0, 2]] > 100 * right[[0, 2]]).all() and wrong[1] == right[1]


def test_a_user_without_the_module_and_a_zero_adapter_have_error_zero(factors):
    outs, ins = factors((3, 3), 25, 19)
    outs, ins = [*outs, torch.zeros(25, 2), outs[0][:, :0]], [*ins, torch.ones(2, 19), ins[0][:0]]
    module = stored(outs, ins, rank=4, dtype=torch.float16)
    squared = squared_errors(outs, ins, module)
    assert squared[2:].tolist() == [0, 0]
    assert relative_errors(squared, module.norm.double())[2:].tolist() == [0, 0]


def test_many_wide_cores_are_compared_in_chunks(factors, monkeypatch):
    outs, ins = factors((3,) * 5, 25, 19)
    module = stored(outs, ins, rank=8, dtype=torch.float32)
    whole = squared_errors(outs, ins, module)
    monkeypatch.setattr("soppu.compress.metrics._CHUNK_NUMBERS", 2 * 64)
    torch.testing.assert_close(squared_errors(outs, ins, module), whole)


def report() -> CompressionReport:
    return CompressionReport(
        method="joint",
        k=4,
        k_used={"q": 4, "v": 2},
        seed=3,
        seconds=1.5,
        device="cpu",
        dtype="float16",
        steps={"q": 2, "v": 0},
        relative_error={"a": 0.25, "b": 0.75},
        module_error={"q": {"a": 0.25, "b": 0.75}, "v": {"a": 0.0}},
        certificates={"q": Certificate(0.5, 0.72, 0.9, 2.0), "v": Certificate(0.0, 0.0, 0.1, 2.0)},
        parameters_before=100,
        parameters_after=40,
    )


def test_report_survives_its_dictionary():
    assert CompressionReport.from_dict(report().to_dict()) == report()


def test_report_means_worst_and_overall_certificate():
    value = report().to_dict()
    assert value["relative_error_mean"] == 0.5 and value["relative_error_max"] == 0.75
    overall = report().overall
    assert overall == Certificate(0.5, 0.72, 1.0, 4.0)
    assert overall.relative_lower_bound == math.sqrt(0.5 / 4)
    assert value["overall"]["relative_achieved"] == math.sqrt(0.72 / 4)


def test_certificate_of_nothing_is_zero():
    nothing = Certificate(0.0, 0.0, 0.0, 0.0)
    assert nothing.relative_lower_bound == nothing.relative_achieved == 0


@pytest.mark.parametrize("key", ["k_used", "certificates", "parameters_after"])
def test_report_without_a_key_is_refused(key):
    value = report().to_dict()
    del value[key]
    with pytest.raises(KeyError, match=key):
        CompressionReport.from_dict(value)
