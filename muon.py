"""Muon: an update for matrices that moves every direction by the same amount (Jordan et al., 2024).

A gradient is a sum of directions: G = U S V^T = sum of s_i u_i v_i^T, its singular value decomposition. Adding
u_i v_i^T to a weight matrix adds u_i to its output for the input v_i. In training a few s_i are large and most are
small. A step along G moves those few directions much and the others hardly. Muon steps along U V^T: all s_i are 1.

    M = m M + (1 - m) G                                    momentum, m = 0.95
    N = m M + (1 - m) G                                    Nesterov's look ahead, with the M just made
    O = U V^T, where N = U S V^T                           the orthogonal update
    W = W - lr (0.2 sqrt(max(rows, columns)) O + wd W)     wd is the weight decay

The entries of O have a root mean square of 1 / sqrt(max(rows, columns)). The factor makes that 0.2, as large as AdamW's
updates usually are. So both optimizers can share a schedule of the learning rate (2502.16982).

No decomposition is computed. The polynomial p(X) = a X + b (X X^T) X + c (X X^T)^2 X leaves U and V alone and turns
each s into a s + b s^3 + c s^5. With a, b, c as below it pushes small s up. Applied five times, it takes every s in
[0.01, 1] to a value in [0.68, 1.14]. That is near enough to 1, as Jordan found. (This is a Newton-Schulz iteration.)

There are two ways to apply it. With S = X X^T and P = b S + c S^2 it is X <- (a + P) X, five times, with S from the new
X. Or only the small matrices go on: the new S is (a + P) S (a + P), and the product of the five factors a + P meets X
once, at the end. If X is three times as wide as high, as in an MLP, that is a third less to do. In bf16 S's rounding
errors would grow too large.

By hand: G = [[0.96, 0], [0, 0.28]] has Frobenius norm 1 (0.96^2 + 0.28^2 = 1), as `orthogonal` wants it. p makes of it
[[0.739, 0], [0, 0.863]]: for example 3.4445 * 0.28 - 4.7750 * 0.28^3 + 2.0315 * 0.28^5 = 0.863. Larger over smaller
was 3.4 and is 1.2 after one application; the small one is the larger now.

Which parameters: the matrices between hidden vectors, in attention, MLP and experts. Each row of embedding and head
belongs to one word, each row of the router to one expert, and gains are no matrices: AdamW updates those, at `OTHERS`
times the rate. An expert without tokens has a gradient of 0, but still moves along its M: its size is thrown away.

The price is arithmetic that does not depend on the number of tokens: with a matrix of n columns and rows and t tokens a
step, 30 n^3 FLOPs beside the 6 n^2 t of training, so 5 n / t of it. Small batches of wide models pay most.

Left out: other polynomials, an update per head, and sharing the work out. Every rank orthogonalises every matrix, even
the same ones. Only under --fsdp each works on the experts that it holds, and no others.

Try, with `train.py --hidden-size 64 --tokens 3e5`:
1. Run it as it is, and with `--optimizer adamw`, each at its own `--lr auto`. (1.834 and 2.372.)
2. Let the loop in `orthogonal` run 0 times, and return `X * X.shape[1] ** 0.5`: a step as long as O, along N itself.
   (2.654. So it is the directions that help, not the length.)
3. Let `hidden` take embedding and head as well. (1.969.)
4. `torch.linalg.svdvals(X)` of a random X (64, 192), before and after `orthogonal`. (6.0 to 21.2; 0.68 to 1.13.)
"""

import math

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

OTHERS = 4.0  # times the rate: for embedding, head, router and gains under AdamW (experiments/LOG.md)
A, B, C = 3.4445, -4.7750, 2.0315  # a, b, c: steep at 0, where small values must come up from


def orthogonal(X):
    """U V^T, roughly, of each matrix U S V^T of X (n, rows, columns), in X's dtype. Zeros stay zeros."""
    if X.shape[1] > X.shape[2]:
        return orthogonal(X.mT).mT  # the same, and X X^T is smaller
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1 now
    wide = X.shape[2] >= 2 * X.shape[1] and X.dtype != torch.bfloat16  # the second way
    Y = torch.eye(X.shape[1], dtype=X.dtype, device=X.device).expand(len(X), -1, -1) if wide else X
    S = X @ X.mT
    for i in range(5):
        P = torch.baddbmm(S, S, S, beta=B, alpha=C)  # b S + c S S
        Y = torch.baddbmm(Y, P, Y, beta=A)  # (a + P) Y
        if i < 4 and wide:
            S = torch.baddbmm(S, P, S, beta=A)  # (a + P) S,
            S = torch.baddbmm(S, P, S, beta=A)  # and once more: the same as (a + P) S (a + P), as P and S commute
        elif i < 4:
            S = Y @ Y.mT
    return Y @ X if wide else Y


def hidden(named):
    """Those of the parameters `named` {name: parameter} that Muon is for."""
    return {n: p for n, p in named.items() if ".layers." in n and p.dim() > 1 and not n.endswith("mlp.gate.weight")}


class Muon(torch.optim.Optimizer):
    """For parameters `named` {name: parameter}: a matrix (rows, columns), or those of all experts (E, rows, columns).

    A group of parameters is a batch: matrices of one shape, worked on together. It is full at 2^19 numbers on a CPU,
    for its caches, else at 2^26; a larger parameter is a batch alone. dtype: of `orthogonal`; bfloat16 is enough."""

    def __init__(self, named, lr, weight_decay=0.1, momentum=0.95, dtype=None):
        batches = {}  # (rows, columns): lists of parameters
        for name, p in named.items():
            parts = 2 if name.endswith("gate_up_proj") else 1  # gate above up: two matrices
            of_shape = batches.setdefault((p.shape[-2] // parts, p.shape[-1]), [[]])
            most = 2**19 if p.device.type == "cpu" else 2**26
            if of_shape[-1] and sum(map(torch.numel, of_shape[-1])) + p.numel() > most:
                of_shape.append([])
            of_shape[-1].append(p)
        groups = [{"params": batch, "shape": shape} for shape, lists in batches.items() for batch in lists]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, m, shape = group["lr"], group["momentum"], group["shape"]
            params = [p for p in group["params"] if p.grad is not None]
            ahead = []
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                M = state["momentum_buffer"].lerp_(p.grad, 1 - m)
                ahead.append(gathered(p.grad.lerp(M, m).to(dtype=self.dtype)).reshape(-1, *shape))
            if not params:
                continue
            O = orthogonal(torch.cat(ahead))
            for p, part in zip(params, O.split(list(map(len, ahead)))):
                W = p.to_local() if isinstance(p, DTensor) else p
                W.mul_(1 - lr * group["weight_decay"])
                W.add_(own_part(part, p).reshape(W.shape), alpha=-lr * 0.2 * math.sqrt(max(shape)))


# ---- under --fsdp a rank holds whole experts, or a slice of each matrix ----------------------------------------------


def holds_whole_experts(p):
    return p.dim() == 3 and p.placements == (Shard(0),)


def gathered(t):
    """The whole matrices that this rank must orthogonalise, of a tensor that may be sharded."""
    if not isinstance(t, DTensor):
        return t
    return t.to_local() if holds_whole_experts(t) else t.full_tensor()


def own_part(whole, p):
    """What this rank holds of `whole`, the update of p."""
    if not isinstance(p, DTensor) or holds_whole_experts(p):
        return whole
    whole = whole.reshape(p.shape)
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()  # cuts; sends nothing
