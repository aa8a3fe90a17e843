#!/usr/bin/env bash
# run.sh [RESULTS] [PART]...
#
# What a machine with a card does with this folder, all parts or those that are named:
#   checks     the CUDA kernels against the reference, operations on tensors and models on the card against those
#              on the CPU
#   sanitizer  looks for bad memory accesses
#   kernels    times layers beside others' kernels
#   models     times a model of full size, from its synthesis to its recovery, beside transformers and peft; needs
#              40 GB in the folder that TMPDIR names, /tmp if none does
# Needs a card, a driver for CUDA 13, NVRTC, cuBLAS, cuRAND, CUDA's runtime, and xz. Results go to the folder RESULTS,
# `results` beside this file if there is none. Timings follow checks that passed. Exit code 0 only if all went well.
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

failed=0
if wanted checks; then
    "$here/tests" --test-threads=1 2>&1 | tee "$out/tests.log" || failed=1
    # The same kernels on candle's tensors.
    "$scratch/tensors" --test-threads=1 tensors between trained 2>&1 | tee "$out/tensors.log" || failed=1
    # Whole models: what they say, and how they learn.
    "$scratch/models" --test-threads=1 2>&1 | tee "$out/models.log" || failed=1
fi
if wanted sanitizer; then
    if command -v compute-sanitizer >/dev/null; then
        : >"$out/sanitizer.log"
        for name in "$here/tests" "$scratch/tensors"; do
            compute-sanitizer --error-exitcode 9 "$name" --test-threads=1 quick 2>&1 | tee -a "$out/sanitizer.log" || failed=1
        done
    else
        echo "SKIPPED: no compute-sanitizer, so no check of memory accesses" | tee "$out/sanitizer.log"
    fi
fi
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
