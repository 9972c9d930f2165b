"""LiGO: learned maps lower the loss, are tied as in the paper, and what they read and cost is counted."""

import re
from pathlib import Path

import pytest
import torch
from test_grow import SHAPES, equal, make, train

import checkpoint
import data
import grow
import ligo
import model
import runs
import train as train_py
from tokenizer import load_tokenizer


def batches(steps):
    for i in range(steps):
        ids = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(i))
        ids[:, 1::2] = (ids[:, ::2] * 5 + 1) % 97  # something to learn
        yield ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("axis", ["depth", "width"])
@pytest.mark.parametrize("name", SHAPES)
def test_learned_maps_lower_the_loss(name, axis):
    small = make(name)
    before = {n: t.clone() for n, t in small.state_dict().items()}
    first, last = (ligo.learn(small, batches(n), axis, 2, lr=5e-3) for n in (0, 20))
    x, y = next(batches(1))
    with torch.no_grad():
        assert last(x, y)[1] < first(x, y)[1] - 0.03
    big = grow.grow(small, axis, "direct", 2)
    assert last.config == big.config and last.state_dict().keys() == big.state_dict().keys()
    assert (last.lm_head.weight is last.model.embed_tokens.weight) == small.config.tie_word_embeddings
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())
    train(last, 1)
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())  # nothing is shared


def test_depth_starts_as_the_stack_and_a_layer_is_a_sum_of_old_ones(monkeypatch):
    monkeypatch.setattr(model, "normal", lambda shape, *_: torch.zeros(shape))
    small = make("mixtral")
    assert equal(ligo.learn(small, [], "depth", 2), grow.grow(small, factor=2))


def test_width_is_tied_as_in_the_paper():
    """Whatever the maps B: W' = B_out W B_in^T, one B for all that touches the residual stream; o_proj reads by the
    map of v_proj, head by head."""
    small = make("llama, grouped queries, tied")
    big = ligo.learn(small, batches(3), "width", 2)
    old, new = small.state_dict(), big.state_dict()
    B = torch.linalg.lstsq(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"]).solution.T  # E' = E B^T
    first = "model.layers.1."
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.allclose(new[first + norm], B @ old[first + norm], atol=1e-4)
    q, v, o = (f"{first}self_attn.{m}_proj.weight" for m in "qvo")
    Bq = (torch.linalg.pinv((old[q] @ B.T).T) @ new[q].T).T.reshape(8, 8, 4, 8)  # one solution of Bq (W B^T) = W'
    assert torch.allclose(Bq.reshape(64, 32) @ old[q] @ B.T, new[q], atol=1e-4)
    Bv = (new[v] @ torch.linalg.pinv(old[v] @ B.T)).reshape(4, 8, 2, 8)
    share = Bv[:, 0, :, 0]  # (new key-value heads, old ones): the same for each dimension of a head
    assert torch.allclose(torch.kron(share, torch.eye(8)) @ old[v] @ B.T, new[v], atol=1e-3)
    read = torch.kron(share, torch.eye(16))  # two query heads a group, 8 dimensions a head
    assert torch.allclose(B @ old[o] @ read.T, new[o], atol=1e-3)


def test_biases_go_by_the_map_of_their_matrix():
    """One Bq for [W B^T, b] (32, 49), whose rows are only 25 dimensions wide: two different maps would not fit."""
    small = make("qwen2")
    old, new = small.state_dict(), ligo.learn(small, batches(3), "width", 2).state_dict()
    B = torch.linalg.lstsq(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"]).solution.T
    for m in "qkv":
        name = f"model.layers.1.self_attn.{m}_proj."
        before = torch.cat((old[name + "weight"] @ B.T, old[name + "bias"][:, None]), 1)
        after = torch.cat((new[name + "weight"], new[name + "bias"][:, None]), 1)
        assert torch.allclose(after @ torch.linalg.pinv(before, rtol=1e-4) @ before, after, atol=1e-3)
        assert not torch.equal(new[name + "bias"][:32], old[name + "bias"])  # it has learned


def test_a_tensor_that_ligo_does_not_know_is_refused_by_name():
    small = make()
    small.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(40))
    for axis in grow.AXES:
        with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.bias"):
            ligo.learn(small, [], axis, 2)


def test_learn_on_a_folder_counts_what_it_read_and_spent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("The five boxing wizards jump quickly. " * 800)
    shape = ["--hidden-size", "32", "--num-hidden-layers", "2", "--context", "32", "--batch-tokens", "256"]
    assert train_py.main([*shape, "--data", "a.txt", "--tokens", "7680", "--out", "small"]) == 0
    capsys.readouterr()
    ligo.main("small big --axis depth --factor 2 --steps 8 --batch-tokens 256".split())
    out = capsys.readouterr().out
    was, began, ended = (float(n) for n in re.findall(r"(\d\.\d+) (?:the small|grown|after)", out))
    assert ended < began and was < began
    step = checkpoint.read_json("big/run.json")["lineage"][-1]
    assert step["tokens"] == step["data"]["a"]["tokens"] == 2048
    assert step["flops"] == 2048 * checkpoint.load("big").flops_per_token(32)
    assert train_py.main("--init big --tokens 512 --batch-tokens 256 --out child".split()) == 0
    _, sequence, read, _ = data.position(checkpoint.read_json("child/run.json")["lineage"], *parts("a.txt"))
    assert sequence == read["a"] == (7680 + 2048 + 512) // 32  # no window twice
    run = runs.read_run("child")
    assert run["D"] == 7680 + 2048 + 512 and run["flops_total"] > run["flops"] + step["flops"]


def parts(spec):
    tokenizer = load_tokenizer("bytes")
    return data.prepare(spec, tokenizer, context=32), 32, tokenizer.key


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "no steps": (dict(steps="0"), "0 is not a count"),
    "no such text": (dict(data="nowhere.txt"), "nowhere.txt"),
    "half a layer": (dict(factor="1.5"), "num_hidden_layers 3 times 1.5 is 4.5"),
    "layers of width": (dict(axis="width", factor=None, layers="0-2,0-2"), "layers are for depth"),
    "destination exists": (dict(target="small"), "exists (another name"),
    "no source": (dict(source="nothing"), "nothing is not a folder"),
    "another rate": (dict(lr="-1"), "-1 is out of range"),
    "a closed mask": (dict(source="masked"), "masked has a closed mask (first: python train.py --init masked"),
    "another tokenizer": (dict(source="other"), "makes ids up to 255 (the model knows 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(make(vocab_size=256), "small", load_tokenizer("bytes"))
    checkpoint.save(make(vocab_size=99), "other", load_tokenizer("bytes"))
    grow.grow_folder("small", "masked", "width", "random", 2, None, 1)
    before = sorted(tmp_path.rglob("*"))
    flags, words = BAD[case]
    flags = dict(axis="depth", factor="2") | flags
    argv = [flags.pop("source", "small"), flags.pop("target", "new/big")]
    argv += [part for k, v in flags.items() if v is not None for part in ("--" + k, v)]
    with pytest.raises(SystemExit) as left:
        ligo.main(argv)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and sorted(tmp_path.rglob("*")) == before
    last = err.strip().split("\n")[-1]
    assert last.startswith("ligo.py: error: ") and words in last


def test_maps_that_are_no_numbers_are_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(make(vocab_size=256), "small", load_tokenizer("bytes"))
    Path("a.txt").write_text("".join(map(str, range(9999))))
    with pytest.raises(ValueError, match="--lr 1e[+]30: the loss is no number"):
        ligo.learn_folder("small", "big", "depth", 2, None, 1, "a.txt", 2, 256, 1e30)
    assert not Path("big").exists()


def test_help_opens_with_the_commands(capsys):
    with pytest.raises(SystemExit):
        ligo.main(["--help"])
    out = capsys.readouterr().out
    assert out.index("python ligo.py SRC DST --axis depth") < out.index("--seed SEED") < out.index("--steps STEPS")
