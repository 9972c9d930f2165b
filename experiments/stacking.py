"""Growing, measured here: which operator, when, how often, and is it faster than training the large model?

    python experiments/stacking.py run [--seeds 1 2 3] [--share 1/2]     # about 3.2 core-hours; a second call goes on
    python experiments/stacking.py speed                                 # seconds a step of each shape
    python experiments/stacking.py show                                  # tables, verdicts, figure

What the papers found. The speed-up is FLOPs_scratch / FLOPs_grown - 1 at the same loss. Of eight operators depth-direct
(stacking) has the highest, 49 %; learned has 49, zero 47, random -26 % in depth; in width direct -1, zero -18, random
-14, learned -15 %. A factor of 2 to 4 is best (all 2405.15319). For long bases interposed layers, 0 0 1 1, beat stacked
ones, 0 1 0 1 (2510.08008). One layer can be made many at 0.8 of the run, and hardly anything is lost (2511.04981).

Here. The target has 4 layers of 64. Depth grows from 2 layers of 64, width from 4 layers of 32. Bases are trained at a
constant rate for d = 1 M bytes of Python, grown, and trained on for 1.5 M; every operator has a rate of its own.
LiGO's 100 steps count, in tokens and FLOPs. "At equal FLOPs" counts the base, and reads the target from scratch off
between its budgets of 1, 2 and 4 M. Then, for 1.5 M more at the rate of stacking, tuned for d = 1 M and for 3 M:
stacked against interposed at d = 0.25, 1 and 3 M, and one layer made four at d = 1 M. And one layer made four after
3.2 M of 4 M, with a decay of 0.6 M, against the target from scratch at 4 M. Under AdamW: scratch and depth-direct.
"""

import statistics

from ladder import M, cell, pick, reach
from papers import climb, experiment, grown
from verdict import band, draw, less, load, markdown, panels, points, save, seeds, select, verdict

BIG, SMALL, NARROW, ONE = pick(
    tiny=("16x4", "16x2", "8x4", "16x1"), cpu=("64x4", "64x2", "32x4", "64x1"), gpu=("512x8", "512x4", "256x8", "512x2")
)
D = pick(tiny=2048, cpu=M, gpu=8 * M)  # tokens of a base
TIMES = pick(tiny=[2048, 4096], cpu=[M // 4, M, 3 * M], gpu=[4 * M, 8 * M, 24 * M])
AFTER = pick(tiny=8192, cpu=M * 3 // 2, gpu=12 * M)  # tokens after growth
SCRATCH = pick(tiny=[4096, 8192, 16384], cpu=[M, 2 * M, 4 * M], gpu=[8 * M, 16 * M, 32 * M])
LATE = int(0.8 * SCRATCH[-1])
MASK = pick(2, 100, 100)  # steps in which the mask of random opens
LEARN = ("--steps", pick(2, 100, 100), "--batch-tokens", pick(512, 4096, 65536))  # of LiGO
PAPER = {"depth direct": 49, "depth zero": 47, "depth random": -26, "depth learned": 49,
         "width direct": -1, "width zero": -18, "width random": -14, "width learned": -15}  # fmt: skip


def operator(arm, parent, seed):
    """The run that grows a base by the operator of that arm."""
    axis, how = arm.split()
    if how == "learned":
        how = ("--axis", axis, "--factor", 2, *LEARN)
        return grown("ligo.py", parent, BIG, *how, seed=seed, tokens=LEARN[1] * LEARN[3])
    return grown("grow.py", parent, BIG, "--axis", axis, "--operator", how, "--factor", 2, seed=seed)


def listed(parent, layers, seed):
    """The run that makes a model of these layers of a base."""
    how = ("--axis", "depth", "--operator", "direct", "--layers", ",".join(map(str, layers)))
    return grown("grow.py", parent, BIG, *how, seed=seed)


def plan(seeds):
    runs = []
    for seed in seeds:
        runs += climb("scratch", BIG, SCRATCH, seed)
        small, narrow = climb("base", SMALL, [], seed, also=TIMES), climb("base", NARROW, [], seed, also=[D])
        runs += small + narrow
        for arm in PAPER:
            made = operator(arm, ((small if "depth" in arm else narrow)[0], D), seed)
            flags = ("--mask-steps", MASK) if "random" in arm else ()
            runs += [made, *climb(arm, BIG, [AFTER], seed, flags=flags, parent=(made, None))]
        runs += others(seed, small[0])
    return runs + [run for seed in seeds for run in again(seed)]


def stacked(d):
    """The arm of stacking after d tokens."""
    return "depth direct" if d == D else f"stacked at {d}"


def others(seed, base):
    """When to stack, stacked against interposed, and one layer made many."""
    deep = lambda shape: int(shape.split("x")[1])
    again = [*range(deep(SMALL))] * (deep(BIG) // deep(SMALL))
    many = [*range(deep(ONE))] * (deep(BIG) // deep(ONE))
    runs = climb("base", ONE, [], seed, also=[D, LATE])
    arms = [(stacked(d), (base, d), again, AFTER, ()) for d in TIMES if d != D]
    arms += [(f"interposed at {d}", (base, d), sorted(again), AFTER, ()) for d in TIMES]
    arms += [("one to many", (runs[0], D), many, AFTER, ())]
    arms += [("one to many late", (runs[0], LATE), many, SCRATCH[-1] - LATE, ("--decay-fraction", 0.75))]
    for arm, parent, layers, tokens, flags in arms:
        made = listed(parent, layers, seed)
        d = parent[1] if parent[0] is base and parent[1] > D else D  # a longer base wants a lower rate
        runs += [made, *climb(arm, BIG, [tokens], seed, "muon", flags, (made, None), rate=f"{stacked(d)} {BIG} muon")]
    return runs


def again(seed):
    """Scratch and depth-direct under AdamW."""
    base = climb("base", SMALL, [], seed, "adamw", also=[D])
    made = operator("depth direct", (base[0], D), seed)
    runs = climb("scratch", BIG, SCRATCH, seed, "adamw") + [*base, made]
    return runs + climb("depth direct", BIG, [AFTER], seed, "adamw", parent=(made, None))


def speedups(rows, mine):
    """[FLOPs of scratch / FLOPs of this run - 1, in %, at the loss of this run] a seed."""
    runs = [(row, points(rows, "flops_total", arm="scratch", seed=row["seed"])) for row in select(rows, **mine)]
    return [100 * (reach(scratch, row["L"]) / row["flops_total"] - 1) for row, scratch in runs]


def against_scratch(rows, mine):
    """Cells: L, less scratch at equal FLOPs, at equal seconds, speed-up."""
    scratch = dict(arm="scratch")
    found = speedups(rows, mine)
    if not found:
        return ["missing"] * 4
    percent = f"{statistics.fmean(found):+.0f} %" if all(s == s for s in found) else "outside"
    spread = f" ± {statistics.stdev(found):.0f}" if len(found) > 1 and percent != "outside" else ""
    return [cell([row["L"] for row in select(rows, **mine)], ""), cell(less(rows, mine, scratch, "flops_total")),
            cell(less(rows, mine, scratch, "seconds")), percent + spread]  # fmt: skip


def show(home):
    rows = load(home)
    muon, adamw = (select(rows, optimizer=name) for name in ("muon", "adamw"))
    heads, table = ["L", "less scratch, equal FLOPs", "equal seconds", "speed-up in FLOPs"], []
    for arm, theirs in PAPER.items():
        start = cell([row["L_start"] for row in select(muon, arm=arm)], "")
        table.append([arm, start, *against_scratch(muon, dict(arm=arm)), f"{theirs:+d} %"])
    markdown([f"{len(seeds(muon))} seeds", "L at the start", *heads, "the paper"], table)

    table, more = [], []
    for d in TIMES:
        table.append([f"{d / M:g} M", *against_scratch(muon, dict(arm=stacked(d)))])
        apart = less(muon, dict(arm=f"interposed at {d}"), dict(arm=stacked(d)), "D")
        more.append(f"interposed less stacked at {d / M:g} M: {verdict(apart)}")
    table.append([f"one layer, {D / M:g} M", *against_scratch(muon, dict(arm="one to many"))])
    table.append([f"one layer, {LATE / M:g} M", *against_scratch(muon, dict(arm="one to many late"))])
    markdown(["stacked at", *heads], table)
    print("\n" + "\n".join(more) + "  (2510.08008: below 0 for long bases)")
    if row := next(iter(select(muon, arm="one to many late")), None):
        late = less(muon, dict(arm="one to many late"), dict(arm="scratch"), "D")
        cost = row["flops_total"] / select(muon, arm="scratch", budget=SCRATCH[-1])[0]["flops_total"]
        print(f"one layer to many at 0.8, less scratch at equal tokens (2511.04981: near 0): {verdict(late)}")
        print(f"  for {cost:.2f} of the FLOPs")
    for name, some in (("Muon", muon), ("AdamW", adamw)):
        if found := speedups(some, dict(arm="depth direct")):
            print(f"depth-direct, {name}: speed-up in FLOPs {verdict(found, ' %')}")
    plot(home, muon)


def panel(axes, rows):
    """The speed-up of each operator, beside the paper's."""
    for i, (arm, theirs) in enumerate(PAPER.items()):
        found = speedups(rows, dict(arm=arm))
        axes.plot(found, [i] * len(found), "o", color="C0", ms=4, label="here, a dot a seed" * (i == 0))
        axes.plot(theirs, i, "x", color="C1", label="the paper" * (i == 0))
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set(xlabel="speed-up in FLOPs against scratch, % (right: better)", yticks=range(len(PAPER)), yticklabels=PAPER)
    axes.set_ylim(len(PAPER) - 0.5, -0.5)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def plot(home, rows):
    figure, axes = panels(4 if select(rows, arm=[f"interposed at {d}" for d in TIMES]) else 3)
    for i, arm in zip((6, 0, 1, 2, 3, 7, 8, 9, 10), ("scratch", *PAPER)):  # black; a colour a kind
        draw(axes[0], i, band(rows, "flops_total", arm=arm), arm)
        draw(axes[1], i, band(rows, "seconds", arm=arm), arm)
    axes[0].set(xscale="log", xlabel="training FLOPs, the base counted", ylabel="validation loss, nats a byte")
    axes[1].set(xscale="log", xlabel="seconds on one thread, the base counted")
    axes[0].legend(frameon=False, fontsize=8)
    panel(axes[2], rows)
    for last in axes[3:]:
        for i, arm in enumerate(("stacked", "interposed")):
            names = {d: stacked(d) if arm == "stacked" else f"interposed at {d}" for d in TIMES}
            losses = {d: [row["L"] for row in select(rows, arm=name)] for d, name in names.items()}
            draw(last, i, [(d, statistics.fmean(L), min(L), max(L)) for d, L in losses.items() if L], arm)
        last.set(xscale="log", xlabel="d, tokens of the base", title=f"after {AFTER / M:g} M tokens more")
        last.legend(frameon=False, fontsize=8)
    save(figure, home, *axes[:2], *axes[3:])


if __name__ == "__main__":
    experiment("stacking", __doc__, plan, show)
