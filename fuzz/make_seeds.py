"""Writes the seeds under `seeds/`, one folder a target: small files that are read without an error."""

import gzip
import json
import pathlib
import struct

SEEDS = pathlib.Path(__file__).parent / "seeds"


def write(target, name, content):
    path = SEEDS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def text(value):
    return json.dumps(value, separators=(",", ":"))


def safetensors(tensors, metadata=None):
    """`tensors`: (name, dtype, shape, bytes)."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, dtype, shape, raw in tensors:
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    header = text(header)
    return struct.pack("<Q", len(header)) + header.encode() + data


def doubles(*values):
    return struct.pack(f"<{len(values)}d", *values)


BASE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts_per_tok": 2}
OLMOE = {"model_type": "olmoe", **BASE, "intermediate_size": 8, "num_experts": 4}
SHARED = {"n_routed_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "intermediate_size": 24}
LATENT = {"kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
ADAPTED = [{"form": "dense"}, {"form": "adapted", "group": 0, "rank": 2}]
CONFIGS = {
    "olmoe": {**OLMOE, "rope_theta": 500.0, "eos_token_id": [1], "clip_qkv": 8.0, "torch_dtype": "float32"},
    "built": {**OLMOE, "lightmoe": {"schema_version": 1, "layers": {str(l): {"slots": ADAPTED * 2} for l in range(2)}}},
    "mixtral": {"model_type": "mixtral", **BASE, "intermediate_size": 8, "num_local_experts": 4, "sliding_window": 6},
    "qwen2_moe": {"model_type": "qwen2_moe", **BASE, "moe_intermediate_size": 8, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"model_type": "qwen3_moe", **BASE, "moe_intermediate_size": 8, "num_experts": 4, "head_dim": 4, "num_key_value_heads": 1,
                  "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
    "deepseek": {"model_type": "deepseek", **BASE, **SHARED},
    "deepseek_v2": {"model_type": "deepseek_v2", **BASE, **SHARED, **LATENT, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v3": {"model_type": "deepseek_v3", **BASE, **SHARED, **LATENT, "q_lora_rank": 4, "n_group": 2, "topk_group": 1,
                    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}},
    "phimoe": {"model_type": "phimoe", **BASE, "intermediate_size": 8, "num_local_experts": 4,
               "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}},
}
for name, config in CONFIGS.items():
    write("config", name, text(config))
write("config", "change", b"\x00" + text({"num_hidden_layers": 3, "rope_theta": 10.0}).encode())
write("config", "stretched", b"\x04" + text({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0}}).encode())

write("index", "shards", text({"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))

matrices = [("a", "BF16", [2, 3], bytes(12)), ("b", "F32", [], bytes(4)), ("c", "F8_E4M3", [0, 9], b"")]
write("safetensors_header", "three", safetensors(matrices, {"format": "pt"}))
sparse = '{"a":{"dtype":"F32","shape":[1048576,1048576],"data_offsets":[0,4398046511104]}}'
write("safetensors_header", "sparse", struct.pack("<Q", len(sparse)) + sparse.encode())

seen = {"observations": text({"schema_version": 3, "tokens": 9, "samples": 2, "fingerprint": "a"})}
layer = [("layers.1.gate_mass", "F64", [2], doubles(3.0, 1.5)), ("layers.1.selections", "U64", [2], struct.pack("<2Q", 5, 4))]
more = [("layers.1.router_norm", "F64", [1], doubles(2.0)), ("layers.1.similarity", "F64", [2, 2], doubles(1.0, 0.5, 0.5, 1.0))]
write("observations", "least", safetensors(layer, seen))
write("observations", "whole", safetensors(layer + more, seen))

# Entries 1 (negative) and 5 of 6: gaps 1 and 3 with one low bit, `0 1 1` and `10 1 0`.
update = {"schema_version": 1, "fingerprint": "ab" * 32, "density": 0.3, "alpha": 2.0, "sigma": 0.125, "n": 6, "kept": 2,
          "rice_parameter": 1, "tensors": [["a", [2, 2]], ["b", [2]]]}
write("compeft", "two", safetensors([("stream", "U8", [1], bytes([0b01110100]))], {"compeft": text(update)}))

slot = lambda expert, **form: {"expert": expert, **form, "score": 0.25}
replaced = lambda expert, dominant: slot(expert, form="adapted", group=0, rank=2, dominant=dominant)
layers = [{"layer": l, "threshold": 0.4, "router_norm": None, "groups": 1,
           "slots": [slot(0, form="dense"), replaced(1, True), replaced(2, False), slot(3, form="dense")]} for l in range(2)]
plan = {"schema_version": 1, "method": "lightmoe",
        "model": {"family": "olmoe", "hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2, "layers": 2},
        "settings": {"rank": 2, "kept_rank": 2, "groups": 1, "alpha": 0.3, "max_delta": 0.2, "base": "gate-weighted"},
        "ratio": {"target": 0.1, "achieved": 0.1}, "p_hat": 0.4, "parameters": {"before": 9, "after": 8, "trained": 7}, "layers": layers}
write("plan", "groups", text(plan))
for layer in layers:
    layer.update(groups=0, slots=[slot(e, form="adapted", rank=2, dominant=False) for e in range(4)])
write("plan", "alone", text({**plan, "method": "replace"}))

write("recipe", "math", 'model = "olmoe-nano"\ntask = "math"\nratio = 0.3\nrank = 2\ngroups = 2\nsteps = 50\nlr = 1e-3\n')
write("recipe", "records", 'train = "records.jsonl"\nmethod = "replace"\nthreshold = 0.2\nannealing = "exponential"\nend_ratio = 0.5\n'
      'gamma = 2.0\ndecay = "cosine"\nbase = "random"\nalpha = 0.1\nmax_delta = 0.1\nseed = 7\ndevice = "cpu"\ndtype = "f32"\n')

TASK = """task: mine
tag: [a, b]
dataset_path: org/name
dataset_name: main
data_files:
  format: jsonl
  folders: data
  splits: {test: rows.jsonl, train: [train.jsonl, rows.jsonl]}
  source: Made.
output_type: %s
training_split: train
test_split: test
doc_to_text: "Q: {{q.strip()}}"
doc_to_target: %s
description: "About {{flag}}: "
fewshot_config: {sampler: first_n}
metric_list: [{metric: %s}]
metadata: {version: 1.0}
"""
write("task", "choices", TASK % ("multiple_choice", "right", "acc") + "doc_to_choice: options\n"
      "process_docs: {q: q | upper, right: right, options: 'choices.text + options', flag: row_number}\n")
write("task", "answer", TASK % ("generate_until", "'{{options[right]}}'", "exact_match") + "num_fewshot: 2\n"
      "generation_kwargs: {until: ['\\n'], max_gen_toks: 5}\nfilter_list:\n- name: last\n  filter:\n"
      "  - {function: regex, regex_pattern: '([0-9]+)', group_select: -1}\n  - function: take_first\n")
write("task", "text", TASK % ("loglikelihood_rolling", "q | regex_replace('o', 'a')", "word_perplexity") + "doc_to_count: q\nstride: 4\n")
write("task", "group", "group: both\ntask:\n- {include: arc_easy.yaml, task: one}\n- mine\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")

PARQUET = pathlib.Path(__file__).parent.parent / "fixtures" / "parquet"
write("rows", "jsonl", b"\x00" + b'{"q": "Who?", "n": [1, null]}\n\n{"q": "\xe2\x80\xa8"}\n')
write("rows", "json", b"\x01" + b'{"test": [{"q": 1}], "train": []}')
write("rows", "csv", b"\x02" + b'q,a\n"Who,\nme?",1\n')
write("rows", "tsv", b"\x03" + b"q\ta\nx\t1\n")
write("rows", "types", b"\x04" + (PARQUET / "types.parquet").read_bytes())
write("rows", "sums", b"\x04" + (PARQUET / "main" / "train-00001-of-00002.parquet").read_bytes())
write("rows", "wikitext", b"\x05" + b" = One = \n text \n = = Part = = \n = Two = \n more \n")
write("rows", "packed", b"\x06" + gzip.compress(b'{"q": 1}\n', mtime=0))
write("rows", "text", b"\x07" + b"A text.\n")
