"""PRISM: several vision foundation models in one ViT student (ICML 2026, arXiv 2606.03444).

Teachers such as DINOv2, CLIP and SAM pull shared weights in contradicting directions. So the MLP of a
few blocks is split into two streams: an *anchor* that everything shares, and *experts* to which a
*router* sends each token, told by a *context*: the teacher to imitate, or the task to solve.

    u  = LN2(x)
    x <- x + lambda * anchor(u) + (1 - lambda) * [shared(u) + sum over top-k e of w_e * expert_e(u)]

lambda = sigmoid(a . u + b) is one number per token, between 0 and 1, that a linear gate reads off the token
itself: the context has no part in it. b starts such that lambda is 0.94: a new expert stream fades in.

Stage 1, *deconstruct*: contexts are teachers; the experts take their conflicts apart.
Stage 2, *recompose*: contexts are tasks; the router reassembles the same experts for each of them.
Only the router sees the context, so all that comes before the first router is computed once.

An image's way: (B, 3, H, W) -> `embed`, a cls token and h*w patches (B, N, D) -> plain blocks -> the first
`DualStreamBlock`, where B rows become R, one per image and context -> the other blocks -> four levels, the
patches after each of the four dual stream blocks, as maps (R, D, h, w). In stage 1 `projectors` map each
level to the features of its teacher. In stage 2 a `Head` per task maps the levels of its context to
(B, C, H, W).

Beside it stands SAK (ICLR 2025, arXiv 2410.14633), the baseline: a plain ViT, and per teacher a path of
adapters that reads the ViT but never writes to it.

Shapes: B images, N tokens (1 cls + h*w patches), D width, E experts, K experts per token, T = rows of
tokens, H x W pixels, h x w patches. R rows = images x contexts, all contexts of one image together.
"eq." numbers are the paper's; "official" marks what the released code does otherwise.
"""

import data  # first: it settles how threads wait, before torch is loaded

# isort: split
import json
import math
import os
import random
import re
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile, is_zipfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange, repeat
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # with a gradient
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

# ---------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class PrismConfig:
    """Describe a student completely; stored in every checkpoint."""

    dim: int = 384  # width D of the tokens
    depth: int = 12  # transformer blocks
    heads: int = 6  # attention heads
    patch: int = 16  # patch side in pixels
    grid: tuple[int, int] = (24, 24)  # rows and columns of the position table, in patches
    moe_blocks: tuple[int, ...] = (2, 5, 8, 11)  # blocks with two streams; levels are read after them
    experts: int = 15  # routed experts E in each of these blocks
    top_k: int = 3  # experts K that a token visits
    mlp_ratio: float = 4.0  # hidden width of MLP and anchor, in units of D
    expert_ratio: float = 4.0  # the same for shared and routed experts; 1 is the paper's "lite"
    gate_start: float = 0.94  # lambda of a new student: the expert stream fades in
    film_start: float = 0.0  # deviation of a new router's FiLM weights; 0: it is blind to the context
    projector: str = "mlp"  # to the teachers' features: the paper's two layers, or "linear"
    edge_cells: int = 1  # outputs per side of edge's head at a place of 4 x 4 pixels; 4: one for each pixel
    recompose: str = "route"  # stage 2: tasks choose experts; or "views": heads read all teachers' contexts
    router_noise: float = 1.0  # strength of the learned noise on the logits in training (released code)
    expert_drop: float = 0.1  # chance that an expert is hidden from a token in training (released code)
    teachers: dict[str, int] = field(default_factory=dict)  # teacher -> width of its features
    tasks: dict[str, int] = field(default_factory=dict)  # task -> output channels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of RGB in [0, 1], subtracted from the input
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    official: bool = False  # arithmetic of the released code, for its checkpoints
    student: str = "prism"  # which of STUDENTS `build` makes: prism, sak, or a control: dense, wide, moe
    without: tuple[str, ...] = ()  # ablate anchor (and gate), shared, context, or film (c is concatenated)


SIZES = {
    "toy": PrismConfig(
        dim=96, depth=6, heads=3, patch=8, grid=(8, 8), moe_blocks=(1, 2, 4, 5), experts=6, top_k=2,
        mlp_ratio=2.0, expert_ratio=2.0, gate_start=0.5, film_start=0.02, expert_drop=0.0,
        projector="linear", edge_cells=4, recompose="views",  # for 350 steps, not for the paper's 240,000
    ),
    "small": PrismConfig(),
    "base": PrismConfig(dim=768, heads=12),
    "large": PrismConfig(dim=1024, depth=24, heads=16, moe_blocks=(5, 11, 17, 23)),
}

# -------------------------------------------------------------------------------------- attention, MLP


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Sequential):
    """D -> hidden -> D with exact GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Block(nn.Module):
    """The plain pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# ------------------------------------------------------------------------------------------ FiLM router


class Route(NamedTuple):
    """What the router of one block decided for R rows of N tokens."""

    topk_idx: Tensor  # (R, N, K) int64, experts of each token
    topk_w: Tensor  # (R, N, K) float32, their weights, which sum to 1
    load: Tensor  # (E,) share of tokens that selected the expert; sums to K; no gradient
    prob: Tensor  # (E,) mean softmax over all experts, noise and hidden experts included
    gate: Tensor  # (B, N) lambda; before the contexts part in the first such block, B rows instead of R


def own_share(draw: Callable, like: Tensor) -> Tensor:
    """Draw random numbers like (R, ...), so that N processes together draw what one would: each draws all."""
    n, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return draw((n * len(like), *like.shape[1:]), dtype=like.dtype, device=like.device).chunk(n)[rank]


class Router(nn.Module):
    """Choose top-k experts from token and context: z = (1 + gamma(c)) u + beta(c) (FiLM), logits = W z."""

    HIDDEN_LOGIT = -1e4  # finite, so that a token with fewer than K visible experts still gets weights

    def __init__(self, cfg: PrismConfig):
        super().__init__()
        self.cfg = cfg
        self.film = self.concatenated = None
        if "context" not in cfg.without:
            if "film" in cfg.without:
                self.concatenated = nn.Linear(cfg.dim, cfg.experts, bias=False)
            else:
                self.film = nn.Linear(cfg.dim, 2 * cfg.dim)
        self.logits = nn.Linear(cfg.dim, cfg.experts)
        self.noise = nn.Linear(cfg.dim, cfg.experts)
        if cfg.official:
            self.film_gate = nn.Linear(cfg.dim, cfg.dim)

    def modulate(self, u: Tensor, context: Tensor) -> Tensor:
        """FiLM: gamma and beta are one row per image, never per token."""
        if self.film is None:
            return u
        gamma, beta = self.film(context).unsqueeze(1).chunk(2, dim=-1)  # (R, 1, D) each
        if self.cfg.official:
            return u + torch.sigmoid(self.film_gate(u)) * (gamma * u + beta)
        return (1 + gamma) * u + beta

    def forward(self, u: Tensor, context: Tensor | None, gate: Tensor) -> Route:
        """Route tokens u (R, N, D) under context embeddings (R, D) or none; gate only passes through."""
        cfg = self.cfg
        with torch.autocast(u.device.type, enabled=False):  # ties in bf16 logits would route differently
            z = self.modulate(u.to(self.logits.weight.dtype), context)  # (R, N, D)
            logits = self.logits(z)  # (R, N, E)
            if self.concatenated is not None:  # W [z, c] = W_z z + W_c c
                logits = logits + self.concatenated(context).unsqueeze(1)
            if self.training:  # both only break the symmetry of experts that start as equal copies
                hidden = own_share(torch.rand, logits) < cfg.expert_drop
                noise = own_share(torch.randn, logits) * F.softplus(self.noise(z)) * cfg.router_noise
                logits = logits.masked_fill(hidden, self.HIDDEN_LOGIT) + noise
            kept, topk_idx = logits.topk(cfg.top_k, dim=-1)  # (R, N, K)
            prob = logits.softmax(-1).mean((0, 1))  # (E,)
            load = F.one_hot(topk_idx, cfg.experts).sum(2).to(prob.dtype).mean((0, 1))  # (E,)
            return Route(topk_idx, kept.softmax(-1), load, prob, gate)


# -------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """E MLPs D -> hidden -> D, each run on just the tokens that chose it.

    Exact: no capacity, no dropped token. Weights are stacked, one Parameter per matrix for all experts,
    so that every rank has a gradient for every Parameter, however the tokens fall.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, official: bool = False):
        super().__init__()
        self.official = official
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b1 = nn.Parameter(torch.zeros(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b2 = nn.Parameter(torch.zeros(num_experts, dim))
        for w in (self.w1, self.w2):
            nn.init.trunc_normal_(w, std=0.02)

    def plain(self, x: Tensor, topk_idx: Tensor, topk_w: Tensor) -> Tensor:
        """Define the layer: y = sum over e in top-k of w_e * expert_e(x), by an obvious loop.

        x (T, D), topk_idx (T, K) int64, topk_w (T, K); returns (T, D).
        """
        y = torch.zeros_like(x)
        for e in range(len(self.w1)):
            token, k = torch.where(topk_idx == e)
            w = topk_w[token, k].unsqueeze(1)  # (rows of e, 1)
            rows = x[token] * w if self.official else x[token]  # official: the weight enters twice
            hidden = F.gelu(F.linear(rows, self.w1[e], self.b1[e]))
            y = y.index_add(0, token, (w * F.linear(hidden, self.w2[e], self.b2[e])).to(y.dtype))
        return y

    def forward(self, x: Tensor, topk_idx: Tensor, topk_w: Tensor) -> Tensor:
        """Compute `plain` fast: sort by expert, matrix products on contiguous rows, gather back."""
        T, K = topk_idx.shape
        expert, order = topk_idx.flatten().to(torch.uint8).sort(stable=True)  # (T*K,): row -> slot t*K + k
        slots = torch.arange(T * K, device=x.device)
        back = torch.empty_like(order).scatter_(0, order, slots)  # (T*K,): slot -> row
        ids = torch.arange(len(self.w1), device=x.device, dtype=torch.uint8)
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # (E,)

        kind, learns = x.device.type, torch.is_grad_enabled()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = _Reorder.apply(x.to(dtype), order // K, back, K)  # (T*K, D), scattered
        if self.official:
            rows = rows * topk_w.reshape(-1, 1)[order].to(dtype)
        weights = (p.to(dtype) for p in (self.w1, self.b1, self.w2, self.b2))
        rows, _ = expert_mlps(rows, *weights, expert, ends, learns)  # (T*K, D)
        if not learns and dtype == topk_w.dtype:  # gather, weigh and add at once
            return F.embedding_bag(back.view(T, K), rows, mode="sum", per_sample_weights=topk_w).to(x.dtype)
        y = _Reorder.apply(rows, back, order, 1).view(T, K, -1)  # (T, K, D), gathered
        return (y * topk_w.unsqueeze(-1)).sum(1).to(x.dtype)


# --------------------------------------------------------------------------------- dual-stream block


class DualStreamBlock(nn.Module):
    """PRISM's block: a dense anchor for consensus, routed experts for conflict."""

    def __init__(self, cfg: PrismConfig):
        super().__init__()
        hidden = int(cfg.dim * cfg.expert_ratio)
        self.gate_min = 0.5 if cfg.official else 0.0
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.gate = self.anchor = self.shared = None
        if "anchor" not in cfg.without:
            self.gate, self.anchor = nn.Linear(cfg.dim, 1), MLP(cfg.dim, int(cfg.dim * cfg.mlp_ratio))
        if "shared" not in cfg.without:
            self.shared = MLP(cfg.dim, hidden)
        self.router = Router(cfg)
        self.experts = Experts(cfg.experts, cfg.dim, hidden, cfg.official)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Route]:
        """Map x (B, N, D) under context embeddings (R, D) to (R, N, D), R = contexts * B; None: R = B.

        Where contexts share their tokens (the first such block), attention, gate, anchor and shared
        expert run on B rows, and only router and experts on R.
        """
        return self.streams(x + self.attn(self.norm1(x)), context)

    def streams(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Route]:
        """Add anchor and experts to x: the block without its attention."""
        u = self.norm2(x)  # (B, N, D), the one input of gate, anchor, router and experts
        lam = u.new_zeros(*u.shape[:2], 1)  # (B, N, 1)
        if self.anchor is not None:
            lam = self.gate_min + (1 - self.gate_min) * torch.sigmoid(self.gate(u))
            x = x + lam * self.anchor(u)
        if self.shared is not None:
            x = x + (1 - lam) * self.shared(u)
        copies = 1 if context is None else len(context) // len(x)
        x, u, rest = (repeat(t, "b n d -> (b c) n d", c=copies) for t in (x, u, 1 - lam))  # (R, N, D)
        route = self.router(u, context, lam.squeeze(-1))
        routed = self.experts(u.flatten(0, 1), route.topk_idx.flatten(0, 1), route.topk_w.flatten(0, 1))
        return x + rest * routed.view_as(u), route


# ------------------------------------------------------------------------------- heads and projectors


class Head(nn.Module):
    """Four levels of features -> one task's map."""

    def __init__(self, dim: int, channels: int, views: int = 1, cells: int = 1):
        super().__init__()
        self.cells = cells  # outputs per side of a place of 4 x 4 pixels
        self.linears = nn.ModuleList(nn.Linear(views * dim, dim // 4) for _ in range(4))
        self.fuse = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), BatchNorm(dim), nn.GELU())
        self.last = nn.Conv2d(dim, channels * cells**2, 1)

    def plain(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Define the head: enlarge to a quarter of the pixels, convolve, classify, enlarge.

        Maps 4 levels (B, views * D, h, w) to (B, channels, H, W), size = (H, W) in pixels.
        """
        quarter = (size[0] // 4, size[1] // 4)
        tokens = rearrange(self.gather(levels), "b h w d -> b d h w")
        x = F.interpolate(tokens, size=quarter, mode="bilinear", align_corners=False)
        return self.finish(self.fuse(x), size)

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Compute `plain` with a tenth of its multiply-adds, in training too: see `convolve_enlarged`."""
        conv, norm, gelu = self.fuse
        weight, bias = conv.weight, conv.bias
        if not self.training:  # batch norm is a constant scale and shift per channel
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight, bias = weight * scale.view(-1, 1, 1, 1), (bias - norm.running_mean) * scale + norm.bias
        x = convolve_enlarged(self.gather(levels), weight, bias, (size[0] // 4, size[1] // 4))
        return self.finish(gelu(norm(x) if self.training else x), size)

    def gather(self, levels: list[Tensor]) -> Tensor:
        """Narrow each level (B, D, h, w) to D / 4 and concatenate: (B, h, w, D)."""
        tokens = [rearrange(level, "b d h w -> b h w d") for level in levels]
        return torch.cat([linear(t) for linear, t in zip(self.linears, tokens, strict=True)], -1)

    def finish(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Classify (B, D, H / 4, W / 4), cells x cells outputs a place; enlarge to (B, channels, H, W)."""
        x = F.pixel_shuffle(self.last(x).float(), self.cells)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def make_heads(cfg: PrismConfig, views: int = 1) -> nn.ModuleDict:
    """Build a head per task; a line is one pixel wide, so edge's may draw every pixel."""
    fine = {task: cfg.edge_cells for task in cfg.tasks if data.TASKS[task].kind == "edge"}
    return nn.ModuleDict({task: Head(cfg.dim, n, views, fine.get(task, 1)) for task, n in cfg.tasks.items()})


def make_projectors(cfg: PrismConfig) -> nn.ModuleDict:
    """Build the maps from the student's tokens to each teacher's width, one per level."""
    def projector(width: int) -> nn.Sequential:
        hidden = [nn.Linear(cfg.dim, cfg.dim), nn.GELU()] if cfg.projector == "mlp" else []
        return nn.Sequential(*hidden, nn.Linear(cfg.dim, width))

    return nn.ModuleDict({name: nn.ModuleList(projector(width) for _ in range(4))
                          for name, width in cfg.teachers.items()})


# ---------------------------------------------------------------------------------------------- PRISM


class Output(NamedTuple):
    """All that one training pass computes."""

    distilled: dict[str, list[Tensor]]  # teacher -> 4 x (B_t, D_t, h, w), its samples in batch order
    predicted: dict[str, Tensor]  # task -> (B, C_task, H, W)
    levels: list[Tensor]  # 4 x (B, D, h, w) under the teachers' contexts; empty without them
    routes: list[Route]  # one per MoE block


class Student(nn.Module):
    """From images to tokens, from levels to teachers and tasks; in between each kind goes its own way."""

    def __init__(self, cfg: PrismConfig):
        super().__init__()
        check_config(cfg)
        self.cfg, self.contexts = cfg, [*cfg.teachers, *cfg.tasks]
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cfg.grid[0] * cfg.grid[1], cfg.dim))
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start as ViTs do; a norm starts as it was made, at (1, 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for p in self.parameters(recurse=False):  # cls token, position table, contexts
            nn.init.trunc_normal_(p, std=0.02)

    def expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set what is subtracted from RGB in [0, 1] and what divides it: as initial weights want it."""
        self.cfg = replace(self.cfg, mean=tuple(mean), std=tuple(std))
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))

    def embed(self, images: Tensor) -> Tensor:
        """Turn RGB in [0, 1] (B, 3, H, W) into tokens (B, N, D)."""
        patch, sides = self.cfg.patch, images.shape[-2:]
        if type(images) is Tensor and not (self.training or images.is_meta) and images.amax() > 2:
            raise ValueError("images are 0..255; pass images / 255: RGB floats in [0, 1]")
        for side in (side for side in sides if side % patch):
            low = side // patch * patch
            raise ValueError(f"image side {side} is not a multiple of the patch size {patch}; "
                             f"use {low or patch} or {low + patch}")
        x = rearrange(self.patch_embed((images - self.mean) / self.std), "b d h w -> b (h w) d")
        pos = resize_pos(self.pos_embed, self.cfg.grid, (sides[0] // patch, sides[1] // patch))
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + pos  # (B, N, D)

    def as_maps(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Lay patch tokens (B, h*w, D) out as maps (B, D, h, w)."""
        return rearrange(tokens, "b (h w) d -> b d h w", h=images.shape[-2] // self.cfg.patch)

    def context_ids(self, names: str | Sequence[str], B: int) -> Tensor:
        """Look up one name for all B images, or one each; returns (B,) int64."""
        names = [names] * B if isinstance(names, str) else list(names)
        if unknown := sorted(set(names) - set(self.contexts)):
            raise ValueError(f"unknown context {', '.join(unknown)}; this student knows "
                             f"{', '.join(self.contexts) or 'none'}")
        return torch.tensor([self.contexts.index(name) for name in names])

    def hear(self, contexts: Sequence[Tensor]) -> Tensor | None:
        """Look up the embeddings (R, D) of contexts, (B,) ids each; None where no block hears any."""
        tables = [e for k in ("teacher_embed", "task_embed") if (e := getattr(self, k, None)) is not None]
        if not tables:
            return None
        ids = torch.stack(list(contexts), 1).flatten()
        return torch.cat(tables)[ids.to(self.mean.device, non_blocking=True)]

    def distill(self, images: Tensor, teacher_ids: Tensor) -> dict[str, list[Tensor]]:
        """Imitate teachers: {teacher: 4 x (B_t, D_t, h, w)}, rows in batch order.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids (B,) int64 into cfg.teachers; students whose blocks
        hear no teacher also take (B, K), K teachers for every image.
        """
        return self(images, teacher_ids).distilled

    def predict(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Solve all tasks in one pass: {task: (B, C_task, H, W)}, raw outputs.

        Logits (semseg, human_parts, sal with 2 channels, edge with 1), unnormalised normals (3), metres
        (depth, 1). images (B, 3, H, W) RGB in [0, 1]. Raises ValueError for a task without a head.
        """
        tasks = list(self.cfg.tasks if tasks is None else tasks)
        if (unknown := [task for task in tasks if task not in self.cfg.tasks]) or not tasks:
            known = ", ".join(self.cfg.tasks) or "no task (stage 1): run train.py --stage recompose"
            raise ValueError(f"no head for {', '.join(unknown) or 'any task'}; this student has heads for "
                             f"{known}")
        return self(images, tasks=tasks).predicted

    def compile_parts(self) -> None:
        """Compile every block and head by itself: short compile times, and DDP can send the gradients of
        one block while the next is computed. Every size of image compiles anew."""
        torch._dynamo.config.recompile_limit = 64  # 8 are used up by the third size, and then it raises
        for block in self.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        for head in self.heads.values():
            head.forward = torch.compile(head.forward, dynamic=False)


def pick_and_map(levels: list[Tensor], rows: Tensor, maps: Sequence[nn.Module] | None) -> list[Tensor]:
    """Map rows of levels (B, D, h, w) to a teacher's width. No rows: empty maps keep `maps` in the graph."""
    rows = rows.to(levels[0].device, non_blocking=True)
    picked = [rearrange(level[rows], "b d h w -> b h w d") for level in levels]
    picked = [f(x) for f, x in zip(maps, picked, strict=True)] if maps is not None else picked
    return [rearrange(x, "b h w d -> b d h w") for x in picked]


class Prism(Student):
    """A ViT whose MoE blocks listen to a context; and the controls, which lack parts of it (CONTROLS).

    Stage 2 is the paper's "route", where each task is a context of its own, or ours, "views": the trunk runs
    in the contexts of the K teachers, and every head reads all K views of each level side by side. So experts
    are combined as they were taken apart, tasks have no context, and K passes serve any number of tasks.
    """

    def __init__(self, cfg: PrismConfig):
        without = cfg.without or CONTROLS.get(cfg.student, ())
        super().__init__(replace(cfg, without=without) if cfg.student == "moe" else cfg)
        self.routed = cfg.student in ("prism", "moe")
        ratios = [cfg.mlp_ratio] * cfg.depth
        for i in cfg.moe_blocks if cfg.student == "wide" else ():  # as wide as all that is active in PRISM's
            ratios[i] += (1 + cfg.top_k) * cfg.expert_ratio
        self.blocks = nn.ModuleList(
            DualStreamBlock(self.cfg) if self.routed and i in cfg.moe_blocks
            else Block(cfg.dim, cfg.heads, int(cfg.dim * ratio)) for i, ratio in enumerate(ratios))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.views = len(cfg.teachers) if self.routed and cfg.recompose == "views" else 0
        if self.views:
            self.contexts = list(cfg.teachers)
        for word, names in (("teacher_embed", cfg.teachers), ("task_embed", () if self.views else cfg.tasks)):
            heard = names and "context" not in without
            setattr(self, word, nn.Parameter(torch.zeros(len(names), cfg.dim)) if heard else None)
        self.projectors = make_projectors(cfg)
        self.heads = make_heads(cfg, self.views or 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start as a plain ViT whose experts are copies of the anchor and whose router hears little."""
        super().init_weights()
        for block in (block for block in self.blocks if isinstance(block, DualStreamBlock)):
            if block.router.film is not None:
                nn.init.normal_(block.router.film.weight, std=self.cfg.film_start)
            if block.gate is not None:
                start = (self.cfg.gate_start - block.gate_min) / (1 - block.gate_min)
                nn.init.constant_(block.gate.bias, math.log(start / (1 - start)))
        self.copy_anchors()

    @torch.no_grad()
    def copy_anchors(self) -> None:
        """Make shared and routed experts copies of their block's anchor (not the narrower lite ones)."""
        if self.cfg.expert_ratio != self.cfg.mlp_ratio:
            return
        for block in (block for block in self.blocks if isinstance(block, DualStreamBlock)):
            experts, model = block.experts, block.anchor or block.shared
            if block.anchor and block.shared:
                block.shared.load_state_dict(block.anchor.state_dict())
            first = [p[0] for p in experts.parameters()]  # w1, b1, w2, b2 of one expert
            for stacked, p in zip(experts.parameters(), model.parameters() if model else first, strict=True):
                stacked.copy_(p.clone().expand_as(stacked))

    def trunk(self, images: Tensor, contexts: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[Route]]:
        """Run all blocks once for all contexts, of which each gives the B images an id, (B,) int64.

        Returns per context 4 levels (B, D, h, w), normed, without cls; and one Route per MoE block. Ids that
        lie on the host spare a GPU the waiting.
        """
        x, levels, routes = self.embed(images), [], []  # (B, N, D)
        heard = self.hear(contexts)  # (R, D)
        for i, block in enumerate(self.blocks):
            if self.routed and i in self.cfg.moe_blocks:
                x, route = block(x, heard)  # (R, N, D) from the first one on
                routes.append(route)
            else:
                x = block(x)
            if i in self.cfg.moe_blocks:
                levels.append(self.as_maps(self.norm(x)[:, 1:], images))  # (R, D, h, w)
        if heard is None:  # all contexts share one pass
            return [levels] * len(contexts), routes
        levels = [x.unflatten(0, (-1, len(contexts))).unbind(1) for x in levels]
        return [list(own) for own in zip(*levels, strict=True)], routes

    def forward(self, images: Tensor, teacher_ids: Tensor | None = None, tasks: Sequence[str] = ()) -> Output:
        """Run every context of a training step in one batched pass.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids (B,) int64, the teacher of each image, or None.
        """
        if self.views and tasks:
            contexts = [torch.full([len(images)], i) for i in range(self.views)]
            taught, routes = self.trunk(images, contexts)  # per teacher
            levels = [[torch.cat(views, 1) for views in zip(*taught, strict=True)]] * len(tasks)
        else:
            contexts = [self.context_ids(task, len(images)) for task in tasks]
            contexts += [] if teacher_ids is None else [teacher_ids.cpu()]
            levels, routes = self.trunk(images, contexts)
            taught = levels[-1:] * len(self.cfg.teachers)
        predicted = {task: self.heads[task](own, images.shape[-2:])
                     for task, own in zip(tasks, levels, strict=False)}
        if teacher_ids is None:
            return Output({}, predicted, [], routes)
        distilled = {name: pick_and_map(taught[i], torch.where(teacher_ids == i)[0], projectors)
                     for i, (name, projectors) in enumerate(self.projectors.items())}
        return Output(distilled, predicted, taught[-1], routes)

    def features(self, images: Tensor, context: str | Sequence[str]) -> list[Tensor]:
        """Return 4 levels (B, D, h, w) of RGB images in [0, 1] (B, 3, H, W) under a teacher or task.

        context: one name for all images, or B names. Raises ValueError for an unknown name.
        """
        return self.trunk(images, [self.context_ids(context, len(images))])[0][0]

    def route(self, images: Tensor, context: str | Sequence[str]) -> list[Route]:
        """Return what the router of each MoE block decides under a teacher or task; [] without routers."""
        return self.trunk(images, [self.context_ids(context, len(images))])[1]


# ------------------------------------------------------------------------------------------------ SAK


class Adapter(nn.Module):
    """A bottleneck with a learned scale on all tokens: z + s * up(gelu(down(z)))."""

    def __init__(self, dim: int):
        super().__init__()
        self.down = nn.Linear(dim, dim // 4)
        self.up = nn.Linear(dim // 4, dim)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.scale * self.up(F.gelu(self.down(z)))


class Mixer(nn.Module):
    """SAK's router of one level and task: a convex mix of the stem and all paths.

    The logits are one vector per image, the noise on them in training one per patch (released code).
    """

    LEAST_NOISE = 0.01  # released code

    def __init__(self, dim: int, sources: int):
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.LayerNorm(dim // 2), nn.GELU(), nn.Linear(dim // 2, 2 * sources),
        )

    def gates(self, stem: Tensor) -> Tensor:
        """Weigh the S sources by the stem's patches (B, n, D): (B, n, S) in training, else (B, 1, S)."""
        logits, spread = self.score(stem).mean(1, keepdim=True).chunk(2, dim=-1)  # (B, 1, S) each
        if self.training:
            noise = own_share(torch.randn, logits.expand(-1, stem.shape[1], -1))  # (B, n, S)
            logits = logits + noise * (F.softplus(spread) + self.LEAST_NOISE)
        return logits.softmax(-1)

    def forward(self, stem: Tensor, paths: Sequence[Tensor]) -> Tensor:
        """Mix the stem and the paths, (B, n, D) each; returns (B, n, D)."""
        gates = self.gates(stem).unbind(-1)  # S x (B, n or 1)
        return sum(gate.unsqueeze(-1) * x for gate, x in zip(gates, [stem, *paths], strict=True))


class SAK(Student):
    """The baseline: a plain ViT as stem, a path of adapters per teacher, and per task a mix of them all.

    With x_i the tokens after block i of the stem, x_0 its input, teacher k's path is
    R_0 = A_0(x_0), R_i = A_i(R_{i-1} + x_i); nothing flows back. Its levels are normed, the stem's raw.
    Every image can serve every teacher in one pass, since only the small paths differ.
    """

    routed = False

    def __init__(self, cfg: PrismConfig):
        super().__init__(replace(cfg, student="sak"))
        D, taps = cfg.dim, range(len(cfg.moe_blocks))

        def chains(names, make) -> nn.ModuleDict:
            return nn.ModuleDict({name: nn.ModuleList(make(name)) for name in names})

        self.blocks = nn.ModuleList(Block(D, cfg.heads, int(D * cfg.mlp_ratio)) for _ in range(cfg.depth))
        self.adapters = chains(cfg.teachers, lambda _: (Adapter(D) for _ in range(cfg.depth + 1)))
        self.out_norms = chains(cfg.teachers, lambda _: (nn.LayerNorm(D, eps=1e-5) for _ in taps))
        self.aligners = chains([t for t, width in cfg.teachers.items() if width != D],
                               lambda t: (nn.Linear(D, cfg.teachers[t]) for _ in taps))
        self.mixers = chains(cfg.tasks, lambda _: (Mixer(D, 1 + len(cfg.teachers)) for _ in taps))
        self.heads = make_heads(cfg)
        self.init_weights()

    def trunk(self, images: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Run the stem with all paths beside it, once.

        images (B, 3, H, W) RGB in [0, 1]. Returns patch tokens (B, n, D), without cls: 4 levels of the
        stem, raw, and per teacher 4 levels of its path, normed.
        """
        x, stem = self.embed(images), []  # (B, N, D)
        path = {name: chain[0](x) for name, chain in self.adapters.items()}
        paths = {name: [] for name in path}
        for i, block in enumerate(self.blocks):
            x = block(x)
            path = {name: chain[i + 1](path[name] + x) for name, chain in self.adapters.items()}
            if i in self.cfg.moe_blocks:
                for name, norms in self.out_norms.items():
                    paths[name].append(norms[len(stem)](path[name][:, 1:]))
                stem.append(x[:, 1:])
        return stem, paths

    def levels(self, images: Tensor, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Return {name: 4 levels (B, D, h, w)}: of a teacher its path, of a task what its mixers make."""
        stem, paths = self.trunk(images)
        beside = list(zip(*paths.values(), strict=True)) or [()] * len(stem)
        found = {name: paths[name] if name in paths else
                 [mixer(*level) for mixer, *level in zip(self.mixers[name], stem, beside, strict=True)]
                 for name in names}
        return {name: [self.as_maps(x, images) for x in levels] for name, levels in found.items()}

    def forward(self, images: Tensor, teacher_ids: Tensor | None = None, tasks: Sequence[str] = ()) -> Output:
        """Run stem and paths once, and what teachers and tasks ask of them; levels and routes stay empty.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids int64 (B,), one teacher per image, or (B, K), K
        teachers per image (all: `torch.arange(K).expand(B, K)`), or None.
        """
        taught = [] if teacher_ids is None else list(self.cfg.teachers)
        levels = self.levels(images, [*tasks, *taught])
        predicted = {task: self.heads[task](levels[task], images.shape[-2:]) for task in tasks}
        distilled = {name: pick_and_map(levels[name], torch.where(teacher_ids == i)[0],
                                        self.aligners[name] if name in self.aligners else None)
                     for i, name in enumerate(taught)}
        return Output(distilled, predicted, [], [])

    def features(self, images: Tensor, context: str | Sequence[str]) -> list[Tensor]:
        """Return 4 levels (B, D, h, w) as Prism's: under a teacher its path, not aligned."""
        names = [self.contexts[i] for i in self.context_ids(context, len(images)).tolist()]
        levels = self.levels(images, sorted(set(names)))
        rows = zip(*([level[i] for level in levels[n]] for i, n in enumerate(names)), strict=True)
        return [torch.stack(level) for level in rows]


CONTROLS = {"dense": ("context",), "wide": ("context",), "moe": ("anchor", "shared", "context")}
STUDENTS = {"prism": Prism, "sak": SAK} | dict.fromkeys(CONTROLS, Prism)


def build(cfg: PrismConfig) -> Student:
    """Make the new student, or Prismer, that cfg describes. Raises ValueError."""
    if isinstance(cfg, PrismerConfig):
        return Prismer(cfg)
    check_config(cfg)
    return STUDENTS[cfg.student](cfg)


def check_config(cfg: PrismConfig) -> None:
    """Raise ValueError where sizes do not fit together."""
    least = min(cfg.dim * cfg.mlp_ratio, cfg.dim * cfg.expert_ratio, *cfg.grid, *cfg.tasks.values())
    if least < 1:
        raise ValueError(f"a side, a head or a hidden layer of the student has size {least}; use more")
    if cfg.student not in STUDENTS:
        raise ValueError(f"student {cfg.student!r} is not known; use {' or '.join(STUDENTS)}")
    if len(set(cfg.moe_blocks)) != 4 or max(cfg.moe_blocks) >= cfg.depth or min(cfg.moe_blocks) < 0:
        raise ValueError(f"moe_blocks {cfg.moe_blocks} must be four of the {cfg.depth} blocks, from 0")
    if cfg.without and cfg.student not in ("prism", "moe"):
        raise ValueError(f"without {', '.join(cfg.without)}: {cfg.student} has no such parts; use prism")
    if cfg.student in ("prism", "moe") and not 1 <= cfg.top_k <= cfg.experts <= 255:
        raise ValueError(f"top_k {cfg.top_k} of {cfg.experts} experts; need 1 <= top_k <= experts <= 255")
    if not 0.5 * cfg.official < cfg.gate_start < 1:
        raise ValueError(f"gate_start {cfg.gate_start} must lie between 0 and 1, official: between 0.5 and 1")
    if cfg.dim % cfg.heads or cfg.dim % 4 or cfg.patch % 4:
        raise ValueError(f"dim {cfg.dim}, heads {cfg.heads}, patch {cfg.patch}: dim must be a multiple of "
                         "heads and of 4, patch of 4")


def resize_pos(pos: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Resize a position table (1, 1 + h*w, D), cls first, from grid (h, w) to another, bicubic."""
    if grid == to:
        return pos
    table = rearrange(pos[:, 1:], "1 (h w) d -> 1 d h w", h=grid[0])
    table = F.interpolate(table, size=to, mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], rearrange(table, "1 d h w -> 1 (h w) d")], 1)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count parameters: all, and those that work on one token (K of E experts)."""
    total = active = sum(p.numel() for p in model.parameters())
    for block in (m for m in model.modules() if isinstance(m, DualStreamBlock)):
        cfg, routed = block.router.cfg, sum(p.numel() for p in block.experts.parameters())
        active -= routed // cfg.experts * (cfg.experts - cfg.top_k)
    return total, active


# -------------------------------------------------------------------------------------------- Prismer
# "Prismer" (TMLR 2024, arXiv 2303.02506) captions a photo and reads, beside it, the maps that other networks
# draw of it. There these are six experts; here one frozen student draws all maps, and is the trunk as well.

SEMANTIC = 64  # channels of a map of classes
FINAL = {  # kind of task -> the map that is scored and read, (B, H, W [, 3]), of raw outputs (B, C, H, W)
    "classes": lambda x: x.argmax(1),
    "mask": lambda x: x.softmax(1)[:, 1],
    "edge": lambda x: x[:, 0].sigmoid(),
    "normals": lambda x: F.normalize(x, dim=1).permute(0, 2, 3, 1),
    "number": lambda x: x[:, 0],
}


@dataclass(frozen=True)
class PrismerConfig:
    """Describe a Prismer completely; stored in its checkpoint. Defaults are the base model's."""

    trunk: PrismConfig  # the student
    words: tuple[str, ...]  # the vocabulary, by token id
    merges: tuple[str, ...] = ()  # byte pairs, in the order in which they merge; none: tokens are words
    maps: tuple[str, ...] = ()  # tasks whose maps are read; none: PrismerZ
    latents: int = 64  # tokens into which the resampler sums up all maps
    resampler: int = 4  # its blocks
    dim: int = 768  # width D of the decoder
    depth: int = 12  # its layers, but for the output layer
    heads: int = 12
    positions: int = 514  # rows of its position table; the first two stay unused
    dropout: float = 0.1
    prefix: str = ""  # how every caption begins; no part of the loss


class Adaptor(nn.Module):
    """W_u ReLU(W_d z)^2, without a bottleneck; `norm` is for z in the trunk, for the sum in the decoder."""

    def __init__(self, dim: int):
        super().__init__()
        self.down, self.up, self.norm = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)
        nn.init.normal_(self.up.weight, std=1e-3)  # near zero, as the paper says; its code: torch's default

    def forward(self, z: Tensor) -> Tensor:
        return self.up(F.relu(self.down(z)).square())


class Stem(nn.Sequential):
    """Five convolutions that make tokens of a task's map; of classes, at a quarter of the others' pixels."""

    def __init__(self, task: str, cfg: PrismConfig):
        kind, D, layers = data.TASKS[task].kind, cfg.dim, []
        channels, self.side, strides = {"normals": 3}.get(kind, 1), 16, (2, 2, 2, 2)
        if kind == "classes":
            channels, self.side, strides = SEMANTIC, 4, (2, 2, 1, 1)
        for a, b, stride in zip((channels, D // 8, D // 4, D // 2), (D // 8, D // 4, D // 2, D), strides,
                                strict=True):
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), BatchNorm(b), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(D, D, 1, bias=False))
        self.kind, self.patch = kind, cfg.patch
        if kind == "classes":
            self.register_buffer("features", torch.zeros(cfg.tasks[task], SEMANTIC))

    def forward(self, raw: Tensor) -> Tensor:
        """Read a head's raw output (B, C, H, W), scaled per image: (B, D, H / patch, W / patch)."""
        x, size = FINAL[self.kind](raw), [n * self.side // self.patch for n in raw.shape[-2:]]
        if self.kind == "classes":
            x = self.features[x].movedim(3, 1)  # (B, 64, H, W)
        else:
            x = x.movedim(3, 1) if x.ndim == 4 else x.unsqueeze(1)  # (B, 3 or 1, H, W)
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = 2 * (x - low) / (high - low).clamp(min=1e-6) - 1
        return super().forward(F.interpolate(x, size, mode="bilinear", align_corners=True))


class ResamplerBlock(nn.TransformerEncoderLayer):
    """Latents (B, L, D) look at themselves and at the tokens of all maps (B, M, D)."""

    def __init__(self, dim: int):
        super().__init__(dim, 8, 4 * dim, 0.0, batch_first=True)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, latents: Tensor, maps: Tensor) -> Tensor:
        x = self.norm1(latents)
        both = torch.cat([x, self.norm2(maps)], 1)  # (B, L + M, D)
        latents = latents + self.self_attn(x, both, both, need_weights=False)[0]
        return latents + self.linear2(F.relu(self.linear1(self.norm3(latents))).square())


class TextLayer(nn.TransformerDecoderLayer):
    """RoBERTa's post-norm block with cross-attention and, before the MLP, an adaptor."""

    def __init__(self, cfg: PrismerConfig):
        super().__init__(cfg.dim, cfg.heads, 4 * cfg.dim, cfg.dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(
            cfg.dim, cfg.heads, cfg.dropout, kdim=cfg.trunk.dim, vdim=cfg.trunk.dim, batch_first=True)
        self.adaptor = Adaptor(cfg.dim)

    def forward(self, y: Tensor, seen: Tensor, future: Tensor) -> Tensor:
        """Map y (B, T, D) that sees (B, M, w); future (T, T) is True where a token must not look."""
        y = self.norm1(y + self._sa_block(y, future, None))
        y = self.norm2(y + self._mha_block(y, seen, None, None))
        y = self.adaptor.norm(y + self.adaptor(y))
        return self.norm3(y + self.dropout3(self.linear2(F.gelu(self.linear1(y)))))


class Decoder(nn.Module):
    """RoBERTa, made to tell a caption's next token from those before it and from what the trunk saw."""

    def __init__(self, cfg: PrismerConfig):
        super().__init__()
        V, D = len(cfg.words), cfg.dim
        self.words, self.places, self.kind = (nn.Embedding(rows, D) for rows in (V, cfg.positions, 1))
        self.norm, self.drop = nn.LayerNorm(D), nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(TextLayer(cfg) for _ in range(cfg.depth))
        self.output = nn.TransformerEncoderLayer(D, cfg.heads, 4 * D, cfg.dropout, "gelu", batch_first=True)
        self.output.dropout = nn.Identity()  # RoBERTa drops after its MLP, not within
        self.head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))
        self.bias = nn.Parameter(torch.zeros(V))
        for name, p in self.named_parameters():
            if p.ndim > 1 and "adaptor.up" not in name:
                nn.init.normal_(p, std=0.02 * (768 / D) ** 0.5)  # RoBERTa's 0.02 at the base width

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Return logits (B, T, V) of what follows each of tokens (B, T) int64; padding is on the right."""
        known, T = tokens != data.PAD, tokens.shape[1]
        places = self.places(known.cumsum(1) * known + data.PAD)  # counted from 2, as RoBERTa does
        y = self.drop(self.norm(self.words(tokens) + places + self.kind.weight))  # (B, T, D)
        future = torch.ones(T, T, dtype=torch.bool, device=y.device).triu(1)  # padding is future, too
        for block in self.blocks:
            y = block(y, seen, future)
        return F.linear(self.head(self.output(y, future)), self.words.weight, self.bias)


class Prismer(nn.Module):
    """A captioner around a frozen student: all but the student's own weights is trained."""

    def __init__(self, cfg: PrismerConfig):
        super().__init__()
        D, patch = cfg.trunk.dim, cfg.trunk.patch
        self.cfg, self.student, self.text = cfg, build(cfg.trunk), Decoder(cfg)
        self.contexts, self.tokenizer = self.student.contexts, data.Tokenizer(cfg.words, cfg.merges)
        self.start = [data.START, *self.tokenizer.encode(cfg.prefix)]  # no part of the loss
        self.rgb = nn.Conv2d(3, D, patch, patch, bias=False)
        self.pos = nn.Parameter(torch.zeros(1, math.prod(cfg.trunk.grid), D))
        self.stems = nn.ModuleDict({task: Stem(task, cfg.trunk) for task in cfg.maps})
        if cfg.maps:
            self.latents = nn.Parameter(torch.randn(1, cfg.latents, D) * D**-0.5)
            self.resampler = nn.ModuleList(ResamplerBlock(D) for _ in range(cfg.resampler))
            self.norm_pre = nn.LayerNorm(D)
        self.norm_post = nn.LayerNorm(D)
        self.adaptors = nn.ModuleList(Adaptor(D) for _ in self.student.blocks)

    def compile_parts(self) -> None:
        """Compile the decoder's layers one by one."""
        for block in self.text.blocks:
            block.forward = torch.compile(block.forward)

    def train(self, mode: bool = True) -> "Prismer":
        """Switch the mode of all but the student, which stays as it is scored."""
        super().train(mode)
        self.student.eval()
        return self

    def freeze(self, language: bool) -> None:
        """Freeze the student; language: and what RoBERTa has in its layers, as the paper pre-trains."""
        for name, p in self.named_parameters():
            roberta = re.match(r"text\.blocks\.\d+\.(self_attn|norm[13]|linear)", name)
            p.requires_grad = not (name.startswith("student.") or (language and roberta))

    @torch.no_grad()
    def start_from(self, student: Student, classes: dict[str, Sequence[str]]) -> None:
        """Take over a student; classes: the names that its tasks' classes have.

        A class becomes the first 64 principal components of the mean word embeddings of all names, of norm 6
        on average (the reference: of CLIP's text embeddings).
        """
        self.student.load_state_dict(student.state_dict())
        self.rgb.weight.copy_(student.patch_embed.weight)
        self.pos.copy_(student.pos_embed[:, 1:] + student.patch_embed.bias)
        if hasattr(student, "norm"):
            self.norm_post.load_state_dict(student.norm.state_dict())
        for task, stem in self.stems.items():
            if stem.kind == "classes":
                ids = (self.tokenizer.encode(f" {name}") for name in classes[task])
                x = torch.stack([self.text.words.weight[i].mean(0) for i in ids])  # (classes, D)
                u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
                x = (u * s)[:, :SEMANTIC]
                stem.features[:, : x.shape[1]] = 6 * x / x.norm(dim=1).mean()

    def see(self, images: Tensor) -> Tensor:
        """Look at RGB in [0, 1] (B, 3, H, W), of the trunk's size, and at the student's maps of it.

        Returns all that the decoder reads, (B, h * w + latents, D). Patches enter the trunk as the student's
        own do; the reference norms them, too, since its trunk (CLIP) brings a norm there.
        """
        student = self.student
        with torch.no_grad():  # without adaptors, else training would change its own input
            raw = student.predict(images, self.cfg.maps) if self.cfg.maps else {}
        drawn = [self.rgb((images - student.mean) / student.std)]  # (B, D, h, w) each; positions are the
        drawn += [stem(raw[task]) for task, stem in self.stems.items()]  # same, stems tell maps apart
        z, *rest = (rearrange(x, "b d h w -> b (h w) d") + self.pos for x in drawn)
        if rest:
            latents, rest = self.latents.expand(len(z), -1, -1), torch.cat(rest, 1)
            for block in self.resampler:
                latents = block(latents, rest)
            z = torch.cat([z, self.norm_pre(latents)], 1)  # (B, h * w + latents, D)
        context = student.hear([student.context_ids(self.contexts[0], len(z))])
        for block, adaptor in zip(student.blocks, self.adaptors, strict=True):
            z = z + block.attn(block.norm1(z))
            z = z + adaptor(adaptor.norm(z))
            dual = isinstance(block, DualStreamBlock)
            z = block.streams(z, context)[0] if dual else z + block.mlp(block.norm2(z))
        return self.norm_post(z)

    def encode(self, text: str) -> Tensor:
        """Return the tokens (T,) int64 of a caption: <s>, prefix, text, </s>."""
        ids = self.tokenizer.encode(f" {text}" if self.cfg.prefix else text)
        return torch.tensor([*self.start, *ids][: self.cfg.positions - 3] + [data.END])

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) of what follows each of tokens (B, T) int64, given RGB in [0, 1]."""
        return self.text(tokens, self.see(images))

    @torch.inference_mode()
    def caption(self, images: Tensor, beams: int = 3) -> list[str]:
        """Caption RGB in [0, 1] (B, 3, H, W) by beam search (1: greedily), the same every time."""
        seen = self.eval().see(images).repeat_interleave(beams, 0)
        found = beam_search(lambda tokens: self.text(tokens.to(seen.device), seen)[:, -1].float().cpu(),
                            self.start, len(images), beams, self.cfg.positions - 2)
        return [self.tokenizer.decode(ids) for ids in found.tolist()]


def beam_search(score: Callable[[Tensor], Tensor], start: Sequence[int], images: int, beams: int,
                most: int) -> Tensor:
    """Find the tokens after `start` of the best mean log-probability, </s> included: (images, T) int64.

    score maps tokens (images * beams, T) to logits of the next one (images * beams, V). A caption that has
    ended keeps its beam until `beams` better ones push it out. most: tokens of a whole caption.
    """
    tokens, length = torch.tensor(start).repeat(images * beams, 1), torch.zeros(images * beams)
    total = torch.tensor([0.0] + [-math.inf] * (beams - 1)).repeat(images)  # they start alike: one counts
    while tokens.shape[1] < most:
        ended = torch.isin(tokens[:, -1], torch.tensor([data.END, data.PAD]))
        if ended.all():
            break
        logp = score(tokens).log_softmax(-1)  # (images * beams, V)
        logp[:, data.PAD] = logp[ended] = -math.inf
        logp[ended, data.PAD] = 0.0
        length, sums, V = length + ~ended, total[:, None] + logp, logp.shape[1]
        at = (sums / length[:, None]).view(images, -1).topk(beams).indices  # (images, beams), the best first
        rows = (beams * torch.arange(images)[:, None] + at // V).flatten()
        total, length = sums.view(images, -1).gather(1, at).flatten(), length[rows]
        tokens = torch.cat([tokens[rows], at.view(-1, 1) % V], 1)
    return tokens[::beams, len(start):]


# ----------------------------------------------------------------------------------- what makes it fast

# Rows lie sorted by expert; ends (E,) int32 tells where each expert's run ends. One operator, opaque to the
# compiler, since the sizes of the runs are data. On a GPU it is one kernel, and nothing waits for the host.


def grouped(x: Tensor) -> bool:  # what the kernel is for
    return x.is_cuda and x.dtype == torch.bfloat16


def runs(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]


def empty_gradients(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:  # of x, w1, b1, w2, b2
    return tuple(torch.empty_like(t) for t in (x, w1, w1[..., 0], w2, w2[..., 0]))


@torch.library.custom_op("prism::expert_mlps", mutates_args=())
def expert_mlps(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, expert: Tensor,
                ends: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Run each expert's MLP on its rows x (S, D), by expert (S,); returns (S, D), and the GELU's input z
    (S, hidden), of no rows where there is no backward to `keep` it for."""
    if grouped(x):
        own = expert.int()
        z = F.grouped_mm(x.contiguous(), w1.transpose(1, 2), offs=ends) + b1[own]
        y = F.grouped_mm(F.gelu(z), w2.transpose(1, 2), offs=ends) + b2[own]
        return y, z if keep else z[:0].clone()
    y, z = torch.empty_like(x), x.new_empty(len(x) * keep, w1.shape[1])
    for e, own in enumerate(runs(ends)):  # both products of an expert in turn: its rows stay in the cache
        hidden = torch.addmm(b1[e], x[own], w1[e].t(), out=z[own] if keep else None)
        torch.addmm(b2[e], F.gelu(hidden), w2[e].t(), out=y[own])
    return y, z


@torch.library.custom_op("prism::expert_mlps_backward", mutates_args=())
def expert_mlps_backward(grad: Tensor, x: Tensor, z: Tensor, w1: Tensor, w2: Tensor, expert: Tensor,
                         ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w1, b1, w2, b2; an expert without rows gets zeros."""
    if grouped(x):
        grad, x = grad.contiguous(), x.contiguous()  # the compiler may choose strides that the kernel refuses
        E, mm = len(w1), partial(F.grouped_mm, offs=ends)
        # E rounded up to rows of 16 bytes: others fall to slow kernels.
        one_hot = F.one_hot(expert.long(), -E // 8 * -8).to(x.dtype).t()  # (E, S); adding by index loses 5 %
        d_z = torch.ops.aten.gelu_backward(mm(grad, w2), z)
        d_b1, d_b2 = ((one_hot @ d)[:E] for d in (d_z, grad))
        return mm(d_z, w1), mm(d_z.t(), x), d_b1, mm(grad.t(), F.gelu(z)), d_b2
    d_x, d_w1, d_b1, d_w2, d_b2 = room = empty_gradients(x, w1, w2)
    for e, own in enumerate(runs(ends)):
        d_z = torch.ops.aten.gelu_backward(grad[own] @ w2[e], z[own])
        for d, u, d_w, d_b in ((grad[own], F.gelu(z[own]), d_w2, d_b2), (d_z, x[own], d_w1, d_b1)):
            torch.mm(d.t(), u, out=d_w[e])
            torch.sum(d, 0, out=d_b[e])
        torch.mm(d_z, w1[e], out=d_x[own])
    return room


def keep_for_backward(ctx, inputs, output) -> None:
    x, w1, _, w2, _, expert, ends, _ = inputs
    ctx.save_for_backward(x, output[1], w1, w2, expert, ends)
    ctx.set_materialize_grads(False)  # nobody differentiates z


expert_mlps.register_autograd(
    lambda ctx, grad, _: (*expert_mlps_backward(grad.contiguous(), *ctx.saved_tensors), *[None] * 3),
    setup_context=keep_for_backward)
expert_mlps.register_fake(lambda x, w1, *rest: (
    torch.empty_like(x), x.new_empty(len(x) * rest[-1], w1.shape[1])))
expert_mlps_backward.register_fake(lambda grad, x, z, w1, w2, *_: empty_gradients(x, w1, w2))
register_flop_formula(torch.ops.prism.expert_mlps)(lambda x, w1, *_, **__: 4 * x[0] * w1[1] * w1[2])
register_flop_formula(torch.ops.prism.expert_mlps_backward)(
    lambda grad, x, z, w1, *_, **__: 8 * x[0] * w1[1] * w1[2])


class _Reorder(torch.autograd.Function):
    """Take rows x[index]; `back` undoes it, so that the backward is a gather too, free of atomics.

    x (S, D), index (S * copies,), back (S * copies,): where copy c of row s went, at s * copies + c.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.shape[-1]).sum(1)
        return grad, None, None, None


def convolve_enlarged(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge patches (B, h, w, D) to `size` bilinearly, then convolve 3 x 3: (B, D, *size).

    Enlarging and convolving are both linear, and the few patches are all that there is to know. So
    each of the 3 x 3 taps is applied to patches, where it costs 1/16 (patch 16) of what it costs at a
    quarter of the pixels; then all taps are enlarged, shifted and added by two matrix products.
    """
    (B, h, w, D), (tall, wide) = tokens.shape, size
    taps = rearrange(weight, "out d i j -> i (j out) d")  # (3, 3 D, D), one matrix per row of taps
    rows, columns = (shifted_bilinear(n, m, tokens) for n, m in ((h, tall), (w, wide)))
    x = None
    for i in range(3):  # the bias rides on the central tap, whose interpolation keeps constants
        tap = F.linear(tokens, taps[i], F.pad(bias, (D, D)) if i == 1 else None)  # (B, h, w, 3 D)
        enlarged = torch.bmm(rows[i].expand(B, -1, -1), tap.flatten(2))  # (B, tall, w * 3 D)
        x = enlarged if x is None else x.add_(enlarged)
    columns = rearrange(columns, "j wide w -> wide (w j)").expand(B * tall, -1, -1)
    x = torch.bmm(columns, x.view(B * tall, w * 3, D))  # (B * tall, wide, D)
    return rearrange(x, "(b y) x d -> b d y x", b=B)  # channels last in memory


def shifted_bilinear(n: int, m: int, like: Tensor) -> Tensor:
    """Return (3, m, n): the matrix that enlarges n values to m bilinearly, then shifts by -1, 0 or 1.

    What a 3 x 3 convolution with zero padding sees of the enlarged map, along one axis.
    """
    identity = torch.eye(n, device=like.device, dtype=torch.float64).unsqueeze(0)  # (1, n, n)
    enlarge = F.interpolate(identity, size=m, mode="linear", align_corners=False)[0].t()  # (m, n)
    padded = F.pad(enlarge, (0, 0, 1, 1))  # (m + 2, n)
    return torch.stack([padded[i : i + m] for i in range(3)]).to(like.dtype)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over all ranks, on CPU too (SyncBatchNorm needs a GPU), so that N processes equal one."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        x, dtype, count = x.float(), x.dtype, x.numel() // x.shape[1] * dist.get_world_size()
        sums = all_reduce(torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))]))  # (2, C)
        mean = sums[0] / count
        var = sums[1] / count - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(dtype)


# -------------------------------------------------------------------------------------- save and load


def choose_device(name: str | None) -> torch.device:
    """Return the device that is named, or a GPU if there is one. Raises ValueError."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}, but torch sees no GPU; use --device cpu")
    return device


def write_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write atomically: write(a temporary file), fsync, rename. Killed at any moment, or out of space, it
    leaves the old file whole under its name. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own follows the one that says why
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cannot write {path}: {one_line(first)}; free space or choose another folder "
                      "(nothing was overwritten)") from error
    finally:
        temporary.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """Shorten an error to its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def write_checkpoint(path: str | Path, content: dict) -> None:
    """Write model, config and plain values for `read_checkpoint`; *.safetensors: without the optimizer."""
    if Path(path).suffix != ".safetensors":
        return write_file(path, lambda file: torch.save(content, file))
    state = {k: v.detach().cpu().contiguous() for k, v in content["model"].items()}
    facts = {k: json.dumps(v) for k, v in content.items() if k not in ("model", "optimizer")}
    write_file(path, lambda file: save_file(state, file, facts))


def read_file(path: Path) -> dict:
    """Read plain values from a pickle; of safetensors, "model" is the weights. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head.endswith(b"{"):  # safetensors, whatever the name
            with safe_open(path, "pt") as file:
                facts = {k: json.loads(v) for k, v in (file.metadata() or {}).items() if k != "format"}
                return facts | {"model": {k: file.get_tensor(k) for k in file.keys()}}
        if is_zipfile(path) and (bad := ZipFile(path).testzip()):  # torch does not look
            raise ValueError(f"{bad} in it differs from its checksum")
        with torch.serialization.safe_globals([Namespace]):  # settings beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; pickle's own text is a page of advice
        why = one_line(error).partition(". ")[0]
        raise ValueError(f"{path} cannot be read as weights alone ({why}); delete it, make anew") from error
    return content if isinstance(content, dict) else {}


def read_checkpoint(path: str | Path, grid: tuple[int, int] | None = None) -> dict:
    """Read what `write_checkpoint` wrote; a released file of PRISM or SAK comes back in the same form.

    grid: see from_released. Raises FileNotFoundError or ValueError with what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; train one with `python train.py`, "
                                "or name one that does")
    content = read_file(path)
    if "model" not in content:
        raise ValueError(f"{path} is no student; name one of train.py's, of prism.save, or a released one")
    for task, row in content.get("provenance", {}).get("tasks", {}).items():
        data.TASKS.setdefault(task, data.Task(**row))  # of its data's own: known from now on
    if "config" in content:
        return content
    cfg, state = from_released(content["model"], path, grid)
    return {"model": state, "config": asdict(cfg)}


def is_student(path: str | Path) -> bool:
    """Tell a student's file, ours or a released one, from a plain ViT's."""
    try:
        return bool(read_checkpoint(path))
    except (OSError, ValueError):
        return False


def config_from(stored: dict, path: str | Path) -> PrismConfig:
    """Rebuild the config that a checkpoint stores as plain values. Raises ValueError."""
    try:
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        if "trunk" in plain:
            return PrismerConfig(**plain | {"trunk": config_from(plain["trunk"], path)})
        cfg = PrismConfig(**plain)
        check_config(cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: {error}; was it written by another version?") from None
    return cfg


def load(path: str | Path, device: str = "cpu", grid: tuple[int, int] | None = None) -> Student:
    """Load a student, or a Prismer, in eval mode: a checkpoint of ours, or a released one of PRISM or SAK.

    grid (h, w) in patches: resize the position table to it; a released one of just so many patches does
    not say its rows and columns, and is taken to be of this grid. Raises OSError or ValueError.
    """
    content = read_checkpoint(path, grid)
    model = build(config_from(content["config"], path))
    load_strict(model, content["model"], path)
    if grid is not None and isinstance(model, Student) and tuple(grid) != model.cfg.grid:
        model.pos_embed = nn.Parameter(resize_pos(model.pos_embed.data, model.cfg.grid, tuple(grid)))
        model.cfg = replace(model.cfg, grid=tuple(grid))
    model.provenance = content.get("provenance", {})
    return model.to(device).eval()


def save(model: Student, path: str | Path) -> None:
    """Write weights, config and origin to `path`, for `load`: to one safetensors file if it is named so."""
    write_checkpoint(path, {"model": model.state_dict(), "config": asdict(model.cfg),
                            "provenance": getattr(model, "provenance", {})})


def load_strict(model: nn.Module, state: dict[str, Tensor], path: str | Path, new: tuple[str, ...] = (),
                dropped: tuple[str, ...] = ()) -> str:
    """Load weights, allowing only key prefixes named in advance to be `new` here or `dropped` from there.

    Returns "loaded 312, new 24 (heads), dropped 6 (projectors)". Raises ValueError for any other key or
    shape, before anything is loaded.
    """
    own = model.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    wrong = [f"{k} is missing" for k in missing if not k.startswith(new)]
    wrong += [f"{k} has no place" for k in extra if not k.startswith(dropped)]
    wrong += [f"{k} is {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
              for k in own if k in state and own[k].shape != state[k].shape]
    wrong += [f"{k} holds nan or inf" for k, v in state.items() if not v.isfinite().all()]
    if wrong:
        raise ValueError(f"weights of {path} do not fit ({len(wrong)} keys, first: {wrong[0]}); a student "
                         "needs the size, teachers and tasks that it was trained with")
    model.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}})
    parts = [f"loaded {len(own) - len(missing)}"]
    for word, keys in (("new", missing), ("dropped", extra)):
        if keys:
            groups = {re.sub(r"blocks\.\d+\.", "", k).split(".")[0] for k in keys}
            parts.append(f"{word} {len(keys)} ({', '.join(sorted(groups))})")
    return ", ".join(parts)


RELEASED_TEACHERS = ("dinov2", "clip", "sam")  # in the order of the released configs, ids and gates
RELEASED_TASKS = ("semseg", "human_parts", "normals", "edge", "sal", "depth")  # in the embeddings' order
RELEASED_NAMES = [  # keys of both released codes, of either stage -> ours: all of these, one after the other
    (r"^backbone\.(?!blocks|cls_token|pos_embed|patch_embed|norm)", ""),  # what stage 2 puts before stage 1
    (r"^(vit|backbone)\.", ""),
    (r".*(task_composer|task_free|ortho_loss|variance_loss).*", ""),  # not needed
    (r"moe_ffn_layer\.experts\.(\d+)\.fc(\d)\.([wb]).*", r"experts.\1.\3\2"),
    (r"\.fc1\.", ".0."), (r"\.fc2\.", ".2."), (r"patch_embed\.proj", "patch_embed"),
    (r"linear_fuse", "fuse"), (r"last_conv", "last"),
    (r"^tsap\.", "adapters."), (r"^out_norms\.(\d+)_(\w+)", r"out_norms.\2.@\1"),
    (r"^ts_aligners\.(\d+)_(\w+)", r"aligners.\2.@\1"),
    (r"^mor\.(\d+)_(\w+)\.router\.module", r"mixers.\2.@\1.score"),
    (r"moe_ffn_layer\.", ""), (r"shared_expert", "shared"), (r"standard_ffn", "anchor"),
    (r"gate_linear", "gate"), (r"film_layer\.to_gamma_beta", "film"), (r"W_gate_stage1", "film_gate"),
    (r"W_g_base", "logits"), (r"W_noise", "noise"),
    (r"^vfm_condition_embeddings\.weight", "teacher_embed"),
    (r"^task_condition_embeddings\.weight", "task_embed"),
    *((rf"^vfm_projection_heads\.{i}_(\d)\.net", rf"projectors.{name}.\1")
      for i, name in enumerate(RELEASED_TEACHERS)),
]


def from_released(released: dict[str, Tensor], path: str | Path,
                  grid: tuple[int, int] | None = None) -> tuple[PrismConfig, dict[str, Tensor]]:
    """Give a state dict of released code our names, and infer its config from keys and shapes.

    grid (h, w): what the position table is of, where it has so many rows (default: it is square, or
    28 x 36). Raises ValueError for a key too many or too few, by name.
    """
    levels, student = [], ""
    for kind, mark in (("sak", r"out_norms\.(\d+)_"), ("prism", r"blocks\.(\d+)\.moe_ffn_layer\.")):
        if found := {int(m[1]) for key in released if (m := re.search(mark, key))}:
            levels, student = sorted(found), kind
    if not student:
        raise ValueError(f"{path} holds no weights of the released code of PRISM or SAK; name another file")
    state: dict[str, Tensor] = {}
    for key, value in released.items():
        name = key
        for theirs, ours in RELEASED_NAMES:
            name = re.sub(theirs, ours, name)
        if (m := re.search(r"@(\d+)", name)) and int(m[1]) in levels:
            name = name.replace(m[0], str(levels.index(int(m[1]))))
        if name in state:
            raise ValueError(f"released weights {path} have {name} (our name) twice, once as {key}")
        if name and value.numel():  # stage 1 has a table of no tasks
            state[name] = value
    try:
        for i in levels if student == "prism" else ():
            for part in ("w1", "b1", "w2", "b2"):
                own = [state.pop(f"blocks.{i}.experts.{e}.{part}")
                       for e in range(len(state[f"blocks.{i}.router.logits.bias"]))]
                state[f"blocks.{i}.experts.{part}"] = torch.stack(own)
        cfg = released_config(state, student, tuple(levels), grid)
        with torch.device("meta"):
            own = build(cfg).state_dict()
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"released weights {path} are not whole: {one_line(error)} (our names); use the "
                         "file as it was released") from error
    if wrong := sorted(own.keys() ^ state.keys()):
        word = "missing" if wrong[0] in own else "unknown"
        raise ValueError(f"released weights {path} do not fit {student} ({len(wrong)} keys differ, first "
                         f"{word}, in our names, {wrong[0]}); use the whole file")
    return cfg, state


def released_config(state: dict[str, Tensor], student: str, levels: tuple[int, ...],
                    grid: tuple[int, int] | None) -> PrismConfig:
    """Infer the config of released weights in our names; heads, top-k, mean and std are not in the file."""
    size = {key: value.shape for key, value in state.items()}
    dim, patches = size["cls_token"][2], size["pos_embed"][1] - 1
    if grid is None or math.prod(grid) != patches:
        grid = (28, 36) if patches == 28 * 36 else (math.isqrt(patches),) * 2  # 448 x 576 px: NYUD
    if math.prod(grid) != patches:
        raise ValueError(f"a position table of {patches} patches is neither square nor 28 x 36; name its "
                         "rows and columns: prism.load(path, grid=(h, w))")
    widths = {t: size.get(key, (dim,))[0] for t in RELEASED_TEACHERS  # aligners are left out where not needed
              for key, mark in ((f"projectors.{t}.0.2.bias", f"projectors.{t}."),
                                (f"aligners.{t}.0.bias", f"adapters.{t}."))
              if any(k.startswith(mark) for k in state)}
    cfg = PrismConfig(
        dim=dim, depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        heads=max(1, dim // 64), patch=size["patch_embed.weight"][3], grid=tuple(grid), moe_blocks=levels,
        top_k=3, teachers=widths, tasks={task: size[key][0] for task in RELEASED_TASKS
                                         if (key := f"heads.{task}.last.weight") in size},
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), official=True, student=student)
    if student == "sak":
        return replace(cfg, mlp_ratio=size["blocks.0.mlp.0.bias"][0] / dim)
    first = f"blocks.{levels[0]}"
    return replace(cfg, experts=size[f"{first}.router.logits.bias"][0],
                   mlp_ratio=size[f"{first}.anchor.0.bias"][0] / dim,
                   expert_ratio=size[f"{first}.shared.0.bias"][0] / dim)


def start_from_vit(model: Student, state: dict[str, Tensor], path: str | Path) -> str:
    """Fill a new student's trunk from a plain ViT in timm's names; all experts copy their block's MLP.

    SAK's stem has no final norm, so that one is dropped. Returns what `load_strict` does. Raises ValueError.
    """
    cfg, renamed = model.cfg, {}
    dual = cfg.moe_blocks if model.routed else ()
    first = next((part for part in ("anchor", "shared") if part not in cfg.without), "experts")
    for key, value in state.items():
        key = key.replace("patch_embed.proj", "patch_embed").replace("fc1.", "0.").replace("fc2.", "2.")
        if (m := re.fullmatch(r"(blocks\.(\d+))\.mlp\.(\d)\.(\w+)", key)) and int(m[2]) in dual:
            key = f"{m[1]}.{first}.{m[3]}.{m[4]}"
            if first == "experts":  # the only MLPs of the block
                key = f"{m[1]}.experts.{m[4][0]}{1 + int(m[3]) // 2}"
                value = value.expand(cfg.experts, *value.shape)
        if key == "pos_embed":
            side = math.isqrt(value.shape[1]) if value.ndim == 3 else 0
            if value.shape != (1, 1 + side**2, cfg.dim):
                raise ValueError(f"{path} has positions {tuple(value.shape)}; students start from a plain "
                                 f"ViT with a class token: (1, 1 + n * n, {cfg.dim})")
            value = resize_pos(value.float(), (side, side), cfg.grid)
        renamed[key] = value
    new = [f"blocks.{i}.{part}." for i in dual for part in ("gate", "shared", "router", "experts")]
    report = load_strict(model, renamed, path, dropped=("head.",) if dual else ("head.", "norm."), new=(
        *new, "teacher_embed", "task_embed", "projectors.", "heads.",
        "adapters.", "out_norms.", "aligners.", "mixers."))
    if dual:
        model.copy_anchors()
    return report


# ------------------------------------------------------------------------------------------------ main


@dataclass
class Args:
    """Print the sizes; with --bench, what the experts cost beside a plain loop and beside their ideal."""

    bench: bool = False  # time the experts, forward and backward
    device: str | None = None  # default: cuda if there is one, else cpu; on cuda in bfloat16
    tokens: int = 2308  # T
    dim: int = 384  # D; hidden layers are 4 D wide
    repeats: int = 7  # medians of so many, variants taking turns
    debug: bool = False  # full traceback on errors


def show(title: str, rows: dict[str, dict]) -> None:
    """Print {row: {column: value}} as a table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(title, *columns)
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        table.add_row(name, *(f"{x:.3f}" if isinstance(x, float) else str(x) for x in cells))
    Console(width=None if sys.stdout.isatty() else 150).print(table)  # a file has no width of its own


def time_interleaved(runs: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, float]:
    """Return {name: median ms}. All take turns, in changing order, so that other load on the machine and
    what a neighbour leaves in cache and allocator fall on all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):  # two to warm up
        for name in random.Random(turn).sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def bench(args: Args, device: torch.device) -> None:
    """Time and count the same experts two ways, and a dense MLP of equal multiply-adds."""
    T, D, E, K, gpu = args.tokens, args.dim, 15, 3, device.type == "cuda"
    torch.manual_seed(0)
    with device:
        experts, dense = Experts(E, D, 4 * D), MLP(D, 4 * D)
        x, rows = (torch.randn(n, D, requires_grad=True) for n in (T, T * K))
        topk_w, topk_idx = torch.rand(T, E).topk(K)
    runs = {"plain loop": lambda: experts.plain(x, topk_idx, topk_w),
            "sorted dispatch (ours)": lambda: experts(x, topk_idx, topk_w),
            "ideal: dense MLP on T K rows": lambda: dense(rows)}

    def step(run: Callable[[], Tensor]) -> None:
        run().float().square().mean().backward()

    flops = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
        for name, run in runs.items():
            with FlopCounterMode(display=False) as counter:
                step(run)
            flops[name] = counter.get_total_flops()
        ms = time_interleaved({name: partial(step, run) for name, run in runs.items()}, device, args.repeats)
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"T {T}, D {D}, E {E}, K {K}; forward + backward, {where}, {'bf16' if gpu else 'fp32'}, "
          f"medians of {args.repeats}")
    *_, ideal = ms.values()
    show("", {k: {"ms": ms[k], "over ideal": ms[k] / ideal, "GFLOP": flops[k] / 1e9} for k in runs})


def main(args: Args) -> None:
    """Print sizes and parameter counts, or the benchmark."""
    if args.bench:
        return bench(args, choose_device(args.device))
    rows = {}
    for name, cfg in SIZES.items():
        with torch.device("meta"):
            total, active = count_parameters(Prism(cfg))
        rows[name] = {"width": cfg.dim, "depth": cfg.depth, "experts": cfg.experts, "top-k": cfg.top_k,
                      "parameters M": total / 1e6, "active per token M": active / 1e6}
    show("size", rows)


if __name__ == "__main__":
    cli = tyro.cli(Args, description=__doc__)
    data.exit_with_one_line(lambda: main(cli), cli.debug)
