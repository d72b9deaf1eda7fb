"""The configuration: every fault in one message, and text that reads back to the same values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soppu import config as configuration
from soppu.compress.numbers.quantise import COORDS, FLOATS, QUANTISERS
from soppu.compress.options import DEFAULT_RATIO, CompressOptions
from soppu.config import (
    METHODS,
    OPERATIONAL,
    BasisBits,
    CompressConfig,
    Config,
    CoreBits,
    FederationConfig,
    LoraSettings,
)
from soppu.errors import ConfigError
from soppu.federation import wire

BASIS_BITS, CORE_BITS = get_args(BasisBits), get_args(CoreBits)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert configuration.load(write(tmp_path, "")) == Config()


def test_values_from_the_file_and_overrides_win_in_that_order(tmp_path: Path) -> None:
    path = write(tmp_path, 'seed = 3\n[lora]\nrank = 4\nalpha = 8\n[data]\nusers = ["a"]\n')
    config = configuration.load(path, {"lora.rank": 2, "seed": 5, "plan.drop_ratio": 0.5})
    assert (config.seed, config.lora.rank, config.lora.alpha) == (5, 2, 8.0)
    assert (config.data.users, config.plan.drop_ratio) == (("a",), 0.5)
    assert isinstance(config.lora.alpha, float)  # an integer is a fine way to write it


def test_all_faults_come_in_one_message_with_file_and_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
sede = 1
seed = "one"
frozen_dtype = "int4"
base = 3
[lora]
rnak = 8
rank = 0
alpha = true
target_modules = ["q_proj", 3]
[plan]
drop_ratio = 0.95
[federation]
learning_rate = nan
prox_weight = inf
[nonsense]
x = 1
""",
    )
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    for fault in (
        "unknown key sede; top level knows: seed,",
        "unknown key nonsense;",
        "unknown key lora.rnak; lora. knows: rank, alpha, target_modules; did you mean rank?",
        "seed = 'one', allowed: a whole number",
        "frozen_dtype = 'int4', allowed: auto, float32, bfloat16, nf4",
        "base = 3, allowed: a table",
        "lora.rank = 0, allowed: at least 1",
        "lora.alpha = True, allowed: a number",
        "lora.target_modules = ['q_proj', 3], allowed: a list of texts",
        "plan.drop_ratio = 0.95, allowed: at most 0.9",
        "federation.learning_rate = nan, allowed: a finite number",
        "federation.prox_weight = inf, allowed: a finite number",
    ):
        assert sum(fault in line for line in lines) == 1, fault
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"data": {"min_examples": 9, "train_examples": 8}}, "data.min_examples = 9, allowed: at most"),
        ({"serve": {"url": "localhost:80"}}, "serve.url = 'localhost:80', allowed: http://"),
        ({"federation": {"wire": "int8"}}, "federation.wire = 'int8', allowed: float32, ternary"),
        ({"federation": {"wire_density": 0.0}}, "federation.wire_density = 0.0, allowed: at least 1e-06"),
        ({"federation": {"wire_density": 1.5}}, "federation.wire_density = 1.5, allowed: at most 1.0"),
        ({"federation": {"wire_max_loss": -0.01}}, "federation.wire_max_loss = -0.01, allowed: at least 0.0"),
        ({"compress": {"device": "tpu"}}, "compress.device = 'tpu', allowed: auto, cpu, cuda"),
        ({"compress": {"clusters": 4}}, "compress.clusters = 4: only the method cluster has more than one"),
        ({"compress": {"max_error": 1.0}}, "compress.max_error = 1.0, allowed: below 1"),
        ({"compress": {"density": 0.0}}, "compress.density = 0.0, allowed: above 0"),
        (
            {"compress": {"method": "ternary", "max_error": 0.1}},
            "compress.max_error = 0.1: the method ternary",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match="configuration: ") as caught:
        configuration.from_dict(values)
    assert fault in str(caught.value)


def test_faults_of_several_keys_of_compress_come_together_with_the_others() -> None:
    values = {
        "data": {"min_examples": 9, "train_examples": 8},
        "compress": {"method": "svd", "ratio": 8, "max_bytes": 1000, "clusters": 2, "device": "tpu"},
    }
    with pytest.raises(ConfigError) as caught:
        configuration.from_dict(values, source="x.toml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("x.toml: ") for line in lines) and len(lines) == 4
    for fault in (
        "data.min_examples",
        "compress.ratio = 8.0, compress.max_bytes = 1000: a bundle has one target",
        "compress.clusters = 2",
        "compress.device = 'tpu'",
    ):
        assert sum(fault in line for line in lines) == 1, fault


@pytest.mark.parametrize(("name", "value"), [("max_bytes", 5000), ("max_error", 0.2)])
def test_a_target_that_is_given_takes_the_place_of_the_default_one(
    tmp_path: Path, name: str, value: float
) -> None:
    path = write(tmp_path, "")
    for config in (
        configuration.from_dict({"compress": {name: value}}),
        configuration.load(path, {f"compress.{name}": value}),
    ):
        assert (getattr(config.compress, name), config.compress.ratio) == (value, 0.0)
        assert configuration.from_dict(tomllib.loads(configuration.dump(config))) == config
    assert configuration.from_dict({"compress": {name: 0}}).compress.ratio == 16.0
    with pytest.raises(ConfigError, match=f"compress.ratio = 16.0, compress.{name}"):
        configuration.from_dict({"compress": {name: value, "ratio": 16.0}})


def test_compress_has_the_keys_and_values_of_the_library() -> None:
    ours, library = CompressConfig(), CompressOptions()
    names = [item.name for item in dataclasses.fields(library) if item.name != "seed"]
    assert [item.name for item in dataclasses.fields(ours)] == [*names, "whiten", "calibration_examples"]
    defaults = {name: getattr(library, name) for name in names}
    assert {name: getattr(ours, name) for name in names} == defaults | {"ratio": DEFAULT_RATIO}
    basis_bits, core_bits = get_args(BasisBits), get_args(CoreBits)
    assert (*QUANTISERS, *FLOATS) == basis_bits and (*COORDS, *FLOATS) == core_bits  # what there is code for
    for name, words in {"method": METHODS, "basis_bits": basis_bits, "core_bits": core_bits}.items():
        with pytest.raises(ConfigError, match=f"{name} = 0, allowed: {', '.join(map(str, words))}$"):
            configuration.from_dict({"compress": {name: 0}})
    assert CompressOptions.of(CompressConfig(rank=5), seed=7) == CompressOptions(
        rank=5, ratio=DEFAULT_RATIO, seed=7
    )


def test_the_forms_on_the_wire_are_those_the_library_knows() -> None:
    assert get_args(get_type_hints(FederationConfig)["wire"]) == (wire.FLOAT32, wire.TERNARY)
    assert FederationConfig().wire == wire.FLOAT32


@pytest.mark.parametrize(
    ("values", "near"),
    [
        ({"sede": 1}, "did you mean seed?"),
        ({"compress": {"max-error": 0.1}}, "compress. knows: method, .*; did you mean max_error?"),
        ({"federation": {"roundz": 1}}, "did you mean rounds?"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_one(values: dict[str, Any], near: str) -> None:
    with pytest.raises(ConfigError, match=near.replace("?", "[?]")):
        configuration.from_dict(values)
    with pytest.raises(ConfigError) as caught:
        configuration.from_dict({"zzzzzz": 1})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: LoraSettings(rank=0), "lora.rank = 0, allowed: at least 1"),
        (lambda: dataclasses.replace(Config().gate, max_relative_error="1"), "gate.max_relative_error = '1'"),
        (lambda: dataclasses.replace(Config(), seed=-1), "seed = -1, allowed: at least 0"),
        (lambda: Config(seed=2**63), f"seed = {2**63}, allowed: at most {2**63 - 1}"),
        (lambda: CompressOptions(rnak=3), "unknown key compress.rnak; compress. knows: method"),
    ],
)
def test_settings_made_in_code_are_checked_too(make: Callable[[], object], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(fault)


@pytest.mark.parametrize("name", ["default", "demo", "nightly", "tiny"])
def test_a_digest_is_that_of_the_plain_values(name: str) -> None:
    """Runs and training folders are named by digests: another way to work them out makes each a new one."""
    folder = Path(__file__).parents[2] / "configs"
    values = tomllib.loads((folder / "default.toml").read_text())
    for section, entry in tomllib.loads((folder / f"{name}.toml").read_text()).items():
        values[section] = values[section] | entry if isinstance(entry, dict) else entry
    config = configuration.load(folder / f"{name}.toml")
    basis = [key for key in values["federation"] if key.startswith("basis_")]
    for key in ("form", "cohort", *basis, "core_own_rank", "together"):  # where users train LoRAs
        del values["federation"][key]
    assert config.digest() == sha256(values)
    parts = ("seed", "frozen_dtype", "compute_dtype", "data", "plan", "lora", "align")
    training = {part: values[part] for part in parts}
    del training["align"]["device"]  # where, not what
    rounds = {key: value for key, value in values["federation"].items() if key not in OPERATIONAL}
    assert config.training_digest() == sha256(
        {**training, "model": values["base"]["model"], "federation": rounds}
    )


def sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("change", [{"wire": "ternary"}, {"wire_density": 0.1}, {"wire_max_loss": 0.0}])
def test_what_travels_decides_which_adapters_come_out(change: dict[str, Any]) -> None:
    """A run that sent float32 must not be taken for one that sent signs."""
    other = configuration.from_dict({"federation": change})
    assert other.training_digest() != Config().training_digest()
    slower = configuration.from_dict({"federation": {"timeout_s": 1}})
    assert slower.training_digest() == Config().training_digest()


def test_files_that_cannot_be_read_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        configuration.load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        configuration.load(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.toml: not TOML"):
        configuration.load(write(tmp_path, "seed = "))
    (tmp_path / "latin.toml").write_bytes(b'runs = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: not TOML"):
        configuration.load(tmp_path / "latin.toml")


@pytest.mark.parametrize("name", ["seed.x", "base.model.x"])
def test_an_override_below_a_value_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is a value, not a table"):
        configuration.load(write(tmp_path, 'seed = 1\n[base]\nmodel = "x"\n'), {name: 1})


@pytest.mark.parametrize("name", ["sead", "lora.rnak", "nowhere.rank"])
def test_an_override_of_an_unknown_key_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        configuration.load(write(tmp_path, ""), {name: 1})


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(1e-6, 1e300, allow_nan=False)


@settings(max_examples=100)
@given(text=texts, users=st.lists(texts, max_size=3), number=numbers, seed=st.integers(0, 2**40))
def test_dump_reads_back_to_the_same_values(text: str, users: list[str], number: float, seed: int) -> None:
    config = configuration.from_dict(
        {
            "seed": seed,
            "runs": text,
            "data": {"users": users, "source": text},
            "lora": {"alpha": number},
            "serve": {"canary_prompt": text},
        }
    )
    assert configuration.from_dict(tomllib.loads(configuration.dump(config))) == config
    assert configuration.from_dict(configuration.to_dict(config)) == config


def test_dump_survives_the_disk(tmp_path: Path) -> None:
    config = configuration.from_dict({"runs": '🦊\x7f\u2028\r\n"\\', "data": {"users": ["žluťoučký"]}})
    assert configuration.load(write(tmp_path, configuration.dump(config))) == config


def test_the_digest_sees_the_sections_it_is_given_and_no_other() -> None:
    one = Config()
    other = dataclasses.replace(one, seed=1)
    assert one.digest("base", "data") == other.digest("base", "data")
    assert one.digest("seed") != other.digest("seed")
    assert one.digest() != other.digest()
    assert one.digest() == Config().digest()
    assert len(one.digest()) == 16


def test_a_config_is_hashable_and_frozen() -> None:
    assert hash(Config()) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


def test_every_target_has_the_keys_of_its_section_but_for_its_own() -> None:
    serve = configuration.from_dict(
        {
            "serve": {
                "canary_tokens": 7,
                "targets": [
                    {"name": "one", "url": "http://a:1", "target": "lorax"},
                    {"name": "two", "url": "http://a:2", "canary_tokens": 2},
                ],
            }
        }
    ).serve
    one, two = serve.each()
    assert (one.label, one.canary_tokens, one.pushes_adapters) == ("one", 7, True)
    assert (two.label, two.canary_tokens, two.pushes_adapters) == ("two", 2, False)
    (alone,) = Config().serve.each()
    assert (alone.label, alone.url) == ("embedded", Config().serve.url)


def test_targets_survive_the_disk(tmp_path: Path) -> None:
    target = {"name": "a-b", "url": "http://a:1", "lorax_flags": ["--eager", 'x=\t"y'], "drain_s": 3}
    config = configuration.from_dict({"serve": {"targets": [target]}})
    assert configuration.load(write(tmp_path, configuration.dump(config))) == config
    assert config.digest("serve") != Config().digest("serve")


@pytest.mark.parametrize(
    ("serve", "told"),
    [
        ({"targets": [{}, {}]}, "serve.targets: name 'embedded' twice"),
        ({"targets": [{}, {"name": "x"}]}, "serve.targets: url 'http://127.0.0.1:8099' twice"),
        ({"targets": [{"url": "http://a"}, {"name": "x", "url": "http://a/"}]}, "url 'http://a' twice"),
        ({"targets": [{"nmae": "x"}]}, r"serve.targets\[0\]: unknown key nmae; .*did you mean name"),
        ({"targets": [{}, {"drain_s": -1}]}, r"serve.targets\[1\]: drain_s = -1, allowed: at least 0"),
        ({"targets": [{"targets": []}]}, r"serve.targets\[0\]: unknown key targets"),
        ({"form": "adapters"}, "serve.form = 'adapters': serve.target = 'embedded' takes bundles"),
        ({"targets": [{"target": "vllm", "form": "adapters"}]}, "serve.target = 'vllm' takes bundles"),
        ({"lorax_environment": ["A B=1"]}, "serve.lorax_environment = 'A B=1', allowed: NAME=VALUE"),
        ({"targets": ["x"]}, r"serve.targets\[0\] = 'x', allowed: an object"),
    ],
)
def test_a_wrong_target_is_named(serve: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        configuration.from_dict({"serve": serve})


@pytest.mark.parametrize("method", configuration.METHODS)
def test_every_method_goes_with_every_target(method: str) -> None:
    targets = [{}, {"target": "vllm", "name": "v", "url": "http://v"}, {"target": "lorax", "url": "http://l"}]
    for serve in ({"target": "vllm"}, {"targets": targets}):
        config = configuration.from_dict({"compress": {"method": method}, "serve": serve})
        assert config.compress.method == method
