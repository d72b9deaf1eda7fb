"""`soppu verify-target` names each fault of an adapter's folder, and reads one of two files as one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soppu.compress import Bundle
from soppu.compress.lorax_export import export
from soppu.errors import AdapterError
from soppu.targets.verify_form import RULES, check
from soppu.targets.verify_reference import Reference, read
from tests.soppu.serve import tiny
from tests.soppu.targets.lorax_double import LoraxDouble, double
from tests.soppu.targets.verified import base, bundle, failing, file, folders, ids, run, verdicts

__all__ = ["base", "bundle", "double", "file", "folders", "ids"]


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> None:
    path = folder / "adapter_model.safetensors"
    made = [change(name, tensor) for name, tensor in load_file(path).items()]
    save_file(dict(one for one in made if one is not None), path)


def _configured(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "points", "detail"),
    [
        (_configured(base_model_name_or_path="org/else"), {"base name"}, "'org/else'"),
        (_configured(lora_alpha=16), {"alpha"}, "lora_alpha 16, r 8"),
        (_configured(use_rslora=True), {"alpha"}, "use_rslora = true"),
        (_configured(r=4, lora_alpha=4), {"rank"}, "r 4, tensors of rank [8]"),
        (lambda folder: rewrite(folder, lambda n, t: (n, t.float())), {"dtype"}, "F32; allowed: F16, BF16"),
        (
            lambda folder: rewrite(folder, lambda n, t: None if ".layers.1.self_attn.q" in n else (n, t)),
            {"uniform"},
            "q_proj is missing on layers [1]",
        ),
        (
            lambda folder: rewrite(folder, lambda n, t: (n.replace(".weight", ".default.weight"), t)),
            {"names"},
            "is ignored by LoRAX",
        ),
        (
            lambda folder: rewrite(folder, lambda n, t: None if "0.self_attn.q_proj.lora_B" in n else (n, t)),
            {"names"},
            "q_proj: lora_B is missing",
        ),
        (
            lambda folder: rewrite(folder, lambda n, t: (n, t[:, :-1].clone() if "lora_A" in n else t)),
            {"names"},
            "the base model has (32, 32)",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            {"files"},
            "tokenizer.json: LoRAX would",
        ),
        (lambda folder: (folder / "adapter_model.bin").write_text(""), {"files"}, "adapter_model.bin"),
        (
            lambda folder: save_file(
                load_file(folder / "adapter_model.safetensors"),
                folder / "adapter_model.safetensors",
                metadata={"total_size": "1"},
            ),
            {"files"},
            "total_size",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), {"files"}, "not JSON"),
    ],
)
def test_each_fault_of_a_folder_is_named(
    double: LoraxDouble,
    folders: Path,
    base: Path,
    change: Callable[[Path], None],
    points: set[str],
    detail: str,
) -> None:
    change(folders / "user1")
    asked = ("--adapters", f"user1={folders / 'user1'}", "--volume", double.root)
    if "base model has" in detail:
        reference = Reference.load(str(base), cache=base)

        found = check({"user1": folders / "user1"}, model_id="tiny", shapes=reference.shapes)
        assert {name for name, faults in found.items() if faults} == points
        assert any(detail in fault for fault in found["names"])
        return
    found, details = verdicts(double.url, *asked)
    assert failing(found) & set(RULES) == points
    assert any(detail in details[name] for name in points)


def test_a_fleet_of_two_ranks_is_named(double: LoraxDouble, folders: Path, bundle: Bundle) -> None:
    wide = tiny.bundle({"wide": tiny.lora(tiny.llama(), seed=9, rank=12)})
    export(wide, double.root / "other", layers=2, base_model="tiny")
    shutil.move(double.root / "other/wide", folders / "wide")
    found, details = verdicts(double.url, "--adapters", folders, "--volume", double.root)
    assert failing(found) == {"rank"} and "ranks [8, " in details["rank"]


@pytest.mark.parametrize("name", ["a,b", "žofie", "with space"])
def test_an_id_that_ends_in_a_header_is_named(double: LoraxDouble, folders: Path, name: str) -> None:
    (folders / "user1").rename(folders / name)
    result = run(double.url, "--adapters", f"u={folders / name}", "--volume", double.root, "--json")
    points = {point["name"]: point for point in json.loads(result.stdout)["points"]}
    assert points["id"]["verdict"] == "fail" and name in points["id"]["detail"]


def test_a_folder_of_two_files_is_one_adapter(
    double: LoraxDouble, ids: dict[str, str], bundle: Bundle
) -> None:
    folder = double.root / ids["user1"]
    for name, pair in read(folder).pairs.items():
        expected = bundle.reconstruct("user1").pairs[name].delta()
        found = pair.B.float() @ pair.A.float()
        assert torch.linalg.norm(found - expected) <= 2e-3 * float(expected.norm())
    rewrite(folder, lambda name, tensor: None if "q_proj" in name else (name, tensor))
    with pytest.raises(AdapterError, match="q_proj: not a pair"):
        read(folder)
