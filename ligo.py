"""LiGO: the growth operator that is learned ("Learning to Grow Pretrained Models", 2303.00980).

Every weight of the grown model is a linear map of weights of the small one. A few steps of Adam on real text train the
maps, and only the maps: the small model's weights stay as they are. Then the maps are multiplied out and forgotten.
What is left is an ordinary model, and its training goes on from there.

Depth. Each tensor of a new layer i is a sum over the old layers j, with weights w of its own:

    W'_i = sum_j w_ij W_j         at the start w is 1 where j = layers[i], else 0, plus a little noise

Width. One matrix B maps the residual stream, x' = B x. Each layer has others for its heads and for its MLP. B_out is
the map of what W writes, B_in that of what it reads (none: I):

    W' = B_out W B_in^T           gain' = B gain, bias' = B_out bias          at the start B = [I; noise]

By hand. Let B be the same 4 x 2 matrix on both sides. Its third row says: dimension 3 is dimension 1 once more. Its
fourth row says: dimension 4 is the mean of the two.

         1    0                                     1    2    1    3/2
    B =  0    1        W = 1  2        B W B^T =    3    4    3    7/2
         1    0            3  4                     1    2    1    3/2
         1/2  1/2                                   2    3    2    5/2

The 8 numbers of B decide about all 16 of W', and the B of the residual stream is the same in all layers. So few numbers
are to be learned, and few steps are enough.

    python ligo.py SRC DST --axis depth --factor 2        # reads on in the text that SRC has read
    python ligo.py SRC DST --axis width --factor 2 --steps 200

Left out: SGD, the paper's optimizer, and growing along both axes at once.

Try, after `python train.py --optimizer adamw --lr 3e-3 --batch-tokens 4096 --num-attention-heads 4
--num-hidden-layers 2 --tokens 6e5 --out out/base`:
  1. Grow it along each axis, and read the three losses. (The small model has 2.043 on these 128 windows, 2.119 on
     those of train.py. Depth: 2.157 before the steps, 2.041 after them. Width: 2.203, then 2.005. The noise does harm
     at first. The maps repair it, and gain in width.)
  2. Set the 0.03 in `maps_of_depth` to 0. Does it still learn? (Yes: 2.118, then 2.040. Copies of a layer stand at
     different depths. So their gradients differ, and no noise is needed to part them.)
  3. Set the noise in `maps_of_width` to 0, so that B = [I; 0]. (2.134, then 1.956, which looks best of all. But half of
     the embedding is 0, and stays 0 in all training to come: what reads it is 0, and so is what writes to it. You have
     a model of the old width for twice the cost.)
"""

import argparse
import math
import os
import signal
import sys
from shlex import quote

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import checkpoint
import data
import grow
import model
import operators
from names import packed, place, unpack
from tokenizer import load_tokenizer

LEARN_RATE = 2e-3

SIDES = {  # tensor: (map of what it puts out, map of what it reads); None: no map
    "embed_tokens.weight": (None, "hidden"), "lm_head.weight": (None, "hidden"), "gate.weight": (None, "hidden"),
    "q_proj.weight": ("q", "hidden"), "k_proj.weight": ("k", "hidden"), "v_proj.weight": ("v", "hidden"),
    "q_proj.bias": ("q", None), "k_proj.bias": ("k", None), "v_proj.bias": ("v", None),
    "o_proj.weight": ("hidden", "mixed"),
    "gate_proj.weight": ("mlp", "hidden"), "up_proj.weight": ("mlp", "hidden"), "down_proj.weight": ("hidden", "mlp"),
    "input_layernorm.weight": ("hidden", None), "post_attention_layernorm.weight": ("hidden", None),
    "norm.weight": ("hidden", None), "q_norm.weight": (None, None), "k_norm.weight": (None, None),
}  # fmt: skip


def maps_of_depth(old, config, empty, entry):
    """({name: map}, a function that makes the grown model's {name: parameter} of them). old: {name: parameter} of the
    small model, whose Config is `config`. empty: the grown model, on the device meta."""
    stack = F.one_hot(torch.tensor(entry["layers"]), config.num_hidden_layers).float()  # (new layers, old layers)
    kinds = [n.removeprefix("model.layers.0.") for n in old if ".layers.0." in n]
    noise = lambda kind: model.normal(stack.shape, 1, entry["seed"], -1, 0, f"learn {kind}")
    maps = {kind: stack + 0.03 * noise(kind) for kind in kinds}

    def combine():
        state = {n: t for n, t in old.items() if ".layers." not in n}
        for kind, weights in maps.items():
            layers = torch.stack([old[f"model.layers.{j}.{kind}"] for j in range(config.num_hidden_layers)])
            state |= {f"model.layers.{i}.{kind}": t for i, t in enumerate(torch.tensordot(weights, layers, 1))}
        return state

    return maps, combine


def maps_of_width(old, config, empty, entry):
    """The same. The paper knows no rotary positions and no groups of heads. Here a head is mapped as a whole (kron with
    I), so that rotary pairs stay pairs. o_proj reads heads: each head of a group by its group's row of v's map."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.intermediate_size // config.granularity  # an expert is that much narrower
    sizes = {"q": heads, "k": groups, "v": groups, "mlp": width}
    maps = {}
    for i in range(-1, config.num_hidden_layers):  # -1: outside the layers
        for side, d in (sizes if i >= 0 else {"hidden": config.hidden_size}).items():
            D = grow.whole(side, d, entry["factor"])
            noise = model.normal((D - d, d), D**-0.5, entry["seed"], i, 0, f"learn {side}")
            maps[side, i] = torch.cat([torch.eye(d), noise])
    head, group = torch.eye(config.head_dim), torch.eye(heads // groups)

    def map_of(side, layer):
        if side == "mixed":
            return torch.kron(maps["v", layer], torch.kron(group, head))
        B = maps[side, -1 if side == "hidden" else layer]
        return torch.kron(B, head) if side in ("q", "k", "v") else B

    def combine():
        tensors = {}
        for name, t in unpack(config, old):
            (out, into), layer = grow.look_up(SIDES, name), place(name).layer
            t = map_of(out, layer) @ t if out else t
            tensors[name] = t @ map_of(into, layer).T if into else t
        return {n: packed(empty.config, n, p.shape, tensors.__getitem__) for n, p in empty.named_parameters()}

    return maps, combine


def learn(module, batches, axis="depth", factor=2, layers=None, seed=1, lr=LEARN_RATE):
    """A model in fp32, grown from `module` by maps that are learned on `batches`, pairs (ids, targets) (B, T), an Adam
    step each. `module` stays as it is. Raises ValueError as grow.grow."""
    config, entry = module.config, grow.lineage_step(module.config, axis, "learn", factor, layers, seed)
    with torch.device("meta"):
        empty = model.Transformer(grow.grown_config(config, entry))
    old = {name: p.detach().float() for name, p in module.named_parameters()}  # a tied head once
    for name, _ in unpack(config, old):
        grow.look_up(SIDES, name)
    maps, combine = {"depth": maps_of_depth, "width": maps_of_width}[axis](old, config, empty, entry)
    optimizer = torch.optim.Adam([t.requires_grad_() for t in maps.values()], lr=lr)
    for ids, targets in batches:
        _, loss, aux = torch.func.functional_call(empty, combine(), (ids, targets))
        if aux:
            loss = loss + config.balance_coef * aux["balance_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # the last weights are copied, and the maps forgotten
        state = combine()
        big = checkpoint.build(empty.config, lambda name, shape: state[name].clone())
    return big.train(module.training)


@torch.no_grad()
def held_out_loss(module, corpora, context):
    """Nats a token on at most 128 windows a corpus."""
    total = 0
    for corpus in corpora:
        ids, targets = data.validation_windows(corpus, context)
        parts = zip(ids[:128].split(16), targets[:128].split(16))
        total += corpus.weight * sum(module(x, y)[1].item() * len(x) for x, y in parts) / len(ids[:128])
    return total


def learn_folder(source, target, axis, factor, layers, seed, spec, steps, batch_tokens, lr, source_tokens=None):
    """The checkpoint folder `source`, grown by maps that are learned on the text of `spec`, as the new folder `target`,
    fp32; all of it in memory. spec None: what its last training read, going on where that stopped. Prints three losses
    and returns a line about it. Raises ValueError, FileNotFoundError or OSError, and then leaves no part of it."""
    source, how = checkpoint.find(source), dict(axis=axis, factor=factor, layers=layers, seed=seed)
    config = checkpoint.read_config(source)
    entry = grow.lineage_step(config, operator="learn", **how)
    grown = grow.grown_config(config, entry)
    (_, stored), (known, lineage) = checkpoint.reader(source, config), checkpoint.read_lineage(source, source_tokens)
    if os.path.lexists(target):  # asked again when it is written; but learning takes a while
        raise ValueError(f"{target} exists (another name; nothing is overwritten)")
    operators.check_open(source, lineage)
    small, tokenizer = checkpoint.load(source), load_tokenizer(str(source))
    checkpoint.check_ids(tokenizer, config)

    before = checkpoint.last_settings(lineage)
    context = before.get("context") or min(config.max_position_embeddings, 256)
    spec = spec or before.get("data") or "python"
    corpora = data.prepare(spec, tokenizer, context=context)
    # Where its last training stopped reading. first_seed: None if it has never read.
    first_seed, sequence, read, notes = data.position(lineage, corpora, context, tokenizer.key)
    print(*[f"note: {note}" for note in notes], sep="\n", end="\n" * bool(notes))
    reader = data.Reader(corpora, context, seed if first_seed is None else first_seed, sequence, read)
    windows, start = max(1, batch_tokens // context), dict(reader.read)
    bar = tqdm(range(steps), unit="step", disable=not sys.stderr.isatty())
    batches = (reader.load(reader.take(windows)) for _ in bar)
    untrained, big = learn(small, [], **how), learn(small, batches, **how, lr=lr)
    was, began, ended = (held_out_loss(m, corpora, context) for m in (small, untrained, big))
    print(f"held-out loss, nats a token: {was:.4f} the small model, {began:.4f} grown, {ended:.4f} after {steps} steps")
    if not math.isfinite(ended):
        raise ValueError(f"--lr {lr:g}: the loss is no number any more (a smaller one)")

    tokens = steps * windows * context
    entry |= {"tokens": tokens, "flops": tokens * big.flops_per_token(context), "data": reader.since(start)}
    entry["settings"] = {"data": spec, "context": context, "tokenizer": tokenizer.key, "lr": lr}
    tensors, run = dict(unpack(grown, big.state_dict())), {"tokenizer": known, "lineage": [*lineage, entry]}
    operators.write_folder(source, target, grown, torch.float32, tensors.__getitem__, run)
    return grow.describe(target, grown, entry, stored, torch.float32)


def count(text):
    if (value := grow.number(text)) != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count (a whole number of at least 1)")
    return value


def main(argv=None):
    after = "Then train on: python train.py --init DST"
    parser, _ = grow.make_parser("ligo.py", "--axis AXIS", __doc__, after)
    add = parser.add_argument_group("learning").add_argument
    add("--data", dest="spec", metavar="SPEC", help="text to learn on: see data.py (default: the source's, or python)")
    add("--steps", type=count, default=100, help="batches to learn on (default: %(default)s)")
    add("--batch-tokens", type=count, default=4096, help="tokens of one of them (default: %(default)s)")
    add("--lr", type=grow.number, default=LEARN_RATE, help="learning rate of the maps (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print("written:", learn_folder(**vars(args)))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        parser.error(str(error))
    print(f"next: python train.py --init {quote(args.target)}")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print()
        sys.exit(130)
