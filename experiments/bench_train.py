"""Training speed against nanoGPT's model and loop, in one process, on the same tokens.

    python experiments/bench_train.py                      # bf16 and fp32, a few shapes
    OMP_NUM_THREADS=1 python experiments/bench_train.py    # steadier on a shared machine

The baseline's model is that of nanogpt.py; its loop: autocast, backward, clip, AdamW. Both have the same width, depth,
heads, context, batch and vocabulary; ours has SwiGLU with the width in the table. The two step in turn, so that both
meet the same noise; medians, and model FLOP/s by one convention (6 a parameter of a product and token, 12 layers width
context for the attention). Data loading is timed apart: `Reader.take` and `load` of a step's windows from a memory map.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from nanogpt import GPT

sys.path.insert(0, str(Path(__file__).parent.parent))
import cpu
import data
import model

SHAPES = [  # hidden, MLP of ours, layers, heads, context, windows
    (128, 384, 3, 2, 256, 8),  # the default of train.py
    (128, 344, 4, 4, 64, 12),  # nanoGPT's README, for a CPU
    (256, 688, 6, 8, 256, 16),
    (384, 1024, 6, 6, 256, 8),  # nanoGPT's README, Shakespeare
]


def stepper(module, loss_of, dtype, ids, targets):
    big, small = ([p for p in module.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False))
    groups = [{"params": big, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=loss_of is ours_loss)

    def step():
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = loss_of(module, ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def ours_loss(module, ids, targets):
    return module(ids, targets)[1]


def baseline_loss(module, ids, targets):
    return module(ids, targets)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each, in turn (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the products (default: both)")
    args = parser.parse_args()
    cpu.keep_memory()  # as train.py does, for both
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds, in turn")
    print(f"{'hidden/MLP x layers, heads, context x windows':<46} {'dtype':<9} {'QK-norm':<8}"
          f" {'nanoGPT':>9} {'ours':>9} {'GFLOP/s':>9} {'GFLOP/s':>9} {'ratio':>6} {'to its fp32':>11}")  # fmt: skip
    for D, width, layers, heads, context, windows in SHAPES:
        ids, targets = torch.randint(256, (2, windows, context))
        base = GPT(256, D, layers, heads, context)
        base_flops = 6 * (sum(p.numel() for p in base.parameters()) - context * D) + 12 * layers * D * context
        steps, flops = {}, {}
        for dtype in args.dtypes:
            steps[dtype, "base"] = stepper(base, baseline_loss, dtype, ids, targets)
            for qk_norm in (False, True):
                config = model.Config(
                    hidden_size=D, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                    num_key_value_heads=heads, head_dim=D // heads, tie_word_embeddings=True, qk_norm=qk_norm,
                    max_position_embeddings=context,
                )  # fmt: skip
                ours = model.init_weights(model.Transformer(config), 1)
                flops[qk_norm] = ours.flops_per_token(context)
                steps[dtype, qk_norm] = stepper(ours, ours_loss, dtype, ids, targets)
        seconds = {key: [] for key in steps}
        for i in range(args.rounds + 3):
            for key, step in steps.items():
                if i < 3:
                    step()
                else:
                    seconds[key].append(step())
        median = {key: statistics.median(s) for key, s in seconds.items()}
        rate = {key: flops.get(key[1], base_flops) * windows * context / t / 1e9 for key, t in median.items()}
        shape = f"{D}/{width} x {layers}, {heads}, {context} x {windows}"
        for dtype in args.dtypes:
            for qk_norm in (False, True):
                base, ours = (dtype, "base"), (dtype, qk_norm)
                print(f"{shape:<46} {dtype:<9} {str(qk_norm):<8}"
                      f" {median[base] * 1e3:>7.1f}ms {median[ours] * 1e3:>7.1f}ms"
                      f" {rate[base]:>9.1f} {rate[ours]:>9.1f} {rate[ours] / rate[base]:>6.2f}"
                      f" {rate[ours] / rate.get(('float32', 'base'), float('nan')):>11.2f}", flush=True)  # fmt: skip
    tokens = np.memmap("/dev/zero", np.uint16, "r", shape=(2**22,))
    corpus = data.Corpus("zeros", 1.0, tokens, tokens, 1.0, 256, {})
    reader = data.Reader([corpus], 256, 1)
    reader.load(reader.take(16))
    times = []
    for _ in range(200):
        start = time.perf_counter()
        reader.load(reader.take(16))
        times.append(time.perf_counter() - start)
    print(f"loading 16 windows of 256: {statistics.median(times) * 1e6:.0f} microseconds")


if __name__ == "__main__":
    main()
