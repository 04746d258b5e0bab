#!/usr/bin/env bash
# Makes .venv with the exact packages of locks/cpu.txt, or of locks/gpu.txt with GPU=1, and installs the project in it.
# Run by every target of the Makefile; when nothing has changed it ends in well under a second.
#   PYTHON=/path/to/python   the interpreter to use; else it is python3.11, or python3.12 where there is no other
#   GPU=1, GPU=0             for NVIDIA GPUs, for CPUs; left out: as .venv is, the first time for CPUs
#   TORCH_INDEX=URL          the index of torch's CPU builds that is asked when pip's own sources have none
set -euo pipefail
cd -P "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/setup.stamp   # line 1: the lock file; line 2: a hash of all that the installation depends on
BROKEN=$VENV/setup.broken # exists while .venv is being changed: when it is found, .venv is made anew
LOG=$VENV/setup.log
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
CPU_MIN_DISK_GB=8
CUDA_MIN_DISK_GB=12
GPU_MIN_DISK_GB=40
MIN_MEMORY_GB=7
HOW_TO_GET_PYTHON="apt-get install python3.11 python3.11-venv (Debian 12), python3.12 python3.12-venv (Ubuntu 24.04), \
or 'uv python install 3.12'; PYTHON=/path/to/python names one that is not on PATH"

# A user's shell or pip.conf may hold the opposite: packages would be looked for, or put, outside .venv, and the project
# itself, which has no hash, would be refused.
unset PYTHONPATH PYTHONHOME
export PIP_USER=0 PIP_REQUIRE_HASHES=0

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

fingerprint() { # the locks, the project's own metadata, the interpreter, and the place (scripts hold absolute paths)
    { cat "${LOCKS[@]}" pyproject.toml && "$VENV/bin/python" -VV && pwd; } | sha256sum | cut -d ' ' -f 1
}

find_python() { # the first that has a lock; the interpreter itself, never that of .venv
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

check_machine() { # what the first installation and the demo need: disk in this folder, memory in all
    local memory_gb limit
    [ "$(uname -sm)" = "Linux x86_64" ] || die "the locked packages are for Linux on x86-64; this is $(uname -sm)"
    case $PWD in *:*) die "$PWD has a colon in its name, which Python environments can't have: move the folder" ;; esac
    check_disk "$1" "the installation" "free some, or move the folder to another disk"
    memory_gb=$(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo)
    for limit in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
        memory_gb=$(awk -v all="$memory_gb" '{ gb = $1 / 2 ^ 30; print ($1 != "max" && gb < all) ? int(gb) : all }' \
            "$limit" 2>/dev/null || echo "$memory_gb")
    done
    ((memory_gb >= MIN_MEMORY_GB)) || die "$memory_gb GB of memory are there; the demo needs $MIN_MEMORY_GB GB"
}

# A file that comes from a registry is installed only if its hash is in a lock. NO_WHEEL is built here, also where pip is
# told to take wheels only.
NO_WHEEL=antlr4-python3-runtime
pip_install() { # pip_install LOCK PIP-ARGUMENTS...; unpacks in .venv: /tmp may be small, or in memory
    mkdir -p "$VENV/tmp"
    attempt env TMPDIR="$PWD/$VENV/tmp" "${PIP[@]}" install --no-input --progress-bar off --no-deps --require-hashes \
        --no-build-isolation --no-compile --no-binary $NO_WHEEL --requirement "$@"
}

make_venv() { # Debian splits ensurepip from Python: then the system's pip, where there is one, puts pip into .venv
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

attempt() { # attempt COMMAND...: output goes to the log, a progress line every 15 s
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

reason() { # in the words of the command that was last: pip's last error, else its last line
    awk '/^\$ / { error = last = "" } NF { last = $0 } sub(/^ *ERROR: /, "") { error = $0 }
        END { print error ? error : last }' "$LOG"
}

fail() { # fail WHAT: the whole log, and one line at its end
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

# torch has two builds. PyPI has the one for CUDA, which needs libraries of several GB and runs on a CPU, too: it is taken
# when no CPU build is to be had. Only the locked files are taken, also from a folder that pip is pointed at: a CPU build
# that somebody made anew is passed over.
install_torch() {
    local cpu have
    cpu=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' locks/torch-cpu.txt)
    have=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
    TORCH_LOCK=locks/torch-cpu.txt
    [ "$have" != "$cpu" ] || return 0
    if [ "$have" != "${cpu%+cpu}" ]; then
        if offers "$cpu" 60; then
            say "installing torch $cpu, which pip is pointed at"
            pip_install $TORCH_LOCK && return
            say "  passed over: $(reason)"
        fi
        if offers "$cpu" 20 --index-url "$TORCH_INDEX" --retries 0 --timeout 3; then
            say "installing torch $cpu from $TORCH_INDEX"
            pip_install $TORCH_LOCK --index-url "$TORCH_INDEX" --retries 1 && return
            say "  passed over: $(reason)"
        fi
        check_disk $CUDA_MIN_DISK_GB "torch's CUDA build, as no CPU build was found," \
            "free some, or point pip at torch $cpu (PIP_FIND_LINKS=FOLDER or PIP_EXTRA_INDEX_URL=URL)"
        say "no CPU build of torch at pip's sources or $TORCH_INDEX:"
        say "installing the CUDA build, which runs on CPUs, too (2.7 GB to fetch)"
    fi
    TORCH_LOCK=locks/torch-cuda.txt
    pip_install $TORCH_LOCK || fail "installing $TORCH_LOCK"
}

offers() { # offers VERSION SECONDS PIP-ARGUMENTS...: whether pip finds this torch; reads lists, fetches no package
    local versions
    printf '\n$ pip index versions torch %s\n' "${*:3}" >>"$LOG"
    versions=$(timeout "$2" "${PIP[@]}" index versions torch --no-input "${@:3}" 2>>"$LOG" </dev/null) || return
    tr ' ,' '\n' <<<"$versions" | grep -xF -- "$1" >/dev/null
}

# Compiled once here, on all cores: several processes import the same packages at the same time, and some machines set
# PYTHONDONTWRITEBYTECODE, so that each of them would compile them again. Left out: large things that are not imported.
NOT_IMPORTED='/(sglang/(multimodal_gen|test)|transformers/models/(?!auto|qwen)|tests?|pip|mypy|mypyc|hypothesis|jedi)/'
compile() { # a file that doesn't compile (templates, Python 2 in a vendored folder) is not an error of ours
    "$VENV/bin/python" -m compileall -q -j "$(nproc)" -x "$NOT_IMPORTED" \
        "$VENV"/lib/python3*/site-packages >>"$LOG" 2>&1 || true
}

install() {
    local python=$1
    if [ ! -x "$VENV/bin/python" ]; then
        say "making $VENV with $("$python" --version)"
        make_venv "$python"
    fi
    touch "$BROKEN"
    PIP=("$VENV/bin/python" -m pip)
    [ "$LOCK" != locks/cpu.txt ] || install_torch
    say "installing $(grep -c '==' "$LOCK") packages of $LOCK (a few minutes the first time)"
    pip_install "$LOCK" || fail "installing $LOCK"
    say "  compiling what is imported"
    compile
    attempt "${PIP[@]}" install --no-input --no-deps --no-build-isolation --editable . || fail "installing the project"
    attempt "$VENV/bin/python" -c 'import torch' || fail "importing torch"
    rm -rf "$VENV/tmp"
}

# One set-up at a time; a second one waits, then finds the work done.
exec 9<.
flock --wait 1800 9 || die "another set-up has been running in $PWD for 30 minutes: end it first"
CHILD=
interrupted() {
    trap - TERM
    [ -z "$CHILD" ] || kill "$CHILD" 2>/dev/null
    say "interrupted; the next run starts afresh"
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
    [ ! -e "$path" ] || [ -w "$path" ] || die "$(id -un) can't write to $(realpath "$path"): who made it, root?"
done
if [ -e "$VENV" ]; then
    made_for=$(head -n 1 "$STAMP" 2>/dev/null || echo "$LOCK")
    if [ -n "$anew" ] || [ -e "$BROKEN" ] || [ "$made_for" != "$LOCK" ] || ! grep -qsF " $PWD/$VENV" "$VENV/pyvenv.cfg" ||
        ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        say "$VENV is unfinished, or was made for another place, lock or interpreter: making it anew"
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
