"""Fine-grained experts, measured here: into how many parts should an expert be cut, and does that hold in seconds?

    python experiments/granularity.py run [--seeds 1 2 3] [--share 1/2]   # about 4.9 core-hours; a second call goes on
    python experiments/granularity.py speed                               # seconds a step of each shape
    python experiments/granularity.py show                                # tables, verdict, figure

    python laws.py fit fine-grained experiments/granularity/runs.csv --where optimizer=muon      # the fit alone

The paper (2402.07871). L = c + (g G^-gamma + a) N^-alpha + b D^-beta, N all parameters; gamma = 0.58 at 64 experts.
G > 1 nearly always wins. The best G grows with the budget, although the router's FLOPs grow with G. In seconds too
large a G loses.

Here. 8 full-width experts, 2 of them a token (the paper: 64 and 1), cut into G = 1, 2, 4, 8 parts. Active parameters
are the same for every G. Three sizes, three budgets from 0.25 to 1.5 M bytes of Python: a trunk with branches for each
size, G and seed, each size and G at a rate of its own. The tables read every G off at the FLOPs, or the seconds, that
G = 1 takes for a budget; the smallest one is only the lower end. Seconds are those of this project's layer on one CPU
thread: sorting tokens is much of them. Then the fitted law is asked for the best G of a budget, in the paper's FLOPs (6
a parameter, 14 a routing weight), where 16 and 32 are extrapolated, and in measured seconds. Does a finer model catch
up? The smallest size for 4 M bytes, at 0.6 of its rate (auto_lr: steps^-0.3), beside what the law says of such a run;
the fit does not see these. Under AdamW: G = 1 and 4 of the middle size.
"""

from ladder import M, cell, pick
from papers import climb, experiment
from verdict import band, draw, fit_law, less, load, markdown, panels, save, say_fit, seeds, select, span_of, verdict

SIZES = pick(tiny=["16x1", "16x2"], cpu=["32x2", "48x2", "64x2"], gpu=["128x4", "256x4", "384x6"])
GRAINS = pick(tiny=[1, 2], cpu=[1, 2, 4, 8], gpu=[1, 2, 4, 8, 16])
BUDGETS = pick(tiny=[8192, 16384], cpu=[M // 4, M * 5 // 8, M * 3 // 2], gpu=[8 * M, 16 * M, 32 * M, 64 * M])
LONG = pick(tiny=32768, cpu=4 * M, gpu=128 * M)
AGAIN = pick(tiny=[1, 2], cpu=[1, 4], gpu=[1, 4])  # under AdamW
E, K = 8, 2
MIDDLE = SIZES[len(SIZES) // 2]


def name(size, G):
    return f"{size} {E}x{K} G{G}"


def plan(seeds):
    runs = []
    for seed in seeds:
        for size in SIZES:
            for G in GRAINS:
                runs += climb("mixture", name(size, G), BUDGETS, seed)
        for G in GRAINS:
            shape = name(SIZES[0], G)
            runs += climb("longer", shape, [LONG], seed, rate=f"mixture {shape} muon", part=0.6)
    return runs + [run for seed in seeds for G in AGAIN
                   for run in climb("mixture", name(MIDDLE, G), BUDGETS[-1:], seed, "adamw")]  # fmt: skip


def less_than_one(rows, size, budget, G, x, optimizer="muon"):
    """[L of G less that of G = 1] a seed, at the FLOPs or seconds x that G = 1 takes for a budget."""
    one = dict(shape=name(size, 1), budget=budget, optimizer=optimizer)
    return [-d for d in less(rows, one, dict(shape=name(size, G), optimizer=optimizer), x)]


def best_grain(rows, size, budget, x):
    """A function of a fit: the G with the lowest L for what a budget at G = 1 costs, in FLOPs as the paper counts them
    or in measured seconds."""
    import numpy as np

    import laws

    first = {G: select(rows, shape=name(size, G), budget=budget)[:1] for G in GRAINS}
    width, layers = map(int, size.split("x"))
    routing = lambda G: layers * width * E * G  # weights of the routers
    one = first[1][0]
    if x == "seconds":
        price = {G: row[0]["seconds"] / row[0]["D"] for G, row in first.items()}
    else:
        beyond = 2 * GRAINS[-1], 4 * GRAINS[-1]
        price = {G: 6 * (one["N_active"] - routing(1)) + 14 * routing(G) for G in (*GRAINS, *beyond)}
    form, G = laws.row("fine-grained").form, np.array([*price])
    at = dict(N_total=one["N_total"], D=one["D"] * price[1] / np.array([*price.values()]), G=G)
    return lambda report: float(G[laws.evaluate(form, report["coefficients"], **at).argmin()])


def show_longer(rows, report):
    """The longest runs of the smallest size, and what the law says of them."""
    import laws

    one, table = dict(arm="longer", shape=name(SIZES[0], 1)), []
    for G in GRAINS:
        if found := select(rows, arm="longer", shape=name(SIZES[0], G)):
            at = {name: found[0][name] for name in ("N_total", "D", "G")}
            says = laws.evaluate(laws.row("fine-grained").form, report["coefficients"], **at)
            apart = less(rows, dict(arm="longer", shape=name(SIZES[0], G)), one, "D")
            table.append([G, cell([row["L"] for row in found], ""), verdict(apart) if G > 1 else "", f"{says:.3f}"])
    if table:
        markdown([f"G of {SIZES[0]}, {LONG / M:g} M tokens", "L", "less G 1", "by the law"], table)


def show(home):
    rows = load(home)
    muon = select(rows, optimizer="muon", arm="mixture")
    timed = muon[0]["seconds"] == muon[0]["seconds"]
    for x, what in (("flops_total", "FLOPs"), ("seconds", "seconds"))[: 1 + timed]:
        table = []
        for size in SIZES:
            for budget in BUDGETS[1:]:  # the smallest one of G 1 is below what others cost
                cells = [cell(less_than_one(muon, size, budget, G, x)) for G in GRAINS[1:]]
                mine = [row["L"] for row in select(muon, shape=name(size, 1), budget=budget)]
                table.append([size, f"{budget / M:g} M", cell(mine, ""), *cells])
        heads = [f"at equal {what}, {len(seeds(muon))} seeds", "tokens of G 1", "L of G 1"]
        markdown([*heads, *(f"G {G} less G 1" for G in GRAINS[1:])], table)

    report = fit_law(muon, "fine-grained")
    say_fit("fine-grained", report)
    print(f"gamma = {span_of(report, lambda r: r['coefficients']['gamma'])}; the paper: 0.58")
    table = []
    for size in SIZES:
        for budget in (BUDGETS[0], BUDGETS[-1]):
            best = [best_grain(muon, size, budget, x) for x in ("flops_total", "seconds")[: 1 + timed]]
            table.append([size, f"{budget / M:g} M", *(span_of(report, function) for function in best)])
    markdown(["size", "for what G 1 costs with", "best G in FLOPs, by the law", "in seconds"][: 3 + timed], table)
    show_longer(rows, report)
    for optimizer in ("muon", "adamw"):
        d = less_than_one(rows, MIDDLE, BUDGETS[-1], AGAIN[-1], "D", optimizer)
        print(f"G {AGAIN[-1]} less G 1, {MIDDLE}, {BUDGETS[-1] / M:g} M tokens, {optimizer}: {verdict(d)}")
    plot(home, muon)


def panel(axes, rows):
    """What G > 1 brings the largest size, at equal FLOPs and at equal seconds."""
    for i, budget in enumerate(BUDGETS[1:]):
        for x, style in (("FLOPs", "-"), ("seconds", "--")):
            curve = [(1, 0, 0, 0)]
            for G in GRAINS[1:]:
                d = less_than_one(rows, SIZES[-1], budget, G, "flops_total" if x == "FLOPs" else x)
                curve += [(G, sum(d) / len(d), min(d), max(d))] if all(v == v for v in d) else []
            draw(axes, i, curve, f"equal {x}, {budget / M:g} M tokens at G = 1", style)
    axes.set(xlabel=f"granularity G ({SIZES[-1]})", ylabel="L less that of G = 1")
    axes.set_xscale("log", base=2)
    axes.set_xticks(GRAINS, GRAINS)
    axes.legend(frameon=False, fontsize=8)


def plot(home, rows):
    figure, axes = panels(3)
    for i, G in enumerate(GRAINS):
        draw(axes[0], i, band(rows, "flops_total", shape=name(SIZES[-1], G)), f"G = {G}")
        draw(axes[1], i, band(rows, "seconds", shape=name(SIZES[-1], G)), f"G = {G}")
    axes[0].set(xscale="log", xlabel="training FLOPs", ylabel="validation loss, nats a byte", title=f"{SIZES[-1]}, 8x2")
    axes[1].set(xscale="log", xlabel="seconds on one thread")
    axes[0].legend(frameon=False, fontsize=8)
    panel(axes[2], rows)
    save(figure, home, *axes[:2])


if __name__ == "__main__":
    experiment("granularity", __doc__, plan, show)
