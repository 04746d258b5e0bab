#!/usr/bin/env bash
# Creates .venv, installs the locked packages of locks/cpu.txt (with GPU=1: locks/gpu.txt) and the project in it.
# Every target of the Makefile runs this script first. If nothing has changed, it ends in well under a second.
#   PYTHON=/path/to/python   the interpreter to use; default: python3.11, else python3.12, else python3
#   GPU=1, GPU=0             packages for NVIDIA GPUs or for CPUs; default: those of .venv, at first those for CPUs
#   TORCH_INDEX=URL          the index of torch's CPU builds to use if pip's own sources have none
set -euo pipefail
cd -P "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/setup.stamp   # line 1: the lock file; line 2: a hash of everything that the installation depends on
BROKEN=$VENV/setup.broken # exists while .venv is being changed; if it exists at the start, .venv is recreated
LOG=$VENV/setup.log
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
CPU_MIN_DISK_GB=8
CUDA_MIN_DISK_GB=12
GPU_MIN_DISK_GB=40
MIN_MEMORY_GB=7
HOW_TO_GET_PYTHON="apt-get install python3.11 python3.11-venv (Debian 12), python3.12 python3.12-venv (Ubuntu 24.04), \
or 'uv python install 3.12'; use PYTHON=/path/to/python for one that is not on PATH"

# The user's shell or pip.conf may set these differently. pip would then search or install packages outside .venv, or
# refuse the project itself, which has no hash.
unset PYTHONPATH PYTHONHOME
export PIP_USER=0 PIP_REQUIRE_HASHES=0

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

fingerprint() { # hash of locks, project metadata, interpreter and folder (installed scripts contain its absolute path)
    { cat "${LOCKS[@]}" pyproject.toml && "$VENV/bin/python" -VV && pwd; } | sha256sum | cut -d ' ' -f 1
}

find_python() { # prints the first interpreter of a supported version; in an environment, its base interpreter
    local candidate version other=
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version=
        case $version in
        3.11 | 3.12)
            "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
            return
            ;;
        esac
        version=${version:+Python $version, not 3.11 or 3.12}
        [ "$candidate" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON is ${version:-no Python}: $HOW_TO_GET_PYTHON"
        other=${version:-$other}
    done
    die "$candidate is ${other:-not there}: $HOW_TO_GET_PYTHON"
}

check_disk() { # check_disk GB WHAT CURE
    local disk_gb
    disk_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    ((disk_gb >= $1)) || die "$disk_gb GB of disk are free in $PWD; $2 needs $1 GB: $3"
}

check_machine() { # check_machine DISK_GB: checks the platform, the disk for a first installation and the demo's memory
    local memory_gb limit
    [ "$(uname -sm)" = "Linux x86_64" ] || die "the locked packages are for Linux on x86-64; this is $(uname -sm)"
    case $PWD in *:*) die "$PWD has a colon in its name, which Python environments do not support: rename it" ;; esac
    check_disk "$1" "the installation" "free some space, or move the folder to another disk"
    memory_gb=$(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo)
    for limit in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
        memory_gb=$(awk -v all="$memory_gb" '{ gb = $1 / 2 ^ 30; print ($1 != "max" && gb < all) ? int(gb) : all }' \
            "$limit" 2>/dev/null || echo "$memory_gb")
    done
    ((memory_gb >= MIN_MEMORY_GB)) || die "this machine has $memory_gb GB of memory; the demo needs $MIN_MEMORY_GB GB"
}

# A file from a registry is installed only if its hash is in a lock. NO_WHEEL is built from source, even if pip is
# configured to use wheels only.
NO_WHEEL=antlr4-python3-runtime
pip_install() { # pip_install LOCK PIP-ARGUMENTS...: unpacks in .venv, because /tmp may be small or in memory
    mkdir -p "$VENV/tmp"
    attempt env TMPDIR="$PWD/$VENV/tmp" "${PIP[@]}" install --no-input --progress-bar off --no-deps --require-hashes \
        --no-build-isolation --no-compile --no-binary $NO_WHEEL --requirement "$@"
}

make_venv() { # make_venv PYTHON: on Debian, ensurepip may be missing; then the system's pip installs pip in .venv
    local python=$1 package
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    "$python" -c 'import venv' 2>/dev/null || die "$python has no venv: apt-get install $package, then run this again"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$VENV"
        PIP=("$VENV/bin/python" -m pip)
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --without-pip "$VENV"
        PIP=("$python" -m pip --python "$VENV/bin/python")
    else
        die "$python has neither ensurepip nor pip: apt-get install $package, then run this again"
    fi
    touch "$BROKEN"
    awk '/^[a-z]/ { wanted = /^(pip|setuptools)==/ } wanted' "$LOCK" >"$VENV/setup.tools.txt"
    pip_install "$VENV/setup.tools.txt" || fail "installing pip itself"
}

attempt() { # attempt COMMAND...: runs it, appends its output to the log, prints progress every 15 s
    local status=0 waited=0
    printf '\n$ %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null 9<&- &
    CHILD=$!
    while kill -0 "$CHILD" 2>/dev/null; do
        sleep 0.1
        waited=$((waited + 1))
        ((waited % 150)) || say "  $((waited / 10)) s: $(progress)"
    done
    wait "$CHILD" || status=$?
    CHILD=
    return $status
}

reason() { # prints pip's last error from the log of the last command, else the last line of its output
    awk '/^\$ / { error = last = "" } NF { last = $0 } sub(/^ *ERROR: /, "") { error = $0 }
        END { print error ? error : last }' "$LOG"
}

fail() { # fail WHAT: prints the whole log, then the reason in one line, and exits
    cat "$LOG" >&2
    die "$1 failed: $(reason); the log above is $PWD/$LOG"
}

progress() {
    local all fetched installed
    all=$(cat "$LOCK" ${TORCH_LOCK:+"$TORCH_LOCK"} | grep -c '==')
    fetched=$(grep -cE '^(Collecting|Processing) ' "$LOG" || true)
    installed=$(find "$VENV"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
    echo "$fetched of $all packages fetched, $installed installed"
}

# torch has two builds. PyPI has the CUDA build, which needs several GB of libraries but also runs on a CPU. It is used
# only if no CPU build is available. Only locked files are installed, even from a folder that pip is configured for: a
# CPU build with another hash is skipped.
install_torch() {
    local cpu have
    cpu=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' locks/torch-cpu.txt)
    have=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
    TORCH_LOCK=locks/torch-cpu.txt
    [ "$have" != "$cpu" ] || return 0
    if [ "$have" != "${cpu%+cpu}" ]; then
        if offers "$cpu" 60; then
            say "installing torch $cpu from pip's own sources"
            pip_install $TORCH_LOCK && return
            say "  skipped: $(reason)"
        fi
        if offers "$cpu" 20 --index-url "$TORCH_INDEX" --retries 0 --timeout 3; then
            say "installing torch $cpu from $TORCH_INDEX"
            pip_install $TORCH_LOCK --index-url "$TORCH_INDEX" --retries 1 && return
            say "  skipped: $(reason)"
        fi
        check_disk $CUDA_MIN_DISK_GB "torch's CUDA build (no CPU build was found)" \
            "free some space, or point pip to torch $cpu (PIP_FIND_LINKS=FOLDER or PIP_EXTRA_INDEX_URL=URL)"
        say "neither pip's own sources nor $TORCH_INDEX have the CPU build of torch:"
        say "installing the CUDA build, which also runs on CPUs (2.7 GB to download)"
    fi
    TORCH_LOCK=locks/torch-cuda.txt
    pip_install $TORCH_LOCK || fail "installing $TORCH_LOCK"
}

offers() { # offers VERSION SECONDS PIP-ARGUMENTS...: whether pip finds this version of torch; downloads no package
    local versions
    printf '\n$ pip index versions torch %s\n' "${*:3}" >>"$LOG"
    versions=$(timeout "$2" "${PIP[@]}" index versions torch --no-input "${@:3}" 2>>"$LOG" </dev/null) || return
    tr ' ,' '\n' <<<"$versions" | grep -xF -- "$1" >/dev/null
}

# Packages are compiled once here, on all cores, because several processes import the same packages at the same time,
# and with PYTHONDONTWRITEBYTECODE each of them would compile them again. Large packages that are not imported are
# left out.
NOT_IMPORTED='/(sglang/(multimodal_gen|test)|transformers/models/(?!auto|qwen)|tests?|pip|mypy|mypyc|hypothesis|jedi)/'
compile() { # ignores files that do not compile, such as templates or vendored Python 2
    "$VENV/bin/python" -m compileall -q -j "$(nproc)" -x "$NOT_IMPORTED" \
        "$VENV"/lib/python3*/site-packages >>"$LOG" 2>&1 || true
}

install() {
    local python=$1
    if [ ! -x "$VENV/bin/python" ]; then
        say "creating $VENV with $("$python" --version)"
        make_venv "$python"
    fi
    touch "$BROKEN"
    PIP=("$VENV/bin/python" -m pip)
    [ "$LOCK" != locks/cpu.txt ] || install_torch
    say "installing $(grep -c '==' "$LOCK") packages of $LOCK (a few minutes the first time)"
    pip_install "$LOCK" || fail "installing $LOCK"
    say "  compiling the installed packages"
    compile
    attempt "${PIP[@]}" install --no-input --no-deps --no-build-isolation --editable . || fail "installing the project"
    attempt "$VENV/bin/python" -c 'import torch' || fail "importing torch"
    rm -rf "$VENV/tmp"
}

# Only one setup runs at a time. A second one waits, and then usually has nothing to do.
exec 9<.
flock --wait 1800 9 || die "another setup has been running in $PWD for 30 minutes: stop it first"
CHILD=
interrupted() {
    trap - TERM
    [ -z "$CHILD" ] || kill "$CHILD" 2>/dev/null
    say "interrupted; the next run starts from the beginning"
    exit 130
}
trap interrupted INT TERM

case ${GPU:-} in
'') LOCK=$(head -n 1 "$STAMP" 2>/dev/null || echo locks/cpu.txt) ;;
0) LOCK=locks/cpu.txt ;;
1) LOCK=locks/gpu.txt ;;
*) die "GPU=$GPU is neither 1 nor 0" ;;
esac
LOCKS=("$LOCK")
[ "$LOCK" != locks/cpu.txt ] || LOCKS+=(locks/torch-cpu.txt locks/torch-cuda.txt)
python=
anew=
if [ -n "${PYTHON:-}" ]; then
    python=$(find_python)
    [ "$("$python" -VV)" = "$("$VENV/bin/python" -VV 2>/dev/null)" ] || anew=yes
fi
if [ -z "$anew" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$LOCK"$'\n'"$(fingerprint 2>/dev/null)" ]; then
    exit 0
fi

python=${python:-$(find_python)}
SECONDS=0
for path in . "$VENV"; do
    [ ! -e "$path" ] || [ -w "$path" ] || die "$(id -un) can't write to $(realpath "$path"): change its owner"
done
if [ -e "$VENV" ]; then
    made_for=$(head -n 1 "$STAMP" 2>/dev/null || echo "$LOCK")
    if [ -n "$anew" ] || [ -e "$BROKEN" ] || [ "$made_for" != "$LOCK" ] || ! grep -qsF " $PWD/$VENV" "$VENV/pyvenv.cfg" ||
        ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        say "$VENV is incomplete, or was created for another folder, lock or interpreter: recreating it"
        rm -rf "$VENV"
    fi
fi
if [ ! -e "$VENV" ]; then
    if [ "$LOCK" = locks/gpu.txt ]; then check_machine $GPU_MIN_DISK_GB; else check_machine $CPU_MIN_DISK_GB; fi
fi
rm -f "$STAMP"
install "$python"
printf '%s\n%s\n' "$LOCK" "$(fingerprint)" >"$STAMP"
rm -f "$BROKEN"
say "done in $SECONDS s"
