#!/usr/bin/env bash
# Runs the example on four processes: once undisturbed, once with a rank that kills itself half-way.
set -euo pipefail
program=$1
if ! command -v mpirun >/dev/null; then
    echo "skipped: no mpirun (Debian: openmpi-bin)"
    exit 77
fi
options=(-n 4)
version=$(mpirun --version 2>/dev/null)
case $version in
    *"Open MPI"*)
        # More ranks than cores, and containers in which everybody is root.
        options+=(--oversubscribe)
        [ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
        ;;
esac
timeout 120 mpirun "${options[@]}" "$program"
case $version in
    # Without this option mpirun ends all ranks when one is lost; with it, it reports no rank's exit status.
    *"Open MPI) 4"*)
        printf '\n'
        timeout 120 mpirun "${options[@]}" --enable-recovery "$program" --kill 2 | tee "$program.log"
        grep -q '^ok: ' "$program.log"
        ;;
    *) echo "skipped: --kill, which needs an mpirun that leaves the other ranks alone (Open MPI 4)" ;;
esac
