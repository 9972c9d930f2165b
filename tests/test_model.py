"""The transformer against `transformers` and against itself, its folder against the ways in which it can be broken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from model import Config, Transformer

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, head_dim=12, max_position_embeddings=64, qk_norm=False)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SHAPES = {
    "llama": {},
    "llama, grouped queries": dict(num_key_value_heads=2),
    "llama, one key-value head": dict(num_key_value_heads=1),
    "llama, wide odd head": dict(head_dim=22),
    "llama, tied": dict(tie_word_embeddings=True),
    "llama, scaled rope": dict(rope_scaling=LLAMA3, rope_theta=500000.0),
    "qwen3": dict(qk_norm=True),
    "qwen3, grouped, tied, wide": dict(qk_norm=True, num_key_value_heads=2, tie_word_embeddings=True, head_dim=20),
    "mixtral": dict(experts=4, top_k=2),
    "mixtral, granularity 2": dict(experts=3, top_k=2, granularity=2, num_key_value_heads=2),
    "qwen3_moe": dict(experts=4, top_k=1, granularity=2, qk_norm=True),
    "qwen3_moe, softmax over all": dict(experts=4, top_k=2, qk_norm=True, router="softmax-topk"),
}


def make(name, seed=1, **more):
    """A model whose every weight matters: gains and embeddings far from their initial values."""
    module = model.init_weights(Transformer(Config(**{**SMALL, **SHAPES[name], **more})), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if n.endswith("norm.weight"):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            elif "embed" in n or "lm_head" in n or "mlp.gate." in n:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return module.eval()



IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers_on_the_same_folder(name, tmp_path, transformers):
    ours = make(name)
    model.save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.model_type == name.split(",")[0]
    with torch.no_grad():
        assert (ours(IDS)[0] - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "mixtral", "qwen3_moe"])
def test_folders_that_transformers_writes_are_read(kind, tmp_path, transformers):
    more = dict(sliding_window=None) if kind in ("mistral", "mixtral") else {}
    if kind == "mixtral":
        more |= dict(num_local_experts=4, num_experts_per_tok=2)
    if kind == "qwen3_moe":
        more |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("one", "shards"):
        ours = model.load(tmp_path / folder)
        with torch.no_grad():
            assert (ours(IDS)[0] - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_cache_gives_the_same_greedy_text_as_none(name):
    module = make(name)
    prompt = IDS[0, :9].tolist()
    with_cache = list(model.generate(module, prompt, 20, temperature=0))
    assert with_cache == list(model.generate(module, prompt, 20, temperature=0, use_cache=False))
    assert len(with_cache) == 20


def test_greedy_text_equals_that_of_transformers(tmp_path, transformers):
    ours = make("qwen3, grouped, tied, wide")
    model.save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    text = theirs.generate(IDS[:1, :9], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(model.generate(ours, IDS[0, :9].tolist(), 20, temperature=0)) == text[0, 9:].tolist()


def test_sampling_follows_its_seed_top_k_and_top_p():
    module, prompt = make("llama"), [1, 2, 3]
    draw = lambda **more: list(model.generate(module, prompt, 30, **more))
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(seed=1, top_k=1) == draw(temperature=0) == draw(seed=2, top_p=1e-6)


def test_generation_stops_after_the_end_of_text():
    module = make("llama")
    third = list(model.generate(module, [1, 2, 3], 3, temperature=0))[-1]
    module.config.eos_token_id = [third]
    text = list(model.generate(module, [1, 2, 3], 10, temperature=0))
    assert text[-1] == third and len(text) <= 3


@pytest.mark.parametrize("name", SHAPES)
def test_save_then_load_is_bit_exact(name, tmp_path):
    ours = make(name)
    model.save(ours, tmp_path)
    again = model.load(tmp_path)
    assert vars(again.config) == vars(ours.config)
    for (n, a), (m, b) in zip(ours.state_dict().items(), again.state_dict().items()):
        assert n == m and torch.equal(a, b)


def test_dtype_of_loading_is_the_one_asked_for(tmp_path):
    model.save(make("llama, tied"), tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        module = model.load(tmp_path, dtype)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert module(IDS)[0].dtype == dtype


def test_loss_is_the_mean_cross_entropy_and_ignores_minus_100():
    module = make("llama")
    targets = IDS.roll(-1, 1)
    targets[:, -7:] = -100
    logits = module(IDS)[0]
    p = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(module(IDS, targets)[1], -p[targets != -100].mean(), atol=1e-5)


def test_sliced_head_equals_whole_head_gradients_too():
    module, losses = make("llama, tied"), []
    x = torch.randn(50, 48, requires_grad=True)
    for most in (2**28, 97 * 8):
        loss = module.cross_entropy(x, IDS.flatten()[:50], most)
        losses.append((loss, *torch.autograd.grad(loss, (x, module.lm_head.weight))))
    for whole, sliced in zip(*losses):
        assert torch.allclose(whole, sliced, atol=1e-6)


@pytest.mark.parametrize("T, heads, kv_heads", [(1, 2, 2), (5, 4, 2), (128, 2, 1), (300, 2, 2)])
def test_causal_attention_equals_torchs(T, heads, kv_heads):
    q, k, v = (torch.randn(2, h, T, 16, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    one = model.causal_attention(q, k, v)
    two = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    dy = torch.randn_like(one)
    for a, b in zip((one, *torch.autograd.grad(one, (q, k, v), dy)), (two, *torch.autograd.grad(two, (q, k, v), dy))):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_rms_norm_equals_torchs_gradients_too(dtype, tolerance):
    x = torch.randn(6, 5, 32, dtype=torch.float64).to(dtype).requires_grad_()
    gain, dy = (torch.rand(32, dtype=torch.float64) + 0.5), torch.randn(6, 5, 32, dtype=torch.float64)
    ours = model.RMSNormFunction.apply(x, gain.to(dtype).requires_grad_(), 1e-5)
    x64, gain64 = x.detach().double().requires_grad_(), gain.requires_grad_()
    theirs = torch.nn.functional.rms_norm(x64, (32,), gain64, 1e-5)
    dx = torch.autograd.grad(ours, x, dy.to(dtype))[0]
    dx64 = torch.autograd.grad(theirs, x64, dy)[0]
    for a, b in ((ours, theirs), (dx, dx64)):
        assert (a.double() - b).abs().max() < tolerance * b.abs().max()


def test_bf16_training_step_is_close_to_fp32():
    module, gradients = make("qwen3"), []
    targets = IDS.roll(-1, 1)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module(IDS, targets)[1]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_counts_and_flops_are_those_of_a_hand_count():
    c = Config(vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
               num_key_value_heads=1, head_dim=6, qk_norm=True, experts=4, top_k=2, granularity=2)  # fmt: skip
    attention, norms, mlp, router = 8 * 6 * (2 + 1 + 1 + 2), 8 + 8 + 6 + 6, 3 * 8 * 12, 8 * 4 * 2
    n = Transformer(c).num_parameters()
    assert n == {
        "N": 2 * (attention + norms + mlp) + 8,
        "N_active": 2 * (attention + norms + router + 2 * mlp) + 8,
        "N_total": 2 * (attention + norms + router + 4 * mlp) + 8,
        "embeddings": 2 * 10 * 8,
    }
    products = 2 * (attention + router + 2 * mlp) + 8 * 10
    assert Transformer(c).flops_per_token(16) == 6 * products + 12 * 2 * 2 * 6 * 16


def test_granularity_changes_neither_parameters_nor_expert_flops():
    one, four = (Transformer(Config(experts=8, granularity=g)) for g in (1, 4))
    router = 3 * 128 * 8
    assert four.num_parameters()["N_total"] - one.num_parameters()["N_total"] == 3 * router
    assert four.flops_per_token(64) - one.flops_per_token(64) == 6 * 3 * router
    assert one.num_parameters()["N"] == four.num_parameters()["N"] == Transformer(Config()).num_parameters()["N"]


def test_zero_experts_is_the_dense_model_and_shared_weights_do_not_depend_on_the_mlp():
    dense = model.init_weights(Transformer(Config()), 1).state_dict()
    mixture = model.init_weights(Transformer(Config(experts=4)), 1).state_dict()
    same = [n for n in dense if n in mixture]
    assert len(same) == len([n for n in dense if ".mlp." not in n])
    assert all(torch.equal(dense[n], mixture[n]) for n in same)


@pytest.mark.parametrize("router", ["topk-softmax", "softmax-topk"])
@pytest.mark.parametrize("K, G", [(1, 2), (2, 1), (2, 8), (4, 4)])
def test_mixture_starts_with_the_output_variance_of_the_dense_layer(router, K, G):
    c = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    dense = model.init_weights(Transformer(Config(**c)), 1).model.layers[0].mlp
    mixture = model.init_weights(Transformer(Config(**c, experts=8, top_k=K, granularity=G, router=router)), 1)
    x = torch.randn(1, 4096, 128)
    with torch.no_grad():
        ratio = mixture.model.layers[0].mlp(x)[0].var() / dense(x)[0].var()
    assert 0.8 < ratio < 1.2


# ---- broken folders -------------------------------------------------------------------------------------------------


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def shards(folder, name):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "architecture": (lambda f: edit(f, model_type="gpt2"), "'gpt2' is not supported"),
    "no hidden size": (lambda f: edit(f, hidden_size="gone"), "hidden_size is missing"),
    "sliding window": (lambda f: edit(f, sliding_window=4096), "sliding_window 4096"),
    "attention bias": (lambda f: edit(f, attention_bias=True), "attention_bias True"),
    "activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "rope kind": (lambda f: edit(f, rope_parameters={"rope_type": "yarn", "factor": 2}), "rope type 'yarn'"),
    "quantised": (lambda f: edit(f, quantization_config={"bits": 4}), "quantization_config"),
    "heads do not group": (lambda f: edit(f, num_key_value_heads=3), "cannot share 3"),
    "wrong shape": (lambda f: edit(f, vocab_size=98), "config.json says"),
    "missing layer": (lambda f: edit(f, num_hidden_layers=3), "lacks the tensor model.layers.2"),
    "extra layer": (lambda f: edit(f, num_hidden_layers=1), "has, beyond its configuration, the tensor model.layers.1"),
    "missing tensor": (lambda f: tensors(f, lambda s: s.pop("model.norm.weight")), "lacks the tensor model.norm"),
    "truncated": (lambda f: cut(f / "model.safetensors", 5000), "not a whole safetensors file"),
    "truncated header": (lambda f: cut(f / "model.safetensors", 4), "not a whole safetensors file"),
    "shard outside": (lambda f: shards(f, "../a.safetensors"), "outside the folder"),
    "shard missing": (lambda f: shards(f, "b.safetensors"), "b.safetensors is missing"),
    "partial index": (lambda f: shards(f, "a.safetensors"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_name(case, tmp_path):
    breaking, words = BROKEN[case]
    model.save(make("llama"), tmp_path)
    breaking(tmp_path)
    if words is None:
        model.load(tmp_path)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=words.replace(".", r"\.")):
        model.load(tmp_path)


def test_a_sliding_window_that_is_switched_off_is_none(tmp_path):
    model.save(make("qwen3"), tmp_path)
    edit(tmp_path, sliding_window=4096, use_sliding_window=False, max_window_layers=2)
    model.load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama, scaled rope"])
def test_older_and_newer_spelling_of_rope_and_dtype_mean_the_same(name, tmp_path):
    ours = make(name)
    model.save(ours, tmp_path)
    edit(tmp_path, rope_parameters="gone", dtype="gone")
    assert model.read_config(tmp_path) == ours.config
    model.save(ours, tmp_path)
    edit(tmp_path, rope_theta="gone", rope_scaling="gone", torch_dtype="gone")
    assert model.read_config(tmp_path) == ours.config


def test_softmax_over_all_without_qk_norm_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="--qk-norm"):
        Config(experts=4, router="softmax-topk", qk_norm=False).check()


def test_public_balancing_coefficient_is_converted(tmp_path):
    model.save(make("mixtral, granularity 2", balance_coef=0.06), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["router_aux_loss_coef"] == pytest.approx(0.06 / 4)
    assert model.read_config(tmp_path).balance_coef == pytest.approx(0.06)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    model.write_json(path, {"a": 1})
    with pytest.raises(OSError), model.replacing(path) as beside:
        beside.write_text("half")
        raise OSError("No space left on device")
    assert model.read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]
