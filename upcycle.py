"""Upcycling: a trained model becomes a mixture of more experts, and starts where the trained model stopped.

    python upcycle.py SRC DST --experts 8 --top-k 2                       # a Llama or Mistral becomes a Mixtral
    python upcycle.py SRC DST --experts 8 --top-k 2 --granularity 4       # 32 experts of a quarter's width, 8 a token
    python upcycle.py SRC DST --experts 8 --top-k 2 --method drop         # half of each expert's neurons drawn anew
    python upcycle.py MIXTURE DST --experts 16 --top-k 4                  # a mixture of 8 experts gets two of each

Every expert begins as a copy of the dense layer's MLP (Sparse Upcycling, 2212.05055). Only the router is new. Its rows
are random, so the experts see different tokens and grow apart. The scores of a topk-softmax router sum to one. So a
token gets what it got before, whichever copies are chosen:  sum_e s_e MLP(x) = MLP(x).

Granularity G cuts each copy into G parts of F neurons (2410.07524). The parts of a copy have equal router rows, so
their logits tie and the parts are chosen together. Each part carries 1/G of the copy's score: down_proj is multiplied
by G to make up for it. By hand: four neurons give MLP(x) = 1 + 2 + 3 + 4 = 10. Three copies with logits 2, 1, 3 are cut
into two parts each, which give 1 + 2 = 3 and 3 + 4 = 7.

    logits          2 2   1 1   3 3      with top_k 2 a token chooses K = 4: both parts of the third copy and the first
    scores          .13 .13     .37 .37                          softmax of 2 2 3 3
    y = 2 (.13 (3 + 7) + .37 (3 + 7)) = 10                       and 5 without the factor

A mixture can be upcycled as well (Expert Upcycling, 2604.19835). It gets m copies of each expert and of its router row.
By hand, for m = 2: two experts give 10 and 20, their logits are 2 and 1, and both are chosen.

    before                      .73 * 10 + .27 * 20 = 12.7       softmax of 2 1
    --top-k times 2             (.37 + .37) 10 + (.13 + .13) 20 = 12.7: exactly the same function
    --top-k as before           (.5 + .5) 10 = 10: a token gets two copies of its best expert, and loses the second best

The paper keeps top_k, for a token then costs no more than before. Equal copies that see equal tokens stay equal in
training: --router-std or --method must tell them apart.

Left out: upcycling every other layer (2212.05055), choosing which experts to copy by their gradients (2604.19835),
expert choice (moe.py), different models as experts, the optimizer's state (2212.05055: no help in language models).

Try, after `python train.py --tokens 1e6 --out out/dense` (2 minutes; it ends at a loss of 1.761), with
`python upcycle.py out/dense out/x --experts 8 --top-k 2` and `python train.py --init out/x --tokens 0`:
  1. Add --granularity 4, and --scale exact, cube-root or none. (1.761 again; 1.765; 2.133. The published factor is a
     small mistake for a model this small; no factor is a large one.)
  2. The same with untied rows: let `router_rows` draw (r.experts * r.granularity, 1, D). (1.798: a token gets eight
     parts of any copies, some parts twice and others not at all.)
  3. --method drop with --drop-ratio 0.25, 0.5, 1. Then 0.5 with --top-k 8: nearly every old neuron is kept in some
     expert, so is the loss back at 1.761? (1.803, 1.917, 3.094. With eight 1.888: a neuron that half of the experts
     keep speaks at half its strength.)
"""

import argparse
import functools
import math
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch

import checkpoint
import model
import moe
import operators
from model import Config

# E, K and F count what is there after the cut, as in moe.py: E = experts G, K = top_k G, F = intermediate_size / G.

MATRICES = ("gate_proj", "up_proj", "down_proj")
SCALES = ("exact", "cube-root", "none")


@dataclass
class Recipe:
    """How to upcycle the models of Config `source`, dense or mixture. What is None is settled by the source.

    Raises ValueError where the recipe cannot be followed. The options of a method begin with its name; METHOD_ratio is
    the share of neurons that it changes."""

    source: Config
    experts: int
    top_k: int
    granularity: int = None  # None: that of a mixture; of a dense model 1
    router: str = None  # None: that of a mixture; of a dense model Config's default
    method: str = "copy"
    seed: int = 1
    router_std: float = None  # None: 0 for a mixture, whose copies keep their rows; 0.02 for a dense model
    scale: str = "exact"
    drop_ratio: float = 0.5
    noise_ratio: float = 0.5
    noise_std: float = 0.02

    def __post_init__(self):
        mixture = self.source.experts > 0
        if mixture:
            self.check_mixture()
        before = self.source if mixture else Config()
        for name, default in dict(granularity=before.granularity, router=before.router).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.router_std is None:
            self.router_std = 0.0 if mixture else 0.02
        for name, allowed in (("method", METHODS), ("scale", SCALES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r} ({', '.join(allowed)})")
        ranges = dict(experts=(1, 2**20), drop_ratio=(0, 1), noise_ratio=(0, 1), noise_std=(0, 100))
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)} ({low} to {high})")
        if not (self.router_std == 0 or 1e-4 <= self.router_std <= 100):
            raise ValueError(f"router_std is {self.router_std} (0, or 1e-4 to 100: what bf16 and fp16 hold)")
        self.config.check()
        if self.router_std == 0 and self.cut > 1:
            raise ValueError(
                f"router_std is 0 with granularity {self.granularity}: all logits tie, and which parts of which "
                "copy a token gets is left to the reader's top-k (router_std above 0, such as 0.02)"
            )

    def check_mixture(self):
        """What a mixture's copies leave no choice about."""
        E, K = self.source.experts, self.source.top_k
        for name in ("granularity", "router"):
            own, given = getattr(self.source, name), getattr(self, name)
            if given not in (None, own):
                raise ValueError(f"{name} is {given!r}, and that of the mixture {own!r} (leave it out)")
        if self.experts < 2 * E or self.experts % E:
            right = f"{2 * E}, {3 * E} or another multiple"
            raise ValueError(f"experts is {self.experts}, and the mixture has {E} ({right})")
        if self.top_k not in (K, K * self.copies):
            same = f"{K * self.copies} for the same function"
            raise ValueError(f"top_k is {self.top_k} ({K} as before, or {same} at more work a token)")

    @property
    def config(self):
        """The Config of the new model."""
        shape = dict(experts=self.experts, top_k=self.top_k, granularity=self.granularity, router=self.router)
        return replace(self.source, **shape)

    @property
    def copies(self):
        """Of each expert of the source; a dense model is one expert."""
        return self.experts // (self.source.experts or 1)

    @property
    def cut(self):
        """Parts that a copy is cut into. A mixture's experts were cut before."""
        return 1 if self.source.experts else self.granularity

    def changed(self, F):
        """How many of F neurons the method changes."""
        return int(getattr(self, f"{self.method}_ratio", 0) * F)

    def factor(self, matrix):
        """The number that gate_proj, up_proj or down_proj is multiplied by, so that the output keeps its size.

        Copies add amplitudes, for they agree; independent experts add variances, see moe.output_scale."""
        before = self.source.top_k if self.source.experts else 1
        size = {
            "topk-softmax": self.cut,  # scores sum to one, whatever is chosen; the parts of a copy share its score
            "softmax-topk": self.cut * self.copies * before / self.top_k,  # a copy gets 1/m of the old score
        }[self.router]
        return {
            "exact": size if matrix == "down_proj" else 1,  # SwiGLU is linear in down_proj, and in nothing else
            "cube-root": size ** (1 / 3),  # as published: right for a squared ReLU, s^3 relu(a)^2, wrong for SwiGLU
            "none": 1,
        }[self.scale]

    def dtype(self, stored):
        """`stored`, where it holds the result exactly, or else fp32."""
        powers_of_two = all(math.frexp(self.factor(m))[0] == 0.5 for m in MATRICES)
        noisy = self.method == "noise" and self.noise_std > 0 and self.changed(self.source.intermediate_size) > 0
        return stored if powers_of_two and not noisy else torch.promote_types(stored, torch.float32)

    def entry(self):
        """What the lineage says: all but the options of other methods."""
        fields = {k: v for k, v in asdict(self).items() if k != "source"}
        others = METHODS.keys() - {self.method}
        return {"step": "upcycle"} | {k: v for k, v in fields.items() if k.split("_")[0] not in others}


def parse(text):
    """"8x2" -> (8, 2): experts and experts a token."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"--upcycle {text!r} is not EXPERTSxTOP_K (such as 8x2)")
    return int(match[1]), int(match[2])


# ---- the mathematics ------------------------------------------------------------------------------------------------

# Random numbers come from (seed, layer, expert, matrix): folder, module and rank get the same bits. A method takes the
# chosen neurons of a matrix and returns other ones. `drop` and `router_rows` draw numbers that bf16 and fp16 hold.


def short(t):
    """t rounded to numbers that bf16 and fp16 both hold."""
    return t.bfloat16().half().float()


def drop(w_S, r, key):
    """Drop-Upcycling (2502.19261): the neurons S are forgotten, W_S <- N(mean(W_S), std(W_S)^2) for each matrix.

    The paper's code draws S anew for each of gate, up and down, which spoils 1 - (1 - ratio)^3 of the neurons, at 1/2
    seven of eight. Here it is one S for all three: a neuron is old or new."""
    std, mean = (s.float().item() for s in torch.std_mean(w_S.double()))  # a sum in fp32 depends on the threads
    return short(model.normal(w_S.shape, std, *key) + mean)


def noise(w_S, r, key):
    """W_S + N(0, noise_std^2)."""
    return w_S + model.normal(w_S.shape, r.noise_std, *key)


METHODS = {"copy": None, "noise": noise, "drop": drop}


def tag(r):
    """Names the random numbers. A mixture that is upcycled twice with one seed gets other ones the second time."""
    return f"upcycled from {r.source.experts}" if r.source.experts else "upcycled"


def router_rows(layer, r, w=None):
    """The router (E, D). w: that of a mixture, whose rows the copies take over; the first copy keeps its row."""
    D, m, G = r.source.hidden_size, r.copies, r.granularity
    random = model.normal((r.experts, 1, D), r.router_std, r.seed, layer, 0, f"{tag(r)} router")
    if w is None:
        return short(random).expand(-1, G, -1).reshape(-1, D)  # the G parts of a copy are neighbours, and tie
    rows = w.view(-1, 1, G, D).repeat(1, m, 1, 1)  # of each expert m copies, neighbours too
    if r.router_std:
        rows[:, 1:] = short(rows.float() + random.view(-1, m, 1, D))[:, 1:]
    return rows.view(-1, D)


def replica(w, matrix, layer, number, r):
    """Copy `number` of the matrix w, gate or up (neurons, D) or down (D, neurons), as a tuple of parts."""
    axis = 1 if matrix == "down_proj" else 0  # of the neurons
    size = w.shape[axis]
    original = r.source.experts and number // r.granularity % r.copies == 0  # the first copy stays as it is
    if r.changed(size) and not original:
        key = (r.seed, layer, number)
        S = model.normal((size,), 1, *key, f"{tag(r)} neurons").argsort(stable=True)[: r.changed(size)]
        changed = METHODS[r.method](w.index_select(axis, S), r, (*key, f"{tag(r)} {matrix}"))
        w = w.index_copy(axis, S, changed.to(w.dtype))
    if r.factor(matrix) != 1:
        w = w * r.factor(matrix)
    return w.chunk(r.cut, axis)


def operator(config, experts, top_k, **options):
    """The Operator that upcycles models of Config `config`. options: the other fields of Recipe, which may raise."""
    r = Recipe(config, experts, top_k, **options)
    parts = functools.lru_cache(maxsize=2)(functools.partial(replica, r=r))  # gate and up serve r.cut tensors in turn

    def formula(name):
        layer, i, matrix, kind = checkpoint.place(name)
        match kind, matrix, i:
            case "weight", "gate", None:
                return [name] if r.source.experts else [], lambda *w: router_rows(layer, r, *w)
            case "weight", "gate_proj" | "up_proj" | "down_proj", int():
                prefix, (e, g) = f"model.layers.{layer}.mlp", divmod(i, r.granularity)
                if r.source.experts:  # copies are neighbours: expert e is made of expert e // m
                    prefix += f".experts.{e // r.copies * r.granularity + g}"
                number, part = divmod(i, r.cut)
                return [f"{prefix}.{matrix}.weight"], lambda w: parts(w, matrix, layer, number)[part]
            case "weight", "embed_tokens" | "norm" | "lm_head" | "input_layernorm" | "post_attention_layernorm", None:
                return [name], lambda w: w
            case "weight", "q_proj" | "k_proj" | "v_proj" | "o_proj" | "q_norm" | "k_norm", None:
                return [name], lambda w: w
        raise ValueError(f"upcycling has no rule for the tensor {name} (add one to the formula in upcycle.py)")

    return operators.Operator(r.config, formula, r.entry(), r.dtype)


def upcycle(module, experts, top_k, each=lambda block: None, **options):
    """A new model.Transformer made from `module`, which stays as it is. options: the other fields of Recipe.

    each(block) is called with every block as soon as it is whole, see operators.apply_to_module. Raises ValueError on
    a recipe that cannot be followed."""
    return operators.apply_to_module(module, operator(module.config, experts, top_k, **options), each)


def upcycle_folder(src, dst, experts, top_k, source_tokens=None, shard_size=operators.SHARD_SIZE, **options):
    """Makes the checkpoint folder dst from src, a folder or a public model's name. Returns (Config, dtype, bytes).

    source_tokens: what a public source was trained on; shard_size: bytes a file at most (a larger tensor has its own).
    Everything is checked before anything is written, and dst appears only when it is whole. Raises ValueError,
    FileNotFoundError, or OSError if writing fails."""
    src = checkpoint.find(src)
    made = operator(checkpoint.read_config(src), experts, top_k, **options)
    return made.config, *operators.apply_to_folder(src, dst, made, source_tokens, shard_size)


# ---- the command ----------------------------------------------------------------------------------------------------


def command_line():
    parser = model.Parser(
        prog="upcycle.py",
        usage="upcycle.py SRC DST --experts E --top-k K [flags]",
        description="From a checkpoint folder to a mixture of more experts.\n\n"
        + "\n".join(line[2:] for line in __doc__.splitlines() if line.startswith("    python upcycle.py")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given takes the default of Recipe
    )
    add = parser.add_argument_group("folders").add_argument
    add("src", metavar="SRC", help="checkpoint folder, ours or a public Llama, Mistral, Qwen3, Mixtral or Qwen3-MoE "
        "one, or a public model's name such as Qwen/Qwen3-0.6B-Base")  # fmt: skip
    add("dst", metavar="DST", help="folder to make; it must not exist")
    add("--source-tokens", type=float, help="tokens a public SRC was trained on, such as 2e12 (default: unknown)")
    add("--shard-size", type=float, help=f"bytes of a weights file at most (default: {operators.SHARD_SIZE:g})")
    add = parser.add_argument_group("mixture").add_argument
    add("--experts", type=int, required=True, help="full-width experts a layer; a multiple of a mixture's")
    add("--top-k", type=int, required=True, help="full-width experts a token; of a mixture the same, or the multiple")
    add("--granularity", type=int, help="parts each expert is cut into, G (default: 1, or that of the mixture SRC)")
    add("--router", choices=moe.ROUTERS, help=f"order of softmax and choice (default: {Config.router}, or that of the "
        "mixture SRC)")  # fmt: skip
    add("--router-std", type=float, help="deviation of the random part of the new router rows (default: 0.02; 0 if SRC "
        "is a mixture)")  # fmt: skip
    add("--scale", choices=SCALES, help="factor that keeps the output's size: on down_proj, its cube root on all three "
        f"matrices as published (not exact), or none (default: {Recipe.scale})")  # fmt: skip
    add = parser.add_argument_group("experts").add_argument
    add("--method", choices=METHODS, help=f"how the copies are made to differ (default: {Recipe.method})")
    add("--drop-ratio", type=float, help=f"drop: share of neurons drawn anew (default: {Recipe.drop_ratio})")
    add("--noise-ratio", type=float, help=f"noise: share of neurons it is added to (default: {Recipe.noise_ratio})")
    add("--noise-std", type=float, help=f"noise: its deviation (default: {Recipe.noise_std})")
    add("--seed", type=int, help=f"of the random numbers (default: {Recipe.seed})")
    return parser


def main(argv=None):
    parser, caught = command_line(), []
    given = vars(parser.parse_args(argv))

    def leave(number, frame):
        caught.append(number)
        raise KeyboardInterrupt

    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, leave)
    try:
        method = given.get("method", Recipe.method)
        for name in given:
            if (owner := name.split("_")[0]) in METHODS and owner != method:
                raise ValueError(f"--{name.replace('_', '-')} has no use with --method {method} (--method {owner})")
        config, dtype, size = upcycle_folder(**given)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if caught:  # asked first: inside torch a KeyboardInterrupt can become another error
            sys.exit(128 + caught[0])
        parser.error(str(error))
    dst, G = given["dst"], config.granularity
    experts = f"{config.experts * G} experts of width {config.intermediate_size // G}, {config.top_k * G} a token"
    print(f"written: {dst}  ({experts}; {size / 1e9:.3f} GB, {str(dtype).removeprefix('torch.')})")
    if G > 1 and dtype.itemsize < 4:
        print("note: a reader that routes in this dtype splits a copy now and then; in float32 none does")
    print(f"next: python train.py --init {dst}")


if __name__ == "__main__":
    main()
