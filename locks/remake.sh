#!/usr/bin/env bash
# Remakes locks/cpu.txt from locks/cpu.in (called by `make lock`): resolves, installs nothing.
# The comment lines at the head of the old file are kept. sglang alone is taken without its requirements.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

resolve() { # resolve REPORT PIP-ARGUMENTS...: what pip would install, as a JSON report
    ../.venv/bin/python -m pip install --dry-run --ignore-installed --quiet --no-input --report "$@"
}

sed 's/ *#.*//; /^$/d' cpu.in >"$work/all"
grep -v '^sglang==' "$work/all" >"$work/resolved"
resolve "$work/a.json" --requirement "$work/resolved"
resolve "$work/b.json" --no-deps "$(grep '^sglang==' "$work/all")"

sed '/^#/!Q' cpu.txt >"$work/cpu.txt"
../.venv/bin/python - "$work/a.json" "$work/b.json" >>"$work/cpu.txt" <<'PYTHON'
import json
import sys

packages = {}
for path in sys.argv[1:]:
    with open(path) as report:
        for item in json.load(report)["install"]:
            meta = item["metadata"]
            packages[meta["name"].lower().replace("_", "-").replace(".", "-")] = meta["version"].partition("+")[0]
for name, version in sorted(packages.items()):
    print(f"{name}=={version}")
PYTHON
mv "$work/cpu.txt" cpu.txt
grep -c '==' cpu.txt | sed 's/$/ packages in locks\/cpu.txt/'

# The GPU lock needs a resolver that can aim at another platform: uv, when it is there.
if command -v uv >/dev/null; then
    sed '/^#/!Q' gpu.txt >"$work/gpu.txt"
    uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_34 gpu.in >>"$work/gpu.txt"
    mv "$work/gpu.txt" gpu.txt
    grep -c '==' gpu.txt | sed 's/$/ packages in locks\/gpu.txt/'
else
    echo "locks/gpu.txt was left as it is: put uv on PATH to remake it"
fi
