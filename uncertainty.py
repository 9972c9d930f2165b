"""What a fit's numbers are worth: which coefficients the runs leave open, and how far off the others may be.

Three questions, each with its own tool:

- How much worse may a fit be, and still be as good as the best? `allowance`: what chance alone explains.
- Which coefficients do the runs leave open? `undetermined` lists them, each with its reason.
- How far off are the others? `intervals_of`: the spread of refits to resampled runs, the bootstrap.

The arrays are those of descent.py: theta (P), X (K, P, n), y (n); `best` is a Best of fitting.py.

By hand: is a floor needed? n = 20 runs, P = 5 coefficients, and the best fit misses each loss by 0.05 %: r = 0.0005,
f = 20 * 0.0005^2 / 2 = 2.5e-6. In `allowance` s = 0.0005^2 * 20 / 15 = 3.3e-7, and F(1, 15), the 95 % point of the F
distribution, is 4.54. So chance explains s / 2 * 4.54 = 7.6e-7. A fit without the floor that reaches f = 3.2e-6 cannot
be told from the best one. One with 3.3e-6 can.

Try, with the eighteen runs of descent.py and 1 % of noise, as in the second exercise of fitting.py:
1. Put 2.5 in the place of `tail`: the plain percentiles. How much shorter is the interval of E? (1.72 to 1.88 in place
   of 1.57 to 1.91. experiments/coverage_laws.py counts how often an interval misses.)
2. Give the two runs of a size the same luck: z = numpy.tile(z[:9], 2). Then draw them together, with `--blocks N`. (E
   is 1.36 to 1.92, and as blocks 1.21 to 1.97: nine witnesses know less than eighteen.)
3. Let D follow N but for a little in all eighteen: D = 20 N exp(j x), x = numpy.random.default_rng(2)
   .standard_normal(18), with L for these D and the noise of 1. What is open for j = 0.02, what for 0.05? (A, alpha, B,
   beta, as N and D are tied; B and beta, as the best fit does without their term.)
"""

import math

import numpy as np
from numpy import log
from scipy.special import fdtri, ndtr, stdtrit

from descent import HUBER, columns, descend, design, huber, residuals, slopes

TIED = 0.01  # a column whose logarithm spreads less is constant; one that others predict to 1 % of its spread is tied


def allowance(r, P, q=1):
    """How much of the objective chance alone explains: what costs less than this is no evidence.

    Hold q of the P coefficients at the truth and refit the rest. Noise makes f grow, in 95 of 100 cases by less than

        s / 2 * q * F(q, n - P),   s = mean(psi^2) / mean(psi') * n / (n - P)        (Huber 1981)

    r (n) are the residuals of the best fit, F is the F distribution's 95 % point. psi is the force of a run: r clipped
    to +- delta. psi' is its slope: 1 for |r| < delta, 0 beyond. Near its lowest point f is a parabola in a coefficient:
    a force g moves it by g / curvature, and lowers f by g^2 / (2 curvature). Hence s / 2 for each of the q. n / (n -
    P): the fit has bent towards the runs. For least squares psi(r) = r, s is the variance of the noise, and this is the
    F test. mean(psi') is the share of runs within delta of the curve. If m, the median of |r|, is above delta, these
    are too few to count. Then it is estimated from the half with |r| < m. If they are spread evenly, a part delta / m
    of them lies within delta: mean(psi') = delta / (2 m).
    """
    n, half = len(r), max(HUBER, np.median(np.abs(r)))
    curvature = np.mean(np.abs(r) <= half) * HUBER / half  # mean psi'
    s = np.mean(np.clip(r, -HUBER, HUBER) ** 2) / curvature * n / (n - P)
    return s / 2 * q * fdtri(q, n - P, 0.95)


def tied(form, table, names):
    """{coefficient: reason} for those of `names` that belong to columns which the runs do not vary independently.

    In A N^-alpha, A and alpha belong to N: if N never varies, the term is one number. Other exponents of the term
    belong to N, too, if their factor is the same in all runs, for that makes them part of the prefactor. With D = 20 N
    both terms of Chinchilla's law are powers of N: exchange them, and the fit is as good, so it cannot say which is
    which.
    """
    args = {c: np.asarray(table[c], float) for c in columns(form)}
    belong = {}  # column: its coefficients
    for c in args:  # double it, and see which factors change
        for (prefactor, powers), (_, moved) in zip(form(**args), form(**args | {c: 2 * args[c]})):
            moving = {e for e in powers if np.any(powers[e] != moved[e])}
            if moving & {*names}:
                constant = {e for e in powers if np.ptp(powers[e]) == 0}  # as good as a prefactor
                belong[c] = belong.get(c, set()) | moving | constant | {prefactor}
    logs = {c: log(args[c]) - log(args[c]).mean() for c in belong}
    groups = {c: f"{c} is the same in all runs" for c in belong if logs[c].std() < TIED}
    varied = [c for c in belong if c not in groups]
    if len(varied) > 1:
        Z = np.array([logs[c] / logs[c].std() for c in varied])
        size, V = np.linalg.eigh(Z @ Z.T / Z.shape[1])  # a direction in which the runs do not spread is a relation
        for v in V[:, size < TIED**2].T:  # size: the variance along v
            together = [c for c, weight in zip(varied, v) if abs(weight) > 0.1]  # the columns of the relation
            groups |= dict.fromkeys(together, f"{', '.join(together)} are tied: one follows from the others")
    return {name: why for c, why in groups.items() for name in names if name in belong[c]}


def undetermined(form, table, best):
    """{coefficient: reason} for those that the runs leave open. `fit` adds those whose interval is too wide.

    1. It is the floor, and a floor of 0 is possible (`solve`).
    2. One constant fits all losses as well as noise allows: then all are open.
    3. It belongs to a column that is constant or tied to another (`tied`).
    4. Its term is nothing: below a millionth of every loss.
    5. It can be changed together with others, along v, and no prediction changes: d r / d theta @ v = 0, where columns
       that hardly vary are held constant. Of two terms that no run varies, for example, only the sum counts.

    It gets the first reason that holds.
    """
    names = [name for name, free in zip(best.names, best.free) if free]
    r, share = residuals(best.theta[None], best.X, best.y)
    P, r, share = len(names), r[0], share[:, 0]  # (n), (K, n)
    floor = {best.names[best.E]: "without it the law fits as well as noise allows"} if best.possible[0] else {}
    flat = huber(best.y - np.median(best.y)).sum()  # the objective of one constant, the median
    poor = flat - best.f > allowance(r, P, max(1, P - 1))  # P - 1 coefficients less
    level = {} if poor else dict.fromkeys(names, "one constant fits all losses as well as noise allows")
    why = tied(form, table, names) | level | floor  # reasons 3, 2, 1: the next replaces the one before
    alive = best.X[share.max(1) >= 1e-6][:, best.free]
    for j in np.flatnonzero((alive == 0).all((0, 2))):
        why.setdefault(names[j], "its term is nothing: below a millionth of every loss")  # 4 and 5 fill gaps alone
    logs = {c: log(table[c]) for c in columns(form)}  # a little scatter would hide from `size` what depends on nothing
    still = {c: v if v.std() > TIED else np.full(len(v), v.mean()) for c, v in logs.items()}
    X = design(form, {c: np.exp(v) for c, v in still.items()})[2]
    J = slopes(residuals(best.theta[None], X, best.y)[1], X[:, best.free])[0].T  # (n, P)
    _, size, V = np.linalg.svd(J / np.maximum(np.abs(J).max(0), 1e-300), full_matrices=False)
    for j in np.flatnonzero((np.abs(V[size < 1e-8]) > 1e-4).any(0)):  # size: what a step of 1 along V changes
        why.setdefault(names[j], "a change of it is made good exactly by others, or changes nothing")
    return why


def resample(best, starts, free, times, blocks, seed):
    """Refits to resampled runs, theta (times, P), each from the best of `starts` (Q, P). free (P): other coefficients
    keep the value of the start. blocks (n): the number of each run's block, from 0 on."""
    count, rng, refits = blocks.max() + 1, np.random.default_rng(seed), []
    steps = 12 if len(starts) > 1 else 0  # enough to see which start leads lowest
    for i in range(0, times, 100):
        drawn = [np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(min(100, times - i))]
        w = np.array(drawn, float)[:, blocks]  # (S, n): how often each run counts
        tried = [descend(best.X, best.y, np.tile(t, (len(w), 1)), free, steps, w) for t in starts]
        first = np.argmin([f for _, f in tried], 0)
        theta = np.array([t for t, _ in tried])[first, np.arange(len(w))]
        refits.append(descend(best.X, best.y, theta, free, 100, w)[0])
    return np.concatenate(refits)


def intervals_of(best, times, blocks, seed):
    """95 % intervals {coefficient: [low, high]}, the percentiles that give them, the refits' values (times, P).

    The bootstrap draws n runs from the n runs, with replacement, refits, and repeats: the refits spread as fits to
    other runs of the same kind would. Three corrections make the intervals cover the truth about as often as they claim
    (experiments/coverage_laws.py):

    1. The spread is too small by sqrt((n - P) / n),
    2. and few runs need Student's t in place of 1.96: so the percentiles are taken further out (Hesterberg 2015).
    3. If a floor of 0 is possible, refits seldom reach both ends of what is possible. So they are repeated with the
       floor held at either end, and an interval reaches from the lowest to the highest end of all three.

    blocks: labels (n) of runs that are drawn as one, or None. Runs that share their luck, drawn one by one, would count
    as more evidence than they are. Their number takes the place of n, and their number less 1 that of n - P.
    """
    n, P = len(best.y), best.free.sum()
    labels = np.arange(n) if blocks is None else np.unique(np.asarray(blocks).astype(str), return_inverse=True)[1]
    count = int(labels.max()) + 1
    if count < 3:
        raise ValueError(f"{count} blocks to resample (at least 3)")
    df = n - P if blocks is None else count - 1
    away = math.sqrt(count / df) * stdtrit(df, 0.975)  # corrections 1 and 2: so many deviations in the place of 1.96
    tail = 100 * ndtr(-away)  # as a percentile
    starts = best.theta[None]
    if best.E is not None:  # a refit that starts at the best fit alone stays near its floor
        starts = np.tile(starts, (5, 1))
        starts[1:, best.E] = best.y.min() + log([0.02, 0.3, 0.6, 0.85])
    ways = [(starts, best.free)]
    if best.possible[0]:  # correction 3
        held = best.free & (np.arange(len(best.names)) != best.E)
        ways += [(best.slid[best.possible][[end]], held) for end in (0, -1)]
    refits = [best.values(resample(best, *way, times, labels, seed)) for way in ways]
    bounds = np.array([np.percentile(r, [tail, 100 - tail], axis=0) for r in refits])
    low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
    intervals = {best.names[j]: [float(low[j]), float(high[j])] for j in np.flatnonzero(best.free)}
    return intervals, [tail, 100 - tail], refits[0][:, best.free]
