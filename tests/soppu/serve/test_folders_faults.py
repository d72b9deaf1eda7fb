"""An adapter's folder that leads out, blocks, is torn or is of another base: refused, with the cause."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soppu.adapter import CONFIG_FILE, IDENTITY_FILE, SHARED_FILE, WEIGHTS_FILE
from soppu.serve.bank.bank import AdapterBank, Mount
from tests.soppu.serve import tiny
from tests.soppu.serve.mounted import ALICE, make_bank, put, refusal


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def bank(root: Path) -> AdapterBank:
    return make_bank(root)


def config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_file_in_the_place_of_a_folder_a_missing_root_and_missing_weights(
    bank: AdapterBank, root: Path, tmp_path: Path
) -> None:
    put(root)
    assert "No valid adapter config file found" in refusal(bank, f"{ALICE}/{CONFIG_FILE}")
    assert "No valid adapter config file found" in refusal(make_bank(tmp_path / "nowhere"), ALICE)
    (root / ALICE / WEIGHTS_FILE).unlink()
    assert f"No local weights found in {ALICE} with extension .safetensors" in refusal(bank, ALICE)


def _link_folder(root: Path, outside: Path) -> None:
    (root / "adapters/alice").mkdir(parents=True)
    (root / ALICE).symlink_to(outside)


def _link_parent(root: Path, outside: Path) -> None:
    (root / "adapters").mkdir(parents=True)
    (outside.parent / "0f3c9a").symlink_to(outside)
    (root / "adapters/alice").symlink_to(outside.parent)


def _link_file(name: str) -> Callable[[Path, Path], None]:
    def link(root: Path, outside: Path) -> None:
        put(root)
        (root / ALICE / name).unlink(missing_ok=True)
        (root / ALICE / name).symlink_to(outside / name)

    return link


@pytest.mark.parametrize(
    "link",
    [_link_folder, _link_parent, *map(_link_file, (CONFIG_FILE, WEIGHTS_FILE, SHARED_FILE, IDENTITY_FILE))],
    ids=["folder", "parent", CONFIG_FILE, WEIGHTS_FILE, SHARED_FILE, IDENTITY_FILE],
)
def test_links_that_lead_out_are_not_followed(
    bank: AdapterBank, root: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside" / "secret"
    put(outside, ".")
    save_file({}, outside / SHARED_FILE)
    link(root, outside)
    message = refusal(bank, ALICE)
    assert f"adapter {ALICE!r} leads out of the folder of adapters" in message
    assert str(tmp_path) not in message


def test_what_would_block_or_go_in_circles_is_refused(bank: AdapterBank, root: Path) -> None:
    put(root)
    (root / ALICE / SHARED_FILE).symlink_to("../nothing")
    assert f"{SHARED_FILE} is no plain file, or a link to nothing" in refusal(bank, ALICE)
    (root / ALICE / SHARED_FILE).unlink()
    os.mkfifo(root / ALICE / SHARED_FILE)
    assert f"{SHARED_FILE} is no plain file" in refusal(bank, ALICE)
    (root / ALICE / SHARED_FILE).unlink()
    (root / ALICE / WEIGHTS_FILE).unlink()
    os.mkfifo(root / ALICE / WEIGHTS_FILE)
    assert "No local weights found" in refusal(bank, ALICE)
    (root / "circle").symlink_to("circle")
    assert "adapter 'circle' cannot be read: links in a circle" in refusal(bank, "circle")
    assert "adapter 'circle/x' cannot be read: links in a circle" in refusal(bank, "circle/x")


def _cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


def _tensors(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / IDENTITY_FILE).unlink()
        tensors = {key: change(key, value) for key, value in load_file(folder / WEIGHTS_FILE).items()}
        save_file(
            {key: value.clone() for key, value in tensors.items() if value is not None}, folder / WEIGHTS_FILE
        )

    return apply


def _base(**changes: object) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / IDENTITY_FILE).unlink()
        config(folder, **changes)

    return apply


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights-empty": (_cut(WEIGHTS_FILE, 0), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "weights-no-header": (_cut(WEIGHTS_FILE, 7), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "weights-half-header": (_cut(WEIGHTS_FILE, 300), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "weights-half": (_cut(WEIGHTS_FILE, 9000), f"{WEIGHTS_FILE}: truncated or not safetensors"),
    "config-empty": (_cut(CONFIG_FILE, 0), f"{CONFIG_FILE}: not JSON"),
    "config-half": (_cut(CONFIG_FILE, 100), f"{CONFIG_FILE}: not JSON"),
    "identity-half": (_cut(IDENTITY_FILE, 10), f"{IDENTITY_FILE}: not JSON"),
    "half-of-the-pairs": (_tensors(lambda k, t: None if "lora_B" in k else t), "lora_B is missing"),
    "other-rank": (lambda folder: config(folder, r=8), "the tensors have rank 3"),
    "other-rank-in-b": (_tensors(lambda k, t: t[:, :2] if "lora_B" in k else t), "do not share a rank"),
    "other-shape": (_tensors(lambda k, t: t[:, :-1] if "lora_A" in k else t), "shape"),
    "not-finite": (_tensors(lambda k, t: t * float("nan")), "holds NaN or Inf"),
    "integers": (_tensors(lambda k, t: t.to(torch.int8)), "holds int8"),
    "other-base": (_base(base_model_name_or_path="org/Other"), "made for base model"),
    "no-base": (_base(base_model_name_or_path=None), "made for base model unknown (no name)"),
    "dora": (lambda folder: config(folder, use_dora=True), "not a plain LoRA adapter: use_dora=True"),
    "other-tensors": (
        lambda folder: put(folder, ".", seed=5) and _restore(folder),
        "belongs to other tensors",
    ),
    "weights-in-parts": (lambda folder: save_file({}, folder / "more.safetensors"), "found more.safetensors"),
    "in-both-files": (lambda folder: os.link(folder / WEIGHTS_FILE, folder / SHARED_FILE), "only one can be"),
}


def _restore(folder: Path) -> None:
    content = json.loads((folder / IDENTITY_FILE).read_text())
    (folder / IDENTITY_FILE).write_text(json.dumps(content | {"content": "0" * 64}))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_torn_or_does_not_fit_is_a_424_with_the_cause(
    bank: AdapterBank, root: Path, fault: str
) -> None:
    put(root)
    damage, cause = FAULTS[fault]
    damage(root / ALICE)
    message = refusal(bank, ALICE)
    assert cause in message and ALICE in message
    assert str(root) not in message  # how the server's disk looks is nobody's affair
    for path in (root / ALICE).iterdir():
        path.unlink()
    made = put(root)  # a failure is not remembered
    assert bank.resolve(ALICE).version == made.content_hash()


def test_an_adapter_of_another_base_hash_or_model_is_refused(bank: AdapterBank, root: Path) -> None:
    put(root, adapter=tiny.lora(tiny.llama(), seed=1, base_hash="c" * 64))
    assert f"{ALICE}: made for base model cccccccccccc" in refusal(bank, ALICE)
    gpt2 = replace(tiny.lora(tiny.gpt2(), seed=1), base_hash=tiny.BASE_HASH)
    put(root, "other", adapter=gpt2)
    assert "the base model has no such module" in refusal(bank, "other")


@pytest.mark.parametrize("served", ["org/Tiny", "/models/base", "./relative/folder", "alias-1"])
def test_the_name_that_info_shows_is_the_name_of_the_base(root: Path, served: str) -> None:
    put(root)
    _base(base_model_name_or_path=served)(root / ALICE)
    mount = Mount(root)
    bank = AdapterBank(tiny.llama(), base_hash=tiny.BASE_HASH, base_model=served, mount=mount)
    bank.resolve(ALICE)
    assert not bank.residents()[ALICE].verified
