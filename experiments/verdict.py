"""What the papers' scripts say and draw from their tables: paired differences, fits, one figure.

Differences are paired by seed: same text, same first weights. "At equal FLOPs" (or seconds) reads the other arm's loss
off between two budgets of its own, linearly in the logarithm; nan and "outside" beyond them.
"""

import math
import statistics
import sys
from contextlib import suppress

from ladder import ROOT, STEP, at, read_rows

sys.path.insert(0, str(ROOT))
TIMES = 1000  # resamples of a fit


def interval(values):
    """(mean, low, high): 95 % by Student's t; nan, if there is one value or one is missing."""
    from scipy.special import stdtrit

    mean, n = statistics.fmean(values), len(values)
    missing = n == 1 or math.isnan(mean)
    half = math.nan if missing else stdtrit(n - 1, 0.975) * statistics.stdev(values) / n**0.5
    return mean, mean - half, mean + half


def verdict(values, unit=""):
    """Paired differences in words: "-0.031 (-0.050 to -0.012)", and whether 0 lies inside."""
    mean, low, high = interval(values)
    if math.isnan(mean):
        return "outside"
    if math.isnan(low):
        return f"{mean:+.3g}{unit} (one seed)"
    return f"{mean:+.3g}{unit} ({low:+.3g} to {high:+.3g}{'; 0 lies inside' if low <= 0 <= high else ''})"


def load(home):
    """The rows of runs.csv with numbers as numbers, and "seconds" that a run and its ancestors take, if measured."""
    speeds = {r["shape"]: float(r["seconds_a_step"]) / STEP for r in read_rows(home / "seconds.csv")}
    rows = []
    for text in read_rows(home / "runs.csv"):
        row = dict(text)
        for name, value in text.items():
            with suppress(ValueError):
                row[name] = float(value) if name not in ("shape", "arm") else value
        parts = [part.rsplit(":", 1) for part in row["spent"].split("+")]
        row["seconds"] = sum(speeds.get(shape, math.nan) * int(tokens) for shape, tokens in parts)
        rows.append(row)
    return sorted(rows, key=lambda r: (r["seed"], r["D"]))


def select(rows, **which):
    """The rows that have these values; a list of values for any of them."""
    fits = lambda value, want: value in want if isinstance(want, (list, tuple, set)) else value == want
    return [row for row in rows if all(fits(row[name], want) for name, want in which.items())]


def seeds(rows):
    return sorted({row["seed"] for row in rows})


def points(rows, x, **which):
    """[(tokens, L, x)] of an arm, for `at` and `reach`. x: a column."""
    return sorted(((r["D"], r["L"], r[x]) for r in select(rows, **which)), key=lambda p: p[2])


def less(rows, mine, theirs, x):
    """[L of the run `mine` less that of the arm `theirs` at equal x], for each seed that has both. x: D, D2, budget,
    flops_total or seconds; mine and theirs: {column: value}."""
    found = []
    for seed in seeds(rows):
        ours, base = select(rows, seed=seed, **mine), points(rows, x, seed=seed, **theirs)
        if ours and base:
            same = base[0][1] if len(base) == 1 and abs(base[0][2] / ours[0][x] - 1) < 1e-3 else at(base, ours[0][x])
            found.append(ours[0]["L"] - same)
    return found or [math.nan]


def markdown(heads, rows):
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def fit_law(rows, law, set=None, fixed=None):
    """laws.fit to rows, with a bootstrap of whole families. ValueError if they are too few."""
    import numpy as np

    import laws

    trunks = [r["trunk"] for r in rows]
    table = {name: np.array([r[name] for r in rows], float) for name in [*laws.columns(laws.row(law, set).form), "L"]}
    with np.errstate(all="ignore"):
        return laws.fit(law, table, set, fixed, TIMES if len({*trunks}) > 2 else 0, trunks)


def say_fit(what, report):
    """A fit in a few lines: coefficients with intervals, error on the largest runs, what the simpler law loses."""
    span = lambda name: "{:.3g} to {:.3g}".format(*report["intervals"][name]) if name in report["intervals"] else "held"
    values = ", ".join(f"{name} {value:.4g} ({span(name)})" for name, value in report["coefficients"].items())
    print(f"\n{what}, {report['runs']} runs: {values}")
    if report["held_out"]:
        print(f"{100 * report['held_out']['error']:.2f} % error on the {report['held_out']['runs']} largest runs")
    if report["undetermined"]:
        print(f"not determined: {', '.join(report['undetermined'])}")
    if report["simpler"]:
        without, needed = ", ".join(report["simpler"]["without"]), report["simpler"]["needed"]
        print(f"without {without}: {'more than noise allows' if needed else 'noise explains it away'}")


def span_of(report, function):
    """function(report) in words, as "value (low to high)", from the fit's refits."""
    import laws

    low_high = laws.band(report, function) if report["refits"] else None
    return f"{function(report):.4g}" + (" ({:.3g} to {:.3g})".format(*low_high) if low_high else "")


def panels(n, **more):
    """A figure of n panels side by side."""
    from plots import plt

    figure, axes = plt.subplots(1, n, figsize=(4.4 * n, 3.8), layout="constrained", squeeze=False, **more)
    return figure, axes[0]


def save(figure, home, *logarithmic):
    """Writes the figure. Labels along the x axes of the `logarithmic` panels stand apart."""
    from plots import log_ticks

    for panel in logarithmic:
        log_ticks(panel.xaxis)
    figure.savefig(home / "figure.png", dpi=150)


def draw(axes, i, curve, label, style="-"):
    """One line of (x, mean, lowest, highest) points in the i-th colour, with a band over the seeds. Points without an
    x or a mean (what was not measured) are left out."""
    from plots import COLOURS, MARKERS

    if curve := [point for point in curve if not any(map(math.isnan, point[:2]))]:
        x, mean, low, high = zip(*sorted(curve))
        marker = MARKERS[(i + 3 * (i // 7)) % 7]  # the second seven lines have other ones
        axes.plot(x, mean, color=COLOURS[i % 7], marker=marker, ms=4, lw=1.2, ls=style, label=label)
        axes.fill_between(x, low, high, color=COLOURS[i % 7], alpha=0.2, lw=0)
        if len(x) == 1:  # which has no band
            axes.vlines(x, low, high, color=COLOURS[i % 7], lw=0.8)


def band(rows, x, y="L", by="budget", **which):
    """[(mean x, mean y, lowest, highest)] over the seeds, for each value of `by`."""
    groups = {}
    for row in select(rows, **which):
        groups.setdefault(row[by], []).append((row[x], row[y]))
    return [(statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g), min(y for _, y in g),
             max(y for _, y in g)) for g in groups.values()]  # fmt: skip
