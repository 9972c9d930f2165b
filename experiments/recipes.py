"""Recipes of upcycling, measured here: one dense model, one way after the other to make a mixture of it.

    python experiments/recipes.py run [--seeds 1 2 3] [--share 1/2]     # about 2.4 core-hours; a second call goes on
    python experiments/recipes.py speed                                 # seconds a step of each shape
    python experiments/recipes.py show                                  # the table, verdicts, figure

What the papers found. A Mixtral router (topk, then softmax) starts at the dense model's loss and stays ahead
(2412.09952); softmax first is better if weights are scaled (2410.07524). Noise on the copies does not help
(2409.02060). Drop, which draws half of each expert anew, starts behind and pays late (2502.19261). Capacity factors of
1 and 2 cost little (2412.09952). A rate that starts again at its peak beats one that goes on at its end (2410.07524).
Granular experts help at first (2410.07524). And experts can come in two steps, 4 and then 8 (2604.19835).

Here. One base for each seed: a dense model at a constant rate for D1 = 1.5 M bytes of Python. From it every arm trains
a mixture for D2 = 0.5 and 1.5 M, at a rate of its own where the recipe changes what is trained. All arms cost the same
FLOPs, but for the routers of granular ones. "Re-warmed" and "rate goes on" start from the base whose rate has decayed
(D1 = 2 M): at the tuned rate, and at a tenth of it without warmup. "4 then 8" spends half of D2 as 4x2. The table
gives each arm less "copy", paired by seed, at the start and after D2. Under AdamW: copy and softmax first.
"""

import math

from ladder import M, cell, pick
from papers import climb, experiment, grown
from verdict import less, load, markdown, panels, save, seeds, select, verdict

BASE = pick(tiny="16x2", cpu="48x2", gpu="384x6")
D1 = pick(tiny=3072, cpu=M * 3 // 2, gpu=12 * M)  # three quarters of the decayed base's
D2S = pick(tiny=[4096, 8192], cpu=[M // 2, M * 3 // 2], gpu=[4 * M, 16 * M])
EIGHT = ("--experts", 8, "--top-k", 2)
ARMS = {  # name: (flags of upcycle.py beside 8x2, granularity, flags of train.py, whether it is tuned as copy is)
    "copy": ((), "", (), False),
    "softmax first": (("--router", "softmax-topk"), "", (), False),
    "noise": (("--method", "noise"), "", (), False),
    "drop": (("--method", "drop"), "", (), False),
    "granularity 2": (("--granularity", 2), " G2", (), False),
    "granularity 4": (("--granularity", 4), " G4", (), False),
    "capacity 1": ((), "", ("--capacity-factor", 1), True),
    "capacity 2": ((), "", ("--capacity-factor", 2), True),
}
AGAIN = ("copy", "softmax first")  # under AdamW
ALL = (*ARMS, "4 then 8", "re-warmed", "rate goes on")


def plan(seeds):
    runs = [run for seed in seeds for run in family(seed, ALL)]
    return runs + [run for seed in seeds for run in family(seed, AGAIN, "adamw")]


def family(seed, arms, optimizer="muon"):
    """A base, dense, and the arms that start from it."""
    runs = climb("base", BASE, [D1 * 4 // 3], seed, optimizer, also=[D1])
    base, decayed = runs
    mixture, half = f"{BASE} 8x2", D2S[-1] // 2
    copy = f"copy {mixture} {optimizer}"
    for arm in arms:
        if arm in ARMS:
            how, G, flags, alike = ARMS[arm]
            made = [grown("upcycle.py", (base, D1), mixture + G, *EIGHT, *how, seed=seed)]
            rate = copy if alike else None
            runs += made + climb(arm, mixture + G, D2S, seed, optimizer, flags, (made[0], None), rate=rate)
        elif arm == "4 then 8":
            four = grown("upcycle.py", (base, D1), f"{BASE} 4x2", "--experts", 4, "--top-k", 2, seed=seed)
            first = climb("four", four.shape, [], seed, optimizer, (), (four, None), also=[half], rate=copy)
            eight = grown("upcycle.py", (first[0], half), mixture, *EIGHT, "--router-std", 0.02, seed=seed)
            slow = ("--decay-fraction", 0.5)  # a quarter of all D2, as in the other arms
            runs += [four, *first, eight, *climb(arm, mixture, [half], seed, optimizer, slow, (eight, None), rate=copy)]
        else:
            made = grown("upcycle.py", (decayed, None), mixture, *EIGHT, seed=seed)
            flags, part = (("--warmup", 0), 0.1) if arm == "rate goes on" else ((), 1.0)
            runs += [made, *climb(arm, mixture, D2S[-1:], seed, optimizer, flags, (made, None), rate=copy, part=part)]
    return runs


def less_copy(rows, arm, D2, x="D"):
    """[L of an arm less that of copy] a seed, after D2 tokens; or, x: seconds, after what they take copy."""
    if x == "seconds":
        return [-d for d in less(rows, dict(arm="copy", budget=D2), dict(arm=arm), x)]
    return less(rows, dict(arm=arm, budget=D2 // 2 if arm == "4 then 8" else D2), dict(arm="copy"), x)


def start_less_copy(rows, arm):
    """The same before the first update."""
    mine, copies = (select(rows, arm=name, budget=D2S[-1]) for name in (arm, "copy"))
    return [a["L_start"] - b["L_start"] for a, b in zip(mine, copies)] or [math.nan]


def show(home):
    rows = load(home)
    muon, adamw = (select(rows, optimizer=name) for name in ("muon", "adamw"))
    table = []
    for arm in ALL:
        last = select(muon, arm=arm, budget=D2S[-1] // 2 if arm == "4 then 8" else D2S[-1])
        ways = [less_copy(muon, arm, D2) for D2 in D2S] + [less_copy(muon, arm, D2S[-1], "seconds")]
        cells = [cell(d) if not any(map(math.isnan, d)) else "" for d in ways]
        start, ended = ([row[name] for row in last] for name in ("L_start", "L"))
        table.append([arm, cell(start, ""), *cells, cell(ended, "")])
    heads = [f"{len(seeds(muon))} seeds", "L at the start", *(f"less copy, {D2 / M:g} M" for D2 in D2S)]
    markdown([*heads, "the same at equal seconds", f"L after {D2S[-1] / M:g} M"], table)

    print()
    claims = {
        "softmax first": "above 0 at the start", "noise": "not below 0", "drop": "above 0 early, below it late",
        "granularity 4": "below 0 early", "capacity 1": "near 0", "capacity 2": "near 0", "4 then 8": "near 0",
    }  # fmt: skip
    for arm, claim in claims.items():
        said = [f"{D2 / M:g} M: {verdict(less_copy(muon, arm, D2))}" for D2 in D2S if arm in ARMS or D2 == D2S[-1]]
        start = f"start: {verdict(start_less_copy(muon, arm))}, " * (arm in ARMS)
        print(f"{arm} less copy (papers: {claim}): {start}{', '.join(said)}")
    d = less(muon, dict(arm="re-warmed"), dict(arm="rate goes on"), "D")
    print(f"re-warmed less rate goes on (papers: below 0): {verdict(d)}")
    for D2 in D2S:
        print(f"softmax first less copy, AdamW, {D2 / M:g} M: {verdict(less_copy(adamw, 'softmax first', D2))}")
    plot(home, muon)


def panel(axes, rows, D2=D2S[-1]):
    """Each recipe less copy, after D2 tokens."""
    arms = [arm for arm in ARMS if arm != "copy"] + ["4 then 8"]
    for i, arm in enumerate(arms):
        d = less_copy(rows, arm, D2) if arm in ARMS or D2 == D2S[-1] else [math.nan]
        axes.plot(d, [i] * len(d), "o", color="C0", ms=4)
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set(xlabel="L less that of plain copies, a dot a seed (right: worse)", title=f"D2 = {D2 / M:g} M tokens")
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)


def plot(home, rows):
    figure, axes = panels(2, sharey=True)
    for D2, axis in zip(D2S, axes):
        panel(axis, rows, D2)
    save(figure, home)


if __name__ == "__main__":
    experiment("recipes", __doc__, plan, show)
