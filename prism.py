"""PRISM: several vision foundation models in one ViT student (ICML 2026, arXiv 2606.03444).

Teachers such as DINOv2, CLIP and SAM pull shared weights in contradicting directions. So the MLP of a
few blocks is split into two streams: an *anchor* that everything shares, and *experts* to which a
*router* sends each token, told by a *context*: the teacher to imitate, or the task to solve.

    u  = LN2(x)
    x <- x + lambda * anchor(u) + (1 - lambda) * [shared(u) + sum over top-k e of w_e * expert_e(u)]

Stage 1, *deconstruct*: contexts are teachers; the experts take their conflicts apart.
Stage 2, *recompose*: contexts are tasks; the router reassembles the same experts for each of them.
Only the router sees the context, so all that comes before the first router is computed once.
Beside it stands SAK (ICLR 2025, arXiv 2410.14633), the baseline: a plain ViT, and per teacher a path of
adapters that reads the ViT but never writes to it.

Shapes: B images, N tokens (1 cls + h*w patches), D width, E experts, K experts per token, T = rows of
tokens, H x W pixels, h x w patches. R rows = images x contexts, all images of one context together.
"eq." numbers are the paper's; "official" marks what the released code does otherwise.
"""

import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch: see train.py

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
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
    router_noise: float = 1.0  # strength of the learned noise on the logits in training (released code)
    expert_drop: float = 0.1  # chance that an expert is hidden from a token in training (released code)
    teachers: dict[str, int] = field(default_factory=dict)  # teacher -> width of its features
    tasks: dict[str, int] = field(default_factory=dict)  # task -> output channels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of RGB in [0, 1], subtracted from the input
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    official: bool = False  # arithmetic of the released code, for its checkpoints
    student: str = "prism"  # which of STUDENTS `build` makes: prism, sak, or a control: dense, wide, moe
    without: tuple[str, ...] = ()  # ablations of prism: parts of PARTS that are left out


SIZES = {
    "toy": PrismConfig(
        dim=96, depth=6, heads=3, patch=8, grid=(8, 8), moe_blocks=(1, 2, 4, 5), experts=6, top_k=2,
        mlp_ratio=2.0, expert_ratio=2.0,
    ),
    "small": PrismConfig(),
    "base": PrismConfig(dim=768, heads=12),
    "large": PrismConfig(dim=1024, depth=24, heads=16, moe_blocks=(5, 11, 17, 23)),
}

PARTS = {  # what `without` may leave out of the dual stream
    "anchor": "the dense stream, and the gate with it",
    "shared": "the expert that takes every token",
    "film": "FiLM: the context's embedding is concatenated to the router's input instead",
    "context": "all that the router hears of the context",
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


class Router(nn.Module):
    """Choose top-k experts from token and context.

    The context speaks through FiLM: z = (1 + gamma(c)) u + beta(c), logits = W z. gamma and beta start
    at zero: a new router is blind to the context.
    """

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
                hidden = torch.rand_like(logits) < cfg.expert_drop
                noise = torch.randn_like(logits) * F.softplus(self.noise(z)) * cfg.router_noise
                logits = logits.masked_fill(hidden, self.HIDDEN_LOGIT) + noise
            kept, topk_idx = logits.topk(cfg.top_k, dim=-1)  # (R, N, K)
            prob = logits.softmax(-1).mean((0, 1))  # (E,)
            load = F.one_hot(topk_idx, cfg.experts).sum(2).to(prob.dtype).mean((0, 1))  # (E,)
            return Route(topk_idx, kept.softmax(-1), load, prob, gate)


# -------------------------------------------------------------------------------------------- experts


# Rows lie sorted by expert, ends (E,) int32 tells where each expert's run ends. Two operators for such
# rows, opaque to the compiler: the first reads `ends` on the host, the second never.


@torch.library.custom_op("prism::expert_mlps", mutates_args=())
def expert_mlps(rows: Tensor, ends: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
                b2: Tensor) -> tuple[Tensor, Tensor]:
    """Run each expert's MLP on its rows (S, D); returns (S, D) and what the GELU was given (S, hidden)."""
    y, z = torch.empty_like(rows), rows.new_empty(len(rows), w1.shape[1])
    for e, own in enumerate(_runs(ends)):
        torch.addmm(b1[e], rows[own], w1[e].t(), out=z[own])
        torch.addmm(b2[e], F.gelu(z[own]), w2[e].t(), out=y[own])
    return y, z


@torch.library.custom_op("prism::expert_mlps_backward", mutates_args=())
def expert_mlps_backward(grad: Tensor, rows: Tensor, z: Tensor, ends: Tensor, w1: Tensor,
                         w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of rows, w1, b1, w2, b2; an expert without rows gets zeros."""
    d_rows, d_w1, d_w2 = torch.empty_like(rows), torch.empty_like(w1), torch.empty_like(w2)
    d_b1, d_b2 = w1.new_empty(w1.shape[:2]), w2.new_empty(w2.shape[:2])
    for e, own in enumerate(_runs(ends)):
        d_hidden = grad[own] @ w2[e]
        d_z = torch.ops.aten.gelu_backward(d_hidden, z[own])
        torch.mm(grad[own].t(), F.gelu(z[own]), out=d_w2[e])
        torch.mm(d_z.t(), rows[own], out=d_w1[e])
        torch.mm(d_z, w1[e], out=d_rows[own])
        torch.sum(grad[own], 0, out=d_b2[e])
        torch.sum(d_z, 0, out=d_b1[e])
    return d_rows, d_w1, d_b1, d_w2, d_b2


@torch.library.custom_op("prism::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows (S, I) of expert e by w[e] (E, O, I) transposed: (S, O), in one kernel on a GPU."""
    return F.grouped_mm(rows.contiguous(), w.transpose(-2, -1), offs=ends)


@torch.library.custom_op("prism::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: Tensor, rows: Tensor, w: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and w."""
    grad = grad.contiguous()  # the compiler may choose strides that the kernel refuses
    d_w = F.grouped_mm(grad.t(), rows.contiguous(), offs=ends)  # (E, O, I)
    return F.grouped_mm(grad, w, offs=ends), d_w


def _runs(ends: Tensor) -> Iterator[slice]:
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def _keep_for_mlps(ctx, inputs, output) -> None:
    rows, ends, w1, _, w2, _ = inputs
    ctx.save_for_backward(rows, output[1], ends, w1, w2)
    ctx.set_materialize_grads(False)  # nobody differentiates what the GELU was given


def _mlps_gradients(ctx, grad: Tensor, _):
    d_rows, *d_weights = expert_mlps_backward(grad.contiguous(), *ctx.saved_tensors)
    return d_rows, None, *d_weights


def _keep_for_linear(ctx, inputs, output) -> None:
    rows, w, ends = inputs
    ctx.save_for_backward(rows, w, ends)


expert_mlps.register_fake(lambda rows, ends, w1, b1, w2, b2: (
    torch.empty_like(rows), rows.new_empty(len(rows), w1.shape[1])))
expert_mlps_backward.register_fake(lambda grad, rows, z, ends, w1, w2: (
    torch.empty_like(rows), torch.empty_like(w1), w1.new_empty(w1.shape[:2]), torch.empty_like(w2),
    w2.new_empty(w2.shape[:2])))
expert_mlps.register_autograd(_mlps_gradients, setup_context=_keep_for_mlps)
grouped_linear.register_fake(lambda rows, w, ends: rows.new_empty(len(rows), w.shape[1]))
grouped_linear_backward.register_fake(lambda grad, rows, w, ends: (
    torch.empty_like(rows), torch.empty_like(w)))
grouped_linear.register_autograd(lambda ctx, grad: (*grouped_linear_backward(grad, *ctx.saved_tensors), None),
                                 setup_context=_keep_for_linear)


@register_flop_formula(torch.ops.prism.expert_mlps)
def _mlps_flops(rows, ends, w1, *_, **__) -> int:
    return 4 * rows[0] * w1[1] * w1[2]


@register_flop_formula(torch.ops.prism.expert_mlps_backward)
def _mlps_backward_flops(grad, rows, z, ends, w1, *_, **__) -> int:
    return 8 * rows[0] * w1[1] * w1[2]


@register_flop_formula(torch.ops.prism.grouped_linear)
def _linear_flops(rows, w, *_, **__) -> int:
    return 2 * rows[0] * w[1] * w[2]


@register_flop_formula(torch.ops.prism.grouped_linear_backward)
def _linear_backward_flops(grad, rows, w, *_, **__) -> int:
    return 4 * rows[0] * w[1] * w[2]


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
        """Compute `plain` fast: sort by expert, matrix products on contiguous rows, gather back.

        x (T, D), topk_idx (T, K) int64, topk_w (T, K); returns (T, D).
        """
        T, K = topk_idx.shape
        expert, order = topk_idx.flatten().to(torch.uint8).sort(stable=True)  # (T*K,): row -> slot t*K + k
        slots = torch.arange(T * K, device=x.device)
        back = torch.empty_like(order).scatter_(0, order, slots)  # (T*K,): slot -> row
        ids = torch.arange(len(self.w1), device=x.device, dtype=torch.uint8)
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # (E,)

        dtype = _matmul_dtype(x)
        rows = _Reorder.apply(x.to(dtype), order // K, back, K)  # (T*K, D), scattered
        if self.official:
            rows = rows * topk_w.reshape(-1, 1)[order].to(dtype)
        weights = (p.to(dtype) for p in (self.w1, self.b1, self.w2, self.b2))
        if x.is_cuda and dtype == torch.bfloat16:
            rows = self._grouped(rows, ends, F.one_hot(expert.long(), len(ids)).to(dtype), *weights)
        else:
            rows = expert_mlps(rows, ends, *weights)[0]
        y = _Reorder.apply(rows, back, order, 1).view(T, K, -1)  # (T, K, D), gathered
        return (y * topk_w.unsqueeze(-1)).sum(1).to(x.dtype)

    @staticmethod
    def _grouped(rows: Tensor, ends: Tensor, one_hot: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
                 b2: Tensor) -> Tensor:
        """Keep group sizes on the GPU. Biases by a product with the one-hot experts (T*K, E): in bf16 the
        backward of b[expert] loses 5 % of the gradient."""
        hidden = F.gelu(grouped_linear(rows, w1, ends) + one_hot @ b1)  # (T*K, hidden)
        return grouped_linear(hidden, w2, ends) + one_hot @ b2  # (T*K, D)


def _matmul_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


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
        x, u, rest = (repeat(t, "b n d -> (c b) n d", c=copies) for t in (x, u, 1 - lam))  # (R, N, D)
        route = self.router(u, context, lam.squeeze(-1))
        routed = self.experts(u.flatten(0, 1), route.topk_idx.flatten(0, 1), route.topk_w.flatten(0, 1))
        return x + rest * routed.view_as(u), route


# ------------------------------------------------------------------------------- heads and projectors


class _SumOverRanks(torch.autograd.Function):
    """Sum a statistic over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over all ranks, on CPU too, so that N processes equal one."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        x, dtype, count = x.float(), x.dtype, x.numel() // x.shape[1] * dist.get_world_size()
        sums = _SumOverRanks.apply(torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))]))  # (2, C)
        mean = sums[0] / count
        var = sums[1] / count - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(dtype)


class Head(nn.Module):
    """Four levels of features -> one task's map."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(dim, dim // 4) for _ in range(4))
        self.fuse = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), BatchNorm(dim), nn.GELU())
        self.last = nn.Conv2d(dim, channels, 1)

    def plain(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Define the head: enlarge to a quarter of the pixels, convolve, classify, enlarge.

        Maps 4 levels (B, D, h, w) to (B, channels, H, W), size = (H, W) in pixels.
        """
        quarter = (size[0] // 4, size[1] // 4)
        tokens = rearrange(self.gather(levels), "b h w d -> b d h w")
        x = F.interpolate(tokens, size=quarter, mode="bilinear", align_corners=False)
        return self.finish(self.fuse(x), size)

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Compute `plain` with a tenth of its multiply-adds, in training too.

        Enlarging and convolving are both linear, and the few patches are all that there is to know. So
        each of the 3 x 3 taps is applied to patches, where it costs 1/16 (patch 16) of what it costs at a
        quarter of the pixels; then all taps are enlarged, shifted and added by two matrix products.
        """
        conv, norm, gelu = self.fuse
        weight, bias = conv.weight, conv.bias
        if not self.training:  # batch norm is a constant scale and shift per channel
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight, bias = weight * scale.view(-1, 1, 1, 1), (bias - norm.running_mean) * scale + norm.bias
        taps = rearrange(weight, "out d i j -> i (j out) d")  # (3, 3 D, D), one matrix per row of taps
        tokens = self.gather(levels)  # (B, h, w, D)
        B, h, w, D = tokens.shape
        tall, wide = size[0] // 4, size[1] // 4
        rows, columns = (shifted_bilinear(n, m, tokens) for n, m in ((h, tall), (w, wide)))
        x = None
        for i in range(3):  # the bias rides on the central tap, whose interpolation keeps constants
            tap = F.linear(tokens, taps[i], F.pad(bias, (D, D)) if i == 1 else None)  # (B, h, w, 3 D)
            enlarged = torch.bmm(rows[i].expand(B, -1, -1), tap.flatten(2))  # (B, tall, w * 3 D)
            x = enlarged if x is None else x.add_(enlarged)
        columns = rearrange(columns, "j wide w -> wide (w j)").expand(B * tall, -1, -1)
        x = torch.bmm(columns, x.view(B * tall, w * 3, D))  # (B * tall, wide, D)
        x = rearrange(x, "(b y) x d -> b d y x", b=B)  # channels last in memory
        return self.finish(gelu(norm(x) if self.training else x), size)

    def gather(self, levels: list[Tensor]) -> Tensor:
        """Narrow each level (B, D, h, w) to D / 4 and concatenate: (B, h, w, D)."""
        tokens = [rearrange(level, "b d h w -> b h w d") for level in levels]
        return torch.cat([linear(t) for linear, t in zip(self.linears, tokens, strict=True)], -1)

    def finish(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Classify (B, D, H / 4, W / 4) and enlarge to (B, channels, H, W)."""
        return F.interpolate(self.last(x).float(), size=size, mode="bilinear", align_corners=False)


def shifted_bilinear(n: int, m: int, like: Tensor) -> Tensor:
    """Return (3, m, n): the matrix that enlarges n values to m bilinearly, then shifts by -1, 0 or 1.

    What a 3 x 3 convolution with zero padding sees of the enlarged map, along one axis.
    """
    identity = torch.eye(n, device=like.device, dtype=torch.float64).unsqueeze(0)  # (1, n, n)
    enlarge = F.interpolate(identity, size=m, mode="linear", align_corners=False)[0].t()  # (m, n)
    padded = F.pad(enlarge, (0, 0, 1, 1))  # (m + 2, n)
    return torch.stack([padded[i : i + m] for i in range(3)]).to(like.dtype)


def make_projectors(cfg: PrismConfig) -> nn.ModuleDict:
    """Build the maps from the student's tokens to each teacher's width, one per level."""
    D = cfg.dim
    return nn.ModuleDict({
        name: nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, width)) for _ in range(4))
        for name, width in cfg.teachers.items()
    })


# ---------------------------------------------------------------------------------------------- PRISM


class Output(NamedTuple):
    """All that one training pass computes."""

    distilled: dict[str, list[Tensor]]  # teacher -> 4 x (B_t, D_t, h, w), its samples in batch order
    predicted: dict[str, Tensor]  # task -> (B, C_task, H, W)
    levels: list[Tensor]  # 4 x (B, D, h, w) under the teachers' contexts; empty without them
    routes: list[Route]  # one per MoE block


class Student(nn.Module):
    """What Prism and SAK share: the way from images to tokens, and the public methods."""

    kind = ""  # the config's `student`

    def __init__(self, cfg: PrismConfig):
        super().__init__()
        self.cfg = cfg = replace(cfg, student=self.kind)
        check_config(cfg)
        self.contexts = [*cfg.teachers, *cfg.tasks]
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
        for p in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)

    def expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set what is subtracted from RGB in [0, 1] and what divides it: as initial weights want it."""
        self.cfg = replace(self.cfg, mean=tuple(mean), std=tuple(std))
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))

    def embed(self, images: Tensor) -> Tensor:
        """Turn RGB in [0, 1] (B, 3, H, W) into tokens (B, N, D)."""
        H, W, patch = *images.shape[-2:], self.cfg.patch
        for side in (H, W):
            if side % patch:
                low = side // patch * patch
                raise ValueError(f"image side {side} is not a multiple of the patch size {patch}; "
                                 f"use {low or patch} or {low + patch}")
        x = rearrange(self.patch_embed((images - self.mean) / self.std), "b d h w -> b (h w) d")
        pos = resize_pos(self.pos_embed, self.cfg.grid, (H // patch, W // patch))
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + pos  # (B, N, D)

    def context_ids(self, names: str | Sequence[str], B: int) -> Tensor:
        """Look up one name for all B images, or one each; returns (B,) int64."""
        names = [names] * B if isinstance(names, str) else list(names)
        if unknown := sorted(set(names) - set(self.contexts)):
            raise ValueError(f"unknown context {', '.join(unknown)}; this student knows "
                             f"{', '.join(self.contexts) or 'none'}")
        if len(names) != B:
            raise ValueError(f"{len(names)} contexts for {B} images; give one name, or one per image")
        return torch.tensor([self.contexts.index(name) for name in names])

    def project(self, levels: list[Tensor], teacher_ids: Tensor) -> dict[str, list[Tensor]]:
        """Map each image's levels to its own teacher's width. A teacher without an image in the batch
        gets empty maps, which keep its projectors in the graph on every rank."""
        distilled = {}
        for i, (name, projectors) in enumerate(self.projectors.items()):
            rows = torch.where(teacher_ids == i)[0].to(levels[0].device, non_blocking=True)
            tokens = [rearrange(level[rows], "b d h w -> b h w d") for level in levels]
            maps = [p(t) for p, t in zip(projectors, tokens, strict=True)]
            distilled[name] = [rearrange(m, "b h w d -> b d h w") for m in maps]
        return distilled

    def compile_parts(self) -> None:
        """Compile every block and head by itself: short compile times, and DDP can send the gradients of
        one block while the next is computed."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        for head in self.heads.values():
            head.forward = torch.compile(head.forward, dynamic=False)

    def distill(self, images: Tensor, teacher_ids: Tensor) -> dict[str, list[Tensor]]:
        """Imitate teachers: {teacher: 4 x (B_t, D_t, h, w)}, rows in batch order.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids (B,) int64 into cfg.teachers; SAK also takes
        (B, K), K teachers for every image.
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


class Prism(Student):
    """The student: a ViT whose MoE blocks listen to a context."""

    kind = "prism"

    def __init__(self, cfg: PrismConfig):
        super().__init__(cfg)
        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.blocks = nn.ModuleList(
            DualStreamBlock(cfg) if i in cfg.moe_blocks else Block(cfg.dim, cfg.heads, hidden)
            for i in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        heard = "context" not in cfg.without
        for word, names in (("teacher_embed", cfg.teachers), ("task_embed", cfg.tasks)):
            setattr(self, word, nn.Parameter(torch.zeros(len(names), cfg.dim)) if names and heard else None)
        self.projectors = make_projectors(cfg)
        self.heads = nn.ModuleDict({task: Head(cfg.dim, channels) for task, channels in cfg.tasks.items()})
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start as a plain ViT whose experts are copies of the anchor and whose router hears nothing."""
        super().init_weights()
        for p in (self.teacher_embed, self.task_embed):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)
        for block in (self.blocks[i] for i in self.cfg.moe_blocks):
            if block.router.film is not None:
                nn.init.zeros_(block.router.film.weight)
            if block.gate is not None:
                start = (self.cfg.gate_start - block.gate_min) / (1 - block.gate_min)
                nn.init.constant_(block.gate.bias, math.log(start / (1 - start)))
        self.copy_anchors()

    @torch.no_grad()
    def copy_anchors(self) -> None:
        """Make shared and routed experts copies of their block's anchor (not the narrower lite ones)."""
        if self.cfg.expert_ratio != self.cfg.mlp_ratio:
            return
        for block in (self.blocks[i] for i in self.cfg.moe_blocks):
            experts, model = block.experts, block.anchor or block.shared
            if block.anchor and block.shared:
                block.shared.load_state_dict(block.anchor.state_dict())
            first = [p[0] for p in experts.parameters()]  # w1, b1, w2, b2 of one expert
            for stacked, p in zip(experts.parameters(), model.parameters() if model else first, strict=True):
                stacked.copy_(p.clone().expand_as(stacked))

    def trunk(self, images: Tensor, context_ids: Tensor) -> tuple[list[Tensor], list[Route]]:
        """Run all blocks once for all contexts.

        images (B, 3, H, W) RGB in [0, 1]; context_ids (R,) int64 into `contexts`, R a multiple of B.
        Returns 4 levels (R, D, h, w), normed, without cls, and one Route per MoE block.
        """
        x = self.embed(images)  # (B, N, D)
        h, w = (side // self.cfg.patch for side in images.shape[-2:])
        tables = [e for e in (self.teacher_embed, self.task_embed) if e is not None]
        ids = context_ids.to(x.device, non_blocking=True)
        context = torch.cat(tables)[ids] if tables else None  # (R, D)
        levels, routes = [], []
        for i, block in enumerate(self.blocks):
            if i not in self.cfg.moe_blocks:
                x = block(x)
                continue
            x, route = block(x, context)  # (R, N, D) from the first one on
            levels.append(rearrange(self.norm(x)[:, 1:], "r (h w) d -> r d h w", h=h, w=w))
            routes.append(route)
        if context is None:  # nobody heard it: all contexts share one pass
            levels = [level.repeat(len(context_ids) // len(images), 1, 1, 1) for level in levels]
        return levels, routes

    def forward(self, images: Tensor, teacher_ids: Tensor | None = None, tasks: Sequence[str] = ()) -> Output:
        """Run every context of a training step in one batched pass.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids (B,) int64, the teacher of each image, or None. Ids
        that lie on the host spare a GPU the waiting: how many images a teacher has is then known there.
        """
        B = len(images)
        ids = [self.context_ids(task, B) for task in tasks]
        ids += [] if teacher_ids is None else [teacher_ids.cpu()]
        levels, routes = self.trunk(images, torch.cat(ids))
        predicted = {
            task: self.heads[task]([level[i * B : (i + 1) * B] for level in levels], images.shape[-2:])
            for i, task in enumerate(tasks)
        }
        if teacher_ids is None:
            return Output({}, predicted, [], routes)
        levels = [level[-B:] for level in levels]
        return Output(self.project(levels, teacher_ids), predicted, levels, routes)

    def features(self, images: Tensor, context: str | Sequence[str]) -> list[Tensor]:
        """Return 4 levels (B, D, h, w) of RGB images in [0, 1] (B, 3, H, W) under a teacher or task.

        context: one name for all images, or B names. Raises ValueError for an unknown name.
        """
        return self.trunk(images, self.context_ids(context, len(images)))[0]

    def route(self, images: Tensor, context: str | Sequence[str]) -> list[Route]:
        """Return what the router of each MoE block decides under a teacher or task."""
        return self.trunk(images, self.context_ids(context, len(images)))[1]


class MoE(Prism):
    """A control: routed experts in place of the MLP, and no word of the context."""

    kind = "moe"

    def __init__(self, cfg: PrismConfig):
        super().__init__(replace(cfg, without=("anchor", "shared", "context")))


class Dense(Student):
    """A control: a plain ViT that hears no context; teachers through projectors, tasks through heads."""

    kind = "dense"

    def __init__(self, cfg: PrismConfig):
        super().__init__(cfg)
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.heads, self.hidden(i)) for i in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.projectors = make_projectors(cfg)
        self.heads = nn.ModuleDict({task: Head(cfg.dim, channels) for task, channels in cfg.tasks.items()})
        self.init_weights()

    def hidden(self, block: int) -> int:
        """Return the hidden width of a block's MLP."""
        return int(self.cfg.dim * self.cfg.mlp_ratio)

    def trunk(self, images: Tensor) -> list[Tensor]:
        """Return 4 levels (B, D, h, w) of RGB images in [0, 1] (B, 3, H, W), normed, without cls."""
        x, levels = self.embed(images), []  # (B, N, D)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.cfg.moe_blocks:
                h = images.shape[-2] // self.cfg.patch
                levels.append(rearrange(self.norm(x)[:, 1:], "b (h w) d -> b d h w", h=h))
        return levels

    def forward(self, images: Tensor, teacher_ids: Tensor | None = None, tasks: Sequence[str] = ()) -> Output:
        """Run the trunk once for all; arguments as PRISM's, teacher_ids also (B, K) as SAK's."""
        levels = self.trunk(images)
        predicted = {task: self.heads[task](levels, images.shape[-2:]) for task in tasks}
        if teacher_ids is None:
            return Output({}, predicted, [], [])
        return Output(self.project(levels, teacher_ids), predicted, levels, [])

    def features(self, images: Tensor, context: str | Sequence[str]) -> list[Tensor]:
        """Return 4 levels (B, D, h, w), the same under every context. Raises ValueError for unknown ones."""
        self.context_ids(context, len(images))
        return self.trunk(images)


class Wide(Dense):
    """A control: the MoE blocks' MLPs as wide as all that is active in PRISM's: anchor, shared, K experts."""

    kind = "wide"

    def hidden(self, block: int) -> int:
        """Return the hidden width of a block's MLP."""
        cfg = self.cfg
        extra = (1 + cfg.top_k) * cfg.expert_ratio if block in cfg.moe_blocks else 0
        return int(cfg.dim * (cfg.mlp_ratio + extra))


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
            noise = torch.randn_like(logits.expand(-1, stem.shape[1], -1))  # (B, n, S)
            logits = logits + noise * (F.softplus(spread) + self.LEAST_NOISE)
        return logits.softmax(-1)

    def forward(self, stem: Tensor, paths: list[Tensor]) -> Tensor:
        """Mix the stem and the paths, (B, n, D) each; returns (B, n, D)."""
        gates = self.gates(stem).unbind(-1)  # S x (B, n or 1)
        return sum(gate.unsqueeze(-1) * x for gate, x in zip(gates, [stem, *paths], strict=True))


class SAK(Student):
    """The baseline: a plain ViT as stem, a path of adapters per teacher, and per task a mix of them all.

    With x_i the tokens after block i of the stem, x_0 its input, teacher k's path is
    R_0 = A_0(x_0), R_i = A_i(R_{i-1} + x_i); nothing flows back. Its levels are normed, the stem's raw.
    Every image can serve every teacher in one pass, since only the small paths differ.
    """

    kind = "sak"

    def __init__(self, cfg: PrismConfig):
        super().__init__(cfg)
        hidden, taps = int(cfg.dim * cfg.mlp_ratio), range(len(cfg.moe_blocks))
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.heads, hidden) for _ in range(cfg.depth))
        self.adapters = nn.ModuleDict({
            name: nn.ModuleList(Adapter(cfg.dim) for _ in range(cfg.depth + 1)) for name in cfg.teachers
        })
        self.out_norms = nn.ModuleDict({
            name: nn.ModuleList(nn.LayerNorm(cfg.dim, eps=1e-5) for _ in taps) for name in cfg.teachers
        })
        self.aligners = nn.ModuleDict({
            name: nn.ModuleList(nn.Linear(cfg.dim, width) for _ in taps)
            for name, width in cfg.teachers.items() if width != cfg.dim
        })
        self.mixers = nn.ModuleDict({
            task: nn.ModuleList(Mixer(cfg.dim, 1 + len(cfg.teachers)) for _ in taps) for task in cfg.tasks
        })
        self.heads = nn.ModuleDict({task: Head(cfg.dim, channels) for task, channels in cfg.tasks.items()})
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

    def mix(self, task: str, stem: list[Tensor], paths: dict[str, list[Tensor]]) -> list[Tensor]:
        """Mix what `trunk` returns for a task; returns 4 levels (B, n, D)."""
        beside = zip(*paths.values(), strict=True) if paths else [()] * len(stem)
        return [mixer(x, list(p)) for mixer, x, p in zip(self.mixers[task], stem, beside, strict=True)]

    def align(self, paths: dict[str, list[Tensor]], teacher_ids: Tensor) -> dict[str, list[Tensor]]:
        """Pick the images of each teacher, and map its path to its width where that differs; returns
        {teacher: 4 x (B_t, n, D_t)}. Empty maps keep a teacher without an image in the graph."""
        aligned = {}
        for i, (name, levels) in enumerate(paths.items()):
            rows = torch.where(teacher_ids == i)[0].to(levels[0].device, non_blocking=True)
            levels = [level[rows] for level in levels]
            if name in self.aligners:
                levels = [a(level) for a, level in zip(self.aligners[name], levels, strict=True)]
            aligned[name] = levels
        return aligned

    def as_maps(self, levels: Sequence[Tensor], images: Tensor) -> list[Tensor]:
        """Lay patch tokens (B, n, D) out as maps (B, D, h, w) of the images' patches."""
        h = images.shape[-2] // self.cfg.patch
        return [rearrange(level, "b (h w) d -> b d h w", h=h) for level in levels]

    def forward(self, images: Tensor, teacher_ids: Tensor | None = None, tasks: Sequence[str] = ()) -> Output:
        """Run stem and paths once, and what teachers and tasks ask of them.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids int64 (B,), one teacher per image, or (B, K), K
        teachers per image (all: `torch.arange(K).expand(B, K)`), or None. Levels and routes stay empty.
        """
        stem, paths = self.trunk(images)
        predicted = {
            task: self.heads[task](self.as_maps(self.mix(task, stem, paths), images), images.shape[-2:])
            for task in tasks
        }
        aligned = {} if teacher_ids is None else self.align(paths, teacher_ids)
        return Output({name: self.as_maps(levels, images) for name, levels in aligned.items()},
                      predicted, [], [])

    def features(self, images: Tensor, context: str | Sequence[str]) -> list[Tensor]:
        """Return 4 levels (B, D, h, w) of RGB images in [0, 1] (B, 3, H, W): under a teacher its path, not
        aligned, under a task what its mixers make.

        context: one name for all images, or B names. Raises ValueError for an unknown name.
        """
        names = [self.contexts[i] for i in self.context_ids(context, len(images)).tolist()]
        stem, paths = self.trunk(images)
        levels = {n: paths[n] if n in paths else self.mix(n, stem, paths) for n in set(names)}
        rows = zip(*([level[i] for level in levels[n]] for i, n in enumerate(names)), strict=True)
        return self.as_maps([torch.stack(level) for level in rows], images)


STUDENTS = {kind.kind: kind for kind in (Prism, SAK, Dense, Wide, MoE)}


def build(cfg: PrismConfig) -> Student:
    """Make the new student that cfg describes. Raises ValueError."""
    check_config(cfg)
    return STUDENTS[cfg.student](cfg)


def check_config(cfg: PrismConfig) -> None:
    """Raise ValueError where sizes do not fit together."""
    hidden = {k: int(cfg.dim * getattr(cfg, k)) for k in ("mlp_ratio", "expert_ratio")}
    sizes = {k: getattr(cfg, k) for k in ("dim", "depth", "heads", "patch")} | hidden
    sizes |= {"grid": min(cfg.grid), "std": min(cfg.std), **cfg.teachers, **cfg.tasks}
    if wrong := [name for name, value in sizes.items() if not value > 0]:
        raise ValueError(f"{wrong[0]} of the student is zero or less: nothing would be left; use more")
    if cfg.student not in STUDENTS:
        raise ValueError(f"student {cfg.student!r} is not known; use {' or '.join(STUDENTS)}")
    if len(set(cfg.moe_blocks)) != 4 or max(cfg.moe_blocks) >= cfg.depth or min(cfg.moe_blocks) < 0:
        raise ValueError(f"moe_blocks {cfg.moe_blocks} must be four of the {cfg.depth} blocks, from 0")
    if cfg.student == "sak" and max(cfg.moe_blocks) != cfg.depth - 1:
        raise ValueError(f"moe_blocks {cfg.moe_blocks} of {cfg.student} must include the last of the "
                         f"{cfg.depth} blocks, {cfg.depth - 1}: nothing would train what comes after them")
    if unknown := [part for part in cfg.without if part not in PARTS]:
        raise ValueError(f"without {', '.join(unknown)}: not known; parts are {', '.join(PARTS)}")
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
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for block in (m for m in model.modules() if isinstance(m, DualStreamBlock)):
        cfg, routed = block.router.cfg, sum(p.numel() for p in block.experts.parameters())
        idle += routed // cfg.experts * (cfg.experts - cfg.top_k)
    return total, total - idle


# -------------------------------------------------------------------------------------- save and load


CONTENT = {  # what a training checkpoint holds; one for use alone has the first two
    "model": dict, "config": dict, "optimizer": dict, "stage": str, "step": int, "steps": int, "seed": int,
    "provenance": dict,
}


def write_file(path: str | Path, write: Callable[[Path], None], previous: Path | None = None) -> None:
    """Write atomically: write(a temporary file), fsync, rename. The file that was there becomes `previous`.

    Killed at any moment, or out of space, it leaves the old file whole under its name. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name: `path` is never missing
            except OSError:  # a file system without links
                shutil.copyfile(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own follows the one that says why
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cannot write {path}: {one_line(first)}; free space or choose another folder "
                      "(nothing was overwritten)") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(path: str | Path, content: dict, previous: Path | None = None) -> None:
    """Write CONTENT, or a part of it, for `read_checkpoint`; see write_file."""
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file of Python's: its errors say why
            torch.save(content, file)

    write_file(path, write, previous)


def write_export(path: str | Path, content: dict) -> None:
    """Write a student to one safetensors file; all but its weights becomes JSON in the metadata."""
    state = {k: v.detach().cpu().contiguous() for k, v in content["model"].items()}
    facts = {k: json.dumps(v) for k, v in content.items() if k not in ("model", "optimizer")}
    facts |= {"format": "prism", "sha256": digest(state, facts)}
    write_file(path, lambda file: save_file(state, file, facts))


def digest(state: dict[str, Tensor], facts: dict[str, str]) -> str:
    """Return the sha256 of an export's names, shapes, weights and metadata: safetensors has no checksum."""
    total = hashlib.sha256(json.dumps([facts[k] for k in sorted(facts.keys() & CONTENT.keys())]).encode())
    for name, value in sorted(state.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def read_export(path: Path) -> dict:
    """Read what `write_export` wrote. Raises ValueError."""
    with safe_open(path, "pt") as file:
        facts, state = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}
    if facts.get("format") != "prism":
        raise ValueError("its metadata names no student")
    if facts.get("sha256") != digest(state, facts):
        raise ValueError("its sha256 is another than the one it records")
    return {"model": state, **{k: json.loads(v) for k, v in facts.items() if k in CONTENT}}


def read_pickle(path: Path) -> object:
    """Read what torch.save wrote, plain values and tensors only, if all its parts match their checksums."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            parts = zipfile.ZipFile(file)
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                raise ValueError("its parts claim more bytes than it has")
            if bad := parts.testzip():  # torch would not look
                raise ValueError(f"{bad} fails its checksum")
    with warnings.catch_warnings(action="ignore"):  # of strangers' pickles
        return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: str | Path, grid: tuple[int, int] | None = None,
                    otherwise: str = "train again or name another") -> dict:
    """Read a checkpoint of ours, or an export of one: see CONTENT.

    A released file of PRISM or SAK comes back as model and config in our names; grid: see from_released.
    Raises FileNotFoundError or ValueError with what to do; otherwise: that, if the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; train one with `python train.py`, "
                                "or name one that does")
    try:
        content = read_export(path) if path.suffix == ".safetensors" else read_pickle(path)
    except Exception as error:  # torch raises many kinds; pickle's own text is a page of advice
        why = "no file of plain weights" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise ValueError(f"checkpoint {path} cannot be read ({why}); it is damaged or no checkpoint: "
                         f"{otherwise}") from error
    check_content(content, path, otherwise)
    if "config" in content:
        return content
    cfg, state = from_released(content["model"], path, grid)
    return {"model": state, "config": asdict(cfg)}


def check_content(content: object, path: Path, otherwise: str) -> None:
    """Raise ValueError where a file holds other things than CONTENT, or released weights."""
    if not isinstance(content, dict) or "model" not in content or not (
            "config" in content or released_levels(content["model"])[0]):
        raise ValueError(f"checkpoint {path} holds no model and config of ours; name a file that "
                         "train.py or prism.save wrote, or one that the authors of PRISM or SAK released")
    wrong = [f"{k} is a {type(content[k]).__name__}" for k, kind in CONTENT.items()
             if k in content and not isinstance(content[k], kind)]
    state = {} if wrong else content["model"]
    wrong += [f"{str(k)[:80]} is no dense tensor" for k, v in state.items()
              if not (isinstance(k, str) and is_dense(v))]
    if not wrong and sum(v.nbytes for v in state.values()) > path.stat().st_size:
        wrong = ["its tensors claim more bytes than it has"]
    wrong = wrong or [f"{k} is not finite" for k, v in state.items() if not is_finite(v)]
    if wrong:
        raise ValueError(f"checkpoint {path} is none that train.py or prism.save wrote ({wrong[0]}): "
                         f"{otherwise}")


def is_dense(value: object) -> bool:
    """Tell whether a value is a dense tensor of plain numbers."""
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
    return (torch.is_tensor(value) and value.layout is torch.strided and not value.is_nested
            and value.dtype in kinds and value.device.type == "cpu")


def is_finite(value: Tensor) -> bool:
    """Tell whether no number of a tensor is nan or infinite, in one pass."""
    return not value.numel() or all(map(torch.isfinite, torch.aminmax(value)))


RELEASED_TEACHERS = ("dinov2", "clip", "sam")  # in the order of the released configs, ids and gates
RELEASED_TASKS = ("semseg", "human_parts", "normals", "edge", "sal", "depth")  # in the embeddings' order
RELEASED_VIT = {
    r"(?:vit|backbone)\.(cls_token|pos_embed)": "{1}",
    r"(?:vit|backbone)\.patch_embed\.proj\.(weight|bias)": "patch_embed.{1}",
    r"(?:vit|backbone)\.(blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj)\.(?:weight|bias))": "{1}",
    r"(?:vit|backbone)\.(blocks\.\d+\.mlp)\.fc1\.(weight|bias)": "{1}.0.{2}",
    r"(?:vit|backbone)\.(blocks\.\d+\.mlp)\.fc2\.(weight|bias)": "{1}.2.{2}",
}
RELEASED_HEADS = {
    r"heads\.(\w+)\.linears\.(\d)\.(weight|bias)": "heads.{1}.linears.{2}.{3}",
    r"heads\.(\w+)\.linear_fuse\.(\d)\.(\w+)": "heads.{1}.fuse.{2}.{3}",
    r"heads\.(\w+)\.last_conv\.(weight|bias)": "heads.{1}.last.{2}",
}


class Released(NamedTuple):
    """How the released code of one student names its weights."""

    level: str  # keys that only this student has; they tell after which blocks levels are read
    names: dict[str, str]  # pattern of a key -> our name, {n}: what group n matched; "": not needed


RELEASED = {
    "sak": Released(r"out_norms\.(\d+)_", RELEASED_VIT | RELEASED_HEADS | {
        r"tsap\.(\w+\.\d+\.(?:scale|(?:down|up)\.(?:weight|bias)))": "adapters.{1}",
        r"out_norms\.(?P<tap>\d+)_(\w+)\.(weight|bias)": "out_norms.{2}.{tap}.{3}",
        r"ts_aligners\.(?P<tap>\d+)_(\w+)\.(weight|bias)": "aligners.{2}.{tap}.{3}",
        r"mor\.(?P<tap>\d+)_(\w+)\.router\.module\.(\d)\.(weight|bias)": "mixers.{2}.{tap}.score.{3}.{4}",
    }),
    "prism": Released(r"backbone\.blocks\.(\d+)\.moe_ffn_layer\.", RELEASED_VIT | RELEASED_HEADS | {
        r"backbone\.(norm\.(?:weight|bias))": "{1}",
        r"vfm_condition_embeddings\.weight": "teacher_embed",
        r"task_condition_embeddings\.weight": "task_embed",
        r"task_composer_weights|task_free_condition_embeddings\.weight": "",
        r"backbone\.blocks\.\d+\.moe_ffn_layer\.(ortho|variance)_loss_weight": "",
        r"backbone\.(blocks\.\d+)\.moe_ffn_layer\.experts\.(\d+)\.fc(\d)\.weight": "{1}.experts.{2}.w{3}",
        r"backbone\.(blocks\.\d+)\.moe_ffn_layer\.experts\.(\d+)\.fc(\d)\.bias": "{1}.experts.{2}.b{3}",
    } | {
        rf"backbone\.(blocks\.\d+)\.{theirs}\.(weight|bias)": f"{{1}}.{ours}.{{2}}" for theirs, ours in (
            ("gate_linear", "gate"),
            (r"standard_ffn\.fc1", "anchor.0"),
            (r"standard_ffn\.fc2", "anchor.2"),
            (r"moe_ffn_layer\.shared_expert\.fc1", "shared.0"),
            (r"moe_ffn_layer\.shared_expert\.fc2", "shared.2"),
            (r"moe_ffn_layer\.router\.film_layer\.to_gamma_beta", "router.film"),
            (r"moe_ffn_layer\.router\.W_gate_stage1", "router.film_gate"),
            (r"moe_ffn_layer\.router\.W_g_base", "router.logits"),
            (r"moe_ffn_layer\.router\.W_noise", "router.noise"))
    } | {
        rf"vfm_projection_heads\.{i}_(\d)\.net\.(\d)\.(weight|bias)": f"projectors.{name}.{{1}}.{{2}}.{{3}}"
        for i, name in enumerate(RELEASED_TEACHERS)
    }),
}


def released_levels(state: object) -> tuple[str, str, list[int]]:
    """Tell by its keys whose released code wrote a state dict, of either stage.

    Returns the student ("" for none), what stage 2 puts before the keys of stage 1 ("backbone." or ""),
    and the blocks after which levels are read.
    """
    for student, released in RELEASED.items() if isinstance(state, dict) else ():
        found = [m for key in state if (m := re.match(rf"(backbone\.)?{released.level}", str(key)))]
        if found:
            return student, found[0][1] or "", sorted({int(m[2]) for m in found})
    return "", "", []


def is_student(path: str | Path) -> bool:
    """Tell whether a file holds a student, ours or a released one, rather than a plain ViT."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("format") == "prism"
        content = path.suffix == ".pth" and read_pickle(path)
    except Exception:  # whoever reads it next says what is wrong with it
        return False
    released = isinstance(content, dict) and released_levels(content.get("model"))[0]
    return bool(path.suffix == ".pt" or released)


def from_released(state: dict[str, Tensor], path: str | Path,
                  grid: tuple[int, int] | None = None) -> tuple[PrismConfig, dict[str, Tensor]]:
    """Give a state dict of released code our names, and infer its config from keys and shapes.

    grid (h, w): what the position table is of, where it has so many rows (default: it is square, or
    28 x 36). Raises ValueError for a key too many or too few, by name.
    """
    student, prefix, levels = released_levels(state)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = released_name(key, prefix, student, levels, path)
        if name in renamed:
            raise ValueError(f"released weights {path} have {name} (our name) twice, once as {key}; use the "
                             "file as it was released")
        if name and value.numel():  # stage 1 has a table of no tasks
            renamed[name] = value
    stack_experts(renamed, path)
    cfg = config_of_released(renamed, student, tuple(levels), path, grid)
    with torch.device("meta"):
        own = build(cfg).state_dict()
    if wrong := sorted(own.keys() ^ renamed.keys()):
        word = "missing" if wrong[0] in own else "unknown"
        raise ValueError(f"released weights {path} do not fit {student} ({len(wrong)} keys differ, first "
                         f"{word}, in our names, {wrong[0]}); use the whole file")
    return cfg, renamed


def released_name(key: str, prefix: str, student: str, levels: list[int], path: str | Path) -> str:
    """Translate one key of released code, "" for one that is not needed; SAK's blocks `levels` count 0..3
    here. Raises ValueError."""
    for theirs, ours in RELEASED[student].names.items():
        if m := re.fullmatch(theirs, key.removeprefix(prefix)):
            block = int(m.groupdict().get("tap", -1))
            tap = levels.index(block) if block in levels else block
            return ours.format(m[0], *m.groups(), tap=tap)
    raise ValueError(f"released weights {path} have the unknown key {key}; expected are those of the "
                     f"released code of {student}, no more")


def stack_experts(state: dict[str, Tensor], path: str | Path) -> None:
    """Replace each block's `experts.0.w1`, `experts.1.w1`, ... by `experts.w1`, in place. Raises ValueError
    for an expert too many or too few beside the router's."""
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for key in list(state):
        if m := re.fullmatch(r"(blocks\.\d+)\.experts\.(\d+)\.(\w+)", key):
            found.setdefault((m[1], m[3]), {})[int(m[2])] = state.pop(key)
    for (block, part), own in found.items():
        ids = range(len(state.get(f"{block}.router.logits.bias", own)))
        shapes = [tuple(own[e].shape) for e in ids if e in own]
        wrong = own.keys() ^ set(ids) or {e for e in ids if shapes[e] != shapes[0]}
        if wrong:
            raise ValueError(f"released weights {path}: {block}.experts.{min(wrong)}.{part} (our name) is "
                             f"missing, of another shape, or one too many for the router's {len(ids)} "
                             "experts; use the whole file")
        state[f"{block}.experts.{part}"] = torch.stack([own[e] for e in ids])


def config_of_released(state: dict[str, Tensor], student: str, levels: tuple[int, ...], path: str | Path,
                       grid: tuple[int, int] | None = None) -> PrismConfig:
    """Infer the config of released weights in our names from their shapes. Raises ValueError."""
    def size(key: str, axis: int = 0) -> int:
        if key not in state or state[key].ndim <= axis:
            raise ValueError(f"released weights {path} lack {key} (our name), or one of its dimensions; use "
                             "the whole file")
        return state[key].shape[axis]

    dim, patches = size("cls_token", 2), size("pos_embed", 1) - 1
    if grid is None or math.prod(grid) != patches:
        grid = (28, 36) if patches == 28 * 36 else (math.isqrt(patches),) * 2  # 448 x 576 px: NYUD
    if math.prod(grid) != patches:
        raise ValueError(f"released weights {path}: a position table of {patches} patches is neither square "
                         "nor 28 x 36; name its rows and columns: prism.load(path, grid=(h, w))")
    blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    tasks = {t: size(f"heads.{t}.last.weight")
             for t in RELEASED_TASKS if any(key.startswith(f"heads.{t}.") for key in state)}
    cfg = PrismConfig(  # heads, top-k, mean and std are not in the file
        dim=dim, depth=len(blocks), heads=max(1, dim // 64), patch=size("patch_embed.weight", 3),
        grid=tuple(grid), moe_blocks=levels, top_k=3, tasks=tasks, mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225), official=True, student=student,
    )
    if student == "sak":  # without aligners (dropped, or not needed) a teacher gets the stem's width
        widths = {t: size(f"aligners.{t}.0.bias") if f"aligners.{t}.0.bias" in state else dim
                  for t in RELEASED_TEACHERS if f"adapters.{t}.0.scale" in state}
        return replace(cfg, mlp_ratio=size("blocks.0.mlp.0.bias") / dim, teachers=widths)
    first = f"blocks.{levels[0]}"
    return replace(
        cfg, experts=size(f"{first}.router.logits.bias"), mlp_ratio=size(f"{first}.anchor.0.bias") / dim,
        expert_ratio=size(f"{first}.shared.0.bias") / dim,
        teachers={t: size(f"projectors.{t}.0.2.bias") for t in RELEASED_TEACHERS
                  if any(key.startswith(f"projectors.{t}.") for key in state)},
    )


def config_from(stored: dict, path: str | Path) -> PrismConfig:
    """Rebuild the config that a checkpoint stores as plain values. Raises ValueError for any that is none."""
    kinds = get_type_hints(PrismConfig)
    if unknown := sorted(map(str, stored.keys() - kinds.keys())):
        raise ValueError(f"checkpoint {path} has unknown settings {', '.join(unknown)}; it was written by "
                         "another version: update the code or train again")
    if wrong := [k for k, value in stored.items() if not is_of(value, kinds[k])]:
        raise ValueError(f"checkpoint {path} has the setting {wrong[0]} = {str(stored[wrong[0]])[:80]!r}, no "
                         f"{kinds[wrong[0]]}; train again or name another")
    cfg = PrismConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    try:
        check_config(cfg)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    return cfg


def is_of(value: object, kind: type) -> bool:
    """Tell whether a plain value is of an annotated type; a tuple may have become a list, as in JSON."""
    parts = get_args(kind)
    if get_origin(kind) is tuple and isinstance(value, tuple | list):
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(parts) and all(map(is_of, value, parts))
    if get_origin(kind) is dict and isinstance(value, dict):
        return all(is_of(k, parts[0]) and is_of(v, parts[1]) for k, v in value.items())
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind and (kind is not int or 0 <= value < 2**20)


def load(path: str | Path, device: str = "cpu", grid: tuple[int, int] | None = None) -> Student:
    """Load a student in eval mode: a checkpoint of ours, an export of one, or a released one of PRISM or SAK.

    path: also a URL, which is fetched once. grid (h, w) in patches: resize the position table to it; a
    released one of just so many patches does not say its rows and columns, and is taken to be of this
    grid. Raises OSError or ValueError.
    """
    file = local_copy(path)
    try:
        content = read_checkpoint(file, grid)
    except ValueError:
        if str(file) != str(path):
            file.unlink()  # so that it is fetched again
        raise
    cfg, state = config_and_weights(content, file)
    model = build(cfg)
    model.load_state_dict(state)
    if grid is not None and tuple(grid) != cfg.grid:
        model.pos_embed = nn.Parameter(resize_pos(model.pos_embed.data, cfg.grid, tuple(grid)))
        model.cfg = replace(cfg, grid=tuple(grid))
    return model.to(device).eval()


def config_and_weights(content: dict, path: str | Path) -> tuple[PrismConfig, dict[str, Tensor]]:
    """Return what `read_checkpoint` read if its parts fit each other. Raises ValueError."""
    cfg, state = config_from(content["config"], path), content["model"]
    if cfg.depth > len(state):
        raise ValueError(f"checkpoint {path} claims {cfg.depth} blocks, and has {len(state)} tensors; name "
                         "another")
    with torch.device("meta"):  # a false config takes no memory
        check_fit(build(cfg).state_dict(), state, path)
    return cfg, state


def local_copy(path: str | Path) -> Path:
    """Return a local file; of an http(s) URL a copy, fetched once into $PRISM_CACHE. Raises OSError."""
    url = str(path)
    if not url.startswith(("http://", "https://")):
        return Path(path)
    cache = Path(os.environ.get("PRISM_CACHE") or "~/.cache/prism").expanduser() / "students"
    file = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.partition('?')[0].split('/')[-1]}"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            write_file(file, lambda temporary: fetch(url, temporary))
        except OSError as error:
            raise OSError(f"cannot fetch {url} ({one_line(error.__cause__ or error)}); see that it exists "
                          f"and the network is up, or put the file at {file}") from error
    return file


def fetch(url: str, path: Path) -> None:
    """Fetch a URL into a file under a progress bar. Raises OSError."""
    import requests
    from rich.progress import track

    with requests.get(url, stream=True, timeout=60) as response, open(path, "wb") as file:
        response.raise_for_status()
        mib = int(response.headers.get("Content-Length", 0)) / 2**20
        for chunk in track(response.iter_content(2**20), f"fetching {url}", total=mib or None):
            file.write(chunk)


def load_strict(model: nn.Module, state: dict[str, Tensor], path: str | Path, new: tuple[str, ...] = (),
                dropped: tuple[str, ...] = ()) -> str:
    """Load weights, allowing only key prefixes named in advance to be `new` here or `dropped` from there.

    Returns "loaded 312, new 24 (heads), dropped 6 (projectors)". Raises ValueError for any other key or
    shape, before anything is loaded.
    """
    own = model.state_dict()
    missing, extra = check_fit(own, state, path, new, dropped)
    model.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}})
    parts = [f"loaded {len(own) - len(missing)}"]
    for word, keys in (("new", missing), ("dropped", extra)):
        if keys:
            groups = {re.sub(r"blocks\.\d+\.", "", k).split(".")[0] for k in keys}
            parts.append(f"{word} {len(keys)} ({', '.join(sorted(groups))})")
    return ", ".join(parts)


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], path: str | Path, new: tuple[str, ...] = (),
              dropped: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Return the keys that are new in `own`, and those dropped from `state`. Raises as `load_strict`."""
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    wrong = [k for k in missing if not k.startswith(new)] + [k for k in extra if not k.startswith(dropped)]
    wrong += [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
              for k in own if k in state and own[k].shape != state[k].shape]
    wrong += [f"{k} {state[k].dtype}" for k in own
              if k in state and own[k].is_floating_point() != state[k].is_floating_point()]
    if wrong:
        raise ValueError(f"weights of {path} do not fit this student ({len(wrong)} keys differ, first "
                         f"{wrong[0]}); use the size, teachers and tasks that it was trained with")
    return missing, extra


def start_from_vit(model: Student, state: dict[str, Tensor], path: str | Path) -> str:
    """Fill a new student's trunk from a plain ViT in timm's names; all experts copy their block's MLP.

    SAK's stem has no final norm, so that one is dropped. Returns what `load_strict` does. Raises ValueError.
    """
    cfg, renamed = model.cfg, {}
    dual = cfg.moe_blocks if isinstance(model, Prism) else ()
    first = next((part for part in ("anchor", "shared") if part not in cfg.without), "experts")
    for key, value in state.items():
        mlp = re.fullmatch(r"blocks\.(\d+)\.mlp\.fc(\d)\.(weight|bias)", key)
        stream = first if mlp and int(mlp[1]) in dual else "mlp"
        if stream == "experts":  # the only MLPs of the block
            key = f"blocks.{mlp[1]}.experts.{mlp[3][0]}{mlp[2]}"
            value = value.expand(cfg.experts, *value.shape)
        for theirs, ours in (("mlp.fc1", f"{stream}.0"), ("mlp.fc2", f"{stream}.2"),
                             ("patch_embed.proj", "patch_embed")):
            key = key.replace(theirs, ours)
        if key == "pos_embed":
            side = math.isqrt(value.shape[1])
            value = resize_pos(value, (side, side), cfg.grid)
        renamed[key] = value
    new = [f"blocks.{i}.{part}." for i in dual for part in ("gate", "shared", "router", "experts")]
    dropped = ("head.",) if dual else ("head.", "norm.")
    report = load_strict(model, renamed, path, dropped=dropped, new=(
        *new, "teacher_embed", "task_embed", "projectors.", "heads.",
        "adapters.", "out_norms.", "aligners.", "mixers."))
    if dual:
        model.copy_anchors()
    return report


def save(model: Student, path: str | Path) -> None:
    """Write weights and config to `path`, for `load`: to one safetensors file if it is named so."""
    write = write_export if Path(path).suffix == ".safetensors" else write_checkpoint
    write(path, {"model": model.state_dict(), "config": asdict(model.cfg)})


def export(path: Path) -> None:
    """Write the student of a checkpoint to a safetensors file beside it, with its config and provenance."""
    content, file = read_checkpoint(path), path.with_suffix(".safetensors")
    if file == path:
        raise ValueError(f"{path} is an export already; name a checkpoint of train.py")
    write_export(file, content)
    print(f"wrote {file}, {file.stat().st_size / 2**20:.1f} MiB; prism.load({str(file)!r}) reads it")


def choose_device(name: str | None) -> torch.device:
    """Return the device that is named, or a GPU if there is one. Raises ValueError."""
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not known; use cpu or cuda")
    count = torch.cuda.device_count() if gpu else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name}, but torch sees {count or 'no'} GPU; use --device cpu")
    return device


def one_line(error: BaseException) -> str:
    """Shorten an error to its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def exit_with_one_line(run, debug: bool) -> None:
    """Call `run`; turn what a user can cause into one line on stderr and exit code 1.

    SIGTERM ends it as Ctrl-C does, so that worker processes end and temporary files go.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        sys.exit(f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------ main


@dataclass
class Args:
    """Print the sizes; with --bench, what the experts cost and how it grows; with --export, write a file."""

    export: Path | None = None  # write this checkpoint's student to one safetensors file beside it
    bench: bool = False  # time the experts beside their ideal, forward and backward
    device: str | None = None  # default: cuda if there is one, else cpu
    dtype: Literal["float32", "bfloat16"] | None = None  # autocast to it (default: bfloat16 on cuda)
    compile: bool = False  # torch.compile what compiles without a break (the loops do not)
    tokens: int = 2308  # T
    dim: int = 384  # D; hidden layers are 4 D wide
    experts: int = 15  # E
    top_k: int = 3  # K
    repeats: int = 7  # medians of so many, variants taking turns
    debug: bool = False  # full traceback on errors


class Work(NamedTuple):
    """One thing to time: a forward pass, and the tensors whose gradients are wanted of it."""

    run: Callable[[], Tensor]
    wanted: list[Tensor]

    def step(self) -> None:
        """Go forward and backward; gradients are new tensors, as after zero_grad."""
        torch.autograd.grad(self.run().float().square().mean(), self.wanted)


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


def kept_mib(work: Work) -> float:
    """Measure what the forward pass keeps for the backward pass beyond parameters and inputs, MiB."""
    known, kept = {t.untyped_storage().data_ptr() for t in work.wanted}, {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        work.run()
    return sum(size for pointer, size in kept.items() if pointer not in known) / 2**20


def count_flops(work: Work) -> int:
    """Count the floating-point operations of the matrix products of one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work.run().float().square().mean().backward()  # the counter cannot follow autograd.grad
    for t in work.wanted:
        t.grad = None
    return counter.get_total_flops()


def expert_works(args: Args, device: torch.device) -> dict[str, Work]:
    """Set up ways to compute the same routed experts, and one dense MLP of equal multiply-adds: the ideal."""
    T, D, E, K = args.tokens, args.dim, args.experts, args.top_k
    torch.manual_seed(0)
    with device:
        experts, dense = Experts(E, D, 4 * D), MLP(D, 4 * D)
        separate = nn.ModuleList(MLP(D, 4 * D) for _ in range(E))
        x, many = torch.randn(T, D, requires_grad=True), torch.randn(T * K, D, requires_grad=True)
        topk_w, topk_idx = torch.rand(T, E).topk(K)
    stacked = (experts.w1, experts.b1, experts.w2, experts.b2)

    def masked() -> Tensor:
        y = torch.zeros_like(x)
        for e, expert in enumerate(separate):
            chosen = topk_idx == e  # (T, K)
            token = chosen.any(1)
            y[token] += (topk_w * chosen).sum(1)[token].unsqueeze(1) * expert(x[token])
        return y

    def all_experts(x: Tensor) -> Tensor:
        w = x.new_zeros(T, E).scatter(1, topk_idx, topk_w)
        hidden = F.gelu(torch.einsum("td,ehd->eth", x, experts.w1) + experts.b1.unsqueeze(1))
        y = torch.einsum("eth,edh->etd", hidden, experts.w2) + experts.b2.unsqueeze(1)
        return torch.einsum("etd,te->td", y, w)

    fast, ideal, every = experts.forward, dense.forward, all_experts
    if args.compile:
        fast, ideal, every = (torch.compile(f, fullgraph=True) for f in (fast, ideal, every))
    return {
        "plain loop": Work(lambda: experts.plain(x, topk_idx, topk_w), [x, *stacked]),
        "masked loop, separate parameters": Work(masked, [x, *separate.parameters()]),
        "all experts on all tokens": Work(lambda: every(x), [x, *stacked]),
        "sorted dispatch (ours)": Work(lambda: fast(x, topk_idx, topk_w), [x, *stacked]),
        "ideal: dense MLP on T K rows": Work(lambda: ideal(many), [many, *dense.parameters()]),
    }


def stream_works(args: Args, device: torch.device) -> dict[str, Work]:
    """Set up the whole dual stream beside one MLP of its active width: anchor, shared and K experts."""
    D, rows = args.dim, max(1, args.tokens // 577)
    cfg = PrismConfig(dim=D, experts=args.experts, top_k=args.top_k)
    torch.manual_seed(0)
    with device:
        block, norm, wide = DualStreamBlock(cfg), nn.LayerNorm(D), MLP(D, (8 + 4 * args.top_k) * D)
        x = torch.randn(rows, args.tokens // rows, D, requires_grad=True)
        context = torch.randn(rows, D, requires_grad=True)
    nn.init.normal_(block.router.film.weight, std=0.02)
    own = [p for name, p in block.named_parameters() if not name.startswith(("attn", "norm1"))]
    streams, mlp = (block.streams, wide.forward)
    if args.compile:
        streams, mlp = (torch.compile(f, fullgraph=True) for f in (streams, mlp))

    def dual() -> Tensor:
        y, route = streams(x, context)
        return torch.cat([y.float().flatten(), route.prob])

    return {"dual stream, with router and gate": Work(dual, [x, context, *own]),
            "ideal: dense MLP, equal width": Work(lambda: x + mlp(norm(x)), [x, *wide.parameters()])}


def grown_works(args: Args, device: torch.device) -> dict[str, Work]:
    """Set up the dispatch, and again with one size doubled at a time."""
    ours = "sorted dispatch (ours)"
    works = {ours: expert_works(args, device)[ours]}
    for size in ("tokens", "experts", "top_k", "dim"):
        doubled = replace(args, **{size: 2 * getattr(args, size)})
        works[f"{size.replace('_', '-')} doubled"] = expert_works(doubled, device)[ours]
    return works


def print_bench(args: Args) -> None:
    """Time, count and print: the experts, the dual stream, and how cost grows."""
    from rich.console import Console
    from rich.table import Column, Table

    if odd := [name for name in ("tokens", "dim", "repeats") if getattr(args, name) < 1]:
        raise ValueError(f"--{odd[0]} {getattr(args, odd[0])} is not positive; use 1 or more")
    for most in (args.top_k, 2 * args.top_k):  # as it is, and doubled
        check_config(PrismConfig(dim=args.dim, heads=1, experts=args.experts, top_k=most))
    device = choose_device(args.device)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    console, sizes = Console(), f"T {args.tokens}, D {args.dim}, E {args.experts}, K {args.top_k}"
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for setup, base in ((expert_works, -1), (stream_works, -1), (grown_works, 0)):
            works = setup(args, device)
            ms = time_interleaved({name: work.step for name, work in works.items()}, device, args.repeats)
            eager = setup(replace(args, compile=False), device)  # the counter cannot look into compiled code
            flops = {name: count_flops(work) for name, work in eager.items()}
            first = list(works)[base]
            columns = ("ms", "ratio", "GFLOP", "ratio", "kept MiB")
            table = Table(sizes, *(Column(name, justify="right") for name in columns))
            for name, work in works.items():
                table.add_row(name, f"{ms[name]:.1f}", f"{ms[name] / ms[first]:.2f}",
                              f"{flops[name] / 1e9:.1f}", f"{flops[name] / flops[first]:.2f}",
                              f"{kept_mib(work):.0f}")
            console.print(table)
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"forward + backward, {where}, {dtype}, {'compiled' if args.compile else 'eager'}, medians of "
          f"{args.repeats}; kept: held from forward to backward beyond weights and inputs")


def main(args: Args) -> None:
    """Print sizes and parameter counts, or the benchmark."""
    from rich.console import Console
    from rich.table import Table

    if args.bench:
        return print_bench(args)
    if args.export:
        return export(args.export)
    table = Table("size", "width", "depth", "experts", "top-k", "parameters M", "active per token M")
    for name, cfg in SIZES.items():
        with torch.device("meta"):
            total, active = count_parameters(Prism(cfg))
        table.add_row(name, *map(str, (cfg.dim, cfg.depth, cfg.experts, cfg.top_k)),
                      f"{total / 1e6:.1f}", f"{active / 1e6:.1f}")
    Console().print(table)
    print("--bench times the experts; --help lists all")


if __name__ == "__main__":
    import tyro

    cli = tyro.cli(Args, description=__doc__)
    exit_with_one_line(lambda: main(cli), cli.debug)
