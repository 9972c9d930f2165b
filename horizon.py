"""What follows from the length of a run and from its device: steps, learning rate, micro-batch, number format.

    steps    tokens, or FLOPs / FLOPs a token, or tokens a parameter x N_active; over the tokens of a step
    rate     of N active parameters and D tokens: 1.2 N^-1/4 steps^-0.3, at most 0.02 (Muon), 0.45 N^-0.713 D^0.307,
             at most 0.006 (AdamW)
             after a parent: the rule for all steps, its and these, times sqrt(these / all)

By hand: N = 160,384 (3 layers of 64: `train.py --hidden-size 64`), 2 M tokens in 977 steps, Muon: N^-1/4 = 0.0500,
977^-0.3 = 0.1268, so 1.2 x 0.0500 x 0.1268 = 0.0076. Then half a million tokens more, 244 steps: the whole way has
1,221 steps, for which the rule says 0.0071. Of it 244 / 1,221 = 0.20 is new, and the root of that is 0.45. So 0.0032.
"""

import math

import torch


def fast_bf16(device):
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones."""
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


def memory_for_activations(device, sizes, shards, recomputes):
    """Bytes. On CUDA half of what is free (blocks keep 0.8 to 1.2 times what default_micro_batch counts if compiled, up
    to 1.7 if not), less 20 a parameter (in so many shards): gradients and two moments in fp32, copies in bf16, and the
    weights once more as a reserve. Shards besides hold embedding, head and their gradients whole, and the bf16 copies
    unless blocks are recomputed. On a CPU not much, as what is near the caches is fastest. On Apple's GPU half of what
    one should use, a guess."""
    match device.type:
        case "cuda":
            held = 20 * (sizes["N_total"] + sizes["embeddings"]) / shards
            if shards > 1:
                held += 12 * sizes["embeddings"] + (0 if recomputes else 2 * sizes["N_total"])
            return (torch.cuda.mem_get_info()[0] - held) / 2
        case "cpu":
            return 0.18e9
        case "mps":
            return torch.mps.recommended_max_memory() / 2


def default_micro_batch(config, context, windows, memory, recomputes=False, logits=0):
    """The largest divisor of a rank's windows that fits into `memory` bytes. In each layer a token keeps about 12 bytes
    for every number of its residual stream and of its MLPs; if it recomputes blocks, in one layer, and of the others
    their input in fp32. Besides so many bytes a logit, of 2^30 at most (model.py)."""
    width = config.hidden_size + (config.top_k if config.experts else 1) * config.intermediate_size
    kept = 12 * config.num_hidden_layers * width
    if recomputes:
        kept = 12 * width + 4 * config.num_hidden_layers * config.hidden_size
    need = lambda tokens: kept * tokens + logits * min(2**30, tokens * config.vocab_size)
    return max(m for m in range(1, windows + 1) if windows % m == 0 and (m == 1 or need(m * context) <= memory))


def auto_lr(optimizer, N, D, steps):
    """The highest rate for N parameters (N_active) and D tokens in so many steps; from experiments/rates.csv: 0.03
    to 3 M parameters, 0.5 to 4 M tokens. AdamW: the Step Law (2503.04715) with a quarter of its factor of 1.79.
    Muon: a fit. N^-0.25 is width^-0.5: beside its matrix an orthogonal update grows as the root of the width."""
    if optimizer == "adamw":
        return min(0.006, 0.45 * N**-0.713 * D**0.307)  # above, 7 of 8 small models do worse (experiments/LOG.md)
    return min(0.02, 1.2 * N**-0.25 * steps**-0.3)  # nothing above was tried to advantage


def continued_lr(optimizer, N, batch_tokens, steps, lineage):
    """`auto_lr` for a run of so many steps after `lineage`: that of the whole way, times the root of the share that is
    new. A model whose rate has decayed loses at a high one what the decay had brought, and a short run does not win it
    back; new text wants a higher one than more of the old (experiments/LOG.md). What came before counts as at
    most nine times this run; as nine times if unknown."""
    tokens = [entry["tokens"] for entry in lineage if "tokens" in entry]
    before = 9 * steps if None in tokens else min(9 * steps, sum(tokens) / batch_tokens)
    whole = before + steps
    return auto_lr(optimizer, N, whole * batch_tokens, whole) * math.sqrt(steps / whole)


def check_rate(s):
    if not s.min_lr <= s.lr > 0:
        raise ValueError(f"--lr is {s.lr} and --min-lr {s.min_lr} (a rate above 0, and not below its minimum)")


def complete(s, config, sizes, flops_per_token, device, world, lineage=(), recomputes=False):
    """(steps of the run, the steps that --save-at means). Fills in what is counted in steps, and the micro-batch.
    lineage: what came before the run; recomputes: each block runs twice. Raises ValueError for what does not fit into
    the run."""
    tokens = s.tokens
    if s.flops is not None:
        tokens = s.flops / flops_per_token
    elif s.tokens_per_param is not None:
        tokens = s.tokens_per_param * sizes["N_active"]
    steps = max(1, round(tokens / s.batch_tokens)) if tokens else 0
    windows = s.batch_tokens // s.context // world  # of a rank in a step
    memory = memory_for_activations(device, sizes, world if s.fsdp else 1, recomputes)
    logits = 0 if device.type == "cpu" else 12  # they, their softmax and their gradient, in fp32
    s.micro_batch = s.micro_batch or default_micro_batch(config, s.context, windows, memory, recomputes, logits)
    if s.lr == "auto":
        n = max(1, steps)  # a run of no steps only evaluates
        s.lr = float(f"{continued_lr(s.optimizer, sizes['N_active'], s.batch_tokens, n, lineage):.2g}")
        check_rate(s)
    s.warmup = steps // 50 if s.warmup is None else s.warmup
    if s.warmup > steps > 0:
        raise ValueError(f"--warmup {s.warmup} is beyond the run's {steps} steps (its rate would never be reached)")
    # Evaluations read at most a quarter of the run's tokens, at a third of the price: a twelfth of the run (for each
    # corpus). On CUDA a fortieth, at three to five times the price, as they are in fp32 and training is in bf16.
    part = 40 if device.type == "cuda" else 4
    evaluations = min(10, max(1, steps * s.batch_tokens // (part * s.eval_tokens)))
    s.eval_every = s.eval_every or max(1, math.ceil(steps / evaluations))  # rounded up: not twice near the end
    s.save_every = s.save_every or max(1, math.ceil(steps / 10))
    if steps and steps < (s.mask_steps or 0):
        raise ValueError(f"--mask-steps {s.mask_steps} is beyond the run's {steps} steps (it would never be open)")
    snapshots = {round(t / s.batch_tokens) for t in s.save_at}
    if snapshots and not 0 < min(snapshots) <= max(snapshots) <= steps:
        right = f"from one step, {s.batch_tokens:,}, to {steps * s.batch_tokens:,} tokens"
        wrong = max(s.save_at) if max(snapshots) > steps else min(s.save_at)
        raise ValueError(f"--save-at {wrong:,} is not within the run ({right})")
    return steps, snapshots
