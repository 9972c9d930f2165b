"""Behind a mask random numbers come in: at c = 0 the old function, at c = 1 an ordinary model, no jump between."""

import pytest
import torch
from test_grow import SHAPES, equal, logits, make, train

import grow
from mask import Mask
from model import Transformer


@pytest.mark.parametrize("axis, factor", [("depth", 2), ("width", 2), ("width", 3)])
@pytest.mark.parametrize("name", SHAPES)
def test_the_mask_opens_on_the_same_raw_weights_and_folds_in_without_a_jump(name, axis, factor):
    small = make(name, torch.float64)
    how = dict(axis=axis, operator="random", factor=factor)
    big, step = grow.grow(small, **how), grow.lineage_step(small.config, **how)
    parameters, names = {id(p) for p in big.parameters()}, big.state_dict().keys()
    mask = Mask(big, step, 4)
    mask.open(0)
    assert (logits(big) - logits(small)).abs().max() < 1e-10
    mask.open(3)
    assert (logits(big) - logits(small)).abs().max() > 0.1
    stored = Transformer(big.config).double().eval()
    stored.load_state_dict(mask.effective())
    assert torch.equal(logits(stored), logits(big))
    mask.c.fill_(1)
    unfolded = logits(big)
    mask.open(4)
    assert (logits(big) - unfolded).abs().max() < 1e-10 and big.state_dict().keys() == names
    assert {id(p) for p in big.parameters()} == parameters  # the optimizer still knows them
    again = grow.grow(small, **how)
    Mask(again, step, 4).open(4)
    assert equal(big, again)


def test_the_open_mask_leaves_random_entries_of_the_size_of_the_old_ones():
    small, how = make("qwen3"), dict(axis="width", operator="random", factor=2)
    big = grow.grow(small, **how)
    Mask(big, grow.lineage_step(small.config, **how), 1).open(1)
    q, gain = big.model.layers[1].self_attn.q_proj.weight, big.model.layers[1].input_layernorm.weight
    old = small.model.layers[1].self_attn.q_proj.weight / 2**0.5  # QK-norm: the scale for its epsilon stays
    assert torch.allclose(q[:32, :24], old)
    for block in (q[:32, 24:], q[32:, :24], q[32:, 24:]):
        assert 0.8 < block.std() / old.std() < 1.25
    assert torch.allclose(gain[:24], small.model.layers[1].input_layernorm.weight) and (gain[24:] == 1).all()


@pytest.mark.parametrize("name", ["qwen3, grouped queries, tied", "qwen2", "mixtral"])
@pytest.mark.parametrize("axis", ["depth", "width"])
def test_behind_the_mask_parameters_keep_their_names_and_hold_raw_numbers(name, axis):
    small, how = make(name), dict(axis=axis, operator="random", factor=2)
    big, opened = (grow.grow(small, **how) for _ in range(2))
    names, kinds = [n for n, _ in big.named_parameters()], {n: type(m) for n, m in big.named_modules()}
    mask = Mask(big, grow.lineage_step(small.config, **how), 4)
    Mask(opened, grow.lineage_step(small.config, **how), 4).open(4)
    assert [n for n, _ in big.named_parameters()] == names and equal(big, opened)
    again = Mask(grow.grow(small, **how), grow.lineage_step(small.config, **how), 4, draw=False)
    again.module.load_state_dict(big.state_dict())  # a resumed run: the raw numbers are stored
    for done in (2, 4):
        mask.open(done)
        again.open(done)
        assert torch.equal(logits(big), logits(again.module))
    assert {n: type(m) for n, m in big.named_modules()} == kinds


def test_each_new_expert_is_as_large_as_the_one_it_joins():
    small, how = make("mixtral"), dict(axis="depth", operator="random", factor=2)
    small.model.layers[0].mlp.experts.down_proj.data[1] *= 10
    big = grow.grow(small, **how)
    Mask(big, grow.lineage_step(small.config, **how), 1).open(1)
    old, new = (layer.mlp.experts.down_proj.std((1, 2)) for layer in big.model.layers[:2])
    assert (abs(new / old - 1) < 0.2).all() and old[1] > 5 * old[0]


def test_half_open_norms_are_those_of_the_open_dimensions():
    """On a residual stream whose new dimensions are 0: gain sqrt(open / D), open = d + (D - d) / 2."""
    small, how = make(), dict(axis="width", operator="random", factor=2)
    big = grow.grow(small, **how)
    mask = Mask(big, grow.lineage_step(small.config, **how), 2)
    mask.open(1)
    gain = mask.effective()["model.norm.weight"]
    assert torch.allclose(gain[:24], small.model.norm.weight * (36 / 48) ** 0.5)


def test_what_lies_behind_the_mask_learns_as_it_opens():
    small, how = make("qwen3, grouped queries, tied"), dict(axis="width", operator="random", factor=2)
    big = grow.grow(small, **how)
    mask = Mask(big, grow.lineage_step(small.config, **how), 5)
    mask.open(1)
    before = {n: p.clone() for n, p in big.named_parameters()}
    train(big, 2)
    assert all(not torch.equal(p, before[n]) for n, p in big.named_parameters())
