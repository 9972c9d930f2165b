"""How large should experts begin, and how fast should they learn, when the router divides their output by K G or E G?

    python experiments/expert_scale.py run [--seeds 1]      # a second call goes on
    python experiments/expert_scale.py show                 # differences, paired by seed

`moe.output_scale` = s multiplies the initial down_proj, so that the layer's output begins with the variance of the
dense layer's. Four ways: that, or 1 in the place of s; and the usual update of down_proj, or s times it (with the same
decay). 8 experts in 3 layers of 64, 2,048 tokens a step, the rate of `--lr auto`.
"""

import csv
import sys

from ladder import ROOT, M, cell, grid, main

sys.path.insert(0, str(ROOT))

SHAPE = ("--hidden-size", "64", "--num-hidden-layers", "3", "--num-attention-heads", "4")
TABLE = ROOT / "experiments/expert_scale.csv"
WAYS = {"s, 1": (1, 0), "1, 1": (0, 0), "s, s": (1, 1), "1, s": (0, 1)}  # initial scale, update: powers of s
START = [*WAYS][:2]
COLUMNS = ("optimizer", "tokens", "router", "top_k", "granularity")
CASES = [  # and the ways that are tried
    ("muon", M // 2, "topk-softmax", 2, 1, WAYS), ("muon", M // 2, "topk-softmax", 2, 4, WAYS),
    ("muon", 2 * M, "topk-softmax", 2, 1, START), ("adamw", M // 2, "topk-softmax", 2, 1, START),
    ("muon", M // 2, "softmax-topk", 1, 1, WAYS), ("muon", M // 2, "softmax-topk", 2, 4, WAYS),
    ("muon", M // 2, "topk-softmax", 1, 4, WAYS), ("muon", M // 2, "softmax-topk", 1, 4, WAYS),
    ("muon", M // 2, "softmax-topk", 2, 1, WAYS), ("adamw", M // 2, "topk-softmax", 2, 4, START),
    ("muon", 2 * M, "topk-softmax", 2, 4, [*START, "1, s"]), ("muon", 2 * M, "softmax-topk", 1, 1, START),
]  # fmt: skip


def flags(row):
    given = [*SHAPE, "--experts", 8, "--dtype", "float32", "--seed", row["seed"]]  # on every machine
    return given + [text for name in COLUMNS for text in (f"--{name.replace('_', '-')}", row[name])]


def run(seed, out):
    rows = [dict(zip(COLUMNS, case)) | {"seed": seed, "way": way} for *case, ways in CASES for way in ways]
    grid(TABLE, out / "expert_scale", rows, flags, lambda row: [__file__, "one", *map(str, WAYS[row["way"]])])


def one(initial, update, *flags):
    """train.py with another initial down_proj and another update of it; in a process of its own."""
    import moe
    import muon
    import settings
    import train

    args, _ = settings.read_flags(settings.get_parser(), flags)
    start, step = moe.output_scale, muon.Muon.step
    scale = start(args.experts, args.top_k, args.granularity, args.router) ** int(update)
    moe.output_scale = lambda *shape: start(*shape) ** int(initial)

    def scaled_step(optimizer):
        groups = [g for g in optimizer.param_groups if g["params"][0].dim() == 3 and g["shape"][0] == args.hidden_size]
        for g in groups:
            g["lr"], g["weight_decay"] = g["lr"] * scale, optimizer.defaults["weight_decay"] / scale
        step(optimizer)

    muon.Muon.step = scaled_step
    sys.exit(train.main(flags))


def show():
    rows = list(csv.DictReader(open(TABLE)))
    losses = {(*(r[name] for name in (*COLUMNS, "way", "seed")),): float(r["loss"]) for r in rows}
    ways = " | ".join(f"{way}, less that" for way in list(WAYS)[1:])
    print(f"| optimizer | tokens | router | K | G | s, 1 | {ways} |")
    print("|" + "---|" * (5 + len(WAYS)))
    for *case, _ in CASES:
        key = tuple(map(str, case))
        mine = {seed: loss for (*k, way, seed), loss in losses.items() if tuple(k) == key and way == "s, 1"}
        cells = []
        for way in list(WAYS)[1:]:
            pairs = [losses[*key, way, seed] - loss for seed, loss in mine.items() if (*key, way, seed) in losses]
            cells.append(f"{cell(pairs)} ({len(pairs)})" if pairs else "")
        print(f"| {' | '.join(key)} | {cell(list(mine.values()), '')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main(__doc__, run, show=show)
