"""The small files that Jittor and the compilers need."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

from moss_jt.startup import tools
from moss_jt.startup.machine import include_folders


def plan(folder: Path) -> tools.Tools:
    return tools.plan_tools(
        folder / "tools",
        source=folder / "src",
        compiler=Path("/usr/bin/g++"),
        includes=include_folders(),
        jittor_home=folder / "home",
    )


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.strip()


def test_python_config_answers_for_this_interpreter(tmp_path: Path) -> None:
    made = plan(tmp_path)
    made.make()
    assert f"-I{sysconfig.get_paths()['include']}" in output_of(made.python_config, "--includes").split()
    assert output_of(made.python_config, "--extension-suffix") == sysconfig.get_config_var("EXT_SUFFIX")


def test_launcher_gives_helpers_jittor_s_home(tmp_path: Path) -> None:
    made = plan(tmp_path)
    made.make()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "helper.py").write_text(
        "import os, sys\nprint(os.environ['HOME'], os.environ['JITTOR_HOME'], *sys.argv[1:])\n", "ascii"
    )
    found = output_of(made.python, "-m", "helper", "a b", "$c")
    assert found == f"{tmp_path / 'home'} {tmp_path / 'home'} a b $c"


def test_shadow_headers_lie_where_they_are_included_from(tmp_path: Path) -> None:
    made = plan(tmp_path)
    made.make()
    assert "#include_next" in (made.quoted_headers / "pyjt" / "numpy.h").read_text("utf-8")
    assert "#include_next" in (made.quoted_headers / "helper_cuda.h").read_text("utf-8")


def test_folder_is_named_after_its_content(tmp_path: Path) -> None:
    assert plan(tmp_path).root == plan(tmp_path).root
    assert plan(tmp_path).root.name != plan(tmp_path / "elsewhere").root.name


def test_hash_covers_every_shadow_header(tmp_path: Path) -> None:
    headers = {name for name in plan(tmp_path).contents if name.startswith("quoted/")}
    assert headers == {"quoted/pyjt/numpy.h", "quoted/helper_cuda.h"}
    assert len(tools.shadow_hash()) == 16
