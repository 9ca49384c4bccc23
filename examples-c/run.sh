#!/usr/bin/env bash
# Runs the given programs one after the other, then says in a table how each ended. Fails if one failed.
set -u
failed=0
summary=""
for program in "$@"; do
    name=$(basename "$program")
    printf '\n== %s\n\n' "$name"
    start=$(date +%s%N)
    if "$program"; then result=ok; else result="FAILED (exit $?)" failed=$((failed + 1)); fi
    ms=$((($(date +%s%N) - start) / 1000000))
    summary+=$(printf '%-24s  %-18s  %4d.%d s' "$name" "$result" $((ms / 1000)) $((ms % 1000 / 100)))$'\n'
done
printf '\n== summary\n\n%s\n%d examples, %d failed\n' "$summary" $# "$failed"
exit $((failed > 0))
