"""Another language, measured here: what does a model of Python save when it learns C++, and what does it forget?

    python experiments/continual.py run [--seeds 1 2 3] [--share 1/2]     # about 3.5 core-hours; a second call goes on
    python experiments/continual.py speed                                 # seconds a step of each size
    python experiments/continual.py show                                  # tables, verdicts, figure

    cd experiments/continual                                              # the fits alone
    python ../../laws.py fit continual runs.csv --where arm=scratch optimizer=muon --set scratch --json > scratch.json
    python ../../laws.py fit continual runs.csv --where arm=continual optimizer=muon --first-stage scratch.json

The paper (2407.02118). From scratch L = E + A N^-alpha + B D^-beta. Continued from another language, with the same E, A
and alpha, L = E + A N^-alpha + B' D^-beta' N^-gamma, gamma = 0.08 > 0: what is carried over grows with the model. It
saves 25 to 50 % of the FLOPs, more for near languages. Without replay of the old text the model forgets it; 10 to 30 %
of replay hold it, and the new loss depends on the new tokens alone.

Here. Python, then C++ (D counts C++ alone, as the table's D does). Three sizes; a parent on 3 M bytes of Python,
decayed; from it and from scratch four budgets of 0.5 to 4 M: a trunk with branches, every size and arm at a rate of its
own. "Saved" is 1 - D / (D from scratch with the same loss), between the budgets measured, and by the two fits.
At the middle size, 2 M tokens in all, at the rate of no replay: replay of 1 to 50 % of the tokens; and from the parent
before its decay, with as many tokens. There also, at a rate of its own, the far language: C++ with its bytes permuted.
From scratch it is as hard as C++ (measured, too), but not a byte of it means what it meant in Python. Under AdamW:
scratch and continual there.
"""

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from ladder import ROOT, SCALE, M, cell, pick, reach
from papers import CPP, PYTHON, climb, experiment
from verdict import band, draw, fit_law, less, load, markdown, panels, points, save, say_fit, select, span_of, verdict

SIZES = pick(tiny=["16x1", "16x2", "24x2"], cpu=["32x2", "48x3", "64x4"], gpu=["128x4", "256x4", "384x6"])
PARENT = pick(tiny=4096, cpu=3 * M, gpu=32 * M)  # tokens of Python
BUDGETS = pick(tiny=[4096, 8192], cpu=[M // 2, M, 2 * M, 4 * M], gpu=[4 * M, 8 * M, 16 * M, 32 * M])
T = pick(tiny=8192, cpu=2 * M, gpu=16 * M)  # tokens of the comparisons
SHARES = pick(tiny=(0.1, 0.5), cpu=(0.01, 0.05, 0.1, 0.2, 0.3, 0.5), gpu=(0.01, 0.05, 0.1, 0.2, 0.3, 0.5))
MIDDLE = SIZES[1]
FAR = Path("out/papers", SCALE, "far-text")


def text(share=0.0, new=CPP):
    """The flags of so much replay."""
    return ("--data", f"{new}:{1 - share:g},{PYTHON}:{share:g}")


def permuted():
    """Makes the far language: the tokens of C++, each byte value but the end of a document turned into another."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import data
    from tokenizer import load_tokenizer

    if FAR.exists():
        return
    corpus = data.prepare(CPP, load_tokenizer("bytes"), quiet=True)[0]
    other = np.append(0, 1 + np.random.default_rng(1).permutation(255)).astype("<u2")
    beside = FAR.with_name(f"{FAR.name}-{os.getpid()}")
    beside.mkdir(parents=True)
    for name in ("train", "val"):
        other[getattr(corpus, name)].tofile(beside / f"{name}.bin")
    about = {"dtype": "uint16", "vocab_size": corpus.vocab_size, "bytes_per_token": corpus.bytes_per_token}
    (beside / "meta.json").write_text(json.dumps(about))
    with suppress(OSError):  # another terminal was faster: its folder is as good
        beside.rename(FAR)


def plan(seeds):
    runs = [run for seed in seeds for size in SIZES for run in family(size, seed)]
    return runs + [run for seed in seeds for run in again(seed)]


def family(size, seed):
    """A parent, what goes on from it, and the same from scratch."""
    parent = climb("parent", size, [PARENT], seed, also=[PARENT])
    trunk, decayed = parent
    runs = parent + climb("continual", size, BUDGETS, seed, flags=text(), parent=(decayed, None))
    runs += climb("scratch", size, BUDGETS, seed, flags=("--data", CPP))
    if size == MIDDLE:
        rate, far = f"continual {size} muon", f"far={FAR}"
        arms = [(f"replay {share:g}", text(share), decayed, None) for share in SHARES]
        arms += [("undecayed", text(), trunk, PARENT)]
        for arm, flags, start, tokens in arms:
            runs += climb(arm, size, [T], seed, flags=flags, parent=(start, tokens), rate=rate)
        runs += climb("far", size, [T], seed, flags=text(new=far), parent=(decayed, None))
        runs += climb("far scratch", size, [T], seed, flags=("--data", far), rate=f"scratch {size} muon")
    return runs


def again(seed):
    """Scratch and continual under AdamW."""
    parent = climb("parent", MIDDLE, [PARENT], seed, "adamw")
    runs = parent + climb("continual", MIDDLE, [T], seed, "adamw", text(), (parent[0], None))
    return runs + climb("scratch", MIDDLE, [T], seed, "adamw", ("--data", CPP))


def from_scratch(rows, run):
    """The points of the same size and seed from scratch, over D."""
    return points(rows, "D", arm="scratch", shape=run["shape"], seed=run["seed"])


def saved(rows, mine):
    """[1 - D / D from scratch at the same loss, in %] a seed; nan where scratch does not get there."""
    return [100 * (1 - run["D"] / reach(from_scratch(rows, run), run["L"])) for run in select(rows, **mine)]


def say_saved(rows, mine):
    """`saved` in words. Where a seed's loss is below all that scratch reaches: what every seed saves at least."""
    found, least = saved(rows, mine), math.inf
    for run, percent in zip(select(rows, **mine), found):
        _, lowest, most = from_scratch(rows, run)[-1]
        if math.isnan(percent):
            percent = 100 * (1 - run["D"] / most) if run["L"] < lowest else -math.inf
        least = min(least, percent)
    return f"above {least:.0f} %" if any(map(math.isnan, found)) and least > 1 else verdict(found, " %")


def saved_by_law(first, N, D):
    """The same as a function of the continual fit: B' D'^-beta' N^-gamma = B D^-beta, as the terms of N cancel."""
    B, beta = (first["coefficients"][name] for name in ("B", "beta"))
    term = lambda c: c["B"] * D ** -c["beta"] * N ** -c["gamma"]
    return lambda report: float(100 * (1 - D / (term(report["coefficients"]) / B) ** (-1 / beta)))


def show(home):
    rows = load(home)
    muon, adamw = (select(rows, optimizer=name) for name in ("muon", "adamw"))
    first = fit_law(select(muon, arm="scratch"), "continual", "scratch")
    say_fit("from scratch", first)
    frozen = {name: first["coefficients"][name] for name in ("E", "A", "alpha")}
    second = fit_law(select(muon, arm="continual"), "continual", fixed=frozen)
    say_fit("continual, E, A and alpha from scratch's fit", second)
    print(f"gamma = {span_of(second, lambda r: r['coefficients']['gamma'])}; the paper: 0.08")

    table = []
    for size in SIZES:
        for D in BUDGETS:
            mine = dict(arm="continual", shape=size, budget=D)
            run = select(muon, **mine)[0]
            table.append([size, f"{D / M:g} M", cell([r["L"] for r in select(muon, **mine)], ""),
                          cell(less(muon, mine, dict(arm="scratch", shape=size), "D")), say_saved(muon, mine),
                          span_of(second, saved_by_law(first, run["N"], run["D"])) + " %"])  # fmt: skip
    heads = ["size", "C++", "L", "less scratch", "FLOPs saved, measured", "by the fits"]
    markdown(heads, table)

    table, parent = [], {row["seed"]: row["L"] for row in select(muon, arm="parent", shape=MIDDLE)}
    for share in (0, *SHARES):
        mine = dict(arm=f"replay {share:g}") if share else dict(arm="continual", shape=MIDDLE, budget=T)
        runs, alone = select(muon, **mine), dict(arm="continual", shape=MIDDLE)
        forgot = [row["L_old"] - parent[row["seed"]] for row in runs]
        table.append([f"{100 * share:g} %", cell([row["L"] for row in runs], ""), cell(less(muon, mine, alone, "D")),
                      cell([row["L_old"] for row in runs], ""), cell(forgot)])  # fmt: skip
    heads = [f"replay, {MIDDLE}, {T / M:g} M in all", "L on C++", "less no replay, equal C++ tokens", "L on Python"]
    markdown([*heads, "less the parent's"], table)

    print()
    last = dict(arm="continual", shape=MIDDLE, budget=T)
    for name, arm in (("near (C++)", last), ("far (its bytes permuted)", dict(arm="far"))):
        gain = less(muon, arm, dict(arm="scratch", shape=MIDDLE), "D")
        print(f"{name}, {T / M:g} M: less scratch {verdict(gain)}; FLOPs saved {say_saved(muon, arm)}")
    control = less(muon, dict(arm="far scratch"), dict(arm="scratch", shape=MIDDLE), "D")
    print(f"from scratch, far less near: {verdict(control)} (0: the two are equally hard)")
    apart = less(muon, dict(arm="undecayed"), dict(arm="continual", shape=MIDDLE), "D")
    print(f"from the undecayed parent, less from the decayed one: {verdict(apart)}")
    for name, some in (("Muon", muon), ("AdamW", adamw)):
        gain = less(some, last, dict(arm="scratch", shape=MIDDLE), "D")
        print(f"continual less scratch, {MIDDLE}, {T / M:g} M, {name}: {verdict(gain)}")
    for size in SIZES:
        for D in BUDGETS[:2]:
            mine, theirs = dict(arm="continual", shape=size, budget=D), dict(arm="scratch", shape=size)
            behind = less(muon, mine, theirs, "flops_total")
            print(f"the parent counted, {size}, {D / M:g} M, less scratch at equal FLOPs: {verdict(behind)}")
    plot(home, muon)


def panel(axes, rows):
    """The loss on both languages over the share of replay."""
    runs = [r | {"share": 0.0} for r in select(rows, arm="continual", shape=MIDDLE, budget=T)]
    runs += [r | {"share": float(r["arm"].split()[1])} for r in rows if r["arm"].startswith("replay")]
    for i, (y, label) in enumerate((("L", "C++"), ("L_old", "Python"))):
        draw(axes, i, band(runs, "share", y, by="share"), label)
    parents = [r["L"] for r in select(rows, arm="parent", shape=MIDDLE)]
    axes.axhline(sum(parents) / len(parents), color="0.5", lw=0.8, ls=":", label="Python, before")
    axes.set(xlabel="share of Python", ylabel="validation loss", title=f"{MIDDLE}, {T / M:g} M tokens in all")
    axes.legend(frameon=False, fontsize=8)


def plot(home, rows):
    figure, axes = panels(3)
    for i, size in enumerate(SIZES):
        for j, arm in enumerate(("scratch", "continual")):
            draw(axes[0], i, band(rows, "D", arm=arm, shape=size), f"{size}, {arm}", "--" if j == 0 else "-")
        percents = [(D, saved(rows, dict(arm="continual", shape=size, budget=D))) for D in BUDGETS]
        inside = [(D, each) for D, each in percents if all(p == p for p in each)]
        draw(axes[2], i, [(D, sum(each) / len(each), min(each), max(each)) for D, each in inside], size)
    axes[0].set(xscale="log", xlabel="D, tokens of C++", ylabel="validation loss on C++, nats a byte")
    axes[2].set(xscale="log", xlabel="D, tokens of C++", ylabel="FLOPs saved, %")
    for axis in (axes[0], axes[2]):
        axis.legend(frameon=False, fontsize=7)
    panel(axes[1], rows)
    save(figure, home, axes[0], axes[2])


if __name__ == "__main__":
    experiment("continual", __doc__, plan, show, before=permuted)
