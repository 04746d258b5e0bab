#!/usr/bin/env bash
# Makes .venv with the exact packages of locks/cpu.txt, or of locks/gpu.txt with GPU=1, and installs the project in it.
# Run by every target of the Makefile; when nothing has changed it ends in well under a second.
#   PYTHON=/path/to/python   the interpreter to use, when the one that is found is not the right one
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/setup.stamp   # line 1: the lock file; line 2: a hash of all that the installation depends on
BROKEN=$VENV/setup.broken # exists while .venv is being changed: when it is found, .venv is made anew
LOG=$VENV/setup.log
CPU_MIN_DISK_GB=8
GPU_MIN_DISK_GB=40
MIN_MEMORY_GB=7

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

fingerprint() { # the lock, the project's own metadata, the interpreter, and the place (scripts hold absolute paths)
    { cat "$LOCK" pyproject.toml && "$VENV/bin/python" -VV && pwd; } | sha256sum | cut -d ' ' -f 1
}

find_python() {
    local candidate version
    for candidate in ${PYTHON:-} python3.11 python3 python3.12 python3.13; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        [ "$version" = 3.11 ] || [ "$candidate" = "${PYTHON:-}" ] || [ "$candidate" = "python$version" ] || continue
        case $version in
        3.11) ;;
        3.1[2-9]) say "no Python 3.11 here: trying Python $version, for which the locked versions were not tested" >&2 ;;
        *) die "Python $version is too old: install Python 3.11 (apt-get install python3.11 python3.11-venv)" ;;
        esac
        "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))' # never that of .venv
        return
    done
    die "found no Python 3.11: install it (apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11"
}

check_machine() { # what the first installation and the demo need: disk in this folder, memory in all
    local need_gb=$1 disk_gb memory_gb limit
    [ "$(uname -sm)" = "Linux x86_64" ] || die "the locked packages are for Linux on x86-64; this is $(uname -sm)"
    disk_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    ((disk_gb >= need_gb)) || die "$disk_gb GB of disk are free in $PWD; the installation needs $need_gb GB"
    memory_gb=$(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo)
    for limit in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
        memory_gb=$(awk -v all="$memory_gb" '{ gb = $1 / 2 ^ 30; print ($1 != "max" && gb < all) ? int(gb) : all }' \
            "$limit" 2>/dev/null || echo "$memory_gb")
    done
    ((memory_gb >= MIN_MEMORY_GB)) || die "$memory_gb GB of memory are there; the demo needs $MIN_MEMORY_GB GB"
}

make_venv() { # Debian splits ensurepip from Python: then the system's pip, where there is one, puts pip into .venv
    local python=$1 tools=()
    "$python" -c 'import venv' 2>/dev/null || die "$python has no venv: apt-get install python3-venv, then run this again"
    mapfile -t tools < <(grep -E '^(pip|setuptools)==' "$LOCK")
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$VENV"
        touch "$BROKEN"
        run "pip itself" "$VENV/bin/python" -m pip install --no-input --no-deps "${tools[@]}"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --without-pip "$VENV"
        touch "$BROKEN"
        run "pip itself" "$python" -m pip --python "$VENV/bin/python" install --no-input --no-deps "${tools[@]}"
    else
        die "$python has neither ensurepip nor pip: apt-get install python3-venv, then run this again"
    fi
}

run() { # run WHAT COMMAND...: output goes to the log, a progress line every 15 s; the whole log on failure
    local what=$1 status=0 waited=0
    shift
    printf '\n$ %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null 9<&- &
    CHILD=$!
    while kill -0 "$CHILD" 2>/dev/null; do
        sleep 0.2
        waited=$((waited + 1))
        ((waited % 75)) || say "  $((waited / 5)) s: $(progress)"
    done
    wait "$CHILD" || status=$?
    CHILD=
    ((status == 0)) && return
    cat "$LOG" >&2
    die "$what failed (exit $status); the log above is $PWD/$LOG"
}

progress() {
    local all fetched installed
    all=$(grep -c '==' "$LOCK")
    fetched=$(grep -cE '^(Collecting|Processing) ' "$LOG" || true)
    installed=$(find "$VENV"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
    echo "$fetched of $all packages fetched, $installed installed"
}

# Compiled once here, on all cores: several processes import the same packages at the same time, and some machines set
# PYTHONDONTWRITEBYTECODE, so that each of them would compile them again. Left out: large things that are not imported.
NOT_IMPORTED='/(sglang/(multimodal_gen|test)|transformers/models/(?!auto|qwen)|tests?|pip|mypy|mypyc|hypothesis|jedi)/'
compile() { # a file that doesn't compile (templates, Python 2 in a vendored folder) is not an error of ours
    "$VENV/bin/python" -m compileall -q -j "$(nproc)" -x "$NOT_IMPORTED" \
        "$VENV"/lib/python3*/site-packages >>"$LOG" 2>&1 || true
}

check_torch() {
    "$VENV/bin/python" -c 'import torch' >>"$LOG" 2>&1 && return
    tail -n 3 "$LOG" >&2
    if [ "$LOCK" = locks/cpu.txt ] && ! grep -qs '^cuda.*= None' "$VENV"/lib/python3*/site-packages/torch/version.py; then
        die "this registry's torch is a CUDA build, which a CPU machine can't import: point pip at a CPU build of" \
            "$(grep '^torch==' "$LOCK") (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), then run this again"
    fi
    die "torch was installed but can't be imported; the log is $PWD/$LOG"
}

install() {
    local python=$1
    if [ ! -x "$VENV/bin/python" ]; then
        say "making $VENV with $("$python" --version)"
        make_venv "$python"
    fi
    touch "$BROKEN"
    say "installing $(grep -c '==' "$LOCK") packages of $LOCK (a few minutes the first time)"
    run "installing $LOCK" "$VENV/bin/python" -m pip install --no-input --progress-bar off --no-deps \
        --no-build-isolation --no-compile --requirement "$LOCK"
    say "  compiling what is imported"
    compile
    run "installing the project" "$VENV/bin/python" -m pip install --no-input --no-deps --no-build-isolation \
        --editable .
    check_torch
}

# One set-up at a time; a second one waits, then finds the work done.
exec 9<.
flock --wait 1800 9 || die "another set-up has been running in $PWD for 30 minutes: end it first"
CHILD=
trap 'trap - TERM; [ -z "$CHILD" ] || kill "$CHILD" 2>/dev/null; say "interrupted; the next run starts afresh"; exit 130' INT TERM

LOCK=locks/cpu.txt
if [ -n "${GPU:-}" ] && [ "$GPU" != 0 ]; then
    LOCK=locks/gpu.txt
elif [ -f "$STAMP" ]; then
    LOCK=$(head -n 1 "$STAMP") # what this .venv was made with stays, until GPU=1 or `make clean` says otherwise
fi
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$LOCK"$'\n'"$(fingerprint 2>/dev/null)" ]; then
    exit 0
fi

python=$(find_python)
SECONDS=0
if [ -e "$VENV" ]; then
    made_for=$(head -n 1 "$STAMP" 2>/dev/null || echo "$LOCK")
    if [ -e "$BROKEN" ] || [ "$made_for" != "$LOCK" ] || ! grep -qsF "$PWD/$VENV" "$VENV/bin/activate" ||
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
