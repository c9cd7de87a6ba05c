#!/bin/sh
# Set moss-jt up where that is still to be done, then run it.
#
#   sh run.sh chat [options]    talk to a model
#   sh run.sh test [options]    run the tests (options go to pytest)
#   sh run.sh WORD [options]    any other command of moss-jt: doctor, pull, convert, generate, …
#
# The set-up makes .venv beside this file and installs moss-jt there, editable; where a CUDA device answers, with
# what our kernels need to use it. It is skipped when nothing changed, and may be killed and started again at any point.
#
# From the environment: PYTHON (a Python 3.10 to 3.13 to use), pip's own settings such as PIP_INDEX_URL, and
# LANG for the language of the messages.
set -eu

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
VENV=$ROOT/.venv
OLDEST=10 # Python 3.x
NEWEST=13

say() { # ENGLISH CHINESE
    case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in
    zh* | ZH*) printf 'moss-jt: %s\n' "$2" >&2 ;;
    *) printf 'moss-jt: %s\n' "$1" >&2 ;;
    esac
}

fail() {
    say "$1" "$2"
    exit 1
}

usage() {
    say "usage: sh run.sh chat | sh run.sh test | sh run.sh doctor (or any other command of moss-jt)" \
        "用法：sh run.sh chat | sh run.sh test | sh run.sh doctor（或 moss-jt 的其他命令）"
    exit 2
}

# ---- a Python, and what it and Jittor need from the system ----------------------------------------------------

is_supported() { # PYTHON
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c "import sys; sys.exit(not (3, $OLDEST) <= sys.version_info[:2] <= (3, $NEWEST))" 2>/dev/null
}

choose_python() { # prints its name, or nothing
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if is_supported "$name"; then
            command -v "$name"
            return
        fi
    done
}

refuse_python() {
    wanted=${PYTHON:-python3}
    found=$("$wanted" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo '?')
    fail "$wanted is Python $found; moss-jt needs 3.$OLDEST to 3.$NEWEST. Install one and name it: PYTHON=python3.12 sh run.sh chat" \
        "$wanted 是 Python $found；moss-jt 需要 3.$OLDEST 到 3.$NEWEST。请安装其中之一并指定：PYTHON=python3.12 sh run.sh chat"
}

missing_packages() { # PYTHON or nothing; prints the Debian names of what is missing
    if [ -z "$1" ]; then
        echo python3 python3-venv python3-dev
    else
        "$1" - <<'PROBE'
import importlib.util, os, sys, sysconfig

own = os.path.realpath(sys.executable)
prefix = "python3" if own == os.path.realpath("/usr/bin/python3") else "python3.%d" % sys.version_info[1]
if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
    print(prefix + "-venv")
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print(prefix + "-dev")
PROBE
    fi
    command -v "${cc_path:-g++}" >/dev/null 2>&1 || echo g++
}

apt_line() { # NAMES
    printf 'apt-get update && apt-get install -y --no-install-recommends %s' "$1"
}

as_root() { # LINE; how a user runs it
    if command -v sudo >/dev/null 2>&1; then printf "sudo sh -c '%s'" "$1"; else printf "su -c '%s'" "$1"; fi
}

run_apt() { # LINE
    say "installing what is missing: $1" "正在安装缺少的组件：$1"
    logged apt env DEBIAN_FRONTEND=noninteractive sh -c "$1"
}

install_packages() { # NAMES
    line=$(apt_line "$1")
    if ! command -v apt-get >/dev/null 2>&1; then
        fail "missing, by their Debian names: $1. Install the same with this system's package manager, then run this again." \
            "缺少以下组件（Debian 包名）：$1。请用本系统的包管理器安装相应的包，然后重新运行。"
    elif [ "$(id -u)" != 0 ]; then
        fail "missing: $1. Install with this line, then run the same command again: $(as_root "$line")" \
            "缺少：$1。请执行这一行安装，然后重新运行同一命令：$(as_root "$line")"
    fi
    run_apt "$line" || {
        show_log
        fail "apt-get failed; its last words are above. Mend that, or run the line by hand." \
            "apt-get 失败，最后的输出见上。请处理后重试，或手动执行该行。"
    }
}

install_browser() { # Debian's, for the tests of the web pages; other systems keep theirs elsewhere, and the tests skip
    for name in chromium chromium-browser google-chrome; do
        ! command -v "$name" >/dev/null 2>&1 || return 0
    done
    command -v apt-get >/dev/null 2>&1 && grep -qs '^ID=debian$' "${OS_RELEASE:-/etc/os-release}" || return 0
    line=$(apt_line chromium)
    if [ "$(id -u)" != 0 ]; then
        say "no Chromium: the tests of the web pages will be skipped. To run them, too: $(as_root "$line")" \
            "没有 Chromium：将跳过网页的测试。若要运行，请先执行：$(as_root "$line")"
    else
        run_apt "$line" || say "apt-get could not install Chromium: the tests of the web pages will be skipped." \
            "apt-get 未能安装 Chromium：将跳过网页的测试。"
    fi
}

# ---- long steps: quiet, but alive on a terminal ---------------------------------------------------------------

LOG=
child=
unset PYTHONPATH PYTHONHOME # another Python's packages would come before ours

stop() {
    trap - INT TERM HUP
    [ -z "$child" ] || kill "$child" 2>/dev/null || :
    [ -z "$LOG" ] || rm -f "$LOG"
    printf '\n' >&2
    exit 130
}

logged() { # LABEL COMMAND...; its output goes to $LOG, on a terminal its newest line is shown
    label=$1
    shift
    [ -n "$LOG" ] || LOG=$(mktemp)
    trap stop INT TERM HUP
    begin=$(date +%s)
    "$@" >"$LOG" 2>&1 </dev/null 9>&- &
    child=$!
    while [ -t 2 ] && kill -0 "$child" 2>/dev/null; do
        newest=$(tail -n 1 "$LOG" | tr -d '\r' | cut -c1-56)
        printf '\r\033[K%s %3ds  %s' "$label" $(($(date +%s) - begin)) "$newest" >&2
        sleep 1
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
    status=0
    wait "$child" || status=$?
    child=
    trap - INT TERM HUP
    return "$status"
}

show_log() {
    tail -n 12 "$LOG" >&2
    rm -f "$LOG"
    LOG=
}

# ---- the virtual environment ----------------------------------------------------------------------------------

stamp() { # what an installation depends on: the place, the Python that the link leads to, the settings of the package
    printf '%s %s %s\n' "$ROOT" "$(readlink -f "$VENV/bin/python")" "$(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum)"
}

is_set_up() { # EXTRA or nothing
    [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.moss-jt$1" 2>/dev/null)" = "$(stamp)" ]
}

make_venv() { # PYTHON
    if is_supported "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    [ -w "$ROOT" ] || fail "cannot write to $ROOT, where .venv belongs. Copy the checkout to a folder of yours." \
        "无法写入 $ROOT（.venv 应放在那里）。请把代码复制到自己可写的目录。"
    logged venv "$1" -m venv --clear "$VENV" || {
        show_log
        fail "making $VENV failed; the reason is above." "创建 $VENV 失败，原因见上。"
    }
}

pip_install() { # ARGUMENTS of pip install
    logged pip "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check "$@" || {
        show_log
        fail "pip failed; its last words are above. Without network it cannot work: check the connection, or point PIP_INDEX_URL at an index that answers, then run this again." \
            "pip 失败，最后的输出见上。没有网络无法安装：请检查网络，或用 PIP_INDEX_URL 指定可用的镜像，然后重新运行。"
    }
}

lacks_old_numpy() { # numpy 1.26, which Jittor asks for, has no wheels from Python 3.13 on
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 13))'
}

cuda_extra() { # cuda11, cuda12 or cuda13 where a CUDA device answers, else nothing
    "$VENV/bin/python" - driver <<'PROBE'
import ctypes

try:
    driver = ctypes.CDLL("libcuda.so.1")
    version, count = ctypes.c_int(), ctypes.c_int()
    if not (driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version)) or driver.cuDeviceGetCount(ctypes.byref(count))):
        if count.value and version.value >= 11000:
            print("cuda%d" % min(version.value // 1000, 13))
except (OSError, AttributeError):
    pass
PROBE
}

list_requirements() { # EXTRAS or nothing; ours and Jittor's, but for Jittor itself and its wish for an old numpy
    "$VENV/bin/python" - "$1" <<'LIST'
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for name, left_out in (("moss-jt", "jittor"), ("jittor", "numpy")):
    for need in map(Requirement, requires(name) or ()):
        extras = sys.argv[1].split(",")
        if need.name != left_out and (need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)):
            need.marker = None
            print(need)
LIST
}

install() { # EXTRA or nothing
    say "installing moss-jt and what it needs into $VENV (once; some minutes)" \
        "正在把 moss-jt 及其依赖装入 $VENV（仅一次，需几分钟）"
    unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
    for info in "$VENV"/lib/python3*/site-packages/*.dist-info; do # what a killed pip has left half of counts for it as whole
        [ ! -d "$info" ] || [ -e "$info/INSTALLER" ] || rm -rf "$info"
    done
    cuda=$(cuda_extra)
    extras=$1${1:+${cuda:+,}}$cuda
    if lacks_old_numpy; then # pip would compile numpy 1.26 for many minutes; moss-jt makes Jittor right with numpy 2
        pip_install --no-deps -e "$ROOT" "$(grep -o 'jittor==[0-9.]*' "$ROOT/setup.py")"
        list_requirements "$extras" >"$VENV/requirements.txt"
        pip_install -r "$VENV/requirements.txt"
    else
        pip_install -e "$ROOT${extras:+[$extras]}"
    fi
    stamp >"$VENV/.moss-jt"
    [ -z "$1" ] || stamp >"$VENV/.moss-jt$1"
    [ -z "$LOG" ] || rm -f "$LOG"
    LOG=
}

mend_links() { # an unpacked sdist has none, some archives and file systems lose them
    for room in converters kernels cli; do
        [ -d "$ROOT/moss_jt/$room" ] || ln -sfn "../$room" "$ROOT/moss_jt/$room"
    done
}

set_up() { # EXTRA or nothing
    ! is_set_up "$1" || return 0
    python=$(choose_python)
    if [ -z "$python" ] && command -v "${PYTHON:-python3}" >/dev/null 2>&1; then
        refuse_python
    elif [ -z "$python" ] && [ -n "${PYTHON:-}" ]; then
        fail "PYTHON is $PYTHON, and no such program is there." "PYTHON 为 $PYTHON，但找不到该程序。"
    fi
    packages=$(missing_packages "$python" | tr '\n' ' ' | sed 's/ $//')
    [ -z "$packages" ] || install_packages "$packages"
    [ -n "$python" ] || python=$(choose_python)
    [ -n "$python" ] || refuse_python
    [ "$1" != test ] || install_browser
    make_venv "$python"
    mend_links
    install "$1"
}

set_up_alone() { # one set-up at a time where flock exists
    if command -v flock >/dev/null 2>&1 && (: >>"$ROOT/.venv.lock") 2>/dev/null; then
        exec 9>>"$ROOT/.venv.lock"
        flock 9
        set_up "$1"
        exec 9>&-
    else
        set_up "$1"
    fi
}

# ---- the commands ---------------------------------------------------------------------------------------------

case ${1:-} in
'' | -h | --help | help) usage ;;
test)
    shift
    is_set_up test || set_up_alone test
    cd "$ROOT"
    "$VENV/bin/python" -m moss_jt.cli warmup >&2 # minutes the first time: before the tests, which have time limits
    exec "$VENV/bin/python" -m pytest "$@"
    ;;
*)
    case $1 in
    serve) extra=serve ;;
    finetune) extra=train ;;
    web) extra=web ;;
    *) extra= ;;
    esac
    is_set_up "$extra" || set_up_alone "$extra"
    exec "$VENV/bin/moss-jt" "$@" # with python -m, files in the user's folder would be imported in place of packages
    ;;
esac
