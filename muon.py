"""Muon: an update for matrices that moves every direction by the same amount (Jordan et al., 2024).

A weight matrix W maps vectors to vectors. Its gradient G = U S V^T (the singular value decomposition) says: turn the
input direction v_i towards the output direction u_i, by s_i. In training a few s_i are large and most are small. A step
along G would move a few directions alone. Muon steps along U V^T: the same directions, all with s_i = 1.

    M = m M + (1 - m) G                                    momentum, m = 0.95
    O = U V^T of m M + (1 - m) G                           Nesterov's look ahead, made orthogonal
    W = W - lr (0.2 sqrt(max(rows, columns)) O + wd W)     wd is the weight decay

An entry of O is about 1 / sqrt(max(rows, columns)) large. The factor makes that 0.2, as large as an entry of AdamW's
updates usually is. So both optimizers can share one learning rate (2502.16982).

No decomposition is computed. The polynomial p(X) = a X + b (X X^T) X + c (X X^T)^2 X leaves U and V alone and turns
each s into a s + b s^3 + c s^5. With a, b, c as below it pushes small s up; applied five times it brings every s from
0.01 to 1 to between 0.68 and 1.14. That is near enough to 1: exact ones train no better. (This is a Newton-Schulz
iteration, tuned for speed.)

By hand: G = [[0.96, 0], [0, 0.28]] has length 1 already. p makes of it [[0.739, 0], [0, 0.863]]: for example
3.4445 * 0.28 - 4.7750 * 0.28^3 + 2.0315 * 0.28^5 = 0.863. The ratio was 3.4 and is 1.2, after one application.

Which parameters: the matrices between hidden vectors, in attention, MLP and experts. The rows of embedding, head and
router belong to a word or an expert each, and gains are no matrices: AdamW updates those, at `OTHERS` times the rate.

Left out: other polynomials, an update per head, and sharing the work out. Every rank orthogonalises every matrix but,
under --fsdp, those of experts that other ranks hold.

Try, with `train.py --hidden-size 64 --tokens 3e5 --batch-tokens 2048 --lr 0.007`:
1. Run it as it is, and with `--optimizer adamw`. (1.932 and 2.453. At its own best rates AdamW is still behind: see the
   README.)
2. Let the loop in `orthogonal` run 0 times: an update of the right length along G itself. (2.145: two fifths of what
   Muon gains are lost.)
3. Let `hidden` take embedding and head as well. (2.075.)
4. `torch.linalg.svdvals(X)` of a random X (64, 192), before and after `orthogonal`. (6.0 to 21.2; 0.68 to 1.13.)
"""

import math

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

OTHERS = 4.0  # times the rate: for embedding, head, router and gains under AdamW (experiments/LOG.md)
A, B, C = 3.4445, -4.7750, 2.0315  # a, b, c: steep at 0, where small values must come up from


def orthogonal(X):
    """U V^T, roughly, of each matrix U S V^T of X (n, rows, columns), in X's dtype. A matrix of zeros stays one."""
    if X.shape[1] > X.shape[2]:
        return orthogonal(X.mT).mT  # the smaller of X X^T and X^T X
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1 now
    for _ in range(5):
        S = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=B, alpha=C), X, beta=A)  # a X + (b S + c S S) X
    return X


def hidden(named):
    """Those of the parameters `named` {name: parameter} that Muon is for."""
    return {n: p for n, p in named.items() if ".layers." in n and p.dim() > 1 and not n.endswith("mlp.gate.weight")}


class Muon(torch.optim.Optimizer):
    """For parameters `named` {name: parameter}: a matrix (rows, columns), or those of all experts (E, rows, columns).

    A group of parameters is a batch: matrices of one shape, worked on together. On a CPU it has at most 2^19 numbers,
    which stay in the caches; elsewhere 2^26. dtype: of `orthogonal`; bfloat16 is enough, where it is fast."""

    def __init__(self, named, lr, weight_decay=0.1, momentum=0.95, dtype=None):
        batches = {}  # (rows, columns): lists of parameters
        for name, p in named.items():
            pair = name.endswith("gate_up_proj")  # two matrices in one, gate above up
            of_shape = batches.setdefault((p.shape[-2] // (1 + pair), p.shape[-1]), [[]])
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


# ---- under --fsdp a rank holds whole experts, or a part of every matrix ----------------------------------------------


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
