"""Upcycling, measured here: what are the D1 tokens of a dense model worth to the mixture that is made of it?

    python experiments/upcycling.py run [--seeds 1 2 3] [--share 1/2]     # about 3.4 core-hours; a second call goes on
    python experiments/upcycling.py speed                                 # seconds a step of each shape
    python experiments/upcycling.py show                                  # tables, verdict, figure

    cd experiments/upcycling                                              # the fits alone
    python ../../laws.py fit upcycling runs.csv --where arm=scratch optimizer=muon --set moe --json > moe.json
    python ../../laws.py fit upcycling runs.csv --where arm=upcycled optimizer=muon --first-stage moe.json

The paper (2502.03009). L = A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E for D1 tokens dense, then D2 as a
mixture. alpha3 > 0: the longer the dense training, the less each token brings the mixture. So there is a D2* beyond
which a mixture from scratch wins at equal D2.

Here. Two sizes, upcycled to 8x2 (copies, router of deviation 0.02). One dense trunk for each size and seed has
snapshots at D1 = 0.375, 1.5 and 5 M bytes of Python. From each a mixture is trained on for D2 = 0.5, 1.25 and 3 M: a
trunk with branches, new optimizer, new warmup, the text goes on. Beside it the dense model trained on (budgets to 8 M)
and the mixture from scratch (to 3 M). Rates: one sweep for each arm, size and D1, as the best one falls as D1 grows.
alpha3 is fitted three ways: E taken over from the mixture from scratch, as in the paper; E free; and each size alone,
without B N^-beta. "Noise explains it away" is the F test of uncertainty.py. Under AdamW: one size at the first seed,
and one rate, that of the smallest D1.
"""

from ladder import M, cell, pick
from papers import climb, experiment, whole
from verdict import band, draw, fit_law, less, load, markdown, panels, save, say_fit, select, span_of

SIZES = pick(tiny=["16x1", "16x2"], cpu=["32x2", "64x2"], gpu=["128x4", "384x6"])
DENSE = pick(tiny=[4096, 8192], cpu=[M // 2, M, 2 * M, 4 * M, 8 * M], gpu=[4 * M, 8 * M, 16 * M, 32 * M, 64 * M])
D1S = pick(tiny=[3072, 6144], cpu=[M * 3 // 8, M * 3 // 2, 5 * M], gpu=[3 * M, 12 * M, 48 * M])
D2S = pick(tiny=[2048, 4096, 8192], cpu=[M // 2, M * 5 // 4, 3 * M], gpu=[4 * M, 12 * M, 32 * M])
FURTHEST = 100 * max(D2S)  # where a crossing is looked for


def plan(seeds):
    runs = [run for seed in seeds for size in SIZES for run in family(size, seed)]
    return runs + family(SIZES[0], seeds[0], "adamw")


def family(size, seed, optimizer="muon"):
    """A dense ladder, the mixtures that come of its trunk, and (under Muon) the mixture from scratch."""
    mixture, budgets = f"{size} 8x2", DENSE if optimizer == "muon" else []
    dense = climb("dense", size, budgets, seed, optimizer, also=D1S)
    for D1 in D1S:
        rate = f"upcycled {mixture} {optimizer}" + f" from {D1}" * (optimizer == "muon" and D1 != D1S[0])
        flags = ["--upcycle", "8x2"]
        dense += climb("upcycled", mixture, D2S, seed, optimizer, flags, parent=(dense[0], D1), rate=rate)
    return dense + (climb("scratch", mixture, D2S, seed) if optimizer == "muon" else [])


def crossing(size, scratch, D1):
    """A function of an upcycling fit: D2* where the upcycled mixture and that from scratch have the same loss. FURTHEST
    if it is ahead up to there; 0 if it is behind from the start."""
    import numpy as np

    import laws

    D2 = np.geomspace(min(D2S) / 10, FURTHEST, 2000)
    theirs = laws.evaluate(laws.row("upcycling", "moe").form, scratch["coefficients"], N=size, D=D2)

    def star(report):
        mine = laws.evaluate(laws.row("upcycling").form, report["coefficients"], N=size, D1=D1, D2=D2)
        behind = np.flatnonzero(mine > theirs)
        return float(FURTHEST if not len(behind) else 0 if behind[0] == 0 else D2[behind[0]])

    return star


def show(home):
    rows = load(home)
    muon = select(rows, optimizer="muon")
    for size in SIZES:
        dense, scratch = dict(arm="dense", shape=size), dict(arm="scratch", shape=f"{size} 8x2")
        table = []
        for D1 in D1S:
            for D2 in D2S:
                up = dict(arm="upcycled", shape=f"{size} 8x2", D1=whole(D1), budget=D2)
                cells = [cell([row["L"] for row in select(muon, **up)], "")]
                cells += [cell(less(muon, up, scratch, x)) for x in ("budget", "flops_total")]
                cells += [cell(less(muon, up, dense, x)) for x in ("D", "flops_total", "seconds")]
                table.append([f"{D1 / M:g} M", f"{D2 / M:g} M", *cells])
        heads = [f"{size}, D1", "D2", "L upcycled", "less scratch, equal D2", "equal FLOPs, D1 counted"]
        markdown([*heads, "less dense trained on, equal tokens", "equal FLOPs", "equal seconds"], table)

    table = []
    for size in SIZES:
        for budget in D2S:
            mixture = dict(arm="scratch", shape=f"{size} 8x2", budget=budget)
            apart = [less(muon, mixture, dict(arm="dense", shape=size), x) for x in ("D", "flops_total", "seconds")]
            losses = [row["L"] for row in select(muon, **mixture)]
            table.append([size, f"{budget / M:g} M", cell(losses, ""), *map(cell, apart)])
    markdown(["mixture from scratch", "tokens", "L", "less dense, equal tokens", "equal FLOPs", "equal seconds"], table)

    scratch = fit_law(select(muon, arm="scratch"), "upcycling", "moe")
    say_fit("mixture from scratch", scratch)
    up, alpha3 = select(muon, arm="upcycled"), lambda r: r["coefficients"]["alpha3"]
    staged = fit_law(up, "upcycling", fixed={"E": scratch["coefficients"]["E"]})
    say_fit("upcycled, E from scratch's fit", staged)
    ways = {"upcycled, E free": (up, {})}
    ways |= {f"upcycled, {size} alone": (select(up, shape=f"{size} 8x2"), {"B": 0, "beta": 0}) for size in SIZES}
    ways["the same under AdamW, one seed"] = select(rows, arm="upcycled", optimizer="adamw"), {"B": 0, "beta": 0}
    for what, (some, fixed) in ways.items():
        if len(some) > 5:
            report = fit_law(some, "upcycling", fixed=fixed)
            say_fit(what, report)
            print(f"alpha3 = {span_of(report, alpha3)}")
    print(f"\nalpha3 = {span_of(staged, alpha3)} with E from scratch's fit; the paper: 0.0008, above 0")
    table = []
    for size in SIZES:
        N = select(up, shape=f"{size} 8x2")[0]["N"]
        stars = [crossing(N, scratch, whole(D1)) for D1 in D1S]
        table.append([size, *(span_of(staged, star) for star in stars)])
    markdown([f"D2* by the fits, at equal D2, up to {FURTHEST:.0e}", *(f"D1 {D1 / M:g} M" for D1 in D1S)], table)
    plot(home, muon)


def mixtures():
    """{label: which rows} of the larger size."""
    shape = f"{SIZES[-1]} 8x2"
    arms = {f"upcycled at {D1 / M:g} M": dict(arm="upcycled", shape=shape, D1=whole(D1)) for D1 in D1S}
    return arms | {"8x2 from scratch": dict(arm="scratch", shape=shape)}


def panel(axes, rows):
    """The loss over D2 for each D1, beside the mixture from scratch."""
    for i, (label, arm) in enumerate(mixtures().items()):
        draw(axes, i, band(rows, "budget", **arm), label)
    axes.set(xscale="log", xlabel=f"D2, tokens as {SIZES[-1]} 8x2 (D1 not counted)")
    axes.set_ylabel("validation loss, nats a byte")
    axes.legend(frameon=False, fontsize=8)


def plot(home, rows):
    figure, axes = panels(3)
    panel(axes[0], rows)
    arms = mixtures()
    for i, (label, arm) in enumerate(arms.items()):
        draw(axes[1], i, band(rows, "flops_total", **arm), label)
        draw(axes[2], i, band(rows, "seconds", **arm), label)
    draw(axes[1], len(arms), band(rows, "flops_total", arm="dense", shape=SIZES[-1]), "dense, trained on")
    draw(axes[2], len(arms), band(rows, "seconds", arm="dense", shape=SIZES[-1]), "dense")
    axes[1].set(xscale="log", xlabel="training FLOPs, the dense part counted")
    axes[2].set(xscale="log", xlabel="seconds on one thread, the dense part counted")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, home, *axes)


if __name__ == "__main__":
    experiment("upcycling", __doc__, plan, show)
