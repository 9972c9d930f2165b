"""What tokenizer.py promises: the ids of the public library, for every kind of tokenizer, on random text and code."""

import base64
import functools
import json
import random
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
import torch
from tiktoken_ext import openai_public
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer import CHAR, LLAMA3_SPLIT, Tokenizer, from_ranks, load_tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
BYTES = load_tokenizer("bytes")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NASTY = r"a b A é ß ñ Ж 中 文 の ா ि 한 🙂 ﬁ ſ ' 's 'S 'LL 'ſ 've n't 1 12 123 1234 ½ ² Ⅷ ٣ _ - -- == // /* . ... { \ "
NASTY = [*NASTY.split(" "), "<|endoftext|>", "!\n", "\n", "\r", "\r\n", "\n\n ", "\t", "\v", "\f", "\x1c", "\x85"]
NASTY += ["\xa0", "\u2003", "\u2028", "\u200b", "e\u0301", "\u0301", "\ufeff", "\U0001f469\u200d\U0001f467", "   "]



@functools.cache
def real_texts():
    """A sample of the standard library, and 300 random lists of what is hard to split."""
    rng = random.Random(0)
    hard = [rng.choice(("", " ", "  ")).join(rng.choices(NASTY, k=rng.randint(0, 12))) for _ in range(300)]
    files = sorted(STDLIB.glob("*.py"))[::10] + [STDLIB / "test/test_unicodedata.py"]
    real = [file.read_text("utf-8") for file in files if file.exists()]
    return hard + NASTY + ["", " ", "\n", "   ", "x  ", "  \n\n  x\n"] + real


def train_ranks(texts, split, merges):
    """A small byte-pair encoding: {bytes: rank} and the merges that made them."""
    words = Counter(word.encode() for text in texts for word in regex.findall(split, text))
    words = {word: [bytes([b]) for b in word] for word in words}, words
    ranks, made = {bytes([b]): b for b in range(256)}, []
    for rank in range(256, 256 + merges):
        pairs = Counter()
        for word, parts in words[0].items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[1][word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = rank
        made.append(best)
        for word, parts in words[0].items():
            if best[0] + best[1] in word:
                joined, i = [], 0
                while i < len(parts):
                    step = 2 if tuple(parts[i : i + 2]) == best else 1
                    joined.append(b"".join(parts[i : i + step]))
                    i += step
                words[0][word] = joined
    return ranks, made


SMALL = [(STDLIB / f).read_text("utf-8") for f in ("argparse.py", "textwrap.py")] + [" ".join(NASTY) * 3]
RANKS, MERGES = train_ranks(SMALL, GPT2_SPLIT, 400)


def public_encodings(monkeypatch):
    """tiktoken's published encodings, one a pattern, with their own special tokens but small ranks."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: RANKS)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *args, **kwargs: RANKS)
    encodings = {name: constructor() for name, constructor in openai_public.ENCODING_CONSTRUCTORS.items()}
    for name, parts in {parts["pat_str"]: (name, parts) for name, parts in encodings.items()}.values():
        special = parts["special_tokens"]
        yield from_ranks(name, parts["pat_str"], RANKS, special, "<|endoftext|>")


def without_special(texts, tokenizer):
    return [text for text in texts if not any(special in text for special in tokenizer.forbidden.values())]


def assert_same_ids(tokenizer, folder, transformers, exact=True):
    """`transformers` opens the folder and agrees about every text without special tokens in it, and back. exact: the
    text comes back as it was."""
    public = transformers.AutoTokenizer.from_pretrained(folder)
    texts = without_special(real_texts(), tokenizer)
    if tokenizer is BYTES:
        texts = [t for t in texts if len(t) < 9999]
    for text, ids, theirs in zip(texts, tokenizer.encode(texts), public(texts, add_special_tokens=False)["input_ids"]):
        assert theirs == ids.tolist(), text[:200]
        assert public.decode(theirs) == tokenizer.decode(ids) == (text if exact else tokenizer.decode(ids))
    assert public.eos_token_id == tokenizer.eot
    return public


@pytest.mark.parametrize("family", [None, "llama", "mistral", "qwen3", "mixtral", "qwen3_moe"])
def test_saved_bytes_tokenizer_gives_the_same_ids_in_transformers(tmp_path, family, transformers):
    BYTES.save(tmp_path)
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    public = assert_same_ids(BYTES, tmp_path, transformers)
    assert public.encode("a\0b") == [97, 0, 98]
    assert load_tokenizer(str(tmp_path)) == BYTES


def test_saved_tiktoken_encodings_give_the_same_ids_in_transformers(tmp_path, monkeypatch, transformers):
    for tokenizer in public_encodings(monkeypatch):
        folder = tmp_path / tokenizer.name
        folder.mkdir()
        tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        assert_same_ids(tokenizer, folder, transformers)
        again = load_tokenizer(str(folder))
        assert (again.key, again.vocab_size, again.eot) == (tokenizer.key, tokenizer.vocab_size, tokenizer.eot)


def test_rank_file_is_split_as_llama3_and_saved_for_transformers(tmp_path, transformers):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items()))
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.vocab_size, tokenizer.eot) == (len(RANKS) + 1, len(RANKS))
    assert load_tokenizer(str(tmp_path)).key == tokenizer.key  # the folder of Meta's own release
    tokenizer.save(tmp_path)
    assert_same_ids(tokenizer, tmp_path, transformers)
    assert load_tokenizer(str(tmp_path)).key == tokenizer.key


def test_128000_ranks_are_llama3(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"%06d" % i for i in range(128000 - 256)]
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.eot) == (128256, 128001)
    names = tokenizer.decode([128000, 128001, 128002, 128005, 128006, 128007, 128008, 128009, 128010, 128255])
    assert names == (
        "<|begin_of_text|><|end_of_text|><|reserved_special_token_0|><|reserved_special_token_3|><|start_header_id|>"
        "<|end_header_id|><|reserved_special_token_4|><|eot_id|><|reserved_special_token_5|><|reserved_special_token_250|>"
    )


LLAMA3 = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # fmt: skip
QWEN = json.loads(json.dumps(LLAMA3).replace("{1,3}", ""))
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMOLLM = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}
LAYOUTS = {"gpt2": (GPT2, None), "smollm": (SMOLLM, None), "llama3": (LLAMA3, None), "qwen": (QWEN, {"type": "NFC"})}


def write_public(folder, splitter, norm, **changes):
    """A tokenizer.json as published: one merge a token."""
    tokenizer = from_ranks("x", GPT2_SPLIT, RANKS, {"<|endoftext|>": 700, "<|im_end|>": 701}, "<|endoftext|>")
    tokenizer.save(folder)
    public = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    public["pre_tokenizer"], public["normalizer"] = splitter, norm
    public["model"]["merges"] = [["".join(CHAR[b] for b in part) for part in merge] for merge in MERGES]
    public["model"]["ignore_merges"] = False
    for key, value in changes.items():
        (public if key in public else public["model"])[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(public))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_tokenizer_json_gives_the_same_ids_as_transformers(tmp_path, layout, transformers):
    write_public(tmp_path, *LAYOUTS[layout])
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eot) == (702, 700)
    assert_same_ids(tokenizer, tmp_path, transformers, exact=layout != "qwen")


REFUSED = {
    "Unigram": {"model": {"type": "Unigram", "vocab": []}},
    "byte_fallback": {"byte_fallback": True},
    "add_prefix_space": {"pre_tokenizer": GPT2 | {"add_prefix_space": True}},
    "Metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}},
    "Lowercase": {"normalizer": {"type": "Lowercase"}},
    "another order": {"merges": [[CHAR[x] for b in m for x in b] for m in MERGES if len(m[0] + m[1]) == 2][::-1]},
    "do not make": {"merges": []},
    "an id of two tokens": {"vocab": {CHAR[b]: b % 9 for b in range(256)}, "merges": []},
    "an id above": {"vocab": {CHAR[b]: b << 20 for b in range(256)}, "merges": []},
    "pre-tokenizer": {"pre_tokenizer": json.loads(json.dumps(LLAMA3).replace(r"|\\s+(?!\\S)|\\s+", ""))},
    "no byte-level": {"vocab": {"中": 0}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_tokenizer_json_that_tiktoken_cannot_represent_is_refused_by_name(tmp_path, what):
    write_public(tmp_path, GPT2, None, **REFUSED[what])
    with pytest.raises(ValueError, match=what):
        load_tokenizer(str(tmp_path))


def test_sentencepiece_and_unknown_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match="SentencePiece.*train.bin"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))
    with pytest.raises(FileNotFoundError, match="did you mean gpt2"):
        load_tokenizer("gtp2")
    (tmp_path / "tokenizer.json").write_text('{"class_name": "Tokenizer"}')
    with pytest.raises(ValueError, match="no byte-level"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_bytes_without_a_token_are_dropped_as_transformers_does(tmp_path, transformers):
    """SmolLM2 has no token for 21 of the bytes."""
    write_public(tmp_path, *LAYOUTS["smollm"])
    public = json.loads((tmp_path / "tokenizer.json").read_text())
    del public["model"]["vocab"][CHAR[7]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(public))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 702
    assert tokenizer.decode(tokenizer.encode(["ring \a bell"])[0]) == "ring  bell"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).encode("ring \a bell")
    assert theirs == tokenizer.encode(["ring \a bell"])[0].tolist()


def test_public_files_are_copied_along_and_name_the_end(tmp_path):
    write_public(tmp_path, GPT2, None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "chat": "kept"}')
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.eot == 701
    (tmp_path / "child").mkdir()
    tokenizer.save(tmp_path / "child")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "child" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert load_tokenizer(str(tmp_path / "child")).key == tokenizer.key


def test_ids_without_text_are_written_as_numbers_and_come_back_from_a_folder(tmp_path):
    ids = load_tokenizer("ids:300")
    assert ids.decode([17, 4, 299]) == "17 4 299" and ids.encode(["17 4 299", ""])[0].tolist() == [17, 4, 299]
    for text in ("text", "300", "-1", "1.5"):
        with pytest.raises(ValueError, match="cannot encode text"):
            ids.encode([text])
    ids.save(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    assert load_tokenizer(str(tmp_path)) == ids


def test_text_is_text_and_round_trips(monkeypatch):
    for tokenizer in [BYTES, *public_encodings(monkeypatch)]:
        texts = real_texts()
        for text, ids in zip(texts, tokenizer.encode(texts)):
            assert tokenizer.decode(ids) == text
        if tokenizer is not BYTES:
            assert tokenizer.eot not in tokenizer.encode(["<|endoftext|>"])[0]
    assert BYTES.decode(torch.tensor([104, 105, 9999])) == "hi\ufffd"


def test_pieces_of_a_long_text_encode_as_the_whole(monkeypatch):
    text = "\n".join(SMALL).replace("\n    ", "\n")
    for tokenizer in public_encodings(monkeypatch):
        pieces = [piece.decode() for piece, _ in tokenizer.pieces(text.encode(), size=100)]
        assert len(pieces) > 50 and "".join(pieces) == text
        assert np.concatenate(tokenizer.encode(pieces)).tolist() == tokenizer.encode([text])[0].tolist()


