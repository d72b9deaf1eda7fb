"""What is refused before a server starts, and that an idle plugin does nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from soppu.errors import ConfigError
from soppu.serve import vllm_plugin
from soppu.serve.vllm_plugin import host, settings


def test_another_vllm_is_refused_with_both_versions_named() -> None:
    host.check_version("0.32.0")
    host.check_version("0.32.1+cpu")
    for found in ("0.31.2", "0.34.0", "0.3.3", "1.0"):
        with pytest.raises(ConfigError, match=rf"supports vLLM 0\.27\.x, 0\.32\.x, 0\.33\.x; found {found}"):
            host.check_version(found)


def config(*, lora: object = None, speculative: object = None, **parallel: object) -> SimpleNamespace:
    whole = {"pipeline_parallel_size": 1, "_api_process_count": 1, "enable_dbo": False}
    whole["prefill_context_parallel_size"] = 1
    return SimpleNamespace(
        lora_config=lora,
        speculative_config=speculative,
        parallel_config=SimpleNamespace(**(whole | parallel)),
    )


def test_options_that_cannot_be_served_under_are_named() -> None:
    host.check_options(config(speculative=SimpleNamespace(method="ngram")))
    adaptive = SimpleNamespace(enable_adaptive_verification=True)
    for wrong, said in (
        (config(lora=object()), "--enable-lora"),
        (config(pipeline_parallel_size=2), "--pipeline-parallel-size 2"),
        (config(_api_process_count=3), "--api-server-count 3"),
        (config(enable_dbo=True), "--enable-dbo"),
        (config(prefill_context_parallel_size=2), "prefill context parallel"),
        (config(speculative=adaptive), "enable_adaptive_verification"),
    ):
        with pytest.raises(ConfigError, match=said):
            host.check_options(wrong)


def test_ray_s_workers_get_our_variables_beside_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    monkeypatch.setenv(name, "MY_")
    host.share_environment()
    host.share_environment()
    assert os.environ[name] == "MY_,SOPPU_"


def test_without_a_bundle_the_plugin_imports_and_changes_nothing() -> None:
    program = (
        "import sys; from soppu.serve.vllm_plugin import register; before = set(sys.modules); register();"
        "assert set(sys.modules) == before, set(sys.modules) - before; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(Path.cwd())})


def test_with_a_bundle_and_no_vllm_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if host.installed():
        pytest.skip("vLLM is installed in this environment")
    monkeypatch.setenv("SOPPU_BUNDLE", "any")
    with pytest.raises(ConfigError, match=r"supports vLLM .*; found none"):
        vllm_plugin.register()


def test_settings_name_the_variable_and_what_is_allowed(tmp_path: Path) -> None:
    bundle = tmp_path / "b.soppu"
    bundle.touch()
    state = {"XDG_STATE_HOME": str(tmp_path)}
    found = settings.read(
        {"SOPPU_BUNDLE": str(bundle), "SOPPU_MAX_ERROR": "0.25", "SOPPU_SPARE_ROWS": "3", **state}
    )
    assert found.state.parent == tmp_path / "soppu" / "vllm" and not found.registry
    other = settings.read({"SOPPU_FOLLOW": "s3://bucket/registry", **state})
    assert other.bundle == other.registry == other.follow == "s3://bucket/registry"
    assert other.state.parent == found.state.parent and other.state != found.state
    assert settings.read({"SOPPU_BUNDLE": str(tmp_path), "SOPPU_STATE": "/kept"}).state == Path("/kept")
    assert (found.bundle, found.max_error, found.spare_rows, found.kernel) == (bundle, 0.25, 3, "auto")
    for name, value, message in (
        ("SOPPU_MAX_ERROR", "two", r"SOPPU_MAX_ERROR='two': a number is needed"),
        ("SOPPU_MAX_ERROR", "nan", r"SOPPU_MAX_ERROR='nan'"),
        ("SOPPU_SPARE_ROWS", "-1", r"SOPPU_SPARE_ROWS='-1': a whole number"),
        ("SOPPU_MODELS_LIMIT", "0", r"SOPPU_MODELS_LIMIT='0': a whole number, 1 or more"),
        ("SOPPU_FOLLOW_SECONDS", "soon", r"SOPPU_FOLLOW_SECONDS='soon': a number is needed"),
        ("SOPPU_FOLLOW_SECONDS", "0", r"SOPPU_FOLLOW_SECONDS=0.0: seconds between 0.1 and 86400"),
        ("SOPPU_RESIDENT_MIB", "1.5", r"SOPPU_RESIDENT_MIB='1.5': a whole number"),
        ("SOPPU_READ_AHEAD", "yes", r"SOPPU_READ_AHEAD='yes': allowed are 0 and 1"),
        ("SOPPU_KERNEL", "fast", r"SOPPU_KERNEL='fast': allowed are auto, native, torch, static"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings.read({"SOPPU_BUNDLE": str(bundle), name: value})
    with pytest.raises(ConfigError, match="SOPPU_BUNDLE: no such file or registry"):
        settings.read({"SOPPU_BUNDLE": str(tmp_path / "none")})


def test_the_page_names_every_variable_and_kernel() -> None:
    page = (Path(__file__).parents[4] / "docs" / "vllm.md").read_text()
    source = Path(settings.__file__).read_text()
    variables = set(re.findall(r"SOPPU_[A-Z_]+", source))
    assert len(variables) == 12 and all(f"`{name}`" in page for name in variables)
    assert all(f"`{kernel}`" in page for kernel in settings.KERNELS)
