"""What data.py promises, on small real data."""

import gzip
import json
import math
import multiprocessing
import os
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sources
from tokenizer import from_ranks, load_tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
BYTES = load_tokenizer("bytes")


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def make(tmp_path, spec, tokenizer=BYTES):
    return data.prepare(spec, tokenizer, tmp_path / "cache", quiet=True)


def toy(name, tokens, weight=1.0, vocab_size=256):
    rng = np.random.default_rng(len(name))
    train = rng.integers(0, vocab_size, tokens, dtype=np.uint16)
    return data.Corpus(name, weight, train, train[: tokens // 4], 1.0, vocab_size, {"sha256": name})


def test_python_corpus_needs_no_download_and_caches(tmp_path):
    corpus, other = make(tmp_path, "python:3,cpp:0")
    assert 7e6 < corpus.about["bytes"] < 12e6 and corpus.bytes_per_token == 1
    assert (corpus.weight, other.weight) == (1, 0)
    assert 0.03 < len(corpus.val) / (len(corpus.val) + len(corpus.train)) < 0.06
    assert "test" not in {p for _, path in sources.list_files("python") for p in path.parts[:-1]}
    assert corpus.about["source"].startswith("python 3") and "torch" in other.about["source"]
    stamp = (tmp_path / "cache").stat().st_mtime_ns
    again = make(tmp_path, "python")[0]
    assert again.about == corpus.about and (tmp_path / "cache").stat().st_mtime_ns == stamp


def test_requirements_are_the_packages():
    """But for the two that came when the corpora had been measured: their text would be another one."""
    lines = (Path(data.__file__).parent / "requirements.txt").read_text().splitlines()
    wanted = {line.split(">")[0].split()[0] for line in lines}
    assert wanted - {"tokenizers", "huggingface_hub"} == {*sources.PACKAGES} - {"_pytest"}


def test_english_is_prose_of_the_packages_and_no_code_of_python(tmp_path):
    code = '"""Module."""\ndef f():\n    """Says\n    this."""\n    return "code"\n'
    package = write(tmp_path, {"a.py": code, "b.py": "x ="})
    assert sources.read_docstrings(package / "a.py") == b"Module.\n\nSays\nthis."
    assert sources.read_docstrings(package / "b.py") is None
    assert b"lambda" in sources.read_docstrings(STDLIB / "pydoc_data/topics.py")
    assert not {*sources.list_files("english")} & {*sources.list_files("python")}


def test_validation_takes_whole_files_by_the_hash_of_their_name(tmp_path):
    texts = {f"{i:02}.txt": f"file {i} " * 50 for i in range(60)}
    corpus = make(tmp_path, str(write(tmp_path / "notes", texts)))[0]
    train, val = (BYTES.decode(part).split("\0")[:-1] for part in (corpus.train, corpus.val))
    assert sorted(train + val) == sorted(texts.values()) and 2 <= len(val) <= 3
    del texts["00.txt"]  # another file does not move the others
    (tmp_path / "notes/00.txt").unlink()
    fewer = BYTES.decode(make(tmp_path, str(tmp_path / "notes"))[0].val).split("\0")[:-1]
    assert len({*fewer} & {*val}) >= len(val) - 1


def test_a_single_file_gives_its_tail_from_the_start_of_a_line(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    corpus = make(tmp_path, str(write(tmp_path, {"a.txt": text}) / "a.txt"))[0]
    train, val = (BYTES.decode(part) for part in (corpus.train, corpus.val))
    assert train[:-1] + val[:-1] == text and val.startswith("line") and 0.04 < len(val) / len(text) < 0.06
    train, val = data.split_documents([("x", "é".encode() * 1000)])  # neither lines nor one-byte characters
    assert (train[0] + val[0]).decode() == "é" * 1000 and len(val[0]) == 100


def test_documents_empty_and_copied_are_skipped_and_counted(tmp_path):
    texts = {"a.txt": "one " * 99, "b.txt": "one " * 99, "c.txt": "", "d/e.txt": "two " * 99, ".hidden": "x"}
    write(tmp_path / "d", texts)
    about = make(tmp_path, str(tmp_path / "d"))[0].about
    assert about["skipped"] == {"copies": 1, "empty": 1} and (about["files"], about["documents"]) == (4, 2)
    glob = make(tmp_path, f"{tmp_path}/d/**/e*.txt")[0]
    assert glob.name == "d" and glob.about["documents"] == 1


def test_jsonl_documents_are_its_text_fields(tmp_path):
    lines = [json.dumps({"text": f"document {i} \u2028 <|endoftext|>"}) for i in range(100)]
    corpus = make(tmp_path, "j=" + str(write(tmp_path, {"a.jsonl": "\n".join(lines) + "\n"}) / "a.jsonl"))[0]
    assert corpus.name == "j" and corpus.about["documents"] == 100
    assert BYTES.decode(corpus.train[:40]).startswith("document 0 \u2028 <|endoftext|>\0document 1")


def test_a_lone_surrogate_is_replaced_and_counted(tmp_path):
    lines = [json.dumps({"text": f"document {i} \ud83d|\ud83d\ude42|\udc00"}) for i in range(50)]  # half a pair, a pair
    about, documents = sources.read_documents("x", [("a", write(tmp_path, {"a.jsonl": "\n".join(lines)}) / "a.jsonl")])
    assert documents[7][1].decode() == "document 7 \ufffd|🙂|\ufffd" and about["about"]["replaced"] == 100
    assert make(tmp_path, str(tmp_path / "a.jsonl"))[0].about["replaced"] == 100


TWO_LINES = '{"text": "one"}\n\n{"text": "two", "id": 2}\n'
KINDS_OF_LINES = {  # file name: (content, documents)
    "a.JSONL": (TWO_LINES, ["one", "two"]),
    "a.ndjson": (TWO_LINES, ["one", "two"]),
    "a.NDJson": (TWO_LINES, ["one", "two"]),
    "a.json": (TWO_LINES, ["one", "two"]),
    "a.txt": (TWO_LINES, ["one", "two"]),
    "part-0001": ('{"id": 1, "text": "one"}', ["one"]),
    "package.json": ('{\n "text": "a package"\n}\n', ['{\n "text": "a package"\n}\n']),
    "small.json": ('{"private": true}\n', ['{"private": true}\n']),
    "brace.c": ("{\n}\n", ["{\n}\n"]),
}


@pytest.mark.parametrize("name", KINDS_OF_LINES)
def test_json_lines_are_known_by_ending_or_content_and_other_json_is_text(tmp_path, name):
    content, documents = KINDS_OF_LINES[name]
    found = sources.read_documents("x", [("a", write(tmp_path, {name: content}) / name)])[1]
    assert [text.decode() for _, text in found] == documents


def test_a_json_array_is_read_as_its_texts_and_other_json_as_it_is(tmp_path):
    records = [{"text": "one\n" * 99, "id": 1}, {"text": "zwei\n" * 99}]
    for indent in (None, 1):
        path = write(tmp_path, {"a.json": json.dumps(records, indent=indent)}) / "a.json"
        assert sources.read_texts(path, False)[0] == [r["text"].encode() for r in records]
    records.insert(1, {"texts": "one of them, misspelt"})
    with pytest.raises(ValueError, match="a.json line 2 has no text: its fields are 'texts'"):
        sources.read_texts(write(tmp_path, {"a.json": json.dumps(records)}) / "a.json", False)
    for text in ('[{"texts": 1}]', "[1, 2]", '[{"text": "a"}'):
        assert sources.read_texts(write(tmp_path, {"a.json": text}) / "a.json", False)[0] == [text.encode()]


def test_a_gzip_file_is_what_it_holds(tmp_path, monkeypatch):
    write(tmp_path, {"a.jsonl.gz": gzip.compress(TWO_LINES.encode()), "b.txt.gz": gzip.compress(b"three")})
    monkeypatch.setenv("HOME", str(tmp_path))
    [(_, spec, _, files)] = sources.parse_spec("mine=~/*.gz")
    assert [text for _, text in sources.read_documents(spec, files)[1]] == [b"one", b"two", b"three"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    write(tmp_path, {"books/a.txt": "aaa", "corpus/b.txt": "bbb"})
    (tmp_path / "corpus/books").symlink_to(tmp_path / "books")
    (tmp_path / "corpus/again").symlink_to(tmp_path / "books")
    (tmp_path / "books/loop").symlink_to(tmp_path / "corpus")
    assert [unit for unit, _ in sources.list_files(str(tmp_path / "corpus"))] == ["b.txt", "again/a.txt"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path, {"a.txt": "\ufefftext"}) / "a.txt"
    assert sources.read_texts(path, False)[0] == [b"text"]


def test_a_pipe_is_refused_for_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="pipe is a pipe or a device"):
        sources.list_files(str(tmp_path / "pipe"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json"])
def test_a_missing_field_names_the_fields_that_are_there(tmp_path, name):
    write(tmp_path, {name: '{"content": "one", "url": "x"}\n{"content": "two", "url": "y"}\n'})
    with pytest.raises(ValueError, match="line 1 has no text: its fields are 'content', 'url'"):
        make(tmp_path, str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf16_without_a_mark_is_refused(tmp_path, encoding):
    text = "half of these bytes are NUL\n".encode(encoding) * 99
    write(tmp_path, {"a.txt": text, "b.txt": "one NUL \0 is text\n" * 99})
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text but UTF-16"):
        make(tmp_path, str(tmp_path / "a.txt"))
    assert make(tmp_path, str(tmp_path / "b.txt"))[0].about["documents"] == 1


def test_ready_tokens_without_meta_json_say_what_to_write_into_it(tmp_path):
    tokens = np.arange(300, dtype="<u2").tobytes()
    folder = write(tmp_path / "r", {"train.bin": tokens, "val.bin": tokens})
    with pytest.raises(ValueError, match="meta.json is missing") as error:
        make(tmp_path, str(folder))
    proposal = re.search(r"\{.*\}", str(error.value)).group()
    (folder / "meta.json").write_text(proposal)  # as it stands, it is right for nanoGPT's files
    assert make(tmp_path, str(folder), load_tokenizer("ids:50257"))[0].vocab_size == 50257


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path, monkeypatch):
    write(tmp_path, {"date=2024.txt": "text\n" * 99, "2024.txt": "another\n" * 99})
    monkeypatch.chdir(tmp_path)
    (corpus,) = make(tmp_path, "date=2024.txt:0.5")
    assert corpus.name == "date-2024" and corpus.about["bytes"] == 5 * 99
    assert make(tmp_path, "date=./2024.txt")[0].name == "date"  # a file of another name has that name in front
    (tmp_path / "date=2024.txt").unlink()
    assert make(tmp_path, "date=2024.txt")[0].about["bytes"] == 8 * 99
    for name, corpus in {"a,b.txt": "a-b", "at 12:30.txt": "at-12-30"}.items():
        write(tmp_path, {name: "other\n" * 99})
        assert make(tmp_path, name)[0].name == corpus


def test_bits_per_byte_count_an_end_as_a_byte_for_every_tokenizer(tmp_path):
    folder = write(tmp_path / "d", {f"{i}.txt": f"some words {i}\n" * 9 for i in range(99)})
    ranks = {bytes([b]): b for b in range(256)} | {b"so": 256, b"me": 257, b"some": 258, b" wo": 259, b"rds": 260}
    tokenizer = from_ranks("small", r"\s?\S+|\s", ranks, {"<|endoftext|>": 261}, "<|endoftext|>")
    (a,), (b,) = make(tmp_path, str(folder)), make(tmp_path, str(folder), tokenizer)
    assert len(a.val) == pytest.approx(len(b.val) * b.bytes_per_token)
    assert BYTES.decode(a.val).replace("\0", "<|endoftext|>") == tokenizer.decode(b.val)


def write_ready(folder, train, val, dtype="uint16", **meta):
    content = {"dtype": dtype, "vocab_size": 300, "bytes_per_token": 4.0} | meta
    return write(folder, {"train.bin": train, "val.bin": val, "meta.json": json.dumps(content)})


def test_ready_tokens_are_read_in_place(tmp_path):
    tokens = np.arange(300, dtype="<u4")
    folder = write_ready(tmp_path / "r", tokens.tobytes(), tokens[:50].tobytes(), "uint32")
    corpus = make(tmp_path, str(folder), load_tokenizer("ids:300"))[0]
    assert corpus.train.tolist() == tokens.tolist() and len(corpus.val) == 50 and corpus.bytes_per_token == 4
    assert not [*tmp_path.glob("cache/*/*.bin")]
    tokens[7] = 300
    write_ready(folder, tokens.tobytes(), tokens[:50].tobytes(), "uint32")
    with pytest.raises(ValueError, match="token 300"):
        make(tmp_path, str(folder), load_tokenizer("ids:300"))


U2 = np.arange(300, dtype="<u2").tobytes()
BAD = {  # files, specification, words
    "unknown corpus": ({}, "pyhton", "did you mean python"),
    "missing file": ({}, "{}/none.txt", "no file"),
    "missing glob": ({}, "{}/*.txt", "no file"),
    "empty file": ({"a.txt": ""}, "{}/a.txt", "empty"),
    "blank file": ({"a.txt": " \n"}, "{}/a.txt", "no text"),
    "empty folder": ({"d/.hidden": "x"}, "{}/d", "no file"),
    "not UTF-8": ({"a.txt": b"abc\xff" * 99}, "{}/a.txt", "not UTF-8 text at byte 3"),
    "half a gzip file": ({"a.txt.gz": gzip.compress(b"abc" * 99)[:-9]}, "{}/a.txt.gz", "a whole gzip file"),
    "no gzip file": ({"a.txt.gz": b"abc" * 99}, "{}/a.txt.gz", "a whole gzip file"),
    "an archive": ({"a.tar.gz": gzip.compress(b"a".ljust(257, b"\0") + b"ustar")}, "{}/a.tar.gz", "is an archive"),
    "tokens by their file": ({"train.bin": U2}, "{}/train.bin", "of ready tokens give the folder"),
    "not UTF-8 in a folder": ({"d/a.txt": b"abc\xff" * 99, "d/b.txt": "b" * 99}, "{}/d", "not UTF-8"),
    "jsonl without text": ({"a.jsonl": '{"text": "a"}\n{"t": 1}\n'}, "{}/a.jsonl", "line 2"),
    "jsonl of lists": ({"a.jsonl": '["text"]'}, "{}/a.jsonl", "no object"),
    "jsonl no json": ({"a.jsonl": "text"}, "{}/a.jsonl", "line 1"),
    "a few bytes": ({"a.txt": "few"}, "{}/a.txt", "3 bytes"),
    "a name twice": ({"a.txt": "a"}, "{0}/a.txt,a={0}/a.txt", "two corpora of the name 'a'"),
    "zero weights": ({}, "python:0,cpp:0", "all weights are zero"),
    "negative weight": ({}, "python:-1", "weight -1"),
    "weight no number": ({}, "python:much", "'much'"),
    "weight nan": ({}, "python:nan", "nan"),
    "weights for some": ({}, "python:1,cpp", "some corpora only"),
    "empty part": ({}, "python,,cpp", "no source in ''"),
    "odd bin": ({"r/train.bin": U2 + b"x", "r/val.bin": U2}, "{}/r", "has 601 bytes"),
    "no val.bin": ({"r/train.bin": U2}, "{}/r", "val.bin"),
    "huge weight": ({}, "python:1e308,cpp:1e308", "from 0 to 1e9"),
    "a Windows path": ({}, "C:\\x.txt:0.5", "no file in"),
    "a name with a slash": ({}, "a/b=python", "no file in"),
    "a name too long": ({}, "n" * 5000, "File name too long"),
    "jsonl with a number": ({"a.jsonl": '{"text": 1}'}, "{}/a.jsonl", "line 1"),
    "jsonl too deep": ({"a.jsonl": "[" * 100_000}, "{}/a.jsonl", "line 1"),
    "train.bin a folder": ({"r/train.bin/x": U2, "r/val.bin": U2}, "{}/r", "Is a directory"),
    "id beyond vocabulary": ({"r/train.bin": U2, "r/val.bin": U2}, "{}/r", "token 299"),
}


@pytest.mark.parametrize("lie", ['"vocab_size": 1e400', '"vocab_size": -1', '"bytes_per_token": NaN', '"dtype": []'])
def test_a_meta_json_that_lies_is_refused(tmp_path, lie):
    folder = write_ready(tmp_path / "r", U2, U2)
    (folder / "meta.json").write_text((folder / "meta.json").read_text()[:-1] + f", {lie}}}")
    with pytest.raises(ValueError, match="r/meta.json: .*uint16 or uint32"):
        make(tmp_path, str(folder), load_tokenizer("ids:300"))


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_refused_with_a_remedy_and_leave_nothing(tmp_path, case, capsys, monkeypatch):
    files, spec, words = BAD[case]
    write(tmp_path, files)
    if (tmp_path / "r").exists():
        write(tmp_path, {"r/meta.json": '{"dtype": "uint16", "vocab_size": 200, "bytes_per_token": 1}'})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make(tmp_path, spec.format(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        data.main([spec.format(tmp_path)])
    error = capsys.readouterr().err.strip().split("\n")
    assert status.value.code == 2 and len(error) == 2
    assert error[0].startswith("usage: ") and error[1].startswith("data.py: error: ") and words in error[1]
    assert sorted(tmp_path.rglob("*")) == before


WRONG_FLAGS = (["--tok", "bytes"], ["--context", "0"], ["--context", "x"], ["--context", "9e9"], ["--tokenizer", "gtp"])


@pytest.mark.parametrize("arguments", WRONG_FLAGS)
def test_bad_flags_end_in_two_lines_and_status_2(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as status:
        data.main(["python", *arguments, "--cache", str(tmp_path / "cache")])
    assert status.value.code == 2 and "data.py: error: " in capsys.readouterr().err


def test_the_command_describes_a_corpus(tmp_path, capsys):
    file = write(tmp_path, {"poem.txt": "the rain in spain\n" * 2000}) / "poem.txt"
    data.main([str(file), "--context", "6_4", "--cache", str(tmp_path / "cache")])
    shown = capsys.readouterr().out
    for words in ("poem: ", "36,000 bytes", "3-gram", "| the rain in spain", "windows of 64"):
        assert words in shown


def prepare_and_send(tmp_path, start, sums):
    start.wait()
    sums.put(int(make(tmp_path, str(tmp_path / "d"))[0].train.sum()))


def test_processes_that_prepare_at_once_do_not_disturb_each_other(tmp_path):
    write(tmp_path, {f"d/{i}.txt": f"text {i} " * 999 for i in range(99)})
    fork = multiprocessing.get_context("fork")
    start, sums = fork.Barrier(3), fork.Queue()
    processes = [fork.Process(target=prepare_and_send, args=(tmp_path, start, sums)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({sums.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_what_a_killed_preparation_left_is_removed_after_a_day(tmp_path):
    write(tmp_path, {"cache/~old/thesis.txt": "of the user", "cache/~backup-1.txt": "of the user"})
    write(tmp_path, {"a.txt": "text\n" * 999, "cache/~regrow-1/a-0/train.bin": "", "cache/~regrow-2/a-0/train.bin": ""})
    yesterday = time.time() - 100_000
    for name in ("~regrow-1", "~old", "~backup-1.txt"):
        os.utime(tmp_path / "cache" / name, (yesterday, yesterday))
    make(tmp_path, str(tmp_path / "a.txt"))
    assert [path.name for path in sorted(tmp_path.glob("cache/~*"))] == ["~backup-1.txt", "~old", "~regrow-2"]
    assert (tmp_path / "cache/~old/thesis.txt").read_text() == "of the user"


def test_a_preparation_that_fails_leaves_nothing(tmp_path):
    write(tmp_path, {"a.txt": "text\n" * 999})
    broken = load_tokenizer("ids:9")
    with pytest.raises(ValueError, match="cannot encode"):
        make(tmp_path, str(tmp_path / "a.txt"), broken)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").mkdir()  # one that was there before stays
    for spec, context in ((f"{tmp_path}/a.txt,short={tmp_path}/a.txt", 9999), (f"{tmp_path}/a.txt", 9999)):
        with pytest.raises(ValueError, match="too few tokens"):
            data.prepare(spec, BYTES, tmp_path / "cache", quiet=True, context=context)
    assert not [*(tmp_path / "cache").iterdir()]


def test_a_folder_that_cannot_be_listed_is_refused_and_no_pipe_is_read(tmp_path, monkeypatch):
    write(tmp_path, {"d/a.txt": "text\n" * 999})
    os.mkfifo(tmp_path / "d/pipe")
    (tmp_path / "d/broken").symlink_to("nowhere")
    (tmp_path / "d/loop").symlink_to(".")
    assert make(tmp_path, str(tmp_path / "d"))[0].about["files"] == 1

    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        make(tmp_path, str(tmp_path / "d"))


# ----------------------------------------------------------------------------------------------------------------------


def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order():
    reader = data.Reader([toy("a", 1601)], 16, seed=1)
    first, second = reader.take(100), reader.take(100)
    assert sorted(first) == sorted(second) == [(0, w) for w in range(100)] and first != second
    ids, targets = reader.load(first[:3])
    assert ids.dtype == torch.int64 and ids.shape == targets.shape == (3, 16)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    w = first[0][1]
    assert ids[0].tolist() + [targets[0, -1]] == reader.corpora[0].train[16 * w : 16 * w + 17].tolist()


@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.5, 0.5), (1.0, 0.0), (0.25, 0.7, 0.05), (0.0, 1.0)])
def test_every_stretch_has_the_shares_of_the_weights(weights):
    reader = data.Reader([toy("abc"[i] * (i + 1), 999, w) for i, w in enumerate(weights)], 16, seed=3)
    picks = np.array([k for k, _ in reader.take(5000)])
    for n in (10, 100, 1000):
        for start in range(0, 4000, 37):
            shares = np.bincount(picks[start : start + n], minlength=len(weights))
            assert abs(shares - n * np.array(weights)).max() < 4


def test_half_and_half_reads_what_the_whole_reads():
    mixture = lambda: [toy("a", 3201, 0.6), toy("bb", 1601, 0.4)]
    whole = data.Reader(mixture(), 16, seed=5).take(300)
    parent = data.Reader(mixture(), 16, seed=5)
    half = parent.take(150)
    child = data.Reader(mixture(), 16, 5, parent.sequence, parent.read)
    assert half + child.take(150) == whole
    ranks = data.Reader(mixture(), 16, seed=5)  # in batches of any size
    assert sum((ranks.take(n) for n in (1, 2, 97, 200)), []) == whole


def step(seed, sha="a", **tokens):
    read = {name: {"weight": 1.0, "tokens": n, "sha256": sha} for name, n in tokens.items()}
    return {"step": "train", "seed": seed, "data": read, "settings": {"context": 16, "tokenizer": "bytes"}}


def test_position_counts_the_whole_lineage_and_keeps_its_first_seed():
    corpora = [toy("a", 999), toy("bb", 999)]
    lineage = [{"step": "source", "name": "x"}, step(7, a=160), {"step": "upcycle", "seed": 1}, step(8, a=32, c=64)]
    assert data.position(lineage, corpora, 16, "bytes") == (7, 16, {"a": 12, "bb": 0}, [])
    assert data.position([], corpora, 16, "bytes") == (None, 0, {}, [])


def test_position_starts_anew_with_another_context_or_text_and_says_so():
    corpora = [toy("a", 999)]
    seed, sequence, read, notes = data.position([step(7, a=160)], corpora, 32, "bytes")
    assert (seed, sequence, read) == (7, 0, {}) and "context 16 became 32" in notes[0]
    seed, sequence, read, notes = data.position([step(7, a=160)], corpora, 16, "gpt2")
    assert (sequence, read) == (0, {}) and "tokenizer bytes became gpt2" in notes[0]
    older = step(6, a=160)
    older["settings"]["context"] = 8
    assert data.position([older, step(7, a=160)], corpora, 16, "bytes")[:3] == (6, 10, {"a": 10})
    seed, sequence, read, notes = data.position([step(7, sha="old", a=160), step(7, a=16)], corpora, 16, "bytes")
    assert (sequence, read) == (11, {"a": 1}) and "a has changed" in notes[0]


def test_validation_windows_are_fixed_and_evenly_spaced():
    corpus = toy("a", 4 * 300_000)
    ids, targets = data.validation_windows(corpus, 100)
    assert ids.shape == (data.EVAL_TOKENS // 100, 100) and torch.equal(ids, data.validation_windows(corpus, 100)[0])
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert ids[0].tolist() == corpus.val[:100].tolist()
    few = data.validation_windows(corpus, 100, 1000)[0]
    assert few.shape == (10, 100) and [row[0].item() for row in few[:2]] == [corpus.val[0], corpus.val[29_900]]
    assert data.validation_windows(corpus, 100, 1)[0].shape == (1, 100)
    small = toy("a", 4 * 1000)
    assert data.validation_windows(small, 100)[0].shape == (9, 100)
    for call in (lambda: data.validation_windows(small, 1000), lambda: data.Reader([small], 4000, 1)):
        with pytest.raises(ValueError, match="too few tokens for the context"):
            call()


def slow_witten_bell(train, window, V):
    """The formula of `ngram_losses`, one target at a time."""
    counts = [Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in (1, 2, 3)]
    losses = np.zeros((3, len(window) - 1))
    for j in range(1, len(window)):
        p = 1 / V
        for n in (1, 2, 3):
            if j >= n - 1:
                h = tuple(window[j - n + 1 : j])
                follow = {gram[-1]: c for gram, c in counts[n - 1].items() if gram[:-1] == h}
                if follow:
                    p = (follow.get(window[j], 0) + len(follow) * p) / (sum(follow.values()) + len(follow))
            losses[n - 1, j - 1] = -math.log(p)
    return losses.mean(1)


def test_ngram_losses_of_the_shortest_windows(vocab_size=300):
    two = np.arange(2, dtype=np.uint16)
    assert len(data.ngram_losses(data.Corpus("a", 1.0, two, two, 1.0, vocab_size, {}), 1)) == 3


@pytest.mark.parametrize("vocab_size", [5, 256, 2**20])
def test_ngram_losses_equal_the_formula(vocab_size):
    rng = np.random.default_rng(0)
    train = (rng.integers(0, 5, 300) ** 2 % 5 * (vocab_size // 5)).astype(np.uint32)
    val = (rng.integers(0, 5, 49) ** 2 % 5 * (vocab_size // 5)).astype(np.uint32)
    corpus = data.Corpus("a", 1.0, train, val, 1.0, vocab_size, {})
    windows = [val[i : i + 13].tolist() for i in (0, 12, 24, 36)]
    slow = np.mean([slow_witten_bell(train.tolist(), window, vocab_size) for window in windows], 0)
    assert data.ngram_losses(corpus, 12) == pytest.approx(slow.tolist())
