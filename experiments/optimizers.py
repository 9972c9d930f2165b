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
import sys
import time
from contextlib import nullcontext

import torch
from ladder import ROOT, SHAPE, M, at, cell, folder, ladder, main, read, write

sys.path.insert(0, str(ROOT))
import model
import settings
import train
from ranks import Ranks

TABLE, SPEED = ROOT / "experiments/optimizers.csv", ROOT / "experiments/optimizer_speed.csv"
MODELS = {  # name: flags, rate of AdamW, rate of Muon, budgets
    "dense": ([], 0.006, 0.012, (M, 2 * M, 4 * M, 8 * M)),
    "8x2": (["--experts", "8", "--top-k", "2"], 0.006, 0.012, (M, 2 * M, 4 * M)),
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
    ranks, steps = Ranks(), {}
    ranks.join(torch.device("cpu"), fsdp=False)
    for name, flags in SPEEDS.items():
        for optimizer in ("adamw", "muon"):
            given = [*flags.split(), "--optimizer", optimizer, "--out", "out/none"]
            start = settings.settle(*settings.read_flags(settings.get_parser(), given), 1)
            s, module = start.settings, train.build(start, ranks)
            s.dtype = "bfloat16" if settings.fast_bf16(ranks.device) else "float32"
            settings.horizon(s, start.config, module.num_parameters(), 1, ranks.device, 1)
            optimizers = train.get_optimizers(dict(module.named_parameters()), s, {}, ranks)
            steps[name, optimizer] = stepper(module, optimizers, s)
    seconds = {key: [] for key in steps}
    for i in range(rounds + 2):
        for key, step in steps.items():
            taken = step()
            if i > 1:
                seconds[key].append(taken)
    with open(SPEED, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["model", "optimizer", "seconds_a_step", "lowest", "highest", "dtype", "threads"])
        for key, t in seconds.items():
            row = [f"{x:.4f}" for x in (statistics.median(t), min(t), max(t))]
            writer.writerow([*key, *row, s.dtype, torch.get_num_threads()])


def stepper(module, optimizers, s):
    ids = torch.randint(256, (s.batch_tokens // s.context, s.context))

    def step():
        start = time.perf_counter()
        for x in ids.split(s.micro_batch):
            with torch.autocast("cpu", torch.bfloat16) if s.dtype == "bfloat16" else nullcontext():
                _, loss, aux = module(x, x)
            (loss + 0.01 * aux["balance_loss"] if aux else loss).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return step


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
