"""The plan: which device and why, and a key that changes whenever the compiled core would."""

from __future__ import annotations

from pathlib import Path

import pytest

from moss_jt.errors import StartupError
from moss_jt.startup import plan
from moss_jt.startup.cuda_home import CudaHome
from moss_jt.startup.gpu import Driver, Gpu
from moss_jt.startup.plan import make_plan
from moss_jt.startup.toolkit import Toolkit

NEW = Driver((13, 0), (Gpu("New card", 8 << 30, (9, 0)),))
OLD = Driver((12, 4), (Gpu("Old card", 8 << 30, (7, 0)),))
NONE = Driver(problem="no CUDA driver (libcuda.so.1) on this machine")


def home_of(folder: Path) -> CudaHome:
    toolkit = Toolkit(Path("/cuda/bin/nvcc"), Path("/cuda"), (13, 0))
    return CudaHome(folder / "cuda" / "13.0-x", toolkit, "New card (sm_90)", (), {})


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver, cuda: CudaHome | str) -> None:
    monkeypatch.setattr(plan, "ask_driver", lambda: driver)
    monkeypatch.setattr(plan, "plan_cuda_home", lambda parent, driver: cuda)


def test_no_device_means_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NONE, "not asked")
    made = make_plan("auto")
    assert (made.device, made.reason, made.cuda) == ("cpu", "no CUDA driver (libcuda.so.1) on this machine", None)
    assert made.variables["nvcc_path"] == ""


def test_old_device_means_the_cpu_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, OLD, "not asked")
    assert make_plan("auto").reason == "Old card is sm_70, our kernels need sm_75 or newer"


def test_cuda_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NONE, "not asked")
    with pytest.raises(
        StartupError, match=r"^CUDA was asked for, but no CUDA driver \(libcuda\.so\.1\) on this machine$"
    ):
        make_plan("cuda")


def test_device_without_a_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NEW, "a toolkit is needed: pip install it")
    assert make_plan("auto").reason == "a toolkit is needed: pip install it"
    with pytest.raises(StartupError, match="CUDA was asked for, but a toolkit is needed: pip install it"):
        make_plan("cuda")


def test_device_and_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, NEW, home_of(tmp_path))
    made = make_plan("auto")
    assert made.device == "cuda"
    assert made.reason == "New card (sm_90), CUDA 13.0 in /cuda"
    assert made.variables["nvcc_path"] == str(tmp_path / "cuda" / "13.0-x" / "bin" / "nvcc")
    assert make_plan("cpu").device == "cpu"
    assert make_plan("cpu").key != made.key


def test_stray_nvcc_without_a_device_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, NONE, home_of(tmp_path))
    assert make_plan("auto").variables["nvcc_path"] == ""


def test_nothing_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_onednn", lambda: None)
    monkeypatch.setattr(plan, "is_linked", lambda home: False)
    variables = make_plan("cpu").variables
    assert {variables[name] for name in ("use_mkl", "use_cutlass", "use_cutt", "use_nccl", "use_mpi")} == {"0"}
    assert variables["HOME"] == variables["JITTOR_HOME"]


def test_onednn_that_another_venv_brought_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_onednn", lambda: None)
    monkeypatch.setattr(plan, "is_linked", lambda home: True)
    assert make_plan("cpu").variables["use_mkl"] == "1"


def test_several_devices_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Driver((12, 4), (*NEW.gpus, *OLD.gpus)), "not asked")
    assert make_plan("auto").reason.endswith("our kernels need sm_75 or newer; hide it with CUDA_VISIBLE_DEVICES")


def test_user_s_threads_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    key = make_plan("cpu").key
    assert make_plan("cpu").variables["OMP_WAIT_POLICY"] == "passive"
    assert int(make_plan("cpu").variables["OMP_NUM_THREADS"]) >= 1
    assert 0 < int(make_plan("cpu").variables["GOMP_SPINCOUNT"]) <= 3000
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(make_plan("cpu").variables)
    assert make_plan("cpu").key == key


def test_key_follows_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_plan("cpu")
    keys = [first.key]
    assert make_plan("cpu").key == keys[0]
    for place, value in (
        ("moss_jt.startup.plan.shadow_hash", "0123456789abcdef"),
        ("moss_jt.startup.machine.processor", "another processor"),
        ("moss_jt.startup.plan.copy_name", "1.3.11.0-another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_, value=value: value)
            keys.append(make_plan("cpu").key)
    with monkeypatch.context() as patch:  # Jittor's own key does not know the instruction sets
        patch.setattr("moss_jt.startup.machine.processor", lambda: "model name: the same\nflags: fewer")
        assert make_plan("cpu").variables["cache_name"] != first.variables["cache_name"]
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "another host")
        keys.append(make_plan("cpu").key)
    assert len(set(keys)) == 5
