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
                   ids:32000  no text: so many ids, for ready tokens (also a checkpoint folder without a tokenizer)

Text is text: `<|endoftext|>` in a document is encoded as ordinary characters (`transformers`, asked to encode the same
text, sees a special token). Bits per byte compare tokenizers; there, the end of a document counts as one byte.

Validation is split off by a hash of names, whole top-level modules or folders at a time (in a user's folder: files),
because neighbours are often near-copies: one in training would give away the other, and the loss would look better than
it is. Where no unit is small enough, it is the last twentieth of the text.

Left out on purpose: masks between the documents in one window (the end-of-text token must do; a mask would be made in
`Reader.load`, which sees those tokens, and handed on to the model's attention), corpora larger than memory (write
train.bin and val.bin yourself), removal of near-copies (only exact copies go), beginning-of-text tokens, SentencePiece
(Llama 2, Mistral 7B: ready tokens), training a tokenizer. The end of the file reads and writes the files of public
tokenizers; a first reading can skip it.

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
import signal
import sys
import sysconfig
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

PACKAGES = ("torch", "tiktoken", "numpy", "scipy", "tqdm", "pytest", "_pytest", "safetensors", "matplotlib")
BUILTIN = {"python": (), "packages": PACKAGES, "cpp": ("torch",), "english": PACKAGES}  # {source: what it is made of}
TESTS = {"test", "tests", "testing"}
NOT_LIBRARY = TESTS | {"encodings", "idlelib", "pydoc_data", "lib2to3", "site-packages", "dist-packages"}
VALIDATION = 0.05  # of the bytes
EVAL_TOKENS = 131072  # of a validation part are evaluated at most, unless asked for otherwise
MAX_VOCAB = 2**21  # so that the three ids of a 3-gram fit in 64 bits
FORMAT = 2  # of the cache: another number, and every corpus is prepared again


def stable_hash(*parts):
    """64 hexadecimal digits that depend on the parts (bytes, arrays, or anything with a str) and on nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, (bytes, np.ndarray)) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def need(fine, message):
    if not fine:
        raise ValueError(message)


@contextmanager
def refuse(what, right):
    """Whatever malformed input leads to inside becomes one line: what, the reason, what would be right."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as e:
        reason = e if type(e) is ValueError else f"{type(e).__name__} {e}"
        raise ValueError(f"{what}: {reason} ({right})") from None


@contextmanager
def plain_errors():
    """What the file system refuses (no permission, name too long, disk full) becomes a ValueError of one line, too."""
    try:
        yield
    except OSError as e:
        if e.errno is None:  # not from the file system: a FileNotFoundError of this file's
            raise
        right = "files that can be read, a folder that can be written"
        raise ValueError(f"{e.filename or 'a file'}: {e.strerror} ({right})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@dataclass
class Tokenizer:
    """Text to token ids and back; `load_tokenizer` makes it."""

    name: str  # as asked for
    vocab_size: int  # the largest id + 1
    eot: int | None  # end-of-text token
    key: str  # hash of what it does: equal keys give equal ids, whatever folder it was loaded from
    tokens: dict | None = None  # {id: bytes}; None: ids without text
    bpe: tiktoken.Encoding | None = None  # None: every byte is a token, or ids without text
    nfc: bool = False  # bring text to Unicode's normal form C first
    files: dict | None = None  # {name: bytes} of the public files it was read from

    def encode(self, texts):
        """list of str -> list of integer arrays, on all cores. Bytes that have no token (SmolLM2 lacks 21) are dropped,
        as by `transformers`."""
        if self.tokens is None:  # ids are their own text: "17 4 31", as `decode` writes them
            with refuse(f"tokenizer {self.name!r} cannot encode text", "ids such as 17 4 31, or ready tokens"):
                arrays = [np.array(text.split(), np.uint32) for text in texts]
                need(all((ids < self.vocab_size).all() for ids in arrays), "an id beyond its vocabulary")
                return arrays
        if self.bpe is None:
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        if self.nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        encoded = self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        return [ids[ids < self.vocab_size] for ids in (np.array(ids, np.uint32) for ids in encoded)]

    def decode(self, ids):
        """Integers (list, array or tensor) -> str. Ids without a token and bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids).reshape(-1).tolist()
        if self.tokens is None:
            return " ".join(map(str, ids))
        return b"".join(self.tokens.get(i, b"\xff") for i in ids).decode("utf-8", "replace")  # \xff: never in UTF-8

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` opens. Those that the
        tokenizer was read from are written unchanged; ids without text have none."""
        for name, content in (self.files or public_files(self)).items():
            partial = Path(folder, f"{name}.partial")
            partial.write_bytes(content)
            partial.replace(Path(folder, name))


@plain_errors()
def load_tokenizer(name="bytes"):
    """The `Tokenizer` of a name in the table at the top of this file.
    ValueError or FileNotFoundError: there is none, or tiktoken cannot represent it exactly."""
    if name == "bytes":
        return Tokenizer(name, 256, 0, name, {b: bytes([b]) for b in range(256)})
    if re.fullmatch(r"ids:[1-9]\d{0,6}", name) and int(name[4:]) <= MAX_VOCAB:
        return Tokenizer(name, int(name[4:]), None, name)
    if name in tiktoken.list_encoding_names():
        try:
            bpe = tiktoken.get_encoding(name)
        except OSError as e:
            raise ValueError(f"no download of {name!r}: {type(e).__name__} (bytes needs no network)") from None
        special = bpe._special_tokens
        return make_tokenizer(name, bpe._pat_str, bpe._mergeable_ranks, special, special.get("<|endoftext|>"))
    path = Path(name)
    if path.is_dir():
        files = [path / "tokenizer.json", path / "tokenizer.model", path / "config.json"]
        path = next((file for file in files if file.exists()), path)
    if path.name == "config.json" and path.is_file():  # of a checkpoint without a tokenizer: trained on ready tokens
        with refuse(path, "a vocab_size"):
            return load_tokenizer(f"ids:{json.loads(path.read_text())['vocab_size']}")
    if path.is_file():
        return read_json_tokenizer(name, path) if path.suffix == ".json" else read_ranks(name, path)
    known = suggest(name, ["bytes", *tiktoken.list_encoding_names(), f"ids:1 to ids:{MAX_VOCAB}"])
    raise FileNotFoundError(f"no tokenizer {name!r} ({known}, a tokenizer.json or a rank file)")


def suggest(word, known):
    near = get_close_matches(word, known, 1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}"


def make_tokenizer(name, split, ranks, special, eot, nfc=False, files=None):
    """From tiktoken's parts: the regular expression that splits text, {bytes: id} of what may merge, {name: id}."""
    tokens = {i: token for token, i in ranks.items()} | {i: text.encode() for text, i in special.items()}
    size = max(tokens) + 1
    key = stable_hash(portable(split), nfc, eot, sorted(special.items()), sorted(ranks.items()))[:16]
    missing = {bytes([b]) for b in range(256)} - ranks.keys()  # tiktoken needs all bytes: ids that `encode` drops
    ranks = ranks | {byte: size + i for i, byte in enumerate(sorted(missing))}
    bpe = tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, size, eot, key, tokens, bpe, nfc, files)


# ----------------------------------------------------------------------------------------------------------------------
# Sources: which files, and which documents in them


@plain_errors()
def parse_spec(spec):
    """`[name=]source[:weight],...` -> [(name, source, weight or None, files)]. Reads no text, creates nothing.
    ValueError or FileNotFoundError: a part, name or weight that cannot be used."""
    corpora = []
    for part in spec.split(","):
        name, source, weight = re.fullmatch(r"(?:([\w.-]+)=)?(.*?)(?::([^:/]*))?", part.strip(), re.S).groups()
        need(source, f"no source in {part!r} of {spec!r} ([name=]source[:weight],... as cpp:0.9,python:0.1)")
        if weight is not None:
            with refuse(f"weight {weight!r} of {source!r}", f"a number, such as {source}:0.5"):
                weight = float(weight)
            need(0 <= weight <= 1e9, f"weight {weight:g} of {source!r} (from 0 to 1e9; 0 only evaluates)")
        stem = Path(re.split(r"[*?[]", source)[0]).absolute().stem  # of a glob: what stands before the wildcards
        corpora.append((name or re.sub(r"[^\w.-]+", "-", stem), source, weight, list_files(source)))
    names, _, weights, _ = zip(*corpora)
    twice, times = Counter(names).most_common(1)[0]
    need(times == 1, f"two corpora of the name {twice!r} in {spec!r} (another name in front: other=source)")
    if {*weights} != {None}:
        need(None not in weights, f"a weight for some corpora only in {spec!r} (for all of them, or for none)")
        need(sum(weights) > 0, f"all weights are zero in {spec!r} (one corpus at least to train on)")
    return corpora


def list_files(source):
    """A source -> [(unit, path)], reading no file. A unit goes to training or to validation as a whole.
    For a new built-in source: two lines here, a word in BUILTIN, a line in the table at the top."""
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
    if files:
        return files
    right = f"{suggest(source, BUILTIN)}, a text file, .jsonl, folder, or glob such as notes/**/*.txt"
    raise FileNotFoundError(f"no file in {source!r} ({right})")


def walk(root, skip=(), suffixes=""):
    """(parts of the path below root, path) of the files in a folder, in a fixed order, without hidden ones and folders
    called as in `skip`. OSError: a folder in it cannot be listed."""

    def stop(error):  # os.walk would leave that folder out
        raise error

    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        paths = (Path(folder, f) for f in sorted(files) if f.endswith(suffixes) and not f.startswith("."))
        yield from ((path.relative_to(root).parts, path) for path in paths if path.is_file())


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
    packages = [p for p in BUILTIN[source] if p != "_pytest" and package(p)]
    versions = [f"{p} {importlib.metadata.version(p)}" for p in packages]
    return ", ".join([f"python {platform.python_version()}", *versions])


def read_documents(source, files, quiet=True):
    """The files of a source -> ({what was read}, documents [(unit, text in UTF-8)]).

    Empty documents and exact copies are skipped. What is not UTF-8 is skipped in a built-in source, else an error."""
    paths = [path for _, path in files]
    if source == "english":
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            texts = pool.map(read_docstrings, paths, chunksize=16)
            bar = tqdm(texts, "docstrings", len(paths), unit=" files", disable=quiet or None, leave=False)
            texts = [[text] for text in bar]
    else:
        texts = [read_texts(path, skip=source in BUILTIN) for path in paths]
    units, skipped = {}, Counter()  # {text: unit}
    for unit, text in ((unit, text) for (unit, _), found in zip(files, texts) for text in found):
        if text and text.strip() and text not in units:
            units[text] = unit
        else:
            skipped["not UTF-8" if text is None else "copies" if text in units else "empty"] += 1
    need(units, f"{source} has no text ({len(files)} files, skipped: {dict(skipped)})")
    about = {"source": describe(source), "sha256": stable_hash(*units), "files": len(files), "documents": len(units)}
    about |= {"skipped": dict(skipped), "bytes": sum(map(len, units))}
    return {"about": about}, [(unit, text) for text, unit in units.items()]


def read_texts(path, skip):
    """The documents of one file: its text, or the field "text" of each line of .jsonl; [None]: it is not UTF-8."""
    text = path.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError as e:
        need(skip, f"{path} is not UTF-8 text at byte {e.start} (convert it, or a glob without it)")
        return [None]
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            with refuse(f"{path} line {number} has no text", 'each line: {"text": "..."}'):
                texts.append(json.loads(line)["text"].encode())
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
    about: dict  # for run.json: source with versions, sha256, files, documents, skipped, bytes


@plain_errors()
def prepare(spec, tokenizer, cache="data", quiet=False, context=1):
    """A specification and a `Tokenizer` -> [`Corpus`], from the cache, or made and put there.

    What `parse_spec` raises; ValueError too for text that is not UTF-8, tokens that do not fit the tokenizer, and a
    training or validation part with less than one window of `context` tokens. Then nothing stays behind."""
    plans, corpora, new = [], [], not Path(cache).exists()
    for name, source, weight, files in parse_spec(spec):  # all sources are read before anything is written
        stats = [(unit, path.absolute(), path.stat().st_size, path.stat().st_mtime_ns) for unit, path in files]
        folder = Path(cache, f"{name}-{stable_hash(FORMAT, source, tokenizer.key, stats)[:12]}")
        found = None
        if not folder.exists():
            found = check_ready(source, tokenizer) if is_ready(source) else read_documents(source, files, quiet)
        plans.append((name, source, weight, folder, found))

    for old in Path(cache).glob("~*"):  # of a killed process: a day old, as it might be one at work on another machine
        if time.time() - old.stat().st_mtime > 86400:
            shutil.rmtree(old, ignore_errors=True)
    partial = Path(cache, f"~{platform.node()}-{os.getpid()}")
    try:  # folders are filled in `partial`, then renamed: killed at any instant, or raced by another, nothing is wrong
        for name, source, weight, folder, found in plans:
            if found is not None:
                folder = partial / folder.name
                folder.mkdir(parents=True)
                meta, documents = found
                if documents:
                    meta |= write_documents(folder, documents, tokenizer, quiet)
                (folder / "meta.json").write_text(json.dumps(meta, indent=1))
            meta = json.loads((folder / "meta.json").read_text())
            home = source if is_ready(source) else folder
            train, val = (np.memmap(Path(home, f), np.dtype(meta["dtype"]), "r") for f in ("train.bin", "val.bin"))
            count_windows(len(train), context, f"the training part of {source}")
            count_windows(len(val), context, f"the validation part of {source}")
            corpora.append(Corpus(name, weight, train, val, meta["bytes_per_token"], meta["vocab_size"], meta["about"]))
        for *_, folder, found in plans:
            with suppress(OSError):  # another process was faster: its folder is as good
                if found is not None:
                    (partial / folder.name).rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            if new:
                Path(cache).rmdir()  # only if it is empty
    sizes = [len(c.train) if c.weight is None else c.weight for c in corpora]
    for corpus, size in zip(corpora, sizes):
        corpus.weight = size / sum(sizes)
    return corpora


def check_ready(folder, tokenizer):
    """A folder of ready tokens -> (meta.json of its cache, no documents). ValueError: they are not as it says."""
    file, tokens = Path(folder, "meta.json"), []
    with refuse(file, f'"dtype" uint16 or uint32, "vocab_size" as of tokenizer {tokenizer.name}, "bytes_per_token"'):
        meta = json.loads(file.read_text())
        size, per_token = int(meta["vocab_size"]), float(meta["bytes_per_token"])
        dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
        need(0 < size <= tokenizer.vocab_size, f"vocab_size {size} for {tokenizer.vocab_size} ids")
        need(0 < per_token < math.inf, f"bytes_per_token {per_token}")
    for file in (Path(folder, "train.bin"), Path(folder, "val.bin")):
        length = file.stat().st_size
        right = f"tokens of {dtype.itemsize} bytes, below the vocab_size {size} of meta.json"
        need(length and length % dtype.itemsize == 0, f"{file} has {length} bytes ({right})")
        tokens.append(np.memmap(file, dtype, "r"))
        need(tokens[-1].max() < size, f"{file} has token {tokens[-1].max()} ({right})")
    about = {"source": describe(folder), "sha256": stable_hash(*tokens), "files": 2, "documents": 2, "skipped": {}}
    about["bytes"] = round(sum(map(len, tokens)) * per_token)
    return {"dtype": dtype.str, "vocab_size": size, "bytes_per_token": per_token, "about": about}, []


def write_documents(folder, documents, tokenizer, quiet):
    """Split and encode the documents into train.bin and val.bin -> how to read them."""
    train, val = split_documents(documents)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    with tqdm(total=sum(map(len, train + val)), unit="B", unit_scale=True, disable=quiet or None, leave=False) as bar:
        write_tokens(folder / "train.bin", train, tokenizer, dtype, bar)
        val_tokens = write_tokens(folder / "val.bin", val, tokenizer, dtype, bar)
    per_token = (sum(map(len, val)) + len(val) * (tokenizer.eot is not None)) / val_tokens
    return {"dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "bytes_per_token": per_token}


def split_documents(documents):
    """[(unit, text)] -> (training texts, validation texts): whole units, or else the last twentieth of the bytes."""
    size = Counter()
    for unit, text in documents:
        size[unit] += len(text)
    budget, chosen = int(VALIDATION * sum(size.values())), set()
    need(budget, f"{sum(size.values())} bytes of text (at least 20, to keep a twentieth for validation)")
    left = budget
    for unit in sorted(size, key=stable_hash):
        if size[unit] <= left:
            chosen.add(unit)
            left -= size[unit]
    if left < budget / 2:
        return [t for u, t in documents if u not in chosen], [t for u, t in documents if u in chosen]
    train, val, left = [text for _, text in documents], [], budget
    while left > 0:
        text = train.pop()
        left -= len(text)
        if left < 0:  # only its end: from the start of a line if one is near, and never from inside a character
            at = text.rfind(b"\n", max(0, -left - 1000), -left) + 1 or -left
            while text[at] & 0xC0 == 0x80:
                at -= 1
            train.append(text[:at])
            text = text[at:]
        val.insert(0, text)
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


# ----------------------------------------------------------------------------------------------------------------------
# Windows: what is read, in which order


def count_windows(tokens, context, what):
    """Window w is tokens[w T : w T + T + 1]. Neighbours share one token, which is a target only once."""
    need(tokens > context, f"{what} has too few tokens for the context {context}: {tokens} (at least {context + 1})")
    return (tokens - 1) // context


def inputs_and_targets(rows):
    """A list of n arrays of T + 1 tokens -> two int64 tensors (n, T), the second one token further on."""
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def validation_windows(corpus, context, most=EVAL_TOKENS):
    """(ids, targets), int64 tensors (n, context): the same windows for every program, evenly spaced over the validation
    part, at most so many tokens (but one window at least)."""
    windows = count_windows(len(corpus.val), context, f"the validation part of {corpus.name}")
    n = min(windows, max(1, most // context))
    starts = np.arange(n) * windows // n * context
    return inputs_and_targets([corpus.val[s : s + context + 1] for s in starts])


class Reader:
    """The order of training windows, the same on every rank: each corpus without replacement, in an order shuffled by
    (seed, epoch, its name), the corpora mixed by weight.

    `sequence` counts the windows drawn so far, `read` {corpus name: windows of it read so far}: with the seed, these
    numbers are all that a resumed run needs to read on."""

    def __init__(self, corpora, context, seed, sequence=0, read=None):
        self.corpora, self.context, self.seed, self.sequence = corpora, context, seed, sequence
        self.read = {c.name: (read or {}).get(c.name, 0) for c in corpora}
        self.windows = [c.weight and count_windows(len(c.train), context, f"train part of {c.name}") for c in corpora]
        self.orders = {}  # {corpus index: (epoch, window numbers in their order)}

    def mix(self, numbers):
        """Sequence numbers -> corpus indices. u_i = frac(shift + i * golden ratio), in 64-bit fixed point, fills [0, 1)
        so evenly that every stretch has nearly exact shares; as a function of i alone, it needs no state."""
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
                # without the epoch here, every pass would bring the same windows in the same order and company
                rng = np.random.default_rng((self.seed, epoch, int(stable_hash(name)[:16], 16)))
                self.orders[k] = epoch, rng.permutation(self.windows[k])
            items.append((k, int(self.orders[k][1][place])))
            self.read[name] += 1
        self.sequence += n
        return items

    def since(self, before):
        """What run.json says of the text read since `read` was `before`: {corpus name: weight, tokens, its about}."""
        spent = {}
        for c in self.corpora:
            tokens = (self.read[c.name] - before[c.name]) * self.context
            spent[c.name] = {"weight": c.weight, "tokens": tokens, **c.about}
        return spent

    def load(self, items):
        """[(corpus index, window number)] -> (ids, targets), int64 tensors (len(items), context)."""
        T = self.context
        return inputs_and_targets([self.corpora[k].train[w * T : w * T + T + 1] for k, w in items])


def last_settings(lineage):
    """The settings of the last step of a lineage that read text, {} if none did."""
    return ([{}] + [step["settings"] for step in lineage if "settings" in step])[-1]


def position(lineage, corpora, context, tokenizer):
    """Where a child reads on: the lineage in run.json -> (seed, sequence, read, notes).

    `seed` is that of the first step that read text (None: there is none): it decides the order. `sequence` and `read`
    are those of `Reader`, counted from the last step backwards while context and tokenizer are those of the steps'
    settings (best `Tokenizer.key`: names change with folders), as others cut other windows. `notes`: what does not."""
    steps = [step for step in lineage if "data" in step]
    sequence, read, notes, changed = 0, Counter(), [], set()
    now = {"context": context, "tokenizer": tokenizer}
    for step in reversed(steps):
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


def ngram_losses(corpus, context, most=EVAL_TOKENS):
    """Losses of 1-, 2- and 3-gram counts, nats a token, on exactly the windows of `validation_windows`.

    Counts c of the training part (its first 2^24 tokens), smoothed as by Witten and Bell from the uniform distribution
    up: p(w | h) = (c(h w) + types(h) p(w | h without its first token)) / (c(h) + types(h)), where types(h) different
    tokens follow h. A history does not reach over the start of its window, as that of a model does not."""
    V = corpus.vocab_size
    text = np.array(corpus.train[: 2**24], np.uint64)
    ids, targets = validation_windows(corpus, context, most)
    rows = torch.cat([ids[:, :1], targets], 1).numpy().astype(np.uint64)  # (n, T + 1)
    p = np.full(targets.shape, 1 / V)  # of each target, (n, T)
    losses = []
    for n in (1, 2, 3):
        grams, counts = np.unique(pack(text, n, V), return_counts=True)  # ascending, so those of one history together
        histories, first, types = np.unique(grams // np.uint64(V), return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        asked = pack(rows[:, 1:] if n == 1 else rows, n, V)  # the n-grams that end in a target
        c_hw = look_up(grams, counts, asked)
        c_h, types_h = (look_up(histories, x, asked // np.uint64(V)) for x in (totals, types))
        known = p[:, context - asked.shape[1] :]  # a view of p: targets with a history long enough
        known[:] = np.where(c_h > 0, (c_hw + types_h * known) / np.maximum(c_h + types_h, 1), known)
        losses.append(float(-np.log(p).mean()))
    return losses


def pack(ids, n, V):
    """The n-grams along the last axis, each as one 64-bit integer below V^n."""
    length = max(0, ids.shape[-1] - n + 1)
    return sum(ids[..., i : i + length] * np.uint64(V ** (n - 1 - i)) for i in range(n))


def look_up(keys, values, asked):
    """values at the asked keys, 0 for those that are missing; keys ascend."""
    keys, values = np.append(keys, np.uint64(2**64 - 1)), np.append(values, 0)  # a last key that nobody asks for
    i = np.searchsorted(keys, asked)
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
    with refuse(f"{path} is no tiktoken rank file; a SentencePiece model?", WAY_OUT):
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        n = len(ranks)
        need(sorted(ranks.values()) == [*range(n)], "the ranks are not 0, 1, 2 ...")
        need({bytes([b]) for b in range(256)} <= ranks.keys(), "not every byte has a rank")
    if n != 128000:
        return make_tokenizer(name, LLAMA3_SPLIT, ranks, {"<|endoftext|>": n}, n)
    reserved = (f"reserved_special_token_{i}" for i in itertools.count())
    special = {f"<|{LLAMA3_NAMES.get(i) or next(reserved)}|>": n + i for i in range(256)}
    return make_tokenizer(name, LLAMA3_SPLIT, ranks, special, n + 1)


def read_json_tokenizer(name, path):
    """A tokenizer.json with byte-level BPE, and what lies beside it. ValueError names what tiktoken cannot do exactly.

    tiktoken knows no list of merges: of all neighbours that make a token it merges those that make the lowest id. For
    a vocabulary that was trained this is the same, if ids ascend along the list and it makes all longer tokens."""
    files = {f: (path.parent / f).read_bytes() for f in PUBLIC_FILES if (path.parent / f).is_file()}
    files["tokenizer.json"] = path.read_bytes()
    with refuse(f"{path} is no byte-level tokenizer.json that tiktoken can follow", WAY_OUT):
        public = json.loads(files["tokenizer.json"])
        model, added = public["model"], {t["content"]: t["id"] for t in public.get("added_tokens") or []}
        need(model.get("type", "BPE") == "BPE", f"a {model.get('type')} model")
        for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            need(not model.get(option), f"BPE with {option} {model.get(option)!r}")
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        if model["vocab"] == BYTES_VOCAB and not merges:
            return load_tokenizer("bytes")
        normalizer, split = public.get("normalizer"), read_split(public["pre_tokenizer"])
        need(normalizer in (None, {"type": "NFC"}), f"normalizer {normalizer}")
        need(split, f"pre-tokenizer {public['pre_tokenizer']}")
        made = [model["vocab"][a + b] for a, b in merges]
        need(made == sorted(made), "a list of merges in another order than their ids")
        vocab = {t: i for t, i in model["vocab"].items() if t not in added}
        lost = {t for t in vocab if len(t) > 1} - {a + b for a, b in merges}
        need(not lost or model.get("ignore_merges"), f"tokens that its merges do not make ({len(lost)} of them)")
        need(len({*vocab.values()}) == len(vocab), "an id of two tokens")
        need(max([*vocab.values(), *added.values()]) < MAX_VOCAB, f"an id above {MAX_VOCAB}")
        ranks = {bytes(BYTE[c] for c in t): i for t, i in vocab.items()}
        end = next((added[name] for name in END_NAMES if name in added), None)  # unless the next lines find another
        match json.loads(files.get("tokenizer_config.json", b"{}")):
            case {"eos_token": str(named) | {"content": str(named)}} if named in added:
                end = added[named]
        return make_tokenizer(name, split, ranks, added, end, bool(normalizer), files)


def read_split(splitter):
    """The pre_tokenizer of a tokenizer.json -> a regular expression for tiktoken; None if it is none of these."""
    match splitter:
        case {"type": "ByteLevel", "add_prefix_space": False} if splitter.get("use_regex", True):
            return GPT2_SPLIT
        case {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, last]}:  # SmolLM
            return DIGITS_SPLIT if read_split(last) == GPT2_SPLIT else None
        case {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]}:  # Llama 3, Qwen: so ends what covers all text; two signs mean something else in tiktoken
            whole = split.endswith((r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"))
            return split if whole and not re.search(r"\$|\{[\d,]+\}\+", split) else None
    return None


def portable(split):
    """tiktoken's regular expression in words that Hugging Face's engine, Oniguruma, reads the same way: without the
    possessive marks of `x++` and `x{1,3}+` (they save backtracking, no more), and with \\z for `$`."""
    return re.sub(r"(?<!\\)([?*+]|\{[\d,]+\})\+", r"\1", split).replace("$", r"\z")


def public_files(tokenizer):
    """{file name: bytes}: tokenizer.json, tokenizer_config.json for `bytes` and for tiktoken's encodings.

    tiktoken merges any two neighbours whose concatenation has a rank, lowest rank first. As a list of merges: every way
    to cut each token into two tokens, in the order of ranks. (`ignore_merges`: a word that is a token stays whole.)"""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if tokenizer.tokens is None:
        return {}
    if tokenizer.bpe is None:
        vocab, merges, special, splitters = BYTES_VOCAB, [], {"\0": 0}, [byte_level]
    else:
        ranks, special = tokenizer.bpe._mergeable_ranks, tokenizer.bpe._special_tokens
        spell = {token: "".join(CHAR[b] for b in token) for token in ranks}
        cuts = ((t[:i], t[i:]) for t in sorted(ranks, key=ranks.get) for i in range(1, len(t)))
        merges = [f"{spell[a]} {spell[b]}" for a, b in cuts if a in ranks and b in ranks]
        vocab = {spell[token]: rank for token, rank in ranks.items()} | special
        pattern = {"Regex": portable(tokenizer.bpe._pat_str)}
        splitters = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, byte_level]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    public = {"version": "1.0", "normalizer": None, "decoder": byte_level}
    public["added_tokens"] = [{"id": i, "content": text, **flags} for text, i in special.items()]
    public["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splitters}
    public["model"] = {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges}
    end = next((text for text, i in special.items() if i == tokenizer.eot), None)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": public, "tokenizer_config.json": config}
    return {name: json.dumps(content, ensure_ascii=False, indent=1).encode() for name, content in files.items()}


# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="data.py",
        usage="data.py SPEC [--tokenizer NAME] [--context T] [--cache FOLDER]",
        description="Prepares corpora and describes them:  python data.py cpp,mine=notes/**/*.txt --tokenizer gpt2",
        epilog=__doc__[__doc__.index("    specification") : __doc__.index("\n\nText is text")],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("spec", metavar="SPEC", help="[name=]source[:weight],... as in the table below")
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME", help="of the same table (default: bytes)")
    parser.add_argument("--context", type=float, default=256, metavar="T", help="tokens a window (default: 256)")
    parser.add_argument("--cache", default="data", metavar="FOLDER", help="where tokens are kept (default: data)")
    args = parser.parse_args(argv)
    try:
        whole = args.context >= 1 and args.context % 1 == 0
        need(whole, f"--context {args.context:g} (a whole number of tokens, at least 1)")
        context, tokenizer = int(args.context), load_tokenizer(args.tokenizer)
        for corpus in prepare(args.spec, tokenizer, args.cache, context=context):
            print(report(corpus, tokenizer, context))
    except (ValueError, FileNotFoundError) as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        sys.exit(130)


def report(corpus, tokenizer, context):
    """A corpus as a page of text."""
    about, tokens = corpus.about, len(corpus.train) + len(corpus.val)
    skipped = ", ".join(f"{n} {reason}" for reason, n in about["skipped"].items()) or "none"
    windows, evaluated = (len(corpus.train) - 1) // context, validation_windows(corpus, context)[0].numel()
    excerpt = tokenizer.decode(corpus.val[:300]).strip().splitlines()[:8]
    lines = [
        f"\n{corpus.name}: {about['source']}",
        f"  files            {about['files']:,} (skipped: {skipped})",
        f"  text             {about['bytes']:,} bytes, sha256 {about['sha256'][:12]}",
        f"  tokens           {tokens:,} of {corpus.vocab_size:,} kinds, {corpus.bytes_per_token:.2f} bytes each",
        f"  training         {len(corpus.train):,}: {windows:,} windows of {context}",
        f"  validation       {len(corpus.val):,} ({len(corpus.val) / tokens:.1%}), evaluated {evaluated:,}",
        "  it begins        | " + "\n                   | ".join(excerpt),
        "  n-gram ruler     nats a token   bits a byte",
    ]
    for n, loss in enumerate(ngram_losses(corpus, context), 1):
        lines.append(f"    {n}-gram         {loss:12.3f} {loss / math.log(2) / corpus.bytes_per_token:13.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
