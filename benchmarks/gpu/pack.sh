#!/usr/bin/env bash
# Makes the folder that setup.sh installs from: on a machine with a network, with Python 3.12.
#
#   bash benchmarks/gpu/pack.sh PYTHON FOLDER [PIECE_MB]
#
# FOLDER gets site.tar.zst in pieces of PIECE_MB (50) and a zstd that runs anywhere. Left out is what a GPU run does
# not need: kernels of other architectures, Flash Attention's 1.1 GB, tests, static libraries, debugging symbols.
set -euo pipefail
python=$1 folder=$(realpath -m "$2") piece_mb=${3:-50}
here=$(dirname "$(realpath "$0")")
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip install -q --no-deps --no-compile --target "$work/site" -r "$here/packages.txt"
cd "$work/site"
rm -rf bin jedi/third_party hf_xet ray/jars ray/cpp ray/include ray/dashboard/client ray/rllib ray/tests
rm -rf sglang/test sglang/multimodal_gen sglang/benchmark sglang/srt/rust_extensions/_bench*
rm -f sgl_kernel/{flash_ops,infllm_ops,flashmla_ops}* sgl_kernel/sm100/*
find . -name '*.a' -delete -o -name '*.pyi' -delete
find . -path '*/scipy/*' -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
# Libraries that a wheel's tools have moved break when they are stripped: those folders are left alone.
find . -name '*.so*' -size +1M -not -path './*.libs/*' -not -path './numpy/*' -exec strip --strip-unneeded {} + || true
strip --strip-unneeded ray/core/src/ray/gcs/gcs_server ray/core/src/ray/raylet/raylet
# SGLang imports its fused gate-up product, whose compiler (nvidia-cutlass-dsl, 0.2 GB) is left out; told that no shape
# suits it, it takes two products.
cat > sglang/kernels/ops/gemm/cutedsl_dual_gemm.py << 'PY'
from enum import IntEnum

MAX_DUAL_GEMM_DECODE_TOKENS = 0
DualGemmQuantMode = IntEnum(
    "DualGemmQuantMode", "STATIC_PER_TENSOR STATIC_PER_TOKEN DYNAMIC_PER_TENSOR DYNAMIC_PER_TOKEN UNQUANT", start=0
)


def can_use_dual_gemm(*shape: object) -> bool:
    return False
PY
# The entry point by which SGLang finds the product's CPU platform, without installing the product.
mkdir slime-0.1.0.dist-info
printf 'Metadata-Version: 2.1\nName: slime\nVersion: 0.1.0\n' > slime-0.1.0.dist-info/METADATA
printf '[sglang.srt.platforms]\nslime_cpu = rollout.sglang.platform:activate\n' > slime-0.1.0.dist-info/entry_points.txt
cd "$work"
tar --sort=name -cf - site | zstd -q -10 -T0 | split -b "${piece_mb}M" -d - "$folder/site.tar.zst."
cp -L "$(command -v zstd)" "$folder/zstd"
ldd "$folder/zstd" | awk '/=> \// && !/libc\.so/ {print $3}' | xargs -I{} cp -L {} "$folder/"
ls -l "$folder"
