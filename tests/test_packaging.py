"""What pip installs is the whole product: every module, every header, both commands, nothing else."""

from __future__ import annotations

import configparser
import email
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("moss_jt", "converters", "kernels", "cli")
BESIDE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, so that no build/ or egg-info is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=ignore)
    for name in BESIDE:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from that copy."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("wheel") is None:
        pytest.skip("setuptools and wheel are not installed, and without network they cannot be fetched")
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def expected_files(source: Path) -> set[str]:
    """Names in the wheel: every file of the four folders, the rooms below moss_jt, links not followed."""
    names = set()
    for part in PARTS:
        for file in (source / part).rglob("*"):
            inside = file.relative_to(source)
            if file.is_file() and file.resolve() == file:
                names.add(inside.as_posix() if part == "moss_jt" else f"moss_jt/{inside.as_posix()}")
    return names


def read_metadata(wheel: Path, name: str) -> str:
    """A file of the wheel's dist-info folder."""
    with zipfile.ZipFile(wheel) as archive:
        (found,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(found).decode("utf-8")


def test_wheel_holds_everything_and_nothing_else(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected_files(source)
    assert any(name.startswith("moss_jt/kernels/cpu/") and name.endswith(".h") for name in packed)


def test_wheel_holds_the_small_model_in_less_than_12_mb(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {info.filename: info.compress_size for info in archive.infolist() if "moss_jt/tiny/" in info.filename}
    assert {"moss_jt/tiny/config.json", "moss_jt/tiny/tokenizer.model", "moss_jt/tiny/LICENSE"} <= set(packed)
    assert sum(packed.values()) < 12_000_000


def test_wheel_gives_one_top_level_name(wheel: Path) -> None:
    assert read_metadata(wheel, "top_level.txt").split() == ["moss_jt"]
    assert "py3-none-any" in wheel.name


def test_wheel_names_both_commands(wheel: Path) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(read_metadata(wheel, "entry_points.txt"))
    commands = dict(scripts["console_scripts"])
    assert set(commands) == {"moss-jt", "moss-convert"}
    with zipfile.ZipFile(wheel) as archive:
        for target in commands.values():
            module, function = target.split(":")
            stem = module.replace(".", "/")
            (file,) = {f"{stem}.py", f"{stem}/__init__.py"} & set(archive.namelist())
            assert f"def {function}(" in archive.read(file).decode("utf-8"), f"{target} is not there"


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    metadata = email.message_from_string(read_metadata(wheel, "METADATA"))
    assert metadata["Name"] == "moss-jt"
    assert sorted(metadata["Requires-Python"].split(",")) == ["<3.14", ">=3.10"]
    needs = [re.split(r"[ ;<>=!\[(]", need)[0].lower() for need in metadata.get_all("Requires-Dist", [])]
    assert "jittor" in needs
    assert not {"torch", "transformers", "cupy", "deepspeed"} & set(needs)
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]


def test_installed_package_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import moss_jt, moss_jt.converters, moss_jt.kernels, moss_jt.cli.main as m; from importlib.resources import files;"
        "print(files('moss_jt.kernels').joinpath('cpu').is_dir(), m.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", str(tmp_path / "moss_jt" / "cli" / "main.py")]
