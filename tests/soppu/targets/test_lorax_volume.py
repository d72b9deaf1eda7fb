"""The volume a LoRAX reads: what lies in it, what is shared, and what is left of publications that die."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.lorax_export import Form
from soppu.errors import BundleError, ConfigError, TargetError
from soppu.targets.lorax_volume import Volume
from tests.soppu.compress import handmade
from tests.soppu.serve import tiny

ONE, TWO = "1" * 64, "2" * 64
LAYERS = 2


def members(*, users: int = 3, rank: int = 3, first: int = 1) -> dict[str, LoraAdapter]:
    model = tiny.llama()
    return {f"user{n}": tiny.lora(model, seed=n, rank=rank) for n in range(first, first + users)}


@pytest.fixture(scope="module")
def shared() -> Bundle:
    return tiny.bundle(members(), rank=8)


@pytest.fixture(scope="module")
def other() -> Bundle:
    """The same first user, and one more, in bases of their own."""
    return tiny.bundle(members(users=2), rank=8)


def stage(volume: Volume, bundle: Bundle, bundle_id: str = ONE, **changes: Any) -> dict[str, str]:
    asked = {"base_model": "org/base", "layers": LAYERS} | changes
    return volume.stage(bundle, bundle_id=bundle_id, **asked)


def open_volume(tmp_path: Path) -> tuple[Volume, Path]:
    folder = tmp_path / "volume"
    folder.mkdir(exist_ok=True)
    return Volume.open(str(folder)), folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What LoRAX makes of a folder: the tensors of all its safetensors files."""
    made: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            assert not stream.metadata()
            assert not made.keys() & set(stream.keys())
            made |= {name: stream.get_tensor(name) for name in stream.keys()}
    return made


def used(folder: Path) -> int:
    """Bytes on the disk, every file once."""
    found = {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*.safetensors")}
    return sum(found.values())


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_change(folder: Path, bundle: Bundle, user: str, *, close: float = 2e-3) -> None:
    found, own = tensors(folder), bundle.reconstruct(user).pairs
    names = {name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")}
    assert {name.removeprefix("base_model.model.") for name in names} >= set(own)
    for name in names:
        pair = LoraPair(found[f"{name}.lora_A.weight"].float(), found[f"{name}.lora_B.weight"].float())
        wanted = own.get(name.removeprefix("base_model.model."))
        expected = torch.zeros_like(pair.delta()) if wanted is None else wanted.delta()
        assert torch.linalg.norm(pair.delta() - expected) <= close * max(1.0, float(expected.norm()))


def test_every_user_has_a_folder_lorax_serves_and_the_basis_lies_once(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    assert volume.source == "local" and volume.staged() == ()
    seen: list[tuple[int, int]] = []
    ids = stage(volume, shared, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert volume.staged() == (ONE,) and volume.placements(ONE) == ids and list(ids) == list(shared.users)
    (basis,) = (folder / "basis").iterdir()
    assert basis.stat().st_nlink == 1 + len(ids)
    for user, path in ids.items():
        assert path.startswith(f"adapters/{user}/") and len(path.rpartition("/")[2]) == 16
        assert sorted(file.name for file in (folder / path).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "shared.safetensors",
        ]
        assert (folder / path / "shared.safetensors").stat().st_ino == basis.stat().st_ino
        config = json.loads((folder / path / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 8 and config["base_model_name_or_path"] == "org/base"
        found = tensors(folder / path)
        assert {one.dtype for one in found.values()} == {torch.float16}
        assert all(one.shape[0 if "lora_A" in name else 1] == 8 for name, one in found.items())
        assert_same_change(folder / path, shared, user)
    assert not list((folder / ".staging").iterdir())


def test_the_larger_factor_is_the_shared_one_so_the_disk_holds_less_than_copies(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.layers.0.mlp.up_proj": (200, 20), "model.layers.0.mlp.down_proj": (20, 200)}

    def drawn(o: int, i: int) -> LoraPair:
        return LoraPair(torch.randn(3, i, generator=generator), torch.randn(o, 3, generator=generator))

    fleet = {f"u{n}": LoraAdapter({name: drawn(*shape) for name, shape in shapes.items()}) for n in range(12)}
    bundle = tiny.bundle(fleet, rank=8)
    volume, folder = open_volume(tmp_path)
    ids = stage(volume, bundle, layers=1)
    (basis,) = (folder / "basis").iterdir()
    assert set(load_file(basis)) == {
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
    }
    copies = sum(
        file.stat().st_size for path in ids.values() for file in (folder / path).glob("*.safetensors")
    )
    assert used(folder) < 0.3 * copies
    for user, path in ids.items():
        assert_same_change(folder / path, bundle, user)


def test_peft_loads_every_folder_and_answers_as_with_the_bundle(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    model, ids = tiny.llama(), torch.arange(2, 14)[None]
    for user, path in stage(volume, shared).items():
        merged = tmp_path / user
        shutil.copytree(folder / path, merged)
        (merged / "shared.safetensors").unlink()
        (merged / "adapter_model.safetensors").unlink()
        save_file(tensors(folder / path), merged / "adapter_model.safetensors")
        with torch.no_grad():
            found = PeftModel.from_pretrained(tiny.llama(), merged)(input_ids=ids).logits
            expected = tiny.merged(model, shared.reconstruct(user))(input_ids=ids).logits
            plain = model(input_ids=ids).logits
        # float16 factors, whose rounding grows over the layers
        assert (found - expected).abs().max() < 0.02 * (expected - plain).abs().max()


@pytest.mark.parametrize("kind", sorted(handmade.PLANS))
def test_bundles_of_every_kind_keep_their_changes(kind: str, tmp_path: Path) -> None:
    bundle = handmade.make(handmade.PLANS[kind])
    volume, folder = open_volume(tmp_path)
    for user, path in stage(volume, bundle, layers=0).items():
        assert_same_change(folder / path, bundle, user, close=1e-2)
    linked = [file for file in (folder / "basis").glob("*")]
    assert bool(linked) == (kind in ("coordinates", "floats", "full cores", "diagonal cores", "two clusters"))


def test_a_basis_wider_than_the_fleets_rank_is_not_shared() -> None:
    narrow, wide = ([[(8, 0, 8, 0)]] * 2 for _ in range(2))
    plans = handmade.Plan(narrow, k=(3, 3)), handmade.Plan(wide, k=(9, 9), shapes={"q": (12, 12)})
    forms = [Form(handmade.make(plan), users=(), dtype="float16", layers=0, base_model="") for plan in plans]
    assert [form.rank for form in forms] == [8, 8]
    assert [bool(form.split("user0")[0]) for form in forms] == [True, False]


def test_staging_again_changes_nothing_and_says_the_same(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    ids, before = stage(volume, shared), content(folder)
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("adapters/*/*/*")}
    assert stage(volume, shared) == ids and content(folder) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_folder_that_was_deleted_comes_back(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    ids, before = stage(volume, shared), content(folder)
    shutil.rmtree(folder / ids["user2"])
    assert stage(volume, shared) == ids and content(folder) == before


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "extra.safetensors"])
def test_a_damaged_folder_is_refused_by_name(shared: Bundle, tmp_path: Path, file: str) -> None:
    volume, folder = open_volume(tmp_path)
    path = stage(volume, shared)["user2"]
    place = folder / path / file
    data = place.read_bytes() if place.exists() else b""
    place.unlink(missing_ok=True)
    place.write_bytes(data[:-1] + b"!")
    with pytest.raises(TargetError, match=rf"{path} is damaged.*delete that folder, publish again"):
        stage(volume, shared)
    volume.drop(ONE)
    assert volume.staged() == () and not list(folder.glob("adapters/*")) and not list(folder.glob("basis/*"))


def test_a_folder_damaged_before_its_bundle_was_staged_is_refused_too(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    path = stage(volume, shared)["user2"]
    (folder / f"bundles/{ONE}.json").unlink()
    (folder / path / "shared.safetensors").unlink()
    with pytest.raises(TargetError, match=rf"{path} is damaged"):
        stage(volume, shared)
    assert volume.staged() == ()


def test_dropping_leaves_what_another_bundle_names(shared: Bundle, other: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    one, two = stage(volume, shared, ONE), stage(volume, other, TWO)
    same = stage(volume, shared, "3" * 64)
    assert same == one and volume.staged() == (ONE, TWO, "3" * 64)
    volume.drop(ONE)
    assert all((folder / path).is_dir() for path in one.values())
    volume.drop("3" * 64)
    assert not any((folder / path).exists() for path in one.values())
    assert all((folder / path).is_dir() for path in two.values()) and volume.placements(TWO) == two
    assert len(list((folder / "basis").iterdir())) == 1
    volume.drop("3" * 64)
    with pytest.raises(TargetError, match=r"bundle 111111111111 is not staged here; publish it"):
        volume.placements(ONE)


def test_a_bundle_staged_otherwise_is_refused_until_it_is_dropped(shared: Bundle, tmp_path: Path) -> None:
    volume, _ = open_volume(tmp_path)
    stage(volume, shared)
    for changes in ({"base_model": "org/else"}, {"dtype": "bfloat16"}, {"layers": 3}):
        name = next(iter(changes))
        with pytest.raises(TargetError, match=rf"bundle 111111111111 is staged with {name} .*drop it first"):
            stage(volume, shared, **changes)
    volume.drop(ONE)
    stage(volume, shared, dtype="bfloat16")


def test_a_sweep_deletes_leftovers_and_nothing_else(shared: Bundle, other: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    foreign = folder / "adapters/by-hand/adapter_config.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("{}")
    stage(volume, shared)
    before = content(folder)
    lost = stage(volume, other, TWO)
    (folder / f"bundles/{TWO}.json").unlink()
    (folder / ".staging/abc").mkdir()
    (folder / ".staging/abc/adapter_model.safetensors").write_bytes(b"half")
    (folder / f"bundles/.{TWO}.json.xyz.tmp").write_bytes(b"half")
    (folder / "basis/.abc.safetensors.xyz.tmp").write_bytes(b"half")
    (folder / "adapters/nobody").mkdir()
    assert set(volume.sweep()) == set(lost.values())
    assert content(folder) == before and not (folder / "adapters/nobody").exists()
    assert volume.sweep() == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"adapters": 3}', '{"adapters": {"a": 1}}', ""])
def test_where_a_manifest_is_damaged_nothing_is_swept(shared: Bundle, tmp_path: Path, text: str) -> None:
    volume, folder = open_volume(tmp_path)
    ids = stage(volume, shared)
    (folder / f"bundles/{TWO}.json").write_text(text)
    (folder / f"bundles/{ONE}.json").unlink()
    with pytest.raises(TargetError, match=rf"bundles/{TWO}.json is damaged; delete it"):
        volume.sweep()
    with pytest.raises(TargetError, match="is damaged"):
        volume.placements(TWO)
    assert all((folder / path).is_dir() for path in ids.values())


def test_two_stagings_at_once_end_as_one(shared: Bundle, other: Bundle, tmp_path: Path) -> None:
    _, folder = open_volume(tmp_path)

    def publish(which: tuple[Bundle, str]) -> dict[str, str]:
        volume = Volume.open(str(folder))
        ids = stage(volume, *which)
        volume.sweep()
        return ids

    with ThreadPoolExecutor(4) as pool:
        one, same, two, again = pool.map(publish, [(shared, ONE), (shared, ONE), (other, TWO), (other, TWO)])
    assert one == same and two == again
    for bundle, ids in ((shared, one), (other, two)):
        for user, path in ids.items():
            assert_same_change(folder / path, bundle, user)


def publisher(bundle: Bundle, folder: Path) -> int:
    """The pid of a copy of this process that stages, drops and sweeps for ever."""
    pid = os.fork()
    if pid:
        return pid
    try:
        while True:
            volume = Volume.open(str(folder))
            stage(volume, bundle)
            volume.drop(ONE)
            volume.sweep()
    finally:
        os._exit(1)


def test_killed_at_any_moment_it_is_staged_by_the_next(shared: Bundle, tmp_path: Path) -> None:
    """Whatever stands when two publishers die is whole, and the next one goes on from there."""
    volume, folder = open_volume(tmp_path)
    clean = tmp_path / "clean"
    clean.mkdir()
    ids = stage(Volume.open(str(clean)), shared)
    wanted = {name: data for name, data in content(clean).items() if name != ".lock"}
    dice = random.Random(11)
    for _ in range(20):
        pids = [publisher(shared, folder) for _ in range(2)]  # one of them waits for the other
        time.sleep(dice.uniform(0.0, 0.15))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])  # and did not end by an error of its own
        for bundle_id in volume.staged():  # what is staged is whole, before anybody mends anything
            for path in volume.placements(bundle_id).values():
                assert content(folder / path) == content(clean / path)
        assert stage(volume, shared) == ids
        volume.sweep()
        assert {name: data for name, data in content(folder).items() if name != ".lock"} == wanted
        assert not list((folder / ".staging").iterdir())


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Files of at most `size` bytes: stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_volume_is_named_and_nothing_is_staged(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    for size in (100, 1000, 4000):
        with limited(size), pytest.raises(TargetError, match=rf"volume {folder}: bundle 1+ was not staged: "):
            stage(volume, shared)
        assert volume.staged() == ()
    stage(volume, shared)


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "mount it writable"), (errno.EACCES, "let this user write")],
)
def test_what_the_system_refuses_comes_with_a_cure(
    shared: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    volume, folder = open_volume(tmp_path)

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for place in ("os.fsync", "os.link"):
        with monkeypatch.context() as patch:
            patch.setattr(place, refused)
            with pytest.raises(TargetError, match=rf"volume {folder}: .*{os.strerror(number)}; {cure}"):
                stage(volume, shared)
        assert volume.staged() == ()
    stage(volume, shared)


def test_a_volume_that_cannot_be_written_is_named(shared: Bundle) -> None:
    with pytest.raises(TargetError, match="volume /sys: bundle 1+ was not staged: "):
        stage(Volume.open("/sys"), shared)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV])
def test_without_hard_links_every_folder_has_a_copy(
    shared: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    volume, folder = open_volume(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.link", refused)
        ids = stage(volume, shared)
    assert stage(volume, shared) == ids
    for user, path in ids.items():
        assert (folder / path / "shared.safetensors").stat().st_nlink == 1
        assert_same_change(folder / path, shared, user)


def test_where_a_file_has_too_many_names_another_copy_is_made(
    shared: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def full(source: Path, place: Path) -> None:
        if os.stat(source).st_nlink >= 2:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, place)

    monkeypatch.setattr("os.link", full)
    volume, folder = open_volume(tmp_path)
    ids = stage(volume, shared)
    assert all((folder / path / "shared.safetensors").is_file() for path in ids.values())
    assert stage(volume, shared) == ids


@pytest.mark.parametrize("where", ["/nowhere/at/all", "nothing://bucket/prefix"])
def test_a_volume_that_is_not_there_is_named(where: str) -> None:
    with pytest.raises(TargetError, match=rf"volume {where}"):
        Volume.open(where)


def renamed(bundle: Bundle, user: str) -> Bundle:
    report = replace(bundle.report, relative_error={user: 0.0})
    return replace(bundle, users=(user, *bundle.users[1:]), report=report, _last={})


@pytest.mark.parametrize(
    ("user", "folder"),
    [("žofie", "%C5%BEofie"), ("a,b c", "a%2Cb%20c"), ("me@home.org", "me@home.org"), ("%41", "%2541")],
)
def test_ids_hold_nothing_that_ends_a_lorax(shared: Bundle, tmp_path: Path, user: str, folder: str) -> None:
    volume, root = open_volume(tmp_path)
    path = stage(volume, renamed(shared, user))[user]
    assert path.startswith(f"adapters/{folder}/") and (root / path).is_dir()
    assert path.isascii() and path.isprintable() and "," not in path


@pytest.mark.parametrize(
    ("user", "error"), [("a/b", "cannot be the name"), ("..", "cannot be the name"), ("ž" * 50, "too long")]
)
def test_a_user_who_cannot_have_a_folder_is_named(
    shared: Bundle, tmp_path: Path, user: str, error: str
) -> None:
    volume, folder = open_volume(tmp_path)
    with pytest.raises((BundleError, TargetError), match=rf"user '{user[:20]}.*{error}"):
        stage(volume, renamed(shared, user))
    assert not list(folder.iterdir())


def test_ranks_dtypes_and_ids_lorax_cannot_serve_are_refused(shared: Bundle, tmp_path: Path) -> None:
    volume, folder = open_volume(tmp_path)
    pair = LoraPair(A=torch.randn(130, 140), B=torch.randn(150, 130))
    options = CompressOptions(method="svd", max_error=1e-3, device="cpu")
    wide = compress({"wide": LoraAdapter({"model.layers.0.up_proj": pair})}, options)
    with pytest.raises(BundleError, match="wide: .*rank 130, LoRAX serves ranks up to 128"):
        stage(volume, wide, layers=1)
    with pytest.raises(ConfigError, match="dtype 'float32', allowed for LoRAX: float16, bfloat16"):
        stage(volume, shared, dtype="float32")
    with pytest.raises(TargetError, match="bundle id '../x': cannot be the name of a file"):
        stage(volume, shared, "../x")
    huge = replace(shared, norm=shared.norm * 1e6, _last={})
    with pytest.raises(BundleError, match=r"user1: .*numbers beyond the range of torch\.float16"):
        stage(volume, huge)
    assert volume.staged() == () and not list(folder.glob("adapters/*"))


class TestBucket:
    @pytest.fixture
    def where(self, tmp_path: Path) -> Iterator[str]:
        yield f"memory://{tmp_path.name}/prefix"
        if fsspec.filesystem("memory").exists(f"/{tmp_path.name}"):
            fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)

    def test_ids_name_bucket_and_prefix_and_nothing_is_split(
        self, shared: Bundle, tmp_path: Path, where: str
    ) -> None:
        volume = Volume.open(where)
        assert volume.source == "s3"
        ids = stage(volume, shared)
        assert volume.placements(ONE) == ids == stage(volume, shared) and volume.staged() == (ONE,)
        for user, path in ids.items():
            assert path.startswith(f"{tmp_path.name}/prefix/adapters/{user}/") and len(path[-16:]) == 16
            local = tmp_path / user
            fsspec.filesystem("memory").get(f"/{path}", str(local), recursive=True)
            names = sorted(file.name for file in local.iterdir())
            assert names == ["adapter_config.json", "adapter_model.safetensors"]
            assert_same_change(local, shared, user)

    def test_what_was_begun_is_finished_and_what_nobody_names_is_swept(
        self, shared: Bundle, other: Bundle, where: str
    ) -> None:
        volume, system = Volume.open(where), fsspec.filesystem("memory")
        ids = stage(volume, shared)
        system.rm_file(f"/{ids['user1']}/adapter_config.json")  # killed before its last object
        assert stage(volume, shared) == ids and system.exists(f"/{ids['user1']}/adapter_config.json")
        lost = stage(volume, other, TWO)
        system.rm_file(f"/{where.removeprefix('memory://')}/bundles/{TWO}.json")
        assert set(volume.sweep()) == set(lost.values())
        volume.drop(ONE)
        assert system.find(f"/{where.removeprefix('memory://')}") == []

    def test_nothing_is_deleted_while_somebody_publishes(
        self, shared: Bundle, other: Bundle, where: str
    ) -> None:
        volume, system = Volume.open(where), fsspec.filesystem("memory")
        root = f"/{where.removeprefix('memory://')}"
        lost = stage(volume, other, TWO)
        system.rm_file(f"{root}/bundles/{TWO}.json")
        system.pipe_file(f"{root}/.staging/abc.json", json.dumps(time.time()).encode())
        assert volume.sweep() == ()
        system.pipe_file(f"{root}/.staging/abc.json", json.dumps(time.time() - 2 * 86_400).encode())
        assert set(volume.sweep()) == set(lost.values())
        assert system.find(f"{root}/.staging") == []

    def test_a_bucket_that_refuses_is_named(
        self, shared: Bundle, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: object, **__: object) -> None:
            raise RuntimeError("AccessDenied")

        volume = Volume.open(where)
        stage(volume, shared)
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", refused)
        with pytest.raises(TargetError, match=rf"volume {where}: bundle 2+ was not staged: AccessDenied"):
            stage(volume, shared, TWO)
