"""Small files that Jittor and the compilers need at a path that never changes its content.

One folder, named after what is in it: the shadow headers, a stand-in for `python3.x-config` (which a venv
lacks, or which belongs to another Python), and a launcher for the helper scripts that Jittor starts at
every kernel compilation (without it they would write into the user's own Jittor folder).
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import sysconfig
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from moss_jt.startup.jittor_copy import staged

_QUOTED = {"helper_cuda.h": "helper_cuda.h", "numpy.h": "pyjt/numpy.h"}


@dataclass(frozen=True)
class Tools:
    """The tools folder: where it is (or will be) and what belongs in it."""

    root: Path
    contents: dict[str, str]

    @property
    def quoted_headers(self) -> Path:
        """Shadows of Jittor's own headers, found first through -iquote."""
        return self.root / "quoted"

    @property
    def python_config(self) -> Path:
        """Answers --includes and --extension-suffix for the running interpreter."""
        return self.root / "python-config"

    @property
    def python(self) -> Path:
        """Starts Jittor's helper scripts with Jittor's environment."""
        return self.root / "python"

    def make(self) -> None:
        """Write the folder, unless it is there."""
        if self.root.is_dir():
            return
        with staged(self.root) as stage:
            for name, text in self.contents.items():
                file = stage / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, "utf-8")
                file.chmod(0o755 if text.startswith("#!") else 0o644)


def shadow_hash() -> str:
    """16 hex digits of the shadow headers' content; goes into every compile command, since Jittor does not see them."""
    digest = hashlib.sha256()
    for name, text in sorted(_headers().items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def plan_tools(parent: Path, *, source: Path, compiler: Path, includes: list[Path], jittor_home: Path) -> Tools:
    """Describe the tools for this interpreter; nothing is written yet."""
    contents = _headers()
    contents["python-config"] = _python_config(includes)
    contents["python"] = _launcher(source=source, compiler=compiler, jittor_home=jittor_home)
    digest = hashlib.sha256()
    for name, text in sorted(contents.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return Tools(parent / digest.hexdigest()[:12], contents)


def _headers() -> dict[str, str]:
    shadow = files("moss_jt.startup") / "shadow"
    return {f"quoted/{place}": (shadow / name).read_text("utf-8") for name, place in _QUOTED.items()}


def _python_config(includes: list[Path]) -> str:
    flags = " ".join(f"-I{folder}" for folder in includes)
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    return (
        "#!/bin/sh\n"
        'for word in "$@"; do\n'
        '  case "$word" in\n'
        f"    --includes) echo {shlex.quote(flags)} ;;\n"
        f"    --extension-suffix) echo {shlex.quote(suffix)} ;;\n"
        "  esac\n"
        "done\n"
    )


def _launcher(*, source: Path, compiler: Path, jittor_home: Path) -> str:
    variables = {
        "HOME": str(jittor_home),
        "JITTOR_HOME": str(jittor_home),
        "PYTHONPATH": str(source),
        "cache_name": "default",
        "cc_path": str(compiler),
        "log_silent": "1",
    }
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    # -S: the scripts need the standard library and jittor_utils only, not the packages of a venv
    return f'#!/bin/sh\n{settings} exec {shlex.quote(base_python())} -S "$@"\n'


def base_python() -> str:
    """The interpreter outside of any venv, so that venvs of one Python share their compiled kernels."""
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())
