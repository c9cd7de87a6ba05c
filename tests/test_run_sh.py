"""run.sh on machines that lack this or that, played by small stand-ins for python3, apt-get and id."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = "sh cat cksum tail tr cut date mktemp rm sed sleep dirname env ln mkdir cp chmod flock touch grep readlink"
PYTHON = """#!/bin/sh
printf 'python %s\\n' "$(printf '%s' "$*" | head -n 1)" >>"$CALLS"
case "$*" in
*"<= sys.version_info"*) exit "${UNSUPPORTED:-0}" ;;
*"print("*) echo 3.9 ;;
*"version_info < (3, 13)"*) exit "${BEFORE_3_13:-1}" ;;
"- driver") cat >/dev/null; printf '%s' "${CUDA:-}" ;;
"- "*) echo "tqdm>=4" ;;
-) cat >/dev/null; [ -e "$CALLS.apt" ] || printf '%s' "${MISSING:-}" ;;
"-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
"-m pip install"*)
    if [ -n "${PIP_HANGS:-}" ]; then echo >"$CALLS.hangs"; exec sleep 60; fi
    if [ -n "${PIP_FAILS:-}" ]; then echo "no route to the index"; exit 1; fi
    printf '#!/bin/sh\\necho "in $PWD: moss-jt $*"\\n' >"${0%/*}/moss-jt"
    chmod +x "${0%/*}/moss-jt" ;;
"-m moss_jt.cli"* | "-m pytest"*) echo "in $PWD: $*" ;;
esac
"""
APT = """#!/bin/sh
printf 'apt-get %s\\n' "$*" >>"$CALLS"
touch "$CALLS.apt"
[ -z "${APT_FAILS:-}" ] || { echo "no route to the mirror"; exit 100; }
"""


class Machine:
    """A checkout and a PATH with nothing but stand-ins and small tools."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.elsewhere = folder / "elsewhere"
        for path in (self.checkout, self.bin, self.elsewhere):
            path.mkdir()
        for room in ("moss_jt", "converters", "kernels", "cli"):
            (self.checkout / room).mkdir()
        for name in ("run.sh", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout / name)
        for tool in [*TOOLS.split(), "head"]:
            found = shutil.which(tool)
            assert found, f"{tool} is not on this machine"
            (self.bin / tool).symlink_to(found)
        self.add("python3", PYTHON)
        self.add("g++", "#!/bin/sh\n")
        self.add("apt-get", APT)
        self.add("id", "#!/bin/sh\necho ${USER_ID:-1000}\n")
        self.add("chromium", "#!/bin/sh\n")
        self.system = folder / "os-release"
        self.system.write_text("NAME=Debian\nID=debian\n")

    def add(self, name: str, text: str) -> None:
        """Put a program on the PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environment(self, **settings: str) -> dict[str, str]:
        """What a program sees."""
        return {
            "PATH": str(self.bin),
            "CALLS": str(self.calls),
            "HOME": str(self.elsewhere),
            "OS_RELEASE": str(self.system),
            **settings,
        }

    def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run run.sh from another folder."""
        return subprocess.run(
            ["sh", str(self.checkout / "run.sh"), *words],
            cwd=self.elsewhere,
            env=self.environment(**settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def called(self) -> str:
        """Everything called so far."""
        return self.calls.read_text() if self.calls.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_sets_up_once_and_passes_words_on_from_where_the_user_is(machine: Machine) -> None:
    first = machine.run("chat", "--model", "a b")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"in {machine.elsewhere}: moss-jt chat --model a b\n"
    assert "installing moss-jt" in first.stderr
    assert f"-m pip install --no-input --disable-pip-version-check -e {machine.checkout}\n" in machine.called()
    second = machine.run("doctor", "--json")
    assert second.stdout == f"in {machine.elsewhere}: moss-jt doctor --json\n"
    assert second.stderr == ""
    assert machine.called().count("pip install") == 1


def test_the_tests_need_their_extra_and_run_in_the_checkout(machine: Machine) -> None:
    machine.run("chat")
    done = machine.run("test", "-k", "layout")
    assert done.stdout == f"in {machine.checkout}: -m pytest -k layout\n"
    assert done.stderr.endswith(f"in {machine.checkout}: -m moss_jt.cli warmup\n"), "compiled before the tests"
    assert f"-e {machine.checkout}[test]\n" in machine.called()
    assert "installing" not in machine.run("chat").stderr


def test_where_old_numpy_has_no_wheel_it_is_not_compiled(machine: Machine) -> None:
    done = machine.run("test", BEFORE_3_13="0")
    assert done.returncode == 0, done.stderr
    pip = [line.partition("version-check ")[2] for line in machine.called().splitlines() if "pip install" in line]
    requirements = machine.checkout / ".venv" / "requirements.txt"
    assert pip == [f"--no-deps -e {machine.checkout} jittor==1.3.11.0", f"-r {requirements}"]
    assert requirements.read_text() == "tqdm>=4\n"


@pytest.mark.parametrize(("word", "extra"), [("serve", "serve"), ("finetune", "train"), ("web", "web")])
def test_what_a_command_needs_comes_with_it(machine: Machine, word: str, extra: str) -> None:
    machine.run("chat")
    assert machine.run(word, "--help").stdout == f"in {machine.elsewhere}: moss-jt {word} --help\n"
    assert f"-e {machine.checkout}[{extra}]\n" in machine.called()
    assert "installing" not in machine.run(word).stderr + machine.run("chat").stderr


def test_a_machine_with_a_device_gets_what_it_needs(machine: Machine) -> None:
    assert machine.run("chat", CUDA="cuda12").returncode == 0
    assert f"-e {machine.checkout}[cuda12]\n" in machine.called()
    machine.run("test", CUDA="cuda12")
    assert f"-e {machine.checkout}[test,cuda12]\n" in machine.called()


@pytest.mark.parametrize("changed", ["setup.py", "pyproject.toml"])
def test_installs_again_when_the_package_changed(machine: Machine, changed: str) -> None:
    machine.run("chat")
    with (machine.checkout / changed).open("a") as file:
        file.write("# changed\n")
    assert "installing moss-jt" in machine.run("chat").stderr
    assert machine.called().count("-m venv") == 1, "a working environment is kept"


def test_a_moved_checkout_is_installed_again(machine: Machine) -> None:
    machine.run("chat")
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert "installing moss-jt" in machine.run("chat").stderr


def test_an_upgraded_python_is_set_up_again(machine: Machine) -> None:
    machine.run("chat")
    machine.add("python3.99", PYTHON)
    link = machine.checkout / ".venv" / "bin" / "python"
    link.unlink()
    link.symlink_to(machine.bin / "python3.99")
    assert "installing" in machine.run("chat").stderr
    assert "installing" not in machine.run("chat").stderr


def test_what_a_killed_pip_has_left_half_of_is_installed_again(machine: Machine) -> None:
    packages = machine.checkout / ".venv" / "lib" / "python3.11" / "site-packages"
    for name in ("half", "whole"):
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
        (packages / f"{name}-1.0.dist-info" / "METADATA").touch()
    (packages / "whole-1.0.dist-info" / "INSTALLER").write_text("pip\n")
    machine.run("chat")
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_names_the_apt_line_to_a_user(machine: Machine) -> None:
    (machine.bin / "g++").unlink()
    done = machine.run("chat", MISSING="python3-venv\npython3-dev\n")
    assert done.returncode == 1
    line = "apt-get update && apt-get install -y --no-install-recommends python3-venv python3-dev g++"
    assert "missing: python3-venv python3-dev g++. Install with this line" in done.stderr
    assert f"su -c '{line}'" in done.stderr
    assert "apt-get" not in machine.called()
    assert len(done.stderr.splitlines()) == 1


def test_runs_the_apt_line_as_root(machine: Machine) -> None:
    done = machine.run("chat", MISSING="python3-venv\n", USER_ID="0")
    assert done.returncode == 0, done.stderr
    assert "apt-get update\napt-get install -y --no-install-recommends python3-venv\n" in machine.called()
    assert ": moss-jt chat" in done.stdout


def test_the_tests_get_a_browser(machine: Machine) -> None:
    (machine.bin / "chromium").unlink()
    assert machine.run("chat", USER_ID="0").returncode == 0
    assert "chromium" not in machine.called(), "a chat needs none"
    done = machine.run("test", USER_ID="0")
    assert done.returncode == 0, done.stderr
    assert machine.called().count("apt-get install -y --no-install-recommends chromium\n") == 1
    assert "-m pytest" in done.stdout


def test_a_user_without_a_browser_is_told_and_the_other_tests_run(machine: Machine) -> None:
    (machine.bin / "chromium").unlink()
    done = machine.run("test")
    line = "apt-get update && apt-get install -y --no-install-recommends chromium"
    assert f"the tests of the web pages will be skipped. To run them, too: su -c '{line}'" in done.stderr
    assert "apt-get" not in machine.called()
    assert "-m pytest" in done.stdout


def test_where_no_browser_can_be_had_the_other_tests_run(machine: Machine) -> None:
    (machine.bin / "chromium").unlink()
    done = machine.run("test", USER_ID="0", APT_FAILS="1")
    assert "apt-get could not install Chromium: the tests of the web pages will be skipped." in done.stderr
    assert "-m pytest" in done.stdout


@pytest.mark.parametrize("browser", ["chromium", "google-chrome", ""])
def test_a_browser_or_another_system_is_left_as_it_is(machine: Machine, browser: str) -> None:
    (machine.bin / "chromium").unlink()
    machine.system.write_text("ID=debian\n" if browser else "ID=ubuntu\nID_LIKE=debian\n")
    if browser:
        machine.add(browser, "#!/bin/sh\n")
    done = machine.run("test", USER_ID="0")
    assert done.returncode == 0, done.stderr
    assert "apt-get" not in machine.called()


def test_without_python_everything_comes_from_apt(machine: Machine) -> None:
    (machine.bin / "python3").unlink()
    (machine.bin / "g++").unlink()
    done = machine.run("chat")
    assert done.returncode == 1
    assert "install -y --no-install-recommends python3 python3-venv python3-dev g++" in done.stderr


def test_without_apt_the_names_are_told(machine: Machine) -> None:
    (machine.bin / "apt-get").unlink()
    done = machine.run("chat", MISSING="python3-dev\n", USER_ID="0")
    assert done.returncode == 1
    assert (
        "missing, by their Debian names: python3-dev. Install the same with this system's package manager"
        in done.stderr
    )


def test_refuses_a_python_that_is_too_old_or_too_new(machine: Machine) -> None:
    done = machine.run("chat", UNSUPPORTED="1")
    assert done.returncode == 1
    assert "python3 is Python 3.9; moss-jt needs 3.10 to 3.13" in done.stderr
    assert "PYTHON=python3.12 sh run.sh chat" in done.stderr


def test_says_when_the_chosen_python_is_not_there(machine: Machine) -> None:
    done = machine.run("chat", PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert done.stderr == "moss-jt: PYTHON is /nowhere/python3, and no such program is there.\n"


def test_a_failing_pip_shows_its_last_words_and_is_tried_again(machine: Machine) -> None:
    done = machine.run("chat", PIP_FAILS="1")
    assert done.returncode == 1
    assert "no route to the index" in done.stderr
    assert "point PIP_INDEX_URL at an index that answers" in done.stderr
    assert machine.run("chat").returncode == 0
    assert machine.called().count("pip install") == 2


def test_killed_in_the_middle_it_starts_again(machine: Machine) -> None:
    os.mkfifo(f"{machine.calls}.hangs")
    ready = os.open(f"{machine.calls}.hangs", os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen(
        ["sh", str(machine.checkout / "run.sh"), "chat"],
        env=machine.environment(PIP_HANGS="1"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert select.select([ready], [], [], 20)[0], "pip was never called"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    os.close(ready)
    assert process.returncode == 130
    assert not list(machine.checkout.glob(".venv/.moss-jt*"))
    assert machine.run("chat").returncode == 0


def test_speaks_chinese_where_the_locale_does(machine: Machine) -> None:
    done = machine.run("chat", LANG="zh_CN.UTF-8", MISSING="python3-dev\n")
    assert "缺少：python3-dev。请执行这一行安装" in done.stderr
    done = machine.run("chat", LANG="zh_CN.UTF-8", LC_ALL="C", MISSING="python3-dev\n")
    assert "missing: python3-dev" in done.stderr


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_without_a_command_it_says_how_to_use_it(machine: Machine, words: list[str]) -> None:
    done = machine.run(*words)
    assert done.returncode == 2
    assert "usage: sh run.sh chat | sh run.sh test" in done.stderr
    assert machine.called() == ""


def test_lost_links_are_made_again(machine: Machine) -> None:
    machine.run("chat")
    links = {room: str((machine.checkout / "moss_jt" / room).readlink()) for room in ("converters", "kernels", "cli")}
    assert links == {"converters": "../converters", "kernels": "../kernels", "cli": "../cli"}
