"""An operator makes a new model out of an old one: upcycling, stacking, widening.

Every operator is a formula. It takes the name of one tensor of the new model. It returns the names of the old tensors
which that tensor is made of, and a function of them. The formula that repeats the layers of a two-layer model is

    def formula(name):
        layer = place(name).layer                                # None outside the layers: copied as it is
        return [name if layer is None else at_layer(name, layer % 2)], lambda old: old

For "model.layers.3.mlp.up_proj.weight" it returns ["model.layers.1.mlp.up_proj.weight"] and the identity.

`through` follows a formula: given what reads the old tensors, it returns what reads the new ones, one at a time. So
`apply_to_folder` goes from files to files, and a model larger than memory goes through. `apply_to_module` goes from a
module to a module, and train.py from files to the shards of a rank. All call the same function on the same numbers, so
from weights of one dtype they give the same bits. The folder way also checks before it works, and writes whole or not
at all. An operator of another kind (learned, or with two sources) calls `write_folder` with a `made` of its own.
"""

import functools
import json
import os
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import torch
from tqdm import tqdm

import checkpoint
from checkpoint import build
from files import rename, write_json
from model import Config, Transformer
from names import packed, spelled, unpack

SHARD_SIZE = 5e9  # bytes


class Operator(NamedTuple):
    """What turns a model into another one. formula(name) -> ([names of the old model's tensors], function of them)."""

    config: Config  # of the new model
    formula: object  # the function gets tensors of the new model's dtype on the CPU, and returns one
    entry: dict  # what run.json's lineage says of it
    dtype: object  # a function: dtype of the old weights -> one in which the new ones are exact


def through(operator, read, dtype):
    """What reads the new model's tensors: read(name) reads those of the old one, which reach the formula as `dtype`."""
    old = functools.lru_cache(maxsize=2)(lambda name: read(name).to(dtype))  # experts share their sources

    def made(name):
        names, function = operator.formula(name)
        return function(*map(old, names))

    return made


@torch.no_grad()
def apply_to_module(module, operator):
    """The new module that `operator` makes of `module`, which stays as it is."""
    config, weight = operator.config, module.lm_head.weight
    old, dtype = dict(unpack(module.config, module.state_dict())), operator.dtype(weight.dtype)
    made = through(operator, lambda name: old[name].cpu(), dtype)
    copied = lambda name, shape: packed(config, name, shape, made).clone()  # or old and new could share memory
    return build(config, copied, dtype).to(weight.device).train(module.training)


def apply_to_folder(source, target, operator, source_tokens=None, shard_size=SHARD_SIZE):
    """The new checkpoint folder `target` that `operator` makes of the folder `source`. Returns (dtype, bytes).

    source_tokens: what a public source was trained on. Everything is checked before anything is written, and `target`
    appears only when it is whole. Raises ValueError, FileNotFoundError, or OSError if writing fails."""
    read, stored = checkpoint.reader(source, checkpoint.read_config(source))
    tokenizer, lineage = checkpoint.read_lineage(source, source_tokens)
    check_open(source, lineage)
    dtype = operator.dtype(stored)
    run = {"tokenizer": tokenizer, "lineage": [*lineage, operator.entry]}
    return dtype, write_folder(source, target, operator.config, dtype, through(operator, read, dtype), run, shard_size)


def check_open(source, lineage):
    """Raises ValueError if the folder's mask is closed: after another operator nobody would open it."""
    if checkpoint.closed_mask(lineage):
        right = f"first: python train.py --init {quote(str(source))} --mask-steps N"
        raise ValueError(f"{source} has a closed mask ({right})")


def write_folder(source, target, config, dtype, made, run, shard_size=SHARD_SIZE):
    """The end of an operator: the checkpoint folder `target`, a tensor at a time, renamed into place when whole.

    made(name): the tensor of that name, of a model of Config `config`. Tensors are written as `dtype`, into files of at
    most shard_size bytes (a larger tensor has its own). run: the contents of run.json, to which the counts are added.
    What lies beside the weights in `source` comes along. Returns the bytes of tensors. Raises ValueError before
    anything is written, OSError if writing fails."""
    target = Path(target)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists (another name; nothing is overwritten)")
    if not shard_size >= 1:
        raise ValueError(f"shard_size is {shard_size} (bytes, such as 5e9)")
    with torch.device("meta"):
        module = Transformer(config)
    shards, size, total = [{}], 0, 0  # of each file {name: (shape, bytes)}
    for name, t in unpack(config, module.state_dict()):
        n = t.numel() * dtype.itemsize
        if shards[-1] and size + n > shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = list(t.shape), n
        size, total = size + n, total + n
    copied = checkpoint.besides(source)
    ground = next(p for p in target.absolute().parents if p.exists())
    need, free = total + sum(p.stat().st_size for p in copied) + 2**20, shutil.disk_usage(ground).free
    if need > free:
        raise ValueError(f"{target} needs {need / 1e9:.2f} GB, and {ground} has {free / 1e9:.2f} GB free (make room)")
    partial, index = target.with_name(f"{target.name}.partial-{os.getpid()}"), {}
    partial.mkdir(parents=True)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for i, shard in enumerate(shards):
                several = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
                file = several if len(shards) > 1 else "model.safetensors"
                index |= dict.fromkeys((spelled(config, name) for name in shard), file)
                write_shard(partial / file, config, shard, dtype, made, bar)
        for path in copied:
            shutil.copyfile(path, partial / path.name)
        write_json(partial / "run.json", {**run, **module.num_parameters()})
        if len(shards) > 1:
            meta = {"total_size": total}
            write_json(partial / "model.safetensors.index.json", {"metadata": meta, "weight_map": index})
        write_json(partial / "config.json", checkpoint.public_config(config, dtype))
        rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def write_shard(path, config, shard, dtype, made, bar):
    """A safetensors file, without ever holding it: the length of the header, the header, then each tensor's bytes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    kind = {t: kind for kind, t in checkpoint.DTYPES.items()}[dtype]
    for name, (shape, n) in shard.items():
        header[spelled(config, name)] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + n]}
        at += n
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for name, (shape, n) in shard.items():
            t = made(name).to(dtype).contiguous()
            assert list(t.shape) == shape, name
            f.write(t.view(torch.uint8).numpy())
            bar.update(n)
        f.flush()
        os.fsync(f.fileno())
