#!/usr/bin/env bash
# Runs the given programs one after the other, then says in a table how each ended. Fails if one failed. An example's own
# run.sh, where it has one, gets the program instead. Status 77 says that a program cannot run here, and its last line says
# why. NO_MPI and NO_CUDA name the examples that were not built.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
said=$(mktemp)
trap 'rm -f "$said"' EXIT
failed=0
skipped=0
summary=""
for program in "$@"; do
    name=$(basename "$program")
    printf '\n== %s\n\n' "$name"
    start=$(date +%s%N)
    if [ -x "$here/$name/run.sh" ]; then "$here/$name/run.sh" "$program"; else "$program"; fi 2>&1 | tee "$said"
    code=${PIPESTATUS[0]}
    case $code in
        0) result=ok ;;
        77) result="skipped: $(tail -n 1 "$said" | sed 's/^skipped: //')" skipped=$((skipped + 1)) ;;
        *) result="FAILED (exit $code)" failed=$((failed + 1)) ;;
    esac
    ms=$((($(date +%s%N) - start) / 1000000))
    summary+=$(printf '%-24s  %-18s  %4d.%d s' "$name" "$result" $((ms / 1000)) $((ms % 1000 / 100)))$'\n'
done
# left_out WHY NAME...
left_out() {
    local why=$1 name
    shift
    for name in "$@"; do
        summary+=$(printf '%-24s  skipped: %s' "$name" "$why")$'\n'
        skipped=$((skipped + 1))
    done
}
left_out "no mpicc (Debian: libopenmpi-dev, openmpi-bin)" ${NO_MPI:-}
left_out "no CUDA toolkit (looked at CUDA_HOME, TREEATTN_NVCC, PATH and /usr/local/cuda)" ${NO_CUDA:-}
count=$(grep -c . <<<"$summary")
printf '\n== summary\n\n%s\n%d examples, %d failed, %d skipped\n' "$summary" "$count" "$failed" "$skipped"
exit $((failed > 0))
