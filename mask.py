"""A mask: random numbers enter a trained model slowly, so that it never loses what it knows.

Operator random of grow.py adds blocks or dimensions of random numbers. All at once they would spoil the function. So
what is new is multiplied by c, and training takes c from 0 to 1 (`train.py --mask-steps`; MSG, 2305.02869).

    depth    x + c f(x)                  a new block: its o_proj and down_proj are multiplied by c
    width    W' = [[W, c A], [c B, c C]]        gain' = sqrt(open / D) [gain, 1],   open = d + c (D - d)

At c = 0 the large model computes what the small one did. At c = 1 the mask is gone, and an ordinary model is left.

Why the root: RMSNorm divides x' by its root mean square over all D dimensions. While the new ones are 0, that is
sqrt(d / D) of what it was over the d old ones. So the norm is too large by sqrt(D / d), and the gain takes it back. As
c grows, the new dimensions count more and more: `open` of them in all.

By hand, d = 2, D = 4: x = (3, 4) has the root mean square sqrt((9 + 16) / 2) = 3.54, and x' = (3, 4, 0, 0) has
sqrt(25 / 4) = 2.5. The norm of x is (0.85, 1.13), that of x' is (1.2, 1.6, 0, 0). Times sqrt(2 / 4) = 0.707 it is
(0.85, 1.13, 0, 0). Half open, c = 0.5: open = 3, and the root is sqrt(3 / 4).

What learns when: the optimizer holds the raw numbers A, B, C, and the forward pass sees c A, c B, c C. So the gradient
of A is c times that of c A, and 0 at first. AdamW and Muon divide by the gradient's size, so raw numbers soon move at
full speed, while what the forward pass sees of them is small still.

Left out: a mask for each layer, opened one after the other (MSG has that), and growth in several stages.

Try, with the base of grow.py's exercises, grown with `--axis width --operator random --factor 2` (loss 2.123):
1. Train on for 2e5 tokens, 49 steps, with --mask-steps 1, 10 and 40. (2.065, 1.949, 1.942. One step at c = 0,
   and then all at once: that hurts.)
2. The same in depth. (1.994, 1.983, 1.977: new blocks beside old ones hurt less than new numbers inside every matrix.)
3. In `hide` let a masked norm return `raw * (1 / k) ** 0.5`, as if no new dimension ever counted; width, 40 steps.
   (1.970 in the place of 1.942. When the mask goes away, at step 40, all gains jump by sqrt(k).)
"""

import math
from operator import attrgetter

import torch

import model
from grow import is_added, random_numbers, role
from names import at_layer, place, unpack


class Mask:
    """Opens what operator random has closed, in `updates` updates.

    module: as grown, at c = 0. entry: that of its lineage that grew it. draw: draw the raw numbers behind the mask (not
    if `module` holds them, as in a resumed run). The optimizer and a state dict see raw numbers, under the usual names.
    The forward pass sees mask x raw: a masked layer gets a class of its own, in which its `weight` is a property."""

    def __init__(self, module, entry, updates, draw=True):
        self.module, self.entry, self.updates, self.masked = module, entry, updates, []
        self.c = torch.zeros_like(module.lm_head.weight[0, 0])  # a scalar on the model's device, in its dtype
        state = module.state_dict()
        closed = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in state.items()}
        # unpack gives views under the public names: writing into `where` or `tensors` writes into `closed` or `state`
        tensors = dict(unpack(module.config, state))
        for name, where in unpack(module.config, closed):
            self.close(name, where)
            if draw and where.any():
                self.fill(name, where, tensors)
        if module.config.tie_word_embeddings:  # one tensor, two owners
            closed["lm_head.weight"] = closed["model.embed_tokens.weight"]
        for name, where in closed.items():
            if where.any():
                owner, _, attribute = name.rpartition(".")
                self.hide(module.get_submodule(owner), attribute, where)

    def close(self, name, where):
        """Sets `where`, False in the shape of tensor `name`, to True where operator random has added something."""
        k, what = self.entry["factor"], role(name)
        if self.entry["axis"] == "depth":
            where[:] = what == "writer" and is_added(name, self.entry["layers"])
        elif what != "head gain":
            where[..., round(where.shape[-1] / k) :] = True  # columns; of a vector, its new entries
            if what in ("scores", "reader", "writer"):
                where[round(len(where) / k) :] = True  # rows

    def fill(self, name, where, tensors):
        """Draws what lies behind the mask: numbers as large as those they join, gains of 1. Biases stay 0."""
        t, layers = tensors[name], self.entry["layers"]
        match role(name):
            case "bias":
                return
            case "gain" | "last gain":
                t *= math.sqrt(self.entry["factor"])  # takes back grow.py's root: now the mask gives it (width only)
                t[where] = 1
            case _:
                if layers:  # depth: a block that is all new, like the one that it follows
                    like = tensors[at_layer(name, layers.index(layers[place(name).layer]))]
                else:
                    like = t[~where]
                t[where] = random_numbers(name, t.shape, self.entry["seed"], like)[where]

    def hide(self, owner, attribute, where):
        """From now on owner.attribute is mask x raw. A layer with weight and bias is wrapped twice."""
        c, k, plain = self.c, self.entry["factor"], type(owner)

        def masked(self):  # as a property of the class it wins over nn.Module's __getattr__
            raw = self._parameters[attribute]
            if isinstance(self, model.RMSNorm):
                return raw * ((1 + c * (k - 1)) / k).sqrt()  # sqrt(open / D): the norm is over the open dimensions
            return torch.where(where, c * raw, raw)

        owner.__class__ = type(plain.__name__, (plain,), {attribute: property(masked)})
        self.masked.append((owner, plain))

    def open(self, update):
        """Sets c to what it is after so many updates. At c = 1 mask x raw is raw, and the mask goes away."""
        self.c.fill_(min(1.0, update / self.updates))
        if update >= self.updates:
            for owner, plain in reversed(self.masked):  # unwraps what was wrapped last first
                owner.__class__ = plain
            self.masked.clear()

    def effective(self):
        """{parameter: mask x raw}, what a folder holds."""
        return {name: attrgetter(name)(self.module) for name in self.module.state_dict()}
