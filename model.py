"""The transformer, and its folder on disk.

A decoder as Llama, Mistral and Qwen3 have it. One block is two residual lines,

    x = x + Attention(RMSNorm(x))
    x = x + MLP(RMSNorm(x))               MLP(x) = W_down (silu(W_gate x) * W_up x)          (SwiGLU, 2002.05202)

with rotary positions (RoFormer, 2104.09864; the half-split order of Hugging Face), grouped-query attention
(2305.13245), optionally an RMSNorm on every query and key head (QK-norm, as in Qwen3), and in the place of the MLP, if
`experts` is not 0, the mixture of experts of moe.py.

A checkpoint is a Hugging Face folder: `load` reads what Meta, Mistral and Qwen publish, and `save` writes what
transformers and vLLM read. There is no converter, because there is no second format: parameters carry the public names.
What this class cannot represent exactly (a sliding window, biases, another activation) is refused by name.

Measured (2 CPU cores, bf16, head_dim 32, context 256): torch's fused attention takes 2.5 times as long as the few lines
of `causal_attention`, its RMSNorm twice as long as the same formula with a gradient by hand; so both stand here, for
CPUs. One joined product for queries, keys and values, or for gate and up, gained nothing.

The first half is the transformer; what follows "the folder" reads and writes it, refusals included.

Left out on purpose: dropout (one pass over the data needs none), biases, sliding windows, sequence packing masks, and
every attention kernel but torch's `scaled_dot_product_attention`.

    python model.py out/dense --prompt "def "

Try:
  1. Delete the `/ math.sqrt(2 * layers)` in `init_weights` and train 200 steps: with 3 layers the loss barely notices;
     with --num-hidden-layers 24 the start is visibly slower. The residual stream grew with every block.
  2. Delete the line that rotates q and k: the causal mask alone still tells the model something of positions, but the
     loss ends higher.
  3. Change rope_theta in config.json of a trained folder from 10000 to 1000000 and evaluate it again with
     `python train.py --init FOLDER --tokens 0`: positions are part of the weights' meaning, and the loss jumps.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import moe


@dataclass
class Config:
    """The shape of a model, in Hugging Face's names; `experts`, `top_k` and `granularity` are those of moe.py. A new
    field must also be said in public_config and read in read_config, or refused: else it is lost on the way to disk."""

    vocab_size: int = 256
    hidden_size: int = 128  # width of the residual stream
    intermediate_size: int = 384  # width of the MLP; of one full-width expert
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 4  # fewer than heads: grouped-query attention
    head_dim: int = 32  # need not be hidden_size / heads
    max_position_embeddings: int = 256  # the context it was trained with
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or Llama 3's: factor, low_freq_factor, high_freq_factor, ...
    tie_word_embeddings: bool = False  # True: the head is the embedding
    qk_norm: bool = True  # RMSNorm on each query and key head
    experts: int = 0  # expansion rate E; 0 is a dense model
    top_k: int = 2  # full-width experts a token, K
    granularity: int = 1  # G: each full-width expert is split into G
    router: str = "topk-softmax"  # or softmax-topk
    capacity_factor: float | None = None  # of training; None: no token is ever dropped (not stored)
    balance_coef: float = 0.01  # of training: weight of the balancing loss
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def check(self):
        """Raises ValueError for a shape that cannot be built, or that no public architecture can say."""
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        for name in (sizes + " head_dim max_position_embeddings").split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} (at least 1)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key-value heads "
                "(num_key_value_heads must divide num_attention_heads)"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim} (rotary embeddings turn pairs: an even number)")
        if self.experts:
            moe.check(
                self.hidden_size, self.intermediate_size, self.experts, self.top_k, self.granularity, self.router,
                self.capacity_factor,
            )  # fmt: skip
            if self.router == "softmax-topk" and not self.qk_norm:
                raise ValueError("no public format holds a softmax-topk router without QK-norm (add --qk-norm)")


# ---- the layers -----------------------------------------------------------------------------------------------------


class RMSNormFunction(torch.autograd.Function):
    """y = gain n, n = x / rms(x), rms(x)^2 = mean(x^2) + eps; fp32 or wider. For CPUs: torch has no fast one there."""

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
        mean = (dyn @ wide / n.shape[-1]).unsqueeze(-1)  # dx = (gain dy - n mean(gain dy n)) / rms
        dx = (dy * wide).addcmul_(n, mean, value=-1).div_(rms)
        return dx.to(ctx.dtype), dyn.flatten(0, -2).sum(0).to(gain.dtype), None


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if x.device.type == "cpu":
            return RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotation(config, positions, device):
    """cos and +-sin of the rotary angles, (T, head_dim) each, fp32: angle = position * theta^(-2 i / head_dim)."""
    two_i = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-two_i / config.head_dim)  # (head_dim / 2,)
    if config.rope_scaling:  # Llama 3.1: slow frequencies turn `factor` times slower, fast ones stay, ramp between
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequency = frequency * (ramp.clamp(0, 1) + (1 - ramp.clamp(0, 1)) / s["factor"])
    angle = torch.outer(positions.float(), frequency)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x, cos, sin):
    """Turns the pairs (a, b) = (x_i, x_{i + head_dim/2}) of x (B, T, heads, head_dim) by their angle:
    (a cos - b sin, b cos + a sin).
    cos and sin are those of `rotation`."""
    return torch.addcmul(x * cos[:, None].to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin[:, None].to(x.dtype))


def causal_attention(q, k, v, block=128):
    """softmax(q k^T / sqrt(head_dim)) v with a causal mask, a block of queries at a time: for bf16 on a CPU, where
    torch's fused kernel is slow. q (B, heads, T, head_dim), k and v (B, kv_heads, T, head_dim)."""
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    q = q * q.shape[-1] ** -0.5
    y = []
    for i in range(0, q.shape[2], block):
        scores = q[:, :, i : i + block] @ k[:, :, : i + block].mT  # (B, heads, block, i + block)
        scores[..., i:] += torch.full_like(scores[0, 0, :, i:], -torch.inf).triu(1)
        y.append(scores.softmax(-1) @ v[:, :, : i + block])
    return torch.cat(y, dim=2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.qk_norm = c.qk_norm

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        if cache is not None:  # keys and values of the tokens before these
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        if x.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 1024:  # beyond, memory grows with T^2
            y = causal_attention(q, k, v)
        else:
            causal = T == k.shape[2]  # with a cache, one new token sees all that went before
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up), None  # no router, no aux: see moe.MoE


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if c.experts:
            self.mlp = moe.MoE(
                c.hidden_size, c.intermediate_size, c.experts, c.top_k, c.granularity, c.router, c.capacity_factor
            )
        else:
            self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        y, aux = self.mlp(self.post_attention_layernorm(x))
        return x + y, aux


class Transformer(nn.Module):
    """The decoder. Parameters have the public names: `model.layers.0.self_attn.q_proj.weight`, ..."""

    def __init__(self, config):
        super().__init__()
        config.check()
        self.config = config
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, targets=None, cache=None):
        """ids, targets (B, T) int64 -> logits, loss, aux.

        Without targets: logits (B, T, V) and loss None. With targets (already shifted; -100 is ignored): loss is the
        mean cross-entropy in nats a token and logits None. aux is None for a dense model; else a dict of balance_loss
        and z_loss (means over layers, scalars), counts (layers, experts), dropped and entropy (means over layers).
        cache: None, or the list of `new_cache()`, to which the keys and values of ids are added.
        """
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        if past and ids.shape[1] > 1:
            raise ValueError(f"{ids.shape[1]} tokens after a cache (one at a time)")
        cos, sin = rotation(self.config, torch.arange(past, past + ids.shape[1], device=ids.device), ids.device)
        x = self.model.embed_tokens(ids)  # (B, T, D)
        auxes = []
        for i, layer in enumerate(self.model.layers):
            x, aux = layer(x, cos, sin, None if cache is None else cache[i])
            auxes.append(aux)
        x = self.model.norm(x)
        aux = None
        if self.config.experts:
            stacked = {key: torch.stack([a[key] for a in auxes]) for key in auxes[0]}
            aux = {key: value if key == "counts" else value.mean() for key, value in stacked.items()}
        if targets is None:
            return self.lm_head(x), None, aux
        return None, self.cross_entropy(x.flatten(0, 1), targets.flatten()), aux

    def cross_entropy(self, x, targets, most=2**28):
        """Mean loss of x (B T, D) against targets (B T,). More than `most` logits are never held at once, nor kept for
        the backward pass: a large vocabulary is worked through in slices, each computed twice."""

        def total(x, targets):
            return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-100, reduction="sum")

        rows = max(1, most // self.config.vocab_size)
        if len(x) <= rows:
            loss = total(x, targets)
        else:
            slices = zip(x.split(rows), targets.split(rows))
            loss = sum(checkpoint(total, *s, use_reentrant=False) for s in slices)
        return loss / (targets != -100).sum()

    def new_cache(self):
        return [[] for _ in self.model.layers]

    def num_parameters(self):
        """{"N", "N_active", "N_total", "embeddings"}, in parameters. N counts no embeddings, head and routers, and a
        mixture as one full-width MLP: the dense model of that shape. N_active is what a token touches, N_total all;
        both with routers, without embeddings and head."""
        c = self.config
        embeddings = self.model.embed_tokens.weight.numel() * (1 if c.tie_word_embeddings else 2)
        total = sum(p.numel() for p in self.parameters()) - embeddings
        mlp = 3 * c.hidden_size * c.intermediate_size * c.num_hidden_layers  # one full-width MLP in every layer
        router = c.hidden_size * c.experts * c.granularity * c.num_hidden_layers
        dense = total - router - max(c.experts, 1) * mlp  # attention and norms
        active = dense + router + (c.top_k if c.experts else 1) * mlp
        return {"N": dense + mlp, "N_active": active, "N_total": total, "embeddings": embeddings}

    def flops_per_token(self, context):
        """Training FLOPs a token: 6 a parameter of the products it passes (head included, embedding look-up not), and
        12 layers heads head_dim context for the attention scores (the convention of PaLM, 2204.02311, and nanoGPT)."""
        c = self.config
        gains = (2 * c.num_hidden_layers + 1) * c.hidden_size + 2 * c.head_dim * c.num_hidden_layers * c.qk_norm
        products = self.num_parameters()["N_active"] - gains + c.hidden_size * c.vocab_size
        return 6 * products + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context


def normal(shape, std, seed, layer, expert, matrix, dtype=torch.float32):
    """Normal numbers that depend on (seed, layer, expert, matrix) and nothing else: not on the order of the work, the
    number of processes or the device. Drawn on the CPU in fp32."""
    key = hashlib.sha256(f"{seed} {layer} {expert} {matrix}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(shape).normal_(0, std, generator=generator).to(dtype)


@torch.no_grad()
def init_weights(module, seed):
    """Draws every weight of `module` anew from `seed`.

    | parameter                            | distribution                                                     |
    |--------------------------------------|------------------------------------------------------------------|
    | embed_tokens (the head too, if tied) | normal, 0.02                                                     |
    | lm_head                              | normal, 0.02                                                     |
    | q_proj, k_proj, v_proj               | normal, 1 / sqrt(fan-in): unit variance in, unit variance out    |
    | gate_proj, up_proj, gate_up_proj     | the same                                                         |
    | o_proj, down_proj                    | the same / sqrt(2 layers): the residual stream keeps its size    |
    | down_proj of an expert               | fan-in of the full width, x moe.output_scale: as the dense layer |
    | mlp.gate, the router                 | normal, 0.02 / sqrt(fan-in): logits near 0, as output_scale asks |
    | norm gains                           | 1                                                                |
    """
    c = module.config
    layers = c.num_hidden_layers
    for name, p in module.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if name.endswith("norm.weight"):
            p.fill_(1)
            continue
        std = 0.02 if "embed_tokens" in name or "lm_head" in name else 1 / math.sqrt(p.shape[-1])
        if ".mlp.gate." in name:
            std *= 0.02
        if "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * layers)
        if ".experts." not in name:
            p.copy_(normal(p.shape, std, seed, layer, 0, name.split(".")[-2]))
            continue
        matrix = name.split(".")[-1]
        if matrix == "down_proj":  # p.shape[-1] is F / G, and the fan-in of the full width is meant; then scaled
            std *= moe.output_scale(c.experts, c.top_k, c.granularity, c.router) / math.sqrt(c.granularity)
        for e in range(p.shape[0]):
            p[e].copy_(normal(p.shape[1:], std, seed, layer, e, matrix))
    return module


# ---- the folder -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Gives the path of a new file beside `path` and renames it into place at the end: readers, and a machine after a
    power cut, see the old file or the new one, never half of one."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    try:
        yield beside
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist (a checkpoint folder holds it)") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error} (a JSON file)") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_lineage(folder, source_tokens=None):
    """(name of the tokenizer or None, lineage) of a checkpoint folder, ours or a public one, from its run.json.

    source_tokens: what a public source was trained on, if known. Raises ValueError for a torn folder.
    """
    folder = Path(folder)
    path, weights = folder / "run.json", folder / "model.safetensors"
    if source_tokens is not None and not 0 <= source_tokens < math.inf:
        raise ValueError(f"source_tokens is {source_tokens} (0 or more)")
    tokens = None if source_tokens is None else int(source_tokens)
    if not path.exists():
        return None, [{"step": "source", "name": folder.resolve().name, "tokens": tokens}]
    run = read_json(path)
    lineage = run.get("lineage")
    if not isinstance(lineage, list) or not lineage or not all(isinstance(s, dict) and "step" in s for s in lineage):
        raise ValueError(f"{path} has no lineage (a list of steps)")
    if "step" in run and weights.exists():
        with opened(weights) as f:
            if (f.metadata() or {}).get("step", str(run["step"])) != str(run["step"]):
                raise ValueError(f"{folder} was killed while saving (first: python train.py --resume --out {folder})")
    if tokens is not None:
        if lineage[0]["step"] != "source":
            why = f"{path} knows its own tokens (leave it out for our own)"
            raise ValueError(f"source_tokens is {source_tokens}: {why}")
        lineage[0]["tokens"] = tokens
    return run.get("tokenizer"), lineage


DENSE, MIXTURES = ("llama", "mistral", "qwen3"), ("mixtral", "qwen3_moe")


def read_config(folder):
    """The Config of a checkpoint folder. Raises FileNotFoundError, or ValueError for what cannot be said exactly."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder (a checkpoint folder, with config.json in it)")
    h = read_json(folder / "config.json")
    kind = h.get("model_type")

    def refuse(what):
        raise ValueError(f"{folder}/config.json: {what}")

    def need(*names):
        for name in names:
            if h.get(name) is not None:
                return h[name]
        refuse(f"{names[0]} is missing")

    if kind not in DENSE + MIXTURES:
        refuse(f"model_type {kind!r} is not supported ({', '.join(DENSE + MIXTURES)})")
    for key, fine in dict(
        hidden_act=("silu", None), attention_bias=(False, None), mlp_bias=(False, None), quantization_config=(None,),
        partial_rotary_factor=(1, None), decoder_sparse_step=(1, None), mlp_only_layers=([], None),
        shared_expert_intermediate_size=(0, None), n_shared_experts=(0, None),
    ).items():  # fmt: skip
        if h.get(key) not in fine:
            refuse(f"{key} {h[key]!r} is not supported ({fine[0]!r} is)")
    if h.get("sliding_window") is not None and h.get("use_sliding_window", True):
        refuse(f"sliding_window {h['sliding_window']} is not supported (null, or use_sliding_window false)")
    if any(t != "full_attention" for t in h.get("layer_types") or ()):
        refuse("layer_types other than full_attention are not supported")

    rope = {**(h.get("rope_scaling") or {}), **(h.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if rope_type == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if any(k not in rope for k in keys):
            refuse(f"llama3 rope scaling needs {', '.join(keys)}")
        scaling = {"rope_type": "llama3", **{k: rope[k] for k in keys}}
    elif rope_type != "default":
        refuse(f"rope type {rope_type!r} is not supported (default, llama3)")
    heads, qwen = need("num_attention_heads"), kind.startswith("qwen3")
    kv_heads = h.get("num_key_value_heads") or (heads if kind == "llama" else need("num_key_value_heads"))
    c = Config(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=h.get("head_dim") or (128 if qwen else need("hidden_size") // heads),
        max_position_embeddings=h.get("max_position_embeddings", 2048),
        rms_norm_eps=h.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", h.get("rope_theta", 1e6 if kind == "mixtral" else 1e4))),
        rope_scaling=scaling,
        tie_word_embeddings=h.get("tie_word_embeddings", False),
        qk_norm=qwen,
        bos_token_id=h.get("bos_token_id"),
        eos_token_id=h.get("eos_token_id"),
    )
    if kind in MIXTURES:
        G = c.granularity = h.get("granularity", 1)
        experts, top_k = need("num_local_experts", "num_experts"), need("num_experts_per_tok")
        if experts % G or top_k % G:
            refuse(f"granularity {G} does not divide {experts} experts and {top_k} a token")
        c.experts, c.top_k, c.intermediate_size = experts // G, top_k // G, c.intermediate_size * G
        if kind == "qwen3_moe" and not h.get("norm_topk_prob", False):
            c.router = "softmax-topk"
        c.balance_coef = h.get("router_aux_loss_coef", 0.001) * top_k  # the public loss sums over a token's choices
    c.check()
    return c


def public_config(c, dtype):
    """The Hugging Face configuration of Config c, a dict; rotary settings and dtype in the older and newer spelling."""
    kind = ("qwen3_moe" if c.qk_norm else "mixtral") if c.experts else ("qwen3" if c.qk_norm else "llama")
    name = {"llama": "Llama", "qwen3": "Qwen3", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}[kind]
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    same += " head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling tie_word_embeddings"
    same += " bos_token_id eos_token_id"
    h = {"architectures": [f"{name}ForCausalLM"], "model_type": kind, **{k: getattr(c, k) for k in same.split()}}
    h |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02}
    h["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_theta, **(c.rope_scaling or {})}
    h["torch_dtype"] = h["dtype"] = str(dtype).removeprefix("torch.")
    if kind == "llama":
        h["mlp_bias"] = False
    else:
        h["sliding_window"] = None
    if c.experts:
        renormalised = {"topk-softmax": True, "softmax-topk": False}[c.router]  # there is no other public router
        width, total, chosen = c.intermediate_size // c.granularity, c.experts * c.granularity, c.top_k * c.granularity
        h |= {"num_experts_per_tok": chosen, "router_aux_loss_coef": c.balance_coef / chosen}
        h["granularity"] = c.granularity
        if kind == "mixtral":
            h |= {"num_local_experts": total, "intermediate_size": width}
        else:
            h |= {"num_experts": total, "moe_intermediate_size": width, "norm_topk_prob": renormalised}
            h |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return h


def public_tensors(c, state):
    """Yields (public name, tensor) of a state dict: experts one by one, a tied head left out."""
    mixtral = c.experts and not c.qk_norm  # has names of its own; with QK-norm it is Qwen3-MoE, with the dense names
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, t in state.items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if mixtral and ".mlp." in name:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if ".experts.gate_up_proj" in name:
            prefix = name.removesuffix("gate_up_proj")
            for e in range(t.shape[0]):
                gate, up = t[e].chunk(2)
                yield f"{prefix}{e}.{names[0]}.weight", gate
                yield f"{prefix}{e}.{names[1]}.weight", up
        elif ".experts.down_proj" in name:
            for e in range(t.shape[0]):
                yield f"{name.removesuffix('down_proj')}{e}.{names[2]}.weight", t[e]
        else:
            yield name, t


def private_tensors(c, found):
    """The inverse of public_tensors: {public name: tensor} -> state dict, experts joined, the head tied if it is. Takes
    the tensors out of `found`, so that nothing is held twice."""
    with torch.device("meta"):
        names, state = Transformer(c).state_dict(), {}
    for name, t in names.items():
        parts = [found.pop(n) for n, _ in public_tensors(c, {name: t})]
        if name.endswith("gate_up_proj"):
            parts = [torch.cat(pair) for pair in zip(parts[::2], parts[1::2])]
        if parts:  # of a tied head there are none
            state[name] = torch.stack(parts) if ".experts." in name else parts[0]
    if c.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def tensor_files(folder):
    """{tensor name: the safetensors file it lies in}, for one file or shards with an index. Raises as `load` does."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        shards = {"model.safetensors"}
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise ValueError(f"{index} has no weight_map (tensor name: file name)")
        shards = set(weight_map.values())
    else:
        raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, or shards and their index)")
    files = {}
    for shard in sorted(shards):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{index} names a shard outside the folder: {shard!r}")
        if not (folder / shard).exists():
            raise FileNotFoundError(f"{folder / shard} is missing (the index names it)")
        with opened(folder / shard) as f:
            files |= dict.fromkeys(f.keys(), folder / shard)
    return files


def opened(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def inspect(folder, config):
    """({public name: (file, name in it, index into that)} of the tensors that Config `config` asks for, widest dtype).

    Read from the files' headers. Raises FileNotFoundError or ValueError where a tensor is missing, left over, torn, or
    of another shape or dtype."""
    with torch.device("meta"):  # shapes without numbers
        state = Transformer(config).state_dict()
    files, found = tensor_files(folder), {}
    for name, t in state.items():
        for i, (public, part) in enumerate(public_tensors(config, {name: t})):
            if ".experts." not in name or name not in files:
                found[public] = public, tuple(part.shape), ()
            elif name.endswith("down_proj"):  # some writers keep a layer's experts in one tensor
                found[public] = name, tuple(t.shape), (i,)
            else:  # expert 0's gate, its up, expert 1's gate, ...
                found[public] = name, tuple(t.shape), (i // 2, slice(i % 2 * len(part), (i % 2 + 1) * len(part)))
    shapes = {name: shape for name, shape, _ in found.values()}
    spare = ("rotary_emb.inv_freq", *["lm_head.weight"] * config.tie_word_embeddings)  # in some public folders
    missing = sorted(shapes.keys() - files.keys())
    extra = sorted(n for n in files.keys() - shapes.keys() if not n.endswith(spare))
    for names, word in ((missing, "lacks"), (extra, "has, beyond its configuration,")):
        if names:
            more = f" and {len(names) - 1} more" * (len(names) > 1)
            raise ValueError(f"{folder} {word} the tensor {names[0]}{more} (config.json and weights must agree)")
    dtype = None
    for path in sorted(set(files.values())):
        with opened(path) as f:
            for name in sorted(shapes.keys() & set(f.keys())):
                kind, shape = f.get_slice(name).get_dtype(), tuple(f.get_slice(name).get_shape())
                if shape != shapes[name] or kind not in DTYPES:
                    right = f"config.json says {shapes[name]}; {', '.join(DTYPES)} are read"
                    raise ValueError(f"{path}: {name} is {kind} of shape {shape} ({right})")
                dtype = torch.promote_types(dtype or DTYPES[kind], DTYPES[kind])
    return {public: (files[name], name, index) for public, (name, _, index) in found.items()}, dtype


def read_tensors(found):
    """Yields (public name, tensor) for entries of `inspect`, a file after the other."""
    for path in sorted({path for path, _, _ in found.values()}):
        with opened(path) as f:
            for public, (there, name, index) in found.items():
                if there == path:
                    yield public, f.get_slice(name)[index] if index else f.get_tensor(name)


def load(folder, dtype=torch.float32):
    """The module in a checkpoint folder, with its weights as `dtype`, on the CPU.

    Raises FileNotFoundError or ValueError where a part is missing, torn, or of another shape than config.json says.
    """
    config = read_config(folder)
    found, _ = inspect(folder, config)
    return assemble(config, private_tensors(config, {name: t.to(dtype) for name, t in read_tensors(found)}))


def assemble(config, state):
    """The module of Config `config` whose weights are the tensors of the state dict, themselves and not copies."""
    with torch.device("meta"):
        module = Transformer(config)
    module.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        module.lm_head.weight = module.model.embed_tokens.weight
    return module


def save(module, folder, tokenizer=None, state=None, step=None):
    """Writes config.json, model.safetensors and, if given, the tokenizer into `folder`, each renamed into place.

    state: the weights to write in the place of the module's own (a sharded module has only its part of them).
    step: a number that goes into the metadata of model.safetensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict() if state is None else state
    tensors = {n: t.detach().cpu().contiguous() for n, t in public_tensors(module.config, state)}
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "config.json", public_config(module.config, next(iter(tensors.values())).dtype))
    with replacing(folder / "model.safetensors") as beside:
        save_file(tensors, beside, metadata={"format": "pt"} | ({} if step is None else {"step": str(step)}))


BESIDES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
           "generation_config.json", "LICENSE*", "NOTICE*")  # fmt: skip
SHARD_SIZE = 5e9  # bytes


def write_folder(source, target, config, dtype, stream, run, shard_size=SHARD_SIZE):
    """The end of an operator: the new checkpoint folder `target`, a tensor at a time, renamed into place when whole.

    stream: yields the tensors that Config `config` asks for, in the order of public_tensors; they are written as
    `dtype`, into files of at most shard_size bytes (a larger tensor has its own). run: the contents of run.json, to
    which the counts are added. What lies beside the weights in `source`, such as the tokenizer, comes along.
    Returns the bytes of tensors. Raises ValueError before anything is written, OSError if writing fails."""
    source, target = Path(source), Path(target)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists (another name; nothing is overwritten)")
    if not shard_size >= 1:
        raise ValueError(f"shard_size is {shard_size} (bytes, such as 5e9)")
    with torch.device("meta"):
        module = Transformer(config)
    shards, size, total = [{}], 0, 0  # of each file {name: (shape, bytes)}
    for name, t in public_tensors(config, module.state_dict()):
        n = t.numel() * dtype.itemsize
        if shards[-1] and size + n > shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = list(t.shape), n
        size, total = size + n, total + n
    copied = sorted({p for pattern in BESIDES for p in source.glob(pattern) if p.is_file()})
    ground = next(p for p in target.absolute().parents if p.exists())
    need, free = total + sum(p.stat().st_size for p in copied) + 2**20, shutil.disk_usage(ground).free
    if need > free:
        raise ValueError(f"{target} needs {need / 1e9:.2f} GB, and {ground} has {free / 1e9:.2f} GB free (make room)")
    partial, index = target.with_name(f"{target.name}.partial-{os.getpid()}"), {}
    partial.mkdir(parents=True)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for i, shard in enumerate(shards):
                several = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
                file = several if len(shards) > 1 else "model.safetensors"
                index |= dict.fromkeys(shard, file)
                write_shard(partial / file, shard, dtype, stream, bar)
        for path in copied:
            shutil.copyfile(path, partial / path.name)
        write_json(partial / "run.json", {**run, **module.num_parameters()})
        if len(shards) > 1:
            meta = {"total_size": total}
            write_json(partial / "model.safetensors.index.json", {"metadata": meta, "weight_map": index})
        write_json(partial / "config.json", public_config(config, dtype))
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def write_shard(path, shard, dtype, stream, bar):
    """A safetensors file, without ever holding it: the length of the header, the header, then each tensor's bytes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    kind = {t: kind for kind, t in DTYPES.items()}[dtype]
    for name, (shape, n) in shard.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + n]}
        at += n
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for name, (shape, n) in shard.items():
            t = next(stream).to(dtype).contiguous()
            assert list(t.shape) == shape, name
            f.write(t.view(torch.uint8).numpy())
            bar.update(n)
        f.flush()
        os.fsync(f.fileno())


# ---- sampling -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(module, ids, tokens, temperature=1.0, top_k=0, top_p=1.0, seed=1, use_cache=True):
    """Yields up to `tokens` token ids that follow `ids` (a non-empty list of ints), one at a time.

    temperature 0 takes the likeliest token; top_k > 0 keeps the k likeliest; top_p < 1 the fewest whose probabilities
    reach p. Stops after the configuration's eos_token_id. The same seed gives the same text on the same machine.
    """
    device = module.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draw whatever the device
    eos = module.config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    training, cache = module.training, module.new_cache() if use_cache else None
    module.eval()
    ids = list(ids)
    fed = 0
    try:
        for _ in range(tokens):
            logits, _, _ = module(torch.tensor([ids[fed:]], device=device), cache=cache)
            fed = len(ids) if use_cache else 0
            logits = logits[0, -1].float().cpu()
            if temperature == 0:
                token = int(logits.argmax())
            else:
                p, order = (logits / temperature).softmax(-1).sort(descending=True)
                if top_k:
                    p[top_k:] = 0
                p[p.cumsum(-1) - p > top_p] = 0  # the token that crosses top_p stays
                token = int(order[torch.multinomial(p, 1, generator=generator)])
            ids.append(token)
            yield token
            if token in eos:
                return
    finally:
        module.train(training)


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistyped flag with the nearest one: of this file and of those above it."""

    def error(self, message):
        flags = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        near = [name for flag in flags for name in difflib.get_close_matches(flag, self._option_string_actions, 1)]
        super().error(message + f" (did you mean {', '.join(near)}?)" * bool(near))


def main():
    import data

    parser = Parser(
        description='Samples from a checkpoint folder:  python model.py out/dense --prompt "def "', allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", help="checkpoint folder, ours or a public Llama, Mistral, Mixtral, Qwen3 or Qwen3-MoE one")
    add("--prompt", default="def ", help="text to go on from (default: %(default)r)")
    add("--tokens", type=int, default=200, help="tokens to sample at most (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="keep the likeliest up to this probability (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or mps (default: %(default)s)")
    args = parser.parse_args()
    try:
        if args.tokens < 0 or args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
            raise ValueError("--tokens, --temperature and --top-k are at least 0, --top-p above 0 and at most 1")
        device = pick_device(args.device)
        read_config(args.folder)  # says what is wrong with a folder better than the tokenizer would
        tokenizer = data.load_tokenizer(args.folder)
        ids = tokenizer.encode([args.prompt])[0].tolist()
        if not ids:
            raise ValueError("--prompt is empty (give at least one character)")
        module = load(args.folder).to(device)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    shown = tokenizer.decode(ids)
    print(shown, end="", flush=True)
    for token in generate(module, ids, args.tokens, args.temperature, args.top_k, args.top_p, args.seed):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def pick_device(name):
    """torch.device for auto, cpu, cuda or mps. Raises ValueError if this machine has none."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if have["cuda"] else "mps" if have["mps"] else "cpu"
    if name not in have:
        raise ValueError(f"--device {name} is unknown (auto, cpu, cuda, mps)")
    if not have[name]:
        raise ValueError(f"--device {name}: this machine has none ({', '.join(k for k, v in have.items() if v)})")
    return torch.device(name)


if __name__ == "__main__":
    main()
