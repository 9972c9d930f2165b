"""How a law is fitted to runs, which of its coefficients they determine, and how far off these may be.

A law of training is a sum of power laws, for example Chinchilla's

    L(N, D) = E + A N^-alpha + B D^-beta

The logarithm of each term is linear in the coefficients: ln(A N^-alpha) = ln A + alpha (-ln N). So a form is a function
of the runs' columns that lists its terms. A term is a prefactor and {exponent: the factor that it multiplies}:

    [("E", {}), ("A", {"alpha": -log(N)}), ("B", {"beta": -log(D)})]

Prediction, gradient and fit follow from this list alone. descent.py finds the coefficients with the lowest f, a sum of
Huber(ln predicted L - ln L) over the runs.

A fit always gives numbers. Most of this file asks what they are worth. `solve` asks whether there is a floor at all.
`undetermined` names the coefficients that the runs leave open, `intervals_of` how far off the others may be.
Predictions inside the range of the runs are good even where coefficients are open: what one gets wrong, another makes
good.

By hand: is a floor needed? n = 20 runs, P = 5 coefficients, and the best fit misses each loss by 0.05 %: r = 0.0005,
f = 20 * 0.0005^2 / 2 = 2.5e-6. In `allowance` s = 0.0005^2 * 20 / 15 = 3.3e-7 and F(1, 15) = 4.54, so chance explains
s / 2 * 4.54 = 7.6e-7. A fit without the floor that reaches f = 3.2e-6 is as good. One with 3.3e-6 is not.

Left out: weights for runs (`descend` has them, for the bootstrap), a likelihood for the noise.

Try:
1. Make a table of nine runs, N = 1e8, 2e8, 4e8 ... 2.56e10, D = 20 N, with L from `laws.py predict chinchilla --json`.
   Fit it. (E is 1.817, the truth. A may be anything: 1145 in place of 482. All but E are named: both terms are powers
   of N, and the fit cannot tell them apart. With nine more runs at D = 100 N all five come out right.)
2. Multiply the losses of these eighteen by exp(0.01 z), z = numpy.random.default_rng(1).standard_normal(18), and fit
   them with `--bootstrap 1000`. What do they determine? (E 1.821, 1.57 to 1.91; alpha 0.385, 0.17 to 0.53; beta 0.333,
   0.19 to 0.51; the truth is in all. A and B are open: 886 and 1116, where 482 and 2085 are true.)
3. Write a law without a floor at "A law of your own" in laws.py. Fit it and chinchilla to the same runs. Which
   predicts the largest fifth better? (Hoffmann's 240 public runs: 2.1 % error against 1.3 %. Losses flatten out,
   and a law without a floor cannot.)
"""

import inspect
import math
from typing import NamedTuple

import numpy as np
from numpy import log
from scipy.special import fdtri, ndtr, stdtrit

from descent import HUBER, descend, hoffmann_grid, huber, polish, residuals, search

NOTHING = -500.0  # ln of a prefactor that is 0, near enough
TIED = 0.01  # a column is tied if the others predict its logarithm to 1 % of its spread (runs end at whole steps)


def columns(form):
    """The columns of the run table that a law reads: the names of its arguments."""
    return list(inspect.signature(form).parameters)


def evaluate(form, coefficients, **at):
    """The law's value (nats a token; tokens for `stacking`) at columns `at`, numbers or arrays of one shape."""
    terms = form(**{name: np.asarray(at[name], float) for name in columns(form)})
    value = {"": 1.0, **coefficients}  # "": a term without prefactor
    with np.errstate(divide="ignore", over="ignore"):  # a prefactor of 0: ln 0 = -inf, and the term is 0
        return sum(np.exp(log(value[p]) + sum(value[e] * f for e, f in powers.items())) for p, powers in terms)


def design(form, table):
    """names (P), which of them are prefactors (P), and X (K, P, n): what each coefficient is multiplied by."""
    terms, n = form(**{c: table[c] for c in columns(form)}), len(table[columns(form)[0]])
    prefactors = [p for p, _ in terms if p]
    names = list(dict.fromkeys(prefactors + [e for _, powers in terms for e in powers]))
    X = np.zeros((len(terms), len(names), n))
    for k, (prefactor, powers) in enumerate(terms):
        for name, factor in (({prefactor: 1.0} if prefactor else {}) | powers).items():
            X[k, names.index(name)] = factor
    return names, np.isin(names, prefactors), X


def allowance(r, P, q=1):
    """How much of the objective chance alone explains: what costs less than this is no evidence.

    Hold q of the P coefficients at the truth and refit the rest. Noise makes f grow, in 95 of 100 cases by less than

        s / 2 * q * F(q, n - P),   s = mean(psi^2) / mean(psi') * n / (n - P)        (Huber 1981)

    r (n) are the residuals of the best fit, F is the F distribution's 95 % point. psi is the force: r clipped to +-
    delta. psi' is its slope: 1 for |r| < delta, 0 beyond. n / (n - P): the fit has bent towards the runs. For least
    squares psi(r) = r, s is the variance of the noise, and this is the F test.
    mean(psi') is the share of runs within delta of the curve. If the noise is far above delta, these are too few to
    count. So the nearer half of the runs is counted, those within the median of |r|, and the share is scaled by delta /
    median.
    """
    n, half = len(r), max(HUBER, np.median(np.abs(r)))
    curvature = np.mean(np.abs(r) <= half) * HUBER / half  # mean psi'
    s = np.mean(np.clip(r, -HUBER, HUBER) ** 2) / curvature * n / (n - P)
    return s / 2 * q * fdtri(q, n - P, 0.95)


# ----------------------------------------------------------------------------------------------------------------------
# The best fit, what it leaves open, and intervals.


class Best(NamedTuple):
    """A best fit. P coefficients, n runs, S floors that were tried."""

    names: list  # P
    prefactor: np.ndarray  # (P) bool
    free: np.ndarray  # (P) bool: fitted, not fixed
    X: np.ndarray  # (K, P, n)
    y: np.ndarray  # (n) ln L
    theta: np.ndarray  # (P)
    f: float
    E: int | None  # which coefficient is the floor, if it is free
    slid: np.ndarray  # (S, P): the best fits with the floor held at S values from 0 up
    possible: np.ndarray  # (S) bool: those that noise allows

    def values(self, theta):
        """The coefficients themselves for theta (..., P). A floor of a millionth of the lowest loss is none."""
        value = np.where(self.prefactor, np.exp(np.where(self.prefactor, theta, 0)), theta)
        floor = np.arange(len(self.names)) == self.E
        return np.where(floor & (value < 1e-6 * np.exp(self.y.min())), 0, value)


def solve(form, table, target="L", fixed=None, starts=None, also=None):
    """The best fit, and the floors that noise leaves possible. ValueError for too few runs, or outside of the domain.
    starts (S, P): in the place of the grid; also (P): one more.

    A power law with a small exponent looks like a constant, so a floor of 0 may fit almost as well as the right one. No
    descent from the best fit finds that out. So the floor is held at 51 values, from 0 to almost the lowest loss, and
    the rest is refitted at each. Those that cost less than the allowance are possible.
    """
    names, prefactor, X = design(form, table)
    y, n = log(table[target]), X.shape[2]
    fixed = fixed or {}
    free = np.array([name not in fixed for name in names])
    if n <= free.sum():
        fitted = ", ".join(np.array(names)[free])
        raise ValueError(f"{n} runs for the {free.sum()} coefficients {fitted} (give at least {free.sum() + 1} runs)")
    if not np.isfinite(X).all():
        raise ValueError(f"a run's {', '.join(columns(form))} are outside the law's domain (log10 C must not be 0)")
    constant = [p for p, powers in form(**{c: table[c] for c in columns(form)}) if not powers and p not in fixed]
    E = names.index(constant[0]) if constant else None
    starts = hoffmann_grid(prefactor, E, X) if starts is None else starts.copy()
    starts = starts if also is None else np.vstack([starts, also])
    for name, value in fixed.items():
        j = names.index(name)
        starts[:, j] = value if not prefactor[j] else log(value) if value else NOTHING
    theta, f = search(X, y, starts, free)
    slid, cost = theta[None], np.array([np.inf])
    if E is not None:
        slid = np.tile(theta, (51, 1))
        slid[:, E] = log(np.append(1e-9, np.linspace(0.01, 0.99, 50))) + y.min()  # 1e-9 for 0, which has no logarithm
        slid, cost = descend(X, y, slid, free & (np.arange(len(names)) != E), 60)
        if cost.min() < f:  # the slide came to a deeper valley
            theta, f = min((theta, f), polish(X, y, slid[cost.argmin()], free), key=lambda result: result[1])
    r = residuals(theta[None], X, y)[0][0]
    return Best(names, prefactor, free, X, y, theta, float(f), E, slid, cost - f <= allowance(r, free.sum()))


def tied(form, table, names):
    """{coefficient: reason} for those of `names` that belong to columns which the runs do not vary independently.

    The coefficients of a column are the exponents that act on it, and the prefactor of their term: if N is the same in
    all runs, A N^-alpha is one number. With D = 20 N both terms of Chinchilla's law are powers of N. Exchange them, and
    the fit is as good: so it says nothing about either.
    """
    args = {c: np.asarray(table[c], float) for c in columns(form)}
    acts = {}  # column: the coefficients of the terms in which it acts
    for c in args:  # double it, and see which factors change
        for (prefactor, powers), (_, moved) in zip(form(**args), form(**args | {c: 2 * args[c]})):
            moving = {e for e in powers if np.any(powers[e] != moved[e])}
            if moving & {*names}:
                constant = {e for e in powers if np.ptp(powers[e]) == 0}  # it acts like a prefactor
                acts[c] = acts.get(c, set()) | moving | constant | {prefactor}
    logs = {c: log(args[c]) - log(args[c]).mean() for c in acts}
    groups = {c: f"{c} is the same in all runs" for c in acts if logs[c].std() < TIED}
    varied = [c for c in acts if c not in groups]
    if len(varied) > 1:
        Z = np.array([logs[c] / logs[c].std() for c in varied])
        size, V = np.linalg.eigh(Z @ Z.T / Z.shape[1])  # a direction in which the runs do not spread is a relation
        for v in V[:, size < TIED**2].T:  # size: the variance along v
            together = [c for c, weight in zip(varied, v) if abs(weight) > 0.1]
            groups |= dict.fromkeys(together, f"{', '.join(together)} are tied: one follows from the others")
    return {name: why for c, why in groups.items() for name in names if name in acts[c]}


def undetermined(form, table, best):
    """{coefficient: reason} for those that the runs leave open. `fit` adds those whose interval is too wide.

    A coefficient is open if it is the floor, and a floor of 0 is possible (`solve`); if one constant fits all losses;
    if it belongs to a column that is constant or tied to another (`tied`); or if it can be changed together with others
    and no prediction changes, d r / d theta @ v = 0. Of two terms that no run varies, for example, only the sum counts.
    """
    names = [name for name, free in zip(best.names, best.free) if free]
    P, r = len(names), residuals(best.theta[None], best.X, best.y)[0][0]
    flat = huber(best.y - np.median(best.y)).sum()  # the objective of one constant for all runs
    why = {best.names[best.E]: "without it the law fits as well as noise allows"} if best.possible[0] else {}
    if flat - best.f <= allowance(r, P, max(1, P - 1)):
        why = dict.fromkeys(names, "one constant fits all losses as well as noise allows") | why
    why = tied(form, table, names) | why  # the reason found first stands
    logs = {c: log(table[c]) for c in columns(form)}  # a column that is as good as constant is taken for constant here
    X = design(form, {c: np.exp(v if v.std() > TIED else 0 * v + v.mean()) for c, v in logs.items()})[2]
    J = np.einsum("kn,kpn->np", residuals(best.theta[None], X, best.y)[1][:, 0], X[:, best.free])  # d r / d theta
    _, s, V = np.linalg.svd(J / np.maximum(np.abs(J).max(0), 1e-300), full_matrices=False)
    for j in np.flatnonzero((np.abs(V[s < 1e-8]) > 1e-4).any(0)):
        why.setdefault(names[j], "a change of it is made good exactly by others, or changes nothing")
    return why


def resample(best, times, blocks, seed):
    """Refits to resampled runs: theta (times, P), and the same with the floor held at both ends of what is possible."""
    G, rng, E = blocks.max() + 1, np.random.default_rng(seed), best.E
    starts, held = best.theta[None], best.free & (np.arange(len(best.names)) != E)
    if E is not None:  # a refit that starts at the best fit alone stays near its floor
        starts = np.tile(starts, (5, 1))
        starts[1:, E] = best.y.min() + log([0.02, 0.3, 0.6, 0.85])
    ends = best.slid[best.possible][[0, -1]] if E is not None and best.possible[0] else []
    refits = [[] for _ in range(1 + len(ends))]
    for i in range(0, times, 100):
        drawn = [np.bincount(rng.integers(0, G, G), minlength=G) for _ in range(min(100, times - i))]
        w = np.array(drawn, float)[:, blocks]  # (S, n): how often each run counts
        each = lambda theta, w=w: np.tile(theta, (len(w), 1))
        tried = [descend(best.X, best.y, each(t), best.free, 12 if E is not None else 0, w) for t in starts]
        first = np.argmin([f for _, f in tried], 0)
        theta = np.array([t for t, _ in tried])[first, np.arange(len(w))]
        refits[0].append(descend(best.X, best.y, theta, best.free, 100, w)[0])
        for refit, end in zip(refits[1:], ends):
            refit.append(descend(best.X, best.y, each(end), held, 100, w)[0])
    return [np.concatenate(r) for r in refits]


def intervals_of(best, times, blocks, seed):
    """95 % intervals {coefficient: [low, high]}, the percentiles that give them, the refits' values (times, P).

    The bootstrap draws n runs from the n runs, with replacement, refits, and repeats: the refits spread as fits to
    other runs of the same kind would. Two corrections make the intervals cover the truth about as often as they claim
    (experiments/coverage_laws.py). The spread is too small by sqrt((n - P) / n), and few runs need Student's t in place
    of 1.96: so the percentiles are taken further out (Hesterberg 2015). G blocks count as n = G, n - P = G - 1. And if
    a floor of 0 is possible, refits seldom reach both ends of what is possible. So they are repeated with the floor
    held at either end, and an interval is the union.
    """
    n, P = len(best.y), best.free.sum()
    labels = np.arange(n) if blocks is None else np.unique(np.asarray(blocks).astype(str), return_inverse=True)[1]
    G = int(labels.max()) + 1
    if G < 3:
        raise ValueError(f"{G} blocks to resample (at least 3)")
    df = n - P if blocks is None else G - 1
    tail = 100 * ndtr(-math.sqrt(G / df) * stdtrit(df, 0.975))
    refits = [best.values(theta) for theta in resample(best, times, labels, seed)]
    bounds = np.array([np.percentile(r, [tail, 100 - tail], axis=0) for r in refits])
    low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
    if len(refits) > 1:
        low[best.E], high[best.E] = 0, max(high[best.E], best.values(best.slid[best.possible])[:, best.E].max())
    ends = zip(np.array(best.names)[best.free].tolist(), *np.stack([low, high])[:, best.free].tolist())
    return {name: [*pair] for name, *pair in ends}, [tail, 100 - tail], refits[0][:, best.free]


def fit(form, table, target="L", fixed=None, simpler=None, bootstrap=0, blocks=None, seed=1):
    """Fit a form to a run table.

    table: {column: array (n)} with the form's columns and the target. fixed: {coefficient: value} that stay as they
    are. simpler: values that turn the form into a simpler one, to compare. bootstrap: number of resamples (0: no
    intervals). blocks: labels (n) of runs that share a start: they are drawn as one. Returns the report that `laws.py
    fit --json` prints. ValueError if there are too few runs.
    """
    fixed, plain = fixed or {}, {}
    intervals, percentiles, refits = {}, None, []
    compared = simpler and not simpler.keys() & fixed.keys()
    short = solve(form, table, target, fixed | simpler) if compared else None
    # the simpler fit is one start: with a term more the fit may not be worse, and no grid is fine enough to promise it
    best = solve(form, table, target, fixed, also=short and short.theta)
    why = undetermined(form, table, best)
    if bootstrap:
        intervals, percentiles, refits = intervals_of(best, bootstrap, blocks, seed)
        for name, (low, high) in intervals.items():
            near, far = sorted((abs(low), abs(high)))
            wide = 10 if best.prefactor[best.names.index(name)] else 4
            if low <= 0 <= high or far > wide * near:
                why.setdefault(name, f"its interval includes 0 or spans more than a factor of {wide}")
    if compared:
        P = best.free.sum()
        chance = allowance(residuals(best.theta[None], best.X, best.y)[0][0], P, len(simpler))
        plain = {"without": list(simpler), "objective": short.f, "needed": bool(short.f - best.f > chance),
                 "held_out": held_out(form, table, target, fixed | simpler, short.slid)}
    return {
        "coefficients": dict(zip(best.names, best.values(best.theta).tolist())) | fixed, "fixed": list(fixed),
        "intervals": intervals, "percentiles": percentiles, "undetermined": list(why), "why": why,
        "objective": best.f, "runs": len(best.y), "simpler": plain,
        "held_out": held_out(form, table, target, fixed, best.slid),
        "fitted": {c: [float(np.min(table[c])), float(np.max(table[c]))] for c in columns(form)},
        "refits": [[float(f"{v:.7g}") for v in refit] for refit in refits],  # in the order of `intervals`
    }


def held_out(form, table, target, fixed, starts):
    """RMSE of ln L on the largest fifth of the runs (by the product of the law's columns) after a fit to the others.
    starts (S, P): the slid fits to all runs, instead of the whole grid."""
    size = sum(log(table[c]) for c in columns(form) if c != "G")  # G makes no run larger
    order = np.argsort(size, kind="stable")
    small, large = ({c: v[part] for c, v in table.items()} for part in np.split(order, [-max(1, len(order) // 5)]))
    try:
        best = solve(form, small, target, fixed, starts)
    except ValueError:  # too few runs left
        return None
    r = residuals(best.theta[None], design(form, large)[2], log(large[target]))[0]
    return {"runs": r.size, "error": float(np.sqrt(np.mean(r**2)))}
