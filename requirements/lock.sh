#!/usr/bin/env bash
# Resolve pyproject.toml into pinned files with hashes and without index addresses: requirements/lock.sh [UV]
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${1:-uv}
compile=("$uv" pip compile -q --python-platform x86_64-manylinux_2_36 --generate-hashes --no-emit-index-url --no-annotate
  --no-header --emit-build-options)
whole=(pyproject.toml --group dev --extra server --extra export --extra profile --extra http --extra rtx --extra baseline
  --extra parquet --extra index --extra ray)

echo uv | "${compile[@]}" --python-version 3.11 - -o requirements/uv.txt
# The whole environment of a machine without a GPU: what `make` installs.
"${compile[@]}" --python-version 3.11 "${whole[@]}" --extra cpu -o requirements/all.txt
# The whole environment of a GPU host: `make setup-gpu`. What both have is the same version.
"${compile[@]}" --python-version 3.11 "${whole[@]}" --extra gpu --constraint requirements/all.txt -o requirements/gpu.txt
# What `make setup-trt` adds to it.
echo 'tensorrt-cu13<11' |
  "${compile[@]}" --python-version 3.11 --constraint requirements/gpu.txt - -o requirements/tensorrt.txt
# The client alone.
"${compile[@]}" --python-version 3.11 pyproject.toml --constraint requirements/all.txt -o requirements/client.txt
# What the container's Python models and its entry point import beside Triton's own packages (Ubuntu 24.04: Python 3.12).
printf 'numpy<2\npillow\npillow-heif\nregex\nftfy\ntritonclient[grpc]\ntyper\nrich\nonnx\n' |
  "${compile[@]}" --python-version 3.12 --constraint requirements/all.txt - -o requirements/container.txt
# What compiles the library of preprocess while the image is built.
echo ziglang | "${compile[@]}" --python-version 3.12 --constraint requirements/all.txt - -o requirements/container-kernel.txt
# What an image that exports by itself has besides.
printf 'numpy<2\ntorch\ntorchvision\nopen_clip_torch\nonnx\nonnxscript\nonnxruntime\nsafetensors\n' |
  "${compile[@]}" --python-version 3.12 --constraint requirements/all.txt - -o requirements/container-export.txt
