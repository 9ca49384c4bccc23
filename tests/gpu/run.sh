#!/usr/bin/env bash
# Runs the packed tests:
#
#   run.sh [WORD...]     without words: full ranks c examples sanitize bench
#
#   quick      one rank: every test, a few random cases           full   with the acceptance counts
#   ranks      several ranks, on one GPU and on as many as there are
#   c          bad input, a dead context and the host's time of a call, from C
#   examples   the example programs
#   sanitize   small shapes under compute-sanitizer: memory, races, uninitialised reads
#   bench      the read ceiling and the kernels, to bench.json and bench.svg in OUT (default: the current folder)
#
# FILTER picks tests of one rank by name; BENCH holds further words for `treeattn bench`. Each step has a limit, all together 10
# minutes. All that the steps say goes to log.txt in OUT; the last thing printed is a table of the steps. The exit status
# is 1 if one failed.
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
    tail -n "$lines" "$log"
    said=$(grep -hE '^test result:|ERROR SUMMARY|RACECHECK SUMMARY|host time|skipped' "$log" | tail -n 1 | cut -c 1-110)
    summary+=("$(printf '%-24s %-22s %4d s  %s' "$title" "$result" $((SECONDS - began)) "$said")")
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
[ $# -gt 0 ] || set -- full ranks c examples sanitize bench
one=(--skip ranks_ --skip processes_ --skip allreduce3_)
for word in "$@"; do
    case $word in
    quick) try 100 30 tests-quick "$here/gpu-tests" "${one[@]}" ${FILTER:+"$FILTER"} ;;
    full) TREEATTN_TEST=full try 170 30 tests-full "$here/gpu-tests" "${one[@]}" ${FILTER:+"$FILTER"} ;;
    ranks)
        try 80 20 tests-ranks "$here/gpu-tests" ranks_
        for filter in processes_ allreduce3_; do try 45 20 "tests-${filter%_}" "$here/gpu-tests" "$filter"; done
        ;;
    c) for program in bad_input dead_context host_time; do try 10 5 "c-$program" "$here/c/$program"; done ;;
    examples) for program in "$here"/examples/*; do [ ! -x "$program" ] || try 20 30 "example-$(basename "$program")" "$program"; done ;;
    sanitize)
        # Asking for a kernel that a build does not have is no error.
        try 35 5 sanitizer-memcheck bash -c 'sanitize "$@"' sanitize memcheck --report-api-errors no
        try 35 5 sanitizer-racecheck bash -c 'sanitize "$@"' sanitize racecheck
        try 35 5 sanitizer-initcheck bash -c 'sanitize "$@"' sanitize initcheck
        ;;
    bench)
        # shellcheck disable=SC2086 # several words
        try 60 120 bench "$here/treeattn" bench --device cuda:0 --json "$out/bench.json" --plot "$out/bench.svg" ${BENCH:-}
        ;;
    *) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
printf '\n== summary, %d s in all\n\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit "$failed"
