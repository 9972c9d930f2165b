"""Upcycling: from a dense checkpoint to a mixture of experts that starts where the dense model stopped.

    python upcycle.py SRC DST --experts 8 --top-k 2                       # a Llama or Mistral becomes a Mixtral
    python upcycle.py SRC DST --experts 8 --top-k 2 --granularity 4       # 32 experts of a quarter's width, 8 a token
    python upcycle.py SRC DST --experts 8 --top-k 2 --method drop         # half of each expert's neurons drawn anew
    python train.py --init SRC --upcycle 8x2                              # the same weights, in memory, on every rank

Every expert begins as the dense layer's MLP, everything else is kept, and only the router is new: random rows, normal
with deviation `router_std` (Sparse Upcycling, 2212.05055; Llama 3 Meets MoE, 2412.09952). The scores s of a
topk-softmax router sum to one, so whatever it chooses, nothing has changed yet:

    sum_e s_e MLP(x) = MLP(x)

The experts then grow apart, because each sees other tokens. Three ways to start them:

    copy     E copies.
    noise    in each expert a share `noise_ratio` of the F neurons gets N(0, noise_std^2) added to its weights.
    drop     in each expert a share `drop_ratio` of the neurons S is forgotten (Drop-Upcycling, 2502.19261):
                 W_S <- N(mean(W_S), std(W_S)^2)       the same S in gate, up and down; statistics of each matrix's own
             A neuron is a row of gate, a row of up and a column of down; here it is old or new. The released code
             draws S anew for each of the three, which spoils 1 - (1 - r)^3 of the neurons: at r = 1/2, 7 of 8.

Granularity (2410.07524). The F neurons are cut into G shards; the narrow expert e G + g is shard g of replica e. The G
router rows of a replica are equal (a virtual group), so its logits tie and the K G largest are K whole replicas:

    y = sum_e sum_g (s_e / G) shard_g(x) = 1/G MLP(x)                     hence the factor c = G

A softmax-topk router scores about 1 / (E G) each, which makes c = E G / K: exact for equal logits only.
    exact      c on down_proj alone. SwiGLU is linear in down, so this and nothing else gives the dense function back.
    cube-root  c^(1/3) on all three matrices, as published: right for a squared ReLU, relu(s a)^2 s = s^3 relu(a)^2,
               and wrong for SwiGLU, where silu(s a) is not s silu(a). They found it better to train from than a factor
               on the last matrix alone, but with softmax-topk, where neither is exact.
    none       the layer's output begins 1/c as large.

Random numbers come from (seed, layer, expert, matrix): folder, module and rank get the same bits. Router rows and
dropped neurons are drawn as numbers that bf16 and fp16 hold, so a folder keeps its dtype; with noise, or a factor that
is no power of two, it is written in fp32.

Measured (one CPU core).
- 0.5 B parameters in bf16 to 8 experts, 5.2 GB in shards of 1 GB, until they are on the disk: 7.4 s, 2.7 of them to
  start Python and PyTorch, and at most 0.42 GB of memory. `cp -r` of the result: 2.7 s. mergekit 0.1.5, the same bits
  in every expert: 15.0 s and 2.1 GB. drop 29 s; noise 31 s and 0.74 GB, for its fp32 is twice the bytes.
  (`python experiments/bench_upcycle.py`)
- Public readers route in the folder's dtype. In bf16 two replicas can tie, and 0.2 to 0.3 % of tokens in a layer get
  parts of others (E 8, K 2, G 2 to 8, D 128 and 576); in fp32, and in moe.py always, none. Rows stored in fp32 would
  not help: transformers casts the whole folder to one dtype.
- SmolLM2-135M (`bash experiments/smollm2.sh`), 82,000 tokens on: 0.006 nats below the dense model trained on, at equal
  tokens and 1.6 times the FLOPs.

Left out on purpose: upcycling only every other layer (2212.05055), expert choice (see moe.py), shared experts, merging
different models as experts (mergekit), keeping the optimizer's state (2212.05055: it helps vision, not language).

Try, after `python train.py --tokens 1e6 --out out/dense` (2 minutes; it ends at a loss of 1.761), with
`python upcycle.py out/dense out/x --experts 8 --top-k 2` and `python train.py --init out/x --tokens 0`:
  1. Add --granularity 4, and --scale exact, cube-root or none. (1.761 again; 1.765; 2.133. The published factor is a
     small mistake for a model this small; no factor is a large one.)
  2. The same with untied rows: in `pieces` draw (r.experts * r.granularity, D) and delete the repeat_interleave.
     (1.798: a token now gets eight parts of any replicas, some parts twice and others not at all.)
  3. --method drop with --drop-ratio 0.25, 0.5, 1. Then 0.5 with --top-k 8: nearly every old neuron is kept in some
     expert, so is the loss back at 1.761? (1.803, 1.917, 3.094. With eight 1.888: a neuron that half of the experts
     keep speaks at half its strength. Copies average to the original, different halves do not.)
"""

import argparse
import math
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch

import model
import moe

METHODS = ("copy", "noise", "drop")
SCALES = ("exact", "cube-root", "none")


@dataclass
class Recipe:
    """How to upcycle. The sizes are those of moe.py: E full-width experts, K of them a token, each cut into G."""

    experts: int
    top_k: int
    granularity: int = 1
    method: str = "copy"
    seed: int = 1
    router: str = "topk-softmax"
    router_std: float = 0.02
    scale: str = "exact"
    drop_ratio: float = 0.5
    noise_ratio: float = 0.5
    noise_std: float = 0.02

    def check(self, dense):
        """The Config of the mixture that a model of Config `dense` becomes. Raises ValueError if it cannot."""
        if dense.experts:
            raise ValueError(f"a mixture of {dense.experts} experts cannot be upcycled (a dense model can)")
        for name, allowed in (("method", METHODS), ("scale", SCALES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r} ({', '.join(allowed)})")
        ranges = dict(experts=(1, 2**20), drop_ratio=(0, 1), noise_ratio=(0, 1), noise_std=(0, 100))
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)} ({low} to {high})")
        if not (self.router_std == 0 or 1e-4 <= self.router_std <= 100):
            raise ValueError(f"router_std is {self.router_std} (0, or 1e-4 to 100: what bf16 and fp16 hold)")
        shape = dict(experts=self.experts, top_k=self.top_k, granularity=self.granularity, router=self.router)
        config = replace(dense, **shape)
        config.check()
        if self.router_std == 0 and self.granularity > 1:
            raise ValueError(
                f"router_std is 0 with granularity {self.granularity}: all logits tie, and which parts of which "
                "replica a token gets is left to the reader's top-k (router_std above 0, such as 0.02)"
            )
        return config

    def factor(self, matrix):
        """The number that gate_proj, up_proj or down_proj is multiplied by."""
        E, K, G = self.experts, self.top_k, self.granularity
        c = G if self.router == "topk-softmax" else E * G / K
        if self.scale == "cube-root":
            return c ** (1 / 3)
        return c if self.scale == "exact" and matrix == "down_proj" else 1

    def dtype(self, source, F):
        """`source`, where it holds the result for F neurons exactly, or else fp32."""
        powers_of_two = all(math.frexp(self.factor(m))[0] == 0.5 for m in ("gate_proj", "up_proj", "down_proj"))
        noisy = self.method == "noise" and self.noise_std > 0 and int(self.noise_ratio * F) > 0
        return source if powers_of_two and not noisy else torch.promote_types(source, torch.float32)


def parse(text):
    """"8x2" -> (8, 2): experts and experts a token."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"--upcycle {text!r} is not EXPERTSxTOP_K (such as 8x2)")
    return int(match[1]), int(match[2])


def lineage_step(experts, top_k, **options):
    """The entry of run.json's lineage: the fields of Recipe, without those of other methods."""
    fields = asdict(Recipe(experts, top_k, **options))
    other = {"drop", "noise"} - {fields["method"]}
    return {"step": "upcycle"} | {k: v for k, v in fields.items() if k.split("_")[0] not in other}


# ---- the mathematics ------------------------------------------------------------------------------------------------


def short(t):
    """t rounded to numbers that bf16 and fp16 both hold."""
    return t.bfloat16().half().float()


def replica(w, matrix, layer, e, r):
    """Replica e of the dense matrix w, gate or up (F, D) or down (D, F), as G parts of F / G neurons. r: a Recipe."""
    axis = 1 if matrix == "down_proj" else 0  # of the neurons
    F = w.shape[axis]
    changed = int({"copy": 0, "noise": r.noise_ratio, "drop": r.drop_ratio}[r.method] * F)
    if changed:
        S = model.normal((F,), 1, r.seed, layer, e, "upcycled neurons").argsort(stable=True)[:changed]
        old, key = w.index_select(axis, S), (r.seed, layer, e, f"upcycled {matrix}")
        if r.method == "drop":  # in fp64: a sum in fp32 would depend on the number of threads
            std, mean = (s.float().item() for s in torch.std_mean(old.double()))
            new = short(model.normal(old.shape, std, *key) + mean)
        else:
            new = old + model.normal(old.shape, r.noise_std, *key)
        w = w.index_copy(axis, S, new.to(w.dtype))
    if r.factor(matrix) != 1:
        w = w * r.factor(matrix)
    return w.chunk(r.granularity, axis)


def pieces(name, read, r):
    """Yields what parameter `name` of the mixture consists of, in the order of model.public_tensors: one tensor, or a
    layer's experts matrix by matrix. read(name) gives a parameter of the dense model."""
    prefix, _, last = name.partition(".mlp.")
    if not last:
        yield read(name)
        return
    layer = int(prefix.split(".")[-1])
    if last == "gate.weight":
        D = len(read(f"{prefix}.input_layernorm.weight"))
        rows = short(model.normal((r.experts, D), r.router_std, r.seed, layer, 0, "upcycled router"))
        yield rows.repeat_interleave(r.granularity, 0)  # neighbours in one virtual group
        return
    matrices = ("gate_proj", "up_proj") if last == "experts.gate_up_proj" else ("down_proj",)
    dense = {m: read(f"{prefix}.mlp.{m}.weight") for m in matrices}
    for e in range(r.experts):
        for parts in zip(*(replica(w, m, layer, e, r) for m, w in dense.items())):
            yield from parts


@torch.no_grad()
def upcycle(module, experts, top_k, each=lambda block: None, **options):
    """A new model.Transformer made from the dense `module`, which stays as it is. options: the other fields of Recipe.

    each(block) is called with every block as soon as it is whole and before the next is made: a trainer can shard it
    there, so that no rank ever holds all experts of all layers. Raises ValueError on a recipe that cannot be followed.
    """
    r = Recipe(experts, top_k, **options)
    config = r.check(module.config)
    old = module.state_dict()
    device, dtype = old["lm_head.weight"].device, r.dtype(old["lm_head.weight"].dtype, config.intermediate_size)
    read = lambda name: old[name].cpu().to(dtype)
    with torch.device("meta"):
        new = model.Transformer(config)

    def fill(part, prefix):
        state = {}
        for name, empty in part.state_dict().items():
            state[name] = torch.empty(empty.shape, dtype=dtype, device=device)
            for i, piece in enumerate(pieces(prefix + name, read, r)):
                state[name].view(-1, *piece.shape)[i] = piece
        part.load_state_dict(state, assign=True)

    fill(new.model.embed_tokens, "model.embed_tokens.")
    for i, block in enumerate(new.model.layers):
        fill(block, f"model.layers.{i}.")
        each(block)
    fill(new.model.norm, "model.norm.")
    if config.tie_word_embeddings:
        new.lm_head.weight = new.model.embed_tokens.weight
    else:
        fill(new.lm_head, "lm_head.")
    return new.train(module.training)


# ---- the folder -----------------------------------------------------------------------------------------------------


def upcycle_folder(src, dst, experts, top_k, source_tokens=None, shard_size=model.SHARD_SIZE, **options):
    """Makes the checkpoint folder dst from the dense one src, a tensor at a time. Returns (Config, dtype, bytes).

    source_tokens: what a public source was trained on; shard_size: bytes a file at most (a larger tensor has its own).
    Everything is checked before anything is written, and dst appears only when it is whole. Raises ValueError,
    FileNotFoundError, or OSError if writing fails.
    """
    src, r = Path(src), Recipe(experts, top_k, **options)
    dense = model.read_config(src)
    config = r.check(dense)
    found, stored = model.inspect(src, dense)
    tokenizer, lineage = model.read_lineage(src, source_tokens)
    dtype = r.dtype(stored, config.intermediate_size)

    def read(name):
        return next(model.read_tensors({name: found[name]}))[1].to(dtype)

    with torch.device("meta"):
        names = model.Transformer(config).state_dict()
    if config.tie_word_embeddings:
        del names["lm_head.weight"]
    stream = (piece for name in names for piece in pieces(name, read, r))
    run = {"tokenizer": tokenizer, "lineage": [*lineage, lineage_step(experts, top_k, **options)]}
    return config, dtype, model.write_folder(src, dst, config, dtype, stream, run, shard_size)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = model.Parser(
        prog="upcycle.py",
        usage="upcycle.py SRC DST --experts E --top-k K [flags]",
        description="From a dense checkpoint folder to a mixture of experts.\n\n"
        + "\n".join(line[2:] for line in __doc__.splitlines() if line.startswith("    python upcycle.py")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given takes the default of Recipe
    )
    add = parser.add_argument_group("folders").add_argument
    add("src", metavar="SRC", help="checkpoint folder, ours or a public Llama, Mistral or Qwen3 one")
    add("dst", metavar="DST", help="folder to make; it must not exist")
    add("--source-tokens", type=float, help="tokens a public SRC was trained on, such as 2e12 (default: unknown)")
    add("--shard-size", type=float, help=f"bytes of a weights file at most (default: {model.SHARD_SIZE:g})")
    add = parser.add_argument_group("mixture").add_argument
    add("--experts", type=int, required=True, help="full-width experts a layer, E")
    add("--top-k", type=int, required=True, help="full-width experts a token, K")
    add("--granularity", type=int, help=f"parts each expert is cut into, G (default: {Recipe.granularity})")
    add("--router", choices=moe.ROUTERS, help=f"order of softmax and choice (default: {Recipe.router})")
    add("--router-std", type=float, help=f"deviation of the router's weights; 0: zeros (default: {Recipe.router_std})")
    add("--scale", choices=SCALES, help="factor that keeps the output's size: G on down_proj, its cube root on all "
        f"three matrices as published (not exact), or none (default: {Recipe.scale})")  # fmt: skip
    add = parser.add_argument_group("experts").add_argument
    add("--method", choices=METHODS, help=f"how the copies are made to differ (default: {Recipe.method})")
    add("--drop-ratio", type=float, help=f"drop: share of neurons drawn anew (default: {Recipe.drop_ratio})")
    add("--noise-ratio", type=float, help=f"noise: share of neurons it is added to (default: {Recipe.noise_ratio})")
    add("--noise-std", type=float, help=f"noise: its deviation (default: {Recipe.noise_std})")
    add("--seed", type=int, help=f"of the random numbers (default: {Recipe.seed})")
    given, caught = vars(parser.parse_args(argv)), []

    def leave(number, frame):
        caught.append(number)
        raise KeyboardInterrupt

    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, leave)
    try:
        method = given.get("method", Recipe.method)
        for name in ("drop_ratio", "noise_ratio", "noise_std"):
            if name in given and name.split("_")[0] != method:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} has no use with --method {method} (--method {name.split('_')[0]})")
        config, dtype, size = upcycle_folder(**given)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if caught:  # asked first: inside torch a KeyboardInterrupt can become another error
            sys.exit(128 + caught[0])
        parser.error(str(error))
    dst, G = given["dst"], config.granularity
    experts = f"{config.experts * G} experts of width {config.intermediate_size // G}, {config.top_k * G} a token"
    print(f"written: {dst}  ({experts}; {size / 1e9:.3f} GB, {str(dtype).removeprefix('torch.')})")
    if G > 1 and dtype.itemsize < 4:
        print("note: a reader that routes in this dtype splits a replica now and then; in float32 none does")
    print(f"next: python train.py --init {dst}")


if __name__ == "__main__":
    main()
