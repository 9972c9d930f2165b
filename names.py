"""What a tensor is called, in three places.

    in a module           model.layers.0.mlp.experts.gate_up_proj            all experts of a layer, in one tensor
    in the program        model.layers.0.mlp.experts.3.up_proj.weight        one matrix of one expert, in Qwen's words
    in a Mixtral's files  model.layers.0.block_sparse_moe.experts.3.w3.weight

`unpack` and `packed` go between the first two, `spelled` goes from the second to the third. A tensor of a dense model
has the same name in all three. Formulas (operators.py) speak of the second, with `place` and `at_layer`.
"""

import re
from typing import NamedTuple

import torch

SPELLING = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Mixtral's


def spelled(config, name):
    """A tensor's name in the files of a model of `config`."""
    if config.experts and not config.qk_norm and ".mlp." in name:
        for ours, theirs in SPELLING.items():
            name = name.replace(ours, theirs)
    return name


def unpack(config, state):
    """Yields (name, tensor) of a state dict: experts one by one, as views; a tied head left out. gate_up_proj is (E, 2
    F, D), rows of the gate first, then those of up; down_proj is (E, D, F). E and F: after the cut by granularity."""
    for name, t in state.items():
        layer, _, matrix = name.partition(".experts.")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if not matrix:
            yield name, t
            continue
        for e, expert in enumerate(t):
            parts = zip(("gate_proj", "up_proj"), expert.chunk(2)) if matrix == "gate_up_proj" else [(matrix, expert)]
            for which, part in parts:
                yield f"{layer}.experts.{e}.{which}.weight", part


def packed(config, name, shape, read):
    """The inverse of unpack, for one tensor of a state dict. read(name): the tensor of that name, of one expert."""
    names = [n for n, _ in unpack(config, {name: torch.empty(shape, device="meta")})]  # in order; no numbers are made
    parts = [read(n) for n in names]
    return torch.cat(parts).unflatten(0, (shape[0], -1)) if ".experts." in name else parts[0]


class Place(NamedTuple):
    """Where a tensor stands in the model: `place("model.layers.2.mlp.experts.5.up_proj.weight")` is (2, 5, "up_proj",
    "weight"). layer and expert are None outside the layers and the experts; the router is the matrix "gate"."""

    layer: int | None
    expert: int | None
    matrix: str
    kind: str  # weight or bias


def place(name):
    *path, matrix, kind = name.split(".")
    number = lambda word: int(path[path.index(word) + 1]) if word in path else None
    return Place(number("layers"), number("experts"), matrix, kind)


def at_layer(name, layer):
    """The same tensor's name in another layer."""
    return re.sub(r"\.layers\.\d+\.", f".layers.{layer}.", name)
