#!/usr/bin/env bash
# Runs the packed tests:
#
#   run.sh [WORD...]     without words: full c examples sanitize bench
#
#   quick      every test, a few random cases           full   with the acceptance counts
#   c          bad input, a dead context and the host's time of a call, from C
#   examples   the example programs
#   sanitize   small shapes under compute-sanitizer: memory, races, uninitialised reads
#   bench      the read ceiling and the kernels, to bench.json and bench.svg in OUT (default: the current folder)
#
# FILTER picks tests by name; BENCH holds further words for `treeattn bench`. Each step has a limit, all together 8
# minutes. The last thing printed is a table of the steps; the exit status is 1 if one failed.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-$PWD}
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" TREEATTN_TEST_DATA="$here/data" RUST_BACKTRACE=0
chmod +x "$here"/gpu-tests "$here"/treeattn "$here"/examples/* "$here"/c/* 2>/dev/null
failed=0
SECONDS=0
summary=()

# try LIMIT LINES TITLE COMMAND...: shows the last LINES of what it says, more if it fails; all of it goes to a log in OUT.
try() {
    local limit=$1 lines=$2 title=$3 began=$SECONDS status result said
    shift 3
    printf '\n== %s (at most %d s)\n' "$title" "$limit"
    timeout -k 5 "$limit" "$@" >"$out/$title.log" 2>&1
    status=$?
    case $status in
    0) result=ok ;;
    77) result=skipped ;;
    124 | 137) result="FAILED: over its limit" failed=1 lines=60 ;;
    *) result="FAILED: exit $status" failed=1 lines=60 ;;
    esac
    tail -n "$lines" "$out/$title.log"
    said=$(grep -hE '^test result:|ERROR SUMMARY|RACECHECK SUMMARY|host time' "$out/$title.log" | tail -n 1 | cut -c 1-110)
    summary+=("$(printf '%-24s %-22s %4d s  %s' "$title" "$result" $((SECONDS - began)) "$said")")
}

mkdir -p "$out"
[ $# -gt 0 ] || set -- full c examples sanitize bench
for word in "$@"; do
    case $word in
    quick) try 100 30 tests-quick "$here/gpu-tests" ${FILTER:+"$FILTER"} ;;
    full) TREEATTN_TEST=full try 170 30 tests-full "$here/gpu-tests" ${FILTER:+"$FILTER"} ;;
    c) for program in bad_input dead_context host_time; do try 15 5 "c-$program" "$here/c/$program"; done ;;
    examples) for program in "$here"/examples/*; do [ ! -x "$program" ] || try 20 30 "example-$(basename "$program")" "$program"; done ;;
    sanitize)
        for tool in memcheck racecheck initcheck; do
            try 35 5 "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$here/gpu-tests" --exact small \
                --test-threads 1
        done
        ;;
    bench)
        # shellcheck disable=SC2086 # several words
        try 140 120 bench "$here/treeattn" bench --device cuda:0 --json "$out/bench.json" --plot "$out/bench.svg" ${BENCH:-}
        ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
printf '\n== summary, %d s in all\n\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit "$failed"
