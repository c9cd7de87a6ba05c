"""Machine code of the CUDA kernels: compiled by NVRTC once for each kind of device, then kept on disk.

cupy would compile with -ftz=true, which cannot be taken back, and numbers below 2^-126 would be 0 on a device only. So
NVRTC is asked directly, through cupy; where cupy does not find the library, we load it from pip's wheels.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moss_jt import paths
from moss_jt.errors import KernelError
from moss_jt.kernels.cuda import OPTIONS, source

_DIGEST = hashlib.sha256
_LIBRARIES = ("*/lib/libnvrtc-builtins.so.*", "*/lib/libnvrtc.so.*")  # in this order: the second asks for the first

_log = logging.getLogger(__name__)


class Compiler(Protocol):
    """NVRTC.

    Attributes:
        version: as "13.0".
        generations: compute capabilities, times ten, that it makes machine code for.
    """

    version: str
    generations: Sequence[int]

    def compile(self, text: str, name: str, options: Sequence[str], *, final: bool) -> bytes:
        """Compile a whole program: to machine code where it is `final`, else to PTX, which the driver compiles.

        Raises:
            KernelError: it does not compile.
        """
        ...


class Nvrtc:
    """NVRTC through cupy.

    Raises:
        ImportError, RuntimeError: there is none.
    """

    def __init__(self) -> None:
        import cupy

        self._nvrtc = cupy.cuda.nvrtc
        try:
            version = self._nvrtc.getVersion()
        except RuntimeError:
            _load_from_wheels()
            version = self._nvrtc.getVersion()
        self.version = "{}.{}".format(*version)
        self.generations: Sequence[int] = sorted(self._nvrtc.getSupportedArchs())

    def compile(self, text: str, name: str, options: Sequence[str], *, final: bool) -> bytes:
        """As `Compiler` says."""
        program = self._nvrtc.createProgram(text, f"{name}.cu", (), ())
        try:
            self._nvrtc.compileProgram(program, tuple(options))
            code = self._nvrtc.getCUBIN(program) if final else self._nvrtc.getPTX(program)
        except self._nvrtc.NVRTCError as error:
            remarks = self._nvrtc.getProgramLog(program).strip()
            raise KernelError(
                f"{name}.cu does not compile with NVRTC {self.version} and {' '.join(options)}: {remarks or error}."
            ) from error
        finally:
            self._nvrtc.destroyProgram(program)
        return code if isinstance(code, bytes) else str(code).encode()


def machine_code(name: str, generation: int, compiler: Compiler) -> bytes:
    """What a device loads for `<name>.cu`.

    Args:
        generation: its compute capability, times ten.
        compiler: asked where nothing is on disk.

    Raises:
        KernelError: it does not compile.
    """
    known = [each for each in compiler.generations if each <= generation]
    if not known:
        raise KernelError(
            f"NVRTC {compiler.version} no longer compiles for compute capability {generation / 10}. Install cupy for an "
            "older CUDA."
        )
    final = known[-1] == generation  # a device that is newer than NVRTC has a driver which compiles the rest
    options = (*OPTIONS, f"--gpu-architecture={'sm' if final else 'compute'}_{known[-1]}")
    key = _DIGEST("\0".join((source(name), *options, compiler.version)).encode()).hexdigest()[:20]
    path = paths.home() / "cuda" / f"{name}-{options[-1].rpartition('=')[2]}-{key}"
    code = _kept(path)
    if code is None:
        code = compiler.compile(source(name), name, options, final=final)
        _keep(path, code)
    return code


def _load_from_wheels() -> None:
    """Load NVRTC from pip's wheels, where cupy before 14 does not look; then it gets what it asks the system for by name."""
    for entry in dict.fromkeys(sys.path):
        for pattern in _LIBRARIES:
            for file in sorted(Path(entry, "nvidia").glob(pattern)):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(file))


def _kept(path: Path) -> bytes | None:
    """What was kept, if every byte of it is there."""
    with contextlib.suppress(OSError):
        found = path.read_bytes()
        digest, code = found[: _DIGEST().digest_size], found[_DIGEST().digest_size :]
        if code and _DIGEST(code).digest() == digest:
            return code
    return None


def _keep(path: Path, code: bytes) -> None:
    """Keep it for the next time, where that can be: it is there whole, or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(_DIGEST(code).digest() + code)
        scratch.replace(path)
    except OSError as error:
        _log.warning("%s cannot be written (%s): the CUDA kernels are compiled anew each time.", path, error.strerror)
        with contextlib.suppress(OSError):
            scratch.unlink()
