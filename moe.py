"""
The mixture-of-experts layer: many MLPs side by side, of which each token uses a few.

A dense transformer sends every token through the same MLP. Here a layer holds E MLPs, the experts. A router, one
matrix, looks at a token and picks K of them (Shazeer et al., 1701.06538). Parameters grow with E, arithmetic with K:

    l_i = r_i . x                                         a logit for each expert i; r_i is a row of the router
    y   = sum over the K largest l_i of s_i expert_i(x)   expert_i(x) = down_i (silu(gate_i x) * up_i x), a SwiGLU

Choosing has no gradient. The router learns only through the scores s. There are two ways to compute them:

    topk-softmax    softmax over the K chosen logits: the scores sum to one (Mixtral, 2401.04088). The default.
    softmax-topk    softmax over all E logits: each chosen expert keeps its share (Switch, 2101.03961).

By hand: three tokens, four experts, K = 2. The table shows exp(l). A softmax is then a share of the sum.

              exp(l)      chosen   topk-softmax   softmax-topk
    token a   4 2 1 1     0, 1     4/6, 2/6       4/8, 2/8
    token b   1 1 4 2     2, 3     4/6, 2/6       4/8, 2/8
    token c   5 1 1 1     0, 1     5/6, 1/6       5/8, 1/8       of equal logits, the lower index is chosen

Expert 0 computes tokens a and c, multiplies them by their scores, and adds them to y. Then comes expert 1, and so on.
`reference` is that loop. `loop` and `grouped` compute the same sum faster.

Granularity G (2402.07871) cuts each expert into G narrow ones and gives a token G times as many. Parameters and
arithmetic stay, but for more router rows. The choice grows: 2 of 8 experts make 28 teams, 4 of 16 make 1820. Expert e
becomes experts e G to e G + G - 1. In all files, the letters E, K and F count what is there after the cut:
E = experts G, K = top_k G, F = intermediate_size / G. The names of the flags count what was there before it.

A router left alone soon uses few experts: `statistics` has the losses against it. And the output must be as large as
that of the dense layer: see `output_scale`.

Left out on purpose. Expert choice, also the router of 2402.07871: experts pick tokens, so a token's experts depend on
later tokens. That paper's LayerNorm on the output, which `output_scale` replaces at initialisation. Shared experts,
which every token uses: 2410.07524 found no gain from them when upcycling (starting experts as copies of an MLP).

Try, with `--optimizer adamw --lr 3e-3 --batch-tokens 4096 --num-attention-heads 4` in every training:
1. Let `output_scale` return 1.0. Predict the losses of `train.py --experts 8 --top-k 2 --granularity 8 --tokens 3e5`.
   (It starts at 5.48 in place of 5.56, and ends at 2.414 in place of 2.370. The layer's variance is 1 / (top_k G^2) =
   1/128 of what it should be. The last norm hides that at the start.)
2. Tie two experts: `logit = torch.randn(8000, 8); logit[:, 1] = logit[:, 0]; moe.count(moe.largest(logit, K), 8)`.
   (Seed 0, K = 1: expert 0 gets 1147 tokens, expert 1 none. K = 2: expert 1 gets those 1147, and expert 0 gets 2268,
   for it also wins where the pair ranks second and one place is left.)
3. Balance without a loss, as DeepSeek-V3 does (2412.19437). In `__init__` put `self.bias = 0.0`. In `route` add it to
   `choice_TE`. After `aux`, in training, add `0.1 * (aux["counts"].float().mean() - aux["counts"]).sign()` to it. Run
   `train.py --experts 8 --top-k 2 --balance-coef 0 --tokens 3e5`. (max_violation, what the busiest expert has above an
   even share, ends at 0.27 shares. Without the bias 2.85, where 3 is the worst; with the default loss 0.87.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# A tensor's suffix names its axes: T tokens, K experts per token, E experts, D hidden, F width of an expert, H = 2 F
# (gate and up, one below the other), P = T K pairs of token and expert, R the pairs of one expert.


# ---- routers --------------------------------------------------------------------------------------------------------


class Router(NamedTuple):
    weigh: Callable  # scores (T, K) from the logits (T, E) and the chosen experts (T, K)
    inverse_score: Callable  # from E and K: 1 / score when all logits are equal
    least_K: int  # with fewer experts a token the score is constant, and the router has no gradient


def softmax_of_chosen(logit_TE, expert_TK):
    return logit_TE.gather(1, expert_TK).softmax(-1)


def chosen_of_softmax(logit_TE, expert_TK):
    return (logit_TE.gather(1, expert_TK) - logit_TE.logsumexp(-1, keepdim=True)).exp()


ROUTERS = {  # another one also needs a public format: see ROUTER in configuration.py
    "topk-softmax": Router(softmax_of_chosen, lambda E, K: K, least_K=2),  # a single score is always 1
    "softmax-topk": Router(chosen_of_softmax, lambda E, K: E, least_K=1),
}


def check(hidden_size, intermediate_size, experts, top_k, granularity, router, capacity_factor):
    """Raise ValueError, with value and remedy, on a layer that cannot be built or cannot learn."""
    sizes = dict(hidden_size=hidden_size, intermediate_size=intermediate_size, experts=experts, top_k=top_k)
    for name, value in (sizes | dict(granularity=granularity)).items():
        if value != int(value) or value < 1:
            raise ValueError(f"{name} is {value} (a whole number of at least 1)")
    if top_k > experts:
        raise ValueError(f"top_k {top_k} is more than there are experts, {experts} (top_k at most {experts})")
    if intermediate_size % granularity:
        divisors = [g for g in range(1, intermediate_size + 1) if intermediate_size % g == 0]
        near = [g for g in divisors if g < granularity][-1:] + [g for g in divisors if g > granularity][:1]
        low = intermediate_size // granularity * granularity
        widths = [f for f in (low, low + granularity) if f]
        raise ValueError(
            f"granularity {granularity} does not divide intermediate_size {intermediate_size} (granularity "
            f"{' or '.join(map(str, near))}, or intermediate_size {' or '.join(map(str, widths))})"
        )
    if router not in ROUTERS:
        raise ValueError(f"router is {router!r} ({' or '.join(ROUTERS)})")
    if top_k * granularity < ROUTERS[router].least_K:
        raise ValueError(
            f"router {router} with one expert a token scores it 1, without gradient (softmax-topk, or top_k 2)"
        )
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor is {capacity_factor} (above 0, such as 1.25; leave it out to drop nothing)")


# ---- the size of the output -----------------------------------------------------------------------------------------
# The scores are below one and the narrow experts small, so the output is small too. A factor on down_proj makes up for
# it. Let s be the score when all logits are equal. G narrow experts with score s make one full-width MLP times s, and a
# token has top_k such groups:
#
#     copies of one MLP add amplitudes         s top_k MLP(x)            so the factor is 1 / (s top_k)
#     independent experts add variances        s^2 top_k var(MLP(x))     so the factor is 1 / (s sqrt(top_k))
#
# With topk-softmax, top_k 2 and G 8, s is 1/16. Copies need the factor 8, independent experts 8 sqrt(2) = 11.3.


def copy_scale(experts, top_k, granularity, router):
    """Factor on down_proj that gives back the output of an MLP from copies of it; upcycling needs it."""
    return ROUTERS[router].inverse_score(experts * granularity, top_k * granularity) / top_k


def output_scale(experts, top_k, granularity, router):
    """Factor on the initial down_proj that gives the layer the variance of the dense layer that it replaces.

    It holds while logits are small, so the router starts small. As a softmax-topk router sharpens, s and the output
    grow. A factor of 1 in its place is 0.03 to 0.10 nats ahead after half a million tokens, with either router and any
    top_k and G that was tried. After two million it is level, or 0.02 behind (experiments/LOG.md)."""
    return copy_scale(experts, top_k, granularity, router) * math.sqrt(top_k)


# ---- the layer ------------------------------------------------------------------------------------------------------


class MoE(nn.Module):
    """y, aux = moe(x) with x and y (..., D). Its weights are left uninitialised: model.py fills them.

    aux: the entries of `statistics`, and dropped, the share of pairs of token and expert that found no place. Losses
    are not added to anything: the trainer weighs them. y has autocast's dtype, if on. Raises what `check` raises."""

    def __init__(self, hidden_size, intermediate_size, experts, top_k, granularity=1, router="topk-softmax",
                 capacity_factor=None):  # fmt: skip
        super().__init__()
        check(hidden_size, intermediate_size, experts, top_k, granularity, router, capacity_factor)
        D, E, width = hidden_size, experts * granularity, intermediate_size // granularity
        self.K, self.router, self.capacity_factor = top_k * granularity, router, capacity_factor
        self.gate = nn.Linear(D, E, bias=False)  # the router, under its public name
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.experts.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x):
        x_TD = x.reshape(-1, x.shape[-1])
        gate_up_EHD, down_EDF = self.experts.gate_up_proj, self.experts.down_proj
        device, dtype = x.device.type, gate_up_EHD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # the fast ways below cast by hand
        with torch.autocast(device, enabled=False):
            # 1. Route: each token chooses its experts and gets a score for each.
            score_TK, expert_TK, aux = self.route(x_TD)
            # 2. Capacity, in training: an expert that is full scores 0. The rest is not renormalised.
            if self.capacity_factor is not None and self.training:
                keep_TK = within_capacity(expert_TK, len(gate_up_EHD), self.capacity_factor)
                score_TK, aux["dropped"] = score_TK * keep_TK, 1 - keep_TK.to(score_TK.dtype).mean()
            # 3. Compute: each expert on its own tokens.
            compute = grouped if can_group(x.device, dtype, down_EDF) else loop
            y_TD = compute(x_TD.to(dtype), score_TK, expert_TK, gate_up_EHD, down_EDF)
        # 4. Give back, in the shape of x. A token that no expert took gets zeros: the residual stream passes it on.
        return y_TD.view(x.shape), aux

    def route(self, x_TD):
        """Scores and indices (T, K) of the chosen experts, and aux, from x (T, D). In float32, or in the weights' dtype
        if wider: with the 8 bits of bfloat16, near logits would tie."""
        weight_ED = self.gate.weight
        dtype = torch.promote_types(weight_ED.dtype, torch.float32)
        logit_TE = F.linear(x_TD.to(dtype), weight_ED.to(dtype))
        choice_TE = logit_TE.detach()  # by this a token chooses: a bias added here leaves the scores alone
        expert_TK = largest(choice_TE, self.K)
        aux = statistics(logit_TE, expert_TK)
        score_TK = ROUTERS[self.router].weigh(logit_TE, expert_TK)  # by this it weighs what it chose
        return score_TK, expert_TK, aux


def largest(choice_TE, K):
    """Indices (T, K) of the K largest in each row, the largest first, and of equals the lower index first. torch.topk
    breaks ties as it likes. Upcycling gives the parts of one expert equal logits: here they are chosen together."""
    if K == 1:
        return choice_TE.argmax(dim=-1, keepdim=True)  # the first of equals
    return choice_TE.argsort(dim=-1, descending=True, stable=True)[:, :K]


def count(expert_TK, E):
    """How many tokens chose each expert, (E,). torch.bincount would wait for the device."""
    expert_P = expert_TK.reshape(-1)
    return torch.zeros(E, dtype=torch.int64, device=expert_P.device).scatter_add(0, expert_P, torch.ones_like(expert_P))


def statistics(logit_TE, expert_TK):
    """balance_loss and z_loss (scalars with gradient), counts (E,), dropped (0 as yet) and entropy (nats a token).

    An expert that is used more learns more, and is then used more still. The first loss leans against that, the second
    keeps logits small:

        balance = E / (T K) sum_i n_i mean_t p_ti     n_i tokens chose i; p is the softmax over all E logits (Switch)
        z       = mean_t (log sum_i exp l_ti)^2       (ST-MoE, 2202.08906)

    balance is 1 when p is uniform, and E / K when K experts take every token and all of p. The counts have no
    gradient: the loss lowers p where n is large. In the example at the top n is 2 2 1 1, the means of p are 10/24,
    4/24, 6/24 and 4/24, and balance is 4/6 (2 * 10 + 2 * 4 + 1 * 6 + 1 * 4) / 24 = 19/18."""
    (T, E), K = logit_TE.shape, expert_TK.shape[1]
    z_T = logit_TE.logsumexp(-1)
    p_TE = (logit_TE - z_T[:, None]).exp()
    counts_E = count(expert_TK, E)
    return dict(
        balance_loss=E / (T * K) * (counts_E * p_TE.mean(0)).sum(),
        z_loss=z_T.square().mean(),
        counts=counts_E,
        dropped=torch.zeros_like(z_T[0]),
        entropy=(z_T - (p_TE * logit_TE).sum(-1)).mean().detach(),  # -sum p log p, with log p = l - z
    )


def within_capacity(expert_TK, E, capacity_factor):
    """True (T, K) for the pairs that find a place. An expert has ceil(capacity_factor T K / E) of them, and the first
    tokens of the call take them: window by window, and in a window by position.

    So a token's output does not depend on the tokens after it in its window, nor on the windows after its own. It does
    depend on the windows before its own, and on the number of tokens in the call. Were places given to the best scores
    (V-MoE, 2106.05974), a later token could push out an earlier one. Capacity bounds what an expert learns from in one
    step. It saves no time."""
    T, K = expert_TK.shape
    chosen_TE = torch.zeros(T, E, dtype=torch.int32, device=expert_TK.device).scatter(1, expert_TK, 1)
    rank_TK = chosen_TE.cumsum(0, dtype=torch.int32).gather(1, expert_TK)  # 1 for the first token of an expert
    return rank_TK <= math.ceil(capacity_factor * T * K / E)


# ---- the sum: first as it is written, then twice as it is fast ------------------------------------------------------


def swiglu(x_RD, gate_up_HD, down_DF):
    """down (silu(gate x) * up x) for each row x: the MLP of one expert."""
    gate_RF, up_RF = (x_RD @ gate_up_HD.to(x_RD.dtype).T).chunk(2, dim=-1)
    return (F.silu(gate_RF) * up_RF) @ down_DF.to(x_RD.dtype).T


def reference(x_TD, score_TK, expert_TK, gate_up_EHD, down_EDF):
    """y_t = sum over k of score_tk expert_tk(x_t), (T, D): each expert gathers its tokens, computes, and adds.

    x (T, D), scores and chosen experts (T, K), the matrices of all experts (E, 2 F, D) and (E, D, F)."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(gate_up_EHD)):
        token_R, k_R = (expert_TK == e).nonzero(as_tuple=True)  # who chose e, and as which of the K choices
        y_RD = swiglu(x_TD[token_R], gate_up_EHD[e], down_EDF[e])
        y_TD = y_TD.index_add(0, token_R, score_TK[token_R, k_R, None].to(x_TD.dtype) * y_RD)
    return y_TD


# Now the fast ways. Both sort the pairs of token and expert by expert: each expert finds its tokens together. Both
# multiply the hidden activations by the score, not the output: down is linear, and they are fewer numbers if F < D.
#
#     loop       still one expert after the other, which keeps it in a CPU's cache; the gradient is by hand
#     grouped    one product for all experts: static shapes. CUDA in bfloat16. Nothing waits for the host on compute
#                capability 9 and 10 (H100, B200); on other cards torch loops over the experts itself, and waits


@torch.compiler.disable  # group sizes are data here: nothing to compile
def loop(x_TD, score_TK, expert_TK, gate_up_EHD, down_EDF):
    """`reference` for a CPU; takes and returns the same. On an accelerator it waits once, for the group sizes.

    In 16 bits a CPU compiles its products anew for every number of rows. So groups are padded to multiples of 8, or of
    1/32 of their mean if that is more: a few sizes, for a few rows more."""
    (T, K), dtype = score_TK.shape, x_TD.dtype
    multiple = max(8, T * K // len(gate_up_EHD) // 32) if dtype.itemsize == 2 else 1
    order_P = expert_TK.reshape(-1).argsort(stable=True)  # pairs p = t K + k in the order of their experts
    groups = order_P.split(count(expert_TK, len(gate_up_EHD)).tolist())
    groups = [F.pad(pair_R, (0, -len(pair_R) % multiple), value=T * K) for pair_R in groups]  # pair T K: score 0
    pair_P, sizes = torch.cat(groups), [len(pair_R) for pair_R in groups]
    score_P = F.pad(score_TK.reshape(-1), (0, 1)).index_select(0, pair_P).to(dtype)
    sum_dtype = dtype if K == 1 else torch.promote_types(dtype, torch.float32)  # with K = 1 nothing is summed
    return Loop.apply(x_TD, score_P, gate_up_EHD, down_EDF, pair_P // K % T, sizes, sum_dtype)


class Loop(torch.autograd.Function):
    """For each expert, with h = [gate; up] x, a = silu(gate) * up, s the score and W, V its matrices: y += V (s a).

    Autograd would allocate a gradient of the size of x for each expert's gather. By hand, from dy:
        da = V^T dy    ds = a . da    dV = dy (s a)^T
        dh = s [silu'(gate) * up * da; silu(gate) * da]          silu' is the derivative; [;] is one below the other
        dW = dh x^T    dx += W^T dh"""

    @staticmethod
    def forward(ctx, x_TD, score_P, gate_up_EHD, down_EDF, token_P, sizes, sum_dtype):
        dtype = x_TD.dtype
        y_TD = torch.zeros_like(x_TD, dtype=sum_dtype)
        hidden = []
        for e, (token_R, score_R) in enumerate(zip(token_P.split(sizes), score_P.split(sizes))):
            if len(token_R) == 0:
                continue
            hidden_RH = x_TD.index_select(0, token_R) @ gate_up_EHD[e].to(dtype).T
            gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
            act_RF = F.silu(gate_RF).mul_(up_RF).mul_(score_R[:, None])
            y_TD.index_add_(0, token_R, (act_RF @ down_EDF[e].to(dtype).T).to(sum_dtype))
            hidden.append(hidden_RH)
        ctx.save_for_backward(x_TD, score_P, gate_up_EHD, down_EDF, token_P, *hidden)
        ctx.sizes, ctx.sum_dtype = sizes, sum_dtype
        return y_TD.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TD):
        x_TD, score_P, gate_up_EHD, down_EDF, token_P, *hidden = ctx.saved_tensors
        dtype = x_TD.dtype
        dx_TD, dscore_P = torch.zeros_like(x_TD, dtype=ctx.sum_dtype), torch.empty_like(score_P)
        dgate_up_EHD, ddown_EDF = torch.empty_like(gate_up_EHD), torch.empty_like(down_EDF)
        groups = zip(*(a_P.split(ctx.sizes) for a_P in (token_P, score_P, dscore_P)))
        for e, (token_R, score_R, dscore_R) in enumerate(groups):
            if len(token_R) == 0:
                dgate_up_EHD[e], ddown_EDF[e] = 0, 0
                continue
            x_RD, dy_RD = x_TD.index_select(0, token_R), dy_TD.index_select(0, token_R)
            gate_RF, up_RF = hidden.pop(0).chunk(2, dim=-1)
            silu_RF = F.silu(gate_RF)
            act_RF = silu_RF * up_RF
            dact_RF = dy_RD @ down_EDF[e].to(dtype)
            torch.sum(dact_RF * act_RF, dim=-1, out=dscore_R)
            product(dy_RD.T, act_RF.mul_(score_R[:, None]), out=ddown_EDF[e])
            dact_RF.mul_(score_R[:, None])  # from here on s da
            dgate_RF = torch.ops.aten.silu_backward(dact_RF * up_RF, gate_RF)  # silu'(gate) times the former
            dhidden_RH = torch.cat([dgate_RF, dact_RF.mul_(silu_RF)], dim=-1)
            product(dhidden_RH.T, x_RD, out=dgate_up_EHD[e])
            dx_TD.index_add_(0, token_R, (dhidden_RH @ gate_up_EHD[e].to(dtype)).to(dx_TD.dtype))
        return dx_TD.to(dtype), dscore_P, dgate_up_EHD, ddown_EDF, None, None, None


def product(a, b, out):
    """out = a b, without a copy where the dtypes allow it (they differ under autocast: float32 gradients)."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def can_group(device, dtype, down_EDF):
    """grouped_mm needs bfloat16, an Ampere GPU or later, and rows that are whole multiples of 16 bytes."""
    aligned = down_EDF.shape[1] % 8 == 0 and down_EDF.shape[2] % 8 == 0
    return (device.type == "cuda" and dtype == torch.bfloat16 and aligned
            and torch.cuda.get_device_capability(device) >= (8, 0))  # fmt: skip


def grouped(x_TD, score_TK, expert_TK, gate_up_EHD, down_EDF):
    """`reference` as two products over all pairs, sorted by expert; takes and returns the same."""
    (T, K), dtype = score_TK.shape, x_TD.dtype
    order_P = expert_TK.reshape(-1).argsort(stable=True)  # pairs p = t K + k in the order of their experts
    rows_P = torch.arange(T * K, device=x_TD.device)
    place_TK = torch.empty_like(order_P).scatter(0, order_P, rows_P).view(T, K)  # the inverse: the row of pair (t, k)
    token_P1 = (order_P // K)[:, None]
    count_E = count(expert_TK, len(gate_up_EHD))
    ends_E = count_E.cumsum(0).to(torch.int32)  # the last is P: every row is written
    # Of an expert without tokens some GPUs leave the gradient unwritten (pytorch's issue 172439). Masked, it is 0.
    gate_up_EHD, down_EDF = (torch.where((count_E > 0)[:, None, None], W.to(dtype), 0) for W in (gate_up_EHD, down_EDF))
    x_PD = SumRows.apply(x_TD, token_P1, place_TK)
    gate_PF, up_PF = F.grouped_mm(x_PD, gate_up_EHD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    act_PF = (F.silu(gate_PF) * up_PF * score_TK.reshape(-1)[order_P][:, None]).to(dtype)
    y_PD = F.grouped_mm(act_PF, down_EDF.transpose(1, 2), offs=ends_E)
    return SumRows.apply(y_PD, place_TK, token_P1)  # each token picks its K rows


class SumRows(torch.autograd.Function):
    """y_i = sum over j of x[pick_ij]: sends tokens to their experts (one j), or collects a token's results (K of them).
    back_i lists the rows of y that used x_i, so dx_i = sum over j of dy[back_ij]: no atomics, and reproducible."""

    @staticmethod
    def forward(ctx, x, pick, back):
        ctx.save_for_backward(pick, back)
        return x[pick].sum(1)

    @staticmethod
    def backward(ctx, dy):
        pick, back = ctx.saved_tensors
        return dy[back].sum(1), None, None
