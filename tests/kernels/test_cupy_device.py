"""CupyDevice over a stand-in for cupy: what it asks of it, in what order, and what becomes of its errors."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moss_jt.device import Place
from moss_jt.errors import DeviceMemoryError, KernelError
from moss_jt.kernels import cupy_device
from moss_jt.kernels.cuda import OPTIONS, SOURCES
from moss_jt.kernels.cupy_device import CupyDevice


class CudaError(RuntimeError):
    """Of the stand-in."""


class FakeCard:
    """cupy.cuda.Device."""

    def __init__(self, index: int) -> None:
        self.pci_bus_id = f"0000:0{1 + index}:00.0"


class FakeCupy:
    """Just what CupyDevice uses; everything that is asked for is noted."""

    def __init__(self, *, major: int = 8, free: int = 1 << 30, broken: bool = False) -> None:
        self.asked: list[Any] = []
        self.next_address, self.refuses = 0x1000, False
        self.broken = broken
        self.current, self.breaks = 0, False
        self.properties = {"name": b"A card", "major": major, "minor": 6}
        runtime = SimpleNamespace(
            CUDARuntimeError=CudaError,
            getDeviceProperties=self._properties,
            getDevice=lambda: self.current,
            setDevice=self._set_device,
            memGetInfo=lambda: (free, 2 * free),
            malloc=self._malloc,
            free=lambda address: self.asked.append(("free", address)),
            memcpyAsync=lambda *given: self.asked.append(("copy", *given)),
            hostRegister=self._register,
            hostUnregister=lambda address: self.asked.append(("unpin", address)),
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=FakeCard,
            Stream=self._stream,
            Event=self._event,
            function=SimpleNamespace(Module=self._module),
            nvrtc=SimpleNamespace(
                NVRTCError=CudaError,
                getVersion=lambda: (13, 0),
                getSupportedArchs=lambda: [75, 80, 86, 90],
                createProgram=self._program,
                compileProgram=lambda _text, options: self.asked.append(("compile", *options)),
                getCUBIN=lambda text: text.encode(),
                getProgramLog=lambda _text: "line 3: no such thing\n",
                destroyProgram=lambda _text: None,
            ),
        )

    def _properties(self, _index: int) -> dict[str, Any]:
        if self.broken:
            raise CudaError("no device")
        return self.properties

    def _set_device(self, index: int) -> None:
        self.current = index
        self.asked.append(("set", index))

    def _register(self, address: int, nbytes: int, flags: int) -> None:
        if self.refuses:
            raise CudaError("no more may be locked")
        self.asked.append(("pin", address, nbytes, flags))

    def _malloc(self, nbytes: int) -> int:
        if self.refuses:
            raise CudaError("out of memory")
        self.next_address += nbytes
        return self.next_address - nbytes

    def _stream(self, *, non_blocking: bool) -> Any:
        assert non_blocking
        number = sum(1 for each in self.asked if each == "stream")
        self.asked.append("stream")

        asked, cupy = self.asked, self

        class Stream:
            ptr = 100 + number
            capturing = False

            def wait_event(self, event: Any) -> None:
                asked.append(("follow", number, event.number))

            def synchronize(self) -> None:
                asked.append(("synchronize", number))

            def begin_capture(self) -> None:
                if cupy.refuses:
                    raise CudaError("no capture")
                self.capturing = True
                asked.append(("capture", number))
                if cupy.breaks:
                    raise KeyboardInterrupt

            def is_capturing(self) -> bool:
                return self.capturing

            def end_capture(self) -> Any:
                assert self.capturing
                self.capturing = False
                asked.append(("captured", number))
                return SimpleNamespace(launch=lambda stream: asked.append(("graph", stream.ptr)))

            def __enter__(self) -> None:
                asked.append(("current", number))

            def __exit__(self, *_: object) -> None:
                pass

        return Stream()

    def _event(self, *, disable_timing: bool) -> Any:
        assert disable_timing
        number = sum(1 for each in self.asked if each[0] == "record")
        return SimpleNamespace(
            number=number,
            record=lambda stream: self.asked.append(("record", stream.ptr)),
            synchronize=lambda: self.asked.append(("wait", number)),
        )

    def _program(self, text: str, name: str, headers: tuple[str, ...], includes: tuple[str, ...]) -> str:
        assert "MOSS_KERNEL" in text and name.endswith(".cu") and not headers and not includes
        return text

    def _module(self) -> Any:
        def load(code: bytes) -> None:
            assert b"MOSS_KERNEL" in code
            self.asked.append("load")

        return SimpleNamespace(load=load, get_function=lambda name: lambda *given: self._launch(name, *given))

    def _launch(self, name: str, *given: Any) -> None:
        if self.refuses:
            raise CudaError("invalid value")
        self.asked.append((name, *given))


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int | None]:
    """What NVML says is in use, call by call; at the end the last for ever. No device was opened before."""
    monkeypatch.setattr(cupy_device, "_own", {})
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    told: list[int | None] = [5000, 5000 + (100 << 20)]
    monkeypatch.setattr(cupy_device, "used_memory", lambda _bus: told.pop(0) if len(told) > 1 else told[0])
    return told


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def test_memory_is_counted_and_given_back(cupy: FakeCupy) -> None:
    device = CupyDevice(limit=1024 + (100 << 20))
    assert device.own_bytes == 100 << 20, "what came into use while it was opened"
    assert device.capacity == 1024
    first = device.allocate(1, "something small")
    assert device.allocate(500, "more") == first.after(256)
    assert device.taken == 768
    with pytest.raises(
        DeviceMemoryError, match=r"too much takes 0.5KiB of device memory, and of the 1KiB allowed 0.25KiB"
    ):
        device.allocate(257, "too much")
    cupy.refuses = True
    with pytest.raises(DeviceMemoryError, match=r"A card does not give 0.25KiB for the last \(out of memory\)"):
        device.allocate(256, "the last")
    assert device.taken == 768
    device.close()
    assert [each for each in cupy.asked if each[0] == "free"] == [
        ("free", first.address + 256),
        ("free", first.address),
    ]
    assert device.taken == 0


@pytest.mark.parametrize(
    ("said", "own"),
    [
        ([None, None], 1 << 30),  # all that is in use, as nobody tells whose it is
        ([1 << 30, 1 << 29], 512 << 20),
        ([9 << 30, (9 << 30) + 5], 512 << 20),  # torch or Jittor had opened the device before
        ([0, 5 << 30], 1 << 30),
        ([0, 90 << 20], 90 << 20),
    ],
)
def test_what_the_driver_takes_is_believed_within_reason(
    said: list[int | None], own: int, used: list[int | None], cupy: FakeCupy
) -> None:
    used[:] = said
    assert CupyDevice().own_bytes == own


def test_what_a_process_takes_once_counts_for_each_opening(used: list[int | None], cupy: FakeCupy) -> None:
    used[:] = [0, 480 << 20, 480 << 20]
    assert [CupyDevice().own_bytes for _ in range(2)] == [480 << 20] * 2


@pytest.mark.parametrize("limit", [1 << 40, 1 << 30, None])
def test_no_more_is_allowed_than_is_free_and_some_is_left_to_others(limit: int | None, cupy: FakeCupy) -> None:
    assert CupyDevice(limit=limit).capacity == (1 << 30) - (256 << 20)


def test_memory_is_pinned_until_the_end(
    cupy: FakeCupy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CupyDevice()
    first, second, third = (np.zeros(4096, np.uint8) for _ in range(3))
    alive = weakref.ref(second)
    alive_then: list[bool] = []
    unregister = cupy.cuda.runtime.hostUnregister

    def note(address: int) -> None:
        alive_then.append(alive() is not None)
        unregister(address)

    assert device.pin(first) and device.pin(second)
    assert ("pin", first.ctypes.data, 4096, 1) in cupy.asked
    device.unpin(first)
    cupy.refuses = True
    assert not device.pin(third)
    assert "4KiB of main memory cannot be pinned (no more may be locked)" in caplog.text
    cupy.asked.clear()
    address = second.ctypes.data
    del second
    monkeypatch.setattr(cupy.cuda.runtime, "hostUnregister", note)
    assert alive() is not None, "what the device may copy from stays"
    device.close()
    assert ("unpin", address) in cupy.asked and ("unpin", first.ctypes.data) not in cupy.asked
    assert cupy.asked.index(("synchronize", 1)) < cupy.asked.index(("unpin", address))
    assert alive_then == [True], "it goes only when the device no longer knows it"
    assert alive() is None


def test_launches_are_captured_on_the_computing_stream(cupy: FakeCupy) -> None:
    device = CupyDevice()
    cupy.asked.clear()
    graph = device.capture(lambda: device.launch("pointwise", "gelu", (1,), 256, ()))
    device.replay(graph)
    kinds = [each[0] for each in cupy.asked if each[0] != "current"]
    assert kinds == ["capture", "gelu", "captured", "graph"]
    assert cupy.asked[-1] == ("graph", 100)


def test_a_capture_always_ends(cupy: FakeCupy) -> None:
    """Ctrl-C may strike as it begins; the stream would capture whatever comes, for ever."""
    device = CupyDevice()
    cupy.breaks = True
    with pytest.raises(KeyboardInterrupt):
        device.capture(lambda: None)
    assert cupy.asked[-1] == ("captured", 0)
    cupy.refuses = True
    with pytest.raises(KernelError, match="A card failed at capturing: no capture"):
        device.capture(lambda: None)


def test_no_other_device_is_touched(cupy: FakeCupy) -> None:
    """CUDA sets a device up, some hundred megabytes, when it is made the current one: also to go back to it."""
    device = CupyDevice(1)
    device.launch("pointwise", "gelu", (1,), 256, ())
    device.write(device.allocate(32, "numbers"), np.zeros(8, np.float32))
    device.close()
    assert [each for each in cupy.asked if each[0] == "set"] == [("set", 1)]


def test_kernels_are_compiled_before_the_device_is_looked_at(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long, and what others take or give back meanwhile would count as ours."""
    seen: list[list[Any]] = []
    monkeypatch.setattr(cupy_device, "used_memory", lambda _bus: seen.append(list(cupy.asked)))
    CupyDevice()
    compiled = [[each[0] for each in asked].count("compile") for asked in seen]
    assert compiled == [len(SOURCES)] * 2
    assert ("load" in seen[0], "load" in seen[1]) == (False, True)


def test_copies_name_their_stream_and_wait_where_values_may_change(cupy: FakeCupy) -> None:
    device = CupyDevice()
    values, into = np.arange(8, dtype=np.float32), np.zeros(4, np.int8)
    cupy.asked.clear()
    device.write(Place(64), values, stream="copy", stays=True)
    device.write(Place(64), values)
    device.move(Place(1), Place(2), 3)
    device.read(Place(64), into)
    assert cupy.asked == [
        ("copy", 64, values.ctypes.data, 32, 1, 101),
        ("copy", 64, values.ctypes.data, 32, 1, 100),
        ("record", 100),
        ("wait", 0),
        ("copy", 2, 1, 3, 3, 100),
        ("copy", into.ctypes.data, 64, 4, 2, 100),
        ("record", 100),
        ("wait", 1),
    ]


def test_what_comes_back_early_does_not_wait_for_what_is_queued(cupy: FakeCupy) -> None:
    device = CupyDevice()
    ready, into = device.record("compute"), np.zeros(4, np.int8)
    cupy.asked.clear()
    device.fetch(Place(64), into, ready)
    kinds = [("follow", 2, 0), ("copy", into.ctypes.data, 64, 4, 2, 102), ("record", 102)]
    assert cupy.asked[:3] == kinds and cupy.asked[3][0] == "wait"


def test_streams_follow_events(cupy: FakeCupy) -> None:
    device = CupyDevice()
    cupy.asked.clear()
    device.follow("compute", device.record("copy"))
    assert cupy.asked == [("record", 101), ("follow", 0, 0)]


def test_sources_are_compiled_once_and_loaded_by_each(cupy: FakeCupy) -> None:
    for opened in (1, 2):
        device = CupyDevice()
        for _ in range(2):
            device.launch("pointwise", "gelu", (7,), 256, ())
        compiled = [each for each in cupy.asked if each[0] == "compile"]
        assert compiled == [("compile", *OPTIONS, "--gpu-architecture=sm_86")] * len(SOURCES)
        assert cupy.asked.count("load") == opened * len(SOURCES), "when it is opened"


def test_arguments_have_their_widths(cupy: FakeCupy) -> None:
    device = CupyDevice()
    device.launch("pointwise", "gelu", (7,), 256, (Place(1 << 40), None, 3, 0.5, np.int64(9)))
    name, grid, block, values = cupy.asked[-1]
    assert (name, grid, block) == ("gelu", (7, 1, 1), (256, 1, 1))
    assert [value.dtype.itemsize for value in values] == [8, 8, 4, 4, 8]
    assert [float(value) for value in values] == [float(1 << 40), 0, 3, 0.5, 9]
    assert ("current", 0) in cupy.asked
    cupy.refuses = True
    with pytest.raises(
        KernelError, match=r"gelu of pointwise.cu, grid \(7, 1, 1\), 256 threads, on A card: invalid value"
    ):
        device.launch("pointwise", "gelu", (7,), 256, ())


def test_old_devices_and_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(major=6))
    with pytest.raises(KernelError, match=r"A card is of compute capability 6.6; our kernels need 7.5. Use the CPU."):
        CupyDevice()
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(broken=True))
    with pytest.raises(KernelError, match="CUDA device 0 cannot be used: no device"):
        CupyDevice()


def test_what_is_not_there_or_does_not_compile_is_an_error_of_ours(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise CudaError("libnvrtc.so.13 is not there")

    monkeypatch.setattr(cupy.cuda.nvrtc, "compileProgram", failing)
    with pytest.raises(
        KernelError, match=r"attention.cu does not compile with NVRTC 13.0 and .*sm_86: line 3: no such"
    ):
        CupyDevice()
    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", failing)
    with pytest.raises(KernelError, match=r"CUDA device 0 cannot be used: libnvrtc.so.13 is not there"):
        CupyDevice()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(KernelError, match="CUDA device 0 cannot be used: import of cupy"):
        CupyDevice()


def test_errors_of_the_device_are_ours(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CupyDevice()

    def failing(*_: Any) -> None:
        raise CudaError("an illegal memory access")

    monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", failing)
    with pytest.raises(KernelError, match="A card failed at a copy of 3 bytes: an illegal memory access"):
        device.move(Place(1), Place(2), 3)
    with pytest.raises(KernelError, match="A card failed at what was queued: an illegal memory access"):
        device.wait(type("Event", (), {"synchronize": failing})())
