#!/usr/bin/env bash
# Installs what pack.sh made beside the machine's own torch, and prints the variables that a run needs.
#
#   source benchmarks/gpu/setup.sh FOLDER TARGET
set -e
folder=$(realpath "$1") target=$(realpath -m "$2")
repository=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
if [ ! -d "$target/site" ]; then
  mkdir -p "$target"
  chmod +x "$folder/zstd"
  cat "$folder"/site.tar.zst.* | LD_LIBRARY_PATH="$folder" "$folder/zstd" -dcq | tar -xf - -C "$target"
  python3 -m compileall -q -j 0 "$target/site" > "$target/compileall.log" 2>&1 || true # some files are templates
fi
export PYTHONPATH="$repository:$target/site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# SGLang's radix tree in Rust reads tensors by the layout of a later torch.
export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
# SGLang asks for a kernel package that was built for a later torch.
export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
set +e
