"""
Scaling laws: what loss a training run will reach, before anybody has paid for it.

    python laws.py fit LAW runs.csv [--bootstrap 1000] [--plot fit.png] [--json]
    python laws.py predict LAW --N 1e9 --D 1e10 ... [--fit fit.json] [--json]

Train models of several sizes N on several amounts D of tokens. Their losses lie on a smooth surface. Chinchilla's is

    L(N, D) = E + A N^-alpha + B D^-beta

E is a floor that no model passes, the rest is a price for too few parameters and a price for too few tokens. Small runs
give the five coefficients, and the law then says what a large run will reach. This file holds the laws of six papers
with their published coefficients and known flaws. fitting.py fits them to your own runs, plan.py spends a budget by
them.

  chinchilla    Hoffmann et al. 2022 (arXiv 2203.15556), Besiroglu et al. 2024 (2404.10102)
  fine-grained  Ludziejewski et al. 2024 (2402.07871): E experts (expansion rate), each cut into G parts (granularity)
  upcycling     Liew et al. 2025 (2502.03009), Table 2, Eq. 12: D1 tokens as a dense model, D2 more as a mixture
  continual     Zheng et al. 2024 (2407.02118), Eq. 4, 8, 9: continual pretraining
  stacking      Du et al. 2024 (2405.15319), Eq. 2: when to grow. Its law of the loss has no printed numbers
  joint         Ludziejewski et al. 2025 (2502.05172): mixtures with any number of experts

By hand: E = 1, A = B = 100, alpha = beta = 0.5, N = D = 10^4. Each price is 100 / sqrt(10^4) = 1, so L = 1 + 1 + 1 = 3.
Four times the parameters halve their price: L = 2.5. No N brings L below 2, because D still costs 1.

Here E, A, alpha ... are the letters of each paper: E is a floor in one and a number of experts in another. The
docstring of each law says what it counts as N.

Left out: laws of learning rate and batch size, of repeated data, and laws whose papers print no numbers.

Try:
1. `python laws.py predict chinchilla --N 70e9 --D 1.4e12`, then with `--set hoffmann`. How much do two fits to the same
   runs differ on Chinchilla itself? (1.973 and 1.921: the optimiser of the published fit had stopped early.)
2. `python laws.py predict joint --N 1e9 --D 2e10 --E 1`, then with 2, 4 ... 32 experts. What does each doubling bring?
   (2.578, 2.559, 2.535, 2.509, 2.481, 2.455: 0.02 to 0.03 each, for memory alone: N is what one token uses.)
3. How many tokens does a dense model of 1e9 parameters need to reach the 2.455 of 32 experts? Try values of D with
   `--E 1`. (8.1e10, four times as many.)
"""

import inspect
import json
import math
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while SciPy loads: no traceback

import numpy as np
from numpy import log

import fitting
from descent import HUBER, columns, evaluate
from tables import DAMAGE, Commands, chosen, column, named, number, read_csv, show, whole

SIZES = 1.0, 1e40  # where plan.py looks for the best N
GROW = 4  # the stacking paper's growth factor

# ----------------------------------------------------------------------------------------------------------------------
# The laws. Arguments are the columns of the run table; the docstring says which N is meant. A law is a sum of terms
# (prefactor, {exponent: factor}). Each term is prefactor * exp(sum of exponent * factor).


def chinchilla(N, D):
    """L = E + A N^-alpha + B D^-beta. N: parameters (Hoffmann counts embeddings, the effect is small), D: tokens."""
    return [("E", {}), ("A", {"alpha": -log(N)}), ("B", {"beta": -log(D)})]


def fine_grained(N_total, D, G):
    """L = c + (g G^-gamma + a) N_total^-alpha + b D^-beta. N_total: all but embeddings and routers; G: granularity."""
    return [("c", {}), ("g", {"gamma": -log(G), "alpha": -log(N_total)}),
            ("a", {"alpha": -log(N_total)}), ("b", {"beta": -log(D)})]


def fine_grained_dense(N, D):
    """L = c + a N^-alpha + b D^-beta, the dense side of the comparison. c is taken over from the MoE fit."""
    return [("c", {}), ("a", {"alpha": -log(N)}), ("b", {"beta": -log(D)})]


def upcycling(N, D1, D2):
    """L = A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E. N: the dense model's size (N1 of the paper)."""
    return [("E", {}), ("A", {"alpha1": -log(D1), "alpha2": -log(D2), "alpha3": log(D1) * log(D2)}),
            ("B", {"beta": -log(N)})]


def from_scratch(N, D):
    """L = A D^-alpha + B N^-beta + E: the upcycling paper's dense and MoE rows (its letters are swapped)."""
    return [("E", {}), ("A", {"alpha": -log(D)}), ("B", {"beta": -log(N)})]


def continual(N, D):
    """L = E + A N^-alpha + B D^-beta N^-gamma: what is carried over grows with N. D: tokens of the new language alone
    (`runs.py table` counts the ancestors' too: subtract them)."""
    return [("E", {}), ("A", {"alpha": -log(N)}), ("B", {"beta": -log(D), "gamma": -log(N)})]


def stacking(N, C):
    """log10 d (or g) = a log10 N + b / log10 C + c. d: tokens of the base; N, C: size, FLOPs of the stacked model."""
    return [("", {"a": log(N), "b": log(10) / np.log10(C), "c": log(10) * np.ones_like(log(N))})]  # ln d; no prefactor


# What a budget buys. The arguments become flags of `plan.py optimal`. The answer is a function of what is still free.
# Its defaults say where to look: (low, high) is a range, more values are choices. It gives the law's columns and more.


def active(N, top_k):
    """N_active of an MoE of dense size N. A block has 4 d^2 of attention and 8 d^2 of MLP, the MLP top_k times."""
    return N * (4 + 8 * top_k) / 12


def dense(C):
    """C = 6 N D: any N, and the tokens that remain."""
    return lambda N=SIZES: {"N": N, "N_active": N, "D": C / (6 * N)}


def moe(C, top_k=2):
    """C = 6 N_active D."""
    return lambda N=SIZES: {"N": N, "N_active": active(N, top_k), "D": C / (6 * active(N, top_k))}


def upcycled(C, top_k=2):
    """C = 6 N D1 + 6 N_active D2. odds: FLOPs after upcycling for each one before."""

    def at(N=SIZES, odds=(1e-5, 1e5)):
        D1, D2 = C / (1 + odds) / (6 * N), C / (1 + 1 / odds) / (6 * active(N, top_k))
        return {"N": N, "N_active": active(N, top_k), "D1": D1, "D2": D2, "D": D1 + D2}

    return at


def grained(C, experts):
    """C = (72 d^2 + 14 d E G) n D: n blocks (not rounded) of width d = 64 n, as in the paper; 14 d E G: router."""

    def at(n=(1.0, 2980.0), G=(1, 2, 4, 8, 16, 32, 64, 128)):  # 2980 blocks: far beyond any model
        d = 64 * n
        N, D = 12 * d**2 * n, C / ((72 * d**2 + 14 * d * experts * G) * n)
        return {"N": N, "N_active": N, "N_total": d**2 * (8 * experts + 4) * n, "D": D, "G": G}

    return at


class Row(NamedTuple):
    """One row of a paper's table of coefficients, or only a form to be fitted (coefficients None)."""

    form: object
    coefficients: dict | None = None
    fitted: dict = {}  # column: (lowest, highest) value among the paper's runs
    source: str = ""
    wrong: str = ""  # what is known to be wrong with it, shown wherever it is used
    frozen: tuple = ()  # coefficients that the paper takes over from a fit of other runs first (--first-stage)
    simpler: dict = {}  # values that turn the law into the simpler form it is compared with
    target: str = "L"  # what it predicts
    buys: object = dense  # what a budget buys, for `plan.py optimal`; None: the law has no optimum


_RUNS = {"N": (5.7e7, 1.62e10), "D": (8.2e8, 3.2e11)}  # Chinchilla's
_FINE = {"N_total": (129e6, 3.7e9), "D": (16e9, 130e9), "G": (1, 16)}
_UP = {"N": (15e6, 1e9), "D1": (1e9, 3.68e11), "D2": (1e9, 3.68e11)}
_FROM = {"N": (15e6, 1e9), "D": (1e9, 3.68e11)}
_NEW = {"N": (49e6, 5.5e9), "D": (1e9, 1.1e11)}
_ROUNDED = "its coefficients are printed rounded: losses come out 0.01 to 0.02 below the paper's own table"
_CPT = "as printed, continual loss lies above the scratch loss, against the paper's figures: trust N and D, not L"
_LN = "the base of the paper's logarithm is not in our sources; only ln gives the crossings that it describes"

LAWS = {  # law: {set: Row}; a law's first set is its default
    "chinchilla": {
        "besiroglu": Row(chinchilla, dict(E=1.81686, A=482.00572, B=2085.4342, alpha=0.34781, beta=0.36585), _RUNS,
                         "2404.10102, the final refit of Hoffmann's runs"),
        "hoffmann": Row(chinchilla, dict(E=math.exp(0.5267228), A=math.exp(6.0073404), B=math.exp(6.0179186),
                                         alpha=0.33917084, beta=0.2849083), _RUNS, "2203.15556, unrounded",
                        "the optimiser stopped early: at Chinchilla's budget it asks for 59 tokens a parameter"),
        "hoffmann-rounded": Row(chinchilla, dict(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28), _RUNS,
                                "2203.15556, as printed", "stopped early, and rounding alone moves L by 0.02 to 0.05"),
    },
    "fine-grained": {
        "E64": Row(fine_grained, dict(c=0.47, g=2.1, a=18.1, b=30.8, gamma=0.58, alpha=0.115, beta=0.147), _FINE,
                   "2402.07871, Table 1: MoE with expansion rate 64", _ROUNDED, simpler={"g": 0, "gamma": 0},
                   buys=lambda C, experts=64: grained(C, experts)),
        "E16": Row(fine_grained, dict(c=0.472, g=1.18, a=19.64, b=57.07, gamma=0.986, alpha=0.124, beta=0.169), _FINE,
                   "2402.07871, Table 8: expansion rate 16", _ROUNDED,
                   buys=lambda C, experts=16: grained(C, experts)),
        "dense": Row(fine_grained_dense, dict(c=0.47, a=16.3, b=26.7, alpha=0.126, beta=0.127),
                     {"N": (3e6, 85e6), "D": (16e9, 66e9)}, "2402.07871, Table 1: dense", _ROUNDED, frozen=("c",)),
    },
    "upcycling": {
        "upcycled": Row(upcycling, dict(E=0.165, A=16.3, B=8.53, alpha1=0.043, alpha2=0.085, alpha3=7.98e-4,
                                        beta=0.112), _UP, "2502.03009, Table 2: 8 experts, top-2", _LN,
                        frozen=("E",), simpler={"alpha3": 0}, buys=upcycled),
        "dense": Row(from_scratch, dict(E=0.165, A=8.83, B=12.3, alpha=0.088, beta=0.116), _FROM,
                     "2502.03009, Table 2: dense"),
        "moe": Row(from_scratch, dict(E=0.165, A=32.0, B=7.05, alpha=0.161, beta=0.080), _FROM,
                   "2502.03009, Table 2: MoE from scratch, N the dense size", frozen=("E",), buys=moe),
        "stacked": Row(upcycling, source="2510.06548: the same form fits growth; no coefficients printed",
                       frozen=("E",), simpler={"alpha3": 0}),
    },
    "continual": {
        "continual": Row(continual, dict(E=1.55, A=420.0, B=433.3, alpha=0.40, beta=0.20, gamma=0.08), _NEW,
                         "2407.02118, Table 2a: continual", _CPT, ("E", "A", "alpha"), {"gamma": 0}),
        "scratch": Row(chinchilla, dict(E=1.55, A=420.0, B=719.5, alpha=0.40, beta=0.30), _NEW,
                       "2407.02118, Table 2a: from scratch", _CPT),
    },
    "stacking": {
        "tokens": Row(stacking, dict(a=0.88, b=163.27, c=-5.74), {"N": (4.1e8, 3e9)}, "2405.15319, Eq. 2",
                      "fitted on 410M to 3B parameters: for small models d comes out beyond D", target="d",
                      buys=lambda N, D: lambda: {"N": N, "D": D, "g": GROW, "C": 6 * N * D}),  # nothing is free
        "factor": Row(stacking, dict(a=1.01, b=-29.88, c=-7.36), {"N": (4.1e8, 3e9)}, "2405.15319, Eq. 50",
                      "preliminary by its authors' word: 17 to 221 from 7B on. They use g = 4", target="g", buys=None),
    },
}

# A law of your own takes a form and a Row. This one also says what a budget buys. predict, fit and optimal find it.


def joint(N_active, D, E):
    """L = c + a X^delta N_active^(alpha + gamma ln X) + b X^omega D^(beta + zeta ln X). E: experts, one a token.
    N_active: with embeddings (add them to `runs.py table`'s)."""
    low, high = 2.0732, 290.4521  # X at E = 1, and at infinity
    X = 1 / (1 / (E - 1 + 1 / (1 / low - 1 / high)) + 1 / high)
    x, n, d = log(X), log(N_active), log(D)
    return [("c", {}), ("a", {"delta": x, "alpha": n, "gamma": x * n}), ("b", {"omega": x, "beta": d, "zeta": x * d})]


LAWS["joint"] = {"joint": Row(joint, dict(
    c=1.3637, a=35.91, b=35.98, alpha=-0.1889, beta=-0.1775, gamma=0.0098, delta=-0.2285, omega=0.5529, zeta=-0.0259),
    {"E": (1, 32)}, "2502.05172: MoE of E experts, top-1",
    buys=lambda C, E: lambda N=SIZES: {"N_active": N, "E": E, "D": C / (6 * N)})}


def row(law, set=None):
    """The Row of `law` (its default set if None). ValueError names what exists."""
    if law not in LAWS:
        raise ValueError(f"no law called {law!r} (known: {', '.join(LAWS)})")
    set = next(iter(LAWS[law])) if set is None else set
    if set not in LAWS[law]:
        raise ValueError(f"law {law} has no set {set!r} (known: {', '.join(LAWS[law])})")
    return LAWS[law][set]


# A model, below and in plan.py: {"law", "set", "coefficients", "fitted", ...} of a published row, or a fit()'s report.


def published(law, set=None):
    """The model of a published row. ValueError if its paper prints no coefficients."""
    the, set = row(law, set), set or next(iter(LAWS[law]))
    if the.coefficients is None:
        raise ValueError(f"set {set} of {law} has no published coefficients (give a fit of your own with --fit)")
    return {"law": law, "set": set, "coefficients": the.coefficients, "fitted": the.fitted, "wrong": the.wrong}


def predict(model, **at):
    """L (nats a token), or d or g of `stacking`, at numbers `at` named as the law's columns. ValueError if infinite."""
    value = float(evaluate(row(model["law"], model["set"]).form, model["coefficients"], **at))
    if not math.isfinite(value):
        raise ValueError(f"{model['law']} {model['set']} gives {value} at {at} (stay closer to the fitted runs)")
    return value


def band(model, function):
    """95 % interval [low, high] of function(model), a number or a list, over the model's refits. These list values
    in the order of `intervals`. None without refits (published laws), or if more than a tenth of them fail."""
    values, refits = [], model.get("refits", [])
    for refit in refits:
        coefficients = {**model["coefficients"], **dict(zip(model["intervals"], refit))}
        try:
            values.append(function({**model, "coefficients": coefficients}))
        except ValueError:  # this refit has no optimum
            pass
    enough = values and len(values) >= 0.9 * len(refits)
    return np.percentile(values, model["percentiles"], axis=0).tolist() if enough else None


def outside(model, **at):
    """{column: factor} by which numbers lie outside the range of the fitted runs; empty if all are inside."""
    ranges = {name: model["fitted"].get(name, (x, x)) for name, x in at.items()}
    return {name: max(low / at[name], at[name] / high) for name, (low, high) in ranges.items()
            if not low <= at[name] <= high}


def fit(law, table, set=None, fixed=None, bootstrap=0, blocks=None, seed=1):
    """Fit a law's form to a run table {column: array (n)}: the report of fitting.fit, and the names of law and set."""
    the = row(law, set)
    report = fitting.fit(the.form, table, the.target, fixed, the.simpler, bootstrap, blocks, seed)
    return {"law": law, "set": set or next(iter(LAWS[law])), **report}


def kind_of(run, read):
    """{column: what must be equal in all runs of one law}, but for the columns that it reads."""
    kind = {name: run.get(name) or "none" for name in ("E", "K", "G", "corpus", "optimizer")}
    for name in ("E", "K", "G"):
        with suppress(ValueError):
            kind[name] = f"{float(kind[name]):g}"  # 8 is 8.0
    kind["D1"] = "given" if run.get("D1") else "none"  # upcycled or grown
    kind["schedule"] = "constant" if run.get("schedule") == "constant" else "not constant"
    if kind["E"] == "1":  # dense: nothing is cut
        del kind["G"]
    return {name: text for name, text in kind.items() if name not in read}


def read_table(path, the, blocks=None, where=()):
    """A run table's columns that a Row needs, {name: array (n)}, and its block labels. ValueError names the row.
    where: conditions on the rows, as tables.chosen() has them."""
    rows, seen = chosen(path, read_csv(path), where), {}
    if "E" in columns(the.form):  # to such a law a dense model is a mixture of one expert; runs.py leaves E, K empty
        dense = [r for r in rows if r.get("E") == "" and r.get("N") and r["N"] == r.get("N_total")]
        for r in dense:
            r |= dict.fromkeys({"E", "K"} & {*r}, "1")
    table = {name: np.array(column(path, rows, name)) for name in [*columns(the.form), the.target]}
    kinds = {}  # column: (what it has, the first row that has it)
    for i, run in enumerate(zip(*table.values(), [r.get("seed") for r in rows])):
        if (first := seen.setdefault(run, i)) < i:
            pair = f"{named(rows, i)} repeats {named(rows, first)}"
            raise ValueError(f"{path}: {pair} in {', '.join(table)} (leave one out)")
        for name, text in kind_of(rows[i], table).items():
            other, at = kinds.setdefault(name, (text, i))
            if text != other:
                pair = f"{named(rows, at)} has {name} {other}, {named(rows, i)} has {name} {text}"
                raise ValueError(f"{path}: {pair} (one law, one kind of run: choose with --where, or in the file)")
    labels = column(path, rows, blocks, least=None) if blocks else None
    if labels and "" in labels:
        raise ValueError(f"{path}: {named(rows, labels.index(''))} has no {blocks} (a block for each run)")
    return table, labels


# ----------------------------------------------------------------------------------------------------------------------
# The command line. plan.py uses some of it, too.

HELP = {"flops": "FLOPs, as the law's paper counts them", "N": "parameters, as the law counts them",
        "D": "tokens trained on", "D1": "tokens before upcycling", "D2": "tokens after it", "G": "granularity",
        "E": "experts", "experts": "expansion rate", "top_k": "experts a token"}


def flags_of(function):
    """{argument of a law, or of what a budget buys: its flag}. A lone N_... becomes --N, C becomes --flops."""
    names = list(inspect.signature(function).parameters)
    sizes = [name for name in names if name == "N" or name.startswith("N_")]
    return {name: "flops" if name == "C" else "N" if [name] == sizes else name for name in names}


def law_flags(sub, functions):
    """LAW, a flag for each argument of `functions`, and where the coefficients come from."""
    sub.add_argument("law", metavar="LAW", help=f"one of {', '.join(LAWS)}")
    add = sub.add_argument_group("the run (a law asks for what it needs, and refuses the rest)").add_argument
    flags = dict.fromkeys(flag for function in functions for flag in flags_of(function).values())
    for name in flags:
        add(f"--{name.replace('_', '-')}", type=number, metavar="X", help=HELP.get(name, "as the law reads it"))
    sub.set_defaults(flags=list(flags))
    add = sub.add_argument_group("coefficients").add_argument
    add("--set", metavar="NAME", help="published set, see laws.py --help (default: the law's first)")
    add("--fit", metavar="FILE", help="JSON of a fit of your own instead (default: none)")


def asked(args, function):
    """{argument: value} of `function` from the flags. ValueError for those it needs and misses, or has no use for."""
    flags, given = flags_of(function), [name for name in args.flags if getattr(args, name) is not None]
    needed = [flags[p] for p, about in inspect.signature(function).parameters.items() if about.default is about.empty]
    missing, unused = {*needed} - {*given}, {*given} - {*flags.values()}
    if missing or unused:
        text = lambda names: " ".join("--" + name.replace("_", "-") for name in names)
        also = [name for name in flags.values() if name not in needed]
        raise ValueError(f"{args.command} {args.law} needs {text(needed)}" + f" and takes {text(also)}" * bool(also)
                         + (f" (leave out {text(sorted(unused))})" if unused else f" (given: {text(given) or 'none'})"))
    return {p: getattr(args, name) for p, name in flags.items() if name in given}


def load_fit(path):
    """A report of fit() from its JSON file, tried out in the middle of its runs. ValueError if it is none."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file (write one with `laws.py fit LAW runs.csv --json`)")
    try:
        report = json.loads(Path(path).read_text("utf-8"), parse_constant=number)
        at = {c: sum(report["fitted"][c]) / 2 for c in columns(row(report["law"], report["set"]).form)}
        # each of these raises if the report is damaged
        predict(report, **at), band(report, lambda m: predict(m, **at)), ", ".join(report["undetermined"])
        return report
    except (OSError, *DAMAGE) as wrong:
        raise ValueError(f"{path} is not a fit: {wrong!r} (write one with `laws.py fit LAW runs.csv --json`)") from None


def chosen_model(args):
    """The model that --set or --fit names."""
    model = load_fit(args.fit) if args.fit else published(args.law, args.set)
    if model["law"] != args.law or args.fit and args.set:
        raise ValueError(f"{args.fit} is a fit of {model['law']} {model['set']}, not of {args.law} {args.set or ''} "
                         "(name its law, and leave --set out)")
    return model


def warn(model, factors, name=""):
    """For people: how far outside the fitted runs the question lies, and what is wrong with the coefficients."""
    for where, factor in factors.items():
        print(f"! {name}{where} lies a factor {factor:.3g} outside the fitted runs")
    if model.get("undetermined"):
        print(f"! {name}the fit's runs do not determine {', '.join(model['undetermined'])}: stay inside their range")
    if model.get("wrong"):
        print(f"! {name}{model['wrong']}")


def run_fit(args):
    the, fixed = row(args.law, args.set), {}
    if args.first_stage:
        first = load_fit(args.first_stage)
        stage = first["coefficients"]
        if not the.frozen or not {*the.frozen} <= stage.keys():
            raise ValueError(f"--first-stage {args.first_stage} has {', '.join(stage)} (the second stage of {args.law} "
                             f"{args.set or ''} freezes {', '.join(the.frozen) or 'nothing'})")
        fixed = {name: stage[name] for name in the.frozen}
        if unsure := [name for name in fixed if name in first["undetermined"]]:
            print(f"! the runs of the first stage do not determine {', '.join(unsure)}", file=sys.stderr)
    if args.blocks and not args.bootstrap:
        raise ValueError(f"--blocks {args.blocks} without --bootstrap (give e.g. --bootstrap 1000)")
    table, blocks = read_table(args.table, the, args.blocks, args.where)
    if 0 < args.bootstrap < 20:
        raise ValueError(f"--bootstrap {args.bootstrap} is too few for a 95 % interval (at least 20, better 1000)")
    report = fit(args.law, table, args.set, fixed, args.bootstrap, blocks, args.seed)
    if args.plot:
        import plots

        law = lambda at: evaluate(the.form, report["coefficients"], **at)
        plots.plot_fit(args.plot, report, table, the.target, law)
    if args.json:
        return report
    why, plain = report["why"], report["simpler"]
    print(f"{args.law} ({report['set']}), {report['runs']} runs: {the.form.__doc__ or ''}\n")
    show([["", "value", "95 % interval", ""]] + [
        [name, value, report["intervals"].get(name, ""),
         "fixed" if name in fixed else "not determined" if name in why else ""]
        for name, value in report["coefficients"].items()])
    print(f"\nobjective {report['objective']:.11f} (sum of Huber, delta {HUBER:g}, on the log loss)")
    without = f"without {', '.join(plain['without'])}" if plain else ""
    for name, held in (("", report["held_out"]), (f"{without}: ", plain.get("held_out"))):
        if held:
            error = f"{100 * held['error']:.2f} % error"
            print(f"{name}{error} on the {held['runs']} largest runs after a fit to the others")
    if plain:
        verdict = "more than noise allows: it is needed" if plain["needed"] else "which noise explains: not needed"
        print(f"{without} the objective is {plain['objective']:.8f}, {verdict}")
    for name, reason in why.items():
        print(f"The runs do not determine {name}: {reason}.")


def run_predict(args):
    model = chosen_model(args)
    the = row(args.law, model["set"])
    at = asked(args, the.form)
    answer = {the.target: predict(model, **at), "outside": outside(model, **at), "wrong": model.get("wrong", ""),
              "interval": band(model, lambda m: predict(m, **at)),
              "undetermined": model.get("undetermined", [])}
    if args.json:
        return answer
    print(f"{the.target} = {answer[the.target]:.6g}")
    if answer["interval"]:
        print("95 % interval {:.4g} to {:.4g}".format(*answer["interval"]))
    warn(model, answer["outside"])


def main(argv=None):
    sets = [f"  {law:13}{set:17}{', '.join(columns(r.form)):16}{r.source}" + f"\n{'':17}! {r.wrong}" * bool(r.wrong)
            for law, rows in LAWS.items() for set, r in rows.items()]
    parser = Commands("laws.py", "laws.py {fit,predict} ... [--help]", __doc__, "laws, sets (a law's first is "
                    "its default), columns read, source, ! known flaws:\n" + "\n".join(sets))
    sub = parser.command(run_fit, "LAW RUNS.CSV [options]", "fit a law to a run table", "curves, residuals, bootstrap")
    sub.add_argument("law", metavar="LAW", help=f"one of {', '.join(LAWS)}")
    sub.add_argument("table", metavar="RUNS.CSV", help="run table with the law's columns and L")
    add = sub.add_argument_group("what is fitted").add_argument
    add("--set", metavar="NAME", help="set whose form is fitted (default: the law's first)")
    add("--where", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE", help="only such rows (default: all)")
    add("--first-stage", metavar="FILE", help="fit JSON to take coefficients from that the paper freezes: "
        "continual E, A, alpha; fine-grained dense c; upcycling E (default: none)")
    add = sub.add_argument_group("intervals").add_argument
    add("--bootstrap", type=whole, default=0, metavar="TIMES", help="resamples (default: none)")
    add("--blocks", metavar="COLUMN", help="resample runs that agree here as one (default: none)")
    add("--seed", type=whole, default=1, help="seed of the resampling (default: 1)")
    sub = parser.command(run_predict, "LAW [options]", "the loss of a run")
    law_flags(sub, [r.form for rows in LAWS.values() for r in rows.values()])
    with np.errstate(all="ignore"):  # what comes out infinite is refused in words
        parser.answer(argv)


if __name__ == "__main__":
    main()
