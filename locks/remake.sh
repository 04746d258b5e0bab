#!/usr/bin/env bash
# Resolves cpu.in, gpu.in and docs.in into the lock files without installing anything; `make lock` calls it. A locked
# version is kept if it still fits; `make lock ARGS=--upgrade` selects the newest versions that the .in files allow.
# uv resolves, because a lock has one version of each package for two Pythons, and pip can't resolve for two Pythons at
# once. sglang, and no other package, is locked without its requirements in cpu.txt. The comments at the top of the old
# files are kept.
set -euo pipefail
cd "$(dirname "$0")"
python=$PWD/../.venv/bin/python
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} # as in launch/setup.sh
LIBRARIES='nvidia-.*|cuda-.*'                                    # libraries that only torch's CUDA build needs
if ! "$python" -c 'import uv' 2>/dev/null; then
    echo "make lock needs uv, which is one of the packages for CPUs: run make setup GPU=0" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/pyproject.toml" <<'TOML'
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64' and platform_python_implementation == 'CPython' and python_full_version < '3.13'"]
TOML

uv() { # uv INPUT OUTPUT ARGUMENTS...: resolves $work/INPUT for both Pythons into $work/OUTPUT
    (cd "$work" && "$python" -m uv pip compile --quiet --no-header --no-annotate --system-certs --universal \
        --python-version 3.11 --fork-strategy fewest "$1" --output-file "$2" "${@:3}")
}

resolve() { # resolve NAME UV-ARGUMENTS...: resolves $work/NAME.in into $work/pylock.NAME.toml, with every file's hash
    uv "$1.in" "$1.txt" "${@:2}" # prefers the versions that its output file already contains
    uv "$1.in" "pylock.$1.toml" --constraint "$1.txt" --format pylock.toml
}

write() { # write LOCK REGEX PYLOCK...: writes the packages of the PYLOCK files whose name matches REGEX into LOCK
    sed '/^#/!Q' "$1" >"$work/lock"
    "$python" write.py "$2" "${@:3}" >>"$work/lock"
    cp "$work/lock" "$1"
    echo "$(grep -c '==' "$1") packages in locks/$1"
}

sed 's/ *#.*//; /^$/d' cpu.in >"$work/all"
grep -v '^sglang==' "$work/all" >"$work/cpu.in"
grep '^sglang==' "$work/all" >"$work/sglang.in"
cat cpu.txt torch-cuda.txt >"$work/cpu.txt"
resolve cpu "$@"
uv sglang.in pylock.sglang.toml --no-deps --format pylock.toml
write cpu.txt "(?!(torch|$LIBRARIES)\$).*" "$work/pylock.cpu.toml" "$work/pylock.sglang.toml"
write torch-cuda.txt "torch|$LIBRARIES" "$work/pylock.cpu.toml"

# The same version of torch, built for CPUs. It comes from PyTorch's own index, which is not reachable everywhere.
sed -n 's/^torch==[^ ]*/&+cpu/p' "$work/all" >"$work/torch.in"
if grep -qFf "$work/torch.in" torch-cpu.txt; then
    echo "locks/torch-cpu.txt already has this version of torch"
else
    uv torch.in pylock.torch.toml --no-deps --format pylock.toml --index-url "$TORCH_INDEX"
    write torch-cpu.txt torch "$work/pylock.torch.toml"
fi

for name in gpu docs; do
    cp $name.in $name.txt "$work"
    resolve $name "$@"
    write $name.txt '.*' "$work/pylock.$name.toml"
done
