"""Chinchilla, measured here: how much of a budget should go into parameters, and how much into tokens?

    python experiments/dense.py run [--seeds 1 2 3] [--share 1/2]     # about 3.2 core-hours; a second call goes on
    python experiments/dense.py speed                                 # seconds a step of each size
    python experiments/dense.py copies                                # which runs repeat what they have read
    python experiments/dense.py show                                  # tables, verdict, figure

    python laws.py fit chinchilla experiments/dense/runs.csv --where optimizer=muon     # the fit alone

The paper (2203.15556; refit in 2404.10102). L = E + A N^-alpha + B D^-beta. Of a budget C = 6 N D the best N grows as
C^a with a = beta / (alpha + beta), and the best D as C^b with b = 1 - a: both exponents near one half.

Here. Five sizes from 0.03 to 0.6 M parameters, each on five budgets from 0.5 to 8 M bytes of Python: a trunk and five
branches for each size and seed. Every size has a rate of its own (rates.csv). A bootstrap draws whole trunks, and the
largest fifth of the runs is predicted from the others. The fit is to all runs, and to those that do not yet copy what
stands in their context, because that comes as a jump (induction heads, 2209.11895), and no power law has one. "Best
size" reads every size's loss off at equal counted FLOPs (head and attention included, which at these sizes are 26 to 60
% of it), and at equal seconds.
Under AdamW: the three smallest sizes at the first seed, but for the largest budget; its exponents are compared with
those of Muon from the same runs.
"""

import math
import sys

from ladder import M, append, at, pick, read_rows
from papers import PYTHON, climb, experiment
from verdict import band, draw, fit_law, load, markdown, panels, points, save, say_fit, seeds, select, span_of

SIZES = pick(
    tiny=["16x1", "16x2", "24x2"],
    cpu=["32x2", "48x2", "64x3", "96x3", "128x3"],
    gpu=["128x4", "192x4", "256x6", "384x6", "512x8"],
)
BUDGETS = pick(
    tiny=[4096, 8192, 16384], cpu=[M // 2, M, 2 * M, 4 * M, 8 * M], gpu=[8 * M, 16 * M, 32 * M, 64 * M, 128 * M]
)
AGAIN = SIZES[:3]  # under AdamW
COPIES = 0.03  # nats that a second copy is below the first for a model that is said to copy; small ones reach 0.01


def plan(seeds):
    runs = [run for seed in seeds for size in SIZES for run in climb("dense", size, BUDGETS, seed)]
    return runs + [run for size in AGAIN for run in climb("dense", size, BUDGETS[:-1], seeds[0], "adamw")]


def copies(listed, home, out):
    """Writes copies.csv: for each run in `out` its loss on half a context of validation text, and on the same text when
    it comes once more. A model that looks back for what followed the last time has the second one cheaper."""
    import torch
    import torch.nn.functional as F

    import checkpoint
    import data
    from tokenizer import load_tokenizer

    corpus = data.prepare(PYTHON, load_tokenizer("bytes"), quiet=True)[0]
    half = data.validation_windows(corpus, 128, 128 * 128)[0]
    ids = torch.cat((half, half), 1)
    made = [run for run in listed if run.columns and (out / run.name).exists()]
    if not made:
        sys.exit(f"no runs of {home.name} in {out} (`run` trains them if runs.csv is not there)")
    (home / "copies.csv").unlink(missing_ok=True)
    for run in made:
        with torch.inference_mode():
            logits, _, _ = checkpoint.load(out / run.name)(ids[:, :-1])
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        first, second = (loss[:, end - 112 : end].mean().item() for end in (127, 255))  # their last 112
        append(home / "copies.csv", {"run": run.name, "first": f"{first:.4f}", "second": f"{second:.4f}"})


def exponents(report):
    """a and b: the best N grows as C^a, the best D as C^b."""
    share = lambda of, other: lambda r: r["coefficients"][of] / (r["coefficients"][of] + r["coefficients"][other])
    return f"a = {span_of(report, share('beta', 'alpha'))}, b = {span_of(report, share('alpha', 'beta'))}"


def best_sizes(rows, x):
    """[(x, best size, its mean loss)] at the budgets of the middle size, where at least two sizes can be read off."""
    found = []
    for _, _, much in points(rows, x, shape=SIZES[len(SIZES) // 2], seed=seeds(rows)[0]):
        losses = {}
        for size in SIZES:
            each = [at(points(rows, x, shape=size, seed=seed), much) for seed in seeds(rows)]
            losses[size] = sum(each) / len(each)
        inside = {size: loss for size, loss in losses.items() if loss == loss}
        if len(inside) > 1:
            best = min(inside, key=inside.get)
            edge = " (of those at hand the " + ("smallest)" if best == [*inside][0] else "largest)")
            found.append((f"{much:.3g}", best + edge * (best in ([*inside][0], [*inside][-1])), f"{inside[best]:.3f}"))
    return found


def ranges(what, rows, y, digits):
    """A table of y: for each size and budget its mean and range over the seeds."""
    text = lambda mean, low, high: f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    cells = [[size, *(text(*point[1:]) for point in sorted(band(rows, "D", y, shape=size)))] for size in SIZES]
    markdown([what, *(f"{tokens / M:g} M" for tokens in BUDGETS)], cells)


def show(home):
    from laws import predict

    rows = load(home)
    muon, adamw = select(rows, optimizer="muon"), select(rows, optimizer="adamw")
    ranges(f"L, {len(seeds(muon))} seeds", muon, "L", 3)
    for x, name in (("flops_total", "FLOPs"), ("seconds", "seconds on one thread")):
        markdown([name, "best size", "its L"], best_sizes(muon, x))

    report = fit_law(muon, "chinchilla")
    say_fit("chinchilla", report)
    print(f"{exponents(report)}; the paper: near one half each")
    gained = {row["run"]: float(row["first"]) - float(row["second"]) for row in read_rows(home / "copies.csv")}
    for row in rows:
        row["gained"] = gained.get(row["run"], math.nan)
    if gained:
        ranges("the first copy less the second", muon, "gained", 2)
        copying = [row for row in muon if row["gained"] >= COPIES]
        report = fit_law([row for row in muon if row["gained"] < COPIES], "chinchilla")
        say_fit("chinchilla, the runs that do not copy yet", report)
        print(exponents(report))
        table = []
        for row in sorted(copying, key=lambda row: row["gained"]):
            apart = row["L"] - predict(report, N=row["N"], D=row["D"])
            numbers = f"{row['gained']:.2f}", f"{row['L']:.3f}", f"{apart:+.3f}"
            table.append([row["shape"], f"{row['budget'] / M:g} M", *numbers])
        markdown(["a run that copies", "tokens", "gained", "L", "less that law"], table)
    if adamw:
        small = select(muon, shape=AGAIN, seed=adamw[0]["seed"], budget=BUDGETS[:-1])
        for name, some in (("AdamW", adamw), ("Muon on the same runs", small)):
            print(f"{name}, {len(some)} runs: {exponents(fit_law(some, 'chinchilla'))}")
    plot(home, muon, report)


def panel(axes, rows):
    """Each size's loss over FLOPs."""
    for i, size in enumerate(SIZES):
        draw(axes, i, band(rows, "flops_total", shape=size), size)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="validation loss, nats a byte")
    axes.legend(frameon=False, fontsize=8, title="width x layers")


def plot(home, rows, report):
    import numpy as np

    import laws

    figure, (left, middle, right, last) = panels(4)
    panel(left, rows)
    for i, size in enumerate(SIZES):
        draw(middle, i, band(rows, "seconds", shape=size), size)
    middle.set(xscale="log", xlabel="seconds on one thread")
    flops = np.array([6 * r["N"] * r["D"] for r in rows])
    C = np.geomspace(flops.min(), flops.max(), 40)
    N = np.geomspace(min(r["N"] for r in rows) / 4, max(r["N"] for r in rows) * 4, 400)[:, None]
    loss = laws.evaluate(laws.row("chinchilla").form, report["coefficients"], N=N, D=C / (6 * N))
    right.plot(C, N[loss.argmin(0), 0], label="best N by the fit")
    right.plot(C, np.sqrt(C / C[0]) * N[loss.argmin(0)[0], 0], "--", color="0.5", label="exponent 0.5")
    right.scatter(flops, [r["N"] for r in rows], s=8, color="0.7", label="runs")
    right.set(xscale="log", yscale="log", xlabel="C = 6 N D", ylabel="N")
    right.legend(frameon=False, fontsize=8)
    for i, size in enumerate(SIZES):
        draw(last, i, band(rows, "D", "gained", shape=size), size)
    last.set(xscale="log", xlabel="tokens", ylabel="loss on text less that on its copy")
    save(figure, home, left, middle, right, last)


if __name__ == "__main__":
    experiment("dense", __doc__, plan, show, copies=copies)
