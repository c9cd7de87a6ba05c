"""The private CUDA folder, made from stand-ins of toolkits 11 to 13, and from the real nvcc where there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_machine import install_wheel, make_toolkit

from moss_jt.errors import StartupError
from moss_jt.startup import cuda_home, toolkit
from moss_jt.startup.cuda_home import CudaHome
from moss_jt.startup.gpu import Driver, Gpu

GPU = Gpu("Test card", 8 << 30, (9, 0))


def plan(folder: Path, monkeypatch: pytest.MonkeyPatch, *nvccs: Path, driver: int = 13) -> CudaHome | str:
    found = [toolkit.inspect_nvcc(nvcc) for nvcc in nvccs]
    monkeypatch.setattr(cuda_home, "find_toolkits", lambda: [one for one in found if one])
    return cuda_home.plan_cuda_home(folder / "homes", Driver((driver, 0), (GPU,)))


def made(folder: Path, monkeypatch: pytest.MonkeyPatch, nvcc: Path) -> CudaHome:
    home = plan(folder, monkeypatch, nvcc)
    assert isinstance(home, CudaHome)
    cuda_home.make_cuda_home(home)
    return home


@pytest.mark.parametrize("release", ["11.8", "12.4", "13.0"])
def test_links_of_a_whole_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    home = made(tmp_path, monkeypatch, make_toolkit(tmp_path / "cuda", release))
    major = release.split(".", maxsplit=1)[0]
    assert (home.root / "include" / "cublas_v2.h").read_text("ascii") == "// stand-in\n"
    assert {file.name for file in (home.root / "lib64").iterdir()} == {
        f"lib{name}.so{ending}" for name in ("cudart", "cublas", "curand") for ending in ("", f".{major}")
    }
    assert "NPP_MAX_32S" in (home.root / "include" / "npp.h").read_text("utf-8")
    assert "counting_iterator" in (home.root / "include" / "cub" / "cub.cuh").read_text("utf-8")
    assert home.describe() == f"Test card (sm_90), CUDA {release} in {tmp_path / 'cuda'}"


def test_toolkit_s_own_headers_are_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = make_toolkit(tmp_path / "cuda", "12.4")
    (tmp_path / "cuda" / "include" / "cub").mkdir()
    (tmp_path / "cuda" / "include" / "npp.h").write_text("// its own\n", "ascii")
    home = made(tmp_path, monkeypatch, nvcc)
    assert (home.root / "include" / "cub").resolve() == tmp_path / "cuda" / "include" / "cub"
    assert (home.root / "include" / "npp.h").read_text("ascii") == "// its own\n"


@pytest.mark.parametrize(
    ("release", "wheel", "place"),
    [("13.0", "nvidia-cublas", "nvidia/cu13"), ("12.4", "nvidia-cublas-cu12", "nvidia/cublas")],
)
def test_libraries_of_wheels_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, wheel: str, place: str
) -> None:
    major = release.split(".", maxsplit=1)[0]
    nvcc = make_toolkit(tmp_path / "cuda", release, libraries=("cudart", "curand"))
    (tmp_path / "cuda" / "include" / "cublas_v2.h").unlink()
    files = {f"{place}/lib/libcublas.so.{major}": "wheel", f"{place}/include/cublas_v2.h": "wheel"}
    install_wheel(tmp_path / "site", wheel, release, files)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    home = made(tmp_path, monkeypatch, nvcc)
    assert (home.root / "lib64" / "libcublas.so").read_text("ascii") == "wheel"
    assert (home.root / "include" / "cublas_v2.h").read_text("ascii") == "wheel"


def test_missing_libraries_are_named_with_their_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = make_toolkit(tmp_path / "cuda", "12.4", libraries=("cudart",))
    assert plan(tmp_path, monkeypatch, nvcc) == (
        f"CUDA 12.4 in {tmp_path / 'cuda'} has no cublas and curand: "
        f"{sys.executable} -m pip install 'nvidia-cublas-cu12' 'nvidia-curand-cu12'"
    )


def test_no_toolkit_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = plan(tmp_path, monkeypatch)
    assert isinstance(message, str)
    assert message.startswith("a CUDA toolkit 11 to 13 with nvcc is needed, found none: ")
    assert "pip install 'nvidia-cuda-nvcc'" in message


def test_toolkit_newer_than_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = plan(tmp_path, monkeypatch, make_toolkit(tmp_path / "cuda", "13.0"), driver=12)
    assert isinstance(message, str)
    assert message.startswith(f"a CUDA toolkit 11 to 12 with nvcc is needed, found 13.0 in {tmp_path / 'cuda'}: ")


def options_of(home: CudaHome, *options: str) -> str:
    """What nvcc itself is called with when the wrapper is called with these options."""
    calls = home.toolkit.top / "calls"
    calls.unlink()
    subprocess.run([str(home.nvcc), *options], check=True)
    return calls.read_text("utf-8").strip().partition(shutil.which("g++") or "g++")[2].strip()


def test_wrapper_of_cuda_13(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = made(tmp_path, monkeypatch, make_toolkit(tmp_path / "cuda", "13.0"))
    jittor_s = [
        "a b.cu",
        "-std=c++14",
        "-iquote/x",
        "-ccbin=/usr/bin/g++",
        "-arch=compute_75",
        "-code=sm_75",
        "-code=sm_90",
    ]
    assert options_of(home, *jittor_s) == (
        "a b.cu -std=c++17 -Xcompiler -iquote/x -arch=compute_75 -code=sm_75,compute_75 -code=sm_90"
    )


def test_wrapper_of_cuda_12_keeps_the_standard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = made(tmp_path, monkeypatch, make_toolkit(tmp_path / "cuda", "12.4"))
    assert options_of(home, "-std=c++14", "-code=sm_90") == "-std=c++14 -code=sm_90"


def test_host_compiler_that_nvcc_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = make_toolkit(tmp_path / "cuda", "11.8")
    newest = shutil.which("g++")
    (tmp_path / "cuda" / "refuses").write_text(str(newest), "ascii")
    monkeypatch.setattr(cuda_home, "_HOST_COMPILERS", ("g++", "gcc"))
    home = made(tmp_path, monkeypatch, nvcc)
    assert f"-ccbin {shutil.which('gcc')} " in home.nvcc.read_text("utf-8")


def test_no_host_compiler_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = make_toolkit(tmp_path / "cuda", "11.8")
    (tmp_path / "cuda" / "refuses").write_text(str(shutil.which("g++")), "ascii")
    monkeypatch.setattr(cuda_home, "_HOST_COMPILERS", ("g++",))
    with pytest.raises(StartupError, match=r"works with no C\+\+ compiler here \(error: unsupported GNU version\)"):
        made(tmp_path, monkeypatch, nvcc)
    assert not list((tmp_path / "homes").iterdir())


def test_home_is_made_again_when_its_links_dangle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = make_toolkit(tmp_path / "cuda", "12.4")
    home = made(tmp_path, monkeypatch, nvcc)
    (home.root / "lib64" / "libcublas.so.12").unlink()
    (home.root / "lib64" / "libcublas.so.12").symlink_to(tmp_path / "gone")
    cuda_home.make_cuda_home(home)
    assert (home.root / "lib64" / "libcublas.so.12").exists()


def test_name_changes_with_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = plan(tmp_path, monkeypatch, make_toolkit(tmp_path / "one", "12.4"))
    two = plan(tmp_path, monkeypatch, make_toolkit(tmp_path / "two", "12.4"))
    assert isinstance(one, CudaHome)
    assert isinstance(two, CudaHome)
    assert one.root != two.root


@pytest.mark.slow
def test_real_nvcc_compiles_what_jittor_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real toolkit, with empty stand-ins for cublas and curand where it has none."""
    real = next(iter(toolkit.find_toolkits()), None)
    if real is None:
        pytest.skip("no nvcc on this machine")
    major = real.version[0]
    place = f"nvidia/cu{major}"
    stubs = {f"{place}/lib/lib{name}.so.{major}": "" for name in ("cudart", "cublas", "curand")}
    stubs |= {f"{place}/include/{name}": "" for name in ("cublas_v2.h", "curand.h")}
    install_wheel(tmp_path / "site", "nvidia-stubs", "1", stubs)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setattr(cuda_home, "wheel_folders", lambda major: [tmp_path / "site" / place])
    home = made(tmp_path, monkeypatch, real.nvcc)
    source = tmp_path / "kernel.cu"
    source.write_text(
        "#include <npp.h>\n#include <cub/cub.cuh>\n"
        "__global__ void lane(unsigned* out) { *out = cub::LaneId() + NPP_MAX_32S; }\n"
        "cub::Max largest; cub::Min smallest; cub::Sum sum; cub::CountingInputIterator<int> counting(0);\n",
        "ascii",
    )
    options = ["-std=c++14", "-w", "-arch=compute_90", "-code=sm_90", f"-I{home.root}/include", f"-iquote{tmp_path}"]
    subprocess.run([str(home.nvcc), *options, "-c", str(source), "-o", str(tmp_path / "kernel.o")], check=True)
    assert (tmp_path / "kernel.o").stat().st_size > 1000
