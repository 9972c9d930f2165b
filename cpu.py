"""The same arithmetic as in model.py, written for CPUs, where torch's own kernels for it are slow.

Measured forward and backward. In bf16 on two cores torch's fused attention takes 2.5 times as long as these blocks with
autograd's gradient (head_dim 32, context 256). That takes 1.1 to 1.3 times as long as the gradient by hand, and torch's
RMSNorm 1.6 to 7 times as long as the one here (both in fp32 on one core, several shapes).
"""

import ctypes

import torch


def keep_memory():
    """Lets this process keep what it frees, for its next step. By default glibc's malloc gives large blocks back to the
    system, and each page of the next step's faults again: at 6 layers of 384 that was a fifth of a step in bf16. Does
    nothing where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # no such function; Windows
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in malloc.h; see `man mallopt`
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    for size in (2**25, 2**30):  # some versions refuse more than the first
        mallopt(M_MMAP_THRESHOLD, size)


class RMSNorm(torch.autograd.Function):
    """y = gain n, n = x / rms(x), rms(x)^2 = mean(x^2) + eps; in fp32 or wider."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        ctx.dtype = x.dtype
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).sqrt_()
        n = x / rms
        ctx.save_for_backward(n, rms, gain)
        return (n * gain).to(ctx.dtype)

    @staticmethod
    def backward(ctx, dy):
        n, rms, gain = ctx.saved_tensors
        dy, wide = dy.to(n.dtype), gain.to(n.dtype)
        dyn = dy * n
        dgain = dyn.flatten(0, -2).sum(0)
        mean = (dyn @ wide / n.shape[-1]).unsqueeze(-1)  # dx = (gain dy - n mean(gain dy n)) / rms
        dx = torch.mul(dy, wide, out=dyn).addcmul_(n, mean, value=-1).div_(rms)  # over dyn, which is done with
        return dx.to(ctx.dtype), dgain.to(gain.dtype), None


def causal_attention(q, k, v, block=128):
    """softmax(q k^T / sqrt(head_dim)) v with a causal mask. q (B, heads, T, head_dim), k and v (B, kv_heads, T,
    head_dim) -> y as q. bf16 only: in fp32 a training step is no faster with it than with torch's fused kernel."""
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
