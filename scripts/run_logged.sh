#!/bin/sh
# run_logged.sh LOG COMMAND...: keeps what COMMAND prints in LOG, and shows it only if it fails.
log=$1
shift
"$@" >"$log" 2>&1 && exit 0
status=$?
cat "$log" >&2
exit "$status"
