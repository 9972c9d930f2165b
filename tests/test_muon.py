"""Muon: its steps are torch's, matrix by matrix, whatever they are stored and batched in."""

import math

import pytest
import torch
from conftest import IDS, SHAPES, make
from torch.nn import Parameter

import muon
from muon import A, B, C, Muon, orthogonal

RANDOM = torch.Generator().manual_seed(1)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=RANDOM, dtype=dtype)


def train(optimizer, params, grads):
    """A step for each row of gradients in `grads`; returns the parameters after the last."""
    for row in grads:
        for p, g in zip(params, row):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def trained(weights, grads, name="{}", **how):
    """The same, with a Muon of its own for copies of the tensors `weights`. name: what each is called."""
    params = [Parameter(w.clone()) for w in weights]
    return train(Muon({name.format(i): p for i, p in enumerate(params)}, 0.02, **how), params, grads)


# ---- against torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=["fp32", "bf16"])
def test_twenty_steps_are_those_of_torchs_muon(dtype, most, monkeypatch):
    weights = [0.1 * randn(*shape) for shape in [(64, 64), (192, 64), (64, 192), (1, 64), (64, 64)]]
    grads = [[10**k * randn(*w.shape) for k, w in enumerate(weights)] for _ in range(20)]
    ours = trained(weights, grads, weight_decay=0.3, dtype=dtype)
    if dtype == torch.float32:  # torch's always rounds to bfloat16
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    params = [Parameter(w.clone()) for w in weights]
    theirs = torch.optim.Muon(params, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for a, b, w in zip(ours, train(theirs, params, grads), weights):
        assert (a - b).abs().max() < most < 0.05 < (a - w).abs().max()


# ---- U V^T ----------------------------------------------------------------------------------------------------------


def polynomial(s):
    return A * s + B * s**3 + C * s**5


def applied_five_times(s):
    for _ in range(5):
        s = polynomial(s)
    return s


def test_singular_values_from_a_hundredth_to_1_come_near_1():
    s = applied_five_times(torch.linspace(0.01, 1, 10001, dtype=torch.float64))
    assert 0.68 < s.min() < 0.69 and 1.13 < s.max() < 1.14


def test_the_example_of_the_docstring():
    assert polynomial(0.28) == pytest.approx(0.863, abs=5e-4) and polynomial(0.96) == pytest.approx(0.739, abs=5e-4)
    assert round(0.96 / 0.28, 1) == 3.4 and round(polynomial(0.28) / polynomial(0.96), 1) == 1.2
    G = torch.tensor([[[0.96, 0], [0, 0.28]]], dtype=torch.float64)
    assert torch.allclose(orthogonal(G), torch.diag(applied_five_times(G[0].diagonal())), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 40, 24), (3, 24, 40), (2, 1, 9), (2, 9, 1)])
def test_the_directions_stay_and_the_length_does_not_matter(shape):
    G = randn(*shape, dtype=torch.float64) * 10.0 ** torch.arange(-3, shape[0] - 3)[:, None, None]
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = applied_five_times(S / S.norm(dim=1, keepdim=True))
    assert torch.allclose(orthogonal(G), U * S[:, None] @ Vh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 64, 128), (3, 192, 64)])
def test_float32_is_enough_for_matrices_with_small_and_large_singular_values(shape):
    columns = shape[2]
    G = randn(*shape, dtype=torch.float64) @ (randn(columns, columns).double() * torch.logspace(0, -6, columns))
    exact = orthogonal(G)
    assert (orthogonal(G.float()) - exact).norm() < 1e-3 * exact.norm()


def test_zeros_stay_zeros_beside_other_matrices():
    O = orthogonal(torch.stack([torch.zeros(6, 4), randn(6, 4)]))
    assert (O[0] == 0).all() and O.isfinite().all() and O[1].norm() > 1


# ---- one matrix, many, experts --------------------------------------------------------------------------------------


def test_a_model_in_float64_is_updated_in_float64():
    w, g = randn(8, 6, dtype=torch.float64), randn(8, 6, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)  # the first look ahead is a multiple of the gradient
    O = U * applied_five_times(S / S.norm()) @ Vh
    (after,) = trained([w], [[g]], weight_decay=0.5)
    assert after.dtype == torch.float64
    assert torch.allclose(after, w - 0.02 * (0.2 * math.sqrt(8) * O + 0.5 * w), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name, rows, columns", [("gate_up_proj", 80, 16), ("gate_up_proj", 24, 48),
                                                 ("down_proj", 16, 40), ("down_proj", 48, 12)])  # fmt: skip
def test_experts_are_updated_as_so_many_matrices_and_gate_and_up_as_two(name, rows, columns):
    weights, grads = randn(3, rows, columns), [[randn(3, rows, columns)] for _ in range(3)]
    apart = lambda t: list(t.reshape(-1, rows // 2 if name == "gate_up_proj" else rows, columns))
    (packed,) = trained([weights], grads, name="{}." + name)
    single = trained(apart(weights), [apart(g) for (g,) in grads])
    assert len(single) == (6 if name == "gate_up_proj" else 3)
    assert torch.allclose(packed, torch.cat(single).view_as(packed), rtol=0, atol=1e-6)


def test_an_expert_without_tokens_only_decays():
    weights, grads = randn(3, 8, 6), [[randn(3, 8, 6)] for _ in range(4)]
    for (g,) in grads:
        g[1] = 0
    (after,) = trained([weights], grads, weight_decay=0.5)
    assert torch.allclose(after[1], weights[1] * (1 - 0.02 * 0.5) ** 4) and after.isfinite().all()
    assert all((after[e] - weights[e]).abs().max() > 0.02 for e in (0, 2))


def test_a_batch_holds_as_much_as_the_caches_and_changes_no_number():
    shapes = [(384, 384)] * 5 + [(96, 384)] * 2 + [(1024, 768), (384, 384)]
    weights = [randn(*shape) for shape in shapes]
    grads = [[randn(*shape) for shape in shapes]]
    groups = Muon({str(i): Parameter(w) for i, w in enumerate(weights)}, 0.02).param_groups
    assert [len(group["params"]) for group in groups] == [3, 3, 2, 1]  # and the last alone is more than 2^19
    together = trained(weights, grads)
    for i, w in enumerate(weights):
        (alone,) = trained([w], [[row[i]] for row in grads])
        assert torch.allclose(together[i], alone, rtol=0, atol=1e-6)


def test_a_parameter_without_gradient_is_left_alone():
    params = {"a": Parameter(randn(4, 4)), "b": Parameter(randn(4, 4)), "alone": Parameter(randn(4, 6))}
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = Muon(params, 0.02)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in params.items()) and not optimizer.state
    params["b"].grad = torch.ones(4, 4)
    optimizer.step()
    assert [n for n, p in params.items() if not torch.equal(p, before[n])] == ["b"]


# ---- which parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_has_the_matrices_of_attention_mlp_and_experts_and_no_others(shape):
    module = make(shape).train()
    named = dict(module.named_parameters())
    mlp = ["experts.gate_up_proj", "experts.down_proj"] if module.config.experts else [
           "gate_proj.weight", "up_proj.weight", "down_proj.weight"]  # fmt: skip
    of_layer = [f"self_attn.{m}_proj.weight" for m in "qkvo"] + [f"mlp.{m}" for m in mlp]
    matrices = muon.hidden(named)
    assert matrices.keys() == {f"model.layers.{i}.{m}" for i in range(2) for m in of_layer}
    assert all(matrices[n] is named[n] for n in matrices)
    optimizer = Muon(matrices, 0.02)
    assert {p for group in optimizer.param_groups for p in group["params"]} == {*matrices.values()}
    before = {n: p.detach().clone() for n, p in named.items()}
    _, loss, aux = module(IDS, IDS.roll(-1, 1))
    (loss + 0.01 * aux["balance_loss"] if aux else loss).backward()
    optimizer.step()
    assert {n for n, p in named.items() if not torch.equal(p, before[n])} == matrices.keys()
    assert all(p.isfinite().all() for p in named.values())
