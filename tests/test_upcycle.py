"""Upcycling: that nothing changes where nothing should, that what changes is what was asked for, and that a folder is
made whole or not at all."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import model
import upcycle
from model import Config, Transformer

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, max_position_embeddings=64)  # fmt: skip
IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(3))
MATRICES = ("gate_proj", "up_proj", "down_proj")


def make(dtype=torch.float32, **shape):
    """A dense model with large MLPs and embeddings, so that a wrong expert shows."""
    module = model.init_weights(Transformer(Config(**{**SMALL, "qk_norm": False, **shape})), 7)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.mul_(3 if "mlp" in name else 20 if "embed" in name or "head" in name else 1)
    return module.eval().to(dtype)


def logits(module):
    with torch.no_grad():
        return module(IDS)[0]


def experts(module, layer=0):
    """{matrix: (E G, ...)} of a mixture's layer."""
    part = module.model.layers[layer].mlp.experts
    gate, up = part.gate_up_proj.chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": part.down_proj}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)



# ---- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, dict(qk_norm=True), dict(tie_word_embeddings=True)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("E, K, G", [(1, 1, 2), (8, 2, 1), (5, 3, 1), (4, 2, 2), (8, 1, 8), (3, 2, 3), (2, 2, 96)])
def test_upcycled_model_equals_the_dense_one(E, K, G, dtype, tolerance, shape):
    dense = make(dtype, **shape)
    mixture = upcycle.upcycle(dense, E, K, granularity=G)
    difference = logits(mixture).sub(logits(dense)).abs().max() / logits(dense).abs().max()
    assert difference < tolerance and mixture.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("E, K, G", [(4, 2, 2), (8, 1, 8), (3, 2, 3), (16, 3, 4)])
def test_every_token_gets_whole_replicas(E, K, G):
    mixture = upcycle.upcycle(make(), E, K, granularity=G)
    x = torch.randn(20_000, 48)
    for layer in mixture.model.layers:
        chosen = layer.mlp.route(x)[1].sort().values.view(-1, K, G)
        assert (chosen == chosen[..., :1] // G * G + torch.arange(G)).all()


def test_cube_root_on_three_matrices_is_not_exact_and_no_scale_divides_by_the_granularity():
    dense, x = make(), torch.randn(2, 40, 48)
    mlp = lambda module: module.model.layers[0].mlp(x)[0].detach()
    whole = mlp(dense)
    exact, cube, none = (mlp(upcycle.upcycle(dense, 4, 2, granularity=8, scale=s)) for s in upcycle.SCALES)
    assert (exact - whole).norm() < 1e-5 * whole.norm() < 3e-2 * whole.norm() < (cube - whole).norm()
    assert (8 * none - whole).norm() < 1e-5 * whole.norm()


def test_softmax_over_all_is_exact_for_equal_logits_only():
    dense = make(qk_norm=True)
    zero, random = (upcycle.upcycle(dense, 8, 2, router="softmax-topk", router_std=s) for s in (0, 0.02))
    assert (logits(zero) - logits(dense)).abs().max() < 1e-5 * logits(dense).abs().max()
    assert (logits(random) - logits(dense)).abs().max() > 1e-3 * logits(dense).abs().max()


def test_router_rows_are_random_with_the_deviation_asked_for_and_tied_in_groups():
    mixture = upcycle.upcycle(make(), 64, 2, granularity=2, router_std=0.1)
    rows = mixture.model.layers[0].mlp.gate.weight.view(64, 2, 48)
    assert torch.equal(rows[:, 0], rows[:, 1]) and rows[:, 0].unique(dim=0).shape[0] == 64
    assert rows.std().item() == pytest.approx(0.1, rel=0.05) and abs(rows.mean().item()) < 0.01
    assert not torch.equal(rows, mixture.model.layers[1].mlp.gate.weight.view(64, 2, 48))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.73, 1.0])
def test_drop_redraws_exactly_the_share_from_the_statistics_of_what_is_dropped(ratio):
    dense = make(hidden_size=256, intermediate_size=512)
    with torch.no_grad():
        for p in dense.model.layers[0].mlp.parameters():
            p.add_(p.std())  # a mean that is not 0
    after = experts(upcycle.upcycle(dense, 3, 2, method="drop", drop_ratio=ratio))
    dropped = []
    for e in range(3):
        for matrix in MATRICES:
            old, new = dense.get_parameter(f"model.layers.0.mlp.{matrix}.weight"), after[matrix][e]
            old, new = (old.T, new.T) if matrix == "down_proj" else (old, new)  # rows are neurons
            changed = (old != new).any(1)
            assert changed.sum() == int(ratio * 512) and (old != new)[changed].float().mean() > 0.99
            old, new = old[changed], new[changed]
            assert abs(new.mean() - old.mean()) < 0.03 * old.std()
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.03)
            dropped.append(changed)
    for e in range(3):
        a, b, c = dropped[3 * e : 3 * e + 3]
        assert torch.equal(a, b) and torch.equal(a, c), "gate, up and down forget the same neurons"
    assert ratio == 1 or not torch.equal(dropped[0], dropped[3]), "another expert forgets others"


def test_noise_changes_exactly_the_share_by_the_deviation_asked_for():
    dense = make(hidden_size=256, intermediate_size=512)
    after = experts(upcycle.upcycle(dense, 2, 2, method="noise", noise_ratio=0.3, noise_std=0.05))
    for matrix in MATRICES:
        added = after[matrix][1] - dense.get_parameter(f"model.layers.0.mlp.{matrix}.weight")
        added = added.T if matrix == "down_proj" else added
        added = added[(added != 0).any(1)]
        assert len(added) == int(0.3 * 512)
        assert added.std().item() == pytest.approx(0.05, rel=0.03) and abs(added.mean().item()) < 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("nothing", [dict(drop_ratio=0), dict(noise_ratio=0), dict(noise_std=0)], ids=str)
def test_a_ratio_of_zero_is_a_copy_bit_for_bit(nothing, G, dtype):
    dense, method = make(dtype), next(iter(nothing)).split("_")[0]
    copy = upcycle.upcycle(dense, 4, 2, granularity=G)
    assert same(copy, upcycle.upcycle(dense, 4, 2, granularity=G, method=method, **nothing))


@pytest.mark.parametrize("method", ["noise", "drop"])
def test_weights_depend_on_the_seed_and_not_on_threads(method):
    dense, threads = make(hidden_size=256, intermediate_size=512), torch.get_num_threads()
    one = upcycle.upcycle(dense, 2, 2, method=method)
    try:
        torch.set_num_threads(3)
        assert same(one, upcycle.upcycle(dense, 2, 2, method=method))
    finally:
        torch.set_num_threads(threads)
    assert not same(one, upcycle.upcycle(dense, 2, 2, method=method, seed=2))


def test_redrawn_neurons_are_not_the_initial_weights_of_a_run_with_the_same_seed():
    dense = model.init_weights(Transformer(Config(**SMALL)), 1)
    after = experts(upcycle.upcycle(dense, 2, 2, method="drop", drop_ratio=1.0, seed=1))
    for matrix in MATRICES:
        old, new = dense.get_parameter(f"model.layers.0.mlp.{matrix}.weight").flatten(), after[matrix][0].flatten()
        assert abs(torch.corrcoef(torch.stack((old, new)))[0, 1]) < 0.1


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_copy_is_made_once_and_not_once_a_part(where, tmp_path, monkeypatch):
    made, original = [], upcycle.copy
    monkeypatch.setattr(upcycle, "copy", lambda *args, **more: made.append(args[1:]) or original(*args, **more))
    recipe = dict(granularity=8, method="noise")
    if where == "memory":
        upcycle.upcycle(make(torch.bfloat16), 3, 2, **recipe)
    else:
        checkpoint.save(make(torch.bfloat16), tmp_path / "a")
        upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", 3, 2, **recipe)
    assert sorted(made) == sorted((m, layer, e) for m in MATRICES for layer in range(2) for e in range(3))


def test_the_dense_module_stays_as_it_was_and_shares_nothing():
    dense, before = make(), make()
    mixture = upcycle.upcycle(dense.train(), 4, 2)
    assert mixture.training and all(p.requires_grad for p in mixture.parameters())
    with torch.no_grad():
        for p in mixture.parameters():
            p.zero_()
    assert same(dense, before)


# ---- a mixture as the source ----------------------------------------------------------------------------------------

SOFTMAX_OVER_ALL = dict(router="softmax-topk", qk_norm=True)


def trained(dtype=torch.float32, **shape):
    """A mixture of 4 experts that differ, 2 a token, with logits far from each other."""
    module = make(dtype, **dict(experts=4, top_k=2) | shape)
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.gate.weight.normal_(generator=torch.Generator().manual_seed(5))
    return module


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("shape", [{}, dict(granularity=3), dict(qk_norm=True), SOFTMAX_OVER_ALL], ids=str)
def test_copies_of_a_mixture_with_as_many_times_the_top_k_are_the_same_function(shape, m, dtype, tolerance):
    mixture = trained(dtype, **shape)
    more = upcycle.upcycle(mixture, 4 * m, 2 * m)
    difference = logits(more).sub(logits(mixture)).abs().max() / logits(mixture).abs().max()
    assert difference < tolerance and more.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("shape", [{}, SOFTMAX_OVER_ALL], ids=str)
def test_with_the_same_top_k_a_token_gets_copies_of_its_best_expert_and_loses_the_second(shape):
    mixture, x = trained(**shape), torch.randn(1000, 48)
    more = upcycle.upcycle(mixture, 8, 2)
    for old, new in zip(mixture.model.layers, more.model.layers):
        best = old.mlp.route(x)[1][:, :1]
        assert torch.equal(new.mlp.route(x)[1].sort().values, torch.cat((2 * best, 2 * best + 1), 1))
    assert (logits(more) - logits(mixture)).abs().max() > 1e-2 * logits(mixture).abs().max()


def test_with_one_expert_a_token_nothing_is_lost_when_the_top_k_stays():
    mixture = trained(top_k=1, **SOFTMAX_OVER_ALL)
    more = upcycle.upcycle(mixture, 8, 1)
    assert (logits(more) - logits(mixture)).abs().max() < 1e-5 * logits(mixture).abs().max()


@pytest.mark.parametrize("more", [dict(experts=8, top_k=4), dict(experts=12, top_k=6)], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_moe, softmax over all"])
def test_a_public_mixture_of_more_experts_equals_the_original_in_transformers(kind, more, tmp_path, transformers):
    qwen = dict(num_experts=4, moe_intermediate_size=96, norm_topk_prob="all" not in kind, mlp_only_layers=[])
    shape = SMALL | (dict(num_local_experts=4, sliding_window=None) if kind == "mixtral" else qwen)
    config = transformers.AutoConfig.for_model(
        kind.split(",")[0], **shape, num_experts_per_tok=2, tie_word_embeddings=False
    )
    torch.manual_seed(1)
    public = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in public.named_parameters():
            p.mul_(1 if "norm" in name else 8)
    public.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", **more, shard_size=100_000)
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    assert type(grown) is type(public) and grown.config.num_experts_per_tok == more["top_k"]
    with torch.no_grad():
        expected, got = public(IDS).logits, grown(IDS).logits
    assert expected.std() > 0.1 and (got - expected).abs().max() < 1e-4
    assert (logits(checkpoint.load(tmp_path / "b")) - expected).abs().max() < 1e-4


MIXTURES = {
    "copy": {},
    "same top-k": dict(top_k=2),
    "softmax over all": dict(top_k=2, shape=SOFTMAX_OVER_ALL),
    "router": dict(router_std=0.5),
    "drop, granularity": dict(method="drop", shape=dict(granularity=3)),
    "noise": dict(method="noise", noise_std=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURES)
def test_folder_of_a_mixture_equals_memory_bit_for_bit(name, dtype, tmp_path):
    recipe = dict(top_k=4) | MIXTURES[name]
    checkpoint.save(trained(dtype, **recipe.pop("shape", {})), tmp_path / "a")
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", 8, **recipe)
    folder, memory = checkpoint.load(tmp_path / "b"), upcycle.upcycle(checkpoint.load(tmp_path / "a"), 8, **recipe)
    assert same(folder, memory) and folder.config == memory.config
    stored = {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()}
    assert stored == {torch.float32 if name == "noise" else dtype}


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("options", [dict(method="drop"), dict(method="noise"), dict(router_std=0.1)], ids=str)
def test_the_first_copy_stays_as_it_is_and_the_others_change(options, G):
    mixture = trained(granularity=G)
    more = upcycle.upcycle(mixture, 12, 6, **options)
    rows = more.model.layers[0].mlp.gate.weight.view(4, 3, G, 48)
    parts = {"gate": rows} if "router_std" in options else experts(more)
    for matrix, t in parts.items():
        old = mixture.model.layers[0].mlp.gate.weight if matrix == "gate" else experts(mixture)[matrix]
        t, old = t.reshape(4, 3, G, -1), old.reshape(4, G, -1)
        assert torch.equal(t[:, 0], old)
        assert not any((a == b).all(-1).any() for a, b in ((t[:, 1], old), (t[:, 2], old), (t[:, 1], t[:, 2])))


def test_a_second_upcycling_with_the_same_seed_draws_other_numbers():
    one = upcycle.upcycle(make(), 4, 2, router_std=1.0)
    two = upcycle.upcycle(one, 8, 4, router_std=1.0)
    first, second = one.model.layers[0].mlp.gate.weight, two.model.layers[0].mlp.gate.weight
    added = second[1::2] - first
    assert abs(torch.corrcoef(torch.cat((added, first)))[:4, 4:]).max() < 0.6


@pytest.mark.parametrize("top_k", [2, 4])
def test_equal_copies_stay_equal_in_training_until_something_tells_them_apart(top_k):
    def apart(**options):
        """How far the copies are from each other after ten steps, next to how far they went."""
        before = upcycle.upcycle(trained(), 8, top_k, **options)
        after = upcycle.upcycle(trained(), 8, top_k, **options).train()
        optimizer = torch.optim.AdamW(after.parameters(), 1e-3)
        for _ in range(10):
            _, loss, aux = after(IDS, IDS)
            (loss + 0.01 * aux["balance_loss"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = experts(after)["up_proj"] - experts(before)["up_proj"]
        return ((moved[::2] - moved[1::2]).norm() / moved.norm()).item()

    assert apart() < 1e-6 < 0.05 < min(apart(router_std=0.1), apart(method="drop"), apart(method="noise"))


def test_the_source_may_be_a_public_models_name(tmp_path, monkeypatch):
    cached = tmp_path / "models--org--name"
    checkpoint.save(make(), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    upcycle.upcycle_folder("org/name", tmp_path / "b", 4, 2)
    assert same(checkpoint.load(tmp_path / "b"), upcycle.upcycle(make(), 4, 2))
    assert json.loads((tmp_path / "b" / "run.json").read_text())["lineage"][0]["name"] == "org/name"


@pytest.mark.parametrize("flags, words", [
    ("--experts 6", r"experts is 6, and the mixture has 4 \(8, 12 or another multiple\)"),
    ("--experts 2", "experts is 2"),
    ("--top-k 3", r"top_k is 3 \(2 as before, or 4 for the same function"),
    ("--granularity 2", "granularity is 2, and that of the mixture 1"),
    ("--router softmax-topk", "router is 'softmax-topk', and that of the mixture 'topk-softmax'"),
])  # fmt: skip
def test_what_makes_no_sense_for_a_mixture_is_refused_by_name(flags, words, tmp_path, capsys):
    checkpoint.save(trained(), tmp_path / "a")
    with pytest.raises(SystemExit) as left:
        upcycle.main([str(tmp_path / "a"), str(tmp_path / "b"), *f"--experts 8 --top-k 2 {flags}".split()])
    assert left.value.code == 2 and re.search(words, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["mlp.shared_expert.up_proj.weight", "mlp.gate.bias", "mlp.experts.0.up_proj.bias",
                                  "self_attn.q_proj.bias", "mlp.up_proj.weight", "mlp.w1.weight"])  # fmt: skip
def test_a_tensor_without_a_rule_is_an_error(name):
    formula = upcycle.operator(Config(**SMALL), 4, 2).formula
    with pytest.raises(ValueError, match=f"no rule for the tensor model.layers.0.{name}"):
        formula(f"model.layers.0.{name}")


def test_biases_of_queries_keys_and_values_are_refused_by_name(tmp_path, capsys):
    words = "no public format holds biases of q, k and v beside a mixture"
    with pytest.raises(ValueError, match=words):
        upcycle.upcycle(make(qkv_bias=True), 4, 2)
    checkpoint.save(make(qkv_bias=True), tmp_path / "a")
    with pytest.raises(SystemExit):
        upcycle.main([str(tmp_path / "a"), str(tmp_path / "b"), *"--experts 4 --top-k 2".split()])
    assert words in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "b").exists()


# ---- the folder -----------------------------------------------------------------------------------------------------

RECIPES = {
    "copy": {},
    "tied embeddings": {},
    "granularity": dict(granularity=4),
    "granularity 3": dict(granularity=3),
    "cube root": dict(granularity=2, scale="cube-root"),
    "drop": dict(method="drop", drop_ratio=0.3, seed=5),
    "drop, granularity": dict(method="drop", granularity=2),
    "noise": dict(method="noise", noise_ratio=0.3, noise_std=0.1, seed=5),
    "softmax over all": dict(router="softmax-topk", granularity=2, router_std=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RECIPES)
def test_folder_equals_memory_bit_for_bit(name, dtype, tmp_path):
    dense = make(dtype, qk_norm=name == "softmax over all", tie_word_embeddings=name[:4] == "tied")
    checkpoint.save(dense, tmp_path / "a")
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", 3, 2, **RECIPES[name])
    folder = checkpoint.load(tmp_path / "b")
    memory = upcycle.upcycle(checkpoint.load(tmp_path / "a"), 3, 2, **RECIPES[name])
    assert same(folder, memory)
    assert folder.config == dataclasses.replace(memory.config, capacity_factor=None)
    stored = {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()}
    kept = name not in ("granularity 3", "cube root", "noise", "softmax over all")
    assert stored == {dtype if kept else torch.float32}
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["dtype"] == str(dtype if kept else torch.float32).removeprefix("torch.")


@pytest.mark.parametrize("more", [dict(experts=4, top_k=2), dict(experts=4, top_k=1, granularity=4)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_folder_in_transformers_equals_the_dense_original_in_transformers(kind, more, tmp_path, transformers):
    shape = {k: v for k, v in SMALL.items()} | (dict(sliding_window=None) if kind == "mistral" else {})
    config = transformers.AutoConfig.for_model(kind, **shape, tie_word_embeddings=False)
    torch.manual_seed(1)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.mul_(1 if "norm" in name else 8)
    dense.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", **more, shard_size=100_000)
    mixture = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    assert mixture.config.model_type == ("qwen3_moe" if kind == "qwen3" else "mixtral")
    with torch.no_grad():
        expected, got = dense(IDS).logits, mixture(IDS).logits
    assert expected.std() > 0.1 and (got - expected).abs().max() < 1e-4
    assert (logits(checkpoint.load(tmp_path / "b")) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shard_size", [1, 40_000, 200_000])
def test_shards_hold_what_one_file_holds(shard_size, tmp_path):
    checkpoint.save(make(), tmp_path / "a")
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "one", 3, 2, method="drop", granularity=2)
    upcycle.upcycle_folder(
        tmp_path / "a", tmp_path / "many", 3, 2, method="drop", granularity=2, shard_size=shard_size
    )
    one, many = load_file(tmp_path / "one" / "model.safetensors"), {}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    for i, path in enumerate(files):
        assert path.name == f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        part = load_file(path)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= shard_size
        assert all(index["weight_map"][name] == path.name for name in part)
        many |= part
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[n], many[n]) for n in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert same(checkpoint.load(tmp_path / "one"), checkpoint.load(tmp_path / "many"))


def test_spare_tensors_and_mixed_dtypes_of_public_folders_are_read(tmp_path):
    dense = make(tie_word_embeddings=True)
    checkpoint.save(dense, tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    state = {n: t if "norm" in n else t.bfloat16() for n, t in state.items()}
    state |= {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", 3, 2)
    assert same(checkpoint.load(tmp_path / "b"), upcycle.upcycle(checkpoint.load(tmp_path / "a"), 3, 2))


def test_tokenizer_and_generation_files_are_copied_along_and_code_is_not(tmp_path):
    checkpoint.save(make(), tmp_path / "a")
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "merges.txt",
             "vocab.json", "chat_template.jinja", "generation_config.json", "LICENSE"]  # fmt: skip
    for name in [*names, "modeling_x.py", "trainer.pt", "log.csv", "README.md"]:
        (tmp_path / "a" / name).write_text(name)
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", 3, 2)
    found = {p.name for p in (tmp_path / "b").iterdir()}
    assert found == {*names, "model.safetensors", "config.json", "run.json"}
    assert (tmp_path / "b" / "tokenizer.model").read_text() == "tokenizer.model"


def test_lineage_of_a_public_folder_names_the_source(tmp_path):
    checkpoint.save(make(), tmp_path / "Some-1B")
    upcycle.upcycle_folder(tmp_path / "Some-1B", tmp_path / "b", 8, 2, source_tokens=2e12)
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    step = {"step": "upcycle", "experts": 8, "top_k": 2, "granularity": 1, "method": "copy", "seed": 1}
    assert run["lineage"][0] == {"step": "source", "name": "Some-1B", "tokens": 2_000_000_000_000}
    assert run["lineage"][1].items() >= step.items() and len(run["lineage"]) == 2
    assert run["N_total"] == checkpoint.load(tmp_path / "b").num_parameters()["N_total"]
    upcycle.upcycle_folder(tmp_path / "Some-1B", tmp_path / "c", 8, 2)
    assert json.loads((tmp_path / "c" / "run.json").read_text())["lineage"][0]["tokens"] is None


def test_lineage_of_our_own_folder_goes_on(tmp_path):
    checkpoint.save(make(), tmp_path / "a", step=12)
    trained = {"step": "train", "tokens": 1000, "flops": 1e9, "seed": 1, "data": {}, "settings": {}}
    checkpoint.write_json(tmp_path / "a" / "run.json", {"tokenizer": "bytes", "step": 12, "lineage": [trained]})
    upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", 4, 2, method="drop", drop_ratio=0.25, seed=3)
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["tokenizer"] == "bytes" and run["lineage"][0] == trained
    assert run["lineage"][1] == upcycle.operator(Config(**SMALL), 4, 2, method="drop", drop_ratio=0.25, seed=3).entry
    assert run["lineage"][1]["drop_ratio"] == 0.25 and "noise_std" not in run["lineage"][1]


def test_a_method_may_have_the_name_of_a_field_and_the_lineage_keeps_that_field(monkeypatch):
    monkeypatch.setitem(upcycle.METHODS, "scale", upcycle.noise)
    entry = upcycle.operator(Config(**SMALL), 4, 2).entry
    assert entry["scale"] == "exact" and "noise_std" not in entry


def test_eight_by_two_is_parsed():
    assert upcycle.parse("8x2") == (8, 2) and upcycle.parse("64x16") == (64, 16)
    for text in ("8", "8x", "x2", "8x2x1", "-8x2", "8 x 2", ""):
        with pytest.raises(ValueError, match="such as 8x2"):
            upcycle.parse(text)


# ---- what is refused ------------------------------------------------------------------------------------------------


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def point(folder, shard):
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mixture(folder):
    checkpoint.save(upcycle.upcycle(make(), 4, 2), folder)


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def killed(folder):
    checkpoint.save(make(), folder, step=20)
    checkpoint.write_json(folder / "run.json", {"step": 10, "lineage": [{"step": "train"}]})


def own(folder):
    checkpoint.write_json(folder / "run.json", {"lineage": [{"step": "train"}]})


nothing = lambda folder: None
MANY = {"step": "train", "tokens": "many"}
BAD = {  # name: (what happens to the source, flags, words of the message)
    "as many experts as the mixture": (mixture, "", r"experts is 4, and the mixture has 4 \(8, 12 or"),
    "no folder": (shutil.rmtree, "", "is not a folder"),
    "another kind": (lambda f: edit(f, model_type="gpt2"), "", "'gpt2' is not supported"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "", "holds no weights"),
    "shard missing": (lambda f: point(f, "b.safetensors"), "", "b.safetensors is missing"),
    "shard outside": (lambda f: point(f, "../a.safetensors"), "", "outside the folder"),
    "half a file": (cut, "", "not a whole safetensors file"),
    "tensor missing": (lambda f: tensors(f, lambda s: s.pop("model.norm.weight")), "", "lacks the tensor model.norm"),
    "tensor extra": (lambda f: edit(f, num_hidden_layers=1), "", "has, beyond its configuration"),
    "tensor of another shape": (lambda f: edit(f, vocab_size=98), "", r"weight is F32 of shape \(97, 48\)"),
    "whole numbers": (lambda f: tensors(f, lambda s: [s.update({n: s[n].char()}) for n in s]), "", "is I8 of shape"),
    "killed while saving": (killed, "", "train.py --resume --out"),
    "a torn run.json": (lambda f: checkpoint.write_json(f / "run.json", {"lineage": []}), "", "has no lineage"),
    "tokens in words": (lambda f: checkpoint.write_json(f / "run.json", {"lineage": [MANY]}), "", "tokens 'many'"),
    "tokens of our own": (own, "--source-tokens 1e9", "leave it out: it is for a public source"),
    "negative tokens": (nothing, "--source-tokens -1", "source_tokens is -1.0"),
    "no experts": (nothing, "--experts 0", "experts is 0"),
    "top-k above experts": (nothing, "--top-k 5", "top_k 5 is more than there are experts, 4"),
    "top-k 0": (nothing, "--top-k 0", "top_k is 0"),
    "one expert a token": (nothing, "--top-k 1", "without gradient"),
    "granularity": (nothing, "--granularity 5", "granularity 5 does not divide intermediate_size 96"),
    "softmax over all": (nothing, "--router softmax-topk", "without QK-norm"),
    "zero router": (nothing, "--granularity 2 --router-std 0", "router_std above 0, such as 0.02"),
    "router std": (nothing, "--router-std -1", "router_std is -1.0"),
    "router std nan": (nothing, "--router-std nan", "router_std is nan"),
    "drop ratio": (nothing, "--method drop --drop-ratio 1.5", "drop_ratio is 1.5"),
    "noise ratio": (nothing, "--method noise --noise-ratio nan", "noise_ratio is nan"),
    "noise std": (nothing, "--method noise --noise-std inf", "noise_std is inf"),
    "shard size": (nothing, "--shard-size 0", "shard_size is 0.0"),
    "another method's flag": (nothing, "--drop-ratio 0.2", "no use with --method copy"),
    "unknown method": (nothing, "--method melt", "invalid choice: 'melt'"),
    "abbreviation": (nothing, "--gran 2", "unrecognized arguments"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    change, flags, words = BAD[case]
    checkpoint.save(make(), tmp_path / "a")
    change(tmp_path / "a")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    argv = [str(tmp_path / "a"), str(tmp_path / "new" / "b"), "--experts", "4", "--top-k", "2", *flags.split()]
    with pytest.raises(SystemExit) as left:
        upcycle.main(argv)
    lines = capsys.readouterr().err.strip().split("\n")
    assert left.value.code == 2 and lines[-1].startswith("upcycle.py: error: ") and re.search(words, lines[-1])
    assert len(lines) == 2 and lines[0].startswith("usage: ")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", ["folder", "file", "dangling link", "the source"])
def test_a_destination_that_exists_is_refused(there, tmp_path):
    checkpoint.save(make(), tmp_path / "a")
    dst = tmp_path / ("a" if there == "the source" else "b")
    if there == "folder":
        dst.mkdir()
    elif there == "file":
        dst.write_text("x")
    elif there == "dangling link":
        dst.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists"):
        upcycle.upcycle_folder(tmp_path / "a", dst, 4, 2)
    assert {p.name for p in tmp_path.iterdir()} <= {"a", "b"}


def test_python_raises_with_the_words_of_the_command(tmp_path, capsys):
    checkpoint.save(make(), tmp_path / "a")
    with pytest.raises(ValueError) as raised:
        upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", 4, 2, granularity=5)
    with pytest.raises(ValueError) as in_memory:
        upcycle.upcycle(make(), 4, 2, granularity=5)
    with pytest.raises(SystemExit):
        upcycle.main([str(tmp_path / "a"), str(tmp_path / "b"), *"--experts 4 --top-k 2 --granularity 5".split()])
    assert str(raised.value) == str(in_memory.value)
    assert capsys.readouterr().err.endswith(f"upcycle.py: error: {raised.value}\n")
    for unknown in (dict(method="melt"), dict(scale="half"), dict(router="top")):
        with pytest.raises(ValueError, match=next(iter(unknown.values()))):
            upcycle.upcycle(make(), 4, 2, **unknown)


def test_copies_of_a_cut_mixture_that_tie_are_not_chosen_among(tmp_path):
    """A program that breaks ties otherwise would add up parts of several copies."""
    cut = upcycle.upcycle(make(), 4, 2, granularity=2)
    with pytest.raises(ValueError, match="parts of several equal copies .*or top_k 8"):
        upcycle.upcycle(cut, 16, 2)
    for recipe in (dict(top_k=2, router_std=0.02), dict(top_k=8)):
        upcycle.upcycle(cut, 16, **recipe)


def test_too_little_disk_is_noticed_before_anything_is_written(tmp_path):
    F = 2**22  # a hole in a sparse file: a header, and bytes that take no room
    config = Config(**{**SMALL, "intermediate_size": F, "num_hidden_layers": 1, "qk_norm": False})
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    header, at = {}, 0
    for name, t in state.items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [at, at := at + 2 * t.numel()]}
    header = json.dumps(header).encode()
    (tmp_path / "a").mkdir()
    checkpoint.write_json(tmp_path / "a" / "config.json", checkpoint.public_config(config, torch.bfloat16))
    with open(tmp_path / "a" / "model.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + at)
    enough = shutil.disk_usage(tmp_path).free // (3 * 2 * 48 * F) + 1
    with pytest.raises(ValueError, match=r"needs \d+\.\d+ GB, and .* has .* \(make room\)"):
        upcycle.upcycle_folder(tmp_path / "a", tmp_path / "b", enough + 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_nothing(tmp_path):
    checkpoint.save(make(), tmp_path / "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        upcycle.upcycle_folder(tmp_path / "a", tmp_path / "file" / "b", 4, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "file"}


def test_killed_halfway_there_is_no_folder_under_the_final_name(tmp_path):
    checkpoint.save(make(hidden_size=64, intermediate_size=1024), tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    for number, status in {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}.items():
        argv = [str(tmp_path / "a"), str(tmp_path / number.name), *"--experts 200 --top-k 2 --method drop".split()]
        process = multiprocessing.get_context("fork").Process(target=upcycle.main, args=(argv,))
        process.start()
        while not list(tmp_path.glob(f"{number.name}.partial-*/*")) and process.is_alive():
            time.sleep(0.002)
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == status
    left = sorted(p.name.split("-")[0] for p in tmp_path.iterdir())
    assert left == ["SIGKILL.partial", "a"] and (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_the_command_writes_a_folder_and_says_so(tmp_path, capsys):
    checkpoint.save(make(torch.bfloat16), tmp_path / "a")
    upcycle.main([str(tmp_path / "a"), str(tmp_path / "b"), *"--experts 4 --top-k 2 --granularity 2".split()])
    said = capsys.readouterr()
    assert "8 experts of width 48, 4 a token" in said.out and "bfloat16" in said.out and said.err == ""
    assert same(checkpoint.load(tmp_path / "b"), upcycle.upcycle(checkpoint.load(tmp_path / "a"), 4, 2, granularity=2))
    upcycle.main([str(tmp_path / "b"), str(tmp_path / "more"), *"--experts 8 --top-k 4".split()])
    assert "16 experts of width 48, 8 a token" in (said := capsys.readouterr().out) and "stay equal" in said
    steps = json.loads((tmp_path / "more" / "run.json").read_text())["lineage"]
    assert [(s.get("experts"), s.get("granularity")) for s in steps] == [(None, None), (4, 2), (8, 2)]
