"""Study: one run each of what stage 1 and 2 could do otherwise.

    python variants.py standard|bias|later SEED OUT    # as train.py --processes 1 and eval.py --no-floor

standard: teachers' channels have mean 0 and deviation 1. bias: no balance loss; a bias per expert, on the
choice alone, moves by 0.003 towards less load. later: the first two MoE blocks hear no context.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import eval as scoring
import prism
import teachers
import train

name, seed, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
plain_init, plain_terms, plain_load = teachers.Teachers.__init__, train.loss_terms, prism.load


def some_rooms(count: int) -> torch.Tensor:
    rooms = data.open_data("world", "train", size=(64, 64))
    return torch.stack([rooms[i]["image"] for i in range(count)])


@torch.no_grad()
def standard_init(self, *args) -> None:
    plain_init(self, *args)
    images, targets, scale = some_rooms(512), self.targets, {}
    for i, teacher in enumerate(self.widths):
        scale[teacher] = [(y.mean((0, 2, 3), keepdim=True), y.std((0, 2, 3), keepdim=True) + 1e-3)
                          for y in targets(images, torch.full((512,), i))[teacher]]
    self.targets = lambda images, ids: {
        teacher: [(y - mean) / std for y, (mean, std) in zip(maps, scale[teacher], strict=True)]
        for teacher, maps in targets(images, ids).items()}


def biased_forward(self, u, context, gate):
    cfg, z = self.cfg, self.modulate(u, context)
    logits = self.logits(z)
    if not hasattr(self, "shift"):
        self.shift = torch.zeros(cfg.experts)
    if self.training:
        logits = logits + torch.randn_like(logits) * F.softplus(self.noise(z)) * cfg.router_noise
    idx = (logits + self.shift).topk(cfg.top_k, -1).indices
    load = F.one_hot(idx, cfg.experts).sum(2).float().mean((0, 1))
    if self.training:
        self.shift += 0.003 * (load.mean() - load).sign()
    return prism.Route(idx, logits.gather(-1, idx).softmax(-1), load, logits.softmax(-1).mean((0, 1)), gate)


@torch.no_grad()
def load_biased(path, *args):
    """Find the biases anew on training rooms: they are not in the checkpoint."""
    model, images = plain_load(path, *args), some_rooms(16)
    routers = [block.router for block in model.blocks if isinstance(block, prism.DualStreamBlock)]
    for router in routers:
        router.shift = torch.zeros(model.cfg.experts)
    for context in 60 * list(model.contexts):
        for router, route in zip(routers, model.route(images, context), strict=True):
            router.shift += 0.01 * (route.load.mean() - route.load).sign()
    return model


def later_trunk(self, images, contexts):
    x, levels, routes = self.embed(images), [], []
    heard, B, n, cfg = self.hear(contexts), len(images), len(contexts), self.cfg
    for i, block in enumerate(self.blocks):
        if i not in cfg.moe_blocks:
            x = block(x)
            continue
        x, route = block(x, heard if i >= cfg.moe_blocks[2] else heard.new_zeros(B, cfg.dim))
        routes.append(route)
        level = self.as_maps(self.norm(x)[:, 1:], images)
        levels.append(level if len(x) == n * B else level.repeat_interleave(n, 0))
    levels = [x.unflatten(0, (-1, n)).unbind(1) for x in levels]
    return [list(own) for own in zip(*levels, strict=True)], routes


if name == "standard":
    teachers.Teachers.__init__ = standard_init
elif name == "bias":
    prism.Router.forward, prism.load = biased_forward, load_biased
    train.loss_terms = lambda *args: {
        key: (weight * (key != "balance"), term) for key, (weight, term) in plain_terms(*args).items()}
elif name == "later":
    prism.Prism.trunk = later_trunk
train.main(train.Args(seed=seed, processes=1, out_dir=out))
scoring.main(scoring.Args(ckpt=out / "prism.pt", floor=False))
