"""A checkpoint: a Hugging Face folder, and the module that lies in it.

There is no format of our own. `load` reads what Meta, Mistral and Qwen publish, and `save` writes what transformers and
vLLM read. What the Transformer of model.py cannot compute exactly (a sliding window, another activation) is refused by
name. Nothing in a folder is executed, and its index cannot name a file outside it.

    config.json          the configuration, in the public keys; one key more, `granularity`, which other readers ignore
    model.safetensors    the weights, or shards of them with model.safetensors.index.json
    tokenizer.json ...   the tokenizer, in its public files
    run.json             where the weights come from, the `lineage`, and the counts of parameters
    trainer.pt           what `train.py --resume` needs

A module has one tensor for all experts of a layer, a file one for each matrix of each expert: names.py translates.

The lineage is a list such as [{"step": "source", "name": "Qwen/Qwen3-0.6B", "tokens": None}, {"step": "upcycle", ...},
{"step": "train", "tokens": ..., "flops": ..., "seed": ..., "data": {...}, "settings": {...}}]. settings.py reads it for
defaults, data.py for the place in the text, runs.py for its table.

A kill loses no run. Each file is renamed into place when it is whole, in the order weights, run.json, trainer.pt, and
each of these holds the number of its training step. Where the numbers differ `load` refuses the folder by name, and
`train.py --resume` goes on from trainer.pt, whose renaming is the commit.
"""

import math
import re
from pathlib import Path
from shlex import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configuration import from_public, public_config
from files import read_json, replacing, write_json
from model import Transformer
from names import packed, spelled, unpack

# ---- the folder -----------------------------------------------------------------------------------------------------


def find(name):
    """The folder that `name` means: that folder itself, or a public model `org/name`, from the hub or the hub's cache.
    Only weights, JSON, tokenizer and licence are fetched. Raises FileNotFoundError."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return Path(name)
    import huggingface_hub

    wanted = ["*.safetensors", "*.json", "tokenizer*", "vocab.*", "merges.txt", "*.jinja", "LICENSE*", "NOTICE*"]
    twice = ["consolidated*", "original/*"]  # the same weights in Mistral's and Meta's own format
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=twice))
    except Exception as error:  # no network, no such model, no right to it: many kinds
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        right = "a folder, or the name of a public model and, the first time, a network"
        raise FileNotFoundError(f"{name} is no folder, and the hub did not give it: {reason} ({right})") from None


def read_config(folder):
    """The Config of a checkpoint folder. Raises FileNotFoundError, or ValueError for what model.py cannot compute."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder (a checkpoint folder, with config.json in it)")
    return from_public(read_json(folder / "config.json"), folder / "config.json")


# ---- weights --------------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def opened(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as wrong:
        pointer = Path(path).is_file() and open(path, "rb").read(24) == b"version https://git-lfs."
        why = "it is git's pointer to it (git lfs pull)" if pointer else wrong
        raise ValueError(f"{path} is not a whole safetensors file: {why}") from None


def tensor_files(folder):
    """{tensor name: the safetensors file it lies in}, for one file or shards with an index. Raises FileNotFoundError or
    ValueError."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        shards = {"model.safetensors"}
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise ValueError(f"{index} has no weight_map (tensor name: file name)")
        shards = set(weight_map.values())
    else:
        raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, or shards and their index)")
    files = {}
    for shard in sorted(shards):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{index} names a shard outside the folder: {shard!r}")
        if not (folder / shard).exists():
            raise FileNotFoundError(f"{folder / shard} is missing (the index names it)")
        with opened(folder / shard) as f:
            files |= dict.fromkeys(f.keys(), folder / shard)
    return files


def reader(folder, config):
    """(a function that reads the tensor of a name from a checkpoint folder of Config `config`, their widest dtype).

    Reads only headers; the head of a tied model, if it is stored all the same, is compared with the embedding. Raises
    FileNotFoundError or ValueError where a tensor is missing, left over, torn, or of another shape or dtype."""
    with torch.device("meta"):  # shapes without numbers
        state = Transformer(config).state_dict()
    files, wanted = tensor_files(folder), {}
    # A file may hold a tensor under its public name, under ours (Mixtral's router, if experts are whole), or as a slice
    # of a whole expert tensor.
    for whole, t in state.items():
        for i, (name, part) in enumerate(unpack(config, {whole: t})):
            ways = {spelled(config, name): (part.shape, ()), name: (part.shape, ())}  # name in the file: shape, index
            if whole.endswith("experts.down_proj"):  # transformers 5 can keep a layer's experts as a module does
                ways[whole] = (t.shape, (i,))
            elif whole.endswith("experts.gate_up_proj"):  # expert 0's gate, its up, expert 1's gate ...
                expert, up = divmod(i, 2)
                ways[whole] = (t.shape, (expert, slice(up * len(part), (up + 1) * len(part))))
            stored = next((way for way in ways if way in files), spelled(config, name))
            wanted[name] = stored, *ways[stored]
    shapes = {stored: tuple(shape) for stored, shape, _ in wanted.values()}
    spare = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * config.tie_word_embeddings  # may lie there without use
    missing = sorted(shapes.keys() - files.keys())
    extra = sorted(n for n in files.keys() - shapes.keys() if not n.endswith(spare))
    for names, word in ((missing, "lacks"), (extra, "has, beyond its configuration,")):
        if names:
            more = f" and {len(names) - 1} more" * (len(names) > 1)
            raise ValueError(f"{folder} {word} the tensor {names[0]}{more} (config.json and weights must agree)")
    dtype = None
    for path in sorted(set(files.values())):
        with opened(path) as f:
            for name in sorted(shapes.keys() & set(f.keys())):
                kind, shape = f.get_slice(name).get_dtype(), tuple(f.get_slice(name).get_shape())
                if shape != shapes[name] or kind not in DTYPES:
                    right = f"config.json says {shapes[name]}; {', '.join(DTYPES)} are read"
                    raise ValueError(f"{path}: {name} is {kind} of shape {shape} ({right})")
                dtype = torch.promote_types(dtype or DTYPES[kind], DTYPES[kind])
    if config.tie_word_embeddings and "lm_head.weight" in files:
        both = ("lm_head.weight", "model.embed_tokens.weight")
        if not torch.equal(*(read_tensor(files[name], name).to(dtype) for name in both)):
            raise ValueError(f"{folder}: its lm_head.weight is not its embedding, though config.json ties the two "
                             "(tie_word_embeddings false keeps both)")  # fmt: skip

    def read(name):
        stored, _, index = wanted[name]
        return read_tensor(files[stored], stored, index)

    return read, dtype


def read_tensor(path, name, index=()):
    with opened(path) as f:
        return f.get_slice(name)[index] if index else f.get_tensor(name)


def load(folder, dtype=torch.float32):
    """The module in a checkpoint folder, with its weights as `dtype`, on the CPU.

    Raises FileNotFoundError or ValueError where a part is missing, torn, or of another shape than config.json says."""
    config = read_config(folder)
    check_whole(folder)
    read, _ = reader(folder, config)
    return build(config, lambda name, shape: packed(config, name, shape, read), dtype)


@torch.no_grad()
def build(config, value, dtype=torch.float32, shard=None):
    """The module of Config `config` in which the tensor `name` of its state dict is value(name, shape).

    shard(module): called while the module is empty, to spread its parameters over the ranks. Then each tensor goes to
    its shards before the next one is made: no rank ever holds the model whole."""
    with torch.device("meta"):
        module, state = Transformer(config).to(dtype), {}
    if shard:
        from torch.distributed.tensor import distribute_tensor  # half a second that only shards need

        shard(module)
    for name, empty in module.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        whole = value(name, empty.shape).to(dtype)
        if shard:
            whole = whole.to(empty.device)
            mine = distribute_tensor(whole, empty.device_mesh, empty.placements, src_data_rank=None)
            empty.to_local().copy_(mine.to_local())
        else:
            state[name] = whole
    if not shard:
        module.load_state_dict(state, assign=True, strict=False)  # of a tied model the head is missing
    if config.tie_word_embeddings:
        module.lm_head.weight = module.model.embed_tokens.weight
    return module


def save(module, folder, tokenizer=None, state=None, step=None):
    """Writes config.json, model.safetensors and, if given, the tokenizer into `folder`, each renamed into place.

    state: the weights to write in the place of the module's own (a sharded module has only its part of them).
    step: a number that goes into the metadata of model.safetensors."""
    folder, config = Path(folder), module.config
    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict() if state is None else state
    tensors = {spelled(config, n): t.detach().cpu().contiguous() for n, t in unpack(config, state)}
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "config.json", public_config(config, next(iter(tensors.values())).dtype))
    with replacing(folder / "model.safetensors") as beside:
        save_file(tensors, beside, metadata={"format": "pt"} | ({} if step is None else {"step": str(step)}))


BESIDES = ("generation_config.json", "LICENSE*", "NOTICE*")
OF_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


def besides(folder, tokenizer=True):
    """What lies beside the weights in a folder and goes along with them: licence and generation settings; tokenizer and
    chat template, unless another tokenizer is to take their place."""
    patterns = (*BESIDES, *OF_TOKENIZER) if tokenizer else BESIDES
    return sorted({p for pattern in patterns for p in Path(folder).glob(pattern) if p.is_file()})


# ---- lineage --------------------------------------------------------------------------------------------------------


def read_lineage(folder, source_tokens=None):
    """(name of the tokenizer or None, lineage) of a checkpoint folder, from its run.json. A public folder has none, and
    gets one entry, "source". source_tokens: what it was trained on, if known. Raises ValueError for a torn folder."""
    folder = Path(folder)
    path = folder / "run.json"
    if source_tokens is not None and not 0 <= source_tokens < math.inf:
        raise ValueError(f"source_tokens is {source_tokens} (0 or more)")
    tokens = None if source_tokens is None else int(source_tokens)
    if not path.exists():
        name, cached = folder.resolve().name, folder.resolve().parent  # the hub's: models--ORG--NAME/snapshots/HASH
        if cached.name == "snapshots":
            name = cached.parent.name.removeprefix("models--").replace("--", "/")
        return None, [{"step": "source", "name": name, "tokens": tokens}]
    check_whole(folder)
    run = read_json(path)
    lineage = run.get("lineage")
    if not isinstance(lineage, list) or not lineage or not all(isinstance(s, dict) and "step" in s for s in lineage):
        raise ValueError(f"{path} has no lineage (a list of steps)")
    for count in [step.get("tokens") for step in lineage]:
        if not isinstance(count, (int, float, type(None))):
            raise ValueError(f"{path}: tokens {count!r} (a number)")
    if tokens is not None:
        if lineage[0]["step"] != "source":
            why = f"{path} knows its own tokens (leave it out: it is for a public source)"
            raise ValueError(f"source_tokens is {source_tokens}: {why}")
        lineage[0]["tokens"] = tokens
    return run.get("tokenizer"), lineage


def closed_mask(lineage):
    """Whether the last step was grow.py's operator random: its mask waits for train.py --mask-steps."""
    return lineage[-1]["step"] == "grow" and lineage[-1].get("operator") == "random"


def check_ids(tokenizer, config):
    """Raises ValueError if a tokenizer makes ids that a model of Config `config` does not know."""
    if tokenizer.min_vocab_size > config.vocab_size:
        right = f"the model knows {config.vocab_size}: its own tokenizer"
        raise ValueError(f"tokenizer {tokenizer.name} makes ids up to {tokenizer.min_vocab_size - 1} ({right})")


def last_settings(lineage):
    """The settings of the last step of a lineage that read text, {} if none did."""
    return ([{}] + [step["settings"] for step in lineage if "settings" in step])[-1]


def read_trainer(folder):
    """What trainer.pt holds: tensors, numbers, strings; nothing in it is run. Tensors stay on the disk until used."""
    path = Path(folder) / "trainer.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (a folder that train.py has saved to)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state["format"] != 1:
            raise ValueError(f"format {state['format']}")
        return state
    except Exception as error:  # torch.load raises many kinds for a torn or foreign file
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be read: {first} (a trainer.pt written by train.py)") from None


def check_whole(folder):
    """Raises ValueError if weights, run.json and trainer.pt are of different training steps: a save was killed between
    them. A public folder, and an operator's, have no such numbers, and pass."""
    folder, steps = Path(folder), set()
    if (folder / "run.json").exists() and "step" in (run := read_json(folder / "run.json")):
        steps.add(str(run["step"]))
        if (folder / "model.safetensors").exists():
            with opened(folder / "model.safetensors") as f:
                steps.add((f.metadata() or {}).get("step", str(run["step"])))  # no step: passes
        if (folder / "trainer.pt").exists():
            steps.add(str(read_trainer(folder)["step"]))
    if len(steps) > 1:
        right = f"python train.py --resume --out {quote(str(folder))}"
        raise ValueError(f"{folder} was killed while saving (first: {right})")
