"""Growing: a trained small model becomes a deeper or a wider one, in one step.

Du et al., "Stacking Your Transformers" (2405.15319), sort the ways of growing into four operators, each along two axes.
Growth in depth is one list of layer indices; growth in width is one matrix identity an operator.

Depth. Layer i of the grown model is layer `layers[i]` of the small one. The share of neighbours that were neighbours
before is the connection retention, the paper's R_c:

    operator, flags                    layers of the grown model              R_c
    direct --factor 3        (L = 8)   01234567 01234567 01234567          91.3 %   stacking, G_stack: i mod L
    direct --layers 0,0,0,1,1,1,...    000 111 222 333 444 555 666 777     30.4 %   interpolation: floor(i / 3)
    direct --factor 4            (6)   012345 012345 012345 012345         87.0 %   (interpolated: 21.7 %)
    direct --layers 0-5,2-5,...,4-5    012345 2345 2345 2345 2345 45       78.3 %   partial stacking
    direct --layers 0-23,8-31          0 ... 23 8 ... 31                   97.9 %   SOLAR (2312.15166)
    zero   --factor 1.25         (8)   0123 3' 4567 7'                     77.8 %   LLaMA-Pro (2401.02415)
    zero   --factor 2            (3)   0 0' 1 1' 2 2'                      40.0 %   G_zero
    random --factor 2            (3)   0 * 1 * 2 *                                  * a block of random numbers
    learn  --factor 2            (3)   six sums over 0 1 2                          LiGO (2303.00980)

Direct is not the small model's function and starts with a higher loss; the paper finds it the best of all even so
(scratch costs 49 % more FLOPs to the same loss, at 1.1 B parameters), and interpolation worse in the end. In zero, a
block marked ' is a copy that adds nothing yet: its o_proj and every down_proj are 0. What these read is not 0, so they
learn from the first step (a gain of 0 would leave nothing to learn from). `--layers` with zero and random: the later
ones of equal indices are the new blocks.

Width. d becomes D = k d: hidden size, heads, key-value heads and MLP grow by one factor k, `--factor`; head_dim,
vocabulary and number of experts stay. c is a mask that opens from 0 to 1; open = d + c (D - d).

    direct  x' = [x, x]   W' = [a U, (1 - a) U], U = [W; W]   gain' = [gain, gain]                k = 2; or 3, 4, ...
    zero    x' = [x, 0]   W' = [[W, A], [0, C]]         gain' = [gain / sqrt(k), 1]   eps' = eps / k
    random  x' = [x, 0]   W' = [[W, c A], [c B, c C]]   gain' = sqrt(open / D) [gain, 1]   eps' = eps / k
    learn   x' = B x      W' = B_out W B_in^T           gain' = B gain

Direct copies what a matrix puts out and divides what it reads; the shares a are drawn for every entry. One share for
all would give copies proportional gradients, and Adam, blind to scale, would keep them copies. In zero, new dimensions
write to old ones (A), but old ones not yet to new: the first step moves the zeros of v_proj, o_proj and down_proj, the
next ones all the rest. A and C, and B in random, are drawn with the root mean square of W.

Direct in width, zero, and random as long as c is 0 keep the function: logits within 1e-5 in fp32, 1e-10 in fp64.

Random hides what it adds behind the mask (MSG, 2305.02869): y = x + c f(x) for a new block, so c stands on its o_proj
and down_proj; in width on every entry with a new row or a new column, as new heads and neurons write to old dimensions
too. The norms are over the open dimensions, which is RMSNorm over all D times sqrt(open / D). `grow.py` writes the
folder at c = 0; `train.py --init FOLDER --mask-steps N` draws what is behind the mask from the seed in run.json and
opens it in N updates (`Mask`). The optimizer updates raw weights, kept in trainer.pt; a folder holds c times raw.

Learn takes a few steps of Adam (LiGO: SGD) on the maps, on real text, then forgets them. In depth each of a block's
tensors has its own weights over the old layers, at the start the stack plus noise. In width one B stands for the
residual stream, others for each layer's MLP and heads, at the start [I; noise]; o_proj reads by the map of v_proj.

What the papers do not say, or print otherwise:
- Direct's gain is printed as sqrt(d/D) [gain, gain]. Copies do not change the root mean square: that factor makes all
  that a block reads too small, by sqrt(k). If D is no multiple of d no gain is exact: refused.
- Zero's gain, sqrt(d/D), is right as printed (the official code has d/D), and exact only with eps' = eps d/D.
- config.json has one eps for all norms, and those of QK-norm are over a head, which does not grow: zero and random
  also scale q_proj and k_proj by sqrt(d/D).
- A tied embedding cannot be copied and divided at once: direct divides the last norm's gain in place of the head.
- A router's rows all get the same shares: equal ones (after upcycling) stay so, ties go to the same expert.
- LiGO has no rotary positions and no groups: here a head is mapped whole, so that rotary pairs stay pairs. Its head is
  printed as W B: it is W B^T.
- Products do not fit into bf16 (0.04 on the logits): width and learn write fp32. Depth copies, in the source's dtype.

The paper's factor g is a ratio of parameters without embeddings: `--factor` for depth, about its square for width.
When to grow, and by how much: `python laws.py optimal stacking --N 8e9 --D 15e12`. The optimizer starts new.

Left out on purpose: several hops (worse than one, says the paper), a factor of its own for each width, more experts
(upcycle.py), copies of Adam's moments, and copying part of a width (bert2BERT: D no multiple of d, not exact).

    python grow.py SRC DST --axis depth --operator direct --factor 4           # G_stack: the whole stack, four times
    python grow.py SRC DST --axis depth --operator direct --layers 0-23,8-31   # SOLAR: ranges include both ends
    python grow.py SRC DST --axis depth --operator zero --factor 1.25          # LLaMA-Pro: blocks that add nothing yet
    python grow.py SRC DST --axis width --operator direct --factor 2           # every neuron twice; or zero
    python grow.py SRC DST --axis width --operator random --factor 2           # then train.py --init DST --mask-steps N
    python grow.py SRC DST --axis depth --operator learn --factor 2            # LiGO; reads the text SRC has read

Try:
  1. `python train.py --num-hidden-layers 2 --tokens 6e5 --out out/base`, then stack it (--factor 2), interpolate it
     (--layers 0,0,1,1) and grow it with zero (--factor 2). Which has the lowest loss at once (`python train.py --init
     FOLDER --tokens 0`), which after 2e5 tokens more? (At once 2.193, 2.178 and, as the base, 2.119; then 2.034, 2.030
     and 1.976, but 1.981 for the base left small, at half the cost: a base of 6e5 tokens is not worth stacking yet.)
  2. Write the printed gain of width-direct into `direct`: `return t.repeat(k) * k**-0.5`, and evaluate that folder.
     (2.300 in the place of 2.119: every block, and the head, now reads numbers too small by sqrt(2).)
  3. Set SPREAD to 0, grow out/base with width-direct, train for 1e5 tokens and compare the halves of the embedding:
     `a, b = model.load(FOLDER).model.embed_tokens.weight.chunk(2, -1)`. (They are equal to the last bit: the copies got
     the same gradients and remained copies. With SPREAD 0.5 they differ by 18 % in norm.)
"""

import argparse
import dataclasses
import math
import os
import re
import signal
import sys
from operator import attrgetter

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

import data
import model

AXES, OPERATORS = ("depth", "width"), ("direct", "zero", "random", "learn")
SPREAD = 0.5  # deviation of the shares of width-direct, relative to their mean 1/k
INSERTING = ("zero", "random")  # new layers and dimensions that add nothing at first
WRITERS = ("o_proj", "down_proj")  # the matrices through which a block writes to the residual stream
FIXED = ("embed_tokens", "lm_head", "gate")  # rows are words or experts: their number does not grow
LEARN_RATE = 2e-3


def whole(name, size, factor):
    if size * factor != round(size * factor):
        raise ValueError(f"{name} {size} times {factor:g} is {size * factor:g} (a factor that keeps it whole)")
    return round(size * factor)


def layer_map(L, operator, factor, layers=None):
    """The list that growth in depth is: new layer i copies layer list[i] of L; `layers`, if given, after a check.
    direct, learn: i mod L. zero, random: new ones follow a layer, spread evenly over the layers. Raises ValueError."""
    if layers is None:
        n = whole("num_hidden_layers", L, factor)
        return [((i + 1) * L - 1) // n if operator in INSERTING else i % L for i in range(n)]
    for i in layers:
        if not 0 <= i < L:
            raise ValueError(f"layer {i} is not in the source (its {L} layers are 0-{L - 1})")
    if len(layers) <= L:
        raise ValueError(f"{len(layers)} layers do not grow a source of {L} (a longer list)")
    if operator in INSERTING and list(dict.fromkeys(layers)) != list(range(L)):
        why = f"keeps the function only if 0-{L - 1} first occur all and in order (or direct)"
        raise ValueError(f"operator {operator} {why}")
    return list(layers)


def retention(layers):
    """R_c: the share of adjacent pairs of the grown model that were adjacent in the small one."""
    return sum(b == a + 1 for a, b in zip(layers, layers[1:])) / (len(layers) - 1)


def lineage_step(config, axis="depth", operator="direct", factor=2, layers=None, seed=1):
    """What run.json says of growing the model of `config`: factor and layers resolved, width without layers.
    Raises ValueError."""
    if axis not in AXES or operator not in OPERATORS:
        raise ValueError(f"axis {axis!r}, operator {operator!r} ({' or '.join(AXES)}; {' or '.join(OPERATORS)})")
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


def grown_config(c, step):
    """The Config of the model that growing one of Config c by a lineage step gives. Raises ValueError."""
    if step["axis"] == "depth":
        big = dataclasses.replace(c, num_hidden_layers=len(step["layers"]))
    else:
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        big = dataclasses.replace(c, **{n: whole(n, getattr(c, n), step["factor"]) for n in names})
        if step["operator"] in INSERTING:
            big.rms_norm_eps = c.rms_norm_eps / step["factor"]
    big.check()
    return big


def place(name):
    """(matrix, layer, expert) of a public name; layer -1 outside the layers, expert 0 outside the experts."""
    parts = name.split(".")
    matrix = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(parts[-2], parts[-2])  # Mixtral's names
    return matrix, int(parts[2]) if ".layers." in name else -1, int(parts[-3]) if ".experts." in name else 0


def origin(name, layers):
    """(public name of the source's tensor that `name` copies, whether its layer is a later copy) in depth."""
    layer = place(name)[1]
    if layer < 0:
        return name, False
    return name.replace(f".{layer}.", f".{layers[layer]}.", 1), layers[layer] in layers[:layer]


def formula(name, c, step):
    """(source's tensor, function of it): what makes tensor `name` of the grown model, under public names, by every
    operator but learn. c: Config of the small model."""
    matrix, layer, expert = place(name)
    operator, k = step["operator"], step["factor"]

    def draw(*shape, std=1.0):
        return model.normal(shape, std, step["seed"], layer, expert, f"grow {matrix}")

    if step["axis"] == "depth":
        source, again = origin(name, step["layers"])
        if again and operator in INSERTING and matrix in WRITERS:
            return source, torch.zeros_like  # of random, `Mask` draws them
        if again and operator == "random":
            return source, lambda t: draw(*t.shape, std=rms(t)).to(t) if t.dim() > 1 else torch.ones_like(t)
        return source, lambda t: t
    if matrix in ("q_norm", "k_norm"):  # gains of a head: head_dim stays
        return name, lambda t: t.to(wide(t.dtype))
    if operator == "direct":
        return name, lambda t: direct(t.to(wide(t.dtype)), matrix, k, draw, c)
    noise = {"zero": draw, "random": lambda *shape, std: torch.zeros(shape)}[operator]  # of random, `Mask` draws it
    return name, lambda t: zero(t.to(wide(t.dtype)), matrix, k, noise, c)


def rms(t):
    return t.double().square().mean().sqrt().item()


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def direct(t, matrix, k, draw, c):
    """W' = [a_1 U, ..., a_k U], U = k copies of W, one below the other, and a_1 + ... + a_k = 1 for each entry.
    Outputs that do not grow (the head's words, the router's experts) are not copied."""
    if matrix == "embed_tokens":
        return t.repeat(1, k)
    if t.dim() == 1 and not (matrix == "norm" and c.tie_word_embeddings):
        return t.repeat(k)
    U = t.repeat(k, 1) if t.dim() == 2 and matrix not in FIXED else t
    shape = U.shape[1:] if matrix == "gate" else U.shape  # of the router, all rows get the same shares
    a = (1 + SPREAD * draw(k - 1, *shape).to(t)) / k
    return torch.cat([U * a_j for a_j in (*a, 1 - a.sum(0))], dim=-1)


def zero(t, matrix, k, draw, c):
    """W' = [[W, A], [0, C]]. The embedding's A is 0; the head and the router have no rows below. random: A = C = 0."""
    shrink = math.sqrt(1 / k)  # sqrt(d/D)
    if t.dim() == 1:
        return torch.cat((t * shrink, t.new_ones(round(len(t) * k) - len(t))))
    rows, columns = t.shape
    std = 0.0 if matrix == "embed_tokens" else rms(t)
    new = draw(rows if matrix in FIXED else round(rows * k), round(columns * k), std=std).to(t)
    new[:rows, :columns] = t * shrink if c.qk_norm and matrix in ("q_proj", "k_proj") else t
    new[rows:, :columns] = 0
    return new


# ---- a module in memory ---------------------------------------------------------------------------------------------


@torch.no_grad()
def grow(module, axis="depth", operator="direct", factor=2, layers=None, seed=1):
    """A new model.Transformer grown from `module`, which stays as it is; by operator random at c = 0 (see Mask).
    layers: a list of source layers, in the place of depth's factor. Depth keeps the dtype, width makes it fp32.
    Raises ValueError for what cannot be built, or not exactly where the operator promises it. `grow_folder` gives the
    same weights, bit for bit."""
    if operator == "learn":
        raise ValueError("operator learn needs text (grow.learn, or the command)")
    step = lineage_step(module.config, axis, operator, factor, layers, seed)
    c = grown_config(module.config, step)
    old = dict(model.public_tensors(module.config, module.state_dict()))
    weight = module.model.embed_tokens.weight
    with torch.device("meta"):
        new = model.Transformer(c).to(wide(weight.dtype) if axis == "width" else weight.dtype)
    new.to_empty(device=weight.device)
    if c.tie_word_embeddings:
        new.lm_head.weight = new.model.embed_tokens.weight
    for name, view in model.public_tensors(c, new.state_dict()):
        source, make = formula(name, module.config, step)
        view.copy_(make(old[source]))
    return new.train(module.training)


# ---- random: the mask -----------------------------------------------------------------------------------------------


class Mask:
    """Opens what operator random has closed, in `updates` updates: `train.py --mask-steps`.

    module: as grown, at c = 0. step: the entry of its lineage that grew it. The optimizer updates raw weights, the
    forward pass uses mask x raw; torch's parametrisation does that from outside, and model.py knows nothing of it.
    draw: draw the raw weights behind the mask (not if `module` holds them, as in a resumed run)."""

    def __init__(self, module, step, updates, draw=True):
        self.module, self.updates, self.masked, closed = module, updates, [], {}
        self.c = torch.zeros_like(module.lm_head.weight[0, 0])
        state = module.state_dict()
        old = dict(model.public_tensors(module.config, state))
        for name, t in state.items():
            closed[name] = torch.zeros_like(t, dtype=torch.bool)
            for public, new in model.public_tensors(module.config, {name: closed[name]}):
                self.close(public, new, step)
                if draw and new.any():
                    self.draw(public, new, old, step)
        if module.config.tie_word_embeddings:
            closed["lm_head.weight"] = closed["model.embed_tokens.weight"]
        for name in state:
            if closed[name].any():
                owner, _, attribute = name.rpartition(".")
                opening = Opening(closed[name], self.c, step["factor"])
                parametrize.register_parametrization(module.get_submodule(owner), attribute, opening)
                self.masked.append((module.get_submodule(owner), attribute))

    @staticmethod
    def close(name, new, step):
        """Sets `new`, False in the shape of tensor `name`, to True where operator random has added something."""
        matrix, k = place(name)[0], step["factor"]
        if step["axis"] == "depth":
            new[:] = origin(name, step["layers"])[1] and matrix in WRITERS
        elif matrix not in ("q_norm", "k_norm"):
            new[..., round(new.shape[-1] / k) :] = True  # columns, or gains
            if new.dim() > 1 and matrix not in FIXED:
                new[round(len(new) / k) :] = True  # rows

    @staticmethod
    def draw(name, new, old, step):
        """Draws the raw numbers of tensor `name` where `new`: normal ones as large as those they join, gains of 1."""
        (matrix, layer, expert), layers, raw = place(name), step["layers"], old[name]
        if raw.dim() == 1:
            raw *= math.sqrt(step["factor"])  # Opening divides by it again, for as long as c is 0
            raw[new] = 1
            return
        like = raw[~new]
        if step["axis"] == "depth":
            like = old[name.replace(f".{layer}.", f".{layers.index(layers[layer])}.", 1)]
        fresh = model.normal(raw.shape, rms(like), step["seed"], layer, expert, f"grow {matrix}")
        raw[new] = fresh.to(raw)[new]

    def open(self, update):
        """c = update / updates, what it is after so many updates. At 1 mask x raw is raw, and the mask is gone."""
        self.c.fill_(min(1.0, update / self.updates))
        if update >= self.updates:
            for owner, attribute in self.masked:
                parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
            self.masked = []

    def effective(self):
        """{parameter: mask x raw}, what a folder holds."""
        return {plain(name): attrgetter(plain(name))(self.module) for name in self.module.state_dict()}


class Opening(torch.nn.Module):
    """raw -> mask x raw: c where `closed`, else 1; gains times sqrt(open / D), with open / D = (1 + c (k - 1)) / k."""

    def __init__(self, closed, c, k):
        super().__init__()
        self.closed, self.c, self.k = closed, c, k

    def forward(self, raw):
        if raw.dim() == 1:
            return raw * ((1 + self.c * (self.k - 1)) / self.k).sqrt()
        return torch.where(self.closed, self.c * raw, raw)


def plain(name):
    """A parameter's name without what torch's parametrisation adds to it."""
    return name.replace("parametrizations.", "").removesuffix(".original")


# ---- learn: LiGO ----------------------------------------------------------------------------------------------------

SIDES = {  # tensor: (map of what it puts out, map of what it reads); "": none
    "embed_tokens": ("", "hidden"), "lm_head": ("", "hidden"), "gate": ("", "hidden"),
    "q_proj": ("q", "hidden"), "k_proj": ("k", "hidden"), "v_proj": ("v", "hidden"), "o_proj": ("hidden", "mixed"),
    "gate_proj": ("mlp", "hidden"), "up_proj": ("mlp", "hidden"), "down_proj": ("hidden", "mlp"),
    "input_layernorm": ("hidden", ""), "post_attention_layernorm": ("hidden", ""), "norm": ("hidden", ""),
    "q_norm": ("", ""), "k_norm": ("", ""),
}  # fmt: skip


def maps_of_depth(old, c, big, step):
    """Each new layer is a sum over the old ones, with weights of its own for each of a block's tensors."""
    start = F.one_hot(torch.tensor(step["layers"]), c.num_hidden_layers).float()
    kinds = [n.removeprefix("model.layers.0.") for n in old if ".layers.0." in n]
    maps = {kind: start + 0.03 * model.normal(start.shape, 1, step["seed"], -1, 0, f"learn {kind}") for kind in kinds}

    def combine():
        new = {n: t for n, t in old.items() if ".layers." not in n}
        for kind, weights in maps.items():
            layers = torch.stack([old[f"model.layers.{j}.{kind}"] for j in range(c.num_hidden_layers)])
            new |= {f"model.layers.{i}.{kind}": t for i, t in enumerate(torch.tensordot(weights, layers, 1))}
        return new

    return maps, combine


def maps_of_width(old, c, big, step):
    """W' = B_out W B_in^T, with B [I; noise] at the start: one for the residual stream, the others for each layer. A
    head goes as a whole, so that rotary pairs stay pairs; o_proj reads what v_proj puts out, group by group."""
    sizes = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
    sizes["mlp"] = c.intermediate_size // c.granularity
    maps = {}
    for i in range(-1, c.num_hidden_layers):
        for side, d in (sizes if i >= 0 else {"hidden": c.hidden_size}).items():
            D = whole(side, d, step["factor"])
            noise = model.normal((D - d, d), D**-0.5, step["seed"], i, 0, f"learn {side}")
            maps[side, i] = torch.cat([torch.eye(d), noise])
    head, group = torch.eye(c.head_dim), torch.eye(c.num_attention_heads // c.num_key_value_heads)

    def side(name, layer):
        if name == "mixed":
            return torch.kron(maps["v", layer], torch.kron(group, head))
        if name in ("q", "k", "v"):
            return torch.kron(maps[name, layer], head)
        return maps[name, -1 if name == "hidden" else layer]

    def combine():
        new = {}
        for name, t in model.public_tensors(c, old):
            matrix, layer, _ = place(name)
            out, read = SIDES[matrix]
            t = side(out, layer) @ t if out else t
            new[name] = t @ side(read, layer).T if read else t
        return model.private_tensors(big, new)

    return maps, combine


def learn(module, batches, axis="depth", factor=2, layers=None, seed=1, lr=LEARN_RATE):
    """A model grown by LiGO (2303.00980), fp32: its weights are linear maps of those of `module`. The maps are learned
    on `batches`, pairs (ids, targets) (B, T), an Adam step each, and then discarded. Raises ValueError as `grow`."""
    step = lineage_step(module.config, axis, "learn", factor, layers, seed)
    c, big = module.config, grown_config(module.config, step)
    old = {n: t.detach().float() for n, t in module.state_dict().items()}
    if c.tie_word_embeddings:  # one tensor, or functional_call finds two for one parameter
        old["lm_head.weight"] = old["model.embed_tokens.weight"]
    maps, combine = (maps_of_depth if axis == "depth" else maps_of_width)(old, c, big, step)
    with torch.device("meta"):
        new = model.Transformer(big)
    optimizer = torch.optim.Adam([t.requires_grad_() for t in maps.values()], lr=lr)
    for ids, targets in batches:
        _, loss, aux = torch.func.functional_call(new, combine(), (ids, targets))
        if aux:
            loss = loss + c.balance_coef * aux["balance_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # the last weights are copied, and the maps forgotten
        new = model.assemble(big, {n: t.clone() for n, t in combine().items()})
    return new.train(module.training)


# ---- a folder -------------------------------------------------------------------------------------------------------


def grow_folder(source, target, axis, operator, factor, layers, seed, source_tokens=None, shard_size=model.SHARD_SIZE,
                **learning):  # fmt: skip
    """The checkpoint folder `source`, grown, as the new folder `target`, a tensor at a time (learn: all in memory).
    learning: the other arguments of `learn_on_text`. Returns one line about it. Raises ValueError, FileNotFoundError or
    OSError, and then leaves no part of it."""
    small = model.read_config(source)
    step = lineage_step(small, axis, operator, factor, layers, seed)
    c = grown_config(small, step)
    (found, stored), (tokenizer, lineage) = model.inspect(source, small), model.read_lineage(source, source_tokens)
    dtype = torch.float32 if operator == "learn" else wide(stored) if axis == "width" else stored

    if operator == "learn":
        if os.path.lexists(target):  # asked again when it is written; but learning takes a while
            raise ValueError(f"{target} exists (another name; nothing is overwritten)")
        state = learn_on_text(source, step, lineage, **learning).state_dict()
    else:
        with torch.device("meta"):
            state = model.Transformer(c).state_dict()

    def made(name):
        old, make = formula(name, small, step)
        return make(next(model.read_tensors({old: found[old]}))[1])

    stream = (t if operator == "learn" else made(name) for name, t in model.public_tensors(c, state))
    run = {"tokenizer": tokenizer, "lineage": [*lineage, step]}
    model.write_folder(source, target, c, dtype, stream, run, shard_size)
    kept = f"{dtype} as in the source" if dtype == stored else f"{dtype}: not exact in the source's {stored}"
    pairs = f", R_c {retention(step['layers']):.1%}" if axis == "depth" else ""
    return f"{target}: {c.num_hidden_layers} layers of width {c.hidden_size}{pairs}, {kept}"


def learn_on_text(source, step, lineage, spec=None, steps=100, batch_tokens=4096, lr=LEARN_RATE):
    """`learn` for the folder `source` on `steps` batches of the text of `spec`, by default what its last training read,
    going on where that stopped. Adds to `step` what was read and spent, and prints three held-out losses."""
    module, tokenizer = model.load(source), data.load_tokenizer(source)
    before = data.last_settings(lineage)
    context = before.get("context") or min(module.config.max_position_embeddings, 256)
    spec = spec or before.get("data") or "python"
    corpora = data.prepare(spec, tokenizer, context=context)
    order, sequence, read, _ = data.position(lineage, corpora, context, tokenizer.key)
    reader = data.Reader(corpora, context, step["seed"] if order is None else order, sequence, read)
    windows = max(1, batch_tokens // context)
    start = dict(reader.read)
    bar = tqdm(range(steps), unit="step", disable=not sys.stderr.isatty())
    batches = (reader.load(reader.take(windows)) for _ in bar)
    how = {k: step[k] for k in ("axis", "factor", "layers", "seed")}
    untrained, big = learn(module, [], **how), learn(module, batches, **how, lr=lr)

    @torch.no_grad()
    def held_out(m):
        """Nats a token on at most 128 windows a corpus."""
        total = 0
        for corpus in corpora:
            ids, targets = data.validation_windows(corpus, context)
            parts = zip(ids[:128].split(16), targets[:128].split(16))
            total += corpus.weight * sum(m(x, y)[1].item() * len(x) for x, y in parts) / len(ids[:128])
        return total

    was, began, ended = map(held_out, (module, untrained, big))
    print(f"held-out loss, nats a token: {was:.4f} the small model, {began:.4f} grown, {ended:.4f} after {steps} steps")
    step["tokens"] = steps * windows * context
    step["flops"] = step["tokens"] * big.flops_per_token(context)
    step["data"] = reader.since(start)
    step["settings"] = {"data": spec, "context": context, "tokenizer": tokenizer.key, "lr": lr}
    return big


# ---- the command ----------------------------------------------------------------------------------------------------


def number(text):
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range (0 or more, and finite)")
    return int(value) if value == int(value) else value


def count(text):
    if (value := number(text)) != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count (a whole number of at least 1)")
    return value


def ranges(text):
    """'0-2,5' -> [0, 1, 2, 5]"""
    layers = []
    for part in text.split(","):
        ends = [int(n) for n in part.split("-")] if re.fullmatch(r"\d{1,5}(-\d{1,5})?", part) else [1, 0]
        if ends[-1] < ends[0]:
            raise argparse.ArgumentTypeError(f"{part!r} is no layer and no range of layers (such as 0-23,8-31)")
        layers += range(ends[0], ends[-1] + 1)
    return layers


def main(argv=None):
    usage = "grow.py SRC DST --axis AXIS --operator OPERATOR (--factor F | --layers LIST) [--seed 1] [--help]"
    commands = "\n".join(line for line in __doc__.split("\n") if line.startswith("    python grow.py"))
    after = "When to grow, and by how much: python laws.py optimal stacking --N 8e9 --D 15e12"
    raw = argparse.RawDescriptionHelpFormatter
    parser = model.Parser("grow.py", usage, commands, after, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument_group("folders").add_argument
    add("source", metavar="SRC", help="checkpoint folder, ours or a public Llama, Mistral, Qwen3 or MoE of these")
    add("target", metavar="DST", help="new checkpoint folder; must not exist")
    add("--source-tokens", type=number, metavar="N", help="tokens that a public source has seen (default: unknown)")
    group = parser.add_argument_group("growth")
    add, either = group.add_argument, group.add_mutually_exclusive_group(required=True).add_argument
    add("--axis", choices=AXES, required=True, help="more layers, or wider ones (required)")
    add("--operator", choices=OPERATORS, required=True, help="copy, add what does nothing yet, add random numbers "
        "behind a mask, or learn a map (required)")  # fmt: skip
    either("--factor", type=number, help="times as many layers; or times hidden size, heads and MLP (this or --layers)")
    either("--layers", type=ranges, help="source layers of the grown model, as 0-23,8-31; ranges include both ends")
    add("--seed", type=int, default=1, help="of the random numbers (default: %(default)s)")
    add = parser.add_argument_group("operator learn").add_argument
    add("--data", dest="spec", metavar="SPEC", help="text to learn on: see data.py (default: the source's, or python)")
    add("--steps", type=count, help="batches to learn on (default: 100)")
    add("--batch-tokens", type=count, help="tokens of one of them (default: 4096)")
    add("--lr", type=number, help=f"learning rate of the maps (default: {LEARN_RATE})")
    args = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    try:
        for name, flag in dict(spec="--data", steps="--steps", batch_tokens="--batch-tokens", lr="--lr").items():
            if name in args and args["operator"] != "learn":
                raise ValueError(f"{flag} has no use with operator {args['operator']} (learn)")
        print("written:", grow_folder(**{"factor": None, "layers": None} | args))
    except (ValueError, OSError, RuntimeError, model.SafetensorError) as error:
        parser.error(str(error))
    mask = " --mask-steps 100" if args["operator"] == "random" else ""
    print(f"next: python train.py --init {args['target']}{mask}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print()
        sys.exit(130)
