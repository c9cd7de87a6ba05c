"""`moss-jt doctor`: findings as data, and on the screen in two languages."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
from click.testing import CliRunner

from moss_jt import doctor
from moss_jt.cli.doctor import command
from moss_jt.cli.warmup import command as warmup
from moss_jt.doctor import Finding
from moss_jt.errors import StartupError
from moss_jt.language import set_language
from moss_jt.startup.gpu import Driver, Gpu

ROOT = str(Path(__file__).parent.parent)
IDS = [
    "python", "python_headers", "compiler", "numpy", "jittor", "jittor_core", "onednn",
    "cuda_driver", "cuda_toolkit", "device", "cupy", "memory", "disk", "cache",
]  # fmt: skip
CARD = Driver((12, 4), (Gpu("Test card", 8 << 30, (8, 6)),))


def finding(name: str) -> Finding:
    return next(one for one in doctor.examine() if one.id == name)


def test_all_is_looked_at_without_jittor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_jittor", lambda **_: pytest.fail("started Jittor"))
    assert [one.id for one in doctor.examine()] == IDS


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = finding("compiler")
    assert (found.state, found.fix) == ("fail", "apt install g++")
    assert not doctor.is_healthy(doctor.examine())
    assert finding("jittor_core").state == "fail"


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moss_jt.startup.machine.include_folders", lambda: [tmp_path])
    found = finding("python_headers")
    assert found.state == "fail"
    assert found.fix
    assert found.fix.startswith("apt install python3")


def test_wrong_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.startup.machine.numpy_version", lambda: "1.24.0")
    found = finding("numpy")
    assert (found.value, found.state) == ("1.24.0", "fail")
    assert found.fix == f"{sys.executable} -m pip install 'numpy>=1.26,<3'"


def test_no_jittor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert (finding("jittor").state, finding("jittor").value) == ("fail", "not installed")


def test_no_onednn_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.startup.onednn.find_onednn", lambda: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = finding("onednn")
    assert found.state == "warn"
    assert found.fix
    assert "'onednn-cpu-gomp==2021.2.0' 'onednn-devel-cpu-gomp==2021.2.0'" in found.fix


def test_card_without_a_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ask_driver", lambda: CARD)
    monkeypatch.setattr(doctor, "find_toolkits", list)
    monkeypatch.setattr("moss_jt.startup.cuda_home.find_toolkits", list)
    assert finding("cuda_driver").value == "CUDA 12.4: Test card 8.0 GiB sm_86"
    assert finding("cuda_toolkit").state == "warn"
    assert finding("cuda_toolkit").fix == "apt install nvidia-cuda-toolkit, or a newer driver"
    assert finding("device").value.startswith("CPU, ")


def test_card_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ask_driver", lambda: CARD)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert finding("cupy").fix == f"{sys.executable} -m pip install 'cupy-cuda12x'"


def test_card_with_cupy_whose_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """cupy loads without it, so that it is there says nothing."""
    monkeypatch.setattr(doctor, "ask_driver", lambda: CARD)
    versions = {"cupy-cuda12x": "13.6.0"}
    monkeypatch.setattr("moss_jt.startup.machine.installed_version", versions.get)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)

    def get_version() -> tuple[int, int]:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    nvrtc = SimpleNamespace(getVersion=get_version, getSupportedArchs=lambda: [75])
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc)))
    found = finding("cupy")
    assert found.state == "warn"
    assert "CuPy failed to load libnvrtc.so.12" in found.value
    assert found.fix == f"{sys.executable} -m pip install 'nvidia-cuda-nvrtc-cu12'"
    nvrtc.getVersion = lambda: (12, 9)
    assert (finding("cupy").state, finding("cupy").value) == ("ok", "cupy-cuda12x 13.6.0, NVRTC 12.9")


def test_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.startup.machine.free_bytes", lambda folder: 3 << 30)
    assert finding("disk").state == "warn"
    monkeypatch.setattr("moss_jt.startup.machine.free_bytes", lambda folder: 1 << 20)
    assert finding("disk").state == "fail"


def test_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "ascii")
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "file"))
    found = finding("cache")
    assert found.state == "fail"
    assert found.fix == "export MOSS_JT_HOME=/a/folder/that/you/can/write"


def test_deep_tells_what_stands_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise StartupError("it needs a thing: apt install thing")

    monkeypatch.setattr(doctor, "import_jittor", refuse)
    last = doctor.examine(deep=True)[-1]
    assert last == Finding(
        "self_check", "Self-check", "it needs a thing: apt install thing", "fail", "apt install thing"
    )


def test_deep_starts_jittor(jittor: object) -> None:
    last = doctor.examine(deep=True)[-1]
    assert (last.id, last.state) == ("self_check", "ok")
    assert last.value.endswith("computes correctly")


def test_json_is_whole() -> None:
    result = CliRunner().invoke(command, ["--json"], standalone_mode=False)
    report = json.loads(result.stdout)
    assert [one["id"] for one in report["findings"]] == IDS
    assert all(set(one) == {"id", "title", "value", "state", "fix"} for one in report["findings"])
    assert report["healthy"] is all(one["state"] != "fail" for one in report["findings"])


def test_one_screen_in_two_languages() -> None:
    english = CliRunner().invoke(command, [], standalone_mode=False).stdout
    set_language("zh")
    chinese = CliRunner().invoke(command, [], standalone_mode=False).stdout
    assert "C++ compiler: g++" in english
    assert "C++ 编译器: g++" in chinese
    assert max(len(english.splitlines()), len(chinese.splitlines())) <= 40


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape codes came to a terminal that asked for none."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    cases: list[tuple[dict[str, str], bool]] = [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
    for variables, coloured in cases:
        environment = {**os.environ, "PYTHONPATH": ROOT, "TERM": "xterm", **variables}
        shown = pexpect.run(f"{sys.executable} -m moss_jt.cli doctor", env=environment, timeout=60)
        assert b"Python headers" in shown
        assert (b"\x1b[" in shown) is coloured


def test_exit_code_follows_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda **_: [Finding("x", "X", "broken", "fail", "mend it")])
    result = CliRunner().invoke(command, [], standalone_mode=False)
    assert result.return_value == 1
    assert result.stdout == "✗ X: broken\n    → mend it\n1 to mend before moss-jt can start.\n"


def test_warmup_says_that_it_is_ready(jittor: object) -> None:
    result = CliRunner().invoke(warmup, [], standalone_mode=False)
    assert result.exception is None
    assert result.stdout.startswith("Ready on cpu (")
