#!/usr/bin/env bash
# Builds FlashInfer's prefill attention for Hopper as build/flashinfer/libflashinfer_peer.so, from the
# headers of its wheel on PyPI (60 MB, with the CUTLASS and CCCL that they want). No GPU is needed.
#
#     build/cuda/bench_cuda_layer prefill --flashinfer build/flashinfer/libflashinfer_peer.so
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

VERSION=0.7.2.post1
out=build/flashinfer
nvcc=${CUDACXX:-$(command -v nvcc || compgen -G 'build/venv-cuda/lib/python3*/site-packages/nvidia/cu13/bin/nvcc')} ||
  die "no nvcc: run scripts/cuda_toolchain.sh first"
mkdir -p "$out"
if [[ ! -d $out/wheel ]]; then
  python3 -m pip download --quiet --no-deps --only-binary :all: -d "$out" \
    "flashinfer-python==$VERSION"
  python3 -m zipfile -e "$out/flashinfer_python-$VERSION-py3-none-any.whl" "$out/wheel.part"
  mv "$out/wheel.part" "$out/wheel"
fi
data=$out/wheel/flashinfer/data
quietly flashinfer_peer "$nvcc" -std=c++20 -O3 --expt-relaxed-constexpr -DNDEBUG -w \
  -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler=-fPIC \
  -I"$data/include" -I"$data/cutlass/include" -I"$data/cutlass/tools/util/include" \
  -I"$data/cccl/libcudacxx/include" -I"$data/cccl/cub" -I"$data/cccl/thrust" \
  tests/cuda/flashinfer_peer.cu -o "$out/libflashinfer_peer.so"
echo "$out/libflashinfer_peer.so"
