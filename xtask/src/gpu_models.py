#!/usr/bin/env python3
"""Times a model of full size on one CUDA device, from its synthesis to its recovery, beside transformers and peft.

    gpu_models.py LIGHTMOE CONFIG.json TOKENIZER WORK RESULTS.json [--layers N] [--steps N] [--device cuda] [--no-peers]

LIGHTMOE is the program, CONFIG.json the shape of the model, whose weights are random, TOKENIZER a folder with a
tokenizer of no more tokens, WORK a folder with room for two and a half models. Half of the model is replaced.
Recovery trains on sequences of `--length` tokens, `--batch` of them a step, one at a time, the layers run again
on the way back; it is stopped once `--steps` steps are done. The peers run the same original model: transformers
reads prompts and answers them, and peft trains adapters on all experts. RESULTS.json is written anew after every
part; a part that fails leaves its error there and the others run.
"""

import argparse
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

PROMPT, ANSWER, AT_ONCE = 512, 64, [1, 8, 32]


class Watch(threading.Thread):
    """Watches how much memory of the device is taken, and how busy it is, by whichever process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.memory, self.busy, self.watching = [0], [0], True
        self.start()

    def run(self):
        query = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
        while self.watching and shutil.which(query[0]):
            told = subprocess.run(query, capture_output=True, text=True)
            if told.returncode == 0:
                memory, busy = told.stdout.splitlines()[0].split(",")
                self.memory.append(int(memory) << 20)
                self.busy.append(int(busy))
            time.sleep(0.2)


def watched(work):
    """What `work` gives, with its seconds, the device's peak of memory, and the most percent of time that it was busy."""
    watch = Watch()
    begin = time.monotonic()
    result = work() or {}
    result["seconds"] = time.monotonic() - begin
    watch.watching = False
    watch.join()
    result["device_bytes"], result["device_busy"] = max(watch.memory), max(watch.busy)
    return result


def settings():
    parser = argparse.ArgumentParser()
    for name in ["lightmoe", "config", "tokenizer", "work", "results"]:
        parser.add_argument(name, type=Path)
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-peers", action="store_true")
    return parser.parse_args()


class Ours:
    """The program's stages, one after the other."""

    def __init__(self, args):
        self.args, self.work = args, args.work.resolve()
        self.model, self.built = self.work / "model", self.work / "built"
        self.seen, self.plan, self.text = (self.work / name for name in ["seen.safetensors", "plan.json", "text.txt"])
        self.recipe = [
            "--model", self.model, "--train", self.text, "--max-length", args.length, "--device", args.device,
            "--rank", min(32, json.loads(args.config.read_text())["intermediate_size"] // 16), "--dtype", "bf16",
        ]  # fmt: skip

    def call(self, *arguments):
        command = [str(argument) for argument in [self.args.lightmoe.resolve(), *arguments]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout

    def synthesize(self):
        config = json.loads(self.args.config.read_text())
        if self.args.layers:
            config["num_hidden_layers"] = self.args.layers
        path = self.work / "config.json"
        path.write_text(json.dumps(config))
        self.call("synthesize", "--config", path, "--out", self.model)
        for name in ["tokenizer.json", "tokenizer_config.json"]:
            shutil.copy(self.args.tokenizer / name, self.model / name)
        draw = random.Random(0)
        words = ("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(150_000))
        self.text.write_text(" ".join(words))

    def observe(self):
        self.call("observe", *self.recipe, "--out", self.seen, "--calibration-tokens", 2 * self.args.length)

    def build(self):
        self.call("plan", *self.recipe, "--ratio", 0.5, "--observations", self.seen, "--out", self.plan)
        self.call("build", "--model", self.model, "--plan", self.plan, "--observations", self.seen, "--out", self.built)

    def speed(self, model):
        sizes = ["--prompt-tokens", PROMPT, "--new-tokens", ANSWER, "--prompts", ",".join(map(str, AT_ONCE))]
        place = ["--device", self.args.device, "--dtype", "bf16"]
        return json.loads(self.call("bench", "speed", "--model", model, "--json", *sizes, *place))

    def recover(self):
        """Seconds of each step but the first, from when its line of the loss curve is there. The replaced experts fade
        out until half of the steps: `curve` says at which share each step ran."""
        command = [
            self.args.lightmoe.resolve(), "recover", *self.recipe, "--ratio", 0.5, "--built", self.built, "--plan", self.plan,
            "--out", self.work / "recovered", "--steps", self.args.steps + 2, "--batch-size", self.args.batch,
            "--micro-batch-size", 1, "--gradient-checkpointing", "true", "--end-ratio", 0.5,
        ]  # fmt: skip
        run = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log, seen = [], []
        reader = threading.Thread(target=lambda: log.extend(run.stdout), daemon=True)
        reader.start()
        while run.poll() is None and len(seen) < self.args.steps:
            for path in self.work.glob("recovered.recovery/**/loss.jsonl"):
                lines = path.read_text().splitlines()
                seen += [time.monotonic()] * (len(lines) - len(seen))
            time.sleep(0.01)
        stopped = run.poll() is None
        run.kill()
        run.wait()
        reader.join(5)
        if not stopped:
            raise RuntimeError("".join(log)[-2000:])
        steps = [b - a for a, b in zip(seen, seen[1:])]
        tokens = self.args.batch * self.args.length
        return {"step_seconds": steps, "tokens_per_second": tokens / statistics.median(steps), "curve": lines}


class Peers(threading.Thread):
    """transformers and peft on the same original, which is read in the background."""

    def __init__(self, args, folder):
        super().__init__(daemon=True)
        self.args, self.folder, self.error = args, folder, None
        self.start()

    def run(self):
        try:
            import torch
            import transformers

            load = transformers.AutoModelForCausalLM.from_pretrained
            self.torch, self.model = torch, load(self.folder, dtype=torch.bfloat16)
            self.vocabulary = self.model.config.vocab_size
            self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        except Exception as error:  # for `place`, which others wait for
            self.error = error

    def place(self):
        self.join()
        if self.error:
            raise self.error
        self.model.to(self.args.device)

    def ids(self, rows, length):
        return self.torch.randint(0, self.vocabulary, (rows, length), device=self.args.device)

    def now(self):
        if self.args.device != "cpu":
            self.torch.cuda.synchronize()
        return time.monotonic()

    def answer(self, rows):
        """Seconds until the first token of all, and of each step after it."""
        with self.torch.inference_mode():
            ids, begin = self.ids(rows, PROMPT), self.now()
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = self.now()
            for _ in range(ANSWER - 1):
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
            return first - begin, (self.now() - first) / (ANSWER - 1)

    def speed(self):
        cases = []
        for rows in AT_ONCE:
            runs = [self.answer(rows) for _ in range(3)][1:]
            reading, step = (statistics.median(run[i] for run in runs) for i in range(2))
            case = {"prompts": rows, "prompt_tokens_per_second": rows * PROMPT / reading}
            cases.append(case | {"milliseconds_per_step": step * 1e3, "new_tokens_per_second": rows / step})
        return {"cases": cases, **self.versions}

    def train(self):
        """Adapters of rank 32 on every expert, a sequence at a time, with the layers run again on the way back."""
        import peft

        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=32, target_modules=[], target_parameters=names, task_type="CAUSAL_LM")
        model = peft.get_peft_model(self.model, config)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.torch.optim.AdamW(trained, lr=1e-4, fused=self.args.device != "cpu")
        seconds = []
        for _ in range(8):
            ids, begin = self.ids(1, self.args.length), self.now()
            model(ids, labels=ids, use_cache=False).loss.backward()
            seconds.append(self.now() - begin)
        optimizer.step()
        rate = self.args.length / statistics.median(seconds[1:])
        return {"tokens_per_second": rate, "trained": sum(p.numel() for p in trained), "peft": peft.__version__}


def wants(args, *packages):
    """Whether these run; what is missing is told."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and not args.no_peers:
        print(f"SKIPPED: no {' and no '.join(missing)}, so no comparison with it", flush=True)
    return not missing and not args.no_peers


def main():
    args = settings()
    args.work.mkdir(parents=True, exist_ok=True)
    results = {}

    def part(name, work):
        print(f"{name} ..", flush=True)
        try:
            results[name] = watched(work)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(results[name])[:600], flush=True)
        args.results.write_text(json.dumps(results, indent=1))

    ours = Ours(args)
    part("synthesize", ours.synthesize)
    if "error" in results["synthesize"]:
        sys.exit(1)
    peers = Peers(args, ours.model) if wants(args, "torch", "transformers") else None
    part("observe", ours.observe)
    part("plan and build", ours.build)
    if peers:
        peers.join()  # so that nothing else is done while time is taken
    part("speed of the original", lambda: ours.speed(ours.model))
    part("speed of the built", lambda: ours.speed(ours.built))
    part("recover", ours.recover)
    if peers:
        part("transformers", peers.place)
        part("speed of transformers", peers.speed)
        if wants(args, "peft"):
            part("training by peft", peers.train)
    sys.exit(any("error" in result for result in results.values()))


if __name__ == "__main__":
    main()
