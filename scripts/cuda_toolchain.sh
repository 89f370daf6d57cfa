#!/usr/bin/env bash
# Installs the CUDA compiler from PyPI (0.3 GB) into build/venv-cuda, where CMake finds it. No GPU
# and no driver is needed to compile. An nvcc that is in PATH or named by CUDACXX is used instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

if [[ -n ${CUDACXX:-} ]] || command -v nvcc >/dev/null; then
  echo "using ${CUDACXX:-$(command -v nvcc)}"
  exit 0
fi
need_venv build/venv-cuda python/requirements-cuda.txt
nvcc=(build/venv-cuda/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
"${nvcc[0]}" --version | tail -n 2
