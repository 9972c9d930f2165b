"""Text to token ids and back.

    tokenizers     bytes      the 256 byte values; NUL is the end-of-text token (so is a NUL in a text)
                   gpt2, o200k_base ...               tiktoken's encodings (downloaded once)
                   a tokenizer.json of any kind, or a checkpoint folder with one
                   a tokenizer.model of tiktoken ranks (Llama 3): base64 token, space, rank on each line
                   ids:32000  no text: so many ids, for ready tokens (also a checkpoint folder without a tokenizer)

The `tokenizers` library reads and applies a tokenizer.json of every kind: byte-level BPE (GPT-2, Llama 3, Qwen), BPE of
the SentencePiece kind (Llama 2, Mistral), Unigram, WordPiece. What tiktoken knows becomes a tokenizer.json first. So
there is one way from text to ids, and `transformers` takes the same one from the folder that we write. It is slower
than tiktoken: about 3 MB/s a thread against 12.

Text is text. `<|endoftext|>` inside a document is encoded as ordinary characters, for a special token is one that no
text may make. `transformers` finds special tokens in a text. It agrees with us about a text that has none.
Its class for Llama 2 departs from that model's own tokenizer.json in one point: before a text that begins with a blank,
the file wants another blank, and the class puts none.

Left out on purpose: training a tokenizer, beginning-of-text tokens, SentencePiece's own binary files (`transformers`
writes their tokenizer.json).
"""

import base64
import hashlib
import itertools
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

MAX_VOCAB = 2**21  # so that the three ids of a 3-gram fit in 64 bits (`pack` of data.py)
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
         "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")  # fmt: skip
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")  # where no file says which token it is
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}

# A byte-level tokenizer.json spells each byte as one visible character: itself, or the next free one from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*VISIBLE}))}
BYTES_VOCAB = {(CHAR[b] if b else "\0"): b for b in range(256)}  # of `bytes`: NUL is a special token, found as itself


def stable_hash(*parts):
    """64 hexadecimal digits that depend on the parts (bytes, arrays, or anything with a str) and on nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, (bytes, np.ndarray)) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def need(fine, message):
    """Raises ValueError with the message, unless all is fine."""
    if not fine:
        raise ValueError(message)


@contextmanager
def refuse(what, right):
    """Whatever malformed input leads to inside becomes one line: what, the reason, what would be right."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:  # `tokenizers` raises this very class
        reason = e if type(e) in (ValueError, Exception) else f"{type(e).__name__} {e}"
        raise ValueError(f"{what}: {reason} ({right})") from None


@contextmanager
def plain_errors():
    """What the file system refuses (no permission, name too long, disk full) becomes a ValueError of one line, too."""
    try:
        yield
    except OSError as e:
        if e.errno is None:  # not from the file system: a FileNotFoundError of our own
            raise
        right = "files that can be read, a folder that can be written"
        raise ValueError(f"{e.filename or 'a file'}: {e.strerror} ({right})") from None


def suggest(word, known):
    """The names that are known, the nearest one first."""
    near = get_close_matches(word, known, 1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}"


@dataclass
class Tokenizer:
    """Text to token ids and back; `load_tokenizer` makes it."""

    name: str  # as asked for
    vocab_size: int  # the largest id + 1: the vocabulary of a new model
    min_vocab_size: int  # the same of ids that a text or its end makes: a model may lack the others
    eot: int | None  # end-of-text token
    key: str  # hash of what it does: equal keys give equal ids, whatever folder it was loaded from
    public: tokenizers.Tokenizer | None = field(default=None, compare=False)  # None: `bytes`, or ids without text
    forbidden: dict = field(default_factory=dict, compare=False)  # {id: text} of tokens that no text may make
    files: dict = field(default_factory=dict, compare=False)  # {name: bytes} of the public files

    def encode(self, texts):
        """list of str -> list of integer arrays, on all cores. ValueError: a text that has no ids."""
        if self.key == "bytes":
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        right = "ids such as 17 4 31, or ready tokens" if self.public is None else "one with a token for the unknown"
        with refuse(f"tokenizer {self.name!r} cannot encode text", right):
            if self.public is None:  # ids are their own text: "17 4 31", as `decode` writes them
                arrays = [np.array(text.split(), np.uint32) for text in texts]
                need(all((ids < self.vocab_size).all() for ids in arrays), "an id beyond its vocabulary")
                return arrays
            found = self.public.encode_batch_fast(texts, add_special_tokens=False)
            return [self.without_special(np.array(encoding.ids, np.uint32)) for encoding in found]

    def without_special(self, ids):
        """Unigram turns the text `</s>` into the token `</s>`. Here it becomes the ids of its single characters."""
        if not np.isin(ids, [*self.forbidden]).any():
            return ids
        characters = lambda i: [t.id for char in self.forbidden.get(i, "") for t in self.public.model.tokenize(char)]
        return np.array([j for i in ids.tolist() for j in characters(i) or [i]], np.uint32)

    def decode(self, ids):
        """Integers (list, array or tensor) -> str. Ids without a token and bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids).reshape(-1).tolist()
        if self.key == "bytes":
            return bytes(i if i < 256 else 255 for i in ids).decode("utf-8", "replace")  # 255: never in UTF-8
        if self.public is None:
            return " ".join(map(str, ids))
        runs = itertools.groupby(ids, lambda i: self.public.id_to_token(i) is not None)
        decode = lambda run: self.public.decode(run, skip_special_tokens=False)
        return "".join(decode([*run]) if known else "\ufffd" * len([*run]) for known, run in runs)

    def save(self, folder):
        """Write tokenizer.json and what belongs to it, for `transformers.AutoTokenizer`. Files that the tokenizer was
        read from are written unchanged; ids without text have none."""
        for name, content in self.files.items():
            partial = Path(folder, f"{name}.partial")
            partial.write_bytes(content)
            partial.replace(Path(folder, name))

    def pieces(self, text, size=2**16):
        """UTF-8 -> [(piece, is it the last)]: a long text in pieces for many cores, if that changes no id."""
        start, seam = 0, re.compile(rb"(?<=[!-~])\n(?=[A-Za-z])")
        while len(text) > start + size and self.divisible and (m := seam.search(text, start + size)):
            yield text[start : m.end()], False
            start = m.end()
        yield text[start:], True

    @cached_property
    def divisible(self):
        """May a text be cut after a newline between a visible character and a letter of ASCII, and keep its ids?

        Yes if no word and no added token reaches over the cut. The library's own splitter is asked, for all such pairs.
        No if a text is one long word, or if it gets a blank in front: so most tokenizers of the SentencePiece kind."""
        if self.public is None:
            return True
        splitter, added = self.public.pre_tokenizer, self.public.get_added_tokens_decoder().values()
        if not splitter or not isinstance(self.public.normalizer, tokenizers.normalizers.NFC | None):  # NFC is fine
            return False
        words = lambda text: [word for word, _ in splitter.pre_tokenize_str(text)]
        letters = [chr(i) for i in range(65, 123) if chr(i).isalpha()]
        seams = ((f"b {chr(x)}\n", f"{letter}b") for x in range(33, 127) for letter in letters)
        reaches = any(not token.special and (token.lstrip or "\n" in token.content) for token in added)
        return not reaches and all(words(a + b) == words(a) + words(b) for a, b in seams)


@plain_errors()
def load_tokenizer(name="bytes"):
    """The `Tokenizer` of a name in the table at the top of this file; a file or folder goes before an encoding.
    ValueError or FileNotFoundError: there is none, or it cannot be read."""
    if name == "bytes":
        files = byte_level([], BYTES_VOCAB, [], ["\0"], "\0")
        return Tokenizer(name, 256, 256, 0, name, files=files)
    if re.fullmatch(r"ids:[1-9]\d{0,6}", name) and int(name[4:]) <= MAX_VOCAB:
        return Tokenizer(name, int(name[4:]), int(name[4:]), None, name)
    path = Path(name)
    if path.is_dir():
        known = [path / "tokenizer.json", path / "tokenizer.model", path / "config.json"]
        path = next((file for file in known if file.exists()), path)
        public = path.name == "config.json" and not path.with_name("run.json").exists()
        others = [path.with_name(f) for f in ("merges.txt", "vocab.txt", "tekken.json", "spiece.model")]
        if public and (other := next((file for file in others if file.exists()), None)):
            right = "transformers' AutoTokenizer reads it, and its save_pretrained writes a tokenizer.json"
            raise ValueError(f"{path.parent} has a tokenizer, but only in {other.name}, which is not read ({right})")
    if path.name == "config.json" and path.is_file():  # of a checkpoint without a tokenizer: trained on ready tokens
        with refuse(path, "a vocab_size"):
            return load_tokenizer(f"ids:{json.loads(path.read_text())['vocab_size']}")
    if path.is_file() and path.suffix == ".json":
        files = {f: (path.parent / f).read_bytes() for f in FILES if (path.parent / f).is_file()}
        return read_public(name, files | {"tokenizer.json": path.read_bytes()}, path)
    if path.is_file():
        return read_ranks(name, path)
    if name in tiktoken.list_encoding_names():
        try:
            bpe = tiktoken.get_encoding(name)
        except OSError as e:
            raise ValueError(f"no download of {name!r}: {type(e).__name__} (bytes needs no network)") from None
        return from_ranks(name, bpe._pat_str, bpe._mergeable_ranks, bpe._special_tokens, "<|endoftext|>")
    right = suggest(name, ["bytes", *tiktoken.list_encoding_names(), f"ids:1 to ids:{MAX_VOCAB}"])
    raise FileNotFoundError(f"no tokenizer {name!r} ({right}, a tokenizer.json or a rank file)")


def read_public(name, files, path):
    """{file name: bytes} of a tokenizer.json and what lies beside it -> `Tokenizer`."""
    with refuse(f"{path} is no tokenizer.json", "one that the `tokenizers` library reads"):
        model = json.loads(files["tokenizer.json"])["model"]
        if model["vocab"] == BYTES_VOCAB and not model["merges"]:
            return load_tokenizer("bytes")
        need(not model.get("dropout"), f"BPE with dropout {model.get('dropout')}: its ids are random")
        public = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        public.no_padding()
        public.no_truncation()
        public.encode_special_tokens = True  # text is text
        ids = public.get_vocab(with_added_tokens=True)
        need(ids, "an empty vocabulary")
        need(max(ids.values()) < MAX_VOCAB, f"an id above {MAX_VOCAB}: {max(ids.values())}")
        configs = [json.loads(files.get(f, b"{}")) for f in ("tokenizer_config.json", "special_tokens_map.json")]
        named = [config.get("eos_token") for config in configs]
        named = [token["content"] if isinstance(token, dict) else token for token in named]
        end = next((ids[token] for token in (*named, *END_NAMES) if token in ids), None)
        unknown = model.get("unk_id", ids.get(model.get("unk_token")))
        special = {i: token.content for i, token in public.get_added_tokens_decoder().items() if token.special}
        forbidden = {i: text for i, text in special.items() if i != unknown}
        made = [i for i in ids.values() if i not in forbidden or i == end]
        parts = json.loads(public.to_str())
        does = [parts[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
        key = stable_hash(json.dumps([end, does], sort_keys=True))[:16]
        return Tokenizer(name, max(ids.values()) + 1, max(made) + 1, end, key, public, forbidden, files)


# ----------------------------------------------------------------------------------------------------------------------
# tiktoken's ranks as a tokenizer.json


def read_ranks(name, path):
    """A tiktoken rank file, split as Llama 3 does; if it has 128,000 ranks, with Llama 3's 256 special tokens."""
    way_out = "a tokenizer.json, as `save_pretrained` of transformers writes it beside"
    with refuse(f"{path} is no tiktoken rank file; a SentencePiece model?", way_out):
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        n = len(ranks)
        need(sorted(ranks.values()) == [*range(n)], "the ranks are not 0, 1, 2 ...")
        need({bytes([b]) for b in range(256)} <= ranks.keys(), "not every byte has a rank")
    if n != 128000:
        return from_ranks(name, LLAMA3_SPLIT, ranks, {"<|endoftext|>": n}, "<|endoftext|>")
    reserved = (f"reserved_special_token_{i}" for i in itertools.count())
    special = {f"<|{LLAMA3_NAMES.get(i) or next(reserved)}|>": n + i for i in range(256)}
    return from_ranks(name, LLAMA3_SPLIT, ranks, special, "<|end_of_text|>")


def from_ranks(name, split, ranks, special, end):
    """tiktoken's parts -> `Tokenizer`: the regular expression that splits text into words, {bytes: rank} of the
    tokens, {name: id} of the special ones and the name of that which ends a text.

    tiktoken merges any two neighbours that make a token, those of the lowest rank first. As a list of merges: every way
    to cut a token into two, in the order of ranks."""
    special = {text: i for i, text in {i: text for text, i in reversed(special.items())}.items()}  # the first name
    spell = {token: "".join(CHAR[b] for b in token) for token in ranks}
    cuts = ((t[:i], t[i:]) for t in sorted(ranks, key=ranks.get) for i in range(1, len(t)))
    merges = [(spell[a], spell[b]) for a, b in cuts if a in ranks and b in ranks]
    vocab = {spell[token]: rank for token, rank in ranks.items()} | special
    # Oniguruma, the library's engine, needs no possessive marks (`x++` saves backtracking, no more) and writes $ as \z
    pattern = re.sub(r"(?<!\\)([?*+]|\{[\d,]+\})\+", r"\1", split).replace("$", r"\z")
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return read_public(name, byte_level([words], vocab, merges, special, end), name)


def byte_level(words, vocab, merges, special, end):
    """{file name: bytes}: tokenizer.json and tokenizer_config.json of a byte-level BPE. A word that is a token stays
    whole (`ignore_merges`), as in tiktoken."""
    public = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    public.pre_tokenizer = pre_tokenizers.Sequence([*words, in_bytes])
    public.decoder = tokenizers.decoders.ByteLevel()
    public.add_special_tokens([*special])  # their ids are in the vocabulary
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": public.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=1)}
    return {name: content.encode() for name, content in files.items()}
