"""
The mixture-of-experts layer: many MLPs side by side, of which each token uses a few.

A dense transformer layer sends every token through the same MLP. Here a router, one matrix, looks at the token and
picks K of E MLPs, the experts (Shazeer et al., 1701.06538). Parameters grow with E, arithmetic only with K:

    l_i = r_i . x                                              a logit for each expert i; r_i a row of the router
    y   = sum over the K largest l_i of  s_i expert_i(x)       expert_i(x) = down_i (silu(gate_i x) * up_i x), a SwiGLU

Choosing has no gradient. The router learns through the scores s alone, and there are two orders of computing them:

    topk-softmax    s = softmax over the K chosen logits; they sum to one (Mixtral, 2401.04088). The default.
                    With a single expert a token s is always 1 and the router learns nothing: `check` refuses that.
    softmax-topk    s = softmax over all E logits, of which the K chosen are used as they are
                    (Switch, 2101.03961; ST-MoE, 2202.08906).

Granularity G (2402.07871, the section of that name) cuts each full-width expert into G narrow ones and gives a token G
times as many. Parameters and arithmetic stay, but for a router of G times the rows; the number of possible teams grows.
The parts of full-width expert e are neighbours: e G ... e G + G - 1. On equal logits the lower index is chosen, so that
tied neighbours go together. Many small scores times many narrow experts make a small output; `output_scale` is the
factor on the initial down_proj that gives it the dense layer's variance again. (2402.07871 adds a LayerNorm instead.)

Letters. E, K and F count what is there after the cut: E = experts G, K = top_k G, F = intermediate_size / G. The names
of the flags, experts and top_k, count full-width experts.

Balancing. Experts that are used more learn more and are then used more still. Two losses lean against it:

    balance = E / (T K) sum_i c_i mean_t p_ti      c_i tokens that chose i, p the softmax over all E logits (Switch):
                                                   1 when p is uniform, E / K when K experts take everything
    z       = mean_t (log sum_i exp l_ti)^2        keeps the logits small (ST-MoE)

The layer returns them beside its output; the trainer weighs and adds them.

Capacity. No token is ever dropped unless `capacity_factor` C is given. Then, in training, an expert serves only the
ceil(C T K / E) tokens that score it highest (T tokens in this call); the others pass it by, on the residual. It is done
by zeroing scores, which are not renormalised: it bounds what an expert learns from, not the time it takes.

Dispatch. Three functions compute the same sum:

    reference   the equation as it stands; every expert sees every token. For reading, and for tests.
    loop        tokens sorted by expert, one expert after the other. On CPUs, and wherever `grouped` cannot run.
    grouped     one product for all experts; static shapes, nothing waits for the host. CUDA in bfloat16.

Measured (1 and 2 threads of a CPU, bfloat16, T 4096, D 512, 64 experts of width 176, 16 a token, forward + backward):
- One expert at a time keeps gather, activation and score in the cache. Gathering all T K tokens first took 1.2 times as
  long, autograd in place of the gradient by hand 1.1 to 1.3 times, grouped_mm 1.2 to 1.8, padded batches 1.5 or more.
- `loop` keeps 62 MB for the backward pass, the dense layer 92. experiments/bench_moe.py prints this, and all totals.
- Groups filled up to few sizes saved 8 % with 2 of 8 wide experts a token: no product is compiled anew.
- With 1 of 64 wide experts, transformers' grouped_mm is 2 to 4 % faster, half of it its bfloat16 router. A quarter goes
  into fresh memory for 264 MB of gradients; THP_MEM_ALLOC_ENABLE=1, PyTorch's switch for huge pages, saves most of it.
- index_select instead of x[index] saved 15 %; summing y and dx in float32 instead of bfloat16 cost nothing.
- The score goes into the hidden activations, not the output (down_i is linear): fewer numbers where F < D.
- `grouped` is tested for its numbers, compiled and on a CPU; its speed on a GPU has not been measured.
- The variance that `output_scale` keeps is that of the start. With softmax-topk the scores, and the output, grow as the
  router sharpens: E 8 K 1 ended 0.05 nats lower when the scale was 1 (three seeds; see experiments/LOG.md).

Left out on purpose. Expert choice: experts pick tokens, so a token's experts depend on tokens that come later. The
granularity paper's own router: expert choice over groups of sequences, which leaks between windows of one document and
cannot generate. Sigmoid scores with a selection bias that balances without a loss (DeepSeek-V3, 2412.19437): see
exercise 3. Shared experts, which every token uses: 2410.07524 found no gain from them when upcycling.

Try:
1. Let `output_scale` return 1.0 and predict the first loss of `python train.py --experts 8 --top-k 2 --granularity 8`.
   (It hardly moves: a layer now adds 1 / (K G^2) = 1/128 of the dense layer's variance, but the last norm rescales
   what there is, so the loss still starts near log V, 5.55 for bytes. The loss at the end is what suffers.)
2. Tie two router rows: in `route`, after the logits, put `logit_TE = logit_TE[:, [0, 0, *range(2, E)]]` and look at the
   counts. (With K = 1 expert 1 never gets a token: ties go to the lower index. With K = 2 it gets the tokens that rank
   the pair first; whoever has one place left for the pair takes expert 0.)
3. DeepSeek-V3's balancing: give MoE a buffer `bias` of E zeros, sort `logit_TE + bias`, gather `top_TK` from `logit_TE`
   with the indices found, and in training let `route` add `0.01 * (counts_E.double().mean() - counts_E).sign()` to it.
   Train with `--balance-coef 0`. (max_violation falls all the same: every step the busy get a little harder to choose.)
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# A tensor's suffix names its axes: T tokens, K experts per token, E experts, D hidden, F width of an expert, H = 2 F
# (gate and up, one below the other), P = T K pairs of token and expert, R the pairs of one expert.

ROUTERS = ("topk-softmax", "softmax-topk")  # another one also needs output_scale, and a public format in model.py


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
    if router == "topk-softmax" and top_k * granularity == 1:
        raise ValueError(
            "router topk-softmax with one expert a token scores it 1, without gradient (softmax-topk, or top_k 2)"
        )
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor is {capacity_factor} (above 0, such as 1.25; leave it out to drop nothing)")


def output_scale(experts, top_k, granularity, router):
    """Factor on down_proj's initial scale that gives the layer the variance v of the dense layer it replaces.

    A narrow expert sums over F of F G hidden units, so it has variance v / G, and a token adds K of them. With scores
    1 / K, those of topk-softmax for small logits, that is K (1 / K)^2 v / G = v / (top_k G^2); with scores 1 / E it is
    K (1 / E)^2 v / G = v top_k / E^2. Logits of deviation 0.5 are not small: softmax-topk then chooses scores well
    above 1 / E, and the variance can triple; so the router starts small."""
    if router == "topk-softmax":
        return granularity * math.sqrt(top_k)
    return experts * granularity / math.sqrt(top_k)


class MoE(nn.Module):
    """y, aux = moe(x) with x and y (..., D). Its weights are left uninitialised: model.py fills them.

    aux: balance_loss, z_loss (scalars with gradient), counts (E, tokens that chose each expert, before dropping),
    dropped (share of pairs dropped), entropy (mean entropy of the router in nats). y has autocast's dtype, if on."""

    def __init__(self, hidden_size, intermediate_size, experts, top_k, granularity=1, router="topk-softmax",
                 capacity_factor=None):  # fmt: skip
        super().__init__()
        check(hidden_size, intermediate_size, experts, top_k, granularity, router, capacity_factor)
        self.top_k, self.router, self.capacity_factor = top_k * granularity, router, capacity_factor
        D, E, width = hidden_size, experts * granularity, intermediate_size // granularity
        self.gate = nn.Linear(D, E, bias=False)  # the router, under its public name
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.experts.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x):
        x_TD = x.reshape(-1, x.shape[-1])
        gate_up_EHD, down_EDF = self.experts.gate_up_proj, self.experts.down_proj
        device, dtype = x.device.type, gate_up_EHD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # autocast does not reach into grouped_mm and Loop
        with torch.autocast(device, enabled=False):
            score_TK, expert_TK, aux = self.route(x_TD)
            compute = grouped if can_group(x.device, dtype, down_EDF) else loop
            y_TD = compute(x_TD.to(dtype), score_TK, expert_TK, gate_up_EHD, down_EDF)
        return y_TD.view(x.shape), aux

    def route(self, x_TD):
        """Scores and indices (T, K) of the chosen experts, and aux. In float32, or in the weights' dtype if wider: with
        the 8 bits of bfloat16 near logits would tie."""
        K, weight_ED = self.top_k, self.gate.weight
        (T, _), E = x_TD.shape, len(weight_ED)
        dtype = torch.promote_types(weight_ED.dtype, torch.float32)
        logit_TE = F.linear(x_TD.to(dtype), weight_ED.to(dtype))
        z_T = logit_TE.logsumexp(-1)
        p_TE = (logit_TE - z_T[:, None]).exp()  # softmax over all experts
        if K == 1:
            top_TK, expert_TK = logit_TE.max(dim=-1, keepdim=True)  # the first of equals
        else:
            sorted_TE, index_TE = logit_TE.sort(dim=-1, descending=True, stable=True)  # topk may break ties at will
            top_TK, expert_TK = sorted_TE[:, :K], index_TE[:, :K]
        score_TK = top_TK.softmax(-1) if self.router == "topk-softmax" else (top_TK - z_T[:, None]).exp()
        counts_E = count(expert_TK, E)
        aux = dict(
            balance_loss=E / (T * K) * (counts_E * p_TE.mean(0)).sum(),
            z_loss=z_T.square().mean(),
            counts=counts_E,
            dropped=torch.zeros_like(z_T[0]),
            entropy=(z_T - (p_TE * logit_TE).sum(-1)).mean().detach(),  # -sum p log p, with log p = l - z
        )
        if self.capacity_factor is not None and self.training:
            keep_TK = within_capacity(score_TK, expert_TK, E, math.ceil(self.capacity_factor * T * K / E))
            score_TK, aux["dropped"] = score_TK * keep_TK, 1 - keep_TK.to(dtype).mean()
        return score_TK, expert_TK, aux


def count(expert_TK, E):
    """How many tokens chose each expert, (E,). torch.bincount would wait for the device."""
    expert_P = expert_TK.reshape(-1)
    return torch.zeros(E, dtype=torch.int64, device=expert_P.device).scatter_add(0, expert_P, torch.ones_like(expert_P))


def within_capacity(score_TK, expert_TK, E, capacity):
    """True (T, K) for each expert's `capacity` best pairs; the earlier token on equal scores. rank_P is a pair's place
    in its expert's queue: both sorts are stable, so that within an expert the best score stays first."""
    best_P = score_TK.reshape(-1).argsort(descending=True, stable=True)
    expert_P = expert_TK.reshape(-1)[best_P]
    order_P = expert_P.argsort(stable=True)  # by expert, and within an expert by score
    first_E = count(expert_TK, E).cumsum(0) - count(expert_TK, E)
    rank_P = torch.arange(len(order_P), device=order_P.device) - first_E[expert_P[order_P]]
    return torch.empty_like(order_P, dtype=torch.bool).scatter(0, best_P[order_P], rank_P < capacity).view_as(expert_TK)


def reference(x_TD, score_TK, expert_TK, gate_up_EHD, down_EDF):
    """y_t = sum over k of score_tk expert_tk(x_t), (T, D)."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(gate_up_EHD)):
        score_T = (score_TK * (expert_TK == e)).sum(-1).to(x_TD.dtype)  # 0 where a token did not choose e
        gate_TF, up_TF = (x_TD @ gate_up_EHD[e].to(x_TD.dtype).T).chunk(2, dim=-1)
        y_TD = y_TD + score_T[:, None] * ((F.silu(gate_TF) * up_TF) @ down_EDF[e].to(x_TD.dtype).T)
    return y_TD


def can_group(device, dtype, down_EDF):
    """grouped_mm needs bfloat16, an Ampere GPU or later, and rows that are whole multiples of 16 bytes."""
    aligned = down_EDF.shape[1] % 8 == 0 and down_EDF.shape[2] % 8 == 0
    return (device.type == "cuda" and dtype == torch.bfloat16 and aligned
            and torch.cuda.get_device_capability(device) >= (8, 0))  # fmt: skip


def grouped(x_TD, score_TK, expert_TK, gate_up_EHD, down_EDF):
    """`reference` as two products over all pairs, sorted by expert."""
    (T, K), dtype = score_TK.shape, x_TD.dtype
    order_P = expert_TK.reshape(-1).argsort(stable=True)  # pairs p = t K + k in the order of their experts
    place_TK = torch.empty_like(order_P).scatter(0, order_P, torch.arange(T * K, device=x_TD.device)).view(T, K)
    token_P1 = (order_P // K)[:, None]
    ends_E = count(expert_TK, len(gate_up_EHD)).cumsum(0).to(torch.int32)  # the last is P: every row is written
    x_PD = SumRows.apply(x_TD, token_P1, place_TK)
    gate_PF, up_PF = F.grouped_mm(x_PD, gate_up_EHD.to(dtype).transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    act_PF = (F.silu(gate_PF) * up_PF * score_TK.reshape(-1)[order_P][:, None]).to(dtype)
    y_PD = F.grouped_mm(act_PF, down_EDF.to(dtype).transpose(1, 2), offs=ends_E)
    return SumRows.apply(y_PD, place_TK, token_P1)


class SumRows(torch.autograd.Function):
    """y_i = sum over j of x[pick_ij]: sends tokens to their experts (one j), or collects a token's results (K of them).
    back_ij are the rows of y that x_i went into, so the gradient is such a sum too: no atomics, and reproducible."""

    @staticmethod
    def forward(ctx, x, pick, back):
        ctx.save_for_backward(pick, back)
        return x[pick].sum(1)

    @staticmethod
    def backward(ctx, dy):
        pick, back = ctx.saved_tensors
        return dy[back].sum(1), None, None


@torch.compiler.disable  # group sizes are data here: nothing to compile
def loop(x_TD, score_TK, expert_TK, gate_up_EHD, down_EDF):
    """`reference`, with each expert on its own tokens only. On an accelerator it waits once, for the group sizes.

    In 16 bits a CPU compiles its products anew for every number of rows. So groups are filled up to multiples of 1/32
    of their mean: a few sizes, which return at every step, for 2 % more rows. Those hold token 0 with score 0."""
    (T, K), dtype = score_TK.shape, x_TD.dtype
    step = math.ceil(T * K / len(gate_up_EHD) / 32) if dtype.itemsize == 2 else 1
    order_P = expert_TK.reshape(-1).argsort(stable=True)  # pairs p = t K + k in the order of their experts
    groups = order_P.split(count(expert_TK, len(gate_up_EHD)).tolist())
    groups = [F.pad(pair_R, (0, -len(pair_R) % step), value=T * K) for pair_R in groups]  # pair T K fills up
    pair_P, sizes = torch.cat(groups), [len(pair_R) for pair_R in groups]
    score_P = F.pad(score_TK.reshape(-1), (0, 1)).index_select(0, pair_P).to(dtype)
    sum_dtype = dtype if K == 1 else torch.promote_types(dtype, torch.float32)  # a single result is only put in place
    return Loop.apply(x_TD, score_P, gate_up_EHD, down_EDF, pair_P // K % T, sizes, sum_dtype)


class Loop(torch.autograd.Function):
    """For each expert, with h = [gate; up] x, a = silu(gate) * up, s the score and W, V its matrices: y += V (s a).

    Autograd would give each expert's gather a gradient of the size of x. By hand, from dy:
        da = V' dy    ds = a . da    dV = dy (s a)'
        dh = s [silu'(gate) * up * da; silu(gate) * da]
        dW = dh x'    dx += W' dh"""

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
