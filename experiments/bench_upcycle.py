"""
What does it cost to make a mixture of 8 experts of a model of 0.5 B parameters in bf16, next to copying its bytes?

Makes the dense folder with random weights, then, in turn and several times: upcycle.py with copies, `cp -r` of what it
wrote, upcycle.py with drop and with noise (which writes fp32, twice the bytes), and, if it is installed, mergekit's MoE
mode with the same eight copies, which must be ours to the bit. A time ends when all files are on the disk (fsync);
beside it stand the seconds of processors, which other work does not stretch; memory is the most that a process held.

Then: how often a reader that routes in bf16, as transformers and vLLM do, splits a copy: the share of tokens, unit
normal ones, whose largest logits are not those of top_k whole copies. In fp32 and in moe.py there must be none.

    python experiments/bench_upcycle.py                                    # 24 GB of disk, removed at the end
    python experiments/bench_upcycle.py --mergekit .venv/bin/mergekit-moe  # one that is not on the PATH
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import model
import moe
import upcycle
from tokenizer import load_tokenizer

SHAPE = dict(vocab_size=50304, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
             num_key_value_heads=16, head_dim=64, qk_norm=False)  # fmt: skip


# Its memory is asked for in a small process between: a child's count begins with what its parent held.
LAUNCH = """import resource, subprocess, sys
status, used = subprocess.call(sys.argv[1:], stdout=sys.stderr), resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(status)"""


def timed(command, result):
    """(seconds until `result` is on the disk, seconds of processors, most GB of memory) of a command."""
    start, parts = time.time(), [str(part) for part in command]
    done = subprocess.run([sys.executable, "-c", LAUNCH, *parts], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(parts)} failed:\n{done.stderr[-2000:]}")
    for path in result.iterdir():
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    processor, memory = map(float, done.stdout.split())
    return time.time() - start, processor, memory * 1024 / 1e9


def expert(files, layer, e):
    """gate, up and down of an expert of a Mixtral folder, whose writers name it in two ways."""

    def read(name, part):
        with safe_open(files[name], "pt") as f:
            return f.get_slice(name)[part]

    own, joined = f"model.layers.{layer}.block_sparse_moe.experts.{e}.", f"model.layers.{layer}.mlp.experts."
    if joined + "down_proj" in files:
        return *read(joined + "gate_up_proj", e).chunk(2), read(joined + "down_proj", e)
    return tuple(read(f"{own}{w}.weight", slice(None)) for w in ("w1", "w3", "w2"))


def same_experts(a, b):
    one, two = checkpoint.tensor_files(a), checkpoint.tensor_files(b)
    pairs = ((expert(one, i, e), expert(two, i, e)) for i in range(SHAPE["num_hidden_layers"]) for e in range(8))
    return all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


def conversions(rounds, mergekit, home):
    source, command = home / "dense", [sys.executable, ROOT / "upcycle.py", home / "dense", home / "made"]
    command += "--experts 8 --top-k 2 --shard-size 1e9".split()
    module = model.init_weights(model.Transformer(model.Config(**SHAPE)), 1).to(torch.bfloat16)
    checkpoint.save(module, source, load_tokenizer("bytes"))
    print(f"dense: {sum(p.numel() for p in module.parameters()) / 1e9:.3f} B parameters in bf16")
    del module
    rows = {"upcycle.py": [], "cp -r of it": [], "upcycle.py --method drop": [], "upcycle.py --method noise": []}
    sizes = {}
    if mergekit:
        rows["mergekit-moe"] = []
        expert = {"source_model": str(source), "positive_prompts": []}
        recipe = {"base_model": str(source), "gate_mode": "random", "dtype": "bfloat16", "architecture": "mixtral"}
        (home / "recipe.yml").write_text(json.dumps(recipe | {"experts": [expert] * 8}))  # JSON is YAML
    for i in range(rounds):
        for name, times in rows.items():
            if name == "cp -r of it":
                times.append(timed(["cp", "-r", home / "copied", home / "made"], home / "made"))
            elif name == "mergekit-moe":
                flags = ["--out-shard-size", "500M", "--no-copy-tokenizer"]  # so many parameters: 1 GB
                times.append(timed([mergekit, home / "recipe.yml", home / "made", *flags], home / "made"))
                if not same_experts(home / "copied", home / "made"):
                    sys.exit("mergekit-moe made other experts")
            else:
                times.append(timed(command + name.split()[1:], home / "made"))
            sizes[name] = sum(p.stat().st_size for p in (home / "made").iterdir()) / 1e9
            seconds, processor, memory = times[-1]
            print(f"  round {i + 1}  {name:<26}{seconds:7.1f} s{processor:7.1f} s{memory:7.2f} GB", flush=True)
            if name == "upcycle.py":
                (home / "made").rename(home / "copied")
            else:
                shutil.rmtree(home / "made")
        shutil.rmtree(home / "copied")
    print(f"\n{rounds} rounds: median seconds (range), median seconds of processors, most memory, what is written")
    for name, times in rows.items():
        seconds, processor, memory = zip(*times)
        span = f"({min(seconds):.1f} to {max(seconds):.1f})"
        usual = f"{statistics.median(seconds):7.1f} s {span:<16}{statistics.median(processor):7.1f} s"
        print(f"  {name:<26}{usual}{max(memory):7.2f} GB{sizes[name]:7.2f} GB")


@torch.no_grad()
def split_copies(tokens=200_000, experts=8, top_k=2):
    print(f"\nshare of {tokens:,} tokens that get parts of more than {top_k} copies, of {experts}")
    print("      D    G   bf16, transformers   fp32, transformers   bf16, moe.py")
    for D in (128, 576):
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
        for G in (2, 4, 8):
            dense = model.Config(hidden_size=D, intermediate_size=G)
            rows = upcycle.operator(dense, experts, top_k, granularity=G).formula("model.layers.0.mlp.gate.weight")[1]()
            shares = []
            for dtype in (torch.bfloat16, torch.float32):
                config = MixtralConfig(hidden_size=D, num_local_experts=experts * G, num_experts_per_tok=top_k * G)
                router = MixtralTopKRouter(config).to(dtype)
                router.weight.copy_(rows)
                shares.append(split(router(x.to(dtype))[2], top_k, G))
            ours = moe.MoE(D, G, experts, top_k, G).to(torch.bfloat16)
            ours.gate.weight.copy_(rows)
            shares.append(split(ours.route(x.bfloat16())[1], top_k, G))
            print(f"{D:7}{G:5}{shares[0]:20.2%}{shares[1]:21.2%}{shares[2]:15.2%}", flush=True)


def split(chosen_TK, top_k, G):
    """The share of tokens whose experts are not top_k whole copies."""
    parts = chosen_TK.sort(-1).values.view(-1, top_k, G)
    whole = (parts == parts[..., :1] // G * G + torch.arange(G)).flatten(1).all(1)
    return 1 - whole.double().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description="What does upcycling cost, next to cp?")
    parser.add_argument("--rounds", type=int, default=5, help="of each command (default: %(default)s)")
    parser.add_argument("--folder", help="where to work, 24 GB (default: the system's temporary folder)")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-moe"),
                        help="its command (default: from the PATH)")  # fmt: skip
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 8 experts, 2 a token, shards of 1 GB")
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        conversions(args.rounds, args.mergekit, Path(home))
    split_copies()
