#!/usr/bin/env python3
"""Times other implementations of the mixture-of-experts layer on given routings, on the CPU.

    cpu_peers.py CASES.json RESULTS.json

CASES.json is a list of cases; each is a list of batches that are taken in turn, and a batch is {"name", "hidden",
"inner", "experts", "top_k", "tokens", "routing"}; "routing" is the path, relative to the list, of a little-endian
file of [tokens * top_k] u32 experts, then [tokens * top_k] f32 gates. All peers compute the same uncompressed
layer, once with all in f32 and once with all in bf16:

    out[t] = sum_j gate[t, j] * down[e] (silu(gate_e x[t]) * (up_e x[t])),   e = expert[t, j]

For each peer there is the time, or its error.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

BUDGET = 1.0  # seconds of repetitions for each case and peer
LEAST, MOST = 3, 30  # repetitions
TOO_LONG = 6.0  # seconds of what is not repeated
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


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


def torch_loop(case, x, gate_up, down):
    """Expert by expert, as most model files do."""
    chosen, gates, inner = case["chosen"], case["gates"].to(x.dtype), case["inner"]

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

    def prepare(case, x, gate_up, down):
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
        gates = case["gates"].to(x.dtype)
        return lambda: experts(x, case["chosen"], gates)

    return prepare


PEERS = {
    "torch_loop": torch_loop,
    "transformers_eager": transformers("eager"),
    "transformers_grouped_mm": transformers("grouped_mm"),
}


def with_routing(spec, folder):
    """A case with its choices and gates, `[tokens, top_k]`."""
    choices = spec["tokens"] * spec["top_k"]
    raw = bytearray((folder / spec["routing"]).read_bytes())
    if len(raw) != 8 * choices:
        raise ValueError(f"{spec['routing']} has {len(raw)} bytes, not {8 * choices}")
    chosen = torch.frombuffer(raw, dtype=torch.int32, count=choices).long()
    gates = torch.frombuffer(raw, dtype=torch.float32, offset=4 * choices)
    shape = spec["tokens"], spec["top_k"]
    return spec | {"chosen": chosen.view(shape), "gates": gates.view(shape)}


@torch.no_grad()
def main():
    list_path, results = map(Path, sys.argv[1:])
    specs = json.loads(list_path.read_text())
    times = {batches[0]["name"]: [] for batches in specs}
    for dtype_name, dtype in DTYPES.items():
        shape = None
        for batches in specs:
            spec = batches[0]
            sizes = spec["hidden"], spec["inner"], spec["experts"]
            if shape != sizes:
                gate_up = down = None  # frees the old ones first
                shape = hidden, inner, experts = sizes
                gate_up = torch.empty(experts, 2 * inner, hidden, dtype=dtype).uniform_(-0.02, 0.02)
                down = torch.empty(experts, hidden, inner, dtype=dtype).uniform_(-0.02, 0.02)
            cases = [with_routing(batch, list_path.parent) for batch in batches]
            x = torch.randn(spec["tokens"], hidden).to(dtype)
            for name, prepare in PEERS.items():
                entry = {"name": name, "dtype": dtype_name}
                try:
                    entry["seconds"] = measure([prepare(case, x, gate_up, down) for case in cases])
                except Exception as error:  # what a peer cannot do is its result
                    entry["error"] = f"{type(error).__name__}: {error}"
                print(spec["name"], entry, file=sys.stderr)
                times[spec["name"]].append(entry)
    found = [{"name": name, "peers": peers} for name, peers in times.items()]
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results.write_text(json.dumps({**versions, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
