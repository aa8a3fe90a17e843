#!/usr/bin/env bash
# run.sh [RESULTS] [PART]...
#
# What a machine with a card does with this folder, all parts or those that are named:
#   checks     the CUDA kernels against the reference, operations on tensors and models on the card against those
#              on the CPU
#   sanitizer  looks for bad memory accesses and races
#   kernels    times layers beside others' kernels
#   models     times a model of full size, from its synthesis to its recovery, beside transformers and peft; needs
#              40 GB in the folder that TMPDIR names, /tmp if none does
# Needs a card, a driver for CUDA 13, NVRTC, cuBLAS, cuRAND, CUDA's runtime, and xz. Results go to the folder RESULTS,
# `results` beside this file if there is none: logs, tables, and `checks.json` with what was checked, where and by
# which numbers. Checks draw new numbers in every run; LIGHTMOE_SEED gives those of an earlier one. Timings follow
# checks that passed. Exit code 0 only if all went well.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-$here/results}"
out=$(cd "${1:-$here/results}" && pwd)
parts=" ${*:2} "
for part in $parts; do
    case $part in
    checks | sanitizer | kernels | models) ;;
    *) echo "no part is named $part; there are checks, sanitizer, kernels and models" >&2 && exit 2 ;;
    esac
done
wanted() { [ "$parts" = "  " ] || [[ $parts == *" $1 "* ]]; }

# The libraries: from the toolkit, or from the packages of the Python that is here.
python=${PYTHON:-python3}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null)
for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" "$packages"/nvidia/cu*/lib "$packages"/nvidia/*/lib; do
    if [ -d "$folder" ]; then
        LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
    fi
done
export LD_LIBRARY_PATH LIGHTMOE_GPU=1

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for name in tensors models lightmoe; do
    xz -dc "$here/$name.xz" >"$scratch/$name" && chmod +x "$scratch/$name"
done
missing=
# The kernels' own programs look for what they need as they run.
if wanted checks || wanted sanitizer || wanted models; then
    missing=$(ldd "$scratch"/{tensors,models,lightmoe} 2>/dev/null | awk '/not found/ {print $1}' | sort -u)
fi
if [ -n "$missing" ]; then
    echo "libraries are missing:" $missing >&2
    echo "libcuda comes with the driver, the others with the toolkit of CUDA 13 (CUDA_HOME names its folder) or the" \
        "packages nvidia-cuda-runtime, nvidia-cublas, nvidia-curand and nvidia-cuda-nvrtc of a Python (PYTHON)" >&2
    exit 3
fi

LIGHTMOE_SEED=${LIGHTMOE_SEED:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
export LIGHTMOE_SEED
card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
checked=

# check NAME COMMAND...: runs tests, and notes what came of them.
check() {
    "${@:2}" --test-threads=1 --show-output 2>&1 | tee "$out/$1.log"
    local code=${PIPESTATUS[0]}
    count() { grep -oE "[0-9]+ $1" "$out/$2.log" | awk '{sum += $1} END {print sum + 0}'; }
    local passed skipped
    passed=$(count passed "$1") skipped=$(grep -c '^SKIPPED' "$out/$1.log")
    checked+=${checked:+,}$(printf '\n    "%s": {"exit_code": %d, "passed": %d, "failed": %d, "skipped": %d}' \
        "$1" "$code" "$passed" "$(count failed "$1")" "$skipped")
    # Nothing that ran, or all that was skipped, has checked nothing.
    [ "$code" = 0 ] && [ "$passed" -gt "$skipped" ] || failed=1
}

failed=0
if wanted checks; then
    echo "checks by LIGHTMOE_SEED=$LIGHTMOE_SEED"
    check tests "$here/tests"
    # The same kernels on candle's tensors.
    check tensors "$scratch/tensors" tensors between trained
    # Whole models: what they say, and how they learn.
    check models "$scratch/models"
fi
if wanted sanitizer; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            for name in "$here/tests" "$scratch/tensors"; do
                check "$tool-$(basename "$name")" compute-sanitizer --tool "$tool" --error-exitcode 9 "$name" quick
            done
        done
    else
        echo "SKIPPED: no compute-sanitizer, so no check of memory accesses" | tee "$out/sanitizer.log"
    fi
fi
machine=$(printf '"date": "%s",\n  "gpu": "%s",\n  "driver": "%s"' "$(date -u +%Y-%m-%d)" "$card" "$driver")
printf '{\n  %s\n}\n' "$machine" >"$out/machine.json"
# A run of other parts leaves the checks of an earlier one.
[ -z "$checked" ] || printf '{\n  %s,\n  "seed": %s,\n  "checks": {%s\n  }\n}\n' "$machine" "$LIGHTMOE_SEED" "$checked" \
    >"$out/checks.json"
if [ $failed != 0 ]; then
    echo "checks failed, so nothing was timed"
    exit $failed
fi
if wanted kernels; then
    rm -f "$out"/{bench,peers}.json "$out/kernels.md"
    "$here/bench" --out "$out" 2>&1 | tee "$out/bench.log" || failed=1
    if [ $failed = 0 ] && "$python" -c 'import torch' 2>/dev/null; then
        "$python" "$here/peers.py" "$out/inputs/cases.json" "$out/peers.json" 2>&1 | tee "$out/peers.log" || failed=1
    else
        echo "SKIPPED: no PyTorch, so no comparison with it" | tee "$out/peers.log"
    fi
    rm -rf "$out/inputs"
    [ -f "$out/bench.json" ] && { "$here/bench" --table "$out" | tee "$out/kernels.md" || failed=1; }
fi
if wanted models; then
    "$python" "$here/models.py" "$scratch/lightmoe" "$here/config.json" "$here/tokenizer" "$scratch/work" \
        "$out/models.json" 2>&1 | tee "$out/models-timed.log" || failed=1
fi
exit $failed
