"""What every test may ask for: the golden data, a Jittor that runs, a home of its own.

Isolation: each test gets MOSS_JT_HOME in a temporary folder, so that nothing reads or writes what
belongs to the user. One thing is shared on purpose: Jittor's compiled core, which takes minutes to
build. In each of these folders `jittor` is a link to the one in the user's real home, so whatever
starts Jittor, in this process or in one that a test starts, uses that core and builds it there if need be.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from moss_jt import paths
from moss_jt.language import set_language

if TYPE_CHECKING:
    from moss_jt.runner import Model

SHARED_CORE = paths.jittor_home().resolve()  # found before any test moves the home
GOLDEN = Path(__file__).parent / "golden"


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that tests start inherit the difference


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--slow`."""
    parser.addoption("--slow", action="store_true", help="run the tests that take more than a minute, too")


def has_device() -> bool:
    """Whether an NVIDIA driver answers with a device."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return answer.returncode == 0 and "GPU" in answer.stdout


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this run or this machine cannot do."""
    device: bool | None = None
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if item.get_closest_marker("gpu"):
            device = has_device() if device is None else device
            if not device:
                item.add_marker(pytest.mark.skip(reason="no CUDA device answers on this machine"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference data; its README says what each array is."""
    return GOLDEN


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A MOSS_JT_HOME that only this test has, but for the compiled Jittor."""
    folder = tmp_path_factory.mktemp("home")
    SHARED_CORE.mkdir(parents=True, exist_ok=True)
    (folder / "jittor").symlink_to(SHARED_CORE)
    monkeypatch.setenv(paths.HOME_VARIABLE, str(folder))
    return folder


@pytest.fixture
def jittor(own_home: Path) -> ModuleType:
    """Jittor on the CPU, started as the product starts it; the first call starts it for the whole run."""
    from moss_jt.startup import import_jittor

    return import_jittor(device="cpu")


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words in English, whatever the locale and whatever the test before chose."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    set_language(None)


@pytest.fixture(scope="session")
def golden_model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Loads a golden checkpoint by its folder ("tiny-int4/g32"), converted once a run; exact compute."""
    from moss_jt.converters.hf2jittor import hf2jittor
    from moss_jt.load import load_model

    folder = tmp_path_factory.mktemp("native")
    loaded: dict[str, Model] = {}

    def load(name: str) -> Model:
        if name not in loaded:
            target = folder / name.replace("/", "-")
            hf2jittor(golden / name, target)
            loaded[name] = load_model(target)
        return loaded[name]

    return load
