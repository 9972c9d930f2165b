"""Upcycling: a trained model becomes a mixture of more experts, and starts where the trained model stopped.

    python upcycle.py SRC DST --experts 8 --top-k 2                       # a Llama or Mistral becomes a Mixtral
    python upcycle.py SRC DST --experts 8 --top-k 2 --granularity 4       # 32 experts of a quarter's width, 8 a token
    python upcycle.py SRC DST --experts 8 --top-k 2 --method drop         # half of each expert's neurons drawn anew
    python upcycle.py MIXTURE DST --experts 16 --top-k 4                  # two copies of each of 8 experts

Every expert begins as a copy of the dense layer's MLP (Sparse Upcycling, 2212.05055). Only the router is new. Its rows
are random, so the experts get different tokens and grow apart. A topk-softmax router chooses first, then takes the
softmax of the chosen: the scores s_e sum to one. So a token gets what it got before, whichever copies it chooses:
sum_e s_e MLP(x) = MLP(x). (softmax-topk takes the softmax first, and the sum is smaller: see Recipe.factor.)

Granularity G cuts each copy into G parts (2410.07524). The parts of a copy have equal router rows: their logits tie,
and they are chosen together. Each has 1/G of the copy's score, so down_proj is multiplied by G. By hand: four neurons
give MLP(x) = 1 + 2 + 3 + 4 = 10. Three copies with the logits 2, 1 and 3 are cut into two parts each.

    logits     2    2    1    1    3    3      top_k 2, so K = 4 parts: both of the third copy, both of the first
    scores   .13  .13            .37  .37      softmax of 2 2 3 3
    parts    1+2  3+4  1+2  3+4  1+2  3+4      y = 2 (.13 * 3 + .13 * 7 + .37 * 3 + .37 * 7) = 10

A mixture is upcycled by copying each expert with its router row (Expert Upcycling, 2604.19835). By hand: two experts
give 10 and 20, and their scores are 3/4 and 1/4 (logits log 3 and 0). There are two copies of each.

    before                3/4 * 10 + 1/4 * 20 = 12.5
    --top-k doubled       (3/8 + 3/8) * 10 + (1/8 + 1/8) * 20 = 12.5      exactly the same function
    --top-k as before     (1/2 + 1/2) * 10 = 10                           two copies of the best expert: the second
                                                                          best is lost until the copies differ
The paper keeps top_k, so that a token costs what it cost. Identical copies that get the same tokens stay identical in
training. --router-std or --method tells them apart, and leaves the first copy of a mixture's expert as it is.

Left out: upcycling every other layer (2212.05055); choosing the experts to copy by their gradients (2604.19835);
different models as experts; the optimizer's state (2212.05055: it helps vision, not language).

Try, after `python train.py OLD --tokens 1e6 --out out/dense` (it ends at a loss of 1.761), with
`python upcycle.py out/dense out/x --experts 8 --top-k 2` and `python train.py --init out/x --tokens 0`. OLD is
`--optimizer adamw --lr 3e-3 --batch-tokens 4096 --num-attention-heads 4`:
  1. Add --granularity 4, and --scale exact, cube-root or none. (1.761 again; 1.765; 2.133. cube-root is the
     published factor: right for a squared ReLU, not for SwiGLU.)
  2. --method drop with --drop-ratio 0.25, 0.5, 1. Then 0.5 with --top-k 8: nearly every old neuron is kept in some
     expert, so is the loss back at 1.761? (1.803, 1.917, 3.094. With eight 1.888: a neuron that half of the experts
     keep speaks at half its strength.)
  3. Train a mixture of 8x2 with OLD for 1e6 tokens and upcycle it to 16x4, 16x2 and 32x2. (1.795, as before; 1.847;
     1.847: the last two take two copies of the best expert only.)
"""

import argparse
import functools
import math
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace
from shlex import quote

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch

import checkpoint
import model
import moe
import operators
from model import Config
from names import place
from tables import Parser

# As in moe.py, E = experts * G and K = top_k * G count experts after the cut; the names experts, top_k and
# intermediate_size count before it. D is hidden, m the copies of each expert.

MATRICES = ("gate_proj", "up_proj", "down_proj")
UNCHANGED = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm",
             "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")  # fmt: skip
SCALES = ("exact", "cube-root", "none")
ROUTER_STD = 0.02  # of a router for a dense model; the copies of a mixture keep their rows


@dataclass
class Recipe:
    """How to upcycle the models of Config `source`, dense or mixture. What is None is settled by the source.

    Raises ValueError where the recipe cannot be followed. Options of a method are called METHOD_ and one word;
    METHOD_ratio is the share of neurons that it changes."""

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
        self.granularity = before.granularity if self.granularity is None else self.granularity
        self.router = before.router if self.router is None else self.router
        if self.router_std is None:
            self.router_std = 0.0 if mixture else ROUTER_STD
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r} ({', '.join(METHODS)})")
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r} ({', '.join(SCALES)})")
        limits = dict(experts=(1, 2**20), drop_ratio=(0, 1), noise_ratio=(0, 1), noise_std=(0, 100))
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)} ({low} to {high})")
        if not (self.router_std == 0 or 1e-4 <= self.router_std <= 100):
            raise ValueError(f"router_std is {self.router_std} (0, or 1e-4 to 100: what bf16 and fp16 hold)")
        self.config.check()
        if self.router_std == 0 and self.cut > 1:
            why = "all logits tie, and what a token gets depends on how the loading program breaks ties"
            right = "router_std above 0, such as 0.02"
            raise ValueError(f"router_std is 0 with granularity {self.granularity}: {why} ({right})")

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
        if not self.router_std and self.top_k == top_k and self.source.granularity > 1:
            why = "a token may get parts of several equal copies"
            right = f"upcycle.py --router-std 0.02, or top_k {top_k * self.copies}"
            raise ValueError(f"router_std is 0 and top_k stays {top_k}: {why} ({right})")

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
        """The number that gate_proj, up_proj or down_proj is multiplied by, so that the output keeps its size."""
        if self.source.experts:
            m, before = self.copies, self.source.top_k
            size = {
                "topk-softmax": 1,  # the chosen scores sum to one, as before
                "softmax-topk": m * before / self.top_k,  # equal logits: they sum to top_k / (m before) of the old sum
            }[self.router]
        else:
            size = moe.copy_scale(self.experts, self.top_k, self.granularity, self.router)
        return {
            "exact": size if matrix == "down_proj" else 1,  # SwiGLU is linear in down_proj, and in nothing else
            "cube-root": size ** (1 / 3),  # as published: right for a squared ReLU, s^3 relu(a)^2, wrong for SwiGLU
            "none": 1,
        }[self.scale]

    def dtype(self, stored):
        """`stored`, where it holds the result exactly, or else fp32."""
        powers_of_two = all(math.frexp(self.factor(matrix))[0] == 0.5 for matrix in MATRICES)  # frexp: 0.5 times 2^n
        held = self.method in EXACT or not self.changed(self.source.intermediate_size)
        return stored if powers_of_two and held else torch.promote_types(stored, torch.float32)

    def entry(self):
        """What the lineage says: all but the options of other methods."""
        fields = {k: v for k, v in asdict(self).items() if k != "source"}
        others = METHODS.keys() - {self.method}
        return {"step": "upcycle"} | {k: v for k, v in fields.items() if k.rpartition("_")[0] not in others}


def stays_equal(entry):
    """What to tell the user of a lineage's entry after which the copies of a mixture's experts stay copies; or None."""
    if entry["step"] == "upcycle" and entry["method"] == "copy" and entry["router_std"] == 0:
        return "equal copies that get the same tokens stay equal (upcycle.py --router-std 0.02, --method noise or drop)"


def parse(text):
    """"8x2" -> (8, 2): experts and experts a token, for train.py's --upcycle. Raises ValueError."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"--upcycle {text!r} is not EXPERTSxTOP_K (such as 8x2)")
    return int(match[1]), int(match[2])


# ---- the mathematics ------------------------------------------------------------------------------------------------


def normal(what, layer, number, shape, std, r):
    """Random numbers that depend on seed, layer, expert and matrix alone: a folder, a module and each GPU get the same
    bits. They depend on the source's expert count too: upcycling twice with one seed draws new numbers."""
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
    std, mean = (s.float().item() for s in torch.std_mean(W_S.double()))  # fp64: an fp32 sum depends on the threads
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
    """The parts of a copy of w: gate or up (neurons, D) or down (D, neurons), which comes in the dtype of the result.
    number: of the copy, or of one part of it if the source is a mixture."""
    axis = 1 if matrix == "down_proj" else 0  # of the neurons
    size = w.shape[axis]
    first = r.source.experts and number // r.granularity % r.copies == 0  # of a mixture the first copy stays as it is
    if r.changed(size) and not first:
        S = normal("neurons", layer, number, (size,), 1, r).argsort(stable=True)[: r.changed(size)]  # a random choice
        W_S = w.index_select(axis, S)
        other = METHODS[r.method](W_S, lambda std: normal(matrix, layer, number, W_S.shape, std, r), r)
        w = w.index_copy(axis, S, other.to(w.dtype))
    if r.factor(matrix) != 1:
        w = w * r.factor(matrix)
    return w.chunk(r.cut, axis)


def operator(config, experts, top_k, **options):
    """The operators.Operator that upcycles models of Config `config`. options: the other fields of Recipe. Raises
    ValueError on a recipe that cannot be followed."""
    r = Recipe(config, experts, top_k, **options)
    cached = 2 if r.cut > 1 else 0  # r.cut parts come from one copy, and gate and up take turns
    parts = functools.lru_cache(maxsize=cached)(functools.partial(copy, r=r))

    def formula(name):
        """([names of the old tensors], a function of them that gives the new tensor `name`)."""
        layer, i, matrix, kind = place(name)
        match kind, matrix, i:
            case "weight", "gate", None:
                return [name] if r.source.experts else [], lambda *w: router(layer, r, *w)
            case "weight", "gate_proj" | "up_proj" | "down_proj", int():
                e, g = divmod(i, r.granularity)  # which new expert, which part of it
                number, part = divmod(i, r.cut)  # which copy to make, which piece of it
                prefix = f"model.layers.{layer}.mlp"
                if r.source.experts:  # copies are neighbours: expert e is made of expert e // m
                    prefix += f".experts.{e // r.copies * r.granularity + g}"
                return [f"{prefix}.{matrix}.weight"], lambda w: parts(w, matrix, layer, number)[part]
            case "weight", _, None if matrix in UNCHANGED:
                return [name], lambda w: w
        raise ValueError(f"upcycling has no rule for the tensor {name} (add one to the formula in upcycle.py)")

    return operators.Operator(r.config, formula, r.entry(), r.dtype)


def upcycle(module, experts, top_k, **options):
    """A new model.Transformer made from `module`, which stays as it is. options: the other fields of Recipe. Raises
    ValueError on a recipe that cannot be followed."""
    return operators.apply_to_module(module, operator(module.config, experts, top_k, **options))


def upcycle_folder(src, dst, experts, top_k, source_tokens=None, shard_size=operators.SHARD_SIZE, **options):
    """Makes the checkpoint folder dst from src, a folder or a public model's name. Returns (Operator, dtype, bytes).

    options: the other fields of Recipe. source_tokens, shard_size (bytes) and errors: as operators.apply_to_folder."""
    src = checkpoint.find(src)
    made = operator(checkpoint.read_config(src), experts, top_k, **options)
    return made, *operators.apply_to_folder(src, dst, made, source_tokens, shard_size)


# ---- the command ----------------------------------------------------------------------------------------------------


def command_line():
    commands = "\n".join(line[2:] for line in __doc__.splitlines() if line.startswith("    python upcycle.py"))
    parser = Parser("upcycle.py", "upcycle.py SRC DST --experts E --top-k K [flags]", commands,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)  # fmt: skip  # what is not given takes Recipe's default
    add = parser.add_argument_group("folders").add_argument
    add("src", metavar="SRC", help="checkpoint folder, ours or a public one, or a public model's name (ORG/NAME)")
    add("dst", metavar="DST", help="folder to make; it must not exist")
    add("--source-tokens", type=float, help="tokens a public SRC was trained on, such as 2e12 (default: unknown)")
    add("--shard-size", type=float, help=f"bytes of a weights file at most (default: {operators.SHARD_SIZE:g})")
    add = parser.add_argument_group("mixture").add_argument
    add("--experts", type=int, required=True, help="full-width experts a layer; a multiple of a mixture's")
    add("--top-k", type=int, required=True, help="full-width experts a token; of a mixture the same, or the multiple")
    add("--granularity", type=int, help="parts each expert is cut into, G (default: 1, or the mixture's)")
    add("--router", choices=moe.ROUTERS, help=f"how choices are scored (default: {Config.router}, or the mixture's)")
    add("--router-std", type=float, help=f"deviation of noise in new rows (default: {ROUTER_STD}; 0 for a mixture)")
    add("--scale", choices=SCALES, help=f"exact keeps the output (softmax-topk: of ties; default: {Recipe.scale})")
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
            if (owner := name.rpartition("_")[0]) in METHODS and owner != method:
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
        print("note: a program that routes in this dtype splits a copy now and then; in float32 none does")
    if note := stays_equal(made.entry):
        print(f"note: {note}")
    print(f"next: python train.py --init {quote(str(dst))}")


if __name__ == "__main__":
    main()
