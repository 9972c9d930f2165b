"""Does stacking pay at a size that a laptop trains? Against scratch of the same shape, and against other dense shapes.

    python experiments/grow_table.py run --seeds 1 2 3      # 35 minutes on one core; a second call goes on
    python experiments/grow_table.py show                   # the table, from grow_table.csv

In the setting of ladder.py: a 3-layer model sees d = 1.5 million tokens at a constant rate, grows to 6 layers
(stacked, or with depth-zero) and is trained for 1 or 2 million tokens more. The paper's comparison is 6 layers from
scratch; but at this size a deep model from scratch is a weak baseline, so there are flatter and wider ones. All at
equal FLOPs, those of the small model counted; differences are paired by seed.
"""

import subprocess
import sys

from ladder import ADAMW, ROOT, STEP, M, at, cell, dense, folder, ladder, main, read, write

TABLE = ROOT / "experiments/grow_table.csv"
d = 732 * STEP
GROWN = ("3 layers stacked to 6", "3 layers grown to 6, depth-zero")
SCRATCH = {  # name: shape, budgets that enclose the FLOPs of the grown models
    "6 layers from scratch": ("6 64", (3 * M // 2, 3 * M)),
    "4 layers from scratch": ("4 64", (2 * M, 9 * M // 2)),
    "3 layers, 96 wide": ("3 96", (3 * M // 2, 3 * M)),
}


def run(seed, out):
    small = dense(out, seed)
    base, before = out / f"dense-{seed}/trunk/step-{d // STEP}", small[0][2] / small[0][0] * d
    zero = out / f"zero-{seed}"
    if not zero.exists():
        how = ["--axis", "depth", "--operator", "zero", "--factor", "2"]
        subprocess.run([sys.executable, ROOT / "grow.py", base, zero, *how], check=True)
    ladders = {"3 layers, trained on": small}
    for name, flags in zip(GROWN, (["--init", base, "--stack", 2], ["--init", zero])):
        points = ladder(folder(out, name, seed), (M, 2 * M), *flags, *ADAMW, "--seed", seed)
        ladders[name] = [(tokens, loss, before + flops) for tokens, loss, flops in points]
    for name, (shape, budgets) in SCRATCH.items():
        layers, width = shape.split()
        flags = ["--num-hidden-layers", layers, "--hidden-size", width, "--num-attention-heads", 4, *ADAMW]
        ladders[name] = ladder(folder(out, name, seed), budgets, *flags, "--seed", seed)
    write(TABLE, seed, ladders)


def show():
    curves, seeds = read(TABLE)
    others = ["3 layers, trained on", *SCRATCH]
    print(f"| grown at {d / M:.1f} M tokens, seeds {', '.join(seeds)} | tokens after | FLOPs in all | loss | "
          + " | ".join(f"against {name}" for name in others) + " |\n|" + "---|" * (4 + len(others)))  # fmt: skip
    for name in GROWN:
        for i, (tokens, _, flops) in enumerate(curves[name, seeds[0]]):
            mine = [curves[name, s][i] for s in seeds]
            cells = [cell([m[1] for m in mine], "")]
            cells += [cell([m[1] - at(curves[other, s], m[2]) for m, s in zip(mine, seeds)]) for other in others]
            print(f"| {name} | {tokens // M} M | {flops:.3g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(__doc__, run, show=show)
