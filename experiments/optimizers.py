"""Muon against AdamW, each at its best rate: loss at equal tokens and at equal seconds, and what a step costs.

    python experiments/optimizers.py run [--seeds 1 2 3]      # a second call goes on
    python experiments/optimizers.py speed                    # on a quiet machine: seconds a step, the two in turn
    python experiments/optimizers.py show                     # the tables, from optimizers.csv and optimizer_speed.csv

In the setting of ladder.py: trunks at a constant rate and a decay for each budget. Differences are paired by seed: same
text, same first weights. Rates are the best of rates.py at 1 million tokens. "At equal seconds" reads AdamW's loss off
at the budget that it finishes in the time that Muon takes, linearly in the logarithm.
"""

import csv
import statistics
import time

import torch
from ladder import ROOT, SHAPE, M, at, cell, folder, in_turn, ladder, main, read, stepper, write

TABLE, SPEED = ROOT / "experiments/optimizers.csv", ROOT / "experiments/optimizer_speed.csv"
MODELS = {  # name: flags, rate of AdamW, rate of Muon, budgets
    "dense": ([], 0.0055, 0.0083, (M, 2 * M, 4 * M, 8 * M)),
    "8x2": (["--experts", "8", "--top-k", "2"], 0.0049, 0.0075, (M, 2 * M, 4 * M)),
}
SPEEDS = {  # name: flags
    "default": "",
    "256 x 6": "--hidden-size 256 --num-hidden-layers 6 --batch-tokens 4096",
    "default, 8x2": "--experts 8 --top-k 2",
}


def run(seed, out):
    ladders = {}
    for name, (flags, *rates, budgets) in MODELS.items():
        for optimizer, lr in zip(("adamw", "muon"), rates):
            given = [*SHAPE, *flags, "--seed", seed, "--optimizer", optimizer, "--lr", lr]
            key = f"{name}, {optimizer}"
            ladders[key] = ladder(folder(out / "optimizers", key, seed), budgets, *given)
            write(TABLE, seed, ladders)


def speed(rounds=25):
    """Seconds of a whole step of train.py, in turn."""
    steps = {}
    for name, flags in SPEEDS.items():
        for optimizer in ("adamw", "muon"):
            steps[name, optimizer], s = stepper([*flags.split(), "--optimizer", optimizer])
    seconds = in_turn(steps, rounds, time.perf_counter)
    with open(SPEED, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["model", "optimizer", "seconds_a_step", "lowest", "highest", "dtype", "threads"])
        for key, t in seconds.items():
            row = [f"{x:.4f}" for x in (statistics.median(t), min(t), max(t))]
            writer.writerow([*key, *row, s.dtype, torch.get_num_threads()])


def show():
    curves, seeds = read(TABLE)
    seconds = {(r["model"], r["optimizer"]): float(r["seconds_a_step"]) for r in csv.DictReader(open(SPEED))}
    print("| step of Muon / of AdamW | " + " | ".join(SPEEDS) + " |\n|" + "---|" * (1 + len(SPEEDS)))
    ratios = [seconds[name, "muon"] / seconds[name, "adamw"] for name in SPEEDS]
    print("| | " + " | ".join(f"{r:.2f}" for r in ratios) + " |\n")
    print(f"| seeds {', '.join(seeds)} | tokens | AdamW | Muon | less AdamW | at equal seconds |\n|" + "---|" * 6)
    for name, (*_, budgets) in MODELS.items():
        slower = ratios[0 if name == "dense" else 2]
        for i, tokens in enumerate(budgets):
            adamw, muon = ([curves[f"{name}, {o}", seed] for seed in seeds] for o in ("adamw", "muon"))
            pairs = [(m[i][1], a[i][1], at(a, m[i][2] * slower)) for m, a in zip(muon, adamw)]
            cells = [cell([a for _, a, _ in pairs], ""), cell([m for m, *_ in pairs], "")]
            cells += [cell([m - a for m, a, _ in pairs]), cell([m - a for m, _, a in pairs])]
            print(f"| {name} | {tokens // M} M | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(__doc__, run, speed=speed, show=show)
