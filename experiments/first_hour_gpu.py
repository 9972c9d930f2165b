"""The parts of first_hour_gpu.sh: one check each.

    python experiments/first_hour_gpu.py grouped | waits | speed 0.13B --out FOLDER      [--small: also on a CPU]
"""

import argparse
import csv
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import model
import moe
import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {  # name: width, layers, heads, key-value heads, windows of 2,048 tokens a step
    "0.13B": (768, 12, 12, 12, 32), "1B": (2048, 20, 16, 8, 16), "8x0.13B": (768, 12, 12, 12, 32),
    "8x1B": (2048, 20, 16, 8, 8),
}  # fmt: skip


def grouped(small):
    """The largest relative error of `moe.grouped` in bf16, forward and backward, with two idle experts of eight."""
    T, D, E, F = (256, 64, 8, 32) if small else (8192, 1024, 8, 2816)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)
    expert_TK = torch.rand(T, E - 2, generator=generator).argsort(-1)[:, :2].to(DEVICE)  # the last two get no token
    inputs = [draw(T, D), draw(T, 2).softmax(-1), draw(E, 2 * F, D) / D**0.5, draw(E, D, F) / F**0.5]
    dy, results = draw(T, D), []
    for function, dtype in ((moe.reference, torch.float32), (moe.grouped, torch.bfloat16)):
        x, score, gate_up, down = (t.clone().requires_grad_() for t in inputs)
        y = function(x.to(dtype), score, expert_TK, gate_up, down)
        results.append((y, *torch.autograd.grad(y, (x, score, gate_up, down), dy.to(y.dtype))))
    for name, want, got in zip(("y", "dx", "dscore", "dgate_up", "ddown"), *results):
        error = (got.float() - want).norm() / want.norm()
        print(f"{name:9} {error:.4f}  {'ok' if error < 2e-2 else 'TOO LARGE'}")
    print(f"idle experts get a gradient of {results[1][3][-2:].abs().max():.1e} (0 is right)")


def waits(small):
    """Where one training step of a mixture waits for the device: torch warns of every place."""
    width, layers = (64, 2) if small else (768, 4)
    config = model.Config(hidden_size=width, num_hidden_layers=layers, experts=8, vocab_size=512)
    module = model.init_weights(model.Transformer(config), 1).to(DEVICE)
    s, ranks = argparse.Namespace(optimizer="muon", lr=1e-3, weight_decay=0.1, dtype="bfloat16"), train.Ranks()
    optimizers = train.get_optimizers(dict(module.named_parameters()), s, {}, ranks)
    ids = torch.randint(512, (4, 256), device=DEVICE)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            _, loss, aux = module(ids, ids)
        (loss + 0.01 * aux["balance_loss"]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    alone = DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] in (9, 10)
    right = "0 is right" if alone else "6 a layer: torch's own loop over the experts"
    print(f"{len(seen)} waits in a step ({right})", *{f"  {w.filename}:{w.lineno}" for w in seen}, sep="\n")


def speed(name, out, small):
    """A row of the table, from twenty steps of train.py."""
    width, layers, heads, groups, windows = (64, 2, 2, 2, 4) if small else SHAPES[name]
    context, steps = (64, 4) if small else (2048, 20)
    flags = f"--hidden-size {width} --num-hidden-layers {layers} --num-attention-heads {heads} --context {context}"
    flags += f" --num-key-value-heads {groups} --batch-tokens {windows * context} --tokens {windows * context * steps}"
    flags += f" --log-every {steps // 2} --save-every {steps} --eval-every {steps} --eval-tokens {context} --out {out}"
    flags += " --experts 8 --top-k 2" * name.startswith("8x") + " --data train.py" * small
    train.main(flags.split())
    with open(Path(out, "log.csv"), newline="") as f:
        last = list(csv.DictReader(f))[-1]
    total = train.checkpoint.read_json(Path(out, "run.json"))["N_total"]
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if DEVICE.type == "cuda" else "n/a"
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    speed = f"{float(last['tokens_per_second']):,.0f}"
    print(f"| {name} | {device} | {total / 1e9:.3g} B | {speed} | {last['mfu'] or 'n/a'} | {memory} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("grouped", "waits", "speed"), help="which part")
    parser.add_argument("model", nargs="?", choices=SHAPES, default="0.13B", help="for speed (default: %(default)s)")
    parser.add_argument("--out", default="out/first-hour", help="folder of the run of speed (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: to try the script itself")
    args = parser.parse_args()
    match args.check:
        case "grouped":
            grouped(args.small)
        case "waits":
            waits(args.small)
        case "speed":
            speed(args.model, args.out, args.small)


if __name__ == "__main__":
    main()
