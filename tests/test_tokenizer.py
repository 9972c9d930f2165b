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

from tokenizer import CHAR, LLAMA3_SPLIT, from_ranks, load_tokenizer

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


def assert_same_ids(tokenizer, folder, transformers, exact=True, every=1):
    """`transformers` opens the folder and agrees about every text without special tokens in it, and back. exact: the
    text comes back as it was."""
    public = transformers.AutoTokenizer.from_pretrained(folder)
    texts = without_special(real_texts()[::every], tokenizer)
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


def train(kind):
    """A small tokenizer of a public kind, trained by the library."""
    return tokenizers.Tokenizer.from_str(train_once(kind))


@functools.cache
def train_once(kind):
    named = ["<unk>", "<s>", "</s>"]
    blank = pre_tokenizers.Metaspace(prepend_scheme="always")
    fallback = [tokenizers.AddedToken(f"<0x{b:02X}>", normalized=False) for b in range(256)]
    if kind == "wordpiece":
        small = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        small.normalizer, small.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        small.decoder = decoders.WordPiece()
        small.train_from_iterator(SMALL, trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[SEP]"]))
        return small.to_str()
    if kind == "unigram":
        small = tokenizers.Tokenizer(models.Unigram())
        small.normalizer, small.pre_tokenizer, small.decoder = normalizers.NFKC(), blank, decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=named, unk_token="<unk>", show_progress=False)
        small.train_from_iterator(SMALL, trainer)
        return small.to_str()
    small = tokenizers.Tokenizer(models.BPE())
    small.pre_tokenizer = blank
    small.train_from_iterator(SMALL, trainers.BpeTrainer(vocab_size=700, special_tokens=named, show_progress=False))
    public = json.loads(small.to_str())
    vocab = [*named, *(token.content for token in fallback), *[*public["model"]["vocab"]][3:]]
    merges = [tuple(merge) for merge in public["model"]["merges"]]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    small = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges, **options))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama2":
        small.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        small.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    elif kind == "mistral":
        small.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        small.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:  # gemma
        small.normalizer = normalizers.Replace(" ", "▁")
        small.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        small.decoder = decoders.Sequence(steps)
    small.add_special_tokens(named)
    start = [("<s>", small.token_to_id("<s>"))]
    small.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return small.to_str()


def write_trained(folder, small, end="</s>"):
    small.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


EXACT = {"llama2": True, "mistral": False, "gemma": True, "unigram": False, "wordpiece": False}
WORDS = ["  ", "    ", "return self", "\n\nA", "def ", "é"]  # added, but not special: texts make them


@pytest.mark.parametrize("words", [[], WORDS], ids=["plain", "with added tokens"])
@pytest.mark.parametrize("kind", EXACT)
def test_every_kind_gives_the_ids_of_transformers_and_its_saved_folder_too(tmp_path, kind, words, transformers):
    small = train(kind)
    small.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    small.enable_truncation(5)  # for batches of a training, not for us
    small.enable_padding()
    folder = write_trained(tmp_path, small, "[SEP]" if kind == "wordpiece" else "</s>")
    tokenizer = load_tokenizer(str(folder))
    exact = EXACT[kind] and not words
    assert_same_ids(tokenizer, folder, transformers, exact, every=4)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert_same_ids(tokenizer, tmp_path / "saved", transformers, exact, every=4)
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (again.key, again.vocab_size, again.eot) == (tokenizer.key, tokenizer.vocab_size, tokenizer.eot)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_tokens_that_are_not_special_are_found_in_byte_level_texts(tmp_path, layout, transformers):
    write_public(tmp_path, *LAYOUTS[layout])
    public = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    public.add_tokens(WORDS)
    public.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert_same_ids(tokenizer, tmp_path, transformers, exact=False, every=4)
    assert tokenizer.encode(["x    = 1"])[0].tolist().count(tokenizer.public.token_to_id("    ")) == 1


ODD = {
    "a blank in front": {"pre_tokenizer": GPT2 | {"add_prefix_space": True}},
    "small letters": {"normalizer": {"type": "Lowercase"}},
    "another order": {"merges": [[CHAR[x] for b in m for x in b] for m in MERGES if len(m[0] + m[1]) == 2][::-1]},
    "no merges": {"merges": []},
    "another split": {"pre_tokenizer": json.loads(json.dumps(LLAMA3).replace(r"|\\s+(?!\\S)|\\s+", ""))},
}


@pytest.mark.parametrize("what", ODD)
def test_what_tiktoken_could_not_represent_gives_the_same_ids_too(tmp_path, what, transformers):
    write_public(tmp_path, GPT2, None, **ODD[what])
    assert_same_ids(load_tokenizer(str(tmp_path)), tmp_path, transformers, exact=False, every=4)


@pytest.mark.parametrize("kind", EXACT)
def test_no_text_makes_a_special_token(tmp_path, kind):
    small = train(kind)
    tokenizer = load_tokenizer(str(write_trained(tmp_path, small)))
    special = tokenizer.forbidden
    assert {*special.values()} >= ({"[SEP]"} if kind == "wordpiece" else {"<s>", "</s>"})
    text = "a</s> <s>b[SEP]"
    ids = tokenizer.encode([text])[0].tolist()
    assert not {*ids} & {*special}
    if kind != "wordpiece":
        assert tokenizer.decode(ids) == text
        assert small.encode(text).ids.count(small.token_to_id("</s>"))  # what the library does if nobody tells it


def test_the_class_of_llama_2_differs_before_a_blank_only(tmp_path, transformers):
    folder = write_trained(tmp_path, train("llama2"))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    public, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    texts = without_special(real_texts()[::4], tokenizer)
    for text, ids, theirs in zip(texts, tokenizer.encode(texts), public(texts, add_special_tokens=False)["input_ids"]):
        assert text[:1] == " " or ids.tolist() == theirs
    spelled = lambda ids: "".join(public.convert_ids_to_tokens(ids))
    ours, theirs = tokenizer.encode([" x"])[0].tolist(), public.encode(" x", add_special_tokens=False)
    assert (spelled(ours), spelled(theirs)) == ("▁▁x", "▁x")


def test_sentencepiece_bytes_that_are_no_utf8_become_a_replacement_character(tmp_path):
    tokenizer = load_tokenizer(str(write_trained(tmp_path, train("llama2"))))
    ids = tokenizer.encode(["é 🦜"])[0].tolist()
    assert tokenizer.decode(ids) == "é 🦜" and tokenizer.decode(ids[:-1]).endswith("\ufffd")
    assert tokenizer.decode([*ids, 99999]) == "é 🦜\ufffd" and tokenizer.decode([]) == ""


def test_an_id_that_no_text_makes_may_lie_beyond_the_vocabulary_of_the_model(tmp_path):
    small = train("llama2")
    small.add_special_tokens(["[PAD]"])
    small.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.min_vocab_size == tokenizer.vocab_size - 1 == small.token_to_id("[PAD]")
    small.add_tokens(["    "])  # a text makes this one
    small.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).min_vocab_size == tokenizer.vocab_size + 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[PAD]"}')  # so does the end of one
    assert load_tokenizer(str(tmp_path)).eot == tokenizer.vocab_size - 1


@pytest.mark.parametrize("kind", [*EXACT, *LAYOUTS])
def test_pieces_of_a_long_text_encode_as_the_whole_for_every_kind(tmp_path, kind):
    folder = write_public(tmp_path, *LAYOUTS[kind]) if kind in LAYOUTS else write_trained(tmp_path, train(kind))
    tokenizer = load_tokenizer(str(folder))
    text = "\n".join(SMALL).replace("\n    ", "\n").replace("A", "\n\nA")
    pieces = [piece.decode() for piece, _ in tokenizer.pieces(text.encode(), size=100)]
    assert "".join(pieces) == text and (len(pieces) > 50) == (kind in LAYOUTS)
    assert np.concatenate(tokenizer.encode(pieces)).tolist() == tokenizer.encode([text])[0].tolist()
    if kind in LAYOUTS:  # an added token that reaches over a cut
        tokenizer.public.add_tokens(["\nA"])
        del tokenizer.divisible
        assert len([*tokenizer.pieces(text.encode(), size=100)]) == 1


REFUSED = {
    "dropout": {"dropout": 0.1},
    "an id above": {"vocab": {CHAR[b]: b << 20 for b in range(256)}, "merges": []},
    "out of vocabulary": {"vocab": {"中": 0}},
    "PreTokenizer": {"pre_tokenizer": {"type": "Unknown"}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_tokenizer_json_that_cannot_be_used_is_refused_in_one_line(tmp_path, what):
    write_public(tmp_path, GPT2, None, **REFUSED[what])
    with pytest.raises(ValueError, match=rf"no tokenizer.json: .*{what}.*\(one that") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_text_without_ids_is_refused(tmp_path):
    model = models.WordPiece({"a": 0}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="cannot encode"):
        load_tokenizer(str(tmp_path)).encode(["b"])


def test_a_folder_goes_before_an_encoding_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    write_public(tmp_path / "gpt2", GPT2, None)
    assert load_tokenizer("gpt2").key == load_tokenizer(str(tmp_path / "gpt2")).key


def test_sentencepiece_and_unknown_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match="SentencePiece.*tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))
    with pytest.raises(FileNotFoundError, match="did you mean gpt2"):
        load_tokenizer("gtp2")
    (tmp_path / "tokenizer.json").write_text('{"class_name": "Tokenizer"}')
    with pytest.raises(ValueError, match="no tokenizer.json"):
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
    (tmp_path / "merges.txt").write_text("a b")
    with pytest.raises(ValueError, match="has a tokenizer, but only in merges.txt, which is not read"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")  # a run on ready tokens, to which its parent's files came along
    assert load_tokenizer(str(tmp_path)) == ids


def test_a_tokenizer_works_under_any_name(tmp_path):
    for name in ("bytes", "ids:300"):
        tokenizer = load_tokenizer(name)
        tokenizer.name = "out/run-1"  # the trainer calls it as its parent did
        assert tokenizer.decode(tokenizer.encode(["17 4"])[0]) == "17 4"
        tokenizer.save(tmp_path)
    assert load_tokenizer(str(tmp_path)) == BYTES


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


