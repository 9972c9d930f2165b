"""Muon against AdamW, each at its best rate: loss at equal tokens and at equal seconds, and what a step costs.

    python experiments/optimizers.py run [--seeds 1 2 3] [--share 1/2]     # about 2 core-hours; a second call goes on
    python experiments/optimizers.py speed                                 # on a quiet machine: seconds a step, in turn
    python experiments/optimizers.py show                                  # the tables

A dense model and a mixture, for 1 to 8 M bytes of Python: trunks at a constant rate, and a decay for each budget, as in
papers.py. "At equal seconds" reads Muon's loss off where it is when AdamW has read the budget.
"""

import statistics
import time

from ladder import SETTING, M, append, cell, in_turn, pick, read_rows, stepper
from papers import climb, experiment, model_flags
from verdict import less, load, markdown, seeds, select, verdict

MODELS = pick(
    tiny={"16x1": [4096, 8192], "16x1 4x2": [4096]},
    cpu={"64x3": [M, 2 * M, 4 * M, 8 * M], "64x3 8x2": [M, 2 * M, 4 * M]},
    gpu={"256x4": [8 * M, 16 * M, 32 * M], "256x4 8x2": [8 * M, 16 * M, 32 * M]},
)
STEPS = {shape: SETTING for shape in (*MODELS, "128x3", "128x3 8x2")} | {"256x6": (*SETTING, "--batch-tokens", "4096")}


def plan(seeds):
    return [run for seed in seeds for shape, budgets in MODELS.items() for optimizer in ("muon", "adamw")
            for run in climb("trained", shape, budgets, seed, optimizer)]  # fmt: skip


def speed(path, _, rounds=25):
    """Seconds of a whole step of train.py, the optimizers and shapes in turn, on all threads."""
    import torch

    steps = {}
    for shape, setting in STEPS.items():
        for optimizer in ("adamw", "muon"):
            steps[shape, optimizer], s = stepper([*setting, *model_flags(shape), "--optimizer", optimizer])
    path.unlink(missing_ok=True)
    for (shape, optimizer), t in in_turn(steps, rounds, time.perf_counter).items():
        t = {"seconds_a_step": statistics.median(t), "lowest": min(t), "highest": max(t)}
        row = {"shape": shape, "optimizer": optimizer} | {name: f"{value:.4f}" for name, value in t.items()}
        append(path, row | {"dtype": s.dtype, "threads": torch.get_num_threads()})


def show(home):
    rows, steps = load(home), read_rows(home / "seconds.csv")
    taken = {(row["shape"], row["optimizer"]): float(row["seconds_a_step"]) for row in steps}
    if taken:
        ratios = {row["shape"]: taken[row["shape"], "muon"] / taken[row["shape"], "adamw"] for row in steps}
        markdown([f"a step, {steps[0]['dtype']}, {steps[0]['threads']} threads", *ratios],
                 [["of Muon / of AdamW", *(f"{ratio:.2f}" for ratio in ratios.values())]])  # fmt: skip
    for row in rows:
        row["seconds"] = row["D"] * taken.get((row["shape"], row["optimizer"]), float("nan"))
    table = []
    for shape, budgets in MODELS.items():
        for budget in budgets:
            adamw, muon = (dict(shape=shape, optimizer=name) for name in ("adamw", "muon"))
            losses = [[row["L"] for row in select(rows, budget=budget, **which)] for which in (adamw, muon)]
            apart = less(rows, muon | dict(budget=budget), adamw, "D")
            later = [-d for d in less(rows, adamw | dict(budget=budget), muon, "seconds")]
            cells = [*(cell(L, "") for L in losses), verdict(apart), verdict(later)]
            table.append([shape, f"{budget / M:g} M", *cells])
    heads = [f"{len(seeds(rows))} seeds", "tokens", "AdamW", "Muon", "Muon less AdamW (95 %)", "at equal seconds"]
    markdown(heads, table)


if __name__ == "__main__":
    experiment("optimizers", __doc__, plan, show, timed=speed)
