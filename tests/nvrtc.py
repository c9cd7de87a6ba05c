"""NVRTC, the compiler that cupy uses, called by itself: it needs neither a driver nor a device."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path


@cache
def library() -> ctypes.CDLL:
    """The library of the wheel nvidia-cuda-nvrtc, which belongs to the extra `test`."""
    files = metadata.files("nvidia-cuda-nvrtc") or []
    found = [Path(str(file.locate())) for file in files if file.name.startswith(("libnvrtc.so", "nvrtc64_"))]
    assert found, "the wheel nvidia-cuda-nvrtc holds no libnvrtc"
    return ctypes.CDLL(str(found[0]))


def compile_cuda(source: str, name: str, options: Sequence[str], *, to: str) -> tuple[bytes, str]:
    """Compile; what comes back is the code and the compiler's remarks.

    Args:
        source: a whole program.
        name: for its remarks.
        options: as NVRTC takes them.
        to: "CUBIN" or "PTX".
    """
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    assert made == 0, f"nvrtcCreateProgram gives {made}"
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        remarks = log.value.decode().strip()
        assert status == 0, remarks
        assert getattr(nvrtc, f"nvrtcGet{to}Size")(program, ctypes.byref(size)) == 0
        code = ctypes.create_string_buffer(size.value)
        assert getattr(nvrtc, f"nvrtcGet{to}")(program, code) == 0
        return code.raw, remarks
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
