"""Which learning rate, for Muon and for AdamW, at which size and length?

    python experiments/rates.py run [--seeds 1]      # a second call goes on
    python experiments/rates.py show                 # the best rates

Bytes of Python, 2,048 tokens a step, 2 % warmup, wsd with a quarter of decay, weight decay 0.1. The rates are a factor
of 2 apart. The best one is where a parabola through the three lowest losses, over the logarithm of the rate, has its
bottom.
"""

import csv
import math
import sys

import numpy as np
from ladder import ROOT, M, grid, main

sys.path.insert(0, str(ROOT))

TABLE = ROOT / "experiments/rates.csv"
SIZES = {
    "32 x 2": "--hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4",
    "64 x 3": "--hidden-size 64 --num-hidden-layers 3 --num-attention-heads 4",
    "128 x 3": "--hidden-size 128 --num-hidden-layers 3 --num-attention-heads 4",
    "256 x 4": "--hidden-size 256 --num-hidden-layers 4",
    "64 x 3, 8x2": "--hidden-size 64 --num-hidden-layers 3 --num-attention-heads 4 --experts 8 --top-k 2",
}
RATES = {  # (optimizer, size, tokens): rates
    ("muon", "64 x 3", M): (0.0035, 0.007, 0.014),
    ("adamw", "64 x 3", M): (0.003, 0.006, 0.012),
    ("muon", "128 x 3", M): (0.0025, 0.005, 0.01),
    ("adamw", "128 x 3", M): (0.0015, 0.003, 0.006),
    ("adamw", "64 x 3, 8x2", M): (0.003, 0.006, 0.012),
    ("muon", "32 x 2", M): (0.007, 0.014, 0.028),
    ("muon", "64 x 3, 8x2", M): (0.0035, 0.007, 0.014),
    ("muon", "256 x 4", M // 2): (0.0025, 0.005),
    ("muon", "64 x 3", 4 * M): (0.0035, 0.007),
}


def flags(row):
    given = ["--optimizer", row["optimizer"], "--tokens", row["tokens"], "--lr", row["lr"], "--seed", row["seed"]]
    return [*SIZES[row["size"]].split(), *given]


def run(seed, out):
    columns = ("optimizer", "size", "tokens", "lr", "seed")
    rows = [dict(zip(columns, (*key, lr, seed))) for key, rates in RATES.items() for lr in rates]
    grid(TABLE, out / "rates", rows, flags)


def best(points):
    """(rate, loss) at the bottom of a parabola through the three lowest of [(rate, loss)]; an end, if it is lowest."""
    points = sorted(points)
    i = min(range(len(points)), key=lambda i: points[i][1])
    if not 0 < i < len(points) - 1:
        return points[i]
    x, y = np.log([p[0] for p in points[i - 1 : i + 2]]), [p[1] for p in points[i - 1 : i + 2]]
    a, b, c = np.polyfit(x, y, 2)
    return math.exp(-b / (2 * a)), c - b * b / (4 * a)


def show():
    curves = {}
    for r in csv.DictReader(open(TABLE)):
        curves.setdefault((r["optimizer"], r["size"], int(r["tokens"])), []).append((float(r["lr"]), float(r["loss"])))
    print("| optimizer | layers | tokens | losses at the rates | best rate | loss there |\n|" + "---|" * 6)
    for (optimizer, size, tokens), points in sorted(curves.items()):
        lr, loss = best(points)
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(points))
        print(f"| {optimizer} | {size} | {tokens / M:g} M | {tried} | {lr:.4f} | {loss:.3f} |")


if __name__ == "__main__":
    main(__doc__, run, show=show)
