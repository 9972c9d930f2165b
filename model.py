"""The transformer: a decoder as Llama, Mistral, Qwen2 and Qwen3 have it.

A token becomes a vector x of `hidden_size` numbers, the residual stream. Each block adds to it twice:

    x = x + Attention(RMSNorm(x))         looks at this token and at those before it
    x = x + MLP(RMSNorm(x))               looks at this token alone

At the end the head turns x into one logit for each word of the vocabulary. What differs from GPT-2, and from nanoGPT:

    RMSNorm     x / sqrt(mean(x^2) + eps) * gain. It has no mean to subtract and no bias (1910.07467).
    SwiGLU      MLP(x) = W_down (silu(W_gate x) * W_up x), with silu(z) = z sigmoid(z): three matrices (2002.05202).
    rotation    Positions are not added to x. They turn queries and keys (RoFormer, 2104.09864), see below.
    groups      Several query heads share one head of keys and values (2305.13245): a smaller cache.
    QK-norm     An RMSNorm on each query and key head, as in Qwen3. Without it attention scores can grow without bound.
    experts     If `experts` is not 0, the mixture of experts of moe.py stands in the place of the MLP.

The rotation, by hand. Let a head have 4 numbers (a0, a1, b0, b1). They are two pairs, (a0, b0) and (a1, b1), in the
half-split order of Hugging Face. At position t the first pair is turned by the angle t, the second by t / 100 (if
rope_theta is 10000). A query (1, 0, 0, 0) at position 3 becomes (cos 3, 0, sin 3, 0), a key (1, 0, 0, 0) at position 1
becomes (cos 1, 0, sin 1, 0). Their product is cos 3 cos 1 + sin 3 sin 1 = cos(3 - 1): it depends on the distance alone.

Parameters carry the public names (`model.layers.0.self_attn.q_proj.weight`); checkpoint.py reads and writes them.

    python model.py out/dense --prompt "def "                  # sample

Left out: dropout (one pass over the data needs none), sliding windows, masks between packed documents, and every
attention kernel but torch's `scaled_dot_product_attention`. cpu.py has the same arithmetic, faster, for CPUs.

Try:
  1. Let `depth` be 1 in `init_weights` and train 200 steps: with 3 layers the loss barely notices; with
     --num-hidden-layers 24 the start is visibly slower. The residual stream grew with every block.
  2. Delete the line that rotates q and k: the causal mask alone still tells the model something of positions, but the
     loss ends higher.
  3. Change rope_theta from 10000 to 1000000 in config.json of a trained folder (it stands there twice, for old readers)
     and evaluate with `python train.py --init FOLDER --tokens 0`: the weights rely on positions, and the loss jumps.
"""

import hashlib
import math
import os
import signal
from dataclasses import dataclass

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import cpu
import moe


@dataclass
class Config:
    """The shape of a model, in Hugging Face's names; `experts`, `top_k` and `granularity` are those of moe.py. A new
    field must be written and read in configuration.py (public_config, from_public), or be refused there: a saved folder
    would lose it."""

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
    qkv_bias: bool = False  # biases of queries, keys and values, as in Qwen2
    experts: int = 0  # full-width experts; 0 is a dense model
    top_k: int = 2  # of them a token
    granularity: int = 1  # G: each is cut into G narrow ones, and a token gets G times as many
    router: str = "topk-softmax"  # or softmax-topk
    capacity_factor: float | None = None  # of training; None: no token is ever dropped
    balance_coef: float = 0.01  # of training: weight of the balancing loss, which train.py adds
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

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
        if self.qkv_bias and (self.experts or self.qk_norm):
            other = "a mixture of experts" if self.experts else "QK-norm"
            raise ValueError(f"no public format holds biases of q, k and v beside {other} (a model without biases)")
        if self.experts:
            moe.check(
                self.hidden_size, self.intermediate_size, self.experts, self.top_k, self.granularity, self.router,
                self.capacity_factor,
            )  # fmt: skip
            if self.router == "softmax-topk" and not self.qk_norm:
                right = "topk-softmax, or a model with it"
                raise ValueError(f"no public format holds a softmax-topk router without QK-norm ({right})")


# ---- the layers -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if x.device.type == "cpu":
            return cpu.RMSNorm.apply(x, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


def rotation(config, positions, device):
    """The rotary angles, position * theta^(-2 i / head_dim), as cos (cos, cos) and signed sin (-sin, sin), each (T,
    head_dim), fp32."""
    two_i = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-two_i / config.head_dim)  # (head_dim / 2,)
    if config.rope_scaling:
        # Llama 3.1: a pair that makes fewer than low_freq_factor turns in the original context is slowed by `factor`,
        # one that makes more than high_freq_factor stays, and between the two the change is linear.
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequency = frequency * (ramp.clamp(0, 1) + (1 - ramp.clamp(0, 1)) / s["factor"])
    angle = torch.outer(positions.float(), frequency)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x, cos, signed_sin):
    """Turns the pairs (a, b) = (x_i, x_{i + head_dim/2}) of x (B, T, heads, head_dim) by their angles. roll gives
    (b, a), so the sum is (a cos - b sin, b cos + a sin)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos[:, None].to(x.dtype), swapped, signed_sin[:, None].to(x.dtype))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
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
        if x.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 1024:  # memory grows with T^2
            y = cpu.causal_attention(q, k, v)
        else:
            causal = T == k.shape[2]  # with a cache, one new token sees all that went before
            grouped = self.heads != self.kv_heads
            if grouped and q.dtype == torch.float32:  # on CUDA no kernel but the largest of memory takes groups in fp32
                k, v, grouped = *(t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v)), False
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
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
    """The decoder. Its parameters have the public names; `init_weights` or `checkpoint.load` gives them values."""

    def __init__(self, config):
        super().__init__()
        config.check()
        self.config = config
        self.recompute_blocks = False  # True: a block keeps its input alone for the backward pass, and runs twice
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
        mean cross-entropy in nats a token and logits None. aux is None for a dense model. For a mixture it is what
        train.py adds to the loss, balance_loss and z_loss, and what it logs, counts (layers, experts), dropped and
        entropy; all but the counts are means over layers.
        cache: None, or the list of `new_cache()`, to which the keys and values of ids are added.
        """
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        if past and ids.shape[1] > 1:
            raise ValueError(f"{ids.shape[1]} tokens after a cache (one at a time)")
        cos, sin = rotation(self.config, torch.arange(past, past + ids.shape[1], device=ids.device), ids.device)
        x = self.model.embed_tokens(ids)  # (B, T, D)
        auxes = []
        for i, layer in enumerate(self.model.layers):
            if self.recompute_blocks and self.training:
                x, aux = recompute(layer, x, cos, sin, use_reentrant=False)
            else:
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

    def cross_entropy(self, x, targets, most=None):
        """Mean loss of x (B T, D) against targets (B T,). More than `most` logits (2^28; CUDA: 2^30) are never held at
        once, nor kept for the backward pass: a large vocabulary is worked through in slices, each computed twice."""
        most = most or (2**30 if x.device.type == "cuda" else 2**28)

        def total(x, targets):
            return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-100, reduction="sum")

        rows = max(1, most // self.config.vocab_size)
        if len(x) <= rows:
            loss = total(x, targets)
        else:
            slices = zip(x.split(rows), targets.split(rows))
            loss = sum(recompute(total, *s, use_reentrant=False) for s in slices)
        return loss / (targets != -100).sum()

    def new_cache(self):
        return [[] for _ in self.model.layers]

    def num_parameters(self):
        """{"N", "N_active", "N_total", "embeddings"}, in parameters. N: the dense model of this shape, with one
        full-width MLP a layer and no router. N_active: what a token touches. N_total: all. None of the three counts
        embeddings and head; the last two count routers."""
        c = self.config
        embedding = self.model.embed_tokens.weight.numel()
        total = sum(p.numel() for p in self.model.parameters()) - embedding
        mlp = 3 * c.hidden_size * c.intermediate_size * c.num_hidden_layers  # one full-width MLP in every layer
        router = c.hidden_size * c.experts * c.granularity * c.num_hidden_layers
        rest = total - router - max(c.experts, 1) * mlp  # attention and norms
        active = rest + router + (c.top_k if c.experts else 1) * mlp
        embeddings = embedding * (1 if c.tie_word_embeddings else 2)
        return {"N": rest + mlp, "N_active": active, "N_total": total, "embeddings": embeddings}

    def flops_per_token(self, context):
        """Training FLOPs a token: 6 a parameter of the products it passes (head included, embedding look-up not), and
        12 layers heads head_dim context for the attention scores (the convention of PaLM, 2204.02311, and nanoGPT)."""
        c = self.config
        vectors = sum(p.numel() for p in self.model.parameters() if p.dim() == 1)  # gains, biases: no products
        products = self.num_parameters()["N_active"] - vectors + c.hidden_size * c.vocab_size
        return 6 * products + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context


def normal(shape, std, seed, layer, expert, matrix, dtype=torch.float32):
    """Normal numbers that depend on (seed, layer, expert, matrix) and on nothing else. So any process can draw any
    matrix alone, and a new matrix changes no other. Drawn on the CPU in fp32."""
    key = hashlib.sha256(f"{seed} {layer} {expert} {matrix}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)  # it takes 63 bits
    return torch.empty(shape).normal_(0, std, generator=generator).to(dtype)


def initial(config, name, shape, seed):
    """The initial values of the parameter `name` of a state dict, fp32. All are normal; this is their deviation:

    | embed_tokens, lm_head                | 0.02                                                                    |
    | q, k, v, gate, up                    | 1 / sqrt(numbers read): unit variance in, unit variance out             |
    | o_proj, down_proj                    | the same / sqrt(2 layers): the residual stream keeps its size           |
    | down_proj of an expert               | the same x moe.output_scale, with the full width as the numbers read    |
    | mlp.gate, the router                 | 0.02 / sqrt(numbers read): logits near 0 at the start                   |
    | gains of norms; biases               | not drawn: 1; 0                                                         |
    """
    c, depth = config, math.sqrt(2 * config.num_hidden_layers)
    layer, in_expert = int(name.split(".")[2]) if ".layers." in name else -1, ".experts." in name
    matrix = name.split(".")[-1 if in_expert else -2]
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    unit = 1 / math.sqrt(shape[-1])
    special = {"embed_tokens": 0.02, "lm_head": 0.02, "gate": 0.02 * unit}
    std = (special | {"o_proj": unit / depth, "down_proj": unit / depth}).get(matrix, unit)
    if not in_expert:
        return normal(shape, std, seed, layer, 0, matrix)
    if matrix == "down_proj":  # shape[-1] is a narrow width, 1/G of the full one
        std *= moe.output_scale(c.experts, c.top_k, c.granularity, c.router) / math.sqrt(c.granularity)
    E, *shape = shape  # one tensor holds all experts of the layer: (E, out, in)
    return torch.stack([normal(shape, std, seed, layer, e, matrix) for e in range(E)])


@torch.no_grad()
def init_weights(module, seed):
    """Draws every weight of `module` anew."""
    for name, p in module.named_parameters():
        p.copy_(initial(module.config, name, p.shape, seed))
    return module


# ---- sampling -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(module, ids, tokens, temperature=1.0, top_k=0, top_p=1.0, seed=1, use_cache=True):
    """Yields up to `tokens` token ids that follow `ids` (a non-empty list of ints), one at a time.

    temperature 0 takes the likeliest token; top_k > 0 keeps the k likeliest; top_p < 1 the fewest whose probabilities,
    of all words, reach p. Stops after the configuration's eos_token_id, not at max_position_embeddings. The same seed
    gives the same text on the same machine.
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
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite (its training has diverged)")
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


def main():
    import checkpoint
    from tables import Parser
    from tokenizer import load_tokenizer

    parser = Parser(description='Samples from a checkpoint folder:  python model.py out/dense --prompt "def "')
    add = parser.add_argument
    add("folder", help="checkpoint folder, ours or a public one, or a public model's name such as Qwen/Qwen3-0.6B-Base")
    add("--prompt", default="def ", help="text to go on from (default: %(default)r)")
    add("--tokens", type=int, default=200, help="tokens to sample at most (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="keep the likeliest up to this probability (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    add("--device", default="cpu", help="auto, cpu, cuda or mps (not tried; default: %(default)s)")
    args = parser.parse_args()
    try:
        if args.tokens < 0 or not args.temperature >= 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
            raise ValueError("--tokens, --temperature and --top-k are at least 0, --top-p above 0 and at most 1")
        device = pick_device(args.device)
        folder = checkpoint.find(args.folder)
        checkpoint.read_config(folder)  # says what is wrong with a folder better than the tokenizer would
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer.encode([args.prompt])[0].tolist()
        if not ids:
            raise ValueError("--prompt is empty (give at least one character)")
        module = checkpoint.load(folder).to(device)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    shown = tokenizer.decode(ids)
    try:
        print(shown, end="", flush=True)
        for token in generate(module, ids, args.tokens, args.temperature, args.top_k, args.top_p, args.seed % 2**63):
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print(flush=True)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os._exit(0)
    except ValueError as error:
        parser.error(str(error))


def pick_device(name):
    """torch.device for auto, cpu, cuda or mps. auto: CUDA, else the CPU. Apple's GPU is only taken if asked for: it was
    not tried, and some versions of torch compute wrong numbers on it. Raises ValueError if this machine has none."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if have["cuda"] else "cpu"
    if name not in have:
        raise ValueError(f"--device {name} is unknown (auto, cpu, cuda, mps)")
    if not have[name]:
        raise ValueError(f"--device {name}: this machine has none ({', '.join(k for k, v in have.items() if v)})")
    return torch.device(name)


if __name__ == "__main__":
    main()
