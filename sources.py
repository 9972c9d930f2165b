"""Which text: a specification to sources, a source to files, a file to documents.

    specification  [name=]source[:weight],...         python       cpp:0.9,python:0.1       mine=notes/**/*.txt:1
                   no weights: corpora count by size; weight 0: its validation part is evaluated, nothing is trained
    sources        python     Python's standard library without tests
                   packages   the .py files, without tests, of torch, numpy and the other PACKAGES of sources.py
                   cpp        the C++ headers that PyTorch installs
                   english    docstrings of those packages, and Python's help topics: no text of `python`
                   a UTF-8 text file, a folder or glob of them, also as .gz; of JSON lines (.jsonl, .ndjson): the
                              field "text"
                   a folder of ready tokens: train.bin, val.bin (raw, little-endian) and meta.json,
                              {"dtype": "uint16" or "uint32", "vocab_size": ..., "bytes_per_token": ...}

The sources with a name need no download: every machine that runs this project has them. They follow its versions,
which `describe` writes down for run.json.

A file has a unit besides its path. A unit is what goes to training or to validation as a whole: a top-level module or
folder, in a user's folder a file. Neighbours are often near-copies, and one in training would give away the other.
"""

import ast
import codecs
import glob
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from tokenizer import need, plain_errors, refuse, stable_hash, suggest

# those of requirements.txt that the corpora were first measured on: another list would be another text
PACKAGES = ("torch", "tiktoken", "numpy", "scipy", "tqdm", "pytest", "_pytest", "safetensors", "matplotlib")
BUILTIN = {"python": (), "packages": PACKAGES, "cpp": ("torch",), "english": PACKAGES}  # made of
TESTS = {"test", "tests", "testing"}
NOT_LIBRARY = TESTS | {"encodings", "idlelib", "pydoc_data", "lib2to3", "site-packages", "dist-packages"}
JSON_LINES = (".jsonl", ".ndjson")  # endings, in any case
HINTS = {".bin": "of ready tokens give the folder, with train.bin, val.bin and meta.json in it",
         ".parquet": "write its column of text as JSON lines"} | dict.fromkeys((".zst", ".xz", ".zip"), "unpack it")


@plain_errors()
def parse_spec(spec):
    """`[name=]source[:weight],...` -> [(name, source, weight or None, files)]. Reads no text, creates nothing.
    ValueError or FileNotFoundError: a part, name or weight that cannot be used."""
    return [(name, source, weight, list_files(source)) for name, source, weight in split_spec(spec)]


def split_spec(spec):
    """The same without the files, which need not be there."""
    if {",", ":"} & {*spec} and os.path.exists(spec):  # a file may be called a,b.txt or 12:30.txt
        return [(named_after(spec), spec, None)]
    corpora = []
    for part in spec.split(","):
        # name= of word characters only; :weight after the last colon, without / or :
        name, source, weight = re.fullmatch(r"(?:([\w.-]+)=)?(.*?)(?::([^:/]*))?", part.strip(), re.S).groups()
        if name and os.path.exists(f"{name}={source}"):  # a file called date=2024.txt
            name, source = None, f"{name}={source}"
        need(source, f"no source in {part!r} of {spec!r} ([name=]source[:weight],... as cpp:0.9,python:0.1)")
        if weight is not None:
            with refuse(f"weight {weight!r} of {source!r}", f"a number, such as {source}:0.5"):
                weight = float(weight)
            need(0 <= weight <= 1e9, f"weight {weight:g} of {source!r} (from 0 to 1e9; 0 only evaluates)")
        before = re.split(r"[*?[]", source)[0]  # of a glob: what stands before the wildcards
        corpora.append((name or named_after(before), os.path.expanduser(source), weight))
    names, _, weights = zip(*corpora)
    twice, times = Counter(names).most_common(1)[0]
    need(times == 1, f"two corpora of the name {twice!r} in {spec!r} (another name in front: other=source)")
    if {*weights} != {None}:
        need(None not in weights, f"a weight for some corpora only in {spec!r} (for all of them, or for none)")
        need(sum(weights) > 0, f"all weights are zero in {spec!r} (one corpus at least to train on)")
    return corpora


def named_after(path):
    """The name of a corpus that has been given none."""
    return re.sub(r"[^\w.-]+", "-", Path(path).absolute().stem)


def list_files(source):
    """A source -> [(unit, path)], reading no file. A unit goes to training or to validation as a whole.
    For a new source with a name: two lines here, a word in BUILTIN, a line in the table at the top."""
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
        meta = '{"dtype": "uint16", "vocab_size": 50257, "bytes_per_token": 4.5}'
        right = f"nanoGPT's files for GPT-2: {meta}, the last one the bytes of your text divided by its tokens"
        need((path / "meta.json").exists(), f"{path / 'meta.json'} is missing: it says what train.bin holds ({right})")
        return [(name, path / name) for name in ("train.bin", "val.bin", "meta.json")]
    if path.is_dir():
        files = [("/".join(parts), file) for parts, file in walk(path, links=True)]
    elif path.is_file():
        files = [(path.name, path)]
    else:
        files = [(p, Path(p)) for p in sorted(glob.glob(source, recursive=True)) if os.path.isfile(p)]
    if files:
        return files
    right = f"{suggest(source, BUILTIN)}, a text file, .jsonl, folder, or glob such as notes/**/*.txt"
    if path.exists() and not path.is_dir():
        raise FileNotFoundError(f"{source} is a pipe or a device (save its text to a file first)")
    raise FileNotFoundError(f"no file in {source!r} ({right})")


def walk(root, skip=(), suffixes="", links=False):
    """(parts of the path below root, path) of the files in a folder, in a fixed order, without hidden ones and folders
    called as in `skip`. links: those in linked folders, too, each folder once. OSError: one cannot be listed."""
    seen = {os.path.realpath(root)}

    def stop(error):  # os.walk would leave that folder out
        raise error

    def once(path):  # a link can lead back
        real = os.path.realpath(path)
        return not (real in seen or seen.add(real))

    for folder, folders, files in os.walk(root, onerror=stop, followlinks=links):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        folders[:] = [f for f in folders if not links or once(Path(folder, f))]
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
            found = [([text], 0) for text in bar]
    else:
        found = [read_texts(path, source in BUILTIN) for path in paths]
    units, skipped = {}, Counter()  # {text: unit}
    documents = [(unit, text) for (unit, _), (texts, _) in zip(files, found) for text in texts]
    for unit, text in documents:
        if text and text.strip() and text not in units:
            units[text] = unit
        else:
            skipped["not UTF-8" if text is None else "copies" if text in units else "empty"] += 1
    need(units, f"{source} has no text ({len(files)} files, skipped: {dict(skipped)})")
    about = {"source": describe(source), "sha256": stable_hash(*units), "files": len(files), "documents": len(units)}
    about |= {"skipped": dict(skipped), "replaced": sum(n for _, n in found), "bytes": sum(map(len, units))}
    return {"about": about}, [(unit, text) for text, unit in units.items()]


def read_texts(path, builtin):
    """One file -> (its documents, lone surrogates in them that became U+FFFD). [None]: a built-in source's, not UTF-8.

    A document is the whole text or, in a file of JSON lines or a .json array of objects, the field "text" of each."""
    text = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            text, path = gzip.decompress(text), path.with_suffix("")
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error} (a whole gzip file)") from None
        need(text[257:262] != b"ustar", f"{path} is an archive (unpack it, and give the folder)")
    text = text if builtin else text.removeprefix(codecs.BOM_UTF8)
    try:
        text.decode()
        need(text.count(0) <= len(text) / 4, f"but UTF-16: {text.count(0):,} of {len(text):,} bytes are NUL")
    except ValueError as e:
        wrong = f"at byte {e.start}" if isinstance(e, UnicodeDecodeError) else e
        right = HINTS.get(path.suffix.lower(), "convert it, or a glob without it")
        need(builtin, f"{path} is not UTF-8 text {wrong} ({right})")
        return [None], 0
    text = text if builtin else unrolled(path, text)
    if builtin or not holds_json_lines(path, text):
        return [text], 0
    texts, replaced = [], 0
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            with refuse(f"{path} line {number} has no text", 'each line: {"text": "..."}'):
                record = json.loads(line)
                need(isinstance(record, dict), "it is no object")
                need("text" in record, f"its fields are {', '.join(map(repr, record))}")
                document, n = re.subn("[\ud800-\udfff]", "\ufffd", record["text"])
                texts.append(document.encode())
                replaced += n
    return texts, replaced


def unrolled(path, text):
    """A .json array of objects with a field "text" as JSON lines; any other text as it is."""
    if path.suffix.lower() == ".json" and text.lstrip().startswith(b"["):
        with suppress(ValueError, RecursionError):
            records = json.loads(text)
            if any(isinstance(record, dict) and "text" in record for record in records):
                return "\n".join(map(json.dumps, records)).encode()
    return text


def holds_json_lines(path, text):
    """Known by the ending, or by the first line: an object with a field "text" or, in .json, any object that others
    follow."""
    if path.suffix.lower() in JSON_LINES:
        return True
    first, _, rest = text.strip().partition(b"\n")
    with suppress(ValueError, RecursionError):
        record = json.loads(first) if first.startswith(b"{") else None
        return isinstance(record, dict) and ("text" in record or path.suffix.lower() == ".json" and rest[:1] == b"{")
    return False


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
