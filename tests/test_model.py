"""The transformer against itself, against torch, and against counts by hand."""

import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IDS, SHAPES, make

import cpu
import model
from model import Config, Transformer


@pytest.mark.parametrize("name", SHAPES)
def test_cache_gives_the_same_greedy_text_as_none(name):
    module = make(name)
    prompt = IDS[0, :9].tolist()
    with_cache = list(model.generate(module, prompt, 20, temperature=0))
    assert with_cache == list(model.generate(module, prompt, 20, temperature=0, use_cache=False))
    assert len(with_cache) == 20


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
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_causal_attention_equals_torchs(T, heads, kv_heads, dtype, tolerance):
    wide = [torch.randn(2, h, T, 16, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads)]
    *qkv, dy = (t.to(dtype) for t in wide)
    *qkv64, dy64 = (t.double() for t in (*qkv, dy))  # after rounding
    for t in (*qkv, *qkv64):
        t.requires_grad_()
    ours = cpu.causal_attention(*qkv)
    theirs = torch.nn.functional.scaled_dot_product_attention(*qkv64, is_causal=True, enable_gqa=True)
    ours, theirs = (ours, *torch.autograd.grad(ours, qkv, dy)), (theirs, *torch.autograd.grad(theirs, qkv64, dy64))
    for a, b in zip(ours, theirs):
        assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max())


def test_gradients_by_hand_are_those_of_differences():
    x, gain = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5
    x.requires_grad_(), gain.requires_grad_()
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x, gain: cpu.RMSNorm.apply(x, gain, 1e-5), (x, gain))
    assert torch.autograd.gradcheck(lambda q, k, v: cpu.Attention.apply(q, k, v, 2), (q, k, v))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource, cpu, torch
faults = []
cpu.keep_memory()
for step in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**23) for _ in range(4)]  # 32 MiB each: 8,192 pages
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[-2:]))
"""
    root = Path(model.__file__).parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) < 100


def test_rotation_turns_a_pair_by_its_position():
    x = torch.randn(2, 5, 3, 8)  # (B, T, heads, head_dim)
    y = model.rotate(x, *model.rotation(Config(head_dim=8), torch.arange(5), "cpu"))
    a, b = x[:, 3, :, 0], x[:, 3, :, 4]  # the first pair, at position 3
    assert torch.allclose(y[:, 3, :, 0], a * math.cos(3) - b * math.sin(3), atol=1e-6)
    assert torch.allclose(y[:, 3, :, 4], b * math.cos(3) + a * math.sin(3), atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_rms_norm_equals_torchs_gradients_too(dtype, tolerance):
    x = torch.randn(6, 5, 32, dtype=torch.float64).to(dtype).requires_grad_()
    gain, dy = (torch.rand(32, dtype=torch.float64) + 0.5), torch.randn(6, 5, 32, dtype=torch.float64)
    ours = cpu.RMSNorm.apply(x, gain.to(dtype).requires_grad_(), 1e-5)
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


# ---- devices --------------------------------------------------------------------------------------------------------


def test_apples_gpu_is_taken_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.pick_device("auto").type == "cpu" and model.pick_device("mps").type == "mps"
