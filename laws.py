"""
Scaling laws: what loss a training run will reach, before anybody has paid for it.

    python laws.py fit LAW runs.csv [--bootstrap 1000] [--plot fit.png] [--json]
    python laws.py predict LAW --N 1e9 --D 1e10 ... [--fit fit.json] [--json]

Train models of several sizes N on several amounts D of tokens, and the losses lie on a smooth surface. Chinchilla's is

    L(N, D) = E + A N^-alpha + B D^-beta

a floor E that no model passes, a price for too few parameters, a price for too few tokens. Small runs give the five
coefficients; the law then says what a large run will reach. All laws here are such sums. The logarithm of each term is
linear in the coefficients, ln(A N^-alpha) = ln A + alpha (-ln N), so a law is a list of (prefactor, {exponent: factor}):

    [("E", {}), ("A", {"alpha": -log(N)}), ("B", {"beta": -log(D)})]

Prediction, gradient and fit follow from this list alone; plan.py asks what to do with a budget.

By hand: E = 1, A = B = 100, alpha = beta = 0.5, N = D = 10^4. Each price is 100 / sqrt(10^4) = 1, so L = 1 + 1 + 1 = 3.
Four times the parameters halve their price: L = 2.5. No N at all brings L below 2, because D still costs 1. The gradient
is as simple: each term is a third of L, so A + 3 % gives L + 1 %. In general d ln L / d ln A is the term's share of L,
and d ln L / d alpha is this share times the factor -ln N. The fit needs no other derivative.

The fit (Hoffmann et al. 2022, Appendix D.2) minimises f = sum over runs of Huber(ln predicted L - ln L). Its steps:
4,500 starts on a grid, the best go downhill together, the last four are polished. Two questions come after it.
Which coefficients do the runs determine at all? And how far off may they be? The second is answered by refits to
resampled runs (the bootstrap).

Left out: weights for runs, a likelihood for the noise, laws of learning rate, batch size or repeated data.

Try:
1. `python laws.py predict chinchilla --N 70e9 --D 1.4e12`, then with `--set hoffmann`. How much do two fits to the same
   runs differ on Chinchilla itself? (1.973 and 1.921: the published fit had stopped early.)
2. Write a table with the columns N, D and L for N = 1e8, 2e8, 4e8 ... 2.56e10 and D = 20 N, with L as the law predicts.
   Fit chinchilla. What is determined? (E alone, 1.817. As D is 20 N, both prices are powers of N, and the fit cannot
   tell them apart. One more run at D = 5 N would not do either; a second ladder at D = 100 N determines all five.)
3. Write a law without a floor, L = A N^-alpha + B D^-beta: one function and one row, below at "A law of one's own".
   Fit it and chinchilla to the same runs. Which predicts the largest fifth better? (Hoffmann's 240 public runs: 2.1 %
   error against 1.3 %. What cannot flatten out promises too much.)
"""

import argparse
import difflib
import inspect
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while SciPy loads: no traceback

import numpy as np
from numpy import log

import fitting
from fitting import DAMAGE, columns, evaluate, number, read_table

SIZES = 1.0, 1e40  # where plan.py looks for the best N

# ----------------------------------------------------------------------------------------------------------------------
# The laws. Arguments are the columns of the run table; the docstring says which N is meant.


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
    """log10 d = a log10 N + b / log10 C + c: tokens d for the base of a stacked model of N parameters and C FLOPs."""
    return [("", {"a": log(N), "b": log(10) / np.log10(C), "c": log(10) * np.ones_like(log(N))})]  # "": prefactor 1


# What a budget buys. The arguments become flags of `plan.py optimal`. The answer is a function of what remains free: its
# default (low, high) is a range to search, a longer one a list of choices. It gives the law's columns, and what to show.


def active(N, top_k):
    """N_active of an MoE of dense size N, top_k full-width experts a token: the MLP is 8 d^2 of a block's 12 d^2."""
    return N * (1 + 2 * top_k) / 3


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
    """C = (72 d^2 + 14 d E G) n D, routing counted: n blocks (a real number here) of width d = 64 n, as in the paper."""

    def at(n=(1.0, 2980.0), G=(1, 2, 4, 8, 16, 32, 64, 128)):
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
_LN = "the paper does not print the base of its logarithm; only ln gives the crossings that it describes"

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
                      buys=lambda N, D: lambda: {"N": N, "D": D, "g": 4, "C": 6 * N * D}),  # nothing is left to choose
        "factor": Row(stacking, dict(a=1.01, b=-29.88, c=-7.36), {"N": (4.1e8, 3e9)}, "2405.15319, Eq. 50",
                      "preliminary by its authors' word: 17 to 221 from 7B on. They use g = 4", target="g", buys=None),
    },
}

# A law of one's own: its form, its row, what a budget buys. predict, fit and optimal follow. For example:


def joint(N_active, D, E):
    """L = c + a X^delta N_active^(alpha + gamma ln X) + b X^omega D^(beta + zeta ln X). E experts, one a token. N_active
    counts embeddings (add them to `runs.py table`'s). X(E) is E, but flattens out towards 2.07 and 290."""
    X, N, D = -log(1 / (E - 1 + 1 / (1 / 2.0732 - 1 / 290.4521)) + 1 / 290.4521), log(N_active), log(D)  # X: ln X
    return [("c", {}), ("a", {"delta": X, "alpha": N, "gamma": X * N}), ("b", {"omega": X, "beta": D, "zeta": X * D})]


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
    """95 % interval [low, high] of function(model), a number or a list of them, over the model's refits; None without."""
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


# ----------------------------------------------------------------------------------------------------------------------
# The command line. plan.py uses these, too.


def whole(text):
    if number(text) != int(number(text)) or number(text) > 1e9:
        raise argparse.ArgumentTypeError(f"{text} (must be a whole number, 1 to 1e9)")
    return int(number(text))


class Parser(argparse.ArgumentParser):
    """A parser with commands, whose help opens with the lines of its file's docstring that begin with `python`."""

    def __init__(self, prog, usage, doc, epilog=None):
        lines = "\n".join(line.strip() for line in doc.splitlines() if line.startswith("    python"))
        super().__init__(prog, usage, lines, epilog, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        self.places = self.add_subparsers(dest="command", required=True, metavar="command",
                                          parser_class=argparse.ArgumentParser)

    def error(self, message):
        """Answers a mistyped flag with the nearest one."""
        flags = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        known = [name for sub in self.places.choices.values() for name in sub._option_string_actions]
        near = [name for flag in flags for name in difflib.get_close_matches(flag, known, 1)]
        super().error(message + f" (did you mean {', '.join(near)}?)" * bool(near))

    def command(self, run, usage, help, plot=None):
        """A subcommand for a function that begins with `run_`."""
        name = run.__name__.removeprefix("run_")
        sub = self.places.add_parser(name, prog=self.prog, usage=f"{self.prog} {name} {usage}", help=help,
                                     description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        add = sub.add_argument_group("output").add_argument
        add("--json", action="store_true", help="one JSON object, for programs (default: off)")
        if plot:
            add("--plot", metavar="FILE", help=f"draw {plot} to a .png, .pdf or .svg (default: no plot)")
        return sub

    def answer(self, argv):
        """Runs the command: it prints for people, or returns what --json prints. What is wrong leaves with status 2."""
        args = self.parse_args(argv)
        try:
            if getattr(args, "plot", None) is not None:
                where = Path(args.plot)
                if where.suffix not in (".png", ".pdf", ".svg") or where.is_dir() or not where.parent.is_dir():
                    raise ValueError(f"--plot {where} (give a .png, .pdf or .svg in a folder that exists)")
            with np.errstate(all="ignore"):  # what comes out infinite is refused in words
                result = args.run(args)
            if args.json:
                print(json.dumps(result, allow_nan=False))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
            os._exit(0)
        except (ValueError, OSError) as wrong:
            self.error(" ".join(str(wrong)[:1000].split()))


HELP = {"flops": "FLOPs, as the law's paper counts them", "N": "parameters, as the law counts them",
        "D": "tokens trained on", "D1": "tokens before upcycling", "D2": "tokens after it", "G": "granularity",
        "E": "experts", "experts": "expansion rate", "top_k": "experts a token"}


def flag(name):
    """The flag that asks for a column of a law or an argument of what a budget buys."""
    return {"C": "flops"}.get(name, "N" if name.startswith("N_") else name)


def law_flags(sub, functions):
    """LAW, a flag for each argument of `functions`, and where the coefficients come from."""
    sub.add_argument("law", metavar="LAW", help=f"one of {', '.join(LAWS)}")
    add = sub.add_argument_group("the run (a law asks for what it needs, and refuses the rest)").add_argument
    flags = dict.fromkeys(flag(p) for f in functions for p in inspect.signature(f).parameters)
    for name in flags:
        add(f"--{name.replace('_', '-')}", type=number, metavar="X", help=HELP.get(name, "as the law reads it"))
    sub.set_defaults(flags=list(flags))
    add = sub.add_argument_group("coefficients").add_argument
    add("--set", metavar="NAME", help="published set, see laws.py --help (default: the law's first)")
    add("--fit", metavar="FILE", help="JSON of a fit of your own instead (default: none)")


def asked(args, function):
    """{parameter: value} of `function` from the flags. ValueError for those it needs and misses, or has no use for."""
    parameters = {p: d.default is d.empty for p, d in inspect.signature(function).parameters.items()}  # is it needed?
    text = lambda names: " ".join("--" + flag(name).replace("_", "-") for name in names)
    flags = {flag(p): p for p in parameters}
    given = [name for name in args.flags if getattr(args, name) is not None]
    missing = [p for p, needed in parameters.items() if needed and flag(p) not in given]
    if missing or {*given} - {*flags}:
        also = text([p for p, needed in parameters.items() if not needed])
        raise ValueError(f"{args.command} {args.law} needs {text([p for p, needed in parameters.items() if needed])}"
                         + f" and takes {also}" * bool(also) + f" (given: {text(given) or 'none'})")
    return {flags[name]: getattr(args, name) for name in given}


def load_fit(path):
    """A report of fit() from its JSON file, tried out in the middle of its runs. ValueError if it is none."""
    try:
        report = json.loads(Path(path).read_text("utf-8"), parse_constant=number)
        at = {c: sum(report["fitted"][c]) / 2 for c in columns(row(report["law"], report["set"]).form)}
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


def show(rows):
    """Rows of cells, the first the heading, in aligned columns; empty ones are left out. A pair is an interval."""

    def text(cell):
        if isinstance(cell, list):
            return "{:.4g} to {:.4g}".format(*cell)
        return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    shown = [c for c in zip(*[map(text, r) for r in rows]) if any(c[1:])]  # columns
    for cells in zip(*[[cell.ljust(max(map(len, column))) for cell in column] for column in shown]):
        print("  ".join(cells).rstrip())


def warn(model, factors, name=""):
    """For people: how far outside the fitted runs the question lies, and what is wrong with the coefficients."""
    for column, factor in factors.items():
        print(f"! {name}{column} lies a factor {factor:.3g} outside the fitted runs")
    if model.get("undetermined"):
        print(f"! {name}the fit's runs do not determine {', '.join(model['undetermined'])}: stay inside their range")
    if model.get("wrong"):
        print(f"! {name}{model['wrong']}")


def run_fit(args):
    the, fixed = row(args.law, args.set), {}
    if args.first_stage:
        stage = load_fit(args.first_stage)["coefficients"]
        if not the.frozen or not {*the.frozen} <= stage.keys():
            raise ValueError(f"--first-stage {args.first_stage} has {', '.join(stage)} (the second stage of {args.law} "
                             f"{args.set or ''} freezes {', '.join(the.frozen) or 'nothing'})")
        fixed = {name: stage[name] for name in the.frozen}
    if args.blocks and not args.bootstrap:
        raise ValueError(f"--blocks {args.blocks} without --bootstrap (give e.g. --bootstrap 1000)")
    table, blocks = read_table(args.table, the.form, the.target, args.blocks)
    report = fit(args.law, table, args.set, fixed, args.bootstrap, blocks, args.seed)
    if args.plot:
        import plots

        plots.plot_fit(args.plot, report, table, the.target, lambda at: evaluate(the.form, report["coefficients"], **at))
    if args.json:
        return report
    why, plain = report["why"], report["simpler"]
    print(f"{args.law} ({report['set']}), {report['runs']} runs: {the.form.__doc__ or ''}\n")
    show([["", "value", "95 % interval", ""]] + [
        [name, value, report["intervals"].get(name, ""),
         "fixed" if name in fixed else "not determined" if name in why else ""]
        for name, value in report["coefficients"].items()])
    print(f"\nobjective {report['objective']:.11f} (sum of Huber, delta {fitting.HUBER:g}, on the log loss)")
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
    parser = Parser("laws.py", "laws.py {fit,predict} ... [--help]", __doc__, "laws, sets (a law's first is "
                    "its default), columns read, source, ! known flaws:\n" + "\n".join(sets))
    sub = parser.command(run_fit, "LAW RUNS.CSV [options]", "fit a law to a run table", "curves, residuals, bootstrap")
    sub.add_argument("law", metavar="LAW", help=f"one of {', '.join(LAWS)}")
    sub.add_argument("table", metavar="RUNS.CSV", help="run table with the law's columns and L")
    add = sub.add_argument_group("what is fitted").add_argument
    add("--set", metavar="NAME", help="set whose form is fitted (default: the law's first)")
    add("--first-stage", metavar="FILE", help="fit JSON to take coefficients from that the paper freezes: "
        "continual E, A, alpha; fine-grained dense c; upcycling E (default: none)")
    add = sub.add_argument_group("intervals").add_argument
    add("--bootstrap", type=whole, default=0, metavar="TIMES", help="resamples (default: none)")
    add("--blocks", metavar="COLUMN", help="resample runs that agree here as one (default: none)")
    add("--seed", type=whole, default=1, help="seed of the resampling (default: 1)")
    sub = parser.command(run_predict, "LAW [options]", "the loss of a run")
    law_flags(sub, [r.form for rows in LAWS.values() for r in rows.values()])
    parser.answer(argv)


if __name__ == "__main__":
    main()
