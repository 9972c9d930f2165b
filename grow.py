"""Growing: a trained small model becomes a deeper or a wider one, in one step.

Du et al., "Stacking Your Transformers" (2405.15319), sort the ways of growing into four operators, each along two axes.
Two of them are here, direct and zero; random (new parts behind a mask that opens) and learn (LiGO) are not here yet.
Growth in depth is one list of layer indices; growth in width is one matrix identity an operator.

Depth. Layer i of the grown model is layer `layers[i]` of the small one. The share of neighbours that were neighbours
before is the connection retention, the paper's R_c:

    operator, flags                    layers of the grown model              R_c
    direct --factor 3                  01234567 01234567 01234567          91.3 %   stacking, G_stack: i mod L
    direct --layers 0,0,0,1,1,1,...    000 111 222 333 444 555 666 777     30.4 %   interpolation: floor(i / 3)
    direct --factor 4                  012345 012345 012345 012345         87.0 %   (interpolated: 21.7 %)
    direct --layers 0-5,2-5,...,4-5    012345 2345 2345 2345 2345 45       78.3 %   partial stacking
    direct --layers 0-23,8-31          0 ... 23 8 ... 31                   97.9 %   SOLAR (2312.15166)
    zero   --factor 1.25               0123 3' 4567 7'                     77.8 %   LLaMA-Pro (2401.02415)
    zero   --factor 2                  00' 11' 22'                         40.0 %   G_zero

Direct is not the small model's function and starts with a higher loss; the paper finds it the best of all even so
(scratch costs 49 % more FLOPs to the same loss, at 1.1 B parameters), and interpolation worse in the end. In zero, a
block marked ' is a copy that adds nothing yet: its o_proj and every down_proj are 0. What these read is not 0, so they
learn from the first step (a gain of 0 would leave nothing to learn from). `--layers` with zero: later copies are '.

Width. d becomes D = k d: hidden size, heads, key-value heads and MLP grow by one factor k, `--factor`; head_dim,
vocabulary and number of experts stay. Both keep the function (logits within 1e-5 in fp32, 1e-10 in fp64):

    direct  x' = [x, x]   W' = [[a1 W, (1 - a1) W], [a2 W, (1 - a2) W]]   gain' = [gain, gain]            k = 2, 3, ...
    zero    x' = [x, 0]   W' = [[W, A], [0, C]]   gain' = [gain / sqrt(k), 1]   eps' = eps / k       sizes stay whole

Direct copies what a matrix puts out and divides what it reads; the shares a are drawn for every entry. One share for
all would give copies proportional gradients, and Adam, blind to scale, would keep them copies. In zero, new dimensions
write to old ones (A), but old ones not yet to new; A and C are random with the root mean square of W.

What the papers do not say, or print otherwise:
- Direct's gain is printed as sqrt(d/D) [gain, gain]. Copies do not change the root mean square: that factor makes all
  that a block reads too small, by sqrt(k). If D is no multiple of d no gain is exact: refused.
- Zero's gain, sqrt(d/D), is right as printed (the official code has d/D), and exact only with eps' = eps d/D.
- QK-norm has that eps too, while heads keep their size: zero also scales q_proj and k_proj by sqrt(d/D).
- A tied embedding cannot be copied and divided at once: direct divides the last norm's gain in place of the head.
- A router's rows all get the same shares: equal ones (after upcycling) stay so, ties go to the same expert.
- Products do not fit into bf16 (0.04 on the logits): width writes fp32. Depth copies, in the source's dtype.

The paper's factor g is a ratio of parameters without embeddings: `--factor` for depth, about its square for width.
When to grow, and by how much: `python laws.py optimal stacking --N 8e9 --D 15e12`. The optimizer starts new.

Left out on purpose: several hops (worse than one, says the paper), a factor of its own for each width, more experts
(upcycle.py), copies of Adam's moments, and copying part of a width (bert2BERT: D no multiple of d, not exact).

    python grow.py SRC DST --axis depth --operator direct --factor 4           # G_stack: the whole stack, four times
    python grow.py SRC DST --axis depth --operator direct --layers 0-23,8-31   # SOLAR: ranges include both ends
    python grow.py SRC DST --axis depth --operator zero --factor 1.25          # LLaMA-Pro: blocks that add nothing yet
    python grow.py SRC DST --axis width --operator direct --factor 2           # every neuron twice; or zero

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
import contextlib
import dataclasses
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
from tqdm import tqdm

import model

AXES, OPERATORS = ("depth", "width"), ("direct", "zero")
SPREAD = 0.5  # deviation of the shares of width-direct, relative to their mean 1/k
SHARD = 2 * 10**9  # bytes of weights in one file, and about the memory that a folder takes to grow
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BESIDES = "tokenizer* special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template* generation_*.json"


def whole(name, size, factor):
    if size * factor != round(size * factor):
        raise ValueError(f"{name} {size} times {factor:g} is {size * factor:g} (a factor that keeps it whole)")
    return round(size * factor)


def layer_map(L, operator, factor, layers=None):
    """The list that growth in depth is: new layer i copies layer list[i] of L; `layers`, if given, after a check.
    direct: i mod L. zero: copies of a layer follow it, spread evenly over the layers. Raises ValueError."""
    if layers is None:
        n = whole("num_hidden_layers", L, factor)
        return [i % L if operator == "direct" else ((i + 1) * L - 1) // n for i in range(n)]
    for i in layers:
        if not 0 <= i < L:
            raise ValueError(f"layer {i} is not in the source (its {L} layers are 0-{L - 1})")
    if len(layers) <= L:
        raise ValueError(f"{len(layers)} layers do not grow a source of {L} (a longer list)")
    if operator == "zero" and list(dict.fromkeys(layers)) != list(range(L)):
        raise ValueError(f"operator zero keeps the function only if 0-{L - 1} first occur all and in order (or direct)")
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


def plan(c, axis, operator, factor, layers, seed):
    """(Config of the grown model, rule): rule(public name of a new tensor) gives the names of the source's tensors that
    it is made of, and the function of them that makes it. c is the small model's Config. Raises ValueError."""
    step = lineage_step(c, axis, operator, factor, layers, seed)
    layers, k = step["layers"], step["factor"]
    if axis == "depth":
        big = dataclasses.replace(c, num_hidden_layers=len(layers))
    else:
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        big = dataclasses.replace(c, **{n: whole(n, getattr(c, n), k) for n in names})
        big.rms_norm_eps = c.rms_norm_eps / (k if operator == "zero" else 1)
    big.check()

    def rule(name):
        matrix, i = name.split(".")[-2], int(name.split(".")[2]) if ".layers." in name else -1
        if axis == "width":
            expert = int(name.split(".")[-3]) if ".experts." in name else 0

            def draw(*shape, std=1.0):
                return model.normal(shape, std, seed, i, expert, f"grow {matrix}")

            formula = direct if operator == "direct" else zero
            return [name], lambda t: formula(t.to(wide(t.dtype)), matrix, k, draw, c)
        closed = operator == "zero" and layers[i] in layers[:i] and matrix in ("o_proj", "down_proj", "w2")
        source = name if i < 0 else name.replace(f".{i}.", f".{layers[i]}.", 1)
        return [source], torch.zeros_like if closed else lambda t: t

    return big, rule


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def direct(t, matrix, k, draw, c):
    """W' = [a_1 U, ..., a_k U], U = k copies of W, one below the other, and a_1 + ... + a_k = 1 for each entry.
    Outputs that do not grow (the head's words, the router's experts) are not copied."""
    if matrix in ("q_norm", "k_norm"):  # gains of a head: head_dim stays
        return t
    if matrix == "embed_tokens":
        return t.repeat(1, k)
    if t.dim() == 1 and not (matrix == "norm" and c.tie_word_embeddings):
        return t.repeat(k)
    rows = t.repeat(k, 1) if t.dim() == 2 and matrix not in ("lm_head", "gate") else t
    shares = (1 + SPREAD * draw(k - 1, *(rows.shape[1:] if matrix == "gate" else rows.shape)).to(t)) / k
    return torch.cat([rows * a for a in (*shares, 1 - shares.sum(0))], dim=-1)


def zero(t, matrix, k, draw, c):
    """W' = [[W, A], [0, C]]. The embedding's A is 0; the head and the router have no rows below."""
    if matrix in ("q_norm", "k_norm"):
        return t
    shrink = math.sqrt(1 / k)  # sqrt(d/D)
    if t.dim() == 1:
        return torch.cat((t * shrink, t.new_ones(round(len(t) * k) - len(t))))
    rows, columns = t.shape
    fixed = matrix in ("embed_tokens", "lm_head", "gate")  # vocabulary and experts do not grow
    rms = 0.0 if matrix == "embed_tokens" else t.double().square().mean().sqrt().item()
    new = draw(rows if fixed else round(rows * k), round(columns * k), std=rms).to(t)
    new[:rows, :columns] = t * shrink if c.qk_norm and matrix in ("q_proj", "k_proj") else t
    new[rows:, :columns] = 0
    return new


# ---- a module in memory ---------------------------------------------------------------------------------------------


@torch.no_grad()
def grow(module, axis="depth", operator="direct", factor=2, layers=None, seed=1):
    """A new model.Transformer grown from `module`, which stays as it is. layers: a list of source layers, in the place
    of depth's factor. Depth keeps the dtype, width makes it fp32 at least. Raises ValueError for what cannot be built,
    or not exactly where the operator promises it. `grow_folder` gives the same weights, bit for bit."""
    c, rule = plan(module.config, axis, operator, factor, layers, seed)
    old = dict(model.public_tensors(module.config, module.state_dict()))
    weight = module.model.embed_tokens.weight
    with torch.device("meta"):
        new = model.Transformer(c).to(wide(weight.dtype) if axis == "width" else weight.dtype)
    new.to_empty(device=weight.device)
    if c.tie_word_embeddings:
        new.lm_head.weight = new.model.embed_tokens.weight
    for name, view in model.public_tensors(c, new.state_dict()):
        names, formula = rule(name)
        view.copy_(formula(*(old[n] for n in names)))
    return new.train(module.training)


# ---- a folder -------------------------------------------------------------------------------------------------------


def locate(folder, c):
    """{public name: (file, name in it, index into it, dtype)} of Config c's tensors; a layer's experts may lie in one.
    Raises FileNotFoundError, or ValueError for a tensor that is missing, left over, or of another shape or dtype."""
    files, found, dtypes = model.tensor_files(folder), {}, {}
    with torch.device("meta"):
        state = model.Transformer(c).state_dict()
    for name, t in state.items():
        for i, (public, part) in enumerate(model.public_tensors(c, {name: t})):
            if ".experts." not in name or name not in files:
                found[public] = public, part.shape, ()
            elif name.endswith("down_proj"):
                found[public] = name, t.shape, (i,)
            else:  # expert 0's gate, its up, expert 1's gate, ...
                found[public] = name, t.shape, (i // 2, slice(i % 2 * len(part), (i % 2 + 1) * len(part)))
    asked = {name: tuple(shape) for name, shape, _ in found.values()}
    fine = ("rotary_emb.inv_freq", "lm_head.weight" if c.tie_word_embeddings else "rotary_emb.inv_freq")
    extra = [n for n in files.keys() - asked.keys() if not n.endswith(fine)]
    for names, word in ((asked.keys() - files.keys(), "lacks"), (extra, "has, beyond its configuration,")):
        if names:
            raise ValueError(f"{folder} {word} the tensor {min(names)} (config.json and weights must agree)")
    for path in set(files.values()):
        with model.opened(path) as f:
            for name in asked.keys() & set(f.keys()):
                dtype, shape = f.get_slice(name).get_dtype(), tuple(f.get_slice(name).get_shape())
                if shape != asked[name] or dtype not in DTYPES:
                    raise ValueError(f"{path}: {name} is {dtype} {shape} ({' or '.join(DTYPES)} {asked[name]})")
                dtypes[name] = DTYPES[dtype]
    return {public: (files[name], name, index, dtypes[name]) for public, (name, _, index) in found.items()}


def grow_folder(source, target, axis, operator, factor, layers, seed, source_tokens=None, shard=SHARD):
    """The checkpoint folder `source`, grown, as the new folder `target`, a tensor at a time. Returns one line about it.
    Raises ValueError, FileNotFoundError or OSError, and then leaves no part of it."""
    source, target = Path(source), Path(target)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists (another name; nothing is overwritten)")
    small = model.read_config(source)
    c, rule = plan(small, axis, operator, factor, layers, seed)
    step = lineage_step(small, axis, operator, factor, layers, seed)
    found, (tokenizer, lineage) = locate(source, small), model.read_lineage(source, source_tokens)
    with torch.device("meta"):
        empty = model.Transformer(c)
    parts = [{}]  # names and bytes of each file to write
    for name, t in model.public_tensors(c, empty.state_dict()):
        dtype = found[rule(name)[0][0]][3]
        size = t.numel() * (wide(dtype) if axis == "width" else dtype).itemsize
        if parts[-1] and sum(parts[-1].values()) + size > shard:
            parts.append({})
        parts[-1][name] = size
    total = sum(sum(part.values()) for part in parts)
    above = next(p for p in target.absolute().parents if p.exists())
    if (free := shutil.disk_usage(above).free) < total:
        raise ValueError(f"{target} takes {total / 1e9:.2f} GB and {above} has {free / 1e9:.2f} GB free (make room)")

    partial, weight_map = target.with_name(f"{target.name}.partial-{os.getpid()}"), {}
    partial.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as stack, tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            files = {path: stack.enter_context(model.opened(path)) for path, *_ in found.values()}

            def read(name):
                path, there, index, _ = found[name]
                return files[path].get_slice(there)[index] if index else files[path].get_tensor(there)

            for i, part in enumerate(parts):
                file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
                weight_map |= dict.fromkeys(part, file)
                tensors = {}
                for name, size in part.items():
                    names, formula = rule(name)
                    tensors[name] = formula(*map(read, names)).clone(memory_format=torch.contiguous_format)
                    bar.update(size)
                with model.replacing(partial / file) as beside:
                    model.save_file(tensors, beside, metadata={"format": "pt"})
        for path in {p for pattern in BESIDES.split() for p in source.glob(pattern) if p.is_file()}:
            shutil.copyfile(path, partial / path.name)
        counts, stored = empty.num_parameters(), found["model.embed_tokens.weight"][3]
        written = wide(stored) if axis == "width" else stored
        run = {"tokenizer": tokenizer, **counts, "lineage": [*lineage, step]}
        model.finish_folder(partial, target, c, written, run, weight_map, total)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    kept = f"{written} as in the source" if written == stored else f"{written}: not exact in the source's {stored}"
    pairs = f", R_c {retention(step['layers']):.1%}" if axis == "depth" else ""
    return f"{target}: {c.num_hidden_layers} layers of width {c.hidden_size}, N {counts['N']:,}{pairs}, {kept}"


# ---- the command ----------------------------------------------------------------------------------------------------


def number(text):
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range (0 or more, and finite)")
    return int(value) if value == int(value) else value


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
    add("--operator", choices=OPERATORS, required=True, help="copy, or add parts that do nothing yet (required)")
    either("--factor", type=number, help="times as many layers; or times hidden size, heads and MLP (this or --layers)")
    either("--layers", type=ranges, help="source layers of the grown model, as 0-23,8-31; ranges include both ends")
    add("--seed", type=int, default=1, help="of width's random numbers (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print("written:", grow_folder(**vars(args)))
    except (ValueError, OSError, RuntimeError, model.SafetensorError) as error:
        parser.error(str(error))
    print(f"next: python train.py --init {args.target}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print()
        sys.exit(130)
