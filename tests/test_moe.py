"""Claims about the mixture-of-experts layer of moe.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import moe

BOTH = pytest.mark.parametrize("router", moe.ROUTERS)
FAST = pytest.mark.parametrize("fast", [moe.loop, moe.grouped], ids=["loop", "grouped"])


def layer(D=32, width=64, experts=4, top_k=2, G=1, router="topk-softmax", C=None, dtype=torch.float32, seed=0):
    """A layer filled with normals: a small router, experts as wide as a dense layer's, down_proj times output_scale."""
    torch.manual_seed(seed)
    m = moe.MoE(D, width, experts, top_k, G, router, C).to(dtype)
    with torch.no_grad():
        m.gate.weight.normal_(0, 0.02 * D**-0.5)
        m.experts.gate_up_proj.normal_(0, D**-0.5)
        m.experts.down_proj.normal_(0, moe.output_scale(experts, top_k, G, router) * width**-0.5)
    return m


def problem(T, D, E, K, width, dtype=torch.float32, used=None):
    """Arguments of the dispatch functions; only the first `used` experts are chosen."""
    torch.manual_seed(0)
    logit_TE = torch.randn(T, E)
    logit_TE[:, used or E :] = -math.inf
    top_TK, expert_TK = logit_TE.topk(K)
    x, gate_up, down = torch.randn(T, D), torch.randn(E, 2 * width, D) * D**-0.5, torch.randn(E, D, width) * width**-0.5
    score_TK = top_TK.softmax(-1).to(torch.promote_types(dtype, torch.float32))
    return x.to(dtype), score_TK, expert_TK, gate_up.to(dtype), down.to(dtype)


def run(compute, arguments):
    """Output and gradients with respect to tokens, scores and both expert matrices."""
    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments]
    y = compute(*leaves)
    wanted = [a for a in leaves if a.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))]


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


SHAPES = {  # T, D, E, K, width of an expert, experts in use
    "E 8 K 2": (96, 32, 8, 2, 48, None),
    "64 narrow experts, 16 a token": (40, 32, 64, 16, 8, None),
    "K = E": (24, 16, 4, 4, 24, None),
    "one expert": (24, 16, 1, 1, 24, None),
    "one token": (1, 16, 8, 2, 24, None),
    "one token, one choice": (1, 16, 8, 1, 24, None),
    "empty experts": (40, 32, 16, 2, 24, 3),
    "one expert takes all": (40, 32, 8, 1, 24, 1),
    "groups filled up": (500, 32, 4, 2, 24, 3),
    "groups filled up, one choice": (500, 32, 4, 1, 24, None),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("fast, dtype, tolerance", [
    (moe.loop, torch.float32, 1e-5), (moe.loop, torch.bfloat16, 2e-2), (moe.loop, torch.float64, 1e-12),
    (moe.grouped, torch.float32, 1e-5), (moe.grouped, torch.bfloat16, 2e-2)])  # grouped_mm knows no float64
def test_fast_path_equals_reference_with_all_gradients(fast, shape, dtype, tolerance):
    arguments = problem(*shape[:5], dtype, used=shape[5])
    wide = torch.promote_types(dtype, torch.float32)
    expected = run(moe.reference, [a.to(wide) if a.is_floating_point() else a for a in arguments])
    for got, want in zip(run(fast, arguments), expected):
        assert error(got, want) < tolerance


@FAST
def test_experts_nobody_visits_get_zero_gradients(fast):
    _, _, _, dgate_up, ddown = run(fast, problem(40, 32, 16, 2, 24, used=3))
    assert dgate_up[3:].eq(0).all() and ddown[3:].eq(0).all() and dgate_up[:3].ne(0).any()


@BOTH
def test_gradients_agree_with_finite_differences_in_float64(router):
    m = layer(D=6, width=8, experts=3, top_k=2, G=2, router=router, dtype=torch.float64)
    with torch.no_grad():
        m.gate.weight.normal_()  # far from ties, so that no choice changes within the step of the difference
    names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]

    def f(x, *weights):
        y, aux = torch.func.functional_call(m, dict(zip(names, weights)), (x,))
        return y, aux["balance_loss"], aux["z_loss"]

    weights = [m.get_parameter(n).detach().requires_grad_() for n in names]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, *weights))


def test_one_expert_is_the_dense_layer():
    m, x = layer(experts=1, top_k=1, router="softmax-topk"), torch.randn(2, 9, 32)
    gate, up = m.experts.gate_up_proj[0].detach().chunk(2)
    dense = [w.clone().requires_grad_() for w in (gate, up, m.experts.down_proj[0].detach())]
    x_dense, x_moe = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_dense = F.linear(F.silu(F.linear(x_dense, dense[0])) * F.linear(x_dense, dense[1]), dense[2])
    y_moe, _ = m(x_moe)
    y_dense.square().sum().backward()
    y_moe.square().sum().backward()
    torch.testing.assert_close(y_moe, y_dense, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x_moe.grad, x_dense.grad, rtol=1e-6, atol=1e-5)
    want = torch.cat([dense[0].grad, dense[1].grad])
    assert error(m.experts.gate_up_proj.grad[0], want) < 1e-6
    assert error(m.experts.down_proj.grad[0], dense[2].grad) < 1e-6


def test_the_worked_example_of_the_docstring():
    logit_TE = torch.tensor([[4, 2, 1, 1], [1, 1, 4, 2], [5, 1, 1, 1]], dtype=torch.float64).log()
    expert_TK = moe.largest(logit_TE, 2)
    assert expert_TK.tolist() == [[0, 1], [2, 3], [0, 1]]
    scores = {name: router.weigh(logit_TE, expert_TK) for name, router in moe.ROUTERS.items()}
    renormalised = torch.tensor([[4, 2], [4, 2], [5, 1]], dtype=torch.float64) / 6
    torch.testing.assert_close(scores["topk-softmax"], renormalised)
    torch.testing.assert_close(scores["softmax-topk"], renormalised * 6 / 8)
    aux = moe.statistics(logit_TE, expert_TK)
    assert aux["counts"].tolist() == [2, 2, 1, 1] and aux["balance_loss"].item() == pytest.approx(19 / 18)


@pytest.mark.parametrize("router, top_k, G", [("topk-softmax", 2, 1), ("topk-softmax", 2, 4), ("softmax-topk", 2, 4)])
def test_copies_add_amplitudes_so_that_copy_scale_gives_the_mlp_back(router, top_k, G):
    m, x = layer(experts=8, top_k=top_k, G=G, router=router, dtype=torch.float64), torch.randn(50, 32).double()
    gate, up = torch.randn(2, G, 64 // G, 32).double()
    down = torch.randn(32, 64).double()
    with torch.no_grad():
        m.gate.weight.zero_()
        m.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=1).repeat(8, 1, 1))
        m.experts.down_proj.copy_(down.view(32, G, -1).transpose(0, 1).repeat(8, 1, 1))
        m.experts.down_proj *= moe.copy_scale(8, top_k, G, router)
    dense = F.linear(F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1)), down)
    torch.testing.assert_close(m(x)[0], dense)


STARTS = [(router, top_k, G) for router in moe.ROUTERS for top_k in (1, 2, 3, 4) for G in (1, 2, 4, 8)]
STARTS.remove(("topk-softmax", 1, 1))  # refused: the router has no gradient


@pytest.mark.parametrize("router, top_k, G", STARTS)
def test_output_starts_with_the_variance_of_the_dense_layer(router, top_k, G):
    D, width, T = 64, 128, 1024
    m, x = layer(D, width, 8, top_k, G, router), torch.randn(T, D)
    gate, up, down = torch.randn(width, D) * D**-0.5, torch.randn(width, D) * D**-0.5, torch.randn(D, width)
    dense = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T * width**-0.5
    assert abs(m(x)[0].var() / dense.var() - 1) < 0.2


@BOTH
def test_ties_go_to_the_lower_index(router):
    m = layer(experts=16, top_k=4, G=4, router=router)
    with torch.no_grad():
        m.gate.weight.copy_(m.gate.weight[::4].repeat_interleave(4, dim=0))  # neighbours share a row, as in upcycling
    _, expert_TK, _ = m.route(torch.randn(500, 32))
    teams = expert_TK.view(500, 4, 4)
    assert (teams == teams[:, :, :1] + torch.arange(4)).all() and (teams[:, :, 0] % 4 == 0).all()
    torch.nn.init.zeros_(m.gate.weight)
    assert (m.route(torch.randn(500, 32))[1] == torch.arange(16)).all()


@pytest.mark.parametrize("E", [2, 8, 64, 300])
def test_a_single_choice_among_equals_is_the_first_of_the_stable_sort(E):
    m, x = layer(experts=E, top_k=1, router="softmax-topk"), torch.randint(-2, 3, (500, 32)).float()
    with torch.no_grad():
        m.gate.weight.copy_(torch.randint(-1, 2, (E, 32)))  # small whole logits: exact, and often equal
    one = m.route(x)[1]
    m.K = 2
    two = m.route(x)[1]
    logit_TE = x @ m.gate.weight.T
    assert (one == two[:, :1]).all() and (logit_TE.gather(1, two).diff(dim=1) == 0).any()


@BOTH
@pytest.mark.parametrize("K", [1, 2, 4])
def test_losses_of_a_uniform_router(router, K):
    m = layer(experts=4, top_k=K, G=2, router=router)
    torch.nn.init.zeros_(m.gate.weight)
    _, aux = m(torch.randn(3, 7, 32))
    assert aux["balance_loss"].item() == pytest.approx(1)
    assert aux["z_loss"].item() == pytest.approx(math.log(8) ** 2)
    assert aux["entropy"].item() == pytest.approx(math.log(8))
    assert aux["counts"].tolist() == [21] * (2 * K) + [0] * (8 - 2 * K) and aux["dropped"] == 0


def test_balance_loss_of_a_collapsed_router_is_E_over_K():
    m = layer(experts=8, top_k=2)
    with torch.no_grad():
        m.gate.weight.zero_()[:2, 0] = 50.0
    _, aux = m(torch.ones(16, 32))
    assert aux["balance_loss"].item() == pytest.approx(4, rel=1e-4) and aux["counts"].tolist() == [16, 16] + [0] * 6


def test_each_expert_keeps_the_first_tokens_that_chose_it():
    expert_TK = torch.tensor([[0, 1], [2, 0], [0, 3], [1, 0], [1, 2], [2, 1]])
    keep = moe.within_capacity(expert_TK, 4, 2 / 3)  # 2 places: 2/3 of an even share of 6 x 2 / 4
    assert keep.tolist() == [[True, True], [True, True], [False, True], [True, False], [False, True], [False, False]]


@pytest.mark.parametrize("T, E, K, C", [(40, 8, 2, 0.5), (17, 3, 1, 1.0), (64, 16, 4, 1.25)])
def test_capacity_equals_a_queue_for_each_expert(T, E, K, C):
    torch.manual_seed(0)
    expert_TK = torch.randn(T, E).topk(K).indices
    places, want = [math.ceil(C * T * K / E)] * E, []
    for e in expert_TK.flatten().tolist():
        places[e] -= 1
        want.append(places[e] >= 0)
    assert moe.within_capacity(expert_TK, E, C).flatten().tolist() == want and not all(want)


@BOTH
def test_an_expert_that_is_full_scores_0_and_the_others_are_not_renormalised(router):
    m, x = layer(router=router, C=0.5), torch.randn(40, 32)
    score_TK, expert_TK, _ = m.route(x)
    keep_TK = moe.within_capacity(expert_TK, 4, 0.5)
    assert (keep_TK.sum(1) == 1).any()  # tokens that lose one of their two experts
    want = moe.reference(x, score_TK * keep_TK, expert_TK, m.experts.gate_up_proj, m.experts.down_proj)
    torch.testing.assert_close(m(x)[0], want)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("router, top_k, G", [("topk-softmax", 2, 1), ("topk-softmax", 2, 2), ("softmax-topk", 1, 1)])
def test_with_capacity_no_output_depends_on_a_later_token(router, top_k, G, seed):
    """In training: whatever follows position t of a window, in it or in later windows, y is the same up to t."""
    m, B, T = layer(experts=4, top_k=top_k, G=G, router=router, C=0.75, seed=seed), 3, 16
    torch.nn.init.normal_(m.gate.weight)
    x = torch.randn(B, T, 32)
    y, aux = m(x)
    assert aux["dropped"] > 0
    for b, t in ((b, t) for b in range(B) for t in range(0, T, 5)):
        other = x.clone()
        other.view(-1, 32)[b * T + t + 1 :] = torch.randn(B * T - b * T - t - 1, 32)
        torch.testing.assert_close(m(other)[0].view(-1, 32)[: b * T + t + 1], y.view(-1, 32)[: b * T + t + 1])


@BOTH
@pytest.mark.parametrize("C, capacity", [(1.0, 4), (0.75, 3)])
def test_capacity_in_training_only(router, C, capacity):
    m, x = layer(experts=4, top_k=2, router=router, C=C), torch.randn(8, 32)
    torch.nn.init.zeros_(m.gate.weight)  # every token chooses experts 0 and 1
    y, aux = m(x)
    free = layer(experts=4, top_k=2, router=router)
    torch.nn.init.zeros_(free.gate.weight)
    want = free(x)[0]
    torch.testing.assert_close(y[:capacity], want[:capacity])
    assert y[capacity:].eq(0).all() and aux["dropped"].item() == 1 - capacity / 8
    assert aux["counts"].tolist() == [8, 8, 0, 0]
    m.eval()
    y, aux = m(x)
    torch.testing.assert_close(y, want)
    assert aux["dropped"] == 0


@BOTH
def test_plenty_of_capacity_changes_nothing(router):
    x = torch.randn(50, 32)
    torch.testing.assert_close(layer(router=router, C=4.0)(x)[0], layer(router=router)(x)[0])


@BOTH
def test_autocast_computes_experts_in_bfloat16_and_the_router_in_float32(router):
    m, x = layer(experts=4, top_k=2, G=2, router=router), torch.randn(2, 50, 32)
    y, aux = m(x)
    exact = torch.autograd.grad(y.square().sum(), m.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y16, aux16 = m(x)
    assert y16.dtype == torch.bfloat16 and error(y16, y) < 2e-2
    for name in ("balance_loss", "z_loss", "entropy"):
        assert aux16[name].dtype == torch.float32 and aux16[name] == aux[name]
    rough = torch.autograd.grad(y16.float().square().sum(), m.parameters())
    assert all(r.dtype == torch.float32 and error(r, e) < 2e-2 for r, e in zip(rough, exact))


@BOTH
def test_bfloat16_layer_is_close_to_the_float32_one(router):
    m = layer(router=router, dtype=torch.bfloat16)
    x = torch.randn(64, 32).to(torch.bfloat16)
    y = m(x)[0]
    assert y.dtype == torch.bfloat16 and error(y, m.float()(x.float())[0]) < 2e-2


@BOTH
def test_one_token_without_gradients_equals_the_batch(router):
    m, x = layer(D=16, width=24, experts=8, top_k=2, router=router).eval(), torch.randn(1, 6, 16)
    with torch.no_grad():
        alone = torch.cat([m(x[:, t : t + 1])[0] for t in range(6)], dim=1)
        torch.testing.assert_close(alone, m(x)[0])


def test_every_parameter_has_a_gradient_after_one_token():
    m = layer(experts=8, top_k=1, router="softmax-topk")
    m(torch.randn(1, 32))[0].sum().backward()
    assert all(p.grad is not None for p in m.parameters())
    assert m.experts.down_proj.grad.flatten(1).ne(0).any(1).sum() == 1 and m.gate.weight.grad.ne(0).any()


def saved_bytes(f):
    """Distinct storage that autograd keeps for the backward pass of f."""
    seen = {}

    def keep(t):
        seen[t.untyped_storage().data_ptr()] = t  # holding the tensor keeps its address from being used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = f()
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for t in seen.values())


@FAST
def test_activation_memory_is_linear_in_tokens_and_choices(fast):
    def kept(T, K):
        arguments = [a.requires_grad_() if a.is_floating_point() else a for a in problem(T, 32, 32, K, 32)]
        return saved_bytes(lambda: fast(*arguments))

    weights = kept(1, 1)
    base = kept(256, 2) - weights
    assert kept(512, 2) - weights < 2.2 * base and kept(256, 4) - weights < 2.2 * base


def test_layer_runs_compiled_on_a_cpu():
    """The router is compiled; the loop, whose sizes are data, runs as it is."""
    m, x = layer(experts=8, top_k=2, dtype=torch.bfloat16), torch.randn(64, 32).to(torch.bfloat16)
    y, aux = torch.compile(m, backend="aot_eager")(x)
    (y.float().square().sum() + aux["balance_loss"]).backward()
    assert error(y, m(x)[0]) < 1e-6 and m.experts.down_proj.grad.ne(0).any()


def test_a_product_that_leaves_gradients_of_empty_groups_unwritten_does_no_harm(monkeypatch):
    """As grouped_mm does on some GPUs."""
    product, arguments = F.grouped_mm, problem(40, 32, 16, 2, 24, used=3)
    expected = run(moe.reference, arguments)

    def unwritten(x, W, offs):
        empty = torch.diff(offs, prepend=offs.new_zeros(1)) == 0
        assert empty.sum() == 13
        W.register_hook(lambda grad: grad.masked_fill(empty[:, None, None], math.nan))
        return product(x, W, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", unwritten)
    for got, want in zip(run(moe.grouped, arguments), expected):
        assert error(got, want) < 1e-5


def test_grouped_path_compiles_whole_with_static_shapes():
    """fullgraph refuses whatever would wait for the host: .item(), .tolist(), shapes that depend on data."""
    arguments = problem(64, 32, 8, 2, 16, torch.bfloat16)
    compiled = torch.compile(moe.grouped, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, arguments), run(moe.reference, arguments)):
        assert error(got, want) < 2e-2


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(top_k=9), "top_k 9 .*at most 8"),
        (dict(experts=0), "experts is 0"),
        (dict(hidden_size=-4), "hidden_size is -4"),
        (dict(granularity=5), "granularity 5 .*granularity 4 or 8, or intermediate_size 60 or 65"),
        (dict(granularity=100), "granularity 64, or intermediate_size 100"),
        (dict(router="sigmoid"), "sigmoid.*topk-softmax or softmax-topk"),
        (dict(top_k=1), "without gradient .*softmax-topk"),
        (dict(capacity_factor=0.0), "capacity_factor is 0.0"),
        (dict(capacity_factor=math.nan), "capacity_factor is nan"),
    ],
)
def test_bad_layers_are_refused_with_the_remedy(change, words):
    good = dict(hidden_size=32, intermediate_size=64, experts=8, top_k=2, granularity=1, router="topk-softmax")
    with pytest.raises(ValueError, match=words):
        moe.MoE(**(good | change))
