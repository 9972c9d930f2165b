"""Text to tokens to batches.

A corpus is a list of documents. Each is encoded and followed by the tokenizer's end-of-text token; a twentieth is kept
for validation; both parts are cached as raw token files and read through memory maps. A training window is T + 1
neighbouring tokens (T inputs, T targets), and the order of windows is a pure function of (seed, position): a resumed
run, eight processes instead of one and a child of the run all read the same list.

    specification  [name=]source[:weight],...         python       cpp:0.9,python:0.1       mine=notes/**/*.txt:1
                   no weights: corpora count by size; weight 0: only evaluated
    sources        python     Python's standard library without tests
                   packages   the .py files, without tests, of the packages in requirements.txt
                   cpp        the C++ headers that PyTorch installs
                   english    docstrings of those packages, and Python's help topics: no text of `python`
                   a UTF-8 text file, a folder or glob of them; .jsonl: the field "text" of each line
                   a folder of ready tokens: train.bin, val.bin (raw, little-endian) and meta.json,
                              {"dtype": "uint16" or "uint32", "vocab_size": ..., "bytes_per_token": ...}
    tokenizers     bytes      the 256 byte values; NUL is the end-of-text token (so is a NUL in a text)
                   gpt2, o200k_base ...               tiktoken's encodings (downloaded once)
                   a tokenizer.model of tiktoken ranks (Llama 3): base64 token, space, rank on each line
                   a byte-level BPE tokenizer.json (GPT-2, Llama 3, Qwen, SmolLM), or a checkpoint folder with one
                   ids:32000  no text: so many ids, for ready tokens

Text is text: `<|endoftext|>` in a document is encoded as ordinary characters (`transformers`, asked to encode the same
text, sees a special token). Bits per byte compare tokenizers; there, the end of a document counts as one byte.

Validation is split off by a hash of names, whole top-level modules or folders at a time (in a user's folder: files),
because neighbouring files are often near-copies. Where no unit is small enough, it is the last twentieth of the text.

Left out on purpose: masks between the documents in one window (the end-of-text token must do), corpora larger than
memory and streaming from a hub (write train.bin and val.bin yourself), removal of near-copies (only exact copies go),
beginning-of-text tokens, SentencePiece (Llama 2, Mistral 7B: ready tokens), training a tokenizer.

In order: tokenizers, sources, preparing, windows, the n-gram ruler; at the end, what reads and writes the files of
public tokenizers, which a first reading can skip.

Try:
1. `python data.py python`: 3-gram counts need 2.58 bits a byte. Let n run up to 7 in `ngram_losses`. (1.95 at n = 5,
   then it rises: most longer histories of the validation text were never seen in training.)
2. In `list_files`, make every C++ header a unit of its own, "/".join(parts). What do 3-grams now lose on `cpp`?
   (1.88 nats in place of 2.39: generated headers are near-copies, and those in training give away the others.)
3. Let `mix` draw u from np.random.default_rng(seed), half and half, and follow the lead of one corpus over 10,000
   windows. (Up to 36 windows, as of a fair coin; with the golden ratio never more than 2.)
"""

import argparse
import ast
import base64
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

BUILTIN = ("python", "packages", "cpp", "english")
PACKAGES = ("torch", "tiktoken", "numpy", "scipy", "tqdm", "pytest", "_pytest", "safetensors", "matplotlib")
TESTS = {"test", "tests", "testing"}
NOT_LIBRARY = TESTS | {"encodings", "idlelib", "pydoc_data", "lib2to3", "site-packages", "dist-packages"}
VALIDATION = 0.05  # of the bytes
EVAL_TOKENS = 131072  # of a validation part are evaluated at most
FORMAT = 1  # of the cache: another number, and every corpus is prepared again


def stable_hash(*parts):
    """64 hexadecimal digits that depend on the parts (bytes, arrays, or anything with a str) and on nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, (bytes, np.ndarray)) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@dataclass
class Tokenizer:
    """Text to token ids and back; `load_tokenizer` makes it."""

    name: str  # as asked for
    vocab_size: int  # the largest id + 1
    eot: int | None  # end-of-text token
    key: str  # hash of what it does: equal keys give equal ids, whatever folder it was loaded from
    bpe: tiktoken.Encoding | None = None  # None: bytes, or ids without text
    nfc: bool = False  # bring text to Unicode's normal form C first
    files: dict | None = None  # {name: bytes} of the public files it was read from

    def encode(self, texts):
        """list of str -> list of integer arrays, on all cores. Bytes that have no token (SmolLM2 lacks 21) are dropped,
        as by `transformers`."""
        if self.key == "bytes":
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        if self.bpe is None:
            raise ValueError(f"tokenizer {self.name!r} cannot encode text (only ready train.bin and val.bin)")
        if self.nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        encoded = self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        return [ids[ids < self.vocab_size] for ids in (np.array(ids, np.uint32) for ids in encoded)]

    def decode(self, ids):
        """Integers (list, array or tensor) -> str. Ids without a token and bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids).reshape(-1).tolist()
        if self.bpe is None and self.key != "bytes":
            return " ".join(map(str, ids))
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def _bytes(self, i):
        try:
            return bytes([i]) if self.bpe is None else self.bpe.decode_single_token_bytes(i)
        except (KeyError, ValueError):
            return "\ufffd".encode()

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` opens. Those that the
        tokenizer was read from are written unchanged; ids without text have none."""
        for name, content in (self.files or public_files(self)).items():
            partial = Path(folder, f"{name}.partial")
            partial.write_bytes(content)
            partial.replace(Path(folder, name))


def load_tokenizer(name="bytes"):
    """The `Tokenizer` called so in the table at the top of this file.

    ValueError or FileNotFoundError: no such tokenizer, or one that tiktoken cannot represent exactly."""
    if name == "bytes" or re.fullmatch(r"ids:[1-9]\d*", name):
        size, end = (256, 0) if name == "bytes" else (int(name[4:]), None)
        return Tokenizer(name, size, end, name)
    if name in tiktoken.list_encoding_names():
        try:
            bpe = tiktoken.get_encoding(name)
        except OSError as e:
            raise ValueError(f"no download of {name!r}: {type(e).__name__} (bytes needs no network)") from None
        special = bpe._special_tokens
        return make_tokenizer(name, bpe._pat_str, bpe._mergeable_ranks, special, special.get("<|endoftext|>"))
    path = Path(name)
    if path.is_dir():
        path = path / ("tokenizer.json" if (path / "tokenizer.json").exists() else "tokenizer.model")
    if not path.is_file():
        known = ["bytes", *tiktoken.list_encoding_names()]
        raise FileNotFoundError(f"no tokenizer {name!r} ({suggest(name, known)}, a tokenizer.json or a rank file)")
    return read_json_tokenizer(name, path) if path.suffix == ".json" else read_ranks(name, path)


def suggest(word, known):
    near = get_close_matches(word, known, 1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}"


def make_tokenizer(name, split, ranks, special, eot, nfc=False, files=None):
    """From tiktoken's parts: the regular expression that splits text, {bytes: id} of what may merge, {name: id}."""
    size = max([*ranks.values(), *special.values()]) + 1
    key = stable_hash(portable(split), nfc, eot, sorted(special.items()), sorted(ranks.items()))[:16]
    missing = {bytes([b]) for b in range(256)} - ranks.keys()  # tiktoken needs all bytes: ids that `encode` drops
    ranks = ranks | {byte: size + i for i, byte in enumerate(sorted(missing))}
    bpe = tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, size, eot, key, bpe, nfc, files)


# ----------------------------------------------------------------------------------------------------------------------
# Sources: which files, and which documents in them


def parse_spec(spec):
    """`[name=]source[:weight],...` -> [(name, source, weight or None)]. Reads no text, creates nothing.

    ValueError or FileNotFoundError: an unknown or empty source, a name given twice, a weight that is negative or no
    number, weights for some corpora only, all weights zero."""
    corpora = []
    for part in spec.split(","):
        name, source, weight = re.fullmatch(r"(?:([\w.-]+)=)?(.*?)(?::([^:/]*))?", part.strip(), re.S).groups()
        try:
            weight = weight if weight is None else float(weight)
        except ValueError:
            raise ValueError(f"weight {weight!r} of {source!r} is no number (such as {source}:0.5)") from None
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(f"weight {weight:g} of {source!r} (a number from 0 on; 0 only evaluates)")
        if not source:
            raise ValueError(f"no source in {part!r} of {spec!r} ([name=]source[:weight],... as cpp:0.9,python:0.1)")
        list_files(source)
        stem = Path(re.split(r"[*?[]", source)[0]).absolute().stem  # of a glob: what stands before the wildcards
        corpora.append((name or re.sub(r"[^\w.-]+", "-", stem), source, weight))
    names, _, weights = zip(*corpora)
    if len({*names}) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"two corpora of the name {twice!r} in {spec!r} (another name in front: other=source)")
    if None in weights and {*weights} != {None}:
        raise ValueError(f"a weight for some corpora only in {spec!r} (for all of them, or for none)")
    if None not in weights and sum(weights) == 0:
        raise ValueError(f"all weights are zero in {spec!r} (one corpus at least to train on)")
    return corpora


def list_files(source):
    """A source -> [(unit, path)], reading no file. A unit goes to training or to validation as a whole.

    ValueError or FileNotFoundError: an unknown source, or one without any text."""
    stdlib, path = Path(sysconfig.get_path("stdlib")), Path(source)
    if source == "python":
        return [(parts[0], file) for parts, file in walk(stdlib, NOT_LIBRARY, ".py")]
    if source == "cpp":
        headers = walk(package("torch") / "include", (), (".h", ".hpp", ".cuh"))
        return [("/".join(parts[:-1][:2]), file) for parts, file in headers]
    if source in ("packages", "english"):
        roots = filter(None, map(package, PACKAGES))
        files = [(f"{root.name}/{parts[0]}", file) for root in roots for parts, file in walk(root, TESTS, ".py")]
        return files + [("pydoc_data", stdlib / "pydoc_data/topics.py")] * (source == "english")
    if is_ready(source):
        return [(name, path / name) for name in ("train.bin", "val.bin", "meta.json")]
    if path.is_dir():
        files = [("/".join(parts), file) for parts, file in walk(path)]
    elif path.is_file():
        files = [(path.name, path)]
    else:
        files = [(p, Path(p)) for p in sorted(glob.glob(source, recursive=True)) if os.path.isfile(p)]
    if not files and re.fullmatch(r"\w*", source):
        raise ValueError(f"unknown corpus {source!r} ({suggest(source, BUILTIN)}, or a file, folder or glob)")
    if not files:
        raise FileNotFoundError(f"no file in {source!r} (a text file, .jsonl, folder, or glob such as notes/**/*.txt)")
    if not any(path.stat().st_size for _, path in files):
        raise ValueError(f"{source} is empty (a file with text)")
    return files


def walk(root, skip=(), suffixes=""):
    """(parts of the path below root, path) of the files in a folder, in a fixed order, without hidden ones and folders
    called as in `skip`."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        inner = Path(folder).relative_to(root).parts
        yield from (((*inner, f), Path(folder, f)) for f in sorted(files) if f.endswith(suffixes) and f[0] != ".")


def package(name):
    """The folder of an installed package, without importing it; None if there is none."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def is_ready(source):
    return source not in BUILTIN and Path(source, "train.bin").exists()


def describe(source):
    """Where text comes from, with versions, for run.json."""
    if source not in BUILTIN:
        return str(Path(source).absolute())
    names = {"python": (), "cpp": ("torch",)}.get(source, [p for p in PACKAGES if p != "_pytest" and package(p)])
    python = [f"python {platform.python_version()}"] if source in ("python", "english") else []
    return ", ".join(python + [f"{p} {importlib.metadata.version(p)}" for p in names])


def read_documents(source, quiet=True):
    """A source -> (documents [(unit, text in UTF-8)], skipped {reason: number}).

    Empty documents and exact copies are skipped. What is not UTF-8 is skipped in a built-in source, else an error."""
    files = list_files(source)
    if source == "english":
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            texts = pool.map(read_docstrings, [path for _, path in files], chunksize=16)
            texts = list(tqdm(texts, "docstrings", len(files), unit=" files", disable=quiet or None, leave=False))
        found = zip(files, texts)
    else:
        found = ((file, text) for file in files for text in read_texts(file[1], refuse=source not in BUILTIN))
    documents, seen, skipped = [], set(), Counter()
    for (unit, _), text in found:
        digest = text and stable_hash(text)
        reason = "not UTF-8" if text is None else "empty" if not text.strip() else "copies" if digest in seen else None
        if reason:
            skipped[reason] += 1
        else:
            seen.add(digest)
            documents.append((unit, text))
    if not documents:
        raise ValueError(f"{source} has no text ({len(files)} files, skipped: {dict(skipped)})")
    return documents, dict(skipped)


def read_texts(path, refuse):
    """The documents of one file: its text, or the field "text" of each line of .jsonl; [None] if it is not UTF-8."""
    text = path.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError as e:
        if refuse:
            raise ValueError(f"{path} is not UTF-8 text at byte {e.start} (convert it, or a glob without it)") from None
        return [None]
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"].encode())
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f'{path} line {number} has no text (each line: {{"text": "..."}})') from None
    return texts


def read_docstrings(path):
    """The docstrings of a Python file as one text (of Python's help topics: all texts); None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(path.read_bytes().decode())))
    except (SyntaxError, ValueError):
        return None
    if path.parent.name == "pydoc_data":
        texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    else:
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(n) for n in nodes if isinstance(n, documented)]
    return "\n\n".join(filter(None, texts)).encode(errors="replace")


# ----------------------------------------------------------------------------------------------------------------------
# Preparing: documents to cached tokens


@dataclass
class Corpus:
    name: str
    weight: float  # share of the training windows; 0: only evaluated
    train: np.ndarray  # (tokens,) uint16 or uint32, a memory map
    val: np.ndarray  # (tokens,)
    bytes_per_token: float  # of val: bits a byte = nats a token / ln 2 / bytes_per_token
    vocab_size: int
    about: dict  # source with versions, sha256, files, documents, skipped, bytes, train_tokens, val_tokens


def prepare(spec, tokenizer, cache="data", quiet=False, context=1):
    """A specification and a `Tokenizer` -> [`Corpus`], from the cache, or made and put there.

    What `parse_spec` raises; ValueError too for text that is not UTF-8, tokens that do not fit the tokenizer, and a
    training or validation part with less than one window of `context` tokens."""
    plans = []
    for name, source, weight in parse_spec(spec):
        files = [(u, str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for u, p in list_files(source)]
        folder = Path(cache, f"{name}-{stable_hash(FORMAT, describe(source), tokenizer.key, files)[:12]}")
        found = None  # all sources are read and checked before anything is written
        if not folder.exists():
            found = check_ready(Path(source), tokenizer) if is_ready(source) else read_documents(source, quiet)
        plans.append((name, source, weight, folder, found))
    corpora = []
    for name, source, weight, folder, found in plans:
        if found:
            write_cache(folder, source, found, tokenizer, quiet, context)
        meta = json.loads((folder / "meta.json").read_text())
        home = source if is_ready(source) else folder
        train, val = (np.memmap(Path(home, part), np.dtype(meta["dtype"]), "r") for part in ("train.bin", "val.bin"))
        corpora.append(Corpus(name, weight, train, val, meta["bytes_per_token"], meta["vocab_size"], meta["about"]))
    sizes = [len(c.train) if c.weight is None else c.weight for c in corpora]
    for corpus, size in zip(corpora, sizes):
        corpus.weight = size / sum(sizes)
    return corpora


def write_cache(folder, source, found, tokenizer, quiet, context):
    """Fill a folder beside the cache's and rename it: killed at any instant, or raced by another process, nothing is
    wrong. `found` comes from `check_ready` (only meta.json is written) or from `read_documents`."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        meta = found if isinstance(found, dict) else write_documents(partial, source, *found, tokenizer, quiet)
        for part in ("train", "val"):
            count_windows(meta["about"][f"{part}_tokens"], context, f"the {part} part of {source}")
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        with suppress(OSError):  # another process was faster: its folder is as good
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()  # only if it is empty


def write_documents(partial, source, documents, skipped, tokenizer, quiet):
    """Split and encode the documents; returns the content of meta.json."""
    train, val = split_documents(documents)
    size, val_size = sum(map(len, train + val)), sum(map(len, val))
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    with tqdm(total=size, desc=source, unit="B", unit_scale=True, disable=quiet or None, leave=False) as bar:
        train_tokens = write_tokens(partial / "train.bin", train, tokenizer, dtype, bar)
        val_tokens = write_tokens(partial / "val.bin", val, tokenizer, dtype, bar)
    about = {"source": describe(source), "sha256": stable_hash(*(text for _, text in documents))}
    about |= {"files": len(list_files(source)), "documents": len(documents), "skipped": skipped, "bytes": size}
    about |= {"train_tokens": train_tokens, "val_tokens": val_tokens}
    per_token = (val_size + len(val) * (tokenizer.eot is not None)) / val_tokens
    return {"dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "bytes_per_token": per_token, "about": about}


def split_documents(documents):
    """[(unit, text)] -> (training texts, validation texts): whole units, or else the last twentieth of the bytes."""
    size = Counter()
    for unit, text in documents:
        size[unit] += len(text)
    budget, chosen, taken = int(VALIDATION * sum(size.values())), set(), 0
    if not budget:
        raise ValueError(f"{sum(size.values())} bytes of text (at least 20, to keep a twentieth for validation)")
    for unit in sorted(size, key=stable_hash):
        if taken + size[unit] <= budget:
            chosen.add(unit)
            taken += size[unit]
    if taken > budget / 2:
        return [t for u, t in documents if u not in chosen], [t for u, t in documents if u in chosen]
    train, val = [text for _, text in documents], []
    while len(train[-1]) <= budget:
        val.insert(0, train.pop())
        budget -= len(val[0])
    if budget:  # part of a document: from the start of a line if one is near, and never from inside a character
        text = train.pop()
        newline = text.find(b"\n", len(text) - budget - 1, len(text) - budget + 1000) + 1
        at = newline if 0 < newline < len(text) else len(text) - budget
        while text[at] & 0xC0 == 0x80:
            at -= 1
        train.append(text[:at])
        val.insert(0, text[at:])
    return train, val


def write_tokens(path, texts, tokenizer, dtype, bar):
    """Encode texts, each followed by the end-of-text token, into a raw file. Returns the number of tokens."""
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype).tobytes()
    pieces = ((piece, end if last else b"") for text in texts for piece, last in cut_long(text))
    with open(path, "wb") as f:
        while batch := list(itertools.islice(pieces, 256)):
            for (piece, after), ids in zip(batch, tokenizer.encode([piece.decode() for piece, _ in batch])):
                f.write(ids.astype(dtype).tobytes() + after)
                bar.update(len(piece))
        return f.tell() // dtype.itemsize


def cut_long(text, size=2**18):
    """UTF-8 -> [(piece, is it the last)]: a long text in pieces for many cores. A piece ends with a single newline
    between a visible character and a letter of ASCII: no tokenizer's token reaches over it."""
    start, seam = 0, re.compile(rb"(?<=[!-~])\n(?=[A-Za-z])")
    while m := seam.search(text, start + size):
        yield text[start : m.end()], False
        start = m.end()
    yield text[start:], True


def check_ready(folder, tokenizer):
    """A folder of ready tokens -> the content of meta.json in the cache. ValueError: they are not as it says."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size, per_token = int(meta["vocab_size"]), float(meta["bytes_per_token"])
        dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
    except (ValueError, LookupError, TypeError) as e:
        right = "dtype uint16 or uint32, vocab_size, bytes_per_token"
        raise ValueError(f"{folder}/meta.json: {type(e).__name__} {e} ({right})") from None
    if size > tokenizer.vocab_size or not per_token > 0:
        right = f"at most the {tokenizer.vocab_size} ids of tokenizer {tokenizer.name}, or ids:{size}; above 0"
        raise ValueError(f"{folder}/meta.json has vocab_size {size}, bytes_per_token {per_token} ({right})")
    tokens = []
    for file in (folder / "train.bin", folder / "val.bin"):
        length = file.stat().st_size
        if length == 0 or length % dtype.itemsize:
            raise ValueError(f"{file} has {length} bytes (tokens of {dtype.itemsize}, as in meta.json)")
        tokens.append(np.memmap(file, dtype, "r"))
        if tokens[-1].max() >= size:
            raise ValueError(f"{file} has token {tokens[-1].max()} (below the vocab_size {size} of meta.json)")
    lengths, about = [*map(len, tokens)], {"source": describe(str(folder)), "sha256": stable_hash(*tokens)}
    about |= {"files": 2, "documents": 2, "skipped": {}, "bytes": round(sum(lengths) * per_token)}
    about |= {"train_tokens": lengths[0], "val_tokens": lengths[1]}
    return {"dtype": dtype.str, "vocab_size": size, "bytes_per_token": per_token, "about": about}


# ----------------------------------------------------------------------------------------------------------------------
# Windows: what is read, in which order


def count_windows(tokens, context, what):
    """Window w is tokens[w T : w T + T + 1]. Neighbours share one token, which is a target only once."""
    if tokens <= context:
        raise ValueError(f"{what} has too few tokens for the context {context}: {tokens} (at least {context + 1})")
    return (tokens - 1) // context


def inputs_and_targets(rows):
    """A list of n arrays of T + 1 tokens -> two int64 tensors (n, T), the second one token further on."""
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def validation_windows(corpus, context):
    """(ids, targets), int64 tensors (n, context): the same windows for every program, evenly spaced over the validation
    part, at most EVAL_TOKENS tokens."""
    windows = count_windows(len(corpus.val), context, f"the validation part of {corpus.name}")
    n = min(windows, max(1, EVAL_TOKENS // context))
    starts = np.arange(n) * windows // n * context
    return inputs_and_targets([corpus.val[s : s + context + 1] for s in starts])


class Reader:
    """The order of training windows, the same on every rank: each corpus without replacement, in an order shuffled by
    (seed, epoch, its name), the corpora mixed by weight.

    `sequence` counts the windows drawn so far, `read` {corpus name: windows of it read so far}."""

    def __init__(self, corpora, context, seed, sequence=0, read=None):
        self.corpora, self.context, self.seed, self.sequence = corpora, context, seed, sequence
        self.read = {c.name: (read or {}).get(c.name, 0) for c in corpora}
        self.windows = [c.weight and count_windows(len(c.train), context, f"train part of {c.name}") for c in corpora]
        self.orders = {}  # {corpus index: (epoch, window numbers in their order)}

    def mix(self, numbers):
        """Sequence numbers -> corpus indices. u_i = frac(shift + i * golden ratio), in 64-bit fixed point, fills [0, 1)
        so evenly that every stretch has nearly exact shares; and it needs no state."""
        shift = np.uint64(int(stable_hash("mix", self.seed)[:16], 16))
        u = ((shift + numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53
        edges = np.cumsum([c.weight for c in self.corpora])
        return np.searchsorted(edges / edges[-1], u, side="right")

    def take(self, n):
        """The next n windows, [(corpus index, window number)]; moves on."""
        items = []
        for k in self.mix(np.arange(self.sequence, self.sequence + n, dtype=np.uint64)).tolist():
            name = self.corpora[k].name
            epoch, place = divmod(self.read[name], self.windows[k])
            if k not in self.orders or self.orders[k][0] != epoch:
                rng = np.random.default_rng((self.seed, epoch, int(stable_hash(name)[:16], 16)))
                self.orders[k] = epoch, rng.permutation(self.windows[k])
            items.append((k, int(self.orders[k][1][place])))
            self.read[name] += 1
        self.sequence += n
        return items

    def load(self, items):
        """[(corpus index, window number)] -> (ids, targets), int64 tensors (len(items), context)."""
        T = self.context
        return inputs_and_targets([self.corpora[k].train[w * T : w * T + T + 1] for k, w in items])


def position(lineage, corpora, context, tokenizer):
    """Where a child reads on: the lineage in run.json -> (seed, sequence, read, notes).

    `seed` is that of the first training step (None: there is none), as it decides the order. `sequence` and `read` are
    those of `Reader`, counted from the last step backwards while context and tokenizer are those of the steps' settings
    (best `Tokenizer.key`: names change with folders), as others cut other windows. `notes`: what does not go on."""
    steps = [step for step in lineage if step["step"] == "train"]
    sequence, read, notes, changed = 0, Counter(), [], set()
    for step in reversed(steps):
        now = {"context": context, "tokenizer": tokenizer}
        other = [f"{k} {step['settings'].get(k)} became {v}" for k, v in now.items() if step["settings"].get(k) != v]
        if other:
            notes.append(f"{' and '.join(other)}: a new order of windows begins, in which text can come again")
            break
        sequence += sum(d["tokens"] for d in step["data"].values()) // context
        for corpus in corpora:
            past = step["data"].get(corpus.name, {"tokens": 0})
            if past.get("sha256", corpus.about["sha256"]) != corpus.about["sha256"] and corpus.name not in changed:
                changed.add(corpus.name)
                notes.append(f"the text of {corpus.name} has changed: it is read from the beginning")
            if corpus.name not in changed:
                read[corpus.name] += past["tokens"] // context
    return steps[0]["seed"] if steps else None, sequence, dict(read), notes


# ----------------------------------------------------------------------------------------------------------------------
# The ruler by which a loss is read


def ngram_losses(corpus, context):
    """Losses of 1-, 2- and 3-gram counts, nats a token, on exactly the windows of `validation_windows`.

    Counts c of the training part (its first 2^24 tokens), smoothed as by Witten and Bell from the uniform distribution
    up: p(w | h) = (c(h w) + types(h) p(w | h without its first token)) / (c(h) + types(h)), where types(h) different
    tokens follow h. A history does not reach over the start of its window, as that of a model does not."""
    V = corpus.vocab_size
    text = np.array(corpus.train[: 2**24], np.uint64)
    ids, targets = validation_windows(corpus, context)
    rows = torch.cat([ids[:, :1], targets], 1).numpy().astype(np.uint64)  # (n, T + 1)
    p = np.full(targets.shape, 1 / V)  # of each target, (n, T)
    losses = []
    for n in (1, 2, 3):
        grams, counts = np.unique(pack(text, n, V), return_counts=True)  # ascending, so that
        history = grams // np.uint64(V)  # equal histories are neighbours
        first = np.flatnonzero(np.diff(history, prepend=V**n))
        total, types = np.add.reduceat(counts, first), np.diff(first, append=len(grams))
        asked = pack(rows, n, V)[:, 1 if n == 1 else 0 :]  # the n-grams that end in a target
        c_hw = look_up(grams, counts, asked)
        c_h, types_h = (look_up(history[first], x, asked // np.uint64(V)) for x in (total, types))
        known = p[:, -asked.shape[1] :]  # a view of p: targets with a history long enough
        known[:] = np.where(c_h > 0, (c_hw + types_h * known) / np.maximum(c_h + types_h, 1), known)
        losses.append(float(-np.log(p).mean()))
    return losses


def pack(ids, n, V):
    """The n-grams along the last axis, each as one 64-bit integer below V^n (so V is at most 2^21 for n = 3)."""
    length = ids.shape[-1] - n + 1
    return sum(ids[..., i : i + length] * np.uint64(V ** (n - 1 - i)) for i in range(n))


def look_up(keys, values, asked):
    """values at the asked keys, 0 for those that are missing; keys ascend."""
    i = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[i] == asked, values[i], 0)


# ----------------------------------------------------------------------------------------------------------------------
# Files of tokenizers, read and written: for the second reading

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_SPLIT = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # digits stand alone
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
SPLIT_KEEPS_MATCHES = (("Isolated", False), ("Removed", True))  # behavior and invert in a tokenizer.json
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")
PUBLIC_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WAY_OUT = "byte-level BPE as in GPT-2, Llama 3, Qwen, SmolLM; for others, ready train.bin and val.bin with ids:32000"

# A tokenizer.json spells each byte as one visible character: itself, or the next free one from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*VISIBLE}))}
BYTE = {char: b for b, char in CHAR.items()}
BYTES_VOCAB = {(CHAR[b] if b else "\0"): b for b in range(256)}  # of `bytes`: NUL is a special token, found as itself


def read_ranks(name, path):
    """A tiktoken rank file, split as Llama 3 does; if it has 128,000 ranks, with Llama 3's 256 special tokens."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError(f"{path} is no tiktoken rank file; a SentencePiece model? ({WAY_OUT})") from None
    n = len(ranks)
    if sorted(ranks.values()) != [*range(n)] or not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise ValueError(f"{path} does not rank the 256 bytes and their merges from 0 on (a tiktoken rank file)")
    if n != 128000:
        return make_tokenizer(name, LLAMA3_SPLIT, ranks, {"<|endoftext|>": n}, n)
    reserved = (f"reserved_special_token_{i}" for i in itertools.count())
    special = {f"<|{LLAMA3_NAMES.get(i) or next(reserved)}|>": n + i for i in range(256)}
    return make_tokenizer(name, LLAMA3_SPLIT, ranks, special, n + 1)


def read_json_tokenizer(name, path):
    """A tokenizer.json with byte-level BPE, and what lies beside it. ValueError names what tiktoken cannot do exactly.

    A list of merges, tried in its order, equals tiktoken's rule (of all neighbours that make a token, merge those that
    make the lowest id) if ids ascend along the list and each token's own last merge by that rule is listed: a stretch
    of text that becomes one token evolves as it would alone, because no merge reached over its ends."""

    def need(fine, what):
        if not fine:
            raise ValueError(f"{path}: {what} is not supported ({WAY_OUT})")

    def flat(part, inner):  # None, one normalizer or splitter, or a Sequence of them
        return [] if part is None else part[inner] if part["type"] == "Sequence" else [part]

    files = {f: (path.parent / f).read_bytes() for f in PUBLIC_FILES if (path.parent / f).is_file()}
    files["tokenizer.json"] = path.read_bytes()
    try:
        public = json.loads(files["tokenizer.json"])
        model, added = public["model"], {t["content"]: t["id"] for t in public.get("added_tokens") or []}
        need(model["type"] == "BPE", f"a {model['type']} model")
        for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            need(not model.get(option), f"BPE with {option} {model.get(option)!r}")
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        if model["vocab"] == BYTES_VOCAB and not merges:
            return load_tokenizer("bytes")
        normalizers = flat(public.get("normalizer"), "normalizers")
        need(normalizers in ([], [{"type": "NFC"}]), f"normalizer {normalizers}")
        splitters = flat(public.get("pre_tokenizer"), "pretokenizers")
        split = read_split(splitters)
        need(split, f"pre-tokenizer {splitters}")
        whole, listed, made = model.get("ignore_merges"), {*merges}, [model["vocab"][a + b] for a, b in merges]
        need(made == sorted(made), "a list of merges in another order than their ids")
        vocab = {t: i for t, i in model["vocab"].items() if t not in added}
        for t in vocab:
            cuts = [(t[:i], t[i:]) for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
            if len(t) > 1 and not (whole and listed.issuperset(cuts)):
                need(last_merge(t, vocab) in listed, f"token {t!r} that its merges do not make")
        ranks = {bytes(BYTE[c] for c in t): i for t, i in vocab.items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is no byte-level tokenizer.json: {type(e).__name__} {e} ({WAY_OUT})") from None
    end = find_end(path.parent, added)
    files.setdefault("tokenizer_config.json", tokenizer_config(added, end))
    return make_tokenizer(name, split, ranks, added, end, bool(normalizers), files)


def last_merge(token, vocab):
    """The two tokens that byte-pair encoding merges last on the way to `token`; None if it does not get there."""
    parts = list(token)
    while len(parts) > 2:
        ranks = [vocab.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = ranks.index(min(ranks))
        if ranks[i] >= vocab[token]:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def read_split(splitters):
    """Pre-tokenizers of a tokenizer.json -> one regular expression of tiktoken's; None if there is none."""
    *first, last = splitters or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(first) > 1:
        return None
    first, kind = first[0] if first else {"type": None}, last.get("use_regex", True)
    if first["type"] is None and kind:
        return GPT2_SPLIT
    if first["type"] == "Digits" and kind and first["individual_digits"]:
        return DIGITS_SPLIT
    if first["type"] == "Split" and not kind and (first["behavior"], first["invert"]) in SPLIT_KEEPS_MATCHES:
        split = first["pattern"].get("Regex", "$")
        return None if re.search(r"\$|\{[\d,]+\}\+", split) else split  # these mean something else in tiktoken
    return None


def find_end(folder, added):
    """The end-of-text token: what the files beside tokenizer.json say, or one of the usual names; else None."""
    keys = {"tokenizer_config": "eos_token", "config": "eos_token_id", "generation_config": "eos_token_id"}
    for file, key in keys.items():
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            end = json.loads((folder / f"{file}.json").read_text("utf-8")).get(key)
            end = end["content"] if isinstance(end, dict) else end[0] if isinstance(end, list) else end
            if end in added or end in added.values():
                return added.get(end, end)
    return next((added[name] for name in END_NAMES if name in added), None)


def portable(split):
    """tiktoken's regular expression in words that Hugging Face's engine, Oniguruma, reads the same way: without the
    possessive marks of `x++` and `x{1,3}+` (they save backtracking, no more), and with \\z for `$`."""
    return re.sub(r"(?<!\\)([?*+]|\{[\d,]+\})\+", r"\1", split).replace("$", r"\z")


def public_files(tokenizer):
    """{file name: bytes}: tokenizer.json, tokenizer_config.json for `bytes` and for tiktoken's encodings.

    tiktoken merges any two neighbours whose concatenation has a rank, lowest rank first. As a list of merges: every way
    to cut each token into two tokens, in the order of ranks. (`ignore_merges`: a word that is a token stays whole.)"""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if tokenizer.key == "bytes":
        vocab, merges, special, splitters = BYTES_VOCAB, [], {"\0": 0}, [byte_level]
    elif tokenizer.bpe is None:
        return {}
    else:
        ranks, special = tokenizer.bpe._mergeable_ranks, tokenizer.bpe._special_tokens
        spell = {token: "".join(CHAR[b] for b in token) for token in ranks}
        cuts = ((t[:i], t[i:]) for t in sorted(ranks, key=ranks.get) for i in range(1, len(t)))
        merges = [f"{spell[a]} {spell[b]}" for a, b in cuts if a in ranks and b in ranks]
        vocab = {spell[token]: rank for token, rank in ranks.items()} | special
        pattern = {"Regex": portable(tokenizer.bpe._pat_str)}
        splitters = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, byte_level]
    none = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    model = {"type": "BPE", **none, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    public = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    public["added_tokens"] = [{"id": i, "content": text, **flags} for text, i in special.items()]
    public["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splitters}
    public |= {"decoder": byte_level, "model": model | {"vocab": vocab, "merges": merges}}
    public = json.dumps(public, ensure_ascii=False, indent=1).encode()
    return {"tokenizer.json": public, "tokenizer_config.json": tokenizer_config(special, tokenizer.eot)}


def tokenizer_config(special, end):
    ends = [text for text, i in special.items() if i == end]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return json.dumps(config | {"eos_token": (ends or [None])[0]}, indent=1).encode()


# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="data.py",
        usage="data.py SPEC [--tokenizer NAME] [--context T] [--cache FOLDER]",
        description="Prepare corpora and describe them.\n\n"
        "  python data.py python\n"
        "  python data.py cpp,english --tokenizer gpt2\n"
        "  python data.py mine=notes/**/*.txt --tokenizer out/run-1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("spec", metavar="SPEC", help=f"[name=]source[:weight],... Sources: {', '.join(BUILTIN)}, "
                        "a text file, .jsonl, folder or glob, a folder of ready tokens")  # fmt: skip
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME", help="bytes, a tiktoken encoding (gpt2), a "
                        "tiktoken rank file, a tokenizer.json or its folder, ids:N (default: bytes)")  # fmt: skip
    parser.add_argument("--context", type=float, default=256, metavar="T", help="tokens a window (default: 256)")
    parser.add_argument("--cache", default="data", metavar="FOLDER", help="where tokens are kept (default: data)")
    args = parser.parse_args(argv)
    try:
        if args.context < 1 or args.context % 1:
            raise ValueError(f"--context {args.context:g} (a whole number of tokens, at least 1)")
        parse_spec(args.spec)
        tokenizer = load_tokenizer(args.tokenizer)
        for corpus in prepare(args.spec, tokenizer, args.cache):
            print(report(corpus, tokenizer, int(args.context)))
    except (ValueError, OSError) as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        sys.exit(130)


def report(corpus, tokenizer, context):
    """A corpus as a page of text."""
    about, ids = corpus.about, validation_windows(corpus, context)[0]
    tokens = about["train_tokens"] + about["val_tokens"]
    skipped = ", ".join(f"{n} {reason}" for reason, n in about["skipped"].items()) or "none"
    excerpt = tokenizer.decode(corpus.val[:300]).strip().splitlines()[:8]
    lines = [
        f"\n{corpus.name}: {about['source']}",
        f"  files            {about['files']:,} (skipped: {skipped})",
        f"  text             {about['bytes']:,} bytes, sha256 {about['sha256'][:12]}",
        f"  tokens           {tokens:,} of {tokenizer.vocab_size:,} kinds, {corpus.bytes_per_token:.2f} bytes each",
        f"  training         {about['train_tokens']:,}: {(len(corpus.train) - 1) // context:,} windows of {context}",
        f"  validation       {about['val_tokens']:,} ({about['val_tokens'] / tokens:.1%}), evaluated {ids.numel():,}",
        "  it begins        | " + "\n                   | ".join(excerpt),
        "  n-gram ruler     nats a token   bits a byte",
    ]
    for n, loss in enumerate(ngram_losses(corpus, context), 1):
        lines.append(f"    {n}-gram         {loss:12.3f} {loss / math.log(2) / corpus.bytes_per_token:13.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
