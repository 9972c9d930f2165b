"""
Scaling laws: published, fitted to runs of one's own, and put to use.

    python laws.py table out/*/ > runs.csv
    python laws.py fit LAW runs.csv [--bootstrap 1000] [--plot fit.png] [--json]
    python laws.py predict LAW --N 1e9 --D 1e10 ... [--fit fit.json] [--json]
    python laws.py optimal LAW --flops 1e20 ... [--fit fit.json] [--json]
    python laws.py optimal stacking --N 8e9 --D 15e12 [--json]
    python laws.py plan --have-n 1e9 --have-d 1e12 --flops 1e21 [--experts 8 --top-k 2] [--plot plan.png] [--json]
    python laws.py compare out/scratch out/stacked [--plot loss.png] [--json]

A scaling law says what loss a training run will reach before anybody has paid for it. All the laws here are sums of
power laws, e.g. Chinchilla's L(N, D) = E + A N^-alpha + B D^-beta: a floor E that no model passes, a price for too few
parameters N, a price for too few tokens D. So each term is the exponential of something *linear* in (ln A, alpha, ...),
and a law is written here as a list of terms (prefactor, {exponent: what it multiplies}):

    [("E", {}), ("A", {"alpha": -log(N)}), ("B", {"beta": -log(D)})]      # E + A e^(-alpha ln N) + B e^(-beta ln D)

From that list alone follow the prediction, the analytic gradient and the fit. A law of your own is one such function
and one line in LAWS.

  chinchilla    Hoffmann et al. 2022 (arXiv 2203.15556), Besiroglu et al. 2024 (2404.10102)
  fine-grained  Ludziejewski et al. 2024 (2402.07871): MoE with expansion rate E and granularity G
  upcycling     Liew et al. 2025 (2502.03009): D1 tokens as a dense model, D2 more as an MoE; Table 2, Eq. 12
  continual     Zheng et al. 2024 (2407.02118): continual pretraining, Eq. 4, 8, 9
  stacking      Du et al. 2024 (2405.15319): when to grow, Eq. 2. Its law of the loss, L = a C^b, has no printed numbers

The fit follows Hoffmann: minimise the sum over runs of Huber_1e-3(ln predicted L - ln L), the predicted logarithm taken
by log-sum-exp. The sum, not the mean: averaging shrinks the gradient until the optimiser stops early, which is what
went wrong with the published Chinchilla numbers. All 4,500 starts of Hoffmann's grid (or as many points of it where a
law has more coefficients) are evaluated at once, the best 300 descend together, the last 4 are polished: 0.2 s to the
best known objective on the 240 public Chinchilla runs (experiments/bench_laws.csv).

Intervals resample the runs, or whole blocks of them, and refit. Two corrections were needed before they covered the
truth about as often as they claim in synthetic studies (experiments/coverage_laws.csv):
 * small samples: percentiles are taken further out, by sqrt(n / (n - P)) t_(n-P) in place of 1.96 (Hesterberg 2015);
 * the floor: power laws can imitate a constant. We slide E from 0 up to the lowest loss and refit the rest. If E = 0 is
   no worse than noise allows, the data do not determine E, and a bootstrap around the best fit alone is far too sure of
   itself. Then the other intervals are the union over both ends of the E that remain possible.
A coefficient is called undetermined if the runs never vary what it multiplies, if E = 0 is possible, or if its interval
includes 0 or spans more than a factor of 10 (prefactor) or 4 (exponent). Predictions inside the fitted range suffer
from none of this: what one coefficient gets wrong another makes good. Where the runs hardly vary a column (a factor of
4 in D, `fine-grained --set dense`), even the coefficients that look determined were covered 86 times in 100 only.

The concept ends where "Run folders" begins; from there on it is files and flags. Left out on purpose: weights for runs,
a likelihood for the noise, laws of learning rate and batch size, data-constrained and joint (E-dependent) MoE laws.

Try:
1. `python laws.py plan --have-n 1e9 --have-d 1e11 --flops 1e21`, then --have-d 2e11, 3e11 ...: up to which D1 is there
   a budget beyond which an MoE from scratch overtakes the upcycled one? (To 7.3e11; from 7.4e11 on: never.)
2. `python laws.py optimal chinchilla --flops 5.76e23`, then with --set hoffmann: how many tokens a parameter does each
   ask for at Chinchilla's own budget? (18 and 59. Chinchilla was given 20: the published fit had missed its optimum.)
3. Write a law without a floor, L = A N^-alpha + B D^-beta: one function, one line in LAWS. Fit it and `chinchilla` to
   the same runs. Which is better on the largest runs, left out, and why? (Hoffmann's 240 runs: 2.1 % error against
   1.3 %, and 1.78 against 1.97 for Chinchilla itself. What cannot flatten out promises too much.)
"""

import argparse
import csv
import difflib
import inspect
import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while SciPy loads: no traceback

import numpy as np
from numpy import log
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import fdtri, ndtr, stdtrit
from tqdm import tqdm

HUBER = 1e-3  # delta, on the log loss
GROW = 4  # the stacking paper's growth factor
DAMAGE = ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, argparse.ArgumentTypeError

# ----------------------------------------------------------------------------------------------------------------------
# The laws. Arguments are the columns of the run table; the docstring says which N is meant and what is wrong.


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
    (`laws.py table` counts the ancestors' too: subtract them)."""
    return [("E", {}), ("A", {"alpha": -log(N)}), ("B", {"beta": -log(D), "gamma": -log(N)})]


def stacking(N, C):
    """log10 d = a log10 N + b / log10 C + c: tokens d for the base of a stacked model of N parameters and C FLOPs."""
    return [("", {"a": log(N), "b": log(10) / np.log10(C), "c": log(10) * np.ones_like(log(N))})]  # "": prefactor 1


class Row(NamedTuple):
    """One row of a paper's table of coefficients, or only a form to be fitted (coefficients None)."""

    form: object
    coefficients: dict | None = None
    fitted: dict = {}  # column: (lowest, highest) value among the paper's runs
    source: str = ""
    wrong: str = ""  # what is known to be wrong with it, shown wherever it is used
    frozen: tuple = ()  # coefficients that the paper takes over from a fit of other runs first (--first-stage)
    simpler: dict = {}  # values that turn the law into the simpler form it is compared with
    target: str = "L"


_RUNS = {"N": (5.7e7, 1.62e10), "D": (8.2e8, 3.2e11)}  # Chinchilla's
_FINE = {"N_total": (129e6, 3.7e9), "D": (16e9, 130e9), "G": (1, 16)}
_UP = {"N": (15e6, 1e9), "D1": (1e9, 3.68e11), "D2": (1e9, 3.68e11)}
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
                   "2402.07871, Table 1: MoE with expansion rate 64", _ROUNDED, simpler={"g": 0, "gamma": 0}),
        "E16": Row(fine_grained, dict(c=0.472, g=1.18, a=19.64, b=57.07, gamma=0.986, alpha=0.124, beta=0.169), _FINE,
                   "2402.07871, Table 8: expansion rate 16", _ROUNDED),
        "dense": Row(fine_grained_dense, dict(c=0.47, a=16.3, b=26.7, alpha=0.126, beta=0.127),
                     {"N": (3e6, 85e6), "D": (16e9, 66e9)}, "2402.07871, Table 1: dense", _ROUNDED, frozen=("c",)),
    },
    "upcycling": {
        "upcycled": Row(upcycling, dict(E=0.165, A=16.3, B=8.53, alpha1=0.043, alpha2=0.085, alpha3=7.98e-4,
                                        beta=0.112), _UP, "2502.03009, Table 2: 8 experts, top-2", _LN,
                        frozen=("E",), simpler={"alpha3": 0}),
        "dense": Row(from_scratch, dict(E=0.165, A=8.83, B=12.3, alpha=0.088, beta=0.116),
                     {"N": (15e6, 1e9), "D": (1e9, 3.68e11)}, "2502.03009, Table 2: dense"),
        "moe": Row(from_scratch, dict(E=0.165, A=32.0, B=7.05, alpha=0.161, beta=0.080),
                   {"N": (15e6, 1e9), "D": (1e9, 3.68e11)}, "2502.03009, Table 2: MoE from scratch, N the dense size",
                   frozen=("E",)),
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
                      "fitted on 410M to 3B parameters: for small models d comes out beyond D", target="d"),
        "factor": Row(stacking, dict(a=1.01, b=-29.88, c=-7.36), {"N": (4.1e8, 3e9)}, "2405.15319, Eq. 50",
                      "preliminary by its authors' word: 17 to 221 from 7B on. They use g = 4", target="g"),
    },
}


def row(law, set=None):
    """The Row of `law` (its default set if None). ValueError names what exists."""
    if law not in LAWS:
        raise ValueError(f"no law called {law!r} (known: {', '.join(LAWS)})")
    set = next(iter(LAWS[law])) if set is None else set
    if set not in LAWS[law]:
        raise ValueError(f"law {law} has no set {set!r} (known: {', '.join(LAWS[law])})")
    return LAWS[law][set]


def columns(form):
    """The columns of the run table that a law reads: the names of its arguments."""
    return list(inspect.signature(form).parameters)


def evaluate(form, coefficients, **at):
    """The law's value (nats a token; tokens for `stacking`) at columns `at`, numbers or arrays of one shape."""
    terms = form(**{name: np.asarray(at[name], float) for name in columns(form)})
    c = {"": 1.0, **coefficients}
    with np.errstate(divide="ignore"):  # a prefactor of 0: ln 0 = -inf, and the term is 0
        return sum(np.exp(log(c[p]) + sum(c[e] * f for e, f in powers.items())) for p, powers in terms)


# ----------------------------------------------------------------------------------------------------------------------
# The fit. Shapes: K terms, P coefficients, n runs, S fits that go on side by side.
# theta (S, P) holds ln of a prefactor and an exponent as it is, so that ln of term k of run i is theta @ X[k, :, i].


def design(form, table, fixed=None):
    """names (P), which of them are prefactors, X (K, P, n), and offset (K, 1, n): what the `fixed` ones contribute."""
    terms, fixed = form(**{c: table[c] for c in columns(form)}), fixed or {}
    prefactors = [p for p, _ in terms if p]
    every = dict.fromkeys(prefactors + [e for _, powers in terms for e in powers])
    names, n = [name for name in every if name not in fixed], len(table[columns(form)[0]])
    X, offset = np.zeros((len(terms), len(names), n)), np.zeros((len(terms), 1, n))
    for k, (prefactor, powers) in enumerate(terms):
        for name, multiplies in (({prefactor: 1.0} if prefactor else {}) | powers).items():
            if name in names:
                X[k, names.index(name)] = multiplies
            else:
                with np.errstate(divide="ignore"):  # a prefactor fixed at 0 removes its term: ln 0 = -inf
                    offset[k] += (log(fixed[name]) if name in prefactors else fixed[name]) * multiplies
    return names, [name in prefactors for name in names], X, offset


def huber(r):
    """r^2 / 2 near 0, then delta (|r| - delta / 2): an outlier pulls with a force of delta, however far it lies."""
    a = np.abs(r)
    return np.where(a <= HUBER, 0.5 * r**2, HUBER * (a - 0.5 * HUBER))


def residuals(theta, X, offset, y):
    """ln predicted - y (S, n), by log-sum-exp over the terms, and each term's share (K, S, n) = its derivative."""
    Z = theta @ X + offset  # (K, S, n)
    top = Z.max(0)
    Z = np.exp(Z - top)
    total = Z.sum(0)
    return top + log(total) - y, Z / total


def whiten(X):
    """W (P, rank): in steps theta + W phi all directions matter alike. Directions that no run varies are left out."""
    K, P, n = X.shape
    _, s, V = np.linalg.svd(X.transpose(0, 2, 1).reshape(K * n, P) / math.sqrt(n), full_matrices=False)
    return (V / s[:, None])[s > 1e-9 * s[0]].T


def descend(X, y, theta, steps, weights=1.0, offset=0.0):
    """Levenberg-Marquardt for S fits at once; an outlier's square is weighted down to its Huber force.

    X (K, P, n), y = ln L (n), theta (S, P), weights (S, n) or 1, offset (K, S or 1, n). Returns theta, objective (S).
    """
    W = whiten(X)
    Q = W.T @ X
    damping = np.full(len(theta), 1e-2)
    r, share = residuals(theta, X, offset, y)
    f = (weights * huber(r)).sum(1)
    for _ in range(steps):
        J = np.einsum("ksn,kpn->spn", share, Q)  # d r / d phi
        h = weights * np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-300))
        H, g = (J * h[:, None]) @ J.transpose(0, 2, 1), (J * h[:, None]) @ r[:, :, None]
        d = np.einsum("spp->sp", H)
        damp = damping[:, None] * d + 1e-10 * d.max(1, keepdims=True) + 1e-300
        trial = theta - np.linalg.solve(H + damp[:, :, None] * np.eye(len(Q[0])), g)[:, :, 0] @ W.T
        r2, share2 = residuals(trial, X, offset, y)
        f2 = (weights * huber(r2)).sum(1)
        better = (f2 < f) & (np.abs(trial).max(1) < 600)  # no further: exp must stay a number
        theta, f = np.where(better[:, None], trial, theta), np.where(better, f2, f)
        r, share = np.where(better[:, None], r2, r), np.where(better[:, None], share2, share)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
    return theta, f


def polish(X, y, theta, offset=0.0):
    """The last digits of one fit, theta (P) -> theta (P) and objective: scipy's BFGS with the analytic gradient."""
    W = whiten(X)

    def objective(phi):
        r, share = residuals(theta[None] + phi[None] @ W.T, X, offset, y)
        slope = np.clip(r[0], -HUBER, HUBER)
        return huber(r).sum() / HUBER**2, W.T @ np.einsum("kn,kpn,n->p", share[:, 0], X, slope) / HUBER**2

    best = minimize(objective, np.zeros(W.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 1000})
    return theta + W @ best.x, best.fun * HUBER**2


def hoffmann_grid(prefactor, constant, X, size=4500):
    """Starts (S, P): ln E in -1 .. 1, ln of other prefactors in 0 .. 25, exponents in 0 .. 2, for what varies like ln N
    (an interaction ln D1 ln D2 is larger, so its exponents are smaller). A random `size` of them if there are more."""
    axes = []
    for j, is_prefactor in enumerate(prefactor):
        typical = np.abs(X[:, j][X[:, j] != 0]).mean() if X[:, j].any() else 1
        exponents = np.arange(0, 2.5, 0.5) * min(1, 20 / typical)
        axes.append(np.arange(-1, 1.5, 0.5) if j == constant else np.arange(0, 30, 5) if is_prefactor else exponents)
    shape = [len(a) for a in axes]
    every = math.prod(shape)
    chosen = np.arange(every) if every <= size else np.random.default_rng(0).choice(every, size, replace=False)
    return np.stack([a[i] for a, i in zip(axes, np.unravel_index(chosen, shape))], 1)


def search(X, y, starts, offset=0.0):
    """Best theta (P) and objective: every start evaluated, then fewer and fewer of them taken further and further."""
    chunk = max(1, 1_500_000 // X.shape[2])  # keeps the arrays of the first look small, however many runs there are
    f = [descend(X, y, starts[i : i + chunk], 0, offset=offset)[1] for i in range(0, len(starts), chunk)]
    theta = starts[np.argsort(np.concatenate(f))[:300]]
    for steps, keep in ((5, 60), (10, 10), (20, 4)):
        theta, f = descend(X, y, theta, steps, offset=offset)
        theta = theta[np.argsort(f)[:keep]]
    return min((polish(X, y, t, offset) for t in theta), key=lambda result: result[1])


def allowance(r, P, q=1):
    """By how much the objective grows by chance alone (5 % level) when q of P coefficients are held at the truth.

    r (n): residuals of the best fit. s / 2 q F_(q, n - P) with s = E psi^2 / E psi' of an M-estimator (Huber 1981),
    E psi' taken from the half of the runs with the smallest residuals, n / (n - P) because the fit has shrunk them.
    """
    n, half = len(r), max(HUBER, np.median(np.abs(r)))
    curvature = np.mean(np.abs(r) <= half) * HUBER / half
    s = np.mean(np.clip(r, -HUBER, HUBER) ** 2) / curvature * n / (n - P)
    return s / 2 * q * fdtri(q, n - P, 0.95)


def solve(form, table, target="L", fixed=None, starts=None):
    """The best fit and what noise leaves open about its floor. A dict of arrays, for fit()."""
    names, prefactor, X, offset = design(form, table, fixed)
    y, (_, P, n) = log(table[target]), X.shape
    if n <= P:
        raise ValueError(f"{n} runs for the {P} coefficients {', '.join(names)} (give at least {P + 1} runs)")
    if not np.isfinite(X).all():
        raise ValueError(f"a run's {', '.join(columns(form))} are outside the law's domain (log10 C must not be 0)")
    constant = [p for p, powers in form(**{c: table[c] for c in columns(form)}) if not powers]
    E = names.index(constant[0]) if constant and constant[0] in names else None
    theta, f = search(X, y, hoffmann_grid(prefactor, E, X) if starts is None else starts, offset)
    slid, cost = theta[None], np.array([np.inf])
    if E is not None:  # slide the floor from 0 to the lowest loss
        floors = log(np.append(1e-9, np.linspace(0.01, 0.99, 50))) + y.min()
        slid, cost = hold(X, y, theta, E, floors, offset, steps=60)
        if cost.min() < f:
            theta, f = min((theta, f), polish(X, y, slid[cost.argmin()], offset), key=lambda result: result[1])
    r = residuals(theta[None], X, offset, y)[0][0]
    return dict(names=names, prefactor=np.array(prefactor), X=X, y=y, offset=offset, theta=theta, f=f, r=r, E=E,
                slid=slid, possible=cost - f <= allowance(r, P))


def hold(X, y, theta, j, values, offset, steps, weights=1.0):
    """Fits (S, P) with coefficient j held at `values` (S or 1), started at theta (P), and their objectives (S)."""
    S = max(len(values), len(np.atleast_2d(weights)))
    rest = np.arange(X.shape[1]) != j
    theta = np.broadcast_to(theta, (S, X.shape[1])).copy()
    theta[:, j] = values
    held = offset + X[:, j][:, None] * np.asarray(values)[None, :, None]  # (K, S, n)
    theta[:, rest], cost = descend(X[:, rest], y, theta[:, rest], steps, weights, held)
    return theta, cost


def resample(best, times, blocks, rng, progress):
    """Refits to resampled runs: theta (times, P), and the same with the floor held at both ends of what is possible."""
    X, y, offset, E = (best[k] for k in ("X", "y", "offset", "E"))
    G, starts = blocks.max() + 1, best["theta"][None]
    if E is not None:  # a refit from the best fit alone would stay where that one's floor is
        starts = np.tile(starts, (5, 1))
        starts[1:, E] = y.min() + log([0.02, 0.3, 0.6, 0.85])
    free, ends = [], [[], []]
    for i in tqdm(range(0, times, 100), "bootstrap", leave=False, disable=None if progress else True):  # terminal only
        drawn = [np.bincount(rng.integers(0, G, G), minlength=G) for _ in range(min(100, times - i))]
        w = np.array(drawn, float)[:, blocks]  # (S, n): how often each run counts
        tried = [descend(X, y, np.tile(t, (len(w), 1)), 12 if E is not None else 0, w, offset) for t in starts]
        first = np.argmin([f for _, f in tried], 0)
        theta = np.array([t for t, _ in tried])[first, np.arange(len(w))]
        free.append(descend(X, y, theta, 100, w, offset)[0])
        if E is not None and best["possible"][0]:
            for end, at in zip(ends, best["slid"][best["possible"]][[0, -1]]):
                end.append(hold(X, y, at, E, at[[E]], offset, 100, w)[0])
    return np.concatenate(free), [np.concatenate(end) for end in ends if end]


def fit(law, table, set=None, fixed=None, bootstrap=0, blocks=None, seed=1, progress=False):
    """Fit a law to a run table.

    table: {column: array (n)} with the law's columns and L. fixed: {coefficient: value} that stay as they are (a staged
    fit). bootstrap: number of resamples (0: no intervals). blocks: labels (n) of runs that belong together, e.g. one
    trunk's. Returns what `laws.py fit --json` prints. ValueError if there are too few runs.
    """
    the, fixed = row(law, set), fixed or {}
    best = solve(the.form, table, the.target, fixed)
    names, E, n, P = best["names"], best["E"], len(best["y"]), len(best["names"])

    def values(theta):  # (..., P) -> the coefficients themselves; a floor of a millionth of the lowest loss is none
        value = np.where(best["prefactor"], np.exp(np.where(best["prefactor"], theta, 0)), theta)
        return np.where((np.arange(P) == E) & (value < 1e-6 * np.exp(best["y"].min())), 0, value)

    why, intervals, percentiles, refits = {}, {}, None, np.zeros((0, P))
    _, s, V = np.linalg.svd(best["X"].transpose(0, 2, 1).reshape(-1, P))
    for j in np.flatnonzero((np.abs(V[s <= 1e-9 * s[0]]) > 1e-6).any(0)):
        why[names[j]] = "what it multiplies is the same in all runs"
    if best["possible"][0]:
        why[names[E]] = "without it the law fits as well as noise allows"
    if bootstrap:
        labels = np.arange(n) if blocks is None else np.unique(np.asarray(blocks).astype(str), return_inverse=True)[1]
        G = int(labels.max()) + 1
        if G < 3:
            raise ValueError(f"{G} blocks to resample (at least 3)")
        df = n - P if blocks is None else G - 1
        tail = 100 * ndtr(-math.sqrt(G / df) * stdtrit(df, 0.975))
        percentiles = [tail, 100 - tail]
        refits, ends = resample(best, bootstrap, labels, np.random.default_rng(seed), progress)
        bounds = np.array([np.percentile(values(t), percentiles, axis=0) for t in [refits, *ends]])
        low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
        if ends:
            low[E], high[E] = 0, max(high[E], values(best["slid"][best["possible"]])[:, E].max())
        for name, prefactor, *interval in zip(names, best["prefactor"], low.tolist(), high.tolist()):
            intervals[name], (near, far), wide = interval, sorted(map(abs, interval)), 10 if prefactor else 4
            if interval[0] <= 0 <= interval[1] or far > wide * near:
                why.setdefault(name, f"its interval includes 0 or spans more than a factor of {wide}")
    simpler = {}
    if the.simpler and not the.simpler.keys() & fixed.keys():
        plain = solve(the.form, table, the.target, fixed | the.simpler)
        simpler = {"without": list(the.simpler), "objective": float(plain["f"]),
                   "needed": bool(plain["f"] - best["f"] > allowance(best["r"], P, len(the.simpler))),
                   "held_out": held_out(the, table, fixed | the.simpler, plain["slid"])}
    return {
        "law": law, "set": set or next(iter(LAWS[law])),
        "coefficients": dict(zip(names, values(best["theta"]).tolist())) | fixed, "fixed": list(fixed),
        "intervals": intervals, "percentiles": percentiles, "undetermined": list(why), "why": why,
        "objective": float(best["f"]), "runs": n, "simpler": simpler,
        "held_out": held_out(the, table, fixed, best["slid"]),
        "fitted": {c: [float(np.min(table[c])), float(np.max(table[c]))] for c in columns(the.form)},
        "refits": [[float(f"{v:.7g}") for v in refit] for refit in values(refits)],  # in the order of `intervals`
    }


def held_out(the, table, fixed, starts):
    """RMSE of ln L on the largest fifth of the runs (by the product of the law's columns) after a fit to the others."""
    order = np.argsort(sum(log(table[c]) for c in columns(the.form) if c != "G"), kind="stable")
    small, large = ({c: v[part] for c, v in table.items()} for part in np.split(order, [-max(1, len(order) // 5)]))
    try:
        best = solve(the.form, small, the.target, fixed, starts)
    except ValueError:  # too few runs left
        return None
    _, _, X, offset = design(the.form, large, fixed)
    r = residuals(best["theta"][None], X, offset, y := log(large[the.target]))[0]
    return {"runs": len(y), "error": float(np.sqrt(np.mean(r**2)))}


# ----------------------------------------------------------------------------------------------------------------------
# Use: predict, optimal, plan. A model is {"law", "set", "coefficients", "fitted"} of a Row, or a fit()'s report.


def published(law, set=None):
    """The model of a published row. ValueError if its paper prints no coefficients."""
    the = row(law, set)
    if the.coefficients is None:
        raise ValueError(f"set {set} of {law} has no published coefficients (give a fit of your own with --fit)")
    set = set or next(iter(LAWS[law]))
    return {"law": law, "set": set, "coefficients": the.coefficients, "fitted": the.fitted, "wrong": the.wrong}


def predict(model, **at):
    """L (nats a token), or d or g of `stacking`, at numbers `at` named as the law's columns. ValueError if infinite."""
    value = float(evaluate(row(model["law"], model["set"]).form, model["coefficients"], **at))
    if not math.isfinite(value):
        raise ValueError(f"{model['law']} {model['set']} gives {value} at {at} (stay closer to the fitted runs)")
    return value


def band(model, function, most=1000):
    """95 % interval [low, high] of function(model), a number, over the model's refits; None if it has none."""
    values, refits = [], model.get("refits", [])[:most]
    for refit in refits:
        coefficients = {**model["coefficients"], **dict(zip(model["intervals"], refit))}
        try:
            values.append(function({**model, "coefficients": coefficients}))
        except ValueError:  # this refit has no optimum
            pass
    return np.percentile(values, model["percentiles"]).tolist() if values and len(values) >= 0.9 * len(refits) else None


def outside(model, **at):
    """{column: factor} by which numbers lie outside the range of the fitted runs; empty if all are inside."""
    ranges = {name: model["fitted"].get(name, (x, x)) for name, x in at.items()}
    return {name: max(low / at[name], at[name] / high) for name, (low, high) in ranges.items()
            if not low <= at[name] <= high}


def allocate(C, A, alpha, B, beta, gamma=0):
    """N, D that minimise A N^-alpha + B D^-beta N^-gamma at C = 6 N D (Hoffmann Eq. 4; continual Eq. 8 and 9)."""
    if not (A > 0 and B > 0 and alpha > 0 and beta > gamma):
        raise ValueError(f"no optimum for A {A:.3g}, B {B:.3g}, alpha {alpha:.3g}, beta {beta:.3g}, gamma {gamma:.3g} "
                         "(needs A, B, alpha > 0 and beta > gamma)")
    s = alpha + beta - gamma
    N = (alpha * A / ((beta - gamma) * B)) ** (1 / s) * (C / 6) ** (beta / s)
    return N, C / (6 * N)


def active(N, top_k):
    """N_active of an MoE of dense size N, top_k full-width experts a token: the MLP is 8 d^2 of a block's 12 d^2."""
    return N * (1 + 2 * top_k) / 3


def optimal(model, C, experts=None, top_k=2):
    """Compute-optimal {"N", "N_active", "N_total", "D", "G", "C", "L"} for C FLOPs, as far as the law has them.

    chinchilla, continual, dense rows: closed form, C = 6 N D; moe of upcycling: the same with N_active. upcycled: N,
    D1, D2 by search, C = 6 N D1 + 6 N_active D2. fine-grained: the paper's search over G = 1, 2, 4 ... 128 and n blocks
    of width d = 64 n, routing counted: C = (72 d^2 + 14 d E G) n D. ValueError if there is no optimum.
    """
    set, c, ratio = model["set"], model["coefficients"], active(1, top_k)
    form = row(model["law"], set).form
    letters = {chinchilla: "A alpha B beta", continual: "A alpha B beta gamma", from_scratch: "B beta A alpha",
               fine_grained_dense: "a alpha b beta"}
    if form in letters:
        r = ratio if set == "moe" else 1
        N, D = allocate(C / r, *(c[letter] for letter in letters[form].split()))
        return {"N": N, "N_active": r * N, "D": D, "C": C, "L": predict(model, N=N, D=D)}
    if form is upcycling and set == "upcycled":

        def split(x):  # x: ln N and the log odds of the dense share of C
            N, share = math.exp(x[0]), 1 / (1 + math.exp(-x[1]))
            return {"N": N, "D1": share * C / (6 * N), "D2": (1 - share) * C / (6 * N * ratio)}

        start = [np.clip(log(C / 120) / 2, 0, 80), 0.0]
        found = minimize(lambda x: predict(model, **split(x)), start, method="Nelder-Mead",
                         options={"xatol": 1e-6, "fatol": 1e-12}, bounds=[(0, 80), (-12, 12)])
        at = split(found.x)
        return {**at, "N_active": at["N"] * ratio, "D": at["D1"] + at["D2"], "C": C, "L": float(found.fun)}
    if form is fine_grained:
        E = experts or {"E16": 16}.get(set, 64)

        def shape(log_n, G):  # n blocks, a real number here
            n = math.exp(log_n)
            d = 64 * n
            D = C / ((72 * d**2 + 14 * d * E * G) * n)
            return {"N": 12 * d**2 * n, "N_active": 12 * d**2 * n, "N_total": d**2 * (8 * E + 4) * n, "D": D, "G": G}

        def loss(log_n, G):
            at = shape(log_n, G)
            return predict(model, N_total=at["N_total"], D=at["D"], G=G)

        tried = [(minimize_scalar(loss, bounds=(0, 8), args=(G,), method="bounded", options={"xatol": 1e-6}), G)
                 for G in (1, 2, 4, 8, 16, 32, 64, 128)]
        found, G = min(tried, key=lambda one: one[0].fun)
        if not 0.001 < found.x < 7.999:
            raise ValueError(f"no optimum for C = {C:.4g} between 1 and 2980 blocks (give 1e17 to 1e32 FLOPs)")
        return {**shape(found.x, G), "C": C, "L": float(found.fun)}
    raise ValueError(f"no rule of allocation for {model['law']} {set} (all laws but stacking have one)")


def growth_time(model, N, D):
    """{"d", "g", "C"}: train a base of N / g parameters on d tokens, stack it g times, train on. N, D: of the target.

    Eq. 2 of the stacking paper with C = 6 N D, and its constant g. ValueError where it gives d >= D.
    """
    if model["set"] != "tokens":
        raise ValueError(f"set {model['set']} of stacking does not say when to grow (the set tokens does)")
    d = predict(model, N=N, C=6 * N * D)
    if d >= D:
        raise ValueError(f"the rule gives d = {d:.4g} tokens for the base, not below D = {D:.4g}: out of its range "
                         f"(fitted on 410M to 3B parameters; for N = {N:.4g} take a fraction of D, e.g. a tenth)")
    return {"d": d, "g": GROW, "C": 6 * N * D}


def plan(N, D1, C, models=None, top_k=2):
    """What to do with a dense model of N parameters, trained on D1 tokens, and C FLOPs more (6 N D, N_active for MoE)?

    models: {set of upcycling: model}; published Table 2 if None. Ways of one answer come from one source, so with
    `models` a way without its own is None. Returns {"ways": {name: L or None}, "best", "crossings", ...}. A crossing is
    the smallest budget (that gives the MoE between 1e7 and 1e13 tokens D2) at which two ways swap places.
    """
    why = "no fit of its set was given (--fit can be repeated); published rows are not mixed with fits"
    if models is None:
        models = {set: published("upcycling", set) for set, r in LAWS["upcycling"].items() if r.coefficients}
        why = "the stacking paper prints no coefficients of its loss L = a C^b; its rule says when, not how far"
    moe = 6 * active(N, top_k)
    every = {  # way: (set of its law, FLOPs a token, the law's arguments after D more tokens)
        "train on": ("dense", 6 * N, lambda D: {"N": N, "D": D1 + D}),
        "upcycle": ("upcycled", moe, lambda D: {"N": N, "D1": D1, "D2": D}),
        "stack": ("stacked", 6 * GROW * N, lambda D: {"N": GROW * N, "D1": D1, "D2": D}),
        "MoE from scratch": ("moe", moe, lambda D: {"N": N, "D": D}),
    }
    tokens = {way: C / price for way, (_, price, _) in every.items()}
    known = {way: (models[set], at(tokens[way])) for way, (set, _, at) in every.items() if set in models}

    def loss(way, C):
        _, price, at = every[way]
        return predict(known[way][0], **at(C / price))

    budgets = moe * np.geomspace(1e7, 1e13, 601)
    curves = {way: np.array([loss(way, C) for C in budgets]) for way in known}

    def crossing(one, other):
        gap = curves[one] - curves[other]
        swaps = np.flatnonzero(np.sign(gap[:-1]) != np.sign(gap[1:]))
        if not len(swaps):
            return None
        i = swaps[0]
        budget = brentq(lambda C: loss(one, C) - loss(other, C), budgets[i], budgets[i + 1])
        return {"flops": budget, "D2": budget / moe, "then": one if gap[i] > 0 else other}

    ways = {way: loss(way, C) if way in known else None for way in every}
    return {
        "ways": ways,
        "best": min(known, key=ways.get),
        "crossings": {f"{one} = {other}": crossing(one, other) for one, other in itertools.combinations(known, 2)},
        "why_null": {way: why for way in every if way not in known},
        "tokens": tokens,
        "outside": {way: outside(model, **at) for way, (model, at) in known.items()},
        "intervals": {way: band(model, lambda m, at=at: predict(m, **at)) for way, (model, at) in known.items()},
        "undetermined": {way: model.get("undetermined", []) for way, (model, _) in known.items()},
        "curves": {way: curve.tolist() for way, curve in curves.items()} | {"flops": budgets.tolist()},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Run folders and run tables.


def number(text, least=1e-60):
    """A float that people may write as 1e9 or 2_000_000, and a computer can multiply: from `least` to 1e60."""
    if not least <= float(text) <= 1e60:
        raise argparse.ArgumentTypeError(f"{text} (must be a finite number above 0)")
    return float(text)


def read_json(path):
    """A JSON file without NaN and Infinity."""
    return json.loads(Path(path).read_text("utf-8"), parse_constant=number)


def read_csv(path):
    """The rows of a CSV file as dicts of text. ValueError if rows and header do not match."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file (give a run table, e.g. from `laws.py table`)")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            header, *rows = [r for r in csv.reader(file) if r] or [[]]
        except csv.Error as wrong:
            raise ValueError(f"{path} is not CSV: {wrong}") from None
    for i, r in enumerate(rows, 1):
        if len(r) > len({*header}):
            raise ValueError(f"{path}, row {i} has {len(r)} cells for the columns {', '.join(header)} (one each)")
    return [dict(itertools.zip_longest(header, r, fillvalue="")) for r in rows]


def named(rows, i):
    """A row as an error calls it: its number and, in a table of laws.py, its run."""
    return f"row {i + 1}" + (f" ({rows[i]['run']})" if rows[i].get("run") else "")


def column(path, rows, name, least=1e-60):
    """The numbers of one column (n), or its text if `least` is None. ValueError names the nearest column or the row."""
    if not rows or name not in rows[0]:
        near = difflib.get_close_matches(name.lower(), rows[0], 3, 0) if rows else ["it has no rows"]
        raise ValueError(f"{path} has no column {name} (nearest: {', '.join(near)})")
    values = [r[name].strip() for r in rows]
    for i, cell in enumerate(values if least is not None else []):
        try:
            values[i] = number(cell, least)
        except DAMAGE:
            remedy = "a finite number above 0" if cell else "unknown: leave the row out"
            raise ValueError(f"{path}, {named(rows, i)}, column {name}: {cell!r} ({remedy})") from None
    return np.array(values)


def read_table(path, form, target="L", blocks=None):
    """A run table's columns as {name: array (n)}, and its block labels. ValueError names row, column and remedy."""
    rows, seen = read_csv(path), {}
    table = {name: column(path, rows, name) for name in [*columns(form), target]}
    kinds = [" ".join(f"{c} {r.get(c) or 'none'}" for c in ("E", "K") if c not in table) for r in rows]
    for i, run in enumerate(zip(*table.values())):
        if (first := seen.setdefault(run, i)) < i:
            pair = f"{named(rows, i)} repeats {named(rows, first)}"
            raise ValueError(f"{path}: {pair} in {', '.join(table)} (leave one out)")
        if kinds[i] != kinds[0]:  # a dense model and a mixture, or mixtures of another number of experts
            pair = f"{named(rows, 0)} has {kinds[0]}, {named(rows, i)} has {kinds[i]}"
            raise ValueError(f"{path}: {pair} (one law, one kind of model: leave rows out)")
    return table, column(path, rows, blocks, least=None) if blocks else None


def total(steps, what):
    """The sum of steps' tokens or flops; None (unknown) if one of them is: nothing is guessed."""
    values = [s.get(what) for s in steps if s["step"] in ("train", "source") or what in s]  # grow's learn spends too
    return None if None in values else sum(number(v, least=0) for v in values)


def share_done(last, N_active):
    """How much of a training is done, 0 to 1, by its settings; 1 if they do not say, and at a constant rate, where the
    loss at any step is that of a shorter run (elsewhere it is higher until the rate has come down)."""
    settings, tokens = last.get("settings") or {}, last["tokens"]
    spent = {"tokens": tokens, "flops": last["flops"], "tokens_per_param": tokens / (N_active or 1)}
    shares = [done / number(settings[name]) for name, done in spent.items() if settings.get(name)]
    if not shares or settings.get("schedule") == "constant":
        return 1.0
    half_step = settings.get("batch_tokens", 0) / 2 / max(tokens, 1)  # a run ends at the whole step nearest to its plan
    return 1.0 if shares[0] * (1 + half_step) >= 1 else shares[0]


def read_run(folder, corpus=None, smooth=1):
    """One run folder as {column: value}, with its evaluations under "curve": [(FLOPs with ancestors, L)].

    L is the mean of the last `smooth` evaluations on `corpus` (default: the heaviest of the last training), the counts
    are those of the last one. FileNotFoundError if there is nothing to read, ValueError if it makes no sense.
    """
    about, config, evals = (Path(folder, name) for name in ("run.json", "config.json", "eval.csv"))
    for file in (about, config, evals):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name} (give a folder that train.py wrote)")
    try:
        about, config, rows = read_json(about), read_json(config), read_csv(evals)
        weights = {name: number(data["weight"], least=0) for name, data in about["lineage"][-1]["data"].items()}
        corpora = [name.removesuffix("_loss") for name in (rows[0] if rows else ()) if name.endswith("_loss")]
        corpus = corpus or max(corpora, key=lambda c: weights.get(c, -1), default=None)
        tokens, flops = (column(evals, rows, name, least=0).tolist() for name in ("tokens", "flops"))
        L = column(evals, rows, f"{corpus}_loss").tolist()
        *before, last = about["lineage"]
        if last["step"] != "train":
            raise ValueError(f"its last step is {last['step']!r}")
        lineage = [*before, {**last, "tokens": tokens[-1], "flops": flops[-1]}]  # as far as the last evaluation
        cut = max((i for i, s in enumerate(lineage) if s["step"] in ("upcycle", "grow")), default=None)
        D1, D2 = (None, None) if cut is None else (total(part, "tokens") for part in (lineage[:cut], lineage[cut:]))
        experts, G = config.get("num_local_experts") or config.get("num_experts"), config.get("granularity", 1)
        E, K, G = (experts / G, config["num_experts_per_tok"] / G, G) if experts else (None, None, None)
        counts = {name: about.get(name) for name in ("N", "N_active", "N_total")}
        C, _ = total(before, "flops"), [number(n or 1) for n in counts.values()]
        return {
            "run": str(folder), "corpus": corpus, "L": float(np.mean(L[-smooth:])), **counts, "E": E, "K": K, "G": G,
            "D": total(lineage, "tokens"), "D1": D1, "D2": D2, "seed": last.get("seed"), "flops": flops[-1],
            "flops_total": total(lineage, "flops"), "lineage": about["lineage"], "config": config,
            "done": share_done(lineage[-1], counts["N_active"]),
            "curve": [(None if C is None else C + c, loss) for c, loss in zip(flops, L)],
        }
    except DAMAGE as wrong:
        raise ValueError(f"{folder} is damaged or no run of train.py: {type(wrong).__name__}, {wrong}") from None


def merge_seeds(runs):
    """Runs that differ in their seed alone become one: mean L and curve, deviation L_sd, how many, all "curves".
    ValueError if two of them have the seeds in common, too: nothing about chance is learnt from the same run twice."""
    unlike, groups, merged = ("seed", "out", "init", "branch", "overwrite", "resume"), {}, []
    for run in runs:
        key = json.dumps([run[k] for k in ("lineage", "config", "corpus", "N_total", "D")] + [len(run["curve"])])
        key = json.loads(key, object_hook=lambda d: {k: d[k] for k in sorted(d) if k not in unlike})
        group, seeds = groups.setdefault(str(key), {}), str([step.get("seed") for step in run["lineage"]])
        if seeds in group:
            raise ValueError(f"{group[seeds]['run']} and {run['run']} have the same seed {run['seed']} (leave one out)")
        group[seeds] = run
    for group in groups.values():
        group = [*group.values()]
        curves, losses = [run["curve"] for run in group], [run["L"] for run in group]
        merged.append({**group[0], "L": float(np.mean(losses)), "runs": len(group), "curves": curves,
                       "L_sd": float(np.std(losses, ddof=1)) if len(group) > 1 else None,
                       "seed": " ".join(str(run["seed"]) for run in group),
                       "curve": [(at[0][0], float(np.mean([loss for _, loss in at]))) for at in zip(*curves)]})
    return merged


def flops_to_reach(run, target):
    """FLOPs at which a run first reaches the loss `target`, straight in ln C between evaluations, or ValueError."""
    curve = run["curve"]
    for (c0, l0), (c1, l1) in zip([curve[0], *curve], curve):
        if l1 <= target and c1 > 0:
            return c1 if c0 <= 0 or l0 <= target else math.exp(log(c0) + log(c1 / c0) * (l0 - target) / (l0 - l1))
    lowest = min(loss for _, loss in curve)
    raise ValueError(f"{run['run']} does not train down to a loss of {target:g} (lowest: {lowest:.4f})")


def compare(runs, target=None):
    """The first run against each other one: target_loss, flops_baseline, flops_run and the stacking paper's speedup.

    The target is the higher of the two best losses unless given, so that both reach it. The speed-up is C_scratch /
    C_grown - 1 with the ancestors' FLOPs: 0.5 means that scratch costs half more. A run and its own ancestor meet where
    the later one begins, whatever it is worth: their pair is marked "ancestor" (compare with a run from scratch).
    ValueError if FLOPs are unknown or the losses are those of different texts.
    """
    first, pairs = runs[0], []
    for run in runs:
        if run["flops_total"] is None:
            raise ValueError(f"{run['run']} has an ancestor of unknown FLOPs (compare runs trained from scratch)")
        if run["corpus"] != first["corpus"]:
            raise ValueError(f"{first['run']} has its loss on {first['corpus']}, {run['run']} on {run['corpus']} "
                             "(choose one with --corpus)")
    for run in runs[1:]:
        goal = target or max(min(loss for _, loss in r["curve"]) for r in (first, run))
        scratch, grown = flops_to_reach(first, goal), flops_to_reach(run, goal)
        short, long = sorted((first["lineage"], run["lineage"]), key=len)
        pairs.append({"baseline": first["run"], "run": run["run"], "target_loss": goal, "flops_baseline": scratch,
                      "flops_run": grown, "speedup": scratch / grown - 1,
                      "ancestor": short != long and short == long[: len(short)]})
    return pairs


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


def whole(text):
    if number(text) != int(number(text)) or number(text) > 1e9:
        raise argparse.ArgumentTypeError(f"{text} (must be a whole number, 1 to 1e9)")
    return int(number(text))


def build_parser():
    """The parser: one subcommand for each function that begins with `run_`."""
    commands = "\n".join(line.strip() for line in __doc__.splitlines() if line.startswith("    python"))
    sets = [f"  {law:13}{set:17}{', '.join(columns(r.form)):14}{r.source}" + f"\n{'':17}! {r.wrong}" * bool(r.wrong)
            for law, rows in LAWS.items() for set, r in rows.items()]
    parser = argparse.ArgumentParser(
        "laws.py", "laws.py {table,fit,predict,optimal,plan,compare} ... [--help]", commands,
        "laws, sets (a law's first is its default), columns read, source, ! known flaws:\n" + "\n".join(sets),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(run, usage, help, plot=None):
        name = run.__name__.removeprefix("run_")
        sub = subparsers.add_parser(name, prog="laws.py", usage=f"laws.py {name} {usage}", help=help, description=help,
                                    allow_abbrev=False)
        sub.set_defaults(run=run)
        if usage.startswith("LAW"):
            sub.add_argument("law", metavar="LAW", help=f"one of {', '.join(LAWS)}")
        add = sub.add_argument_group("output").add_argument
        add("--json", action="store_true", help="one JSON object, for programs (default: off)")
        if plot:
            add("--plot", metavar="FILE", help=f"draw {plot} to a .png, .pdf or .svg (default: no plot)")
        return sub

    for run, *texts in (
        (run_table, "RUN ... [options] > runs.csv", "finished runs, and those below them, to one CSV"),
        (run_compare, "BASELINE RUN ... [options]", "FLOPs to equal loss, ancestors included", "losses"),
    ):
        sub = command(run, *texts)
        sub.add_argument("runs", nargs="+", metavar="RUN", help="folder written by train.py")
        add = sub.add_argument_group("reading").add_argument
        add("--corpus", metavar="NAME", help="whose loss (default: the heaviest of the last training)")
        add("--seeds", action="store_true", help="average runs that differ only in seed (default: off)")
        if run is run_table:
            add("--smooth", type=whole, default=1, help="evaluations averaged at the end (default: 1)")
        else:
            add("--target", type=number, metavar="L", help="nats a token (default: the higher best)")

    sub = command(run_fit, "LAW RUNS.CSV [options]", "fit a law to a run table", "curves, residuals and bootstrap")
    sub.add_argument("table", metavar="RUNS.CSV", help="run table with the law's columns and L")
    add = sub.add_argument_group("what is fitted").add_argument
    add("--set", metavar="NAME", help="set whose form is fitted (default: the law's first)")
    add("--first-stage", metavar="FILE", help="fit JSON to take coefficients from that the paper freezes: "
        "continual E, A, alpha; fine-grained dense c; upcycling E (default: none)")
    add = sub.add_argument_group("intervals").add_argument
    add("--bootstrap", type=whole, default=0, metavar="TIMES", help="resamples (default: none)")
    add("--blocks", metavar="COLUMN", help="resample runs that agree here as one (default: none)")
    add("--seed", type=whole, default=1, help="seed of the resampling (default: 1)")

    for run, help in ((run_predict, "the loss of a run"), (run_optimal, "the best way to spend a budget")):
        sub = command(run, "LAW [options]", help)
        add = sub.add_argument_group("the run (a law asks for what it needs, and refuses the rest)").add_argument
        add("--flops", type=number, metavar="C", help="FLOPs, as the law's paper counts them")
        add("--N", type=number, help="parameters, as the law counts them (fine-grained: N_total)")
        add("--D", type=number, help="tokens trained on")
        add("--D1", type=number, help="predict upcycling: tokens before")
        add("--D2", type=number, help="predict upcycling: tokens after")
        add("--G", type=number, help="predict fine-grained: granularity")
        add("--experts", type=number, help="optimal fine-grained: expansion rate (default: the set's)")
        add("--top-k", type=number, help="optimal upcycling: experts a token (default: 2)")
        add = sub.add_argument_group("coefficients").add_argument
        add("--set", metavar="NAME", help="published set, see laws.py --help (default: the law's first)")
        add("--fit", metavar="FILE", help="JSON of a fit of your own instead (default: none)")

    sub = command(run_plan, "--have-n PARAMS --have-d TOKENS --flops C [options]",
                  "train on, upcycle, stack, or start an MoE from scratch?", "the ways against the budget")
    add = sub.add_argument_group("what you have").add_argument
    add("--have-n", type=number, required=True, metavar="N", help="size of the dense model (required)")
    add("--have-d", type=number, required=True, metavar="D1", help="its tokens so far (required)")
    add("--flops", type=number, required=True, metavar="C", help="FLOPs from here on (required)")
    add = sub.add_argument_group("what it may become").add_argument
    add("--experts", type=number, default=8, help="experts of the MoE (default: 8, the published fit)")
    add("--top-k", type=number, default=2, help="experts a token, sets N_active (default: 2)")
    add = sub.add_argument_group("coefficients").add_argument
    add("--fit", action="append", metavar="FILE", help="fit JSON of an upcycling set; repeat for others")
    return parser


def load_fit(path):
    """A report of fit() from its JSON file, tried out in the middle of its runs. ValueError if it is none."""
    try:
        report = read_json(path)
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


def check_flags(args, needed, allowed=()):
    """ValueError for flags of the run that the law needs and misses, or has no use for."""
    text = lambda names: " ".join("--" + name.replace("_", "-") for name in names)
    given = {n for n in ("N", "D", "D1", "D2", "G", "flops", "experts", "top_k") if getattr(args, n) is not None}
    if {*needed} - given or given - {*needed, *allowed}:
        also, has = f" and takes {text(allowed)}" if allowed else "", text(sorted(given)) or "none"
        raise ValueError(f"{args.command} {args.law} needs {text(needed)}{also} (given: {has})")


def drawing(path):
    """experiments/plots.py, after a look at where the plot shall go."""
    if not path.endswith((".png", ".pdf", ".svg")) or Path(path).is_dir() or not Path(path).parent.is_dir():
        raise ValueError(f"--plot {path} (give a .png, .pdf or .svg in a folder that exists)")
    try:
        from experiments import plots
    except ImportError as missing:
        raise ValueError(f"--plot {path}: {missing} (it needs experiments/plots.py and matplotlib)") from None
    return plots


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


def run_table(args):
    found = {}  # with the snapshots and branches below a folder, each once
    for folder in map(Path, args.runs):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder (give run folders, e.g. out/*/)")
        found |= {f.resolve(): f.parent for f in sorted(folder.rglob("run.json")) if ".partial" not in str(f)}
    runs, skipped = [], []
    for folder in found.values():
        if not (folder / "eval.csv").is_file():  # e.g. upcycled and not trained since
            skipped.append(f"{folder} has no eval.csv")
        elif (run := read_run(folder, args.corpus, args.smooth))["done"] < 1:
            skipped.append(f"{folder} is left out: {100 * run['done']:.3g} % of its run")
        else:
            runs.append(run)
    if not runs:
        why = "; ".join(skipped) or "a run has run.json and eval.csv"
        raise FileNotFoundError(f"no finished run below {' '.join(args.runs)} ({why})")
    runs = merge_seeds(runs) if args.seeds else runs
    names = "run L N N_active N_total E K G D D1 D2 seed flops flops_total corpus".split()
    names += ["L_sd", "runs"] if args.seeds else []
    rows = [{name: run[name] for name in names} for run in runs]
    if args.json:
        return {"runs": rows, "skipped": skipped}
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as nothing
    corpora = sorted({run["corpus"] for run in runs})
    several = " (these do not compare: choose one with --corpus)" if len(corpora) > 1 else ""
    print(*[f"L is the loss on {', '.join(corpora)}{several}", *skipped], sep="\n", file=sys.stderr)


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
    report = fit(args.law, table, args.set, fixed, args.bootstrap, blocks, args.seed, progress=True)
    if args.plot:
        law = lambda at: evaluate(the.form, report["coefficients"], **at)
        args.plots.plot_fit(args.plot, report, table, the.target, law)
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
    flags = {c: {"N_total": "N", "C": "flops"}.get(c, c) for c in columns(the.form)}  # column: its flag
    check_flags(args, flags.values())
    at = {c: getattr(args, f) for c, f in flags.items()}
    answer = {the.target: predict(model, **at), "interval": band(model, lambda m: predict(m, **at)),
              "outside": outside(model, **at), "wrong": model.get("wrong", "")}
    if args.json:
        return answer
    print(f"{the.target} = {answer[the.target]:.6g}")
    if answer["interval"]:
        print("95 % interval {:.4g} to {:.4g}".format(*answer["interval"]))
    warn(model, answer["outside"])


def run_optimal(args):
    model = chosen_model(args)
    form = row(args.law, model["set"]).form
    if form is stacking:
        check_flags(args, ("N", "D"))
        answer = lambda m: growth_time(m, args.N, args.D)
    else:
        check_flags(args, ("flops",), {"fine-grained": ("experts",), "upcycling": ("top_k",)}.get(args.law, ()))
        answer = lambda m: optimal(m, args.flops, args.experts, args.top_k or 2)
    best = answer(model)
    most = 100 if form in (fine_grained, upcycling) else 1000  # a search for each refit takes time
    bands = {name: band(model, lambda m, name=name: answer(m)[name], most) for name in best if name not in ("C", "g")}
    factors = outside(model, **{"N": args.N} if form is stacking else {c: best[c] for c in columns(form)})
    if args.json:
        return best | {"intervals": bands, "outside": factors, "wrong": model.get("wrong", "")}
    show([["", "best", "95 % interval"]] + [[name, float(v), bands.get(name) or ""] for name, v in best.items()])
    warn(model, factors)


def run_plan(args):
    models = {} if args.fit else None
    for path in args.fit or []:
        report = load_fit(path)
        if report["law"] != "upcycling" or report["set"] in models:
            raise ValueError(f"--fit {path} is a fit of {report['law']} {report['set']} (one of each set of upcycling)")
        models[report["set"]] = report
    if args.top_k > args.experts:
        raise ValueError(f"--top-k {args.top_k:g} of --experts {args.experts:g} (at most as many as there are)")
    answer = plan(args.have_n, args.have_d, args.flops, models, args.top_k)
    answer["notes"] = [] if models else [LAWS["upcycling"]["upcycled"].wrong]
    if not models and (args.experts, args.top_k) != (8, 2):
        answer["notes"].append("the published rows are of 8 experts, top-2: others change FLOPs, not coefficients")
    if args.plot:
        args.plots.plot_plan(args.plot, answer, args)
    del answer["curves"]
    if args.json:
        return answer
    print(f"dense, {args.have_n:.3g} parameters, {args.have_d:.3g} tokens so far; {args.flops:.3g} FLOPs to spend\n")
    show([["way", "new tokens", "L", "95 % interval", ""]] + [
        [way, answer["tokens"][way], L, answer["intervals"].get(way) or "", "<- best" * (way == answer["best"])]
        for way, L in answer["ways"].items()])
    print()
    for pair, x in answer["crossings"].items():
        where = x and f"at {x['flops']:.4g} FLOPs (D2 of the MoE {x['D2']:.4g}); beyond it {x['then']} is better"
        print(f"{pair}: {where or 'never, up to D2 = 1e13'}")
    for way, factors in answer["outside"].items():
        warn({"undetermined": answer["undetermined"][way]}, factors, f"{way}: ")
    for note in [f"{way}: {why}" for way, why in answer["why_null"].items()] + answer["notes"]:
        print(f"! {note}")


def run_compare(args):
    runs = [read_run(folder, args.corpus) for folder in args.runs]
    runs = merge_seeds(runs) if args.seeds else runs
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run to compare (give a baseline and at least one other)")
    pairs = compare(runs, args.target)
    if args.plot:
        args.plots.plot_compare(args.plot, runs, pairs)
    if args.json:
        return pairs[0] | {"pairs": pairs}
    print(f"baseline {runs[0]['run']}, loss on {runs[0]['corpus']}, FLOPs with ancestors\n")
    show([["run", "target loss", "FLOPs baseline", "FLOPs run", "speed-up"]] + [
        [p["run"], p["target_loss"], p["flops_baseline"], p["flops_run"], f"{100 * p['speedup']:+.1f} %"]
        for p in pairs])
    for p in pairs:
        if p["ancestor"]:
            print(f"! {p['baseline']} and {p['run']}: one goes on from the other, so they meet where it begins "
                  "(for a speed-up give a run from scratch)")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        args.plots = drawing(args.plot) if getattr(args, "plot", None) is not None else None
        with np.errstate(all="ignore"):  # what comes out infinite is refused in words
            answer = args.run(args)  # prints for people; with --json it only returns
        if args.json:
            print(json.dumps(answer, allow_nan=False))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os._exit(0)
    except (ValueError, OSError) as wrong:
        parser.error(" ".join(str(wrong)[:1000].split()))


if __name__ == "__main__":
    main()
