#!/usr/bin/env bash
# Runs the given programs one after the other, then says in a table how each ended. Fails if one failed. An example's own
# run.sh, where it has one, gets the program instead; it may say with status 77 that it cannot run here. LEFT_OUT names
# the examples that were not built.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
failed=0
summary=""
for program in "$@"; do
    name=$(basename "$program")
    printf '\n== %s\n\n' "$name"
    start=$(date +%s%N)
    if [ -x "$here/$name/run.sh" ]; then "$here/$name/run.sh" "$program"; else "$program"; fi
    code=$?
    case $code in
        0) result=ok ;;
        77) result=skipped ;;
        *) result="FAILED (exit $code)" failed=$((failed + 1)) ;;
    esac
    ms=$((($(date +%s%N) - start) / 1000000))
    summary+=$(printf '%-24s  %-18s  %4d.%d s' "$name" "$result" $((ms / 1000)) $((ms % 1000 / 100)))$'\n'
done
for name in ${LEFT_OUT:-}; do
    summary+=$(printf '%-24s  %s' "$name" "skipped: no mpicc (Debian: libopenmpi-dev, openmpi-bin)")$'\n'
done
printf '\n== summary\n\n%s\n%d examples, %d failed\n' "$summary" $# "$failed"
exit $((failed > 0))
