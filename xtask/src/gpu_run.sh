#!/usr/bin/env bash
# Checks the CUDA kernels against the reference, and operations on tensors and models on the card against those on
# the CPU, looks for bad memory accesses, then times the kernels beside others'. Needs a card, a driver for CUDA 13, NVRTC, cuBLAS,
# cuRAND and CUDA's runtime. Results go to the folder that the first argument names, `results` beside this file
# if there is none. Exit code 0 only if every check passed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-$here/results}"
out=$(cd "${1:-$here/results}" && pwd)
rm -f "$out"/{bench,cases,peers}.json "$out/kernels.md"

# The libraries: from the toolkit, or from the packages of the Python that is here.
python=${PYTHON:-python3}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null)
for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" "$packages"/nvidia/cu*/lib "$packages"/nvidia/*/lib; do
    if [ -d "$folder" ]; then
        LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
    fi
done
export LD_LIBRARY_PATH LIGHTMOE_GPU=1

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
for name in tensors models; do
    gzip -dc "$here/$name.gz" >"$unpacked/$name" && chmod +x "$unpacked/$name"
done

failed=0
"$here/tests" --test-threads=1 2>&1 | tee "$out/tests.log" || failed=1
# The same kernels on candle's tensors.
"$unpacked/tensors" --test-threads=1 tensors 2>&1 | tee "$out/tensors.log" || failed=1
# Whole models: what they say, and how they learn.
"$unpacked/models" --test-threads=1 2>&1 | tee "$out/models.log" || failed=1
if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --error-exitcode 9 "$here/tests" --test-threads=1 quick 2>&1 | tee "$out/sanitizer.log" || failed=1
    compute-sanitizer --error-exitcode 9 "$unpacked/tensors" --test-threads=1 tensors::quick 2>&1 | tee -a "$out/sanitizer.log" || failed=1
else
    echo "SKIPPED: no compute-sanitizer, so no check of memory accesses" | tee "$out/sanitizer.log"
fi
if [ $failed = 0 ]; then
    "$here/bench" --out "$out" 2>&1 | tee "$out/bench.log" || failed=1
    if [ $failed = 0 ] && "$python" -c 'import torch' 2>/dev/null; then
        "$python" "$here/peers.py" "$out/cases.json" "$out/peers.json" 2>&1 | tee "$out/peers.log" || failed=1
    else
        echo "SKIPPED: no PyTorch, so no comparison with it" | tee "$out/peers.log"
    fi
    [ -f "$out/bench.json" ] && { "$here/bench" --table "$out" | tee "$out/kernels.md" || failed=1; }
else
    echo "checks failed, so nothing was timed"
fi
exit $failed
