"""Teachers: frozen networks that the student learns to imitate.

    python teachers.py                                      # names, sources, licences, what is cached
    python teachers.py dinov2-b sam-b --image photo.jpg     # fetches both, draws what they see

Their files add to a plain ViT: DINOv2 LayerScale (giant: SwiGLU; reg: 4 registers); DINOv3 LayerScale, 4
registers and rotary positions, without a bias of keys; CLIP a LayerNorm before the blocks and QuickGELU
(laion: GELU); SigLIP 2 tanh GELU, without a class token; SAM windows and relative positions, without a class
token; augreg, where students start (--init), and the toys nothing.

A teacher's four levels are the outputs of its blocks at a quarter, half, three quarters and all of the
depth: patch tokens only, before any final norm. Images of any size: both sides are rounded to whole
patches by resizing, never by cutting (toys: the shorter side becomes 64). SAM gets the longest side at
1024 and padding at the bottom and right, which is cut off the map again.
"""

import data  # first: it settles how threads wait, before torch is loaded

# isort: split
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import requests
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import prism

# ---------------------------------------------------------------------------------------- the encoder

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],  # fc1 makes both halves
}


@dataclass(frozen=True)
class EncoderConfig:
    """Describe a teacher's ViT. The flags cover all families; the defaults are a plain ViT's."""

    dim: int = 96  # width of the tokens
    depth: int = 4  # blocks
    heads: int = 3  # attention heads
    hidden: int = 192  # hidden width of the MLPs
    patch: int = 8  # patch side in pixels
    grid: tuple[int, int] = (8, 8)  # rows and columns of the position table, in patches
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of RGB in [0, 1], subtracted from the input
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    eps: float = 1e-6  # of the LayerNorms
    activation: str = "gelu"  # one of ACTIVATIONS
    prefix: int = 0  # tokens before the patches: class token, registers
    patch_bias: bool = True  # CLIP has none
    pre_norm: bool = False  # LayerNorm before the blocks: CLIP
    layer_scale: bool = False  # a learned factor per channel after attention and MLP: DINO
    antialias: bool = False  # when the position table is resized: DINOv2 with registers
    rope: float = 0.0  # base of rotary positions instead of the table, 0 = table: DINOv3
    window: int = 0  # attention within windows of so many patches, with relative positions: SAM
    global_blocks: tuple[int, ...] = ()  # blocks whose window is the whole image

    def span(self, block: int) -> tuple[int, int]:
        """Return the rows and columns of patches that a block's relative positions were made for."""
        return self.grid if block in self.global_blocks else (self.window, self.window)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block with whatever its family adds."""

    def __init__(self, cfg: EncoderConfig, index: int):
        super().__init__()
        self.heads, self.activation = cfg.heads, ACTIVATIONS[cfg.activation]
        self.window = 0 if index in cfg.global_blocks else cfg.window
        self.norm1 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.proj = nn.Linear(cfg.dim, cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.fc1 = nn.Linear(cfg.dim, cfg.hidden * (2 if cfg.activation == "swiglu" else 1))
        self.fc2 = nn.Linear(cfg.hidden, cfg.dim)
        for name, used, shape in (
            ("scale1", cfg.layer_scale, (cfg.dim,)),
            ("scale2", cfg.layer_scale, (cfg.dim,)),
            ("rel_h", cfg.window, (2 * cfg.span(index)[0] - 1, cfg.dim // cfg.heads)),
            ("rel_w", cfg.window, (2 * cfg.span(index)[1] - 1, cfg.dim // cfg.heads)),
        ):
            self.register_parameter(name, nn.Parameter(torch.ones(shape)) if used else None)

    def forward(self, x: Tensor, grid: tuple[int, int] = (0, 0), rope: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, D); grid: rows and columns of patches, rope (2, N, D / heads), where used."""
        y = self.norm1(x)
        y = self.attend_in_windows(y, grid) if self.window else self.attend(y, grid, rope)
        x = x + (y if self.scale1 is None else self.scale1 * y)
        y = self.fc2(self.activation(self.fc1(self.norm2(x))))
        return x + (y if self.scale2 is None else self.scale2 * y)

    def attend(self, x: Tensor, grid: tuple[int, int], rope: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        d = q.shape[-1]
        if self.rel_h is not None:
            q, k = self.with_places(q, k, grid)
            v = F.pad(v, (0, q.shape[-1] - d))  # fast kernels want one width
        x = F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]  # (B, heads, N, D / heads)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def with_places(self, q: Tensor, k: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Append to queries their scores of every row and column, to keys a mark of their own (SAM).

        So q k adds what a key's offset scores, and no bias (B, heads, N, N) is made: 0.8 GB at 1024 px.
        """
        h, w = grid
        own = rearrange(q, "b n (h w) d -> b n h w d", h=h) * q.shape[-1] ** 0.5  # attention divides by it
        rows = torch.einsum("bnhwd,hkd->bnhwk", own, relative_table(self.rel_h, h).to(q.dtype))
        columns = torch.einsum("bnhwd,wkd->bnhwk", own, relative_table(self.rel_w, w).to(q.dtype))
        marks = torch.cat([torch.eye(h).repeat_interleave(w, 0), torch.eye(w).repeat(h, 1)], 1).to(k)
        marks = marks.expand(*k.shape[:2], -1, -1)  # (B, heads, N, h + w)
        return torch.cat([q, rows.flatten(2, 3), columns.flatten(2, 3)], -1), torch.cat([k, marks], -1)

    def attend_in_windows(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend within squares of patches; those beyond the last row and column are zeros (SAM)."""
        (h, w), side = grid, self.window
        x = F.pad(rearrange(x, "b (h w) d -> b h w d", h=h), (0, 0, 0, -w % side, 0, -h % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = rearrange(x, "b (i p) (j q) d -> (b i j) (p q) d", p=side, q=side)
        x = self.attend(x, (side, side), None)
        x = rearrange(x, "(b i j) (p q) d -> b (i p) (j q) d", i=rows, j=columns, p=side)
        return x[:, :h, :w].flatten(1, 2)  # (B, N, D)


def relative_table(table: Tensor, side: int) -> Tensor:
    """Look up offsets -(side-1)..side-1 of all pairs: (2 * S - 1, d) -> (side, side, d), query first."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], 2 * side - 1, mode="linear", align_corners=False)[0].T
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]


def rotary_table(h: int, w: int, prefix: int, d: int, base: float, device: torch.device) -> Tensor:
    """Return cosines and sines (2, prefix + h * w, d) of DINOv3's rotary positions.

    A patch centre at (y, x) in [-1, 1] turns the channel pairs (c, c + d / 2) by 2 pi y / base^(4 c / d)
    for c < d / 4, by 2 pi x / ... for the next quarter; prefix tokens are not turned.
    """
    y, x = ((2 * torch.arange(n, device=device) + 1) / n - 1 for n in (h, w))
    frequency = 2 * math.pi * base ** -(torch.arange(d // 4, device=device) * 4 / d)
    angles = torch.cartesian_prod(y, x).unsqueeze(-1) * frequency  # (h * w, 2, d / 4)
    angles = F.pad(angles.flatten(1).tile(2), (0, 0, prefix, 0))  # (prefix + h * w, d)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn channel pairs (c, c + d / 2) of queries or keys (B, heads, N, d) by rope (2, N, d)."""
    a, b = x.chunk(2, -1)
    return (x * rope[0] + torch.cat([-b, a], -1) * rope[1]).to(x.dtype)


class Encoder(nn.Module):
    """A ViT that returns the outputs of its blocks."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch, bias=cfg.patch_bias)
        self.prefix = nn.Parameter(torch.zeros(1, cfg.prefix, cfg.dim)) if cfg.prefix else None
        self.pos_embed = None if cfg.rope else nn.Parameter(torch.empty(1, cfg.dim, *cfg.grid))
        self.pre_norm = nn.LayerNorm(cfg.dim, cfg.eps) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(EncoderBlock(cfg, i) for i in range(cfg.depth))
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn RGB in [0, 1] (B, 3, H, W) into the pixels that the encoder expects."""
        return (images - self.mean) / self.std

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn normalised pixels (B, 3, H, W) into tokens with positions (B, N, D), prefix first."""
        x, pos = self.patch_embed(pixels), self.pos_embed  # (B, D, h, w)
        if pos is not None and x.shape[-2:] != pos.shape[-2:]:
            pos = F.interpolate(pos, x.shape[-2:], mode="bicubic", align_corners=False,
                                antialias=self.cfg.antialias)
        x = rearrange(x if pos is None else x + pos, "b d h w -> b (h w) d")
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1).to(x.dtype), x], 1)
        return self.pre_norm(x)

    def run(self, x: Tensor, grid: tuple[int, int] = (0, 0)) -> list[Tensor]:
        """Map tokens (B, N, D) to the output of every block, (B, N, D) each."""
        cfg, rope, outputs = self.cfg, None, []
        if cfg.rope:
            rope = rotary_table(*grid, cfg.prefix, cfg.dim // cfg.heads, cfg.rope, x.device)
        for block in self.blocks:
            x = block(x, grid, rope)
            outputs.append(x)
        return outputs

    def forward(self, pixels: Tensor, keep: Sequence[int] | None = None) -> list[Tensor]:
        """Map normalised pixels (B, 3, H, W) to depth maps (B, D, h, w) of all blocks, or those to keep."""
        grid = (pixels.shape[-2] // self.cfg.patch, pixels.shape[-1] // self.cfg.patch)
        outputs = self.run(self.embed(pixels), grid)
        return [rearrange(outputs[i][:, self.cfg.prefix :], "b (h w) d -> b d h w", h=grid[0])
                for i in (range(self.cfg.depth) if keep is None else keep)]


# ------------------------------------------------------------------------------------------- key maps

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class Layout(NamedTuple):
    """How the files of a family name their weights, and what no shape tells of the family."""

    family: str
    mark: str  # a key that only this layout has; the first of LAYOUTS that fits is taken
    block: str  # what their names of block # begin with
    names: dict[str, str]  # ours -> theirs; ".x" is within a block, "x y z" are stacked
    flags: dict  # of EncoderConfig, where config.json does not say otherwise
    models: str  # regex of what config.json may call them (model_type; timm: architecture)
    zeros: bool = False  # the family has no bias of keys


VIT = {"cls": "cls_token", "pos": "pos_embed", "patch_embed": "patch_embed.proj",
       "norm1": ".norm1", "qkv": ".attn.qkv", "proj": ".attn.proj",
       "norm2": ".norm2", "fc1": ".mlp.fc1", "fc2": ".mlp.fc2"}
VIT_DINO = VIT | {"scale1": ".ls1.gamma", "scale2": ".ls2.gamma", "registers": "register_tokens"}
DINOV2 = {"cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings",
          "registers": "embeddings.register_tokens", "patch_embed": "embeddings.patch_embeddings.projection",
          "qkv": ".attention.attention.query .attention.attention.key .attention.attention.value",
          "proj": ".attention.output.dense", "norm1": ".norm1", "norm2": ".norm2",
          "scale1": ".layer_scale1.lambda1", "scale2": ".layer_scale2.lambda1",
          "fc1": ".mlp.fc1 .mlp.weights_in", "fc2": ".mlp.fc2 .mlp.weights_out"}
SIGLIP = {"pos": "embeddings.position_embedding.weight", "patch_embed": "embeddings.patch_embedding",
          "norm1": ".layer_norm1", "qkv": ".self_attn.q_proj .self_attn.k_proj .self_attn.v_proj",
          "proj": ".self_attn.out_proj", "norm2": ".layer_norm2", "fc1": ".mlp.fc1", "fc2": ".mlp.fc2"}
SAM = {"rel_h": ".attn.rel_pos_h", "rel_w": ".attn.rel_pos_w",
       "fc1": ".mlp.lin1 .mlp.fc1", "fc2": ".mlp.lin2 .mlp.fc2"}  # the latter timm's
CLIP_FLAGS = {"eps": 1e-5, "activation": "quick_gelu", "pre_norm": True, "patch_bias": False, **OPENAI}
DINO_FLAGS = {"layer_scale": True, **IMAGENET}
DINOV3_FLAGS = {"eps": 1e-5, "rope": 100.0, "head_width": 64, **DINO_FLAGS}
UNUSED = (r"(norm|fc_norm|(local_)?cls_norm|(post_)?layernorm|pooler|head|fc|classifier|neck|ln_post)\."
          r"|proj$|.*(mask_token|position_ids|bias_mask|periods)$")  # keys that no level needs

LAYOUTS = [
    Layout("DINOv3", "layer.0.attention.q_proj.weight", "layer.#", {
        "cls": "embeddings.cls_token", "registers": "embeddings.register_tokens",
        "patch_embed": "embeddings.patch_embeddings", "norm1": ".norm1", "norm2": ".norm2",
        "scale1": ".layer_scale1.lambda1", "scale2": ".layer_scale2.lambda1",
        "qkv": ".attention.q_proj .attention.k_proj .attention.v_proj", "proj": ".attention.o_proj",
        "fc1": ".mlp.gate_proj .mlp.up_proj", "fc2": ".mlp.down_proj"},
        DINOV3_FLAGS, "dinov3_vit", zeros=True),
    Layout("DINOv3 (original)", "storage_tokens", "blocks.#", VIT_DINO | {
        "pos": "", "registers": "storage_tokens", "fc1": ".mlp.fc1 .mlp.w1 .mlp.w2",
        "fc2": ".mlp.fc2 .mlp.w3"}, DINOV3_FLAGS, r"dinov3\w*", zeros=True),
    Layout("DINOv3 (timm)", "blocks.0.gamma_1", "blocks.#", VIT | {
        "pos": "", "registers": "reg_token", "qkv": ".attn.qkv .attn.q_ .attn.v_",
        "scale1": ".gamma_1", "scale2": ".gamma_2", "fc1": ".mlp.fc1 .mlp.fc1_g .mlp.fc1_x"},
        DINOV3_FLAGS, r"vit_\w+_dinov3(_qkvb)?", zeros=True),
    Layout("DINOv2", "encoder.layer.0.layer_scale1.lambda1", "encoder.layer.#", DINOV2, DINO_FLAGS,
           r"dinov2\w*"),
    Layout("CLIP", "pre_layrnorm.weight", "encoder.layers.#",  # the typo is theirs
           SIGLIP | {"cls": "embeddings.class_embedding", "pre_norm": "pre_layrnorm"}, CLIP_FLAGS, "clip.*"),
    Layout("SigLIP", "embeddings.patch_embedding.bias", "encoder.layers.#", SIGLIP,
           {"activation": "gelu_tanh", **HALF}, r"siglip\w*"),
    Layout("CLIP (open_clip)", "ln_pre.weight", "transformer.resblocks.#", {
        "cls": "class_embedding", "pos": "positional_embedding", "patch_embed": "conv1",
        "pre_norm": "ln_pre", "norm1": ".ln_1", "qkv": ".attn.in_proj_", "proj": ".attn.out_proj",
        "norm2": ".ln_2", "fc1": ".mlp.c_fc", "fc2": ".mlp.c_proj"}, CLIP_FLAGS, r"\w*clip\w*"),
    Layout("SAM", "layers.0.attn.rel_pos_h", "layers.#", {
        "pos": "pos_embed", "patch_embed": "patch_embed.projection", "norm1": ".layer_norm1",
        "qkv": ".attn.qkv", "proj": ".attn.proj", "norm2": ".layer_norm2", **SAM}, IMAGENET, r"sam\w*"),
    Layout("SAM (original, timm)", "blocks.0.attn.rel_pos_h", "blocks.#", VIT | SAM | {"cls": ""},
           IMAGENET, "samvit.*"),
    Layout("CLIP (timm)", "norm_pre.weight", "blocks.#", VIT | {"pre_norm": "norm_pre"},
           CLIP_FLAGS | {"activation": "gelu"}, r"vit_\w+_clip_\w+"),
    Layout("DINOv2 (original, timm)", "blocks.0.ls1.gamma", "blocks.#", VIT_DINO | {
        "registers": "register_tokens reg_token", "fc1": ".mlp.fc1 .mlp.w12", "fc2": ".mlp.fc2 .mlp.w3"},
        DINO_FLAGS, r"dinov2\w*|vit_\w+_dinov2"),
    Layout("ViT (timm)", "blocks.0.attn.qkv.weight", "blocks.#", VIT, HALF,
           r"(vit|deit)_[a-z]+_patch\d+(_gap)?_\d+(_\w*in21k\w*)?"),
]
KNOWN = "layouts known: " + ", ".join(layout.family for layout in LAYOUTS)
HEADS = {1152: 16, 4096: 32, 1280: 0, 1408: 0, 1664: 0}  # by width, if not / 64; 0: families differ


class Weights(NamedTuple):
    """A weights file with what lies beside it."""

    tensors: dict[str, Tensor]
    hints: dict  # what config.json and its like tell, in EncoderConfig's terms
    provenance: dict  # where the file is from: plain values for checkpoints
    path: Path


def rename(file: dict[str, Tensor], layout: Layout, prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """Give the weights below a prefix our names, q, k and v stacked; also list the keys without a place."""
    stacks, odd = {}, []
    block = re.escape(layout.block).replace(r"\#", r"(\d+)")
    rules = [(re.compile(f"{block if part[0] == '.' else '()'}{re.escape(part)}\\.?(weight|bias|)"), ours, k)
             for ours, theirs in layout.names.items() for k, part in enumerate(theirs.split())]
    for key, tensor in file.items():
        if not key.startswith(prefix):
            continue
        for pattern, ours, k in rules:
            if match := pattern.fullmatch(key.removeprefix(prefix)):
                name = ".".join(filter(None, (match[1] and f"blocks.{match[1]}", ours, match[2])))
                stacks.setdefault(name, {})[k] = tensor.float()
                break
        else:
            odd += [] if re.match(UNUSED, key.removeprefix(prefix)) else [key]
    state = {name: torch.cat([stack[k] for k in sorted(stack)]) for name, stack in stacks.items()}
    for weight in [k for k in state if layout.zeros and k.endswith("qkv.weight")]:
        third, bias = len(state[weight]) // 3, weight.replace("weight", "bias")
        given = state.get(bias, torch.zeros(3 * third))  # of q and v, of q, k and v, or none
        state[bias] = torch.cat([given[:third], torch.zeros(third), given[-third:]])
    return state, odd


def find_layout(weights: Weights) -> tuple[Layout, str]:
    """Find which layout's mark a file has, under which prefix. Raises ValueError."""
    file, hints, _, path = weights
    for layout in LAYOUTS:
        found = [key.removesuffix(layout.mark) for key in file if f".{key}".endswith(f".{layout.mark}")]
        if len(found) > 1:
            raise ValueError(f"{path} has several networks that look like {layout.family}, under "
                             f"{' and '.join(map(repr, found))}; store the one that is wanted alone")
        if found and (model := hints["model"]) and not re.fullmatch(layout.models, model):
            raise ValueError(f"{path} has the keys of {layout.family}, but the config.json beside it says "
                             f"{model}: another network, which would be wrong here; {KNOWN}")
        if found:
            return layout, found[0]
    keys = ", ".join(list(file)[:3])
    raise ValueError(f"{path} has weights of no known layout (first keys: {keys}); {KNOWN}")


def read_encoder(weights: Weights) -> tuple[Encoder, str]:
    """Make the encoder that a file describes and fill it strictly; returns it and its family.

    Sizes come from the shapes, the rest from config.json or the family. Raises ValueError.
    """
    file, hints, _, path = weights
    layout, prefix = find_layout(weights)
    try:
        state, odd = rename(file, layout, prefix)
        needed = ("pos",) if layout.names is VIT else ("cls", "pos")
        if lost := [k for k in needed if layout.names.get(k) and k not in state]:
            raise ValueError(f"{lost[0]} is missing")
        encoder = Encoder(describe_encoder(state, layout.flags | hints, path))
        prism.load_strict(encoder, state | {key: file[key] for key in odd}, path)
    except (ValueError, RuntimeError, LookupError) as error:
        raise ValueError(f"{path} looks like {layout.family} but does not fit, by our names: "
                         f"{prism.one_line(error)}; {KNOWN}") from error
    return encoder, layout.family


def describe_encoder(state: dict[str, Tensor], flags: dict, path: Path) -> EncoderConfig:
    """Read a config off an encoder's weights by our names; puts prefix and position table together."""
    if "pre_norm" in flags and "activation" not in flags["told"]:
        warnings.warn(f"{path} has no config.json beside it that tells CLIP's activation: "
                      f"{flags['activation']} is assumed", stacklevel=4)
    cls, pos, registers = (state.pop(name, None) for name in ("cls", "pos", "registers"))
    patch, fc1, fc2 = (state[f"{name}.weight"] for name in ("patch_embed", "blocks.0.fc1", "blocks.0.fc2"))
    dim, depth = len(patch), 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    prefix = [] if cls is None else [cls.reshape(1, 1, -1)]
    if pos is not None:
        if pos.ndim < 4:
            pos = pos.reshape(-1, dim)
            sides = [n // patch.shape[-1] for n in flags.get("pixels", ())]
            if math.prod(sides) not in (len(pos), len(pos) - len(prefix)):  # not told, or of another table
                sides = [math.isqrt(len(pos))] * 2
            more = len(pos) - math.prod(sides)
            if more not in (0, len(prefix)):
                raise ValueError(f"{len(pos)} rows of positions, with or without a class token no square; a "
                                 "config.json beside the file must give the image size")
            prefix = [token + pos[:more] for token in prefix] if more else prefix
            pos = pos[more:].view(1, *sides, dim)
        state["pos_embed"] = pos.permute(0, 3, 1, 2)
    if registers is None and flags.get("registers", "rope" in flags):
        raise ValueError("the registers are missing")
    prefix += [] if registers is None else [registers]
    if prefix:
        state["prefix"] = torch.cat(prefix, 1)
    grid = (0, 0) if pos is None else tuple(state["pos_embed"].shape[2:])
    offsets = [state.get(f"blocks.{i}.rel_h") for i in range(depth)]
    sides = [(len(x) + 1) // 2 for x in offsets if x is not None]
    if sides:  # SAM: the blocks that see the whole image have relative positions for all of it
        whole = tuple(i for i, side in enumerate(sides) if side == grid[0])
        flags |= {"window": min(sides), "global_blocks": whole}
        flags.setdefault("heads", dim // offsets[0].shape[1])
    narrow = flags.get("head_width", 0 if dim in HEADS else 64)
    heads = flags.setdefault("heads", HEADS.get(dim) or (dim // narrow if narrow else 0))
    if not heads or dim % heads:
        raise ValueError(f"{heads or 'an unknown number of'} heads do not divide the width {dim}: a "
                         "config.json beside the file must give num_attention_heads")
    if len(fc1) == 2 * fc2.shape[1]:
        flags["activation"] = "swiglu"
    known = {field.name for field in fields(EncoderConfig)}
    return EncoderConfig(
        dim=dim, depth=depth, hidden=fc2.shape[1], patch=patch.shape[-1], grid=grid,
        prefix=sum(token.shape[1] for token in prefix), antialias=registers is not None and pos is not None,
        **{k: v for k, v in flags.items() if k in known})


# -------------------------------------------------------------------------------------------- sources


class Source(NamedTuple):
    """A teacher that has a short name."""

    repo: str  # on the Hugging Face hub
    licence: str
    width: int
    depth: int
    patch: int  # side in pixels
    pixels: int  # side of the images that it was trained on at last


TABLE = """
dinov2-s       facebook/dinov2-small                                 Apache-2.0     384 12 14  518
dinov2-b       facebook/dinov2-base                                  Apache-2.0     768 12 14  518
dinov2-l       facebook/dinov2-large                                 Apache-2.0    1024 24 14  518
dinov2-g       facebook/dinov2-giant                                 Apache-2.0    1536 40 14  518
dinov2-reg-s   facebook/dinov2-with-registers-small                  Apache-2.0     384 12 14  518
dinov2-reg-b   facebook/dinov2-with-registers-base                   Apache-2.0     768 12 14  518
dinov2-reg-l   facebook/dinov2-with-registers-large                  Apache-2.0    1024 24 14  518
dinov2-reg-g   facebook/dinov2-with-registers-giant                  Apache-2.0    1536 40 14  518
clip-b         openai/clip-vit-base-patch16                          MIT            768 12 16  224
clip-l         openai/clip-vit-large-patch14                         MIT           1024 24 14  224
clip-l-336     openai/clip-vit-large-patch14-336                     MIT           1024 24 14  336
clip-laion-b   timm/vit_base_patch16_clip_384.laion2b_ft_in12k_in1k  Apache-2.0     768 12 16  384
clip-laion-l   timm/vit_large_patch14_clip_336.laion2b_ft_in12k_in1k Apache-2.0    1024 24 14  336
sam-b          facebook/sam-vit-base                                 Apache-2.0     768 12 16 1024
sam-l          facebook/sam-vit-large                                Apache-2.0    1024 24 16 1024
sam-h          facebook/sam-vit-huge                                 Apache-2.0    1280 32 16 1024
siglip2-b      google/siglip2-base-patch16-384                       Apache-2.0     768 12 16  384
siglip2-l      google/siglip2-large-patch16-384                      Apache-2.0    1024 24 16  384
siglip2-so400m google/siglip2-so400m-patch16-384                     Apache-2.0    1152 27 16  384
dinov3-s       facebook/dinov3-vits16-pretrain-lvd1689m              DINOv3-gated   384 12 16  256
dinov3-b       facebook/dinov3-vitb16-pretrain-lvd1689m              DINOv3-gated   768 12 16  256
dinov3-l       facebook/dinov3-vitl16-pretrain-lvd1689m              DINOv3-gated  1024 24 16  256
augreg-s       timm/vit_small_patch16_384.augreg_in21k_ft_in1k       Apache-2.0     384 12 16  384
augreg-b       timm/vit_base_patch16_384.augreg_in21k_ft_in1k        Apache-2.0     768 12 16  384
augreg-l       timm/vit_large_patch16_384.augreg_in21k_ft_in1k       Apache-2.0    1024 24 16  384
"""
SOURCES = {row[0]: Source(*row[1:3], *map(int, row[3:]))
           for row in map(str.split, TABLE.strip().splitlines())}


# owner/name@revision; what ends like a file is none, but a file that is not there
REPO = re.compile(r"(?!.*\.(?:safetensors|pth|pt|bin)$)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def check_source(source: str) -> None:
    """Raise ValueError for a source that cannot be one, before anything is fetched or trained."""
    known = source in TOYS or source in SOURCES or Path(source).expanduser().exists()
    if not known and not REPO.fullmatch(source):
        raise ValueError(f"unknown teacher {source}: no such name, file or folder; names are "
                         f"{', '.join((*TOYS, *SOURCES))}; or give a hub repo as owner/name@revision")


def read_source(source: str, sha256: str | None = None) -> Weights:
    """Find a weights file, fetch it if need be, and read it with the configs beside it.

    source: short name, hub repo id owner/name@revision, folder, or file; sha256: what the weights file
    must have. Raises ValueError or OSError.
    """
    check_source(source)
    if source in TOYS:
        raise ValueError(f"{source} is trained, not read from a file; name other weights")
    path, licence = Path(source).expanduser(), "not stated"
    origin = str(path.resolve())
    if source in SOURCES or not path.exists():
        origin = SOURCES[source].repo if source in SOURCES else source
        repo, revision = REPO.fullmatch(origin).groups()
        licence = {s.repo: s.licence for s in SOURCES.values()}.get(repo, licence)
        path = fetch_repo(repo, revision or "main", sha256)
    if path.is_dir():
        there = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not there:
            raise ValueError(f"{path} has no weights; put {' or '.join(WEIGHTS)} there")
        path = there[0]
    if re.search(r"-\d+-of-\d+\.|\.index\.json$", path.name):
        raise ValueError(f"{path} is a shard of weights, or a list of shards; load all of them with "
                         "safetensors.torch.load_file and save them as one model.safetensors")
    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    record = data.read_json(path.parent / "source.json")
    expected = sha256 or record.get("sha256", digest)
    if expected.lower() != digest:
        raise ValueError(f"{path} has sha256 {digest} instead of {expected}; delete it and fetch it again")
    provenance = {"source": origin, "commit": record.get("commit"), "file": path.name,
                  "sha256": digest, "licence": licence}
    return Weights(read_tensors(path), read_hints(path.parent), provenance, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors, or a pickle of plain weights. Raises ValueError."""
    content = prism.read_file(path)
    for wrapper in ("state_dict", "model", "teacher"):
        content = content.get(wrapper, content) if isinstance(content, dict) else content
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not weights:
        raise ValueError(f"{path} is no table of weights by name; name a file of weights alone")
    return weights


def read_hints(folder: Path) -> dict:
    """Collect from config.json and its like what shapes do not tell, in EncoderConfig's terms.

    "told": what of it the files themselves said.
    """
    config, preprocessor, processor, clip = (data.read_json(folder / name) for name in SIDECARS)
    vision, timm = config.get("vision_config", config), config.get("pretrained_cfg", {})
    tower = clip.get("model_cfg", {}).get("vision_cfg", {})  # open_clip
    terms = {"num_attention_heads": "heads", "layer_norm_eps": "eps", "rope_theta": "rope",
             "image_size": "pixels", "hidden_act": "activation", "num_register_tokens": "registers",
             "head_width": "head_width"}
    hints = {ours: x[theirs] for x in (vision, tower) for theirs, ours in terms.items() if theirs in x}
    hints["model"] = config.get("architecture", config.get("model_type"))
    pixels = timm["input_size"][1:] if "input_size" in timm else hints.get("pixels", ())
    hints["pixels"] = [pixels, pixels] if isinstance(pixels, int) else pixels
    if str(config.get("model_type")).startswith("clip"):
        hints.setdefault("activation", "quick_gelu")  # what transformers takes where a config is silent
    if "architecture" in config:  # timm; its first configs of OpenAI's CLIP said nothing of QuickGELU
        quick = "quickgelu" in config["architecture"] or timm.get("tag") == "openai"
        hints["activation"] = "quick_gelu" if quick else "gelu"
    if clip:
        hints["activation"] = "quick_gelu" if clip["model_cfg"].get("quick_gelu") else "gelu"
    if hints.get("activation") == "gelu_pytorch_tanh":
        hints["activation"] = "gelu_tanh"
    if hints.get("activation", "gelu") not in ACTIVATIONS:
        raise ValueError(f"{folder}: activation {hints['activation']}; known are {', '.join(ACTIVATIONS)}")
    for table, start in ((clip.get("preprocess_cfg", {}), ""), (timm, ""), (preprocessor, "image_"),
                         (processor.get("image_processor", {}), "image_")):
        if start + "mean" in table and start + "std" in table:  # the last has the last word
            scale = 255 if max(table[start + "mean"]) > 1 else 1  # of colours that count to 255
            hints |= {name: tuple(x / scale for x in table[start + name]) for name in ("mean", "std")}
    return hints | {"told": list(hints)}


# ------------------------------------------------------------------------------------------ download

SIDECARS = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin",  # the first that the repo has
           "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors.index.json")
RETRIES, PAUSE = 5, 1.0  # tries in a row, seconds before the second; then twice as many each time
CHUNK = 2**16  # bytes; a line that breaks loses less than one
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def repo_folder(repo: str, revision: str = "main") -> Path:
    """Return where the cache keeps a hub repo."""
    return data.cache_folder() / "hub" / repo.replace("/", "--") / revision.replace("/", "--")


def fetch_repo(repo: str, revision: str = "main", sha256: str | None = None, more: tuple = ()) -> Path:
    """Return the cache folder of a hub repo with its weights and configs, downloading what is missing.

    sha256: of the weights; more: other files wanted. A folder that has one of WEIGHTS is taken as it is, so
    that it may be filled by hand. Raises FileNotFoundError, and as `download` does.
    """
    folder = repo_folder(repo, revision)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:  # processes of one machine wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any((folder / name).exists() for name in WEIGHTS):
            return folder
        endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        base = f"{endpoint}/{repo}/resolve/{quote(revision, safe='')}"
        for name in (*SIDECARS, *more):
            (folder / name).exists() or download(f"{base}/{name}", folder / name)
        for name in WEIGHTS:
            if facts := download(f"{base}/{name}", folder / name, sha256):
                source = {"repo": repo, "revision": revision, **facts, "file": name}
                (folder / "source.json").write_text(json.dumps(source, indent=1) + "\n")
                return folder
    raise FileNotFoundError(f"{repo} at {revision} has none of {WEIGHTS}; check name and revision")


def download(url: str, path: Path, sha256: str | None = None) -> dict | None:
    """Fetch one file: resumable, verified, atomic. Returns {"commit", "sha256"}, or None for a 404.

    Raises PermissionError (gated), ConnectionError (gave up: what has come is kept), OSError, ValueError.
    """
    part = path.with_name(f"{path.name}.part")
    for attempt in range(1, RETRIES + 1):
        try:
            stated = transfer(url, part)
            break
        except BROKEN as error:
            if attempt == RETRIES:
                raise ConnectionError(f"no connection to {url} ({prism.one_line(error)}); what came is kept: "
                                      f"repeat the command, or put the file into {path.parent}") from error
            time.sleep(PAUSE * 2 ** (attempt - 1))
    if stated is None:
        return None
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if (wanted := (sha256 or stated["sha256"] or found).lower()) != found:
        part.unlink()
        raise ValueError(f"{url} came with sha256 {found}, needed {wanted}: run again, or check the address")
    part.replace(path)
    return {"commit": stated["commit"], "sha256": found}


def transfer(url: str, part: Path) -> dict | None:
    """Add to `part` what it lacks; returns "commit" and "sha256" as the hub states them, None for a 404."""
    have, token = part.stat().st_size if part.exists() else 0, os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError("HF_TOKEN holds characters that no token has; set it anew")
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {}),
               **({"Authorization": f"Bearer {token}"} if token else {})}
    # auth: without one, requests replaces the token if ~/.netrc knows the host
    with requests.get(url, headers=headers, auth=lambda r: r, stream=True, timeout=(10, 60)) as response:
        status = response.status_code
        if status == 404:
            return None
        if status in (401, 403):
            step = "accept its licence there" + ("" if token else ", then set HF_TOKEN to a token of yours")
            page = url.partition("/resolve/")[0]
            raise PermissionError(f"{page} is gated or does not exist ({status}): {step}; or check the name")
        if status not in (200, 206, 416):
            kind = requests.ConnectionError if status >= 500 else OSError
            raise kind(f"{url} answered {status} {response.reason}")
        if status != 416:  # there is nothing left
            total = int(response.headers.get("Content-Length", 0)) + (have if status == 206 else 0)
            chunks = response.iter_content(CHUNK)
            with part.open("ab" if status == 206 else "wb") as file:
                for chunk in data.track(chunks, part.stem, total // CHUNK + 1, have // CHUNK):
                    file.write(chunk)
            if part.stat().st_size < total:  # urllib3 1 says nothing of it
                raise requests.ConnectionError(f"the line ended before byte {total}")
        hub = (response.history or [response])[0].headers  # a store behind it means something else by an ETag
    digest = re.search("[0-9a-f]{64}", hub.get("X-Linked-Etag") or hub.get("ETag") or "")
    return {"commit": hub.get("X-Repo-Commit"), "sha256": digest and digest[0]}


# ------------------------------------------------------------------------------------- text decoders

ROBERTA = Layout("RoBERTa", "", "roberta.encoder.layer.#", {
    "words": "roberta.embeddings.word_embeddings", "places": "roberta.embeddings.position_embeddings",
    "kind": "roberta.embeddings.token_type_embeddings", "norm": "roberta.embeddings.LayerNorm",
    "self_attn.in_proj": ".attention.self.query .attention.self.key .attention.self.value",
    "self_attn.out_proj": ".attention.output.dense", "norm1": ".attention.output.LayerNorm",
    "linear1": ".intermediate.dense", "linear2": ".output.dense", "norm3": ".output.LayerNorm",
    "head.0": "lm_head.dense", "head.2": "lm_head.layer_norm", "bias": "lm_head.bias"}, {}, "roberta")


def read_decoder(name: str) -> tuple[Weights, dict]:
    """Read RoBERTa from the hub or a folder: weights by our names, and fields of prism.PrismerConfig.

    Of a released Prismer, what it has of RoBERTa: the rest belongs to its trunk. Raises ValueError, OSError.
    """
    source = f"FacebookAI/{name}" if name in ("roberta-base", "roberta-large") else name
    check_source(source)
    if not Path(source).exists():
        source = str(fetch_repo(source, more=("vocab.json", "merges.txt")))
    weights = read_source(source)
    file, hints, _, path = weights
    tokenizer, released = data.read_tokenizer(path.parent), any(k.startswith("text_decoder.") for k in file)
    layout = ROBERTA._replace(block=f"{ROBERTA.block}.0") if released else ROBERTA
    state, odd = rename(file, layout, "text_decoder." * released)
    state = {key.replace("in_proj.", "in_proj_"): value for key, value in state.items()}
    state |= {key: file[key] for key in odd if not released}
    if len(state.get("words.weight", ())) != len(tokenizer.words) or "places.weight" not in state:
        raise ValueError(f"{path} is no RoBERTa of the {len(tokenizer.words)} words in vocab.json; name one "
                         "that is")
    positions, dim = state["places.weight"].shape
    return weights._replace(tensors=state), {
        "words": tokenizer.words, "merges": tokenizer.merges, "dim": dim, "positions": positions,
        "heads": hints.get("heads", dim // 64), "depth": sum(key.endswith("norm3.bias") for key in state)}


# ---------------------------------------------------------------------------------------------- toys


class Scenes(NamedTuple):
    """What the toys are trained on: scenes of the rendered world, all of them or a batch."""

    images: Tensor  # (B, 3, S, S) uint8 RGB
    labelmaps: Tensor  # (B, S, S) uint8 instance ids: wall 1, floor 2, things above
    phrases: Tensor  # (B, P) bool: the caption has phrase p, such as "red ball"
    places: Tensor  # (B, R, 2) int64: the first phrase is left of the second, -1 = no more of them
    words: Tensor  # (P, V) bool: phrase p has word v; the same for every scene

    def batch(self, rows: Tensor, mirror: bool, device: str | torch.device) -> "Scenes":
        """Take some scenes, mirrored if wanted: left becomes right in the captions, too."""
        flip = (lambda x: x.flip(-1)) if mirror else (lambda x: x)
        columns = (flip(self.images[rows]), flip(self.labelmaps[rows]), self.phrases[rows],
                   flip(self.places[rows]), self.words)
        return Scenes(*(x.to(device) for x in columns))


def read_scenes(root: Path) -> Scenes:
    """Read the world's train split."""
    world = data.World(root, "train", cache=False)
    samples = [world.read(i, labels=False) for i in range(len(world))]  # with all labels: four times as long
    images = torch.from_numpy(np.stack([sample["image"] for sample in samples]))  # (B, S, S, 3)
    paths = [world.paths(name)["labelmap"] for name in world.ids]
    labelmaps = np.stack([data.load_array(path) for path in paths])
    return Scenes(images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labelmaps),
                  *caption_tables([sample["caption"] for sample in samples]))


def caption_tables(captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return phrases (B, P) bool, places (B, R, 2) int64 and words (P, V) bool of B captions.

    "a room with 1 ball, 1 box: a red ball, a blue box; the red ball is left of the blue box" has the
    phrases "red ball" and "blue box", and the one place ("red ball", "blue box").
    """
    parsed = []
    for caption in captions:
        listed, *places = caption.partition(": ")[2].split("; ")
        pairs = []
        for place in places:
            one, side, other = re.fullmatch("the (.*) is (left|right) of the (.*)", place).groups()
            pairs.append((one, other) if side == "left" else (other, one))
        parsed.append(([thing.split(" ", 1)[1] for thing in listed.split(", ") if thing], pairs))
    phrases = sorted({phrase for found, _ in parsed for phrase in found})
    words = sorted({word for phrase in phrases for word in phrase.split()} - {"a", "in", "pot"})
    has = torch.tensor([[phrase in found for phrase in phrases] for found, _ in parsed])
    places = torch.full((len(captions), max(len(pairs) for _, pairs in parsed), 2), -1)
    for b, (_, pairs) in enumerate(parsed):
        for r, pair in enumerate(pairs):
            places[b, r] = torch.tensor([phrases.index(phrase) for phrase in pair])
    return has, places, torch.tensor([[word in phrase.split() for word in words] for phrase in phrases])


# Objectives: each maps (encoder, pixels (B, 3, H, W) normalised, their scenes) to a loss.


class Contrast(nn.Module):
    """toy-clip: tell which phrases go with which images, and left from right.

    A patch's score for a phrase is the sum of its scores for the phrase's words. An image's score is the
    log-mean-exp over its patches, so that the evidence stays in its place. Place is what teaches the
    patches most: without it the probes gain little over an untrained encoder (measured).
    """

    SHARPNESS, WEIGHT = 2.0, 3.0  # of the place term; sharpness 6 costs 2 points of semseg (measured)

    def __init__(self, cfg: EncoderConfig, scenes: Scenes):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim)
        self.score = nn.Linear(cfg.dim, scenes.words.shape[1], bias=False)

    def forward(self, encoder: Encoder, pixels: Tensor, scenes: Scenes) -> Tensor:
        words = self.score(self.norm(encoder.run(encoder.embed(pixels))[-1]))  # (B, N, V)
        scores = words @ scenes.words.T.to(words.dtype)  # (B, N, P)
        image_scores = scores.logsumexp(1) - math.log(scores.shape[1])  # (B, P)
        to_text, to_image = (contrast_loss(image_scores, scenes.phrases, dim) for dim in (1, 0))
        columns = pixels.shape[-1] // encoder.cfg.patch
        x = torch.linspace(-1, 1, columns, device=pixels.device).repeat(scores.shape[1] // columns)  # (N,)
        return to_text + to_image + self.WEIGHT * place_loss(scores, x, scenes.places, self.SHARPNESS)


def contrast_loss(scores: Tensor, true: Tensor, dim: int) -> Tensor:
    """Contrast each true pair of scores (B, P) with all false ones along dim: 1 phrases, 0 images."""
    false = scores.masked_fill(true, -math.inf).logsumexp(dim, keepdim=True)
    return F.softplus(false - scores)[true].mean()


def place_loss(scores: Tensor, x: Tensor, places: Tensor, sharpness: float) -> Tensor:
    """Contrast "a is left of b" with its opposite, by where each phrase finds its evidence.

    scores (B, N, P); x (N,) the patches' places, -1 left to 1 right; places (B, R, 2).
    """
    index = places.clamp(min=0).flatten(1).unsqueeze(1).expand(-1, len(x), -1)  # (B, N, 2R)
    found_at = (scores.gather(2, index).softmax(1) * x[:, None]).sum(1).view(places.shape)  # (B, R, 2)
    known = places[..., 0] >= 0
    losses = F.softplus(sharpness * (found_at[..., 0] - found_at[..., 1])) * known
    return losses.sum() / known.sum().clamp(min=1)


class Masked(nn.Module):
    """toy-dino: hide patches, encode the others, predict the pixels of the hidden ones.

    A small decoder gets mask tokens where patches are hidden, the encoder never does: half the time per
    step, and normals from 28 to 24 degrees (measured).
    """

    HIDDEN = 0.75  # share of the patches

    def __init__(self, cfg: EncoderConfig, scenes: Scenes):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim)
        self.hand_over = nn.Linear(cfg.dim, cfg.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, cfg.grid[0] * cfg.grid[1], cfg.dim))
        self.decoder = nn.Sequential(prism.Block(cfg.dim, cfg.heads, cfg.hidden),
                                     nn.Linear(cfg.dim, 3 * cfg.patch**2))

    def forward(self, encoder: Encoder, pixels: Tensor, scenes: Scenes) -> Tensor:
        x, patch = encoder.embed(pixels), encoder.cfg.patch  # (B, N, D)
        target = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
        B, N, D = x.shape
        order = torch.rand(B, N, device=x.device).argsort(1).unsqueeze(-1)  # (B, N, 1)
        seen, hidden = order.split([N - int(N * self.HIDDEN), int(N * self.HIDDEN)], 1)
        x = self.hand_over(self.norm(encoder.run(x.gather(1, seen.expand(-1, -1, D)))[-1]))
        x = self.mask_token.expand(B, N, D).scatter(1, seen.expand(-1, -1, D), x) + self.pos_embed
        hidden = hidden.expand(-1, -1, target.shape[-1])
        return F.mse_loss(self.decoder(x).gather(1, hidden), target.gather(1, hidden))


class Segment(nn.Module):
    """toy-sam: point at a thing, get its mask; no classes.

    Each patch becomes CELLS x CELLS keys, the key at the point a query, and query times keys the mask.
    Points fall on things alone: with walls and floors it knew rooms better than an early toy-dino.
    """

    CELLS, POINTS, CHANNELS = 4, 8, 24  # per patch side, per image, of keys and queries

    def __init__(self, cfg: EncoderConfig, scenes: Scenes):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim)
        self.keys = nn.Linear(cfg.dim, self.CHANNELS * self.CELLS**2)
        self.query = nn.Linear(self.CHANNELS, self.CHANNELS + 1)

    def forward(self, encoder: Encoder, pixels: Tensor, scenes: Scenes) -> Tensor:
        h, stride = pixels.shape[-2] // encoder.cfg.patch, encoder.cfg.patch // self.CELLS
        keys = self.keys(self.norm(encoder.run(encoder.embed(pixels))[-1]))
        keys = rearrange(keys, "b (h w) (p q c) -> b (h p w q) c", h=h, p=self.CELLS, q=self.CELLS)
        labels = scenes.labelmaps[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1).long()  # (B, M)
        chance = (labels > 2) + 1e-6  # an empty room still needs points
        points = chance.multinomial(self.POINTS, replacement=True)  # (B, points)
        at_point = keys.gather(1, points.unsqueeze(-1).expand(-1, -1, self.CHANNELS))  # (B, points, c)
        query, bias = self.query(at_point).split([self.CHANNELS, 1], -1)
        logits = query @ keys.transpose(1, 2) * self.CHANNELS**-0.5 + bias  # (B, points, M)
        return mask_loss(logits, labels.unsqueeze(1) == labels.gather(1, points).unsqueeze(-1))


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus dice of logits (B, points, M) against masks bool (SAM: focal plus dice)."""
    p, y = logits.sigmoid(), masks.to(logits.dtype)
    dice = 1 - (2 * (p * y).sum(-1) + 1) / (p.sum(-1) + y.sum(-1) + 1)  # (B, points)
    return F.binary_cross_entropy_with_logits(logits, y) + dice.mean()


class Muon(torch.optim.SGD):
    """Nesterov momentum whose steps are made orthogonal (Jordan et al. 2024), for matrices.

    In float32: torch's own computes in bfloat16, which a CPU takes ten times as long for (measured).
    """

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for p in group["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad, 0.05)
            x = p.grad.lerp(mean, 0.95)
            x, tall = x / x.norm(), x.shape[0] > x.shape[1]
            x = x.T if tall else x
            for _ in range(5):  # Newton-Schulz: singular values go to about 1
                a = x @ x.T
                x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(x.T if tall else x, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class Toy(NamedTuple):
    """How a toy is trained. At equal steps Muon was worth 1 to 2 points of semseg to toy-clip and toy-sam."""

    objective: type[nn.Module]
    encoder: EncoderConfig
    steps: int  # optimizer updates
    batch_size: int
    matrix_lr: float  # peak for the blocks' matrices (Muon)
    lr: float = 2e-3  # peak for all else (AdamW)
    seed: int = 0


TOYS = {
    "toy-clip": Toy(Contrast, EncoderConfig(), 750, 32, 0.01),
    "toy-dino": Toy(Masked, EncoderConfig(), 800, 64, 0.01),
    "toy-sam": Toy(Segment, EncoderConfig(dim=64, heads=2, hidden=128), 650, 32, 0.02),
}


def train_toy(name: str, toy: Toy, scenes: Scenes, device: str | torch.device = "cpu") -> Encoder:
    """Train an encoder from nothing by a toy's objective. Same settings, same machine: same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(toy.seed)
        encoder = Encoder(toy.encoder).to(device)
        objective = toy.objective(toy.encoder, scenes).to(device)
        matrices = {p for p in encoder.blocks.parameters() if p.ndim == 2}
        weights = [*encoder.parameters(), *objective.parameters()]
        muon, adam = ([p for p in weights if (p in matrices) == flag] for flag in (True, False))
        optimizers = {Muon(muon, weight_decay=0.05): toy.matrix_lr,
                      torch.optim.AdamW(adam, weight_decay=0.05, fused=True): toy.lr}
        order = torch.empty(0, dtype=torch.int64)
        for step in data.track(range(toy.steps), f"training {name}", toy.steps):
            while len(order) < toy.batch_size:
                order = torch.cat([order, torch.randperm(len(scenes.images))])
            rows, order = order[: toy.batch_size], order[toy.batch_size :]
            batch = scenes.batch(rows, step % 2 == 1, device)
            loss = objective(encoder, encoder.normalise(batch.images.float() / 255), batch)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            done = step / toy.steps  # warm-up over 15 %, then cosine
            share = min(done / 0.15, 0.5 + 0.5 * math.cos(math.pi * max(0, done - 0.15) / 0.85))
            for optimizer, peak in optimizers.items():
                optimizer.param_groups[0]["lr"] = peak * share
                optimizer.step()
                optimizer.zero_grad()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{name} ended with loss {loss.item()}; lower its lr in TOYS")
    return encoder


def toy_path(name: str) -> Path:
    """Return where the cache keeps a toy; its name hashes the settings, the world and the code above."""
    code = Path(__file__).read_text().partition("- toys\n")[2].partition("def toy_path")[0]
    parts = [Encoder, EncoderBlock, prism.Attention, prism.MLP, prism.Block]
    world = data.world_key(data.WorldSettings())
    text = repr((name, TOYS[name], world, *map(data.code_alone, (code, *map(inspect.getsource, parts)))))
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    return data.cache_folder() / f"{name}-{key}.safetensors"


def train_missing_toys(names: Sequence[str], device: str | torch.device) -> None:
    """Train the toys that the cache lacks: on the GPU one by one, else a process and a core for each.

    One thread each: two processes take 0.6 of the time of one with two threads.
    """
    jobs = [(name, str(device)) for name in names if not toy_path(name).exists()]
    if jobs:
        data.render_world()  # once, not in each process
        print(f"training {', '.join(name for name, _ in jobs)}", flush=True)
        workers = max(2, len(jobs)) if torch.device(device).type == "cpu" else 1
        list(data.on_all_cores(train_into_cache, jobs, workers=workers))


def train_into_cache(job: tuple[str, str]) -> None:
    """Train a toy on a device and write it to the cache, whole or not at all."""
    name, device = job
    encoder = train_toy(name, TOYS[name], read_scenes(data.render_world()), device)
    state = {k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}
    prism.write_file(toy_path(name), lambda file: save_file(state, file))


# ------------------------------------------------------------------------------------------ teachers


class Teacher(nn.Module):
    """A frozen encoder with its own input size and normalisation.

    size: input pixels of the longest side for SAM (default: what it was trained at; less is an
    approximation), else of the shorter side (default: the image's own). Raises ValueError.
    """

    def __init__(self, encoder: Encoder, size: int | None, provenance: dict):
        super().__init__()
        cfg, patch = encoder.cfg, encoder.cfg.patch
        self.pads = cfg.window > 0  # SAM: the image lies in the upper left of a square
        native = max(cfg.grid) * patch if self.pads else None
        if size is not None and (size <= 0 or size % patch):
            low = max(size // patch, 1) * patch
            raise ValueError(f"teacher size {size} is not a multiple of its patch {patch}; "
                             f"use {low} or {low + patch}")
        self.encoder, self.size, self.width = encoder, size or native, cfg.dim
        self.provenance = {**provenance, "mean": list(cfg.mean), "std": list(cfg.std),
                           "size": self.size or "the image's own"}
        if self.pads and self.size != native:
            self.provenance["approximation"] = f"longest side {size} px instead of {native}"
        self.levels = [(k + 1) * cfg.depth // 4 - 1 for k in range(4)]  # blocks, evenly spaced
        self.eval().requires_grad_(False)

    def resized(self, H: int, W: int) -> tuple[int, int]:
        """Return height and width in pixels to which an image of H x W is resized."""
        patch = self.encoder.cfg.patch
        if self.pads:
            return tuple(max(1, int(side * self.size / max(H, W) + 0.5)) for side in (H, W))
        scale = self.size / min(H, W) if self.size else 1
        return tuple(patch * max(1, round(side * scale / patch)) for side in (H, W))

    def grid(self, H: int, W: int) -> tuple[int, int]:
        """Return rows and columns of the features of an image of H x W pixels."""
        return tuple(max(1, round(side / self.encoder.cfg.patch)) for side in self.resized(H, W))

    def prepare(self, images: Tensor) -> Tensor:
        """Resize RGB in [0, 1] (B, 3, H, W) by the teacher's rule, normalise, then pad (SAM)."""
        size = self.resized(*images.shape[-2:])
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        pixels = self.encoder.normalise(images)
        return F.pad(pixels, (0, self.size - size[1], 0, self.size - size[0])) if self.pads else pixels

    @torch.no_grad()
    def blocks(self, pixels: Tensor) -> list[Tensor]:
        """Return the raw outputs of all blocks (B, C, h, w) for pixels that are normalised and sized."""
        return self.encoder(pixels)

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Return 4 levels (B, C, h, w) of images (B, 3, H, W), RGB in [0, 1], of any size.

        What lies over SAM's padding is cut off, to the nearest whole patch.
        """
        rows, columns = self.grid(*images.shape[-2:])
        return [m[..., :rows, :columns] for m in self.encoder(self.prepare(images), self.levels)]


def load_teacher(source: str, size: int | None = None, device: str | torch.device = "cpu",
                 sha256: str | None = None) -> Teacher:
    """Load a frozen teacher; what is not in the cache is fetched, a toy is trained (half a minute).

    source: a short name (`python teachers.py` lists them), a hub repo id, a folder with config.json and
    weights, or a weights file. size: see Teacher (toys: 64). sha256: what the weights file must have.
    Raises ValueError or OSError.
    """
    if source in TOYS:
        train_missing_toys([source], device)
        encoder, path = Encoder(TOYS[source].encoder), toy_path(source)
        encoder.load_state_dict(read_tensors(path))
        provenance = {"kind": "toy", "source": source, "objective": TOYS[source].objective.__name__,
                      "settings": path.stem.rpartition("-")[2], "licence": "MIT"}
        size = size or encoder.cfg.grid[0] * encoder.cfg.patch
    else:
        weights = read_source(source, sha256)
        encoder, family = read_encoder(weights)
        provenance = {"kind": family, **weights.provenance}
    return Teacher(encoder, size, provenance).to(device)


def name_sources(teachers: Sequence[str]) -> dict[str, str]:
    """Split name=source; without a name, it is made of the source's last part. Raises ValueError."""
    sources = {}
    for teacher in teachers:
        name, equals, source = teacher.rpartition("=")
        sources[name if equals else re.sub(r"[^\w-]+", "-", Path(source).name)] = source
        check_source(source)
    if len(sources) < len(teachers) or not sources:
        raise ValueError(f"teachers {' '.join(teachers) or '(none)'}; name each once, at least one "
                         "(two that share a name: other=SOURCE)")
    return sources


class Teachers:
    """All teachers of a run; each sees only its own images of a batch.

    names: sources as for load_teacher, or name=source. sam_size: longest side in pixels that SAM gets.
    """

    def __init__(self, names: Sequence[str], device: str | torch.device = "cpu", compile: bool = False,
                 sam_size: int | None = None):
        sources = name_sources(names)
        train_missing_toys([source for source in sources.values() if source in TOYS], device)
        self.members = {name: load_teacher(source, device=device) for name, source in sources.items()}
        for name, teacher in self.members.items():
            if sam_size is not None and teacher.pads:
                self.members[name] = Teacher(teacher.encoder, sam_size, teacher.provenance).to(device)
        self.widths = {name: teacher.width for name, teacher in self.members.items()}
        self.provenance = {name: teacher.provenance for name, teacher in self.members.items()}
        for teacher in self.members.values() if compile else ():
            teacher.encoder.compile(dynamic=True)  # the number of images varies from step to step

    @torch.no_grad()
    def targets(self, images: Tensor, teacher_ids: Tensor) -> dict[str, list[Tensor]]:
        """Return {name: 4 x (B_t, C, h, w)}, rows of the images of that teacher in batch order.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids (B,) int64 into the names, on the host. A teacher
        without an image gives empty maps and does not run.
        """
        targets = {}
        for i, (name, teacher) in enumerate(self.members.items()):
            rows = torch.where(teacher_ids == i)[0].to(images.device, non_blocking=True)
            if len(rows):
                targets[name] = teacher.features(images[rows])
            else:
                grid = teacher.grid(*images.shape[-2:])
                targets[name] = [images.new_zeros(0, teacher.width, *grid) for _ in teacher.levels]
        return targets


def describe(provenance: dict) -> str:
    """Say in one line where a teacher is from and what it is given."""
    keys = ("kind", "source", "objective", "commit", "sha256", "settings", "licence", "approximation", "size")
    return ", ".join(f"{k} {str(provenance[k])[:12] if k in ('commit', 'sha256') else provenance[k]}"
                     for k in keys if provenance.get(k) is not None)


# --------------------------------------------------------------------------- pictures, command line


def pca_picture(level: Tensor, base: Tensor | None = None) -> tuple[np.ndarray, float]:
    """Show a map (C, h, w) by its three strongest directions of change as red, green and blue.

    base (C, h', w'): take directions and colours from this map, so that both can be compared. Returns
    uint8 (h, w, 3), each colour stretched from the 2nd to the 98th percentile, and the share of the
    base's variance that the three hold. Signs are fixed: the largest weight of a direction is positive.
    """
    x, of = (m.flatten(1).T.double() for m in (level, level if base is None else base))  # (h * w, C)
    mean = of.mean(0)
    _, strength, directions = torch.linalg.svd(of - mean, full_matrices=False)  # (r,), (r, C)
    directions = F.pad(directions, (0, 0, 0, max(0, 3 - len(directions))))[:3]
    largest = directions.abs().argmax(1, keepdim=True)
    y, of = ((m - mean) @ (directions * directions.gather(1, largest).sign()).T for m in (x, of))
    low, high = (torch.quantile(of, share, dim=0) for share in (0.02, 0.98))
    y = ((y - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)  # (h * w, 3)
    share = strength[:3].square().sum() / strength.square().sum().clamp(min=1e-30)
    return (255 * y).round().byte().view(*level.shape[1:], 3).numpy(), share.item()


def draw_features(photo: np.ndarray, members: dict[str, Teacher]) -> Image.Image:
    """Draw a row per teacher: the photo, then its four levels, see `pca_picture`."""
    image, rows = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255, []
    for name, teacher in members.items():
        levels = teacher.features(image.to(teacher.encoder.mean.device))
        pictures, shares = zip(*(pca_picture(level[0].float().cpu()) for level in levels), strict=True)
        (h, w), held = levels[0].shape[-2:], ", ".join(f"{100 * share:.0f}" for share in shares)
        text = (f"{name}: {h} x {w} patches of {teacher.width} channels; red, green and blue are the three "
                f"main components and hold {held} % of the variance")
        rows.append((text, [photo, *pictures]))
    return data.sheet(["photo", *(f"level {k + 1} of 4" for k in range(4))], rows, 256)


def list_teachers() -> None:
    """Print names, sources, sizes, licences, and what the cache holds."""
    rows = {}
    for name, s in SOURCES.items():
        cached = any((repo_folder(s.repo) / file).exists() for file in WEIGHTS)
        rows[name] = {"weights": s.repo, "width x depth": f"{s.width} x {s.depth}", "patch": s.patch,
                      "pixels": s.pixels, "licence": s.licence, "cached": "yes" if cached else ""}
    prism.show("name", rows)
    print(f"{', '.join(TOYS)}: trained here, on the rendered world\ncache: {data.cache_folder()}\n"
          f"A hub repo, folder or file of your own works, too; {KNOWN}")


@dataclass
class Args:
    """List the teachers; or fetch some and show what they see in a photo."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()  # short names, hub repos, folders or weights files
    image: Path | None = None  # photo whose levels are drawn into OUT_DIR/features.png
    size: int | None = None  # input pixels: longest side for SAM, else the shorter one
    sha256: str | None = None  # what the weights file of the one teacher named must have
    out_dir: Path = Path("out")  # for the picture
    device: str | None = None  # default: cuda if there is one, else cpu
    debug: bool = False  # full traceback on errors


def main(args: Args) -> None:
    """Do what the arguments ask for, the list if nothing."""
    if not args.names:
        return list_teachers()
    device, members = prism.choose_device(args.device), {}
    photo = data.read_photo(args.image) if args.image else None
    for name, source in name_sources(args.names).items():
        members[name] = load_teacher(source, args.size, device, args.sha256)
        print(f"{name}: {describe(members[name].provenance)}", flush=True)
    if photo is not None:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        draw_features(photo, members).save(args.out_dir / "features.png")
        print(f"{args.out_dir / 'features.png'}: {args.image}, {len(members)} teachers")


if __name__ == "__main__":
    args = tyro.cli(Args)
    data.exit_with_one_line(lambda: main(args), args.debug)
