"""The lowest point of a fit: a sum of power laws, its gradient, and a descent from many starts side by side.

A law of training is a sum of power laws, for example Chinchilla's

    L(N, D) = E + A N^-alpha + B D^-beta

A form says so: a function of the runs' columns that lists its terms. A term is a prefactor and {exponent: the factor
that it multiplies}. The logarithm of a term is linear in ln A and alpha: ln(A N^-alpha) = ln A + alpha (-ln N).

    [("E", {}), ("A", {"alpha": -log(N)}), ("B", {"beta": -log(D)})]

Prediction, gradient and fit follow from this list alone. `design` makes arrays of it, for n runs:

    theta = (ln E, ln A, ln B, alpha, beta)            P = 5 coefficients; of the prefactors the logarithms
    y (n)                                              ln of the measured losses
    X (K, P, n)                                        K = 3 terms: ln of term k of run i is theta @ X[k, :, i]

    E            X[0] = [1, 0, 0, 0, 0]                the same in every run
    A N^-alpha   X[1] = [0, 1, 0, -ln N, 0]            ln A + alpha (-ln N), with the run's N
    B D^-beta    X[2] = [0, 0, 1, 0, -ln D]

The fit is that of Hoffmann et al. 2022, Appendix D.2:

    minimise f = sum over runs of Huber(r),   r = ln(predicted L) - ln L

f has several valleys, so many starts are tried: 5 E x 6 A x 6 B x 5 alpha x 5 beta = 4,500. The best 300 take 5 steps
downhill, the best 60 of these 10 more, the best 10 of these 60 more. The best 4 are polished. f is a sum, not a mean. A
mean is so small that optimisers stop early, as in the published fit of Chinchilla (Besiroglu et al. 2024).

By hand: E = 1, A = B = 100, alpha = beta = 0.5, and a run with N = D = 10^4. Each power law gives 100 / sqrt(10^4) = 1,
so L = 1 + 1 + 1 = 3. Each term is a third of L, so A + 3 % gives L + 1 %. In general d ln L / d ln A is the term's
share of L, and d ln L / d alpha is this share times its factor -ln N, here -9.2 / 3. Suppose that L = 3.3 was measured.
Then r = ln(3 / 3.3) = -0.095, far beyond delta = 0.001. Huber(r) = 0.001 (0.095 - 0.0005). Its slope, the force on the
fit, is at most 0.001. A run that is off by 0.1 % pulls as hard: no single bad run bends the fit.

Try, with a table of eighteen runs: N = 1e8, 2e8, 4e8 ... 2.56e10 with D = 20 N, then the same N with D = 100 N, and L
from `laws.py predict chinchilla --json`. `laws.py fit chinchilla` finds the law again.
1. Make the loss of N = 1.6e9, D = 20 N 1.5 times as high. How far does E move? Set HUBER = 10, which makes least
   squares of the fit, and try again. (With Huber's loss from 1.817 to 1.816. With least squares to 0: all coefficients
   bend to that one run.)
2. Descend 75 steps from the best 300 points of the grid, and count the fits with f below 1e-6. Then from 300 random
   points of it. (204; about 120. The others are in other valleys, or still on the way.)
3. Damp all coefficients alike, `damp = damping[:, None] * diagonal.mean(1, keepdims=True)`, and count again. (123 in
   place of 204: alpha needs small steps, and ln A is then held to them, too.)
"""

import inspect
import math

import numpy as np
from numpy import log
from scipy.optimize import least_squares

HUBER = 1e-3  # delta, on the log loss. Another loss: `huber`, `reweight`, `loss` in `polish`; psi in `allowance`
FAR = 600  # ln of a prefactor, or an exponent times its factor: a term that has died feels no force, and could run off


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


def huber(r):
    """r^2 / 2 near 0, then delta (|r| - delta / 2): an outlier pulls with a force of delta, however far it lies."""
    a = np.abs(r)
    return np.where(a <= HUBER, 0.5 * r**2, HUBER * (a - 0.5 * HUBER))


def reweight(r):
    """The weight h with which h r is the slope of Huber's loss: 1 near 0, delta / |r| beyond."""
    return np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-300))


def residuals(theta, X, y):
    """For S fits theta (S, P): r = ln predicted - y (S, n), and each term's share of the prediction (K, S, n)."""
    Z = theta @ X  # (K, S, n): ln of each term
    top = Z.max(0)  # the largest is taken out before exp, which would overflow at a far start
    Z = np.exp(Z - top)
    total = Z.sum(0)
    return top + log(total) - y, Z / total


def slopes(share, X):
    """J = d r / d theta (S, P, n): the sum over the terms of share (K, S, n) times X (K, P, n)."""
    return np.einsum("ksn,kpn->spn", share, X)


def descend(X, y, theta, free, steps, weights=1.0):
    """Levenberg-Marquardt for S fits at once: theta (S, P) -> theta, objective f (S). weights: (S, n) or 1. free (P):
    other coefficients keep the theta they have.

    Each step d solves (H + damping) d = -g, where J = d r / d theta, and g = J^T h r is the gradient of f. H = J^T h J
    is the curvature of least squares in which each run has the weight h. (Huber's own is 0 beyond delta, and would
    give no step.) Little damping gives Newton's long step, much of it a short one straight down. A step that does not
    lower f is not taken, and the next one is damped more. The damping is a multiple of H's own diagonal (Marquardt
    1963), so each coefficient has a step of its own size: 1 more in alpha changes far more than 1 more in ln A.
    """
    damping, reach = np.full(len(theta), 1e-2), np.abs(X).max((0, 2))  # reach: the largest factor of each
    r, share = residuals(theta, X, y)
    f = (weights * huber(r)).sum(1)
    for _ in range(steps):
        J = slopes(share, X[:, free])
        h = weights * reweight(r)
        H, g = (J * h[:, None]) @ J.transpose(0, 2, 1), (J * h[:, None]) @ r[:, :, None]
        diagonal = np.einsum("spp->sp", H)
        damp = damping[:, None] * diagonal
        damp += 1e-10 * diagonal.max(1, keepdims=True) + 1e-300  # for a coefficient that changes nothing: diagonal 0
        trial = theta.copy()
        trial[:, free] -= np.linalg.solve(H + damp[:, :, None] * np.eye(free.sum()), g)[:, :, 0]
        r2, share2 = residuals(trial, X, y)
        f2 = (weights * huber(r2)).sum(1)
        better = (f2 < f) & ((np.abs(trial) * reach).max(1) < FAR)
        theta, f = np.where(better[:, None], trial, theta), np.where(better, f2, f)
        r, share = np.where(better[:, None], r2, r), np.where(better[:, None], share2, share)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
    return theta, f


def polish(X, y, theta, free):
    """The last digits of one fit: theta (P) -> theta (P) and its objective, by SciPy's least squares."""

    def at(values):  # theta (1, P) with these free coefficients
        moved = theta[None].copy()
        moved[:, free] = values
        return moved

    def jacobian(values):
        return slopes(residuals(at(values), X, y)[1], X[:, free])[0].T  # (n, P)

    with np.errstate(all="ignore"):  # SciPy warns of a coefficient that changes nothing
        found = least_squares(lambda values: residuals(at(values), X, y)[0][0], theta[free], jacobian, x_scale="jac",
                              loss="huber", f_scale=HUBER, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=200)
    near = (np.abs(found.x) * np.abs(X[:, free]).max((0, 2))).max() < FAR
    last = at(found.x if near else theta[free])
    return last[0], huber(residuals(last, X, y)[0]).sum()


def hoffmann_grid(prefactor, E, X, size=4500):
    """Starts (S, P): ln E in -1 .. 1, ln of other prefactors in 0 .. 25. Exponents: five from 0 to 2, with the sign
    that makes the term fall. Where their mean factor exceeds 20 (ln N from 5e8 on) up to 40 / it, as e^-40 is nothing.
    A random `size` of the grid's points if it has more."""
    axes = []
    for j in range(len(prefactor)):
        factor = X[:, j][X[:, j] != 0]
        typical = factor.mean() if len(factor) and factor.mean() else 1.0
        exponents = np.arange(0, 2.5, 0.5) * -np.sign(typical) * min(1, 20 / abs(typical))
        axes.append(np.arange(-1, 1.5, 0.5) if j == E else np.arange(0, 30, 5.0) if prefactor[j] else exponents)
    shape = [len(a) for a in axes]
    every = math.prod(shape)
    chosen = np.arange(every) if every <= size else np.random.default_rng(0).choice(every, size, replace=False)
    return np.stack([a[i] for a, i in zip(axes, np.unravel_index(chosen, shape))], 1)


def search(X, y, starts, free):
    """Best theta (P) and objective: every start evaluated, then fewer and fewer of them taken further and further."""
    chunk = max(1, 1_500_000 // X.shape[2])  # keeps the arrays of the first look small, however many runs there are
    f = [descend(X, y, starts[i : i + chunk], free, 0)[1] for i in range(0, len(starts), chunk)]  # 0 steps
    theta = starts[np.argsort(np.concatenate(f))[:300]]
    for steps, keep in ((5, 60), (10, 10), (60, 4)):
        theta, f = descend(X, y, theta, free, steps)
        theta = theta[np.argsort(f)[:keep]]
    return min((polish(X, y, t, free) for t in theta), key=lambda result: result[1])
