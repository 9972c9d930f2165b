"""
The figures of laws.py fit, runs.py compare and plan.py budget. Colours are those of Okabe and Ito, told apart by
colour-blind readers, and every line has its own dash or marker, so that print in grey loses nothing.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
MARKERS = "osD^vP*"
plt.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLOURS)


def plain(name):
    """A name as matplotlib shall print it: what stands between two $ is no formula, and what is no Unicode is "?"."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def save(figure, path, caption):
    """Write the figure with the caption, what was run, below it."""
    figure.text(0.01, 0.01, plain(caption), fontsize=7, va="bottom", ha="left", wrap=True)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plain_ticks(axis):
    """Few ticks with plain numbers, on an axis that is logarithmic but spans less than a decade."""
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(7))
    axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def count_ticks(axis):
    """Counts as 500 k and 2 M."""
    axis.set_major_formatter(matplotlib.ticker.EngFormatter())


def log_ticks(axis):
    """Decades, or 1, 2 and 5 in each if there are few, so that labels stay apart. After the plotting."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    if high < 30 * low:
        steps = (1, 2, 5) if high > 5 * low else (1, 2, 3, 4, 6, 8)
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
        numbers = matplotlib.ticker.LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(9, 9))
        axis.set_major_formatter(numbers if high > 1e4 else matplotlib.ticker.ScalarFormatter())


def plot_fit(path, report, table, target, law):
    """Three panels: curves against points, residuals, and the bootstrap's spread of every coefficient.

    report: what laws.fit returned; table: {column: array (n)} it was fitted to; target: the column that was fitted;
    law: {column: array} to the fitted law's values.
    """
    names = list(report["fitted"])
    x = next(name for name in reversed(names) if name not in ("G", "E"))
    size = names[0]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.4))
    # up to five groups of runs by their size; each has a curve at its median, over its own stretch of x
    sizes = np.unique(table[size])
    groups = [np.flatnonzero(np.isin(table[size], part)) for part in np.array_split(sizes, min(5, len(sizes)))]
    predicted = law(table)
    for group, color, marker, style in zip(groups, COLOURS, MARKERS, STYLES):
        at = {name: np.full(60, np.median(table[name][group])) for name in names}
        at[x] = np.geomspace(table[x][group].min(), table[x][group].max(), 60)
        label = " to ".join(dict.fromkeys(f"{end(table[size][group]):.2g}" for end in (np.min, np.max)))
        left.scatter(table[x][group], table[target][group], s=12, color=color, marker=marker, alpha=0.6)
        left.plot(at[x], law(at), color=color, ls=style, label=f"{size} {label}")
        miss = 100 * (table[target][group] / predicted[group] - 1)
        middle.scatter(predicted[group], miss, s=12, color=color, marker=marker, alpha=0.7)
    medians = ", ".join(name for name in names if name != x)
    left.set(xscale="log", yscale="log", xlabel=f"{x} ({'FLOPs' if x == 'C' else 'tokens'})",
             ylabel="L (nats a token)" if target == "L" else target, title=f"curves at each group's median {medians}")
    plain_ticks(left.yaxis)
    log_ticks(left.xaxis)
    left.legend(fontsize=7)
    middle.axhline(0, color="black", lw=0.8)
    middle.set(xscale="log", xlabel=f"predicted {target}", ylabel="measured above predicted (%)", title="residuals")
    plain_ticks(middle.xaxis)
    if report["refits"]:
        spread(right, report)
    else:
        right.text(0.5, 0.5, "no bootstrap\n(--bootstrap 1000)", ha="center", va="center", transform=right.transAxes)
        right.set_axis_off()
    values = ", ".join(f"{name} {value:.4g}" for name, value in report["coefficients"].items())
    save(figure, path, f"laws.py fit {report['law']} ({report['set']}), {report['runs']} runs: {values}; objective "
         f"{report['objective']:.8f}")


def spread(axes, report):
    """Every coefficient's refits and interval, divided by its best value."""
    intervals, refits = report["intervals"], np.array(report["refits"])
    best = np.array([report["coefficients"][name] or high for name, (_, high) in intervals.items()])  # high: E = 0
    ends = np.array(list(intervals.values())) / best[:, None]
    frame = max(0.01, ends.min() / 1.1), min(100, ends.max() * 1.1)  # what lies beyond is drawn at its edge
    for i, values in enumerate((refits / best).T):
        jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
        axes.scatter(np.clip(values, *frame), i + jitter, s=3, alpha=0.25, color=COLOURS[0], lw=0)
        axes.plot(np.clip(ends[i], *frame), [i, i], color=COLOURS[1], lw=2)
    axes.set_yticks(range(len(best)), [name + " (?)" * (name in report["undetermined"]) for name in intervals])
    axes.axvline(1, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="refit / best fit", title=f"{len(refits)} resamples (?: not determined)")
    (log_ticks if frame[1] > 20 * frame[0] else plain_ticks)(axes.xaxis)


def plot_compare(path, runs, pairs):
    """Loss against FLOPs with ancestors: seeds as a band, the frontier (lowest loss so far of all runs) in grey."""
    figure, axes = plt.subplots(figsize=(7.5, 5))
    curves = [np.array([p for p in run["curve"] if p[0] > 0]).T for run in runs]  # FLOPs, L
    ends = [end for flops, _ in curves for end in (flops[0], flops[-1])]
    grid = np.geomspace(min(ends), max(ends), 500)
    losses = [np.interp(np.log(grid), np.log(flops), L, left=np.inf) for flops, L in curves]
    axes.plot(grid, np.minimum.accumulate(np.min(losses, 0)), color="0.75", lw=6, label="frontier", zorder=0)
    for i, (run, (flops, L)) in enumerate(zip(runs, curves)):
        seeds, look = run.get("curves", []), {"color": COLOURS[i % 7]}
        label = plain(run["run"]) + (f" (mean of {len(seeds)} seeds)" if len(seeds) > 1 else "")
        axes.plot(flops, L, ls=STYLES[i % 7], marker=MARKERS[i % 7], ms=4, label=label, **look)
        if len(seeds) > 1:
            every = np.array([[p[1] for p in curve if p[0] > 0][: len(flops)] for curve in seeds])
            axes.fill_between(flops, every.min(0), every.max(0), alpha=0.2, lw=0, **look)
    for pair in pairs:
        target, ends = pair["target_loss"], (pair["flops_run"], pair["flops_baseline"])
        axes.axhline(target, color="black", lw=0.6, ls=":")
        axes.annotate("", (ends[0], target), (ends[1], target), arrowprops={"arrowstyle": "->", "color": "black"})
        axes.annotate(f"{100 * pair['speedup']:+.0f} %", (np.sqrt(ends[0] * ends[1]), target), (0, -12),
                      textcoords="offset points", ha="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs, ancestors included",
             ylabel=f"L on {plain(runs[0]['corpus'])} (nats a token)")
    plain_ticks(axes.yaxis)
    log_ticks(axes.xaxis)
    axes.legend(fontsize=8, handlelength=3.5)
    names = " ".join(run["run"] for run in runs)
    save(figure, path, f"runs.py compare {names}; arrow: FLOPs to the same loss, + saved, - lost")


def plot_budget(path, answer, args):
    """Each way's loss against the budget, the budget asked about, and dots where two ways swap places. If that changes
    the best way, the FLOPs stand below the dot: no curve lies there."""
    figure, axes = plt.subplots(figsize=(7.5, 5))
    budgets = np.array(answer["curves"]["flops"])
    swaps = [(pair.split(" = "), x["flops"]) for pair, found in answer["swaps"].items() for x in found]
    marks = [flops for _, flops in swaps] + [args.flops]
    near = (budgets > min(marks) / 10) & (budgets < max(marks) * 10)
    for i, way in enumerate(w for w in answer["curves"] if w != "flops"):
        loss, label = np.array(answer["curves"][way]), f"{way}: {answer['ways'][way]:.3f}"
        axes.plot(budgets[near], loss[near], color=COLOURS[i], ls=STYLES[i], lw=2, label=label)
        if answer["intervals"].get(way):
            axes.plot([args.flops] * 2, answer["intervals"][way], color=COLOURS[i], lw=4, alpha=0.4)
    for pair, flops in swaps:
        at = {way: np.interp(flops, budgets, curve) for way, curve in answer["curves"].items() if way != "flops"}
        axes.plot(flops, at[pair[0]], "o", color="black", ms=5)
        if min(at, key=at.get) in pair:
            axes.annotate(f"{flops:.2g}", (flops, at[pair[0]]), (-4, -14), textcoords="offset points", ha="right")
    axes.axvline(args.flops, color="black", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="further training FLOPs", ylabel="predicted L (nats a token)",
             title=f"{args.have_n:.3g} parameters, {args.have_d:.3g} tokens so far; dots: two ways swap places")
    plain_ticks(axes.yaxis)
    axes.legend(title=f"L at {args.flops:.3g} FLOPs", loc="upper right")
    source = " ".join(args.fit) if args.fit else "published rows of arXiv 2502.03009, Table 2"
    asked = f"--have-n {args.have_n:g} --have-d {args.have_d:g} --flops {args.flops:g}"
    save(figure, path, f"plan.py budget {asked}; {source}")
