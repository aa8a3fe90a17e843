#!/usr/bin/env python3
"""Times other implementations of the mixture-of-experts layer on given routings, on the CPU.

    cpu_peers.py CASES.json RESULTS.json

CASES.json is a list of cases; each is a list of batches that are taken in turn, and a batch is {"name", "hidden",
"inner", "experts", "top_k", "tokens", "compared", "file"}; "file" is the path, relative to the list, of a file of
little-endian numbers: [tokens * top_k] u32 experts, as many f32 gates, [tokens, hidden] bf16 inputs, and what the
first `compared` tokens come to, [compared, hidden] f32. All peers compute the same uncompressed layer with the
weights of `weights`, once with all in f32 and once with all in bf16:

    out[t] = sum_j gate[t, j] * down[e] (silu(gate_e x[t]) * (up_e x[t])),   e = expert[t, j]

For each peer there is the time and how far it is from the given results, or its error; being too far is one.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

BUDGET = 1.0  # seconds of repetitions for each case and peer
LEAST, MOST = 3, 30  # repetitions
TOO_LONG = 6.0  # seconds of what is not repeated
# The most that results may differ, relatively.
DTYPES = {"f32": (torch.float32, 1e-3), "bf16": (torch.bfloat16, 1e-2)}


def weights(to, seed):
    """Fills `to: [experts, out, in]` with hashed numbers of variance `1 / in`, the same wherever they are made."""
    size = (torch.tensor(3.0) / to.shape[2]).sqrt() / 2**31
    each = to[0].numel()
    for expert, matrix in enumerate(to):
        mixed = torch.arange(expert * each, (expert + 1) * each) ^ (seed << 20)
        for factor, shift in (0x9E3779B1, 15), (0x85EBCA6B, 13):
            mixed.mul_(factor).bitwise_and_(0xFFFFFFFF)
            mixed ^= mixed >> shift
        matrix.copy_(mixed.to(torch.int32).float().mul_(size).view(matrix.shape))


def distance(out, case):
    """How far results are from the given ones, relatively."""
    given = case["out"]
    return ((out[: len(given)].float() - given).norm() / given.norm()).item()


def measure(runs):
    """The mean over `runs`, in turn, of their median seconds, after all once beforehand; the seconds of that if it
    takes long."""

    def once(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    first = [once(run) for run in runs]
    if sum(first) > TOO_LONG:
        return statistics.mean(first)
    count = int(BUDGET / max(sum(first), 1e-6))
    rounds = [[once(run) for run in runs] for _ in range(max(LEAST, min(MOST, count)))]
    return statistics.mean(statistics.median(times) for times in zip(*rounds))


def torch_loop(case, gate_up, down):
    """Expert by expert, as most model files do."""
    x, chosen, inner = case["x"].to(down.dtype), case["chosen"], case["inner"]
    gates = case["gates"].to(x.dtype)

    def run():
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, choices = torch.where(chosen == expert)
            rows = x[tokens]
            gate, up = (rows @ gate_up[expert, part].T for part in (slice(inner), slice(inner, None)))
            y = (F.silu(gate) * up) @ down[expert].T
            out.index_add_(0, tokens, y * gates[tokens, choices, None])
        return out

    return run


def transformers(implementation):
    """The experts of transformers' OLMoE, under one of its implementations."""

    def prepare(case, gate_up, down):
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        sizes = {"hidden_size": case["hidden"], "intermediate_size": case["inner"]}
        counts = {"num_experts": case["experts"], "num_experts_per_tok": case["top_k"]}
        config = OlmoeConfig(**sizes, **counts)
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
        x, gates = (case[name].to(down.dtype) for name in ("x", "gates"))
        return lambda: experts(x, case["chosen"], gates)

    return prepare


PEERS = {
    "torch_loop": torch_loop,
    "transformers_eager": transformers("eager"),
    "transformers_grouped_mm": transformers("grouped_mm"),
}


def with_inputs(spec, folder):
    """A case with choices and gates `[tokens, top_k]`, inputs, and the results of its first tokens."""
    routing, hidden = (spec["tokens"], spec["top_k"]), spec["hidden"]
    parts = [
        ("chosen", torch.int32, routing),
        ("gates", torch.float32, routing),
        ("x", torch.bfloat16, (spec["tokens"], hidden)),
        ("out", torch.float32, (spec["compared"], hidden)),
    ]
    raw, start, case = bytearray((folder / spec["file"]).read_bytes()), 0, dict(spec)
    for name, dtype, shape in parts:
        count = math.prod(shape)
        case[name] = torch.frombuffer(raw, dtype=dtype, count=count, offset=start).view(shape)
        start += count * dtype.itemsize
    if len(raw) != start:
        raise ValueError(f"{spec['file']} has {len(raw)} bytes, not {start}")
    return case | {"chosen": case["chosen"].long()}


@torch.no_grad()
def main():
    list_path, results = map(Path, sys.argv[1:])
    specs = json.loads(list_path.read_text())
    times = {batches[0]["name"]: [] for batches in specs}
    for dtype_name, (dtype, farthest) in DTYPES.items():
        shape = None
        for batches in specs:
            spec = batches[0]
            sizes = spec["hidden"], spec["inner"], spec["experts"]
            if shape != sizes:
                gate_up = down = None  # frees the old ones first
                shape = hidden, inner, experts = sizes
                gate_up = torch.empty(experts, 2 * inner, hidden, dtype=dtype)
                down = torch.empty(experts, hidden, inner, dtype=dtype)
                for seed, to in enumerate([gate_up[:, :inner], gate_up[:, inner:], down], 1):
                    weights(to, seed)
            cases = [with_inputs(batch, list_path.parent) for batch in batches]
            for name, prepare in PEERS.items():
                entry = {"name": name, "dtype": dtype_name}
                try:
                    runs = [prepare(case, gate_up, down) for case in cases]
                    entry["distance"] = max(distance(run(), case) for run, case in zip(runs, cases))
                    if not entry["distance"] < farthest:
                        raise ArithmeticError(f"the results differ by {entry['distance']}")
                    entry["seconds"] = measure(runs)
                except Exception as error:  # what a peer cannot do is its result
                    entry["error"] = f"{type(error).__name__}: {error}"
                print(spec["name"], entry, file=sys.stderr)
                times[spec["name"]].append(entry)
    found = [{"name": name, "peers": peers} for name, peers in times.items()]
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results.write_text(json.dumps({**versions, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
