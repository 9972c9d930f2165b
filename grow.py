"""Growing: a trained small model becomes a deeper or a wider one, in one step.

A large model that starts from random numbers first learns what a small one knows. So train the small one, build the
large one out of its weights, and train on. "Stacking Your Transformers" (2405.15319) names ways; ligo.py learns one.

Depth. The new layers are a list of old ones. A factor makes the list, or `--layers` gives it.

    direct    0 1 2 0 1 2       The stack again: another function. The paper's best start (but not at once: see 1).
    zero      0 0' 1 1' 2 2'    A copy ' whose o_proj and down_proj are 0: it adds nothing until they have learned.
    random    0 * 1 * 2 *       A block * of random numbers. It adds c times its output: mask.py takes c from 0 to 1.

Width. The width d becomes D = k d: hidden size, MLP, number of heads. Size of a head, vocabulary and experts stay. W is
any matrix, x what it reads, gain that of an RMSNorm. A, B and C are random numbers, as large as W's. [W; W]: W twice.

    direct    x' = [x, x]    W' = [a U, (1 - a) U], U = [W; W]    gain' = [gain, gain]        (k = 2; else k shares)
    zero      x' = [x, 0]    W' = [[W, A], [0, C]]                gain' = [gain / sqrt(k), 1]
    random    x' = [x, 0]    W' = [[W, c A], [c B, c C]]          gain' = sqrt(open / D) [gain, 1], open = d + c (D - d)

a is a matrix of shares, one for each entry of U. c is 0 at first, and mask.py takes it to 1. New gains may be 1: what
they multiply is 0.

Direct by hand. W = [[1, 2], [3, 4]] makes (3, 7) of x = (1, 1). Each entry of U gets its own a, such as:

    a = 1/4  1/2      a U = 1/4   1      (1 - a) U = 3/4   1
        1/2  1/4            3/2   1                  3/2   3
        1/2  3/4            1/2  3/2                 1/2  1/2
        1/4  1/2            3/4   2                  9/4   2
    W' x' = [a U, (1 - a) U] (1, 1, 1, 1) = (3, 7, 3, 7) = [W x, W x]

All but depth-direct keep the function: logits within 1e-5 in fp32, 1e-10 in fp64 (random: as long as c is 0).

    python grow.py SRC DST --axis depth --operator direct --factor 4           # G_stack: the whole stack, four times
    python grow.py SRC DST --axis depth --operator direct --layers 0-23,8-31   # SOLAR: ranges include both ends
    python grow.py SRC DST --axis depth --operator zero --factor 1.25          # LLaMA-Pro: blocks that add nothing yet
    python grow.py SRC DST --axis width --operator direct --factor 2           # every neuron twice; or zero
    python grow.py SRC DST --axis width --operator random --factor 2           # then train.py --init DST --mask-steps N

Left out: several hops (worse than one, says the paper), Adam's moments, copies of a part of the width (bert2BERT).

Try, after `python train.py OLD --num-attention-heads 4 --num-hidden-layers 2 --tokens 6e5 --out out/base` (it ends at a
loss of 2.119). OLD is `--optimizer adamw --lr 3e-3 --batch-tokens 4096`; use it in every training:
  1. Stack it (--factor 2), interpolate it (--layers 0,0,1,1), grow it with zero. Which is best at once (evaluate with
     `python train.py --init FOLDER --tokens 0`), which after 2e5 tokens? (Stack 2.193, interpolated 2.178, zero 2.119;
     then 2.034, 2.030, 1.976. The base left small has 1.981 by then, at half the cost: it was too early to grow.)
  2. The paper prints the gain of width-direct times sqrt(d / D). Write so: `copy = lambda g: g.repeat(k) * k**-0.5`.
     (2.300 in the place of 2.119. Copies have the root mean square of x: now each block reads too small numbers.)
  3. Set SPREAD to 0, grow with width-direct, train for 1e5 tokens and compare the halves of the embedding:
     `a, b = checkpoint.load(FOLDER).model.embed_tokens.weight.chunk(2, -1)`. (Equal to the last bit: the copies got the
     same gradients. With SPREAD 0.5 they differ by 18 % in norm.)
"""

import argparse
import math
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from shlex import quote

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

import checkpoint
import model
from names import at_layer, place
from operators import SHARD_SIZE, Operator, apply_to_folder, apply_to_module
from tables import Parser

AXES = ("depth", "width")
INSERTING = ("zero", "random")  # new layers and dimensions that add nothing at first
SPREAD = 0.5  # deviation of the shares of width-direct, relative to their mean 1/k; the last makes their sum 1

ROLES = {  # every tensor that a model may have, and what growth sees in it
    "embed_tokens.weight": "embedding", "lm_head.weight": "words", "norm.weight": "last gain",
    "input_layernorm.weight": "gain", "post_attention_layernorm.weight": "gain",
    "q_norm.weight": "head gain", "k_norm.weight": "head gain",
    "q_proj.weight": "scores", "k_proj.weight": "scores", "v_proj.weight": "reader", "o_proj.weight": "writer",
    "q_proj.bias": "bias", "k_proj.bias": "bias", "v_proj.bias": "bias",
    "gate_proj.weight": "reader", "up_proj.weight": "reader", "down_proj.weight": "writer", "gate.weight": "router",
}  # fmt: skip


def look_up(table, name):
    """The entry of a table such as ROLES for the tensor of that name. Raises ValueError if there is none."""
    _, _, matrix, kind = place(name)
    if f"{matrix}.{kind}" not in table:
        raise ValueError(f"growth does not know the tensor {name} (add {matrix}.{kind} to ROLES and ligo's SIDES)")
    return table[f"{matrix}.{kind}"]


role = partial(look_up, ROLES)
same = lambda t: t


def random_numbers(name, shape, seed, like):
    """Normal numbers for the tensor of that name, as large as those of `like`; the same ones wherever it is made."""
    layer, expert, matrix, _ = place(name)
    rms = like.cpu().double().square().mean().sqrt().item()
    return model.normal(shape, rms, seed, -1 if layer is None else layer, expert or 0, f"grow {matrix}").to(like)


# ---- what grows -----------------------------------------------------------------------------------------------------


def whole(name, size, factor):
    if size * factor != round(size * factor):
        raise ValueError(f"{name} {size} times {factor:g} is {size * factor:g} (a factor that keeps it whole)")
    return round(size * factor)


def layer_map(L, operator, factor, layers=None):
    """New layer i copies old layer list[i]. `layers`, if given, is checked. zero and random put new layers behind old
    ones (3 -> 6: 0 0 1 1 2 2; 4 -> 5: 0 1 2 3 3), direct and learn repeat the stack. Raises ValueError."""
    if layers is None:
        n = whole("num_hidden_layers", L, factor)
        # zero and random spread evenly: new layer i is made of the old one at the same height
        return [((i + 1) * L - 1) // n if operator in INSERTING else i % L for i in range(n)]
    for i in layers:
        if not 0 <= i < L:
            raise ValueError(f"layer {i} is not in the source (its {L} layers are 0-{L - 1})")
    if len(layers) <= L:
        raise ValueError(f"{len(layers)} layers do not grow a source of {L} (a longer list)")
    if operator in INSERTING and list(dict.fromkeys(layers)) != list(range(L)):
        raise ValueError(f"operator {operator} keeps the function if all of 0-{L - 1} first occur in order (or direct)")
    return list(layers)


def retention(layers):
    """R_c of the paper: the share of neighbours in the grown model that were neighbours in the small one."""
    return sum(b == a + 1 for a, b in zip(layers, layers[1:])) / (len(layers) - 1)


def lineage_step(config, axis="depth", operator="direct", factor=2, layers=None, seed=1):
    """What run.json says of growing: factor and layers, both filled in (layers: None for width). Raises ValueError."""
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r} ({' or '.join(AXES)})")
    if axis == "width" and layers is not None:
        raise ValueError("layers are for depth (width takes a factor)")
    if layers is None and not 1 < factor <= 1000:
        raise ValueError(f"factor is {factor:g} (above 1, and at most 1000)")
    if axis == "width" and operator == "direct" and factor != int(factor):
        raise ValueError(f"factor {factor:g} is no whole number (width-direct is exact for 2, 3, ...; or zero)")
    if axis == "depth":
        layers = layer_map(config.num_hidden_layers, operator, factor, layers)
        factor = len(layers) / config.num_hidden_layers
    factor = int(factor) if factor == int(factor) else factor
    return {"step": "grow", "axis": axis, "operator": operator, "factor": factor, "layers": layers, "seed": seed}


def grown_config(config, entry):
    """The Config that a model of Config `config` gets by an entry of the lineage. Raises ValueError."""
    if entry["axis"] == "depth":
        grown = replace(config, num_hidden_layers=len(entry["layers"]))
    else:
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        grown = replace(config, **{n: whole(n, getattr(config, n), entry["factor"]) for n in names})
        if entry["operator"] in INSERTING:  # the mean square of [x, 0] is 1/k of that of x, so eps must be too
            grown.rms_norm_eps = config.rms_norm_eps / entry["factor"]
    grown.check()
    return grown


# ---- the formulas: name of a new tensor -> names of the old ones, and a function of them (see operators.py) ---------


def is_added(name, layers):
    """Whether the tensor lies in a layer whose original occurs before it in the list."""
    layer = place(name).layer
    return layer is not None and layers[layer] in layers[:layer]


def depth(name, entry, config):
    """Layer i is layer list[i]. What zero and random add is silent at first: what it writes with is 0."""
    layer, layers, what = place(name).layer, entry["layers"], role(name)
    names = [name if layer is None else at_layer(name, layers[layer])]
    if not is_added(name, layers):
        return names, same
    fresh = lambda W: random_numbers(name, W.shape, entry["seed"], like=W)
    zeros, ones = torch.zeros_like, torch.ones_like
    drawn = {"scores": fresh, "reader": fresh, "router": fresh, "bias": zeros, "gain": ones, "head gain": ones,
             "writer": zeros}[what]  # fmt: skip  # the writers' numbers come with the mask
    copied = zeros if what == "writer" else same
    return names, {"zero": copied, "random": drawn}.get(entry["operator"], same)


def width_direct(name, entry, config):
    """x' = [x, x]: what a matrix puts out is copied, and what it reads is divided among the copies."""
    k = entry["factor"]

    def divide(U, shape=None):
        """[a_1 U, ..., a_k U] with a_1 + ... + a_k = 1 for every entry. With one a for all entries, two copies of a
        neuron would get gradients that are multiples of each other. Adam ignores the factor, so they would stay copies.
        """
        spread = random_numbers(name, (k - 1, *(shape or U.shape)), entry["seed"], like=U.new_ones(1))
        shares = (1 + SPREAD * spread) / k
        return torch.cat([U * a for a in (*shares, 1 - shares.sum(0))], dim=-1)

    tied = config.tie_word_embeddings  # the head is the embedding, [W, W], and cannot be divided: so the gain before it
    copy = lambda g: g.repeat(k)  # not sqrt(d/D) [gain, gain], as printed: copies keep the root mean square
    matrix = lambda W: divide(W.repeat(k, 1))
    return [name], {
        "embedding": lambda W: W.repeat(1, k), "words": divide,
        "router": lambda W: divide(W, W.shape[1:]),  # one row of shares for all: equal rows, of copied experts, stay so
        "scores": matrix, "reader": matrix, "writer": matrix,
        "bias": copy, "gain": copy, "last gain": divide if tied else copy,
        "head gain": same,  # it is as long as a head, and heads do not grow
    }[role(name)]  # fmt: skip


def width_insert(name, entry, config):
    """x' = [x, 0]. The lower left of W' is 0, so the new dimensions are 0 at first. A and C multiply only those zeros:
    they may be anything (of random they are 0, too). Gradients reach the zeros of the embedding, v_proj, o_proj and
    down_proj at once; those of q, k, gate and up later, as each is multiplied by another zero. If head and embedding
    are tied, the last down_proj waits, too."""
    k = entry["factor"]
    shrink = math.sqrt(1 / k)  # sqrt(d/D): of [x, 0] the mean square is d/D of that of x (the official code has d/D)

    def border(W, scale=1.0, more_rows=True):
        """[[W, A], [0, C]]. W (out, in)"""
        rows, columns = W.shape
        shape = round(rows * k) if more_rows else rows, round(columns * k)
        if entry["operator"] == "zero":
            bordered = random_numbers(name, shape, entry["seed"], like=W)
        else:
            bordered = W.new_zeros(shape)  # of random, mask.py draws them
        bordered[:rows, :columns] = W * scale
        bordered[rows:, :columns] = 0
        return bordered

    pad = lambda t: F.pad(t, (0, round(t.shape[-1] * k) - t.shape[-1]))
    gain = lambda g: torch.cat((g * shrink, g.new_ones(round(len(g) * k) - len(g))))
    wider = partial(border, more_rows=False)
    # config.json has one eps for all norms, and it is now eps / k. So with QK-norm q and k must shrink by sqrt(k) too.
    scores = partial(border, scale=shrink) if config.qk_norm else border
    return [name], {
        "embedding": pad, "words": wider, "router": wider,
        "scores": scores, "reader": border, "writer": border,
        "bias": pad,  # new heads put out nothing
        "gain": gain, "last gain": gain, "head gain": same,
    }[role(name)]  # fmt: skip


FORMULAS = {
    ("depth", "direct"): depth, ("depth", "zero"): depth, ("depth", "random"): depth,
    ("width", "direct"): width_direct, ("width", "zero"): width_insert, ("width", "random"): width_insert,
}  # fmt: skip
OPERATORS = tuple(dict.fromkeys(operator for _, operator in FORMULAS))


def growth(config, axis="depth", operator="direct", factor=2, layers=None, seed=1):
    """What grows a model of Config `config`: its operators.Operator. Raises ValueError for what cannot be built, or
    would not keep the function."""
    entry = lineage_step(config, axis, operator, factor, layers, seed)
    if (axis, operator) not in FORMULAS:
        raise ValueError(f"operator is {operator!r} ({', '.join(o for a, o in FORMULAS if a == axis)})")
    formula = partial(FORMULAS[axis, operator], entry=entry, config=config)
    # Depth copies numbers, of any dtype. Width multiplies them: rounded to bf16 that moves the logits by 0.04. So fp32.
    dtype = same if axis == "depth" else partial(torch.promote_types, torch.float32)
    return Operator(grown_config(config, entry), formula, entry, dtype)


def grow(module, axis="depth", operator="direct", factor=2, layers=None, seed=1):
    """A new model.Transformer grown from `module`, which stays as it is; by operator random at c = 0 (see mask.py).
    layers: a list of source layers, in the place of depth's factor. Depth keeps the dtype, width makes it fp32.
    Raises ValueError as `growth`. `grow_folder` gives the same weights, bit for bit."""
    return apply_to_module(module, growth(module.config, axis, operator, factor, layers, seed))


def grow_folder(source, target, axis, operator, factor, layers, seed, source_tokens=None, shard_size=SHARD_SIZE):
    """The checkpoint folder `source`, or the public model of that name, grown, as the new folder `target`, a tensor at
    a time. Returns a line about it. Raises ValueError, FileNotFoundError or OSError, and then leaves no part of it."""
    source = checkpoint.find(source)
    small = checkpoint.read_config(source)
    how = growth(small, axis, operator, factor, layers, seed)
    _, stored = checkpoint.reader(source, small)
    dtype, _ = apply_to_folder(source, target, how, source_tokens, shard_size)
    return describe(target, how.config, how.entry, stored, dtype)


def describe(target, config, entry, stored, dtype):
    kept = f"{dtype} as in the source" if dtype == stored else f"{dtype}: not exact in the source's {stored}"
    pairs = f", R_c {retention(entry['layers']):.1%}" if entry["axis"] == "depth" else ""
    return f"{target}: {config.num_hidden_layers} layers of width {config.hidden_size}{pairs}, {kept}"


# ---- the command ----------------------------------------------------------------------------------------------------


def number(text):
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range (0 or more, and finite)")
    return int(value) if value == int(value) else value


def ranges(text):
    """'0-2,5' -> [0, 1, 2, 5]"""
    layers = []
    for part in text.split(","):
        ends = [int(n) for n in part.split("-")] if re.fullmatch(r"\d{1,5}(-\d{1,5})?", part) else [1, 0]  # refused
        if ends[-1] < ends[0]:
            raise argparse.ArgumentTypeError(f"{part!r} is no layer and no range of layers (such as 0-23,8-31)")
        layers += range(ends[0], ends[-1] + 1)
    return layers


def make_parser(file, usage, document, after):
    """(the parser of grow.py and ligo.py, what adds a flag to its group about growth)."""
    commands = "\n".join(line for line in document.split("\n") if line.startswith(f"    python {file}"))
    parser = Parser(file, f"{file} SRC DST {usage} (--factor F | --layers LIST) [--seed 1] [--help]", commands,
                    after, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument_group("folders").add_argument
    add("source", metavar="SRC", help="checkpoint folder, ours or a public one, or a public model's name (ORG/NAME)")
    add("target", metavar="DST", help="new checkpoint folder; must not exist")
    add("--source-tokens", type=number, metavar="N", help="tokens that a public source has seen (default: unknown)")
    group = parser.add_argument_group("growth")
    add, either = group.add_argument, group.add_mutually_exclusive_group(required=True).add_argument
    add("--axis", choices=AXES, required=True, help="more layers, or wider ones (required)")
    either("--factor", type=number, help="times as many layers; or times hidden size, heads and MLP (this or --layers)")
    either("--layers", type=ranges, help="source layers of the grown model, as 0-23,8-31; ranges include both ends")
    add("--seed", type=int, default=1, help="of the random numbers (default: %(default)s)")
    return parser, add


def main(argv=None):
    after = "When to grow, and by how much: python plan.py optimal stacking --N 8e9 --D 15e12"
    parser, add = make_parser("grow.py", "--axis AXIS --operator OPERATOR", __doc__, after)
    add("--operator", choices=OPERATORS, required=True, help="copies, zeros, or masked random numbers (required)")
    args = parser.parse_args(argv)
    try:
        print("written:", grow_folder(**vars(args)))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        parser.error(str(error))
    mask = " --mask-steps 100" if args.operator == "random" else ""
    print(f"next: python train.py --init {quote(args.target)}{mask}")


if __name__ == "__main__":
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print()
        sys.exit(130)
