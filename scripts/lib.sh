# shellcheck shell=bash disable=SC2034
# Helpers of demo.sh and test.sh; sourced, with the repository root as working directory. (SC2034:
# the lists of packages are for those two.)

LOGS=build/logs
BUILD_PACKAGES=(g++ cmake ninja-build pkg-config nlohmann-json3-dev libcli11-dev libfmt-dev
                libpcre2-dev libutf8proc-dev libssl-dev libopenblas-openmp-dev libdnnl-dev
                python3 python3-venv)
TEST_PACKAGES=(libgtest-dev librapidcheck-dev)
CLANG_PACKAGES=(clang libomp-14-dev libclang-rt-14-dev llvm)

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

die() {
  printf '%s: error: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# quietly NAME COMMAND...: its output goes to build/logs/NAME.log, whose end is shown if it fails.
quietly() {
  local log=$LOGS/$1.log status=0
  shift
  mkdir -p "$LOGS"
  "$@" >"$log" 2>&1 </dev/null || status=$?
  if ((status != 0)); then
    printf -- '---- end of %s:\n' "$log" >&2
    tail -n 60 "$log" >&2
  fi
  return "$status"
}

# ---- Debian packages ----------------------------------------------------------------------------

have_package() {
  [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# have_packages PACKAGE...: true if all of them are installed.
have_packages() {
  local package
  for package; do
    have_package "$package" || return 1
  done
}

apt_updated=no

# need_packages PACKAGE...: installs those that are missing; leaves apt alone if none is.
need_packages() {
  local package missing=() as_root=()
  [[ -z ${NIBBLE_NO_INSTALL:-} ]] || return 0
  command -v dpkg-query >/dev/null ||
    die "this is no Debian system: install the equivalents of $*, then set NIBBLE_NO_INSTALL=1"
  for package; do
    have_package "$package" || missing+=("$package")
  done
  ((${#missing[@]} > 0)) || return 0

  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      die "these Debian packages are missing and need root or sudo to install: ${missing[*]}"
    as_root=(sudo)
    if [[ ! -t 0 ]]; then
      sudo -n true 2>/dev/null ||
        die "sudo asks for a password; install these Debian packages first: ${missing[*]}"
      as_root=(sudo -n)
    elif ! sudo -v; then # asks for the password here, where the question can be seen
      die "sudo refused; install these Debian packages first: ${missing[*]}"
    fi
  fi
  as_root+=(env DEBIAN_FRONTEND=noninteractive)

  say "installing Debian packages: ${missing[*]}"
  if [[ $apt_updated == no ]]; then
    quietly apt-update "${as_root[@]}" apt-get update -q ||
      say "apt-get update failed; trying with the package lists that are here"
    apt_updated=yes
  fi
  quietly apt-install "${as_root[@]}" apt-get install -qy --no-install-recommends "${missing[@]}" ||
    die "apt-get could not install: ${missing[*]}"
}

# ---- Python packages ----------------------------------------------------------------------------

# need_venv DIR REQUIREMENTS [PIP-OPTION...]: a virtual environment with exactly these packages.
need_venv() {
  local venv=$1 requirements=$2
  shift 2
  if cmp -s "$requirements" "$venv/installed.txt" && "$venv/bin/python" -c '' 2>/dev/null; then
    return 0
  fi
  say "installing Python packages of $requirements into $venv"
  quietly "${venv##*/}" python3 -m venv --clear "$venv" || die "python3 -m venv failed"
  quietly "${venv##*/}" "$venv/bin/pip" install --no-input --disable-pip-version-check \
    --only-binary :all: "$@" -r "$requirements" || die "pip could not install $requirements"
  cp "$requirements" "$venv/installed.txt"
}

# ---- CMake --------------------------------------------------------------------------------------

build_dir() {
  case $1 in
    release | ci) echo build ;;
    *) echo "build/$1" ;;
  esac
}

cache_value() { # BUILD_DIR VARIABLE
  sed -n "s|^$2:[A-Z]*=||p" "$1/CMakeCache.txt" 2>/dev/null || true
}

# configure PRESET [CMAKE-OPTION...]: starts over where the directory was configured by another
# generator or for another checkout, which CMake would refuse.
configure() {
  local preset=$1 dir fresh=()
  dir=$(build_dir "$preset")
  shift
  if [[ -e $dir/CMakeCache.txt ]] &&
    [[ $(cache_value "$dir" CMAKE_GENERATOR) != Ninja ||
      $(cache_value "$dir" CMAKE_HOME_DIRECTORY) != "$PWD" ]]; then
    fresh=(--fresh)
  fi
  say "configuring $dir (preset $preset)"
  quietly "configure-$preset" cmake "${fresh[@]}" --preset "$preset" "$@"
}

# compile PRESET [TARGET...]
compile() {
  local preset=$1 targets=()
  shift
  (($# == 0)) || targets=(--target "$@")
  say "building ${*:-everything} in $(build_dir "$preset")"
  quietly "build-$preset" cmake --build "$(build_dir "$preset")" "${targets[@]}"
}
