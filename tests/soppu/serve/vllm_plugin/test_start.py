"""What is refused before a server starts, and that an idle plugin does nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from soppu.errors import ConfigError
from soppu.serve import vllm_plugin
from soppu.serve.vllm_plugin import host, settings


def test_another_vllm_is_refused_with_both_versions_named() -> None:
    host.check_version("0.32.0")
    host.check_version("0.32.1+cpu")
    for found in ("0.31.2", "0.33.0", "1.0"):
        with pytest.raises(ConfigError, match=rf"supports vLLM 0\.32\.x, found {found}"):
            host.check_version(found)


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
    with pytest.raises(ConfigError, match=r"supports vLLM 0\.32\.x, found none"):
        vllm_plugin.register()


def test_settings_name_the_variable_and_what_is_allowed(tmp_path: Path) -> None:
    bundle = tmp_path / "b.soppu"
    bundle.touch()
    found = settings.read({"SOPPU_BUNDLE": str(bundle), "SOPPU_MAX_ERROR": "0.25", "SOPPU_SPARE_ROWS": "3"})
    assert (found.bundle, found.max_error, found.spare_rows, found.kernel) == (bundle, 0.25, 3, "auto")
    for name, value, message in (
        ("SOPPU_MAX_ERROR", "two", r"SOPPU_MAX_ERROR='two': a relative error between 0 and 1"),
        ("SOPPU_MAX_ERROR", "nan", r"SOPPU_MAX_ERROR='nan'"),
        ("SOPPU_SPARE_ROWS", "-1", r"SOPPU_SPARE_ROWS='-1': a whole number"),
        ("SOPPU_RESIDENT_MIB", "1.5", r"SOPPU_RESIDENT_MIB='1.5': a whole number"),
        ("SOPPU_KERNEL", "fast", r"SOPPU_KERNEL='fast': allowed are auto, native, torch, static"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings.read({"SOPPU_BUNDLE": str(bundle), name: value})
    with pytest.raises(ConfigError, match="SOPPU_BUNDLE: no such file"):
        settings.read({"SOPPU_BUNDLE": str(tmp_path / "none")})


def test_the_page_names_every_variable_and_kernel() -> None:
    page = (Path(__file__).parents[4] / "docs" / "vllm.md").read_text()
    source = Path(settings.__file__).read_text()
    variables = set(re.findall(r"SOPPU_[A-Z_]+", source))
    assert len(variables) == 6 and all(f"`{name}`" in page for name in variables)
    assert all(f"`{kernel}`" in page for kernel in settings.KERNELS)
