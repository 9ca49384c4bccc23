#!/usr/bin/env bash
# Runs the packed tests:
#
#   run.sh [WORD...]     without words: full ranks processes nccl c examples verify sanitize bench
#
#   quick      one rank: every test, a few random cases           full   with the acceptance counts
#   ranks      several ranks in one process, on one GPU and on two if there are two
#   processes  a rank a process, on as many GPUs as there are, up to four: at least two
#   nccl       steps over NCCL, and communicators that it connects, on as many GPUs: at least two
#   c          bad input, a dead context and the host's time of a call, from C
#   examples   the example programs
#   verify     what the GPUs can do for each other, and answers against float64, by the command line
#   sanitize   small shapes under compute-sanitizer: memory, races, uninitialised reads
#   bench      the read ceiling and the kernels, to bench.json and bench.svg in OUT (default: the current folder)
#
# Each step has a limit, and the limits are for the GPUs that there are; a step ends within 10 minutes. FILTER runs the tests
# of a step whose names contain it, in place of all; TREEATTN_TEST=full runs their acceptance counts, which take minutes
# each: pick them one at a time by FILTER. BENCH holds further words for `treeattn bench`. All that the steps say goes to
# log.txt in OUT. Every step of tests ends with the seconds that its slowest tests took; last comes a table of the steps.
# The exit status is 1 if one failed.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-$PWD}
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" TREEATTN_TEST_DATA="$here/data" RUST_BACKTRACE=0
chmod +x "$here"/gpu-tests "$here"/treeattn "$here"/examples/* "$here"/c/* 2>/dev/null
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
SECONDS=0
summary=()

# try LIMIT LINES TITLE COMMAND...: shows the last LINES of what it says, more if it fails.
try() {
    local limit=$1 lines=$2 title=$3 began=$SECONDS status result said
    shift 3
    printf '\n== %s (at most %d s)\n' "$title" "$limit" | tee -a "$out/log.txt"
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    status=$?
    cat "$log" >>"$out/log.txt"
    case $status in
    0) result=ok ;;
    77) result=skipped ;;
    124 | 137) result="FAILED: over its limit" failed=1 lines=60 ;;
    *) result="FAILED: exit $status" failed=1 lines=60 ;;
    esac
    grep -vE '^$|^took ' "$log" | tail -n "$lines"
    times
    said=$(grep -hE '^test result:|ERROR SUMMARY|RACECHECK SUMMARY|host time|skipped' "$log" | tail -n 1 | cut -c 1-110)
    summary+=("$(printf '%-24s %-22s %4d s  %s' "$title" "$result" $((SECONDS - began)) "$said")")
}

# The slowest tests of what was run last.
times() {
    local found
    found=$(grep -E '^took +[0-9.]+ s ' "$log" | sort -k 2 -nr | head -n 40)
    [ -z "$found" ] || sed 's/^/-- /' <<<"$found"
}

# sanitize TOOL OPTION...
sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "skipped: no compute-sanitizer here"; return 77; }
    compute-sanitizer --tool "$@" --error-exitcode 9 "$here/gpu-tests" --exact small --test-threads 1
}
export -f sanitize
export here PATH="$PATH:/usr/local/cuda/bin"

mkdir -p "$out"
: >"$out/log.txt"
[ $# -gt 0 ] || set -- full ranks processes nccl c examples verify sanitize bench
# More tests side by side wait for each other in the driver.
one=(--test-threads 6 --skip ranks_ --skip processes_ --skip nccl_)
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
# limit SECONDS: for one GPU; ranks run all over again on a second one.
limit() {
    if [ "${TREEATTN_TEST:-}" = full ]; then echo 590; elif [ "$gpus" -gt 1 ]; then echo $((2 * $1 + 20)); else echo "$1"; fi
}
for word in "$@"; do
    case $word in
    quick) try 300 30 tests-quick "$here/gpu-tests" "${one[@]}" ${FILTER:+"$FILTER"} ;;
    full) TREEATTN_TEST=full try 240 30 tests-full "$here/gpu-tests" "${one[@]}" ${FILTER:+"$FILTER"} ;;
    ranks) try "$(limit 180)" 60 tests-ranks "$here/gpu-tests" "${FILTER:-ranks_}" ;;
    processes) try "$(limit 80)" 30 tests-processes "$here/gpu-tests" "${FILTER:-processes_}" ;;
    nccl) try "$(limit 100)" 30 tests-nccl "$here/gpu-tests" "${FILTER:-nccl_}" ;;
    c) for program in bad_input dead_context host_time; do try 20 5 "c-$program" "$here/c/$program"; done ;;
    examples) for program in "$here"/examples/*; do [ ! -x "$program" ] || try 30 30 "example-$(basename "$program")" "$program"; done ;;
    verify)
        try 120 20 verify-device "$here/treeattn" verify --device cuda:0
        [ "$gpus" -lt 2 ] || try 300 20 verify-ranks "$here/treeattn" verify --ranks cuda:0,cuda:1
        ;;
    sanitize)
        # Asking for a kernel that a build does not have is no error.
        try 45 5 sanitizer-memcheck bash -c 'sanitize "$@"' sanitize memcheck --report-api-errors no
        try 45 5 sanitizer-racecheck bash -c 'sanitize "$@"' sanitize racecheck
        try 45 5 sanitizer-initcheck bash -c 'sanitize "$@"' sanitize initcheck
        ;;
    bench)
        # shellcheck disable=SC2086 # several words
        try 120 120 bench "$here/treeattn" bench --device cuda:0 --json "$out/bench.json" --plot "$out/bench.svg" ${BENCH:-}
        ;;
    *) sed -n '2,22s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
printf '\n== summary, %d s in all\n\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit "$failed"
