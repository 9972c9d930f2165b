"""Text to tokens to batches, and the n-gram ruler.

A corpus is a list of documents (sources.py). Each one is encoded (tokenizer.py) and followed by the end-of-text token.
A twentieth of the text is kept for validation. Both parts are cached as raw token files and read through memory maps.

A training window is T + 1 neighbouring tokens: T inputs, and T targets one token further on. The order of the windows
depends on the seed and on the position alone. So a resumed run, eight processes in place of one, and a child, which
starts from another run's checkpoint, all read the same list. A lineage is the list of the runs before a child; each of
them is a step.

Validation takes whole units of a source, chosen by a hash of their names. If those that fit make less than half of a
twentieth, it is the last twentieth of the text. Bits per byte compare tokenizers.

Left out on purpose: a mask between the documents of one window (the end-of-text token must do; a mask would be made in
`Reader.load`, which sees those tokens), corpora larger than memory (write train.bin and val.bin yourself), and the
removal of near-copies (only exact copies go).

Try:
1. `python data.py python`: 3-gram counts need 2.58 bits a byte. Let n run up to 7 in `ngram_losses`. (1.95 at n = 5,
   2.01 at n = 7: most longer histories of the validation text were never seen in training.)
2. In `sources.list_files`, make every C++ header a unit of its own, "/".join(parts). What do 3-grams now lose on `cpp`?
   (2.71 bits a byte in place of 3.46: generated headers are near-copies, and those in training give away the others.)
3. Let `mix` draw u from np.random.default_rng(seed), half and half, and call it once for 10,000 windows. How far does
   the number of windows of one corpus get from half of those drawn? (Seed 1: 71; with the golden ratio 2.)
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import numpy as np
import torch
from tqdm import tqdm

import sources
import tokenizer
from sources import describe, is_ready, parse_spec, read_documents, split_spec
from tables import Parser
from tokenizer import load_tokenizer, need, plain_errors, refuse, stable_hash

VALIDATION = 0.05  # of the bytes
MARK = "~regrow-"  # begins the names of folders that are being prepared
BATCH = 2**24  # bytes of text that are encoded at once
EVAL_TOKENS = 131072  # of a validation part are evaluated at most, unless asked for otherwise
FORMAT = 3  # of the cache: another number, and every corpus is prepared again
TABLES = "\n".join(module.__doc__.split("\n\n")[1] for module in (sources, tokenizer))  # for --help


# ----------------------------------------------------------------------------------------------------------------------
# Preparing: documents to cached tokens


@dataclass
class Corpus:
    name: str
    weight: float  # share of the training windows; 0: only evaluated
    train: np.ndarray  # (tokens,) uint16 or uint32, a memory map
    val: np.ndarray  # (tokens,)
    bytes_per_token: float  # of val, the end of a document counted as one byte
    vocab_size: int
    about: dict  # for run.json: source with versions, sha256, files, documents, skipped, bytes

    def bits(self, loss):
        """Nats a token -> bits a byte."""
        return loss / math.log(2) / self.bytes_per_token


@plain_errors()
def prepare(spec, tokenizer, cache="data", quiet=False, context=1):
    """A specification and a `Tokenizer` -> [`Corpus`], from the cache, or made and put there.

    Raises as `parse_spec` does, and ValueError for text that is not UTF-8, tokens that do not fit the tokenizer, and a
    training or validation part with less than one window of `context` tokens. Then nothing stays behind."""
    plans, corpora, new = [], [], not Path(cache).exists()
    for name, source, weight, files in parse_spec(spec):  # all sources are read before anything is written
        stats = [(unit, path.absolute(), path.stat().st_size, path.stat().st_mtime_ns) for unit, path in files]
        folder = Path(cache, f"{name}-{stable_hash(FORMAT, source, tokenizer.key, stats)[:12]}")
        found = None
        if not folder.exists():
            found = check_ready(source, tokenizer) if is_ready(source) else read_documents(source, files, quiet)
        plans.append((name, source, weight, folder, found))

    for old in Path(cache).glob(f"{MARK}*"):  # of a killed process: after a day, as one may be at work
        if time.time() - old.stat().st_mtime > 86400:
            shutil.rmtree(old, ignore_errors=True)
    partial = Path(cache, f"{MARK}{platform.node()}-{os.getpid()}")
    try:  # folders are filled in `partial`, then renamed: killed at any instant, or raced by another, nothing is wrong
        for name, source, weight, folder, found in plans:
            at = folder if found is None else partial / folder.name
            if found is not None:
                at.mkdir(parents=True)
                meta, documents = found
                if documents:
                    meta |= write_documents(at, documents, tokenizer, quiet)
                (at / "meta.json").write_text(json.dumps(meta, indent=1))
            meta = json.loads((at / "meta.json").read_text())
            home = source if is_ready(source) else at  # its maps stay open over the renaming below
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
    about = {"source": describe(folder), "sha256": stable_hash(*tokens), "files": 2, "documents": 2}
    about |= {"skipped": {}, "replaced": 0, "bytes": round(sum(map(len, tokens)) * per_token)}
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
            keep = -left  # bytes that go back to training
            at = text.rfind(b"\n", max(0, keep - 1000), keep) + 1 or keep
            while text[at] & 0xC0 == 0x80:
                at -= 1
            train.append(text[:at])
            text = text[at:]
        val.insert(0, text)
    return train, val


def write_tokens(path, texts, tokenizer, dtype, bar):
    """Encode texts, each followed by the end-of-text token, into a raw file. Returns the number of tokens."""
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype).tobytes()
    with open(path, "wb") as f:
        for batch in batches(piece for text in texts for piece in tokenizer.pieces(text)):
            for (piece, last), ids in zip(batch, tokenizer.encode([piece.decode() for piece, _ in batch])):
                f.write(ids.astype(dtype).tobytes() + (end if last else b""))
                bar.update(len(piece))
        return f.tell() // dtype.itemsize


def batches(pieces):
    """[(piece of a text, ...)] -> lists of them, of at least BATCH bytes together but for the last."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


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

    def load(self, items, device="cpu"):
        """[(corpus index, window number)] -> (ids, targets), int64 tensors (len(items), context). A copy to a GPU is
        from pinned memory: so it goes on while the CPU does other things."""
        T = self.context
        pair = inputs_and_targets([self.corpora[k].train[w * T : w * T + T + 1] for k, w in items])
        pinned = torch.device(device).type == "cuda"
        return tuple((t.pin_memory() if pinned else t).to(device, non_blocking=pinned) for t in pair)


def same_corpora(spec, other):
    """Whether two specifications have the same names and weights, wherever their text lies."""
    return [(name, weight) for name, _, weight in split_spec(spec)] == [(n, w) for n, _, w in split_spec(other)]


def same_text(step, corpora):
    """Raises ValueError if a corpus is not the text that this step of a lineage has read."""
    for corpus in corpora:
        about, past = corpus.about, step["data"].get(corpus.name, {})
        if past.get("sha256", about["sha256"]) != about["sha256"]:
            change = f"it was {past['source']}, it is {about['source']}"
            if past["source"] == about["source"]:
                change = f"{about['source']} has other bytes"
            right = "the old text: --data says where it lies; or --init to go on with the new one"
            raise ValueError(f"the text of {corpus.name} has changed: {change} ({right})")


def position(lineage, corpora, context, tokenizer):
    """Where a child reads on: the lineage in run.json -> (seed, sequence, read, notes).

    `seed` is that of the first step that read text (None: there is none): it decides the order. `sequence` and `read`
    are those of `Reader`, summed from the last step back to the first with another context or tokenizer, which cuts
    other windows. `tokenizer` is a `Tokenizer.key`. `notes`: what is not carried on, and why."""
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
                notes.append(f"the text of {corpus.name} has changed: what was read of the old one does not count")
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
        known = p[:, context - asked.shape[1] :]  # a view of p: targets with n-1 tokens before
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


def main(argv=None):
    parser = Parser(
        prog="data.py",
        usage="data.py SPEC [--tokenizer NAME] [--context T] [--cache FOLDER]",
        description="Prepares corpora and describes them:  python data.py cpp,mine=notes/**/*.txt --tokenizer gpt2",
        epilog=TABLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    replaced = f"; {about['replaced']:,} lone surrogates replaced" if about["replaced"] else ""
    windows, evaluated = (len(corpus.train) - 1) // context, validation_windows(corpus, context)[0].numel()
    excerpt = tokenizer.decode(corpus.val[:300]).strip().splitlines()[:8]
    lines = [
        f"\n{corpus.name}: {about['source']}",
        f"  files            {about['files']:,} (skipped: {skipped}){replaced}",
        f"  text             {about['bytes']:,} bytes, sha256 {about['sha256'][:12]}",
        f"  tokens           {tokens:,} of {corpus.vocab_size:,} kinds, {corpus.bytes_per_token:.2f} bytes each",
        f"  training         {len(corpus.train):,}: {windows:,} windows of {context}",
        f"  validation       {len(corpus.val):,} ({len(corpus.val) / tokens:.1%}), evaluated {evaluated:,}",
        "  it begins        | " + "\n                   | ".join(excerpt),
        "  n-gram ruler     nats a token   bits a byte",
    ]
    for n, loss in enumerate(ngram_losses(corpus, context), 1):
        lines.append(f"    {n}-gram         {loss:12.3f} {corpus.bits(loss):13.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
