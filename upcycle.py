"""Upcycling: a trained model becomes a mixture of more experts, and starts where the trained model stopped.

    python upcycle.py SRC DST --experts 8 --top-k 2                       # a Llama or Mistral becomes a Mixtral
    python upcycle.py SRC DST --experts 8 --top-k 2 --granularity 4       # 32 experts of a quarter's width, 8 a token
    python upcycle.py SRC DST --experts 8 --top-k 2 --method drop         # half of each expert's neurons drawn anew
    python upcycle.py MIXTURE DST --experts 16 --top-k 4                  # two copies of each of 8 experts

Every expert begins as a copy of the dense layer's MLP (Sparse Upcycling, 2212.05055). Only the router is new. Its rows
are random, so the experts get different tokens and grow apart. The scores s_e of a topk-softmax router sum to one, so
a token gets what it got before, whichever copies it chooses:  sum_e s_e MLP(x) = MLP(x).

Granularity G cuts each copy into G parts (2410.07524). The parts of a copy have equal router rows: their logits tie,
and they are chosen together. Each has 1/G of the copy's score, so down_proj is multiplied by G. By hand: four neurons
give MLP(x) = 1 + 2 + 3 + 4 = 10. Three copies with the logits 2, 1 and 3 are cut into two parts each.

    logits     2    2    1    1    3    3      top_k 2: a token chooses both parts of the third copy and of the first
    scores   .13  .13            .37  .37      softmax of 2 2 3 3
    parts    1+2  3+4  1+2  3+4  1+2  3+4      y = 2 (.13 * 3 + .13 * 7 + .37 * 3 + .37 * 7) = 10

A mixture is upcycled by copying each expert with its router row (Expert Upcycling, 2604.19835). By hand: two experts
give 10 and 20, and their scores are 3/4 and 1/4 (logits log 3 and 0). There are two copies of each.

    before                3/4 * 10 + 1/4 * 20 = 12.5
    --top-k doubled       (3/8 + 3/8) * 10 + (1/8 + 1/8) * 20 = 12.5      exactly the same function
    --top-k as before     (1/2 + 1/2) * 10 = 10                           two copies of the best expert: the second
                                                                          best is lost until the copies differ
The paper keeps top_k, so that a token costs what it cost. Copies that are equal in all and get the same tokens stay
equal in training. --router-std or --method tells them apart, and leaves the first copy of each expert as it is.

Left out: upcycling every other layer (2212.05055); choosing the experts to copy by their gradients (2604.19835);
different models as experts; the optimizer's state (2212.05055: it helps vision, not language).

Try, after `python train.py --tokens 1e6 --out out/dense` (2 minutes; it ends at a loss of 1.761), with
`python upcycle.py out/dense out/x --experts 8 --top-k 2` and `python train.py --init out/x --tokens 0`:
  1. Add --granularity 4, and --scale exact, cube-root or none. (1.761 again; 1.765; 2.133. The published factor is a
     small mistake for a model this small; no factor is a large one.)
  2. --method drop with --drop-ratio 0.25, 0.5, 1. Then 0.5 with --top-k 8: nearly every old neuron is kept in some
     expert, so is the loss back at 1.761? (1.803, 1.917, 3.094. With eight 1.888: a neuron that half of the experts
     keep speaks at half its strength.)
  3. Train a mixture of 8x2 for 1e6 tokens and upcycle it to 16x4, 16x2 and 32x2. (1.795, as before; 1.847; 1.847.)
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

# E and K count what is there after the cut, as in moe.py: E = experts G, K = top_k G. D is hidden, m the copies of each
# expert. The names experts, top_k and intermediate_size count full-width experts, before the cut.

MATRICES = ("gate_proj", "up_proj", "down_proj")
SCALES = ("exact", "cube-root", "none")
ROUTER_STD = 0.02  # of a router for a dense model; the copies of a mixture keep their rows


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
    router_std: float = None  # of the random part of new rows; None: 0 for a mixture, ROUTER_STD for a dense model
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
            self.router_std = 0.0 if mixture else ROUTER_STD
        for name, allowed in (("method", METHODS), ("scale", SCALES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r} ({', '.join(allowed)})")
        ratios = {name: (0, 1) for name in vars(self) if name.endswith("_ratio")}
        for name, (low, high) in (dict(experts=(1, 2**20), noise_std=(0, 100)) | ratios).items():
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
        experts, top_k = self.source.experts, self.source.top_k
        for name in ("granularity", "router"):
            own, given = getattr(self.source, name), getattr(self, name)
            if given not in (None, own):
                raise ValueError(f"{name} is {given!r}, and that of the mixture {own!r} (leave it out)")
        if self.experts < 2 * experts or self.experts % experts:
            right = f"{2 * experts}, {3 * experts} or another multiple"
            raise ValueError(f"experts is {self.experts}, and the mixture has {experts} ({right})")
        if self.top_k not in (top_k, top_k * self.copies):
            same = f"{top_k * self.copies} for the same function"
            raise ValueError(f"top_k is {self.top_k} ({top_k} as before, or {same} at more work a token)")

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

    def changed(self, neurons):
        """How many of so many neurons the method changes."""
        nothing = self.method == "copy" or (self.method == "noise" and self.noise_std == 0)
        return 0 if nothing else int(getattr(self, f"{self.method}_ratio") * neurons)

    def factor(self, matrix):
        """The number that gate_proj, up_proj or down_proj is multiplied by, so that the output keeps its size.

        Copies add amplitudes, for they agree; independent experts add variances, see moe.output_scale."""
        before = self.source.top_k if self.source.experts else 1
        size = {
            "topk-softmax": self.cut,  # scores sum to one, whatever is chosen; the parts of a copy share its score
            "softmax-topk": self.cut * self.copies * before / self.top_k,  # 1/m of a score, for equal logits
        }[self.router]
        return {
            "exact": size if matrix == "down_proj" else 1,  # SwiGLU is linear in down_proj, and in nothing else
            "cube-root": size ** (1 / 3),  # as published: right for a squared ReLU, s^3 relu(a)^2, wrong for SwiGLU
            "none": 1,
        }[self.scale]

    def dtype(self, stored):
        """`stored`, where it holds the result exactly, or else fp32."""
        powers_of_two = all(math.frexp(self.factor(matrix))[0] == 0.5 for matrix in MATRICES)
        held = self.method in EXACT or not self.changed(self.source.intermediate_size)
        return stored if powers_of_two and held else torch.promote_types(stored, torch.float32)

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


def normal(what, layer, number, shape, std, r):
    """Random numbers that depend on (seed, layer, expert, matrix) alone: folder, module and rank get the same bits. A
    mixture that is upcycled with the seed it was made with gets other ones."""
    made = f"upcycled from {r.source.experts}" if r.source.experts else "upcycled"
    return model.normal(shape, std, r.seed, layer, number, f"{made} {what}")


def short(t):
    """t rounded to numbers that bf16 and fp16 both hold, so that a folder keeps its dtype."""
    return t.bfloat16().half().float()


# A method takes chosen neurons of a matrix, W_S, and returns other ones. draw(std) gives normal numbers of their shape.


def drop(W_S, draw, r):
    """Drop-Upcycling (2502.19261): the neurons S are forgotten, W_S <- N(mean(W_S), std(W_S)^2) in each matrix.

    The paper's code draws S anew for each of gate, up and down, which spoils 1 - (1 - ratio)^3 of the neurons: at 1/2,
    seven of eight. Here S is one for all three, and a neuron is old or new."""
    std, mean = (s.float().item() for s in torch.std_mean(W_S.double()))  # a sum in fp32 depends on the threads
    return short(draw(std) + mean)


def noise(W_S, draw, r):
    """W_S + N(0, noise_std^2)."""
    return W_S + draw(r.noise_std)


METHODS = {"copy": None, "noise": noise, "drop": drop}
EXACT = ("copy", "drop")  # methods whose numbers bf16 and fp16 hold; for others the folder is written in fp32


def router(layer, r, w_ED=None):
    """The new router, (E, D). w_ED: that of a mixture, whose copies take its rows over; the first keeps its own."""
    D, m, G = r.source.hidden_size, r.copies, r.granularity
    random = normal("router", layer, 0, (r.experts, 1, D), r.router_std, r)
    if w_ED is None:
        return short(random).expand(-1, G, -1).reshape(-1, D)  # the G parts of a copy are neighbours, and tie
    rows = w_ED.view(-1, 1, G, D).repeat(1, m, 1, 1)  # of each expert m copies, neighbours too
    if r.router_std:
        rows[:, 1:] = short(rows.float() + random.view(-1, m, 1, D))[:, 1:]
    return rows.view(-1, D)


def copy(w, matrix, layer, number, r):
    """Copy `number` of the matrix w, gate or up (neurons, D) or down (D, neurons), as a tuple of parts."""
    axis = 1 if matrix == "down_proj" else 0  # of the neurons
    size = w.shape[axis]
    first = r.source.experts and number // r.granularity % r.copies == 0  # of a mixture the first copy stays as it is
    if r.changed(size) and not first:
        S = normal("neurons", layer, number, (size,), 1, r).argsort(stable=True)[: r.changed(size)]
        W_S = w.index_select(axis, S)
        other = METHODS[r.method](W_S, lambda std: normal(matrix, layer, number, W_S.shape, std, r), r)
        w = w.index_copy(axis, S, other.to(w.dtype))
    if r.factor(matrix) != 1:
        w = w * r.factor(matrix)
    return w.chunk(r.cut, axis)


def operator(config, experts, top_k, **options):
    """The operators.Operator that upcycles models of Config `config`. options: the other fields of Recipe.

    Raises ValueError on a recipe that cannot be followed."""
    r = Recipe(config, experts, top_k, **options)
    kept = 2 if r.cut > 1 else 0  # a copy of gate and one of up serve r.cut tensors in turn
    parts = functools.lru_cache(maxsize=kept)(functools.partial(copy, r=r))

    def formula(name):
        layer, i, matrix, kind = checkpoint.place(name)
        match kind, matrix, i:
            case "weight", "gate", None:
                return [name] if r.source.experts else [], lambda *w: router(layer, r, *w)
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


def upcycle(module, experts, top_k, **options):
    """A new model.Transformer made from `module`, which stays as it is. options: the other fields of Recipe. Raises
    ValueError on a recipe that cannot be followed."""
    return operators.apply_to_module(module, operator(module.config, experts, top_k, **options))


def upcycle_folder(src, dst, experts, top_k, source_tokens=None, shard_size=operators.SHARD_SIZE, **options):
    """Makes the checkpoint folder dst from src, a folder or a public model's name. Returns (Operator, dtype, bytes).

    source_tokens: what a public source was trained on; shard_size: bytes a file at most (a larger tensor has its own).
    Everything is checked before anything is written, and dst appears only when it is whole. Raises ValueError,
    FileNotFoundError, or OSError if writing fails."""
    src = checkpoint.find(src)
    made = operator(checkpoint.read_config(src), experts, top_k, **options)
    return made, *operators.apply_to_folder(src, dst, made, source_tokens, shard_size)


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
    add("--router-std", type=float, help="deviation of the random part of the new router rows (default: "
        f"{ROUTER_STD}; 0 if SRC is a mixture)")  # fmt: skip
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
        made, dtype, size = upcycle_folder(**given)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if caught:  # asked first: inside torch a KeyboardInterrupt can become another error
            sys.exit(128 + caught[0])
        parser.error(str(error))
    dst, config, G = given["dst"], made.config, made.config.granularity
    experts = f"{config.experts * G} experts of width {config.intermediate_size // G}, {config.top_k * G} a token"
    print(f"written: {dst}  ({experts}; {size / 1e9:.3f} GB, {str(dtype).removeprefix('torch.')})")
    if G > 1 and dtype.itemsize < 4:
        print("note: a reader that routes in this dtype splits a copy now and then; in float32 none does")
    if made.entry["method"] == "copy" and made.entry["router_std"] == 0:
        print("note: equal copies that get the same tokens stay equal (--router-std 0.02, --method noise or drop)")
    print(f"next: python train.py --init {dst}")


if __name__ == "__main__":
    main()
