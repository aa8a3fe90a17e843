#!/usr/bin/env python3
"""Times other implementations of the mixture-of-experts layer on given routings, on one CUDA device.

    gpu_peers.py CASES.json RESULTS.json [--seconds 90]

CASES.json is a list of {"name", "hidden", "inner", "experts", "top_k", "tokens", "compared", "file"}; "file" is
the path, relative to the list, of a file of little-endian numbers: [tokens * top_k] u32 experts, as many f32
gates, [tokens, hidden] bf16 inputs, and what the first `compared` tokens come to, [compared, hidden] f32.
`noise.bin` beside the list has the bf16 numbers that each projection of all experts repeats from its start.
All peers compute the same uncompressed layer:

    out[t] = sum_j gate[t, j] * down[e] (silu(gate_e x[t]) * (up_e x[t])),   e = expert[t, j]

Sorting the choices by expert is not timed where the peer lets us do it (all but those of transformers,
which sort for themselves). RESULTS.json is written anew after every case; for each peer it has the
median time, how it was launched (by CUDA graph, or plainly with the reason) and its relative distance
from the given results, or its error; being too far is one.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

FARTHEST = 2e-2  # the most that results may differ, relatively
BUDGET = 300  # milliseconds of repetitions for each case and peer
DEVICE = "cuda"


def times(run, repetitions):
    """Milliseconds of each run, from events around it."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def measure(run, capturable=True):
    """Median microseconds of `run` in at least 20 repetitions, from a CUDA graph where it can be one."""
    run()
    torch.cuda.synchronize()
    replay, how = run, "launches: it waits for the device"
    if capturable:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            replay, how = graph.replay, "graph"
        except Exception as error:  # a peer may do what no graph can hold
            how = f"launches: {error}"
    replay()
    repetitions = max(20, min(200, int(BUDGET / max(times(replay, 1)[0], 1e-3))))
    median = statistics.median(times(replay, repetitions)) * 1e3
    return {"microseconds": median, "repetitions": repetitions, "launched_by": how}


class Case:
    """Inputs, weights and sorted routing of one case."""

    def __init__(self, spec, folder, weights):
        self.name, self.hidden, self.inner = spec["name"], spec["hidden"], spec["inner"]
        self.experts, self.top_k, self.tokens = spec["experts"], spec["top_k"], spec["tokens"]
        self.gate_up, self.down = weights
        raw, start = bytearray((folder / spec["file"]).read_bytes()), 0

        def read(dtype, *shape):
            nonlocal start
            count = math.prod(shape)
            part = torch.frombuffer(raw, dtype=dtype, count=count, offset=start)
            start += count * dtype.itemsize
            return part.view(shape).to(DEVICE)

        choices = self.tokens * self.top_k
        self.chosen = read(torch.int32, choices).long()
        self.gates = read(torch.float32, choices)
        self.x = read(torch.bfloat16, self.tokens, self.hidden)
        self.out = read(torch.float32, spec["compared"], self.hidden)
        if len(raw) != start:
            raise ValueError(f"{spec['file']} has {len(raw)} bytes, not {start}")

        self.order = torch.argsort(self.chosen, stable=True)  # choice of each row
        self.row_of = torch.argsort(self.order)  # row of each choice
        self.row_tokens = self.order // self.top_k
        self.row_gates = self.gates[self.order].bfloat16()[:, None]
        self.ends = torch.bincount(self.chosen, minlength=self.experts).cumsum(0).int()
        bounds = enumerate(itertools.pairwise([0] + self.ends.tolist()))
        self.used = [(expert, start, end) for expert, (start, end) in bounds if start < end]


def make_weights(noise, hidden, inner, experts):
    """The weights of a layer: [experts, 2 * inner, hidden] and [experts, hidden, inner]."""
    shapes = (experts, 2 * inner, hidden), (experts, hidden, inner)
    gate_up, down = (torch.empty(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes)
    for projection in (gate_up[:, :inner], gate_up[:, inner:], down):
        count = projection.numel()
        projection.copy_(noise.repeat(-(-count // len(noise)))[:count].view(projection.shape))
    return gate_up, down


def torch_loop(case):
    """cuBLAS, expert by expert."""

    def run():
        out = torch.zeros_like(case.x)
        for expert, start, end in case.used:
            tokens = case.row_tokens[start:end]
            x = case.x.index_select(0, tokens)
            gate = x @ case.gate_up[expert, : case.inner].T
            up = x @ case.gate_up[expert, case.inner :].T
            y = (F.silu(gate) * up) @ case.down[expert].T
            out.index_add_(0, tokens, y * case.row_gates[start:end])
        return out

    return run, True


def torch_grouped(case):
    """PyTorch's grouped product (CUTLASS), with gather and weighted sum around it."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def run():
        x = case.x[case.row_tokens]
        gate, up = product(x, case.gate_up.transpose(1, 2), offs=case.ends).chunk(2, dim=-1)
        y = product(F.silu(gate) * up, case.down.transpose(1, 2), offs=case.ends) * case.row_gates
        return y[case.row_of].view(case.tokens, case.top_k, case.hidden).sum(1)

    return run, True


def transformers(implementation):
    """The experts of transformers' OLMoE, under one of its implementations."""

    def prepare(case):
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        sizes = {"hidden_size": case.hidden, "intermediate_size": case.inner}
        config = OlmoeConfig(num_experts=case.experts, num_experts_per_tok=case.top_k, **sizes)
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(case.gate_up, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(case.down, requires_grad=False)
        chosen = case.chosen.view(case.tokens, case.top_k)
        gates = case.gates.view(case.tokens, case.top_k).bfloat16()  # as its router returns them
        return lambda: experts(case.x, chosen, gates), implementation != "eager"

    return prepare


@triton.jit
def grouped_kernel(
    a, w, y, sources, targets, scales, tile_experts, tile_firsts, ends, k_size, n_size,
    SWIGLU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one expert: `y[targets[row]] = scales[row] * (w[expert] @ a[sources[row]])`, or
    `y[targets[row]] = silu(gate) * up` with the two halves of `w[expert]: [2 * n_size, k_size]`."""
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    rows = tl.load(tile_firsts + tile) + tl.arange(0, BM)
    live = rows < tl.load(ends + expert)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    source = tl.load(sources + rows, mask=live, other=0).to(tl.int64)
    at_a = a + source[:, None] * k_size + k[None, :]
    height = n_size * 2 if SWIGLU else n_size
    at_w = w + expert * height * k_size + (n % n_size)[None, :] * k_size + k[:, None]
    first = tl.zeros((BM, BN), dtype=tl.float32)
    second = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, k_size, BK):
        block = tl.load(at_a)
        first = tl.dot(block, tl.load(at_w), first)
        if SWIGLU:
            second = tl.dot(block, tl.load(at_w + n_size * k_size), second)
        at_a += BK
        at_w += BK
    if SWIGLU:
        first = first * tl.sigmoid(first) * second
    else:
        first = first * tl.load(scales + rows, mask=live, other=0)[:, None]
    target = tl.load(targets + rows, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (n < n_size)[None, :]
    tl.store(y + target[:, None] * n_size + n[None, :], first.to(y.dtype.element_ty), mask=mask)


BK = 64
# Rows, columns, warps and stages of a tile; they fit into the shared memory of an A100.
SHALLOW = [(16, 32, 4, 5), (16, 64, 4, 4), (16, 128, 4, 4)]
MIDDLE = [(64, 128, 4, 4), (64, 256, 8, 3)]
DEEP = [*MIDDLE, (128, 128, 8, 3), (128, 128, 8, 4)]
WIDE = [(128, 256, 8, 3)]  # too large for two accumulators


def tiles(case, rows):
    """The expert and the first row of each tile of `rows` rows."""
    found = [(expert, row) for expert, start, end in case.used for row in range(start, end, rows)]
    return [torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in zip(*found)]


def tuned_product(case, a, w, y, sources, targets, swiglu):
    """The grouped product with the fastest of the tiles that suit the number of rows of an expert."""
    k_size, n_size = a.shape[1], y.shape[1]
    if k_size % BK:
        raise ValueError(f"a width of {k_size} is no multiple of {BK}")
    rows = len(case.chosen) / len(case.used)
    shapes = SHALLOW if rows <= 16 else SHALLOW[2:] + MIDDLE if rows <= 64 else DEEP if swiglu else DEEP + WIDE
    scales = case.row_gates.view(-1).float()
    runs = []
    for bm, bn, warps, stages in shapes:
        of, first = tiles(case, bm)
        run = functools.partial(
            grouped_kernel[(len(of), triton.cdiv(n_size, bn))],
            a, w, y, sources, targets, scales, of, first, case.ends, k_size, n_size,
            SWIGLU=swiglu, BM=bm, BN=bn, BK=BK, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        run()  # compiles
        runs.append((min(times(run, 5)), run))
    return min(runs, key=lambda timed: timed[0])[1]


def triton_grouped(case):
    """Two Triton kernels with gather, activation and scatter in them, then the sum over the choices."""
    rows = torch.arange(len(case.chosen), device=DEVICE)
    h = case.x.new_empty(len(rows), case.inner)
    y = case.x.new_empty(len(rows), case.hidden)
    up = tuned_product(case, case.x, case.gate_up, h, case.row_tokens, rows, True)
    down = tuned_product(case, h, case.down, y, rows, case.order, False)

    def run():
        up()
        down()
        return y.view(case.tokens, case.top_k, case.hidden).sum(1)

    return run, True


def peers(case):
    """Every peer that makes sense for a case."""
    found = {"torch_loop": torch_loop, "torch_grouped_mm": torch_grouped, "triton": triton_grouped}
    # generate() switches to batched_mm, which copies the weights of every choice.
    for name in ["grouped_mm", "eager"] + ["batched_mm"] * (case.tokens <= 4):
        found[f"transformers_{name}"] = transformers(name)
    return found


def time_case(case, deadline):
    """Times and distances of all peers; a failure is the result of its peer."""
    results = {}
    for name, prepare in peers(case).items():
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("not run")
            run, capturable = prepare(case)
            out = run()[: len(case.out)].float()
            distance = ((out - case.out).norm() / case.out.norm()).item()
            if not distance < FARTHEST:
                raise ArithmeticError(f"the results differ by {distance}")
            results[name] = measure(run, capturable) | {"distance": distance}
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(case.name, name, results[name], file=sys.stderr)
    return results


def device_limits():
    """What the device does at best: a large product, and a copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
    product = measure(lambda: a @ b)
    source, target = torch.zeros(2, 2**28, device=DEVICE)
    copy = measure(lambda: target.copy_(source))
    tflops = 2 * 8192**3 / product["microseconds"] / 1e6
    return {"matmul_tflops": tflops, "copy_gb_per_s": 2 * 4 * 2**28 / copy["microseconds"] / 1e3}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=90, help="start no peer after this time")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    results = {"device": torch.cuda.get_device_name(), **versions, **device_limits(), "cases": []}
    shape, weights = None, None
    raw = bytearray((arguments.cases.parent / "noise.bin").read_bytes())
    noise = torch.frombuffer(raw, dtype=torch.bfloat16).to(DEVICE)
    for spec in json.loads(arguments.cases.read_text()):
        entry = {"name": spec["name"], "peers": {}}
        try:
            if shape != (shape := (spec["hidden"], spec["inner"], spec["experts"])):
                weights = None  # frees the old ones first
                weights = make_weights(noise, *shape)
            entry["peers"] = time_case(Case(spec, arguments.cases.parent, weights), deadline)
        except Exception as error:
            traceback.print_exc()
            entry["error"] = f"{type(error).__name__}: {error}"
        results["cases"].append(entry)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
