"""How a law is fitted to runs, whether it needs a floor, and how well it predicts larger runs.

descent.py finds the coefficients with the lowest f, a sum of Huber(ln predicted L - ln L) over the runs. A fit always
gives numbers, and this file and uncertainty.py ask what they are worth:

- Is there a floor? A power law with a small exponent looks like a constant, so in L = E + B D^-beta an E of 0 may fit
  almost as well as the right one. No descent from the best fit finds that out. `solve` holds the floor at 51 values,
  and refits the rest at each.
- Which coefficients do the runs determine? `undetermined` names those that they do not.
- How far off may the others be? `intervals_of` refits to resampled runs.
- How well does the law predict? `held_out` fits to the smaller runs, and predicts the largest fifth.
- Is a term needed? `fit` compares with the law without it.

Predictions inside the range of the runs are good even where coefficients are open: what one gets wrong, another makes
good.

By hand: nine runs with L = 1 + 4 D^-0.05, D = 1e6, 4e6 ... 6.55e10. D^-0.05 falls from 0.501 to 0.288, so L from 3.005
to 2.151. Without a floor, B D^-beta through both ends has beta = ln(3.005 / 2.151) / ln(65536) = 0.0301 and B = 3.005 *
1e6^0.0301 = 4.555. In the middle, at D = 2.56e8, that is 2.543, where the truth is 2.519: 0.9 % off. So nine runs with
1 % of noise seldom tell a floor of 1 from none, and the fit lists E as undetermined.

Left out: weights for runs (`descend` has them, for the bootstrap), a likelihood for the noise.

Try:
1. Fit chinchilla to nine runs on one line: those with D = 20 N of the table in descent.py. (E is 1.817, the truth. A
   may be anything: 1145 in place of 482. All but E are listed as undetermined: both terms are powers of N, with
   exponents so alike that almost any share of either fits.)
2. Multiply the losses of all eighteen by exp(0.01 z), z = numpy.random.default_rng(1).standard_normal(18), and fit them
   with `--bootstrap 1000`. What do they determine? (E 1.821, 1.57 to 1.91; alpha 0.385, 0.17 to 0.53; beta 0.333, 0.19
   to 0.51; the truth is in all. A and B are open: 886 and 1116, where 482 and 2085 are true.)
3. Write a law without a floor at "A law of your own" in laws.py. Fit it and chinchilla to the same runs. Which
   predicts the largest fifth better? (Hoffmann's 240 public runs: 2.1 % error against 1.3 %. Losses flatten out,
   and a law without a floor cannot.)
"""

from typing import NamedTuple

import numpy as np
from numpy import log

from descent import columns, descend, design, hoffmann_grid, polish, residuals, search
from uncertainty import allowance, intervals_of, undetermined

NOTHING = -500.0  # ln of a prefactor that is 0, near enough (and not as far as FAR)


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
    slid: np.ndarray  # (S, P): the best fits with the floor held at S values from 0 up; without a floor the best alone
    possible: np.ndarray  # (S) bool: those that noise allows

    def values(self, theta):
        """The coefficients themselves for theta (..., P). A floor below a millionth of the lowest loss is 0."""
        value = np.where(self.prefactor, np.exp(np.where(self.prefactor, theta, 0)), theta)
        floor = np.arange(len(self.names)) == self.E
        return np.where(floor & (value < 1e-6 * np.exp(self.y.min())), 0, value)


def solve(form, table, target="L", fixed=None, starts=None, also=None):
    """The best fit, and the floors that noise leaves possible. ValueError for too few runs, or outside of the domain.
    starts (S, P): in the place of the grid; also (P): one start more.

    The floor is held at 51 values, from 0 to almost the lowest loss, and the rest is refitted at each. Those whose f
    exceeds the best by no more than the allowance are possible.
    """
    names, prefactor, X = design(form, table)
    y, n = log(table[target]), X.shape[2]
    fixed = fixed or {}
    free = np.array([name not in fixed for name in names])
    if not free.any():
        raise ValueError("every coefficient is fixed (free one)")
    if n <= free.sum():
        fitted = ", ".join(np.array(names)[free])
        raise ValueError(f"{n} runs for the {free.sum()} coefficients {fitted} (give at least {free.sum() + 1} runs)")
    if not np.isfinite(X).all():
        raise ValueError(f"a run's {', '.join(columns(form))} are outside the law's domain (a factor is infinite)")
    constant = [p for p, powers in form(**{c: table[c] for c in columns(form)}) if not powers and p not in fixed]
    E = names.index(constant[0]) if constant else None
    starts = hoffmann_grid(prefactor, E, X) if starts is None else starts.copy()
    starts = starts if also is None else np.vstack([starts, also])
    for name, value in fixed.items():
        j = names.index(name)
        starts[:, j] = (log(value) if value else NOTHING) if prefactor[j] else value
    theta, f = search(X, y, starts, free)
    slid, lowest = theta[None], np.array([np.inf])  # a law without a floor: none is possible
    if E is not None:
        slid = np.tile(theta, (51, 1))
        slid[:, E] = log(np.append(1e-9, np.linspace(0.01, 0.99, 50))) + y.min()  # 1e-9 for 0, which has no logarithm
        slid, lowest = descend(X, y, slid, free & (np.arange(len(names)) != E), 60)
        if lowest.min() < f:  # the slide came to a deeper valley
            theta, f = min((theta, f), polish(X, y, slid[lowest.argmin()], free), key=lambda result: result[1])
    r = residuals(theta[None], X, y)[0][0]
    return Best(names, prefactor, free, X, y, theta, float(f), E, slid, lowest - f <= allowance(r, free.sum()))


def fit(form, table, target="L", fixed=None, simpler=None, bootstrap=0, blocks=None, seed=1):
    """Fit a form to a run table.

    table: {column: array (n)} with the form's columns and the target. fixed: {coefficient: value} that stay as they
    are. simpler: values that turn the form into a simpler one, to compare. bootstrap: number of resamples (0: no
    intervals). blocks: labels (n) of runs with a common trunk, or any common luck: drawn as one. Returns the report
    that `laws.py fit --json` prints. ValueError as in `solve`, or for fewer than 3 blocks.
    """
    fixed, plain = fixed or {}, {}
    intervals, percentiles, refits = {}, None, []
    compared = simpler and not simpler.keys() & fixed.keys()
    short = solve(form, table, target, fixed | simpler) if compared else None
    # the simpler fit is one start: with a term more the fit must not be worse, and no grid is fine enough to promise it
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
                 "held_out": held_out(form, table, target, fixed | simpler, short)}
    return {
        "coefficients": dict(zip(best.names, best.values(best.theta).tolist())) | fixed, "fixed": list(fixed),
        "intervals": intervals, "percentiles": percentiles, "undetermined": list(why), "why": why,
        "objective": best.f, "runs": len(best.y), "simpler": plain,
        "held_out": held_out(form, table, target, fixed, best),
        "fitted": {c: [float(np.min(table[c])), float(np.max(table[c]))] for c in columns(form)},
        "refits": [[float(f"{v:.7g}") for v in refit] for refit in refits],  # in the order of `intervals`
    }


def held_out(form, table, target, fixed, best):
    """RMSE of ln L on the largest fifth of the runs (by the product of the law's columns) after a fit to the others.
    It starts at the floors of `best`, the fit to all runs, in the place of the whole grid (if the law has a floor): so
    the largest runs say where to start, and no more."""
    size = sum(log(table[c]) for c in columns(form) if c != "G")  # granularity makes no run larger
    order = np.argsort(size, kind="stable")
    small, large = ({c: v[part] for c, v in table.items()} for part in np.split(order, [-max(1, len(order) // 5)]))
    try:
        best = solve(form, small, target, fixed, best.slid if len(best.slid) > 1 else None)
    except ValueError:  # too few runs left
        return None
    r = residuals(best.theta[None], design(form, large)[2], log(large[target]))[0]
    return {"runs": r.size, "error": float(np.sqrt(np.mean(r**2)))}
