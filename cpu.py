"""The same arithmetic as in model.py, written for CPUs, where torch's own kernels for it are slow.

A CPU waits for memory more than for arithmetic. So each function here reads and writes as few times as it can, works
in place where it may, keeps little for the backward pass, and has its gradient by hand.
"""

import torch


class RMSNorm(torch.autograd.Function):
    """y = gain n, n = x / rms(x), rms(x)^2 = mean(x^2) + eps; in fp32 or wider.

    The gradient is that of LayerNorm, which torch has as one kernel, with a mean of 0; but that kernel also subtracts
    the mean of gain dy: dx = (gain dy - n mean(gain dy n)) / rms lacks this term, and so it is added again."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide, size = x.to(wide), x.shape[-1]
        rrms = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rrms, gain)  # rrms: 1 / rms
        return (x_wide * rrms).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, rrms, gain = ctx.saved_tensors
        dy, wide_gain = dy.to(rrms.dtype), gain.to(rrms.dtype)
        dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x.to(rrms.dtype), gain.shape, torch.zeros_like(rrms), rrms, wide_gain, None, (True, True, False)
        )
        dx.add_((dy @ wide_gain).unsqueeze(-1).mul_(rrms), alpha=1 / x.shape[-1])
        return dx.to(x.dtype), dgain.to(gain.dtype), None


class Rotate(torch.autograd.Function):
    """model.rotate for x (..., T, head_dim). The gradient turns back: the same with -sin."""

    @staticmethod
    def forward(ctx, x, cos, signed_sin):
        ctx.save_for_backward(cos, signed_sin)
        return turned(x, cos, signed_sin)

    @staticmethod
    def backward(ctx, dy):
        cos, signed_sin = ctx.saved_tensors
        return turned(dy, cos, -signed_sin), None, None


def turned(x, cos, signed_sin):
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], signed_sin[:, :half])
    y[..., half:].addcmul_(x[..., :half], signed_sin[:, half:])
    return y


def causal_attention(q, k, v, block=64):
    """softmax(q k^T / sqrt(head_dim)) v with a causal mask. q (B, heads, T, head_dim), k and v (B, kv_heads, T,
    head_dim) -> y as q. Fastest if all are contiguous."""
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    return Attention.apply(q, k, v, block)


class Attention(torch.autograd.Function):
    """A block of queries at a time meets the keys up to its end: the rest of the square is never computed. The
    probabilities p are kept: memory grows with T^2. For scores s: dv = p^T dy, dp = dy v^T, dk = ds^T q, dq = ds k."""

    @staticmethod
    def forward(ctx, q, k, v, block):
        q = q * q.shape[-1] ** -0.5
        y, kept = torch.empty_like(q), []
        for start in range(0, q.shape[2], block):
            now, seen = slice(start, start + block), slice(start + block)
            scores = q[:, :, now] @ k[:, :, seen].mT  # (B, heads, block, seen)
            scores[..., start:] += torch.full_like(scores[0, 0, :, start:], -torch.inf).triu(1)
            p = scores.softmax(-1)
            y[:, :, now] = p @ v[:, :, seen]
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.block = block
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *kept = ctx.saved_tensors
        dy, wide = dy.contiguous(), torch.promote_types(q.dtype, torch.float32)  # dk and dv are sums over blocks
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for i, p in enumerate(kept):
            now, seen = slice(i * ctx.block, (i + 1) * ctx.block), slice((i + 1) * ctx.block)
            dv[:, :, seen] += p.mT @ dy[:, :, now]
            dp = dy[:, :, now] @ v[:, :, seen].mT
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dk[:, :, seen] += ds.mT @ q[:, :, now]
            dq[:, :, now] = ds @ k[:, :, seen]
        return dq.mul_(q.shape[-1] ** -0.5), dk.to(k.dtype), dv.to(v.dtype), None
