"""Second moments: equal to those of inputs written down one by one, and the same again after a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from soppu import calibrate, data
from soppu.data import Block
from soppu.errors import BundleError, ConfigError, ModelError, StorageError, UnsupportedModel
from soppu.federation.emulator import SUPPORTED

HASH = "b" * 64
Q, K, DOWN = (
    "model.layers.7.self_attn.q_proj",
    "model.layers.7.self_attn.k_proj",
    "model.layers.7.mlp.down_proj",
)


def make_blocks(*lengths: int, seed: int = 0) -> list[Block]:
    generator = torch.Generator().manual_seed(seed)
    return [Block(ids, ids) for n in lengths for ids in [torch.randint(2, 300, (n,), generator=generator)]]


def written_down(model: PreTrainedModel, blocks: list[Block], name: str, *, centred: bool = True) -> Tensor:
    """Every input of one layer, token by token, and the mean of its outer products."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for block in blocks:
            model(input_ids=block.ids[None])
    hook.remove()
    tokens = [token.double() for text in seen for token in (text[1:] if centred else text)]
    if centred:
        mean = torch.stack(tokens).mean(0)
        tokens = [token - mean for token in tokens]
    return torch.stack([torch.outer(token, token) for token in tokens]).mean(0)


class Twisted(PreTrainedModel):
    """Two layers on one input; with `change` it is doubled in between where a text begins with an even id."""

    base_model_prefix = "inner"

    def __init__(self, weights: Tensor, *, change: bool = False) -> None:
        nn.Module.__init__(self)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weights, self.change = weights, change

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.weights[input_ids]
        self.first(x)
        if self.change and int(input_ids[0, 0]) % 2 == 0:
            x.mul_(2.0)
        return self.second(x)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def targets(model: PreTrainedModel) -> list[str]:
    leaves = SUPPORTED[model.config.model_type][1]
    return [name for name in calibrate.linear_names(model) if name.rpartition(".")[2] in leaves]


@pytest.mark.parametrize("centred", [True, False])
def test_moments_are_the_mean_outer_product_of_the_inputs(tiny_model: PreTrainedModel, centred: bool) -> None:
    """Five families, nn.Linear and Conv1D, texts of unequal length: a padded position would show."""
    blocks, names = make_blocks(5, 17, 2), targets(tiny_model)[-6:]
    found = calibrate.second_moments(tiny_model, blocks, names, centred=centred)
    assert list(found) == names
    for name, C in found.items():
        assert C.dtype == torch.float32 and torch.equal(C, C.T)
        expected = written_down(tiny_model, blocks, name, centred=centred)
        torch.testing.assert_close(C.double(), expected, rtol=2e-5, atol=1e-6)
    assert hooks(tiny_model) == 0


def test_the_trace_of_moments_after_collate_would_differ(tiny_llama: PreTrainedModel) -> None:
    """What padding would do, so that the test above can fail: more tokens, other moments."""
    blocks = make_blocks(5, 17)
    ids, mask, _ = data.collate(blocks, pad_id=1)
    seen: list[Tensor] = []
    hook = tiny_llama.get_submodule(DOWN).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        tiny_llama(input_ids=ids, attention_mask=mask)
    hook.remove()
    padded = seen[0].reshape(-1, seen[0].shape[-1])
    C = calibrate.second_moments(tiny_llama, blocks, [DOWN], centred=False)[DOWN]
    assert (padded.T @ padded / padded.shape[0] - C).abs().max() > 0.01 * C.abs().max()


def test_layers_of_one_input_share_one_tensor(tiny_llama: PreTrainedModel) -> None:
    found = calibrate.second_moments(tiny_llama, make_blocks(9, 4), calibrate.linear_names(tiny_llama))
    layer = {name.rpartition(".")[2]: C for name, C in found.items() if ".layers.3." in name}
    assert layer["q_proj"] is layer["k_proj"] is layer["v_proj"]
    assert layer["gate_proj"] is layer["up_proj"]
    assert len({id(C) for C in found.values()}) == 8 * 4
    other = {id(C) for name, C in found.items() if ".layers.4." in name}
    assert not other & {id(C) for C in layer.values()}


def test_a_tensor_changed_in_between_is_another_input() -> None:
    weights = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))

    def texts(*firsts: int) -> list[Block]:
        return [Block(ids, ids) for ids in (torch.tensor([first, 3, 4]) for first in firsts)]

    found = calibrate.second_moments(
        Twisted(weights, change=True), texts(2, 4), ["first", "second"], centred=False
    )
    torch.testing.assert_close(found["second"], 4 * found["first"])
    found = calibrate.second_moments(Twisted(weights), texts(2, 4), ["first", "second"])
    assert found["second"] is found["first"]
    with pytest.raises(UnsupportedModel, match="second: shares its input"):
        calibrate.second_moments(Twisted(weights, change=True), texts(2, 3), ["first", "second"])


def test_one_module_alone_has_what_it_has_among_others(tiny_llama: PreTrainedModel) -> None:
    blocks = make_blocks(6, 6)
    alone = calibrate.second_moments(tiny_llama, blocks, [K])[K]
    assert torch.equal(alone, calibrate.second_moments(tiny_llama, blocks, [DOWN, Q, K])[K])


def test_many_texts_do_not_drift(make_model: Callable[..., PreTrainedModel]) -> None:
    """A sum in float32 would stop growing where one text is lost against it; here the mean stays put."""
    model = make_model("llama", num_hidden_layers=1)
    name = "model.layers.0.self_attn.q_proj"
    block = make_blocks(4)
    once = calibrate.second_moments(model, block, [name])[name]
    assert torch.equal(calibrate.second_moments(model, block * 300, [name])[name], once)


def test_a_large_common_part_of_all_inputs_is_taken_out_without_loss() -> None:
    """What all tokens share is 1e3 times what tells them apart; sums in float32 would leave rounding only."""
    weights = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    near, far = Twisted(weights), Twisted(weights + 1000.0)
    blocks = make_blocks(200, 200)
    expected = calibrate.second_moments(near, blocks, ["first"])["first"]
    found = calibrate.second_moments(far, blocks, ["first"])["first"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_texts_of_one_token_hold_nothing_but_a_first_one(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="q_proj: no token of the text counts"):
        calibrate.second_moments(tiny_llama, make_blocks(1, 1), [Q])
    assert calibrate.second_moments(tiny_llama, make_blocks(1, 1), [Q], centred=False)[Q].trace() > 0


def test_the_head_can_be_named_too(tiny_llama: PreTrainedModel) -> None:
    blocks = make_blocks(5)
    found = calibrate.second_moments(tiny_llama, blocks, ["lm_head"])["lm_head"]
    expected = written_down(tiny_llama, blocks, "lm_head")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert "lm_head" not in calibrate.linear_names(tiny_llama)


def test_progress_goes_text_by_text(tiny_llama: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    calibrate.second_moments(tiny_llama, make_blocks(3, 4), [Q], progress=lambda *share: seen.append(share))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.layers.99.q"], r"model\.layers\.99\.q: .*no such module"),
        (["model.norm"], r"model\.norm: .*LlamaRMSNorm"),
        ([], "no modules"),
    ],
)
def test_a_module_that_is_no_linear_layer_is_named(
    tiny_llama: PreTrainedModel, names: list[str], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        calibrate.second_moments(tiny_llama, make_blocks(3), names)


def test_no_text_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="no text"):
        calibrate.second_moments(tiny_llama, [], [Q])


def test_a_layer_that_never_runs_is_named(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama", num_hidden_layers=1)
    model.model.idle = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="idle: no token"):
        calibrate.second_moments(model, make_blocks(3), ["model.idle"])


def test_nan_in_the_base_model_is_named_and_leaves_no_hook(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model = make_model("llama")
    model.model.layers[7].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"layers\.7\.mlp\.down_proj: .*NaN"):
        calibrate.second_moments(model, make_blocks(3), [Q, DOWN])
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], ["a.0.q_proj", "a.0.o_proj", "a.1.q_proj", "a.10.q_proj"]),
        (["q_proj"], ["a.0.q_proj", "a.1.q_proj", "a.10.q_proj"]),
        (["a.1.q_proj", "o_proj"], ["a.0.o_proj", "a.1.q_proj"]),
        ([r"a\.[01]\.[qo]_proj"], ["a.0.q_proj", "a.0.o_proj", "a.1.q_proj"]),
        ([r"o_proj|1\.q_proj"], ["a.0.o_proj", "a.1.q_proj"]),
    ],
)
def test_patterns_fit_whole_names_or_their_ends(patterns: list[str], expected: list[str]) -> None:
    names = ["a.0.q_proj", "a.0.o_proj", "a.1.q_proj", "a.10.q_proj"]
    assert calibrate.select(names, patterns) == expected


@pytest.mark.parametrize(
    ("pattern", "words"), [("(", "not a regular expression"), ("proj", "it has o_proj, q_proj")]
)
def test_a_pattern_that_does_not_work_is_named(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calibrate.select(["a.0.q_proj", "a.0.o_proj"], ["q_proj", pattern])


@pytest.fixture
def moments(tiny_llama: PreTrainedModel) -> dict[str, Tensor]:
    return calibrate.second_moments(tiny_llama, make_blocks(9, 4), [Q, K, DOWN])


def save(moments: dict[str, Tensor], path: Path) -> Path:
    calibrate.save(moments, path, base_hash=HASH, examples=2, tokens=13)
    return path


def test_a_file_gives_back_what_was_saved_bit_for_bit(moments: dict[str, Tensor], tmp_path: Path) -> None:
    found = calibrate.load(save(moments, tmp_path / "new" / "m"), base_hash=HASH)
    assert set(found) == set(moments) and found[Q] is found[K]
    assert all(torch.equal(found[name], moments[name]) for name in moments)


def test_a_file_holds_each_different_triangle_once(moments: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(moments, tmp_path / "m")
    with safe_open(path, framework="pt") as stream:
        sizes = {key: stream.get_tensor(key).numel() for key in stream.keys()}
        facts = json.loads(stream.metadata()["soppu-moments"])
    assert sizes == {Q: 32 * 33 // 2, DOWN: 48 * 49 // 2}
    assert (facts["examples"], facts["tokens"], facts["centred"]) == (2, 13, True)
    assert path.stat().st_size < 4 * sum(sizes.values()) + 1000


def test_equal_moments_give_equal_bytes(moments: dict[str, Tensor], tmp_path: Path) -> None:
    assert save(moments, tmp_path / "a").read_bytes() == save(moments, tmp_path / "b").read_bytes()


def test_only_the_modules_asked_for_come_back(moments: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(moments, tmp_path / "m")
    assert list(calibrate.load(path, base_hash=HASH, modules=[K])) == [K]
    with pytest.raises(BundleError, match=r"m: no second moments of model\.other; it holds 3"):
        calibrate.load(path, base_hash=HASH, modules=[K, "model.other"])


@pytest.mark.parametrize("other", ["c" * 64, ""])
def test_another_base_model_is_refused(moments: dict[str, Tensor], tmp_path: Path, other: str) -> None:
    with pytest.raises(ModelError, match="base model bbbbbbbbbbbb .no name., expected"):
        calibrate.load(save(moments, tmp_path / "m"), base_hash=other)


def test_moments_without_a_hash_to_compare_are_known_by_name(
    moments: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "m"
    calibrate.save(moments, path, base_hash=HASH, base_model="org/Tiny", examples=2, tokens=13)
    assert set(calibrate.load(path, base_hash="", base_model="/models/tiny/")) == set(moments)
    for name, base_hash in (("org/other", ""), ("", ""), ("org/Tiny", "c" * 64)):
        with pytest.raises(ModelError, match=r"base model bbbbbbbbbbbb \(org/Tiny\), expected"):
            calibrate.load(path, base_hash=base_hash, base_model=name)


@pytest.mark.parametrize(
    ("triangle", "words"),
    [
        (torch.tensor([1.0, float("nan"), 1.0]), "x: NaN or Inf"),
        (torch.tensor([1.0, 2.0, 1.0]), "x: not positive semidefinite"),
        (torch.zeros(3), "x: trace 0"),
        (torch.ones(4), "x: 4 numbers are no upper triangle"),
        (torch.ones(3, dtype=torch.float16), "x: no float32 vector"),
        (torch.ones(2, 2), "x: no float32 vector"),
    ],
)
def test_a_file_that_holds_no_second_moments_is_refused(tmp_path: Path, triangle: Tensor, words: str) -> None:
    path = tmp_path / "m"
    facts = {"format": 1, "base_hash": HASH, "examples": 1, "tokens": 1, "modules": {"x": "x"}}
    save_file({"x": triangle}, path, metadata={"soppu-moments": json.dumps(facts)})
    with pytest.raises(BundleError, match=words):
        calibrate.load(path, base_hash=HASH)


def test_a_module_without_its_tensor_is_refused(tmp_path: Path) -> None:
    facts = {"format": 1, "base_hash": HASH, "examples": 1, "tokens": 1, "modules": {"x": "gone"}}
    save_file({"x": torch.ones(1)}, tmp_path / "m", metadata={"soppu-moments": json.dumps(facts)})
    with pytest.raises(BundleError, match="gone: no float32 vector"):
        calibrate.load(tmp_path / "m", base_hash=HASH)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_file_cut_short_is_refused(moments: dict[str, Tensor], tmp_path: Path, share: float) -> None:
    path = save(moments, tmp_path / "m")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BundleError, match="truncated or not safetensors"):
        calibrate.load(path, base_hash=HASH)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        calibrate.load(tmp_path / "none", base_hash=HASH)
    save_file({"x": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(BundleError, match="not a file of second moments"):
        calibrate.load(tmp_path / "plain", base_hash=HASH)
    save_file({"x": torch.ones(1)}, tmp_path / "new", metadata={"soppu-moments": '{"format": 2}'})
    with pytest.raises(BundleError, match="format version 2, this reader knows 1"):
        calibrate.load(tmp_path / "new", base_hash=HASH)


def test_a_write_that_fails_leaves_what_was_there(moments: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        save(moments, tmp_path / "file" / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
