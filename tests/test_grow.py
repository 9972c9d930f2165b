"""Growing keeps the function where it promises to, copies bit for bit where it stacks, and refuses the rest by name."""

import json
import os
import re

import pytest
import torch
from conftest import PUBLIC_KINDS, of_public_kind
from safetensors.torch import load_file, save_file

import checkpoint
import grow
import model
import operators
from model import Config, Transformer

SMALL = dict(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=4, head_dim=8, max_position_embeddings=64, qk_norm=False)  # fmt: skip
SHAPES = {
    "llama": {},
    "llama, grouped queries, tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "llama, one key-value head": dict(num_key_value_heads=1, head_dim=10),
    "qwen3": dict(qk_norm=True),
    "qwen3, grouped queries, tied": dict(qk_norm=True, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": dict(qkv_bias=True),
    "qwen2, grouped queries, tied": dict(qkv_bias=True, num_key_value_heads=2, tie_word_embeddings=True),
    "mixtral": dict(experts=4, top_k=2, num_key_value_heads=2),
    "mixtral, granularity 2, tied": dict(experts=3, top_k=2, granularity=2, tie_word_embeddings=True),
    "qwen3_moe, grouped queries": dict(experts=4, top_k=1, granularity=2, qk_norm=True, num_key_value_heads=2),
    "qwen3_moe, softmax over all": dict(experts=4, top_k=2, qk_norm=True, router="softmax-topk"),
}
EXACT = {
    "depth-zero": dict(axis="depth", operator="zero", factor=2),
    "depth-zero, a block after all": dict(axis="depth", operator="zero", layers=[0, 1, 2, 2]),
    "width-direct": dict(axis="width", operator="direct", factor=2),
    "width-direct, three copies": dict(axis="width", operator="direct", factor=3),
    "width-zero": dict(axis="width", operator="zero", factor=2),
    "width-zero, three times": dict(axis="width", operator="zero", factor=3),
    "depth-random": dict(axis="depth", operator="random", factor=2),
    "width-random": dict(axis="width", operator="random", factor=2),
    "width-random, three times": dict(axis="width", operator="random", factor=3),
}
ALL = {**EXACT, "depth-direct": dict(axis="depth", operator="direct", factor=2),
       "depth-direct, a list": dict(axis="depth", operator="direct", layers=[0, 1, 1, 2, 0])}  # fmt: skip
IDS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))


def make(name="llama", dtype=torch.float32, **more):
    """A model whose every weight matters, gains included; a large epsilon, so that a wrong one shows."""
    module = Transformer(Config(**{**SMALL, "rms_norm_eps": 0.03, **SHAPES[name], **more}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)  # fan-in 24: near 1 out of 1
            if n.endswith("norm.weight"):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
    return module.to(dtype).eval()


@torch.no_grad()
def logits(module, ids=IDS):
    return module(ids)[0]


def settings(**how):
    return dict(axis="depth", operator="direct", factor=2, layers=None, seed=1) | how


# ---- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("how", EXACT)
def test_zero_random_and_width_direct_keep_the_logits(how, name, dtype, tolerance):
    small = make(name, dtype)
    before = {n: t.clone() for n, t in small.state_dict().items()}
    big = grow.grow(small, **EXACT[how])
    assert big.num_parameters()["N"] > small.num_parameters()["N"] and not big.training
    assert (logits(big) - logits(small)).abs().max() < tolerance
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())


@pytest.mark.parametrize("name", ["llama, grouped queries, tied", "qwen3, grouped queries, tied", "mixtral"])
def test_width_zero_takes_any_factor_that_keeps_sizes_whole(name):
    big = grow.grow(make(name, torch.float64), "width", "zero", 1.5)
    assert (big.config.hidden_size, big.config.num_attention_heads, big.config.num_key_value_heads) == (36, 6, 3)
    assert (logits(big) - logits(make(name, torch.float64))).abs().max() < 1e-10


@pytest.mark.parametrize("name", SHAPES)
def test_stacked_layer_i_is_layer_i_mod_L_bit_for_bit(name):
    small, big = make(name), grow.grow(make(name), factor=3)
    assert len(big.model.layers) == 9
    for i, layer in enumerate(big.model.layers):
        for n, p in layer.named_parameters():
            assert torch.equal(p, small.model.layers[i % 3].get_parameter(n))
    for n in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(big.state_dict()[n], small.state_dict()[n])
    assert (big.lm_head.weight is big.model.embed_tokens.weight) == small.config.tie_word_embeddings


def test_stacking_is_running_the_stack_again():
    small, big = make(), grow.grow(make(), factor=2)
    small.model.layers = torch.nn.ModuleList([*small.model.layers, *small.model.layers])
    assert torch.equal(logits(small), logits(big))
    assert (logits(big) - logits(make())).abs().max() > 0.1  # another function: direct does not promise to keep it


def test_the_published_gains_and_epsilon_are_not_exact():
    """Of direct: sqrt(d/D) on every gain. Of zero: d/D in the official code, and the old epsilon in both."""
    small = make("qwen3", torch.float64)
    for operator, gain, eps in (("direct", 2**-0.5, 1), ("zero", 2**-0.5, 1), ("zero", 1, 2)):
        big = grow.grow(small, "width", operator, 2)
        for n, m in big.named_modules():
            if isinstance(m, model.RMSNorm):
                m.eps *= eps
                if not n.endswith(("q_norm", "k_norm")):
                    m.weight.data[: 48 if operator == "direct" else 24] *= gain
        assert (logits(big) - logits(small)).abs().max() > 0.01


def test_equal_experts_stay_equal_so_that_ties_fall_as_before():
    """Router rows in equal pairs, experts all different: a tie that fell otherwise would change the logits."""
    small = make("mixtral", torch.float64)
    for layer in small.model.layers:
        layer.mlp.gate.weight.data[1::2] = layer.mlp.gate.weight.data[::2]
    big = grow.grow(small, "width", "direct", 3)
    assert all(torch.equal(m.mlp.gate.weight[1::2], m.mlp.gate.weight[::2]) for m in big.model.layers)
    assert (logits(big) - logits(small)).abs().max() < 1e-10


def test_new_heads_get_the_biases_of_their_originals_or_none():
    small = make("qwen2")
    old = small.model.layers[2].self_attn
    names = ("direct", "zero", "random")
    direct, zero, random = (grow.grow(small, "width", o, 2).model.layers[2].self_attn for o in names)
    for n in ("q_proj.bias", "k_proj.bias", "v_proj.bias"):
        b = old.get_parameter(n)
        assert torch.equal(direct.get_parameter(n), torch.cat((b, b)))
        for attention in (zero, random):
            assert torch.equal(attention.get_parameter(n), torch.cat((b, torch.zeros_like(b))))


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("name", ["self_attn.o_proj.bias", "mlp.shared_expert_gate.weight", "mlp.gate.bias",
                                  "post_feedforward_layernorm.weight", "mlp.up_proj.bias"])  # fmt: skip
def test_a_tensor_that_growth_does_not_know_is_refused_by_name(name, how):
    with pytest.raises(ValueError, match=re.escape(name)):
        grow.growth(make().config, **ALL[how]).formula(f"model.layers.1.{name}")


def test_a_refusal_names_the_operators_of_the_axis_alone(monkeypatch):
    monkeypatch.setitem(grow.FORMULAS, ("depth", "half"), grow.depth)
    with pytest.raises(ValueError, match=r"operator is 'half' \(direct, zero, random\)"):
        grow.growth(make().config, "width", "half")


@pytest.mark.parametrize("how", ["depth-zero", "width-zero"])
def test_what_adds_nothing_yet_learns_from_the_first_steps(how):
    big = grow.grow(make("qwen3"), **EXACT[how])
    new = {n: p.clone() for n, p in big.named_parameters()}
    train(big, 3)
    assert all(not torch.equal(p, new[n]) for n, p in big.named_parameters())


def train(module, steps):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for i in range(steps):
        ids = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(i))
        ids[:, 1::2] = (ids[:, ::2] * 5 + 1) % 97  # something to learn
        loss = module(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def difference_of_copies(module):
    """Of hidden activations of the first MLP: rms of (copy - copy) over rms of (copy)."""
    seen = []
    handle = module.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(y))
    logits(module)
    handle.remove()
    a, b = seen[0].chunk(2, -1)
    return ((a - b).norm() / a.norm()).item()


def test_copies_drift_apart_in_50_steps():
    big = grow.grow(make("qwen3, grouped queries, tied"), "width", "direct", 2)
    assert difference_of_copies(big) < 1e-5
    train(big, 50)
    assert difference_of_copies(big) > 0.02
    a, b = big.model.embed_tokens.weight.chunk(2, -1)
    assert (a - b).abs().max() > 1e-3


def test_with_one_share_for_all_copies_would_stay_copies(monkeypatch):
    """alpha = 0.7, beta = 0.3 everywhere: proportional gradients, which Adam does not tell apart."""
    monkeypatch.setattr(model, "normal", lambda shape, *_: torch.full(shape, 0.8))
    big = grow.grow(make("qwen3"), "width", "direct", 2)
    train(big, 50)
    assert difference_of_copies(big) < 0.01


# ---- the list of layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("L, n, stacked, interpolated", [(8, 24, 91.3, 30.4), (6, 24, 87.0, 21.7), (3, 6, 80, 40)])
def test_connection_retention_is_that_of_the_paper(L, n, stacked, interpolated):
    assert 100 * grow.retention(grow.layer_map(L, "direct", n / L)) == pytest.approx(stacked, abs=0.05)
    assert 100 * grow.retention([i * L // n for i in range(n)]) == pytest.approx(interpolated, abs=0.05)


@pytest.mark.parametrize("first, again, times, last, R_c", [
    ("0-1", "2-5", 5, "4-5", 78.3), ("0-3", "4-5", 10, "", 60.9),
    ("", "0-2", 7, "3-5", 73.9), ("0-2", "3-5", 7, "", 73.9)])  # fmt: skip
def test_partial_stacking_has_the_retention_of_the_paper(first, again, times, last, R_c):
    layers = grow.ranges(",".join(filter(None, [first, *[again] * times, last])))
    assert len(layers) == 24 and 100 * grow.retention(layers) == pytest.approx(R_c, abs=0.05)


def test_layer_maps_are_those_of_the_docstring():
    assert grow.layer_map(8, "direct", 3) == [*range(8)] * 3
    assert grow.layer_map(8, "zero", 1.25) == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]  # LLaMA-Pro: one after every four
    assert grow.layer_map(3, "zero", 2) == [0, 0, 1, 1, 2, 2]
    solar = grow.ranges("0-23,8-31")
    assert solar == [*range(24), *range(8, 32)] == grow.layer_map(32, "direct", None, solar) and len(solar) == 48
    assert grow.retention(solar) == 46 / 47


def test_lineage_step_is_resolved():
    layers = [0, 1, 2, 0, 1, 2]
    step = {"step": "grow", "axis": "depth", "operator": "direct", "factor": 2, "layers": layers, "seed": 1}
    assert grow.lineage_step(Config(num_hidden_layers=3)) == step
    assert grow.lineage_step(Config(num_hidden_layers=3), layers=layers) == step
    assert grow.lineage_step(Config(), "width", "zero", 2, None, 5)["layers"] is None


# ---- the folder -----------------------------------------------------------------------------------------------------


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("how", ALL)
def test_folder_and_module_in_memory_get_the_same_weights(how, name, tmp_path):
    small = make(name)
    checkpoint.save(small, tmp_path / "small")
    grow.grow_folder(tmp_path / "small", tmp_path / "big", **settings(**ALL[how]))
    big, ours = checkpoint.load(tmp_path / "big"), grow.grow(small, **ALL[how])
    assert equal(big, ours) and big.config == ours.config
    assert {p.name for p in (tmp_path / "big").iterdir()} == {"config.json", "run.json", "model.safetensors"}


def test_what_is_larger_than_a_shard_is_written_in_shards(tmp_path):
    checkpoint.save(make(), tmp_path / "small")
    for name, shard in (("a", 20_000), ("b", 10**9)):
        grow.grow_folder(tmp_path / "small", tmp_path / name, **settings(axis="width"), shard_size=shard)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 10 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert max(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors")) < 25_000
    assert equal(checkpoint.load(tmp_path / "a"), checkpoint.load(tmp_path / "b"))
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in checkpoint.load(tmp_path / "a").parameters())


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_public_folders_grow_and_open_in_transformers(kind, how, tmp_path, transformers):
    small = of_public_kind(transformers, kind, hidden_size=24, intermediate_size=40, num_hidden_layers=3, head_dim=8)
    small.save_pretrained(tmp_path / "small", max_shard_size="40KB")
    grow.grow_folder(tmp_path / "small", tmp_path / "big", **settings(**ALL[how]), shard_size=50_000)
    big = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "big", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (big(IDS).logits - logits(checkpoint.load(tmp_path / "big"))).abs().max() < 1e-5
        if how in EXACT:
            assert (big(IDS).logits - small(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe, grouped queries"])
def test_experts_that_lie_in_one_tensor_are_read(name, tmp_path):
    small = make(name)
    checkpoint.save(small, tmp_path / "small")
    state = load_file(tmp_path / "small/model.safetensors")
    state = {n: t for n, t in state.items() if ".experts." not in n}
    state |= {n: t for n, t in small.state_dict().items() if ".experts." in n}
    save_file(state, tmp_path / "small/model.safetensors")
    grow.grow_folder(tmp_path / "small", tmp_path / "big", **settings(axis="width"))
    assert equal(checkpoint.load(tmp_path / "big"), grow.grow(small, "width", "direct", 2))


@pytest.mark.parametrize("axis, dtype, said", [("depth", "BF16", "bfloat16 as in the source"),
                                               ("width", "F32", "float32: not exact in the source's")])  # fmt: skip
@pytest.mark.parametrize("operator", ["direct", "zero"])
def test_bf16_stays_where_it_is_exact_and_becomes_fp32_where_not(axis, operator, dtype, said, tmp_path):
    checkpoint.save(make("qwen3", torch.bfloat16), tmp_path / "small")
    line = grow.grow_folder(tmp_path / "small", tmp_path / "big", **settings(axis=axis, operator=operator))
    assert said in line
    with checkpoint.opened(tmp_path / "big/model.safetensors") as f:
        assert {f.get_slice(n).get_dtype() for n in f.keys()} == {dtype}
    assert json.loads((tmp_path / "big/config.json").read_text())["dtype"] == {"F32": "float32"}.get(dtype, "bfloat16")
    if (axis, operator) != ("depth", "direct"):
        small, big = (checkpoint.load(tmp_path / n) for n in ("small", "big"))
        assert (logits(big) - logits(small)).abs().max() < 1e-5
        if axis == "width":
            assert equal(big, grow.grow(make("qwen3", torch.bfloat16), axis, operator))


def test_what_lies_beside_the_weights_comes_along(tmp_path, capsys):
    checkpoint.save(make(), tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "trainer.pt", "log.csv"):
        (tmp_path / "small" / name).write_text(name)
    command = "--axis depth --operator direct --factor 2 --source-tokens 2e12".split()
    grow.main([str(tmp_path / "small"), str(tmp_path / "new/big"), *command])
    out = capsys.readouterr().out
    assert "6 layers" in out and "float32 as in the source" in out and "train.py --init" in out
    assert {p.name for p in (tmp_path / "new/big").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors", "config.json",
        "run.json"}  # fmt: skip
    run = json.loads((tmp_path / "new/big/run.json").read_text())
    first = {"step": "source", "name": "small", "tokens": 2 * 10**12}
    assert run["lineage"] == [first, grow.lineage_step(make().config)]
    assert run["N"] == grow.grow(make()).num_parameters()["N"]


def test_lineage_of_a_run_goes_on(tmp_path):
    checkpoint.save(make(), tmp_path / "small", step=7)
    lineage = [{"step": "train", "tokens": 100, "flops": 1e9, "seed": 1, "data": {}, "settings": {"lr": 0.1}}]
    checkpoint.write_json(tmp_path / "small/run.json", {"tokenizer": "bytes", "step": 7, "lineage": lineage})
    grow.grow_folder(tmp_path / "small", tmp_path / "a", **settings())
    grow.grow_folder(tmp_path / "a", tmp_path / "b", **settings(axis="width", operator="zero", seed=4))
    run = json.loads((tmp_path / "b/run.json").read_text())
    assert run["tokenizer"] == "bytes" and run["lineage"][0] == lineage[0]
    assert [(s["axis"], s["operator"], s["seed"]) for s in run["lineage"][1:]] == [
        ("depth", "direct", 1), ("width", "zero", 4)]  # fmt: skip


# ---- bad input ------------------------------------------------------------------------------------------------------

COMMAND = dict(axis="depth", operator="direct", factor="2")
BAD = {
    "depth, half a layer": (dict(factor="1.5"), "num_hidden_layers 3 times 1.5 is 4.5"),
    "factor 1": (dict(factor="1"), "factor is 1 (above 1"),
    "factor below": (dict(factor="-2"), "-2 is out of range"),
    "factor no number": (dict(factor="two"), "--factor: invalid number value: 'two'"),
    "factor without end": (dict(factor="inf"), "inf is out of range"),
    "width, half a neuron": (dict(axis="width", factor="1.5"), "factor 1.5 is no whole number"),
    "width breaks heads": (dict(axis="width", operator="zero", factor="1.25", source="grouped"),
                           "num_key_value_heads 2 times 1.25 is 2.5"),
    "width breaks experts": (dict(axis="width", operator="zero", factor="1.25", source="moe"),
                             "granularity 4 does not divide intermediate_size 50"),
    "layer beyond": (dict(factor=None, layers="0-2,1-3"), "layer 3 is not in the source (its 3 layers are 0-2)"),
    "backwards": (dict(factor=None, layers="2-0"), "'2-0' is no layer"),
    "no layer": (dict(factor=None, layers="0-2,,1"), "'' is no layer"),
    "too few": (dict(factor=None, layers="0-1"), "2 layers do not grow a source of 3"),
    "zero leaves one out": (dict(operator="zero", factor=None, layers="0,1,1,0"), "operator zero keeps the function"),
    "zero in another order": (dict(operator="zero", factor=None, layers="1,0,2,2"), "operator zero keeps the function"),
    "layers of width": (dict(axis="width", factor=None, layers="0-2,0-2"), "layers are for depth"),
    "both": (dict(layers="0-2,0-2"), "not allowed with argument"),
    "neither": (dict(factor=None), "one of the arguments --factor --layers is required"),
    "no such operator": (dict(operator="magic"), "invalid choice: 'magic'"),
    "text for stacking": (dict(data="python"), "unrecognized arguments: --data python"),
    "no such axis": (dict(axis="height"), "invalid choice: 'height'"),
    "destination exists": (dict(target="small"), "exists (another name"),
    "no source": (dict(source="nothing"), "nothing is not a folder"),
    "no such public model": (dict(source="no-one/nothing"), "no-one/nothing is no folder, and the hub did not give it"),
    "another architecture": (dict(source="gpt2"), "model_type 'gpt2' is not supported"),
    "a tensor too many": (dict(source="extra"), "has, beyond its configuration, the tensor surplus"),
    "a tensor too few": (dict(source="lacking"), "lacks the tensor model.norm.weight"),
    "another shape": (dict(source="shape"), "model.norm.weight is F32 of shape (23,)"),
    "integers": (dict(source="integers"), "model.norm.weight is I64"),
    "half a file": (dict(source="torn"), "not a whole safetensors file"),
    "killed while saving": (dict(source="killed"), "first: python train.py --resume"),
    "no lineage": (dict(source="unlisted"), "has no lineage"),
    "tokens of a run": (dict(source="run", source_tokens="1e9"), "knows its own tokens"),
    "behind a closed mask": (dict(source="masked"), "masked has a closed mask"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of checkpoint folders, most of them spoilt."""
    root = tmp_path_factory.mktemp("sources")
    checkpoint.save(make(), root / "small")
    checkpoint.save(make("llama, grouped queries, tied"), root / "grouped")
    checkpoint.save(make("mixtral, granularity 2, tied", granularity=4), root / "moe")
    norm = "model.norm.weight"
    for name, change in {
        "extra": lambda s: s.update(surplus=torch.ones(1)), "lacking": lambda s: s.pop(norm),
        "shape": lambda s: s.update({norm: torch.ones(23)}), "integers": lambda s: s.update({norm: torch.arange(24)}),
    }.items():  # fmt: skip
        checkpoint.save(make(), root / name)
        state = load_file(root / name / "model.safetensors")
        change(state)
        save_file(state, root / name / "model.safetensors")
    for name, run in {"killed": {"step": 8}, "unlisted": {"lineage": {}}, "run": {}, "gpt2": {}, "torn": {}}.items():
        checkpoint.save(make(), root / name, step=7)
        checkpoint.write_json(root / name / "run.json", {"lineage": [{"step": "train"}]} | run)
    checkpoint.write_json(root / "gpt2/config.json", {"model_type": "gpt2"})
    os.truncate(root / "torn/model.safetensors", 5000)
    grow.grow_folder(root / "small", root / "masked", "width", "random", 2, None, 1)
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case, sources, monkeypatch, capsys):
    monkeypatch.chdir(sources)
    before = sorted(sources.rglob("*"))
    flags, words = BAD[case]
    flags = {**COMMAND, **flags}
    argv = [flags.pop("source", "small"), flags.pop("target", "new/big")]
    argv += [part for k, v in flags.items() if v is not None for part in ("--" + k.replace("_", "-"), v)]
    with pytest.raises(SystemExit) as left:
        grow.main(argv)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and sorted(sources.rglob("*")) == before
    last = err.strip().split("\n")[-1]
    assert last.startswith("grow.py: error: ") and words in last


def test_a_disk_without_room_is_refused_before_any_work(tmp_path, monkeypatch):
    checkpoint.save(make(), tmp_path / "small")
    monkeypatch.setattr(operators.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="make room"):
        grow.grow_folder(tmp_path / "small", tmp_path / "big", **settings())
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_an_interrupted_growth_leaves_nothing(tmp_path, monkeypatch):
    checkpoint.save(make(), tmp_path / "small")
    monkeypatch.setattr(operators.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / "small/tokenizer.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        grow.grow_folder(tmp_path / "small", tmp_path / "big", **settings())
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_help_opens_with_the_commands_and_every_flag_has_help(capsys):
    with pytest.raises(SystemExit):
        grow.main(["--help"])
    out = capsys.readouterr().out
    assert out.index("python grow.py SRC DST --axis depth") < out.index("--seed SEED") and "plan.py optimal" in out
