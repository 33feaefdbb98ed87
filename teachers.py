"""Teachers: frozen networks that the student learns to imitate.

    python teachers.py                                      # names, sources, licences, what is cached
    python teachers.py dinov2-b sam-b --image photo.jpg     # fetches both, draws what they see
    python teachers.py --probe                              # what linear probes read off the toys

| names                     | patch, pixels | mean / std      | what their files add to a plain ViT         |
|---------------------------|---------------|-----------------|---------------------------------------------|
| dinov2-{s,b,l,g}          | 14, 518       | ImageNet        | LayerScale; giant: SwiGLU                   |
| dinov2-reg-{s,b,l,g}      | 14, 518       | ImageNet        | and 4 registers                             |
| dinov3-{s,b,l}            | 16, 256       | ImageNet        | LayerScale, 4 registers, RoPE, no key bias  |
| clip-{b,l,l-336}          | 16/14, 224-336| OpenAI          | LayerNorm before the blocks, QuickGELU      |
| clip-laion-{b,l}          | 16/14, 336-384| OpenAI, B; .5, L| the same with GELU, fine-tuned on ImageNet  |
| siglip2-{b,l,so400m}      | 16, 384       | .5 / .5         | tanh GELU, no class token                   |
| sam-{b,l,h}               | 16, 1024      | ImageNet        | windows, relative positions, no class token |
| augreg-{s,b,l}            | 16, 384       | .5 / .5         | nothing: where students start (--init)      |
| toy-clip, -dino, -sam     | 8, 64         | .5 / .25        | nothing: raised here, on the rendered world |

A teacher's four levels are the outputs of its blocks at a quarter, half, three quarters and all of the
depth: patch tokens only, before any final norm. Images of any size: both sides are rounded to whole
patches by resizing, never by cutting (toys: the shorter side becomes 64). SAM gets the longest side at
1024 and padding at the bottom and right, which is cut off the map again.
"""

import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import queue
import re
import shutil
import sys
import time
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
import requests
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import data
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
        bias = None if self.rel_h is None else self.relative_bias(q, grid)
        x = F.scaled_dot_product_attention(q, k, v, bias)  # (B, heads, N, D / heads)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def relative_bias(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Score each key's row and column offset from the query (SAM); returns (B, heads, N, N)."""
        q = rearrange(q, "b n (h w) d -> b n h w d", h=grid[0])
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, relative_table(self.rel_h, grid[0]).to(q.dtype))
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, relative_table(self.rel_w, grid[1]).to(q.dtype))
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(4).flatten(2, 3)

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
    unused: str  # regex of their keys that no level needs
    flags: dict  # of EncoderConfig, where config.json does not say otherwise
    prefix: str = ""  # may stand before every name; keys without it then belong to other networks
    zeros: str = "$^"  # regex of biases that the family does not have


VIT = {"cls": "cls_token", "pos": "pos_embed", "patch_embed": "patch_embed.proj",
       "norm1": ".norm1", "qkv": ".attn.qkv", "proj": ".attn.proj",
       "norm2": ".norm2", "fc1": ".mlp.fc1", "fc2": ".mlp.fc2"}
VIT_DINO = VIT | {"scale1": ".ls1.gamma", "scale2": ".ls2.gamma", "registers": "register_tokens"}
DINOV2 = {"cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings",
          "registers": "embeddings.register_tokens",
          "patch_embed": "embeddings.patch_embeddings.projection",
          "norm1": ".norm1", "scale1": ".layer_scale1.lambda1",
          "qkv": ".attention.attention.query .attention.attention.key .attention.attention.value",
          "proj": ".attention.output.dense",
          "norm2": ".norm2", "scale2": ".layer_scale2.lambda1", "fc1": ".mlp.fc1", "fc2": ".mlp.fc2"}
SIGLIP = {"pos": "embeddings.position_embedding.weight", "patch_embed": "embeddings.patch_embedding",
          "norm1": ".layer_norm1", "qkv": ".self_attn.q_proj .self_attn.k_proj .self_attn.v_proj",
          "proj": ".self_attn.out_proj", "norm2": ".layer_norm2", "fc1": ".mlp.fc1", "fc2": ".mlp.fc2"}
CLIP_FLAGS = {"eps": 1e-5, "activation": "quick_gelu", "pre_norm": True, "patch_bias": False, **OPENAI}
DINO_FLAGS = {"layer_scale": True, **IMAGENET}
TEXT = r"|(text_model|text_projection|visual_projection)\.|logit_scale$|logit_bias$|.*\.position_ids$"

LAYOUTS = [
    Layout("DINOv3", "layer.0.attention.q_proj.weight", "layer.#", {
        "cls": "embeddings.cls_token", "registers": "embeddings.register_tokens",
        "patch_embed": "embeddings.patch_embeddings", "norm1": ".norm1",
        "scale1": ".layer_scale1.lambda1",
        "qkv": ".attention.q_proj .attention.k_proj .attention.v_proj", "proj": ".attention.o_proj",
        "norm2": ".norm2", "scale2": ".layer_scale2.lambda1",
        "fc1": ".mlp.up_proj", "fc2": ".mlp.down_proj"},
        unused=r"norm\.|embeddings\.mask_token", flags=DINO_FLAGS | {"eps": 1e-5, "rope": 100.0},
        zeros=r".*k_proj\.bias"),
    Layout("DINOv2 giant", "encoder.layer.0.mlp.weights_in.weight", "encoder.layer.#",
           DINOV2 | {"fc1": ".mlp.weights_in", "fc2": ".mlp.weights_out"},
           r"layernorm\.|embeddings\.mask_token", DINO_FLAGS),
    Layout("DINOv2", "encoder.layer.0.layer_scale1.lambda1", "encoder.layer.#", DINOV2,
           r"layernorm\.|embeddings\.mask_token", DINO_FLAGS),
    Layout("CLIP", "pre_layrnorm.weight", "encoder.layers.#",  # the typo is theirs
           SIGLIP | {"cls": "embeddings.class_embedding", "pre_norm": "pre_layrnorm"},
           r"(vision_model\.)?post_layernorm\." + TEXT, CLIP_FLAGS, "vision_model."),
    Layout("SigLIP", "embeddings.patch_embedding.bias", "encoder.layers.#", SIGLIP,
           r"(vision_model\.)?(post_layernorm|head)\." + TEXT,
           {"activation": "gelu_tanh", **HALF}, "vision_model."),
    Layout("CLIP (open_clip)", "visual.ln_pre.weight", "visual.transformer.resblocks.#", {
        "cls": "visual.class_embedding", "pos": "visual.positional_embedding",
        "patch_embed": "visual.conv1", "pre_norm": "visual.ln_pre", "norm1": ".ln_1",
        "qkv": ".attn.in_proj_", "proj": ".attn.out_proj",
        "norm2": ".ln_2", "fc1": ".mlp.c_fc", "fc2": ".mlp.c_proj"},
        r"visual\.(ln_post\.|proj$)|(transformer|token_embedding|ln_final)\.|positional_embedding$|"
        r"text_projection$|logit_scale$|(input_resolution|context_length|vocab_size)$", CLIP_FLAGS),
    Layout("SAM", "layers.0.attn.rel_pos_h", "layers.#", {
        "pos": "pos_embed", "patch_embed": "patch_embed.projection", "norm1": ".layer_norm1",
        "qkv": ".attn.qkv", "proj": ".attn.proj", "rel_h": ".attn.rel_pos_h", "rel_w": ".attn.rel_pos_w",
        "norm2": ".layer_norm2", "fc1": ".mlp.lin1", "fc2": ".mlp.lin2"},
        r"(vision_encoder\.)?neck\.|(prompt_encoder|mask_decoder|shared_image_embedding)\.",
        IMAGENET, "vision_encoder."),
    Layout("SAM (original)", "blocks.0.attn.rel_pos_h", "blocks.#",
           {k: v for k, v in VIT.items() if k != "cls"} | {
               "rel_h": ".attn.rel_pos_h", "rel_w": ".attn.rel_pos_w",
               "fc1": ".mlp.lin1", "fc2": ".mlp.lin2"},
           r"(image_encoder\.)?neck\.|(prompt_encoder|mask_decoder)\.", IMAGENET, "image_encoder."),
    Layout("CLIP (timm)", "norm_pre.weight", "blocks.#", VIT | {"pre_norm": "norm_pre"},
           r"(norm|fc_norm|head)\.", CLIP_FLAGS | {"activation": "gelu"}),
    Layout("DINOv2 giant (original)", "blocks.0.mlp.w12.weight", "blocks.#",
           VIT_DINO | {"fc1": ".mlp.w12", "fc2": ".mlp.w3"}, r"(norm|head)\.|mask_token$", DINO_FLAGS),
    Layout("DINOv2 with registers (timm)", "reg_token", "blocks.#",
           VIT_DINO | {"registers": "reg_token"}, r"(norm|head)\.|mask_token$", DINO_FLAGS),
    Layout("DINOv2 (original, timm)", "blocks.0.ls1.gamma", "blocks.#", VIT_DINO,
           r"(norm|head)\.|mask_token$", DINO_FLAGS),
    Layout("ViT (timm)", "blocks.0.attn.qkv.weight", "blocks.#", VIT, r"(norm|head)\.", HALF),
]
HEADS = {1152: 16, 1280: 0, 1408: 0, 1664: 0}  # by width, where it is not / 64; 0: families differ


class Weights(NamedTuple):
    """A weights file with what lies beside it."""

    tensors: dict[str, Tensor]
    hints: dict  # what config.json and its like tell, in EncoderConfig's terms
    provenance: dict  # where the file is from: plain values for checkpoints
    path: Path


class WeightsFile:
    """Read a weights file by our names; remember which keys were asked for and which were missing."""

    def __init__(self, weights: Weights):
        self.file, self.path = weights.tensors, weights.path
        self.layout = find_layout(self.file, self.path)
        self.prefix = "" if self.layout.mark in self.file else self.layout.prefix
        self.used: set[str] = set()
        self.missing: dict[str, None] = {}  # an ordered set

    def keys(self, ours: str) -> list[str]:
        """Translate our key, such as blocks.3.qkv.weight, to the keys that are stacked to make it."""
        path, dot, leaf = ours.rpartition(".") if ours.endswith((".weight", ".bias")) else (ours, "", "")
        block, _, name = path.rpartition(".")  # blocks.3, qkv
        block = self.layout.block.replace("#", block.removeprefix("blocks."))
        theirs = [block + n if n.startswith(".") else n for n in self.layout.names.get(name, "").split()]
        return [self.prefix + n + ("" if n.endswith("_") else dot) + leaf for n in theirs]

    def get(self, ours: str, needed: bool = True) -> Tensor | None:
        """Read a weight in float32; None if the file or the whole family lacks it."""
        keys = self.keys(ours)
        there = [k for k in keys if k in self.file]
        absent = [k for k in keys if k not in self.file and not re.match(self.layout.zeros, k)]
        self.used.update(there)
        if absent or not there:
            self.missing |= dict.fromkeys(absent if needed else ())
            return None
        zeros = torch.zeros_like(self.file[there[0]])
        stacked = torch.cat([self.file.get(k, zeros) for k in keys])
        weight = stacked.float()
        if not (stacked.is_floating_point() and weight.numel() and weight.sum().isfinite()):
            self.fail_on(f"{keys[0]} is {stacked.dtype} {tuple(stacked.shape)}, empty or not finite")
        return weight

    def depth(self) -> int:
        """Count the blocks."""
        pattern = re.escape(self.prefix + self.layout.block).replace(r"\#", r"(\d+)") + r"\."
        return len({m[1] for k in self.file if (m := re.match(pattern, k))})

    def unexpected(self) -> list[str]:
        """List what nobody asked for, beyond what the family's files hold for other ends."""
        return [k for k in self.file if k not in self.used and not re.match(self.layout.unused, k)]

    def fail_on(self, *problems: str, unexpected: Sequence[str] = ()) -> None:
        """Raise ValueError that names problems, missing and unexpected keys, if there are any."""
        problems = [*problems, *(
            f"{len(keys)} keys {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for what, keys in (("missing", list(self.missing)), ("unexpected", unexpected)) if keys)]
        if problems:
            raise ValueError(f"{self.path} looks like {self.layout.family} but does not fit: "
                             f"{'; '.join(problems)}; layouts known: {layouts_known()}")


def layouts_known() -> str:
    return ", ".join(layout.family for layout in LAYOUTS)


def find_layout(keys: Collection[str], path: Path) -> Layout:
    """Recognise a file by its keys. Raises ValueError with the layouts known."""
    for layout in LAYOUTS:
        if layout.mark in keys or layout.prefix + layout.mark in keys:
            return layout
    raise ValueError(f"{path} has weights of no known layout (first keys: {', '.join(list(keys)[:3])}); "
                     f"layouts known: {layouts_known()}")


def read_encoder(weights: Weights) -> tuple[Encoder, str]:
    """Make the encoder that a file describes and fill it strictly; returns it and its family.

    Sizes come from the shapes, the rest from config.json or the family. Raises ValueError.
    """
    file = WeightsFile(weights)
    try:
        return build_encoder(file, weights.hints), file.layout.family
    except (RuntimeError, TypeError, LookupError, ArithmeticError) as error:  # shapes of any other rank
        file.fail_on(f"its shapes do not go together ({prism.one_line(error)})")


def build_encoder(file: WeightsFile, hints: dict) -> Encoder:
    """Make and fill the encoder of a file with its hints. Raises ValueError, or what odd shapes raise."""
    flags = file.layout.flags | {k: v for k, v in hints.items() if k != "registers"}
    if "pre_norm" in flags and "activation" not in hints:
        warnings.warn(f"{file.path} has no config.json beside it that tells CLIP's activation: "
                      f"{flags['activation']} is assumed", stacklevel=4)
    cls, pos = file.get("cls"), file.get("pos")
    registers = file.get("registers", needed=hints.get("registers", "rope" in flags))
    patch, norm, fc1, fc2 = (file.get(f"{name}.weight") for name in (
        "patch_embed", "blocks.0.norm1", "blocks.0.fc1", "blocks.0.fc2"))
    file.fail_on()
    if patch.ndim != 4:
        file.fail_on(f"patches are embedded by a matrix {tuple(patch.shape)}, not by a convolution")
    prefix = [] if cls is None else [cls.reshape(1, 1, -1)]
    table = None
    if pos is not None:
        on_cls, table = split_positions(pos, file)
        prefix = [token + on_cls for token in prefix]
    prefix += [] if registers is None else [registers]
    if len(fc1) == 2 * fc2.shape[1]:
        flags["activation"] = "swiglu"
    dim, depth = len(norm), file.depth()
    offsets = [x for i in range(depth) if (x := file.get(f"blocks.{i}.rel_h")) is not None]
    if offsets:  # SAM: the blocks that see the whole image have relative positions for all of it
        sides = [(len(x) + 1) // 2 for x in offsets]
        flags |= {"window": min(sides), "global_blocks": tuple(
            i for i, side in enumerate(sides) if side == table.shape[2])}
    heads = flags.pop("heads", None) or (
        dim // offsets[0].shape[1] if offsets else HEADS.get(dim, 0 if dim % 64 else dim // 64))
    if not heads or dim % heads:
        file.fail_on(f"{heads or 'an unknown number of'} heads do not divide the width {dim}: a config.json "
                     "beside the file must give num_attention_heads")
    cfg = EncoderConfig(
        dim=dim, depth=depth, heads=heads, hidden=fc2.shape[1], patch=patch.shape[-1],
        grid=(0, 0) if table is None else tuple(table.shape[2:]),
        prefix=sum(token.shape[1] for token in prefix),
        antialias=registers is not None and table is not None, **flags)
    with torch.device("meta"):  # nothing is allocated before the shapes are compared
        expected = Encoder(cfg).state_dict()
    special = {"prefix": torch.cat(prefix, 1) if prefix else None, "pos_embed": table}
    state = {k: special[k] if k in special else file.get(k) for k in expected}
    wrong = [f"{' + '.join(file.keys(k)) or k} is {tuple(state[k].shape)} instead of {tuple(own.shape)}"
             for k, own in expected.items()
             if state[k] is not None and state[k].shape != own.shape]
    file.fail_on(*wrong[:4], unexpected=file.unexpected())
    encoder = Encoder(cfg)
    encoder.load_state_dict(state)
    return encoder


def split_positions(pos: Tensor, file: WeightsFile) -> tuple[Tensor | float, Tensor]:
    """Split a position table into the class token's (1, 1, D) or 0, and the patches' (1, D, h, w)."""
    if pos.ndim == 4:
        return 0.0, pos.permute(0, 3, 1, 2)
    pos = pos.reshape(-1, pos.shape[-1])  # (N, D)
    side = math.isqrt(len(pos))
    extra = len(pos) - side * side
    if extra > 1:
        file.fail_on(f"{file.keys('pos')[0]} has {len(pos)} rows, with or without a class token no square")
    table = rearrange(pos[extra:], "(h w) d -> 1 d h w", h=side)
    return (pos[None, :1] if extra else 0.0), table


# -------------------------------------------------------------------------------------------- sources


class Source(NamedTuple):
    """A teacher that has a short name."""

    repo: str  # on the Hugging Face hub
    licence: str
    width: int
    depth: int
    patch: int  # side in pixels
    pixels: int  # side of the images that it was trained on at last


SOURCES = {
    "dinov2-s": Source("facebook/dinov2-small", "Apache-2.0", 384, 12, 14, 518),
    "dinov2-b": Source("facebook/dinov2-base", "Apache-2.0", 768, 12, 14, 518),
    "dinov2-l": Source("facebook/dinov2-large", "Apache-2.0", 1024, 24, 14, 518),
    "dinov2-g": Source("facebook/dinov2-giant", "Apache-2.0", 1536, 40, 14, 518),
    "dinov2-reg-s": Source("facebook/dinov2-with-registers-small", "Apache-2.0", 384, 12, 14, 518),
    "dinov2-reg-b": Source("facebook/dinov2-with-registers-base", "Apache-2.0", 768, 12, 14, 518),
    "dinov2-reg-l": Source("facebook/dinov2-with-registers-large", "Apache-2.0", 1024, 24, 14, 518),
    "dinov2-reg-g": Source("facebook/dinov2-with-registers-giant", "Apache-2.0", 1536, 40, 14, 518),
    "clip-b": Source("openai/clip-vit-base-patch16", "MIT", 768, 12, 16, 224),
    "clip-l": Source("openai/clip-vit-large-patch14", "MIT", 1024, 24, 14, 224),
    "clip-l-336": Source("openai/clip-vit-large-patch14-336", "MIT", 1024, 24, 14, 336),
    "clip-laion-b": Source("timm/vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", "Apache-2.0",
                           768, 12, 16, 384),
    "clip-laion-l": Source("timm/vit_large_patch14_clip_336.laion2b_ft_in12k_in1k", "Apache-2.0",
                           1024, 24, 14, 336),
    "sam-b": Source("facebook/sam-vit-base", "Apache-2.0", 768, 12, 16, 1024),
    "sam-l": Source("facebook/sam-vit-large", "Apache-2.0", 1024, 24, 16, 1024),
    "sam-h": Source("facebook/sam-vit-huge", "Apache-2.0", 1280, 32, 16, 1024),
    "siglip2-b": Source("google/siglip2-base-patch16-384", "Apache-2.0", 768, 12, 16, 384),
    "siglip2-l": Source("google/siglip2-large-patch16-384", "Apache-2.0", 1024, 24, 16, 384),
    "siglip2-so400m": Source("google/siglip2-so400m-patch16-384", "Apache-2.0", 1152, 27, 16, 384),
    "dinov3-s": Source("facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3 (gated)", 384, 12, 16, 256),
    "dinov3-b": Source("facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3 (gated)", 768, 12, 16, 256),
    "dinov3-l": Source("facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 (gated)", 1024, 24, 16, 256),
    "augreg-s": Source("timm/vit_small_patch16_384.augreg_in21k_ft_in1k", "Apache-2.0", 384, 12, 16, 384),
    "augreg-b": Source("timm/vit_base_patch16_384.augreg_in21k_ft_in1k", "Apache-2.0", 768, 12, 16, 384),
    "augreg-l": Source("timm/vit_large_patch16_384.augreg_in21k_ft_in1k", "Apache-2.0", 1024, 24, 16, 384),
}


# What no short name tells: flags of a family, for encoders of its shape with random weights.
SHAPES = {
    "dinov2": {"prefix": 1, **DINO_FLAGS}, "dinov2-reg": {"prefix": 5, "antialias": True, **DINO_FLAGS},
    "clip": {"prefix": 1, **CLIP_FLAGS}, "sam": {"window": 14, **IMAGENET},
    "siglip2": {"activation": "gelu_tanh", **HALF}, "augreg": {"prefix": 1, **HALF},
    "dinov3": {"prefix": 5, "rope": 100.0, **DINO_FLAGS},
}


def random_encoder(name: str) -> Encoder:
    """Make an encoder of a named teacher's shape and cost, with random weights: nothing is fetched."""
    source = SOURCES[name]
    family = next(f for f in sorted(SHAPES, key=len, reverse=True) if name.startswith(f))
    flags, side = SHAPES[family], source.pixels // source.patch
    quarters = tuple((k + 1) * source.depth // 4 - 1 for k in range(4)) if "window" in flags else ()
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(
        source.width, source.depth, HEADS.get(source.width) or source.width // 64, 4 * source.width,
        source.patch, (side, side), global_blocks=quarters, **flags))
    for p in encoder.parameters():
        nn.init.trunc_normal_(p, std=0.02)
    return encoder


# owner/name@revision; what ends like a file is none, but a file that is not there
REPO = re.compile(r"(?!.*\.(?:safetensors|pth|pt|bin)$)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def check_source(source: str) -> None:
    """Raise ValueError for a source that cannot be one, before anything is fetched or raised."""
    known = source in TOYS or source in SOURCES or Path(source).expanduser().exists()
    known = known or source.removeprefix("random:") in SOURCES
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
        raise ValueError(f"{source} is raised, not read from a file; name other weights")
    path, repo = Path(source).expanduser(), None
    origin = str(path.resolve())
    if source in SOURCES or not path.exists():
        origin = SOURCES[source].repo if source in SOURCES else source
        repo, revision = REPO.fullmatch(origin).groups()
        path = fetch_repo(repo, revision or "main", sha256)
    if path.is_dir():
        there = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not there:
            raise ValueError(f"{path} has no weights; put {' or '.join(WEIGHTS)} there")
        path = there[0]
    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    record = read_json(path.parent / "source.json")
    expected = sha256 or (record.get("sha256") if record.get("file") == path.name else None)
    if expected and str(expected).lower() != digest:
        raise ValueError(f"{path} has sha256 {digest} instead of {expected}; delete it and fetch it again")
    known = {s.repo: s.licence for s in SOURCES.values()}
    provenance = {"source": origin, "commit": record.get("commit"), "file": path.name,
                  "sha256": digest, "licence": known.get(repo, "not stated")}
    return Weights(read_tensors(path), read_hints(path.parent), provenance, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors, or a pickle of plain weights. Raises ValueError."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds
        why = re.sub("\033\\[[0-9;]*m", "", prism.one_line(error))  # torch prints in bold
        raise ValueError(f"{path} cannot be read as weights ({why}); it is damaged or holds more than "
                         "weights: delete it and fetch it again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(map(is_weight, content, content.values())):
        raise ValueError(f"{path} is no table of weights by name; name a file of weights alone")
    return content


def is_weight(name, x) -> bool:
    """Tell a named tensor of real numbers, each of which is in the file: none that would grow when copied."""
    return (isinstance(name, str) and isinstance(x, Tensor) and x.layout is torch.strided
            and x.device.type == "cpu" and not (x.is_complex() or x.is_quantized or x.is_nested)
            and x.nbytes <= x.untyped_storage().nbytes())


def read_json(path: Path) -> dict:
    """Read a JSON object; {} if there is no such file. Raises ValueError for any other content."""
    if not path.exists():
        return {}
    try:
        content = json.loads(data.read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return content


def section(config: dict, key: str) -> dict:
    """Return an object within a config, {} if it has none. Raises ValueError for anything else."""
    if not isinstance(found := config.get(key, {}), dict):
        raise ValueError(f"{key} that is no object")
    return found


def is_number(x, least: float, most: float) -> bool:
    """Tell a number of JSON in [least, most]; true and nan are none."""
    return type(x) in (int, float) and least <= x <= most


def are_colours(x, least: float) -> bool:
    return isinstance(x, list | tuple) and len(x) == 3 and all(is_number(v, least, 255) for v in x)


HINTS = {  # what a config may say, in EncoderConfig's terms
    "heads": lambda x: type(x) is int and 1 <= x <= 1000, "eps": lambda x: is_number(x, 1e-12, 0.1),
    "rope": lambda x: is_number(x, 1, 1e9), "registers": lambda x: type(x) is int and 0 <= x <= 1000,
    "activation": lambda x: x in list(ACTIVATIONS), "mean": lambda x: are_colours(x, -255),
    "std": lambda x: are_colours(x, 1e-6),
}


def read_hints(folder: Path) -> dict:
    """Collect from config.json and its like what shapes do not tell, in EncoderConfig's terms.

    Raises ValueError for a value that cannot be.
    """
    configs = [read_json(folder / name) for name in SIDECARS]
    try:
        hints = collect_hints(*configs)
        for name, value in hints.items():
            if not HINTS[name](value):
                known = f"; known are {', '.join(ACTIVATIONS)}" if name == "activation" else ""
                raise ValueError(f"{name} {data.printable(str(value))[:60]}{known}")
    except ValueError as error:
        raise ValueError(f"{folder} has a config with {prism.one_line(error)}; correct it or fetch it "
                         "again") from error
    return hints


def collect_hints(config: dict, preprocessor: dict, clip: dict) -> dict:
    """Translate the three configs, in the order of SIDECARS. Raises ValueError."""
    vision = section(config, "vision_config") if "vision_config" in config else config
    terms = {"num_attention_heads": "heads", "layer_norm_eps": "eps", "rope_theta": "rope",
             "num_register_tokens": "registers", "hidden_act": "activation"}
    hints = {ours: vision[theirs] for theirs, ours in terms.items() if theirs in vision}
    if str(config.get("model_type")).startswith("clip"):
        hints.setdefault("activation", "quick_gelu")  # what transformers takes where a config is silent
    timm = section(config, "pretrained_cfg")
    if "architecture" in config:  # timm; its first configs of OpenAI's CLIP said nothing of QuickGELU
        quick = "quickgelu" in str(config["architecture"]) or timm.get("tag") == "openai"
        hints["activation"] = "quick_gelu" if quick else "gelu"
    if clip:
        hints["activation"] = "quick_gelu" if section(clip, "model_cfg").get("quick_gelu") else "gelu"
    if hints.get("activation") == "gelu_pytorch_tanh":
        hints["activation"] = "gelu_tanh"
    for table, start in ((preprocessor, "image_"), (timm, ""), (section(clip, "preprocess_cfg"), "")):
        if start + "mean" in table and start + "std" in table:
            colours = {k: table[start + k] for k in ("mean", "std")}
            return hints | {k: tuple(v) if isinstance(v, list) else v for k, v in colours.items()}
    return hints


# ------------------------------------------------------------------------------------------ download

SIDECARS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin",  # the first that the repo has
           "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMEOUT = (10, 60)  # seconds: to connect, and between two reads
RETRIES, PAUSE = 5, 1.0  # in a row without a new byte; seconds before the first, then twice as many
CHUNK = 2**16  # bytes; a line that breaks loses less than one
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def fetch_repo(repo: str, revision: str = "main", sha256: str | None = None) -> Path:
    """Return the cache folder of a hub repo with its weights and configs, downloading what is missing.

    sha256: of the weights, checked as they are downloaded. A folder that has one of WEIGHTS is taken as
    it is, so that it may be filled by hand. Raises FileNotFoundError, and as `download` does.
    """
    folder = repo_folder(repo, revision)
    if not has_weights(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("a") as lock:  # ends with us, kill -9 or not
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that downloads into {folder}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not has_weights(folder):
                fill(folder, repo, revision, sha256)
    return folder


def repo_folder(repo: str, revision: str = "main") -> Path:
    """Return where the cache keeps a hub repo."""
    return data.cache_folder() / "hub" / repo.replace("/", "--") / revision.replace("/", "--")


def has_weights(folder: Path) -> bool:
    """Tell whether a repo's folder is complete: its weights come last."""
    return any((folder / name).exists() for name in WEIGHTS)


def fill(folder: Path, repo: str, revision: str, sha256: str | None) -> None:
    """Download a repo's configs, then its weights; source.json says where those are from."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    base = f"{endpoint}/{repo}/resolve/{quote(revision, safe='')}"
    known = [(folder / name).exists() or download(f"{base}/{name}", folder / name) for name in SIDECARS]
    for name in WEIGHTS:
        part = folder / f"{name}.part"
        if facts := complete(f"{base}/{name}", part, sha256):
            source = {"repo": repo, "revision": revision, **facts, "file": name, "url": f"{base}/{name}"}
            (folder / "source.part").write_text(json.dumps(source, indent=1) + "\n")
            os.replace(folder / "source.part", folder / "source.json")
            os.replace(part, folder / name)
            return
    raise FileNotFoundError(f"{repo} at {revision} has none of {', '.join(WEIGHTS)}" + (
        ": choose a repo that has (shards are not read)" if any(known) else
        ", nor a config: check its name and the revision"))


def download(url: str, path: Path, sha256: str | None = None) -> dict | None:
    """Fetch one file: resumable, verified, atomic. Returns {"commit", "sha256"}, or None for a 404.

    Raises PermissionError (gated), ConnectionError (offline, or gave up: what has come is kept), OSError
    (no space, other answers), ValueError (wrong content).
    """
    part = path.with_name(f"{path.name}.part")
    facts = complete(url, part, sha256)
    if facts:
        os.replace(part, path)
    return facts


def complete(url: str, part: Path, sha256: str | None) -> dict | None:
    """Make `part` whole and verify it; returns and raises as `download` does."""
    part.parent.mkdir(parents=True, exist_ok=True)
    earlier, most, failures = part.exists(), 0, 0
    while True:
        try:
            stated = transfer(url, part)
        except BROKEN as error:
            if not failures and error.request and not isinstance(error, requests.ReadTimeout):
                raise ConnectionError(  # no answer to the very first request
                    f"no connection to {urlsplit(url).netloc} ({type(error).__name__}): on a connected "
                    f"machine download {url.rpartition('/')[0]}/{WEIGHTS[0]} and {SIDECARS[0]}, and put "
                    f"both into {part.parent}") from error
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures > RETRIES:
                raise ConnectionError(f"gave up on {url} ({prism.one_line(error)}); {size / 1e6:.1f} MB are "
                                      "kept, and the same command goes on from there") from error
            time.sleep(PAUSE * 2 ** (failures - 1))
            continue
        if stated is None:
            return None
        needed = stated | ({"sha256": sha256.lower()} if sha256 else {})
        found = {kind: fingerprint(part, kind) for kind in ("bytes", "git sha1", "sha256")
                 if kind == "sha256" or needed.get(kind)}
        wrong = [kind for kind in found if needed.get(kind, found[kind]) != found[kind]]
        if not wrong:
            return {"commit": stated["commit"], "sha256": found["sha256"]}
        part.unlink()
        if not earlier:
            raise ValueError(f"{url} came with {wrong[0]} {found[wrong[0]]}, needed {needed[wrong[0]]}: "
                             "run again, or check the address and the checksum")
        earlier = False  # a part from an earlier run may have been another file's: start over, once


def fingerprint(path: Path, kind: str) -> int | str:
    """Return a file's length ("bytes"), or hex digits ("sha256", or "git sha1": of a blob)."""
    size = path.stat().st_size
    if kind == "bytes":
        return size
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def transfer(url: str, part: Path) -> dict | None:
    """Add to `part` what it lacks; returns what the hub states (see `read_headers`), None for a 404."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    # auth: without one, requests replaces the token if ~/.netrc knows the host
    with requests.get(url, headers=headers, auth=lambda request: request, stream=True,
                      timeout=TIMEOUT) as response:
        status = response.status_code
        if status == 404:
            return None
        check_status(response, url)
        stated = read_headers(response, url)
        size = stated["bytes"]
        if status == 200:
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"the server has no bytes from {have} on")  # 416, usually
        lacks, free = (size or 0) - have, shutil.disk_usage(part.parent).free
        if lacks > free:
            raise OSError(f"{url} needs {lacks / 2**30:.2f} GiB, {part.parent} has {free / 2**30:.2f} GiB "
                          "free: make room, or set PRISM_CACHE to a folder on another disk")
        with part.open("ab" if have else "wb") as file:
            for chunk in track_bytes(response.iter_content(CHUNK), part.stem, size, have):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    if part.stat().st_size < (size or 0):  # urllib3 1 says nothing of it
        raise requests.ConnectionError(f"the line ended before byte {size}")
    return stated


def check_status(response: requests.Response, url: str) -> None:
    """Raise for an answer that has no file; for a 5xx what makes `complete` try again."""
    status, page = response.status_code, url.partition("/resolve/")[0]
    if status in (401, 403):
        step = ("the token in HF_TOKEN has no access; accept the licence there with its account"
                if os.environ.get("HF_TOKEN") else
                "accept its licence there, then set HF_TOKEN to a token of yours")
        raise PermissionError(f"{page} is gated or does not exist ({status}): {step}; or check the name")
    if status >= 500:
        raise requests.ConnectionError(f"the server answered {status}")
    if status not in (200, 206, 416):
        raise OSError(f"{url} answered {status} {response.reason}: try later, or check HF_ENDPOINT")


def read_headers(response: requests.Response, url: str) -> dict:
    """Return what the hub states of a file: "bytes" and "commit" (or None), "sha256" or "git sha1" if any."""
    answers = [*response.history, response]

    def first(name, among=answers):
        return next((answer.headers[name] for answer in among if name in answer.headers), "")

    length = "Content-Length" if response.status_code == 200 else "Content-Range"
    size = first("X-Linked-Size") or response.headers.get(length, "").rpartition("/")[2]
    own = [answer for answer in answers if urlsplit(answer.url).netloc == urlsplit(url).netloc]
    etag = first("X-Linked-Etag") or first("ETag", own)  # a store behind the hub means something else by it
    stated = {"bytes": int(size) if size.isdigit() else None, "commit": first("X-Repo-Commit") or None}
    if digits := re.fullmatch(r'(?:w/)?"?([0-9a-f]{64}|[0-9a-f]{40})"?', etag.lower()):
        stated["sha256" if len(digits[1]) == 64 else "git sha1"] = digits[1]
    return stated


def track_bytes(chunks: Iterable[bytes], what: str, total: int | None, done: int) -> Iterator[bytes]:
    """Pass on chunks under a bar of bytes; without a terminal, plain lines. Below 1 MB: nothing."""
    terminal, quiet = sys.stdout.isatty(), (total or 0) < 1e6
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())
    start, begin = done, time.perf_counter()
    shown = begin

    def say():
        if not (quiet or terminal):
            rate = (done - start) / 1e6 / (time.perf_counter() - begin)
            print(f"{what}: {done / 1e6:.0f}/{total / 1e6:.0f} MB, {rate:.1f} MB/s", flush=True)

    with Progress(*columns, disable=quiet or not terminal) as bar:
        task = bar.add_task(what, total=total, completed=done)
        say()
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            bar.update(task, completed=done)
            if time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                say()
        say()


# ---------------------------------------------------------------------------------- toys: what they see


class Scenes(NamedTuple):
    """What the toys are raised on: scenes of the rendered world, all of them or a batch."""

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


@functools.lru_cache(1)  # three toys, one reading
def read_scenes(root: Path) -> Scenes:
    """Read the world's train split."""
    world = data.World(root, "train", cache=False)
    samples = [world.read(i, labels=False) for i in range(len(world))]  # with all labels: four times as long
    files = [data.sample_paths(root, world.files, sample["name"])["labelmap"] for sample in samples]
    images = np.stack([sample["image"] for sample in samples])  # (B, S, S, 3)
    labelmaps = np.stack([data.load_label(path, images.shape[1:3], 255, whole=True, field="LabelMap")
                          for path in files])
    return Scenes(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
                  torch.from_numpy(labelmaps.astype(np.uint8)),
                  *caption_tables([sample["caption"] for sample in samples]))


def caption_tables(captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return phrases (B, P) bool, places (B, R, 2) int64 and words (P, V) bool of B captions."""
    parsed = [parse_caption(caption) for caption in captions]
    phrases = sorted({phrase for found, _ in parsed for phrase in found})
    words = sorted({word for phrase in phrases for word in phrase.split()} - {"a", "in", "pot"})
    index = {phrase: p for p, phrase in enumerate(phrases)}
    has = torch.zeros(len(captions), len(phrases), dtype=torch.bool)
    places = torch.full((len(captions), max(len(pairs) for _, pairs in parsed), 2), -1)
    for b, (found, pairs) in enumerate(parsed):
        has[b, [index[phrase] for phrase in found]] = True
        for r, pair in enumerate(pairs):
            places[b, r] = torch.tensor([index[phrase] for phrase in pair])
    made_of = torch.tensor([[word in phrase.split() for word in words] for phrase in phrases])
    return has, places, made_of


def parse_caption(caption: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Split a caption into the phrases that name its things, and pairs (left one, right one).

    "a room with 1 ball, 1 box: a red ball, a blue box; the red ball is left of the blue box" gives
    (["red ball", "blue box"], [("red ball", "blue box")]).
    """
    listed, *places = caption.partition(": ")[2].split("; ")
    phrases = [thing.split(" ", 1)[1] for thing in listed.split(", ") if thing]
    pairs = []
    for place in places:
        one, left, other = place.removeprefix("the ").partition(" is left of the ")
        if not left:
            other, _, one = one.partition(" is right of the ")
        pairs.append((one, other))
    return phrases, pairs


# --------------------------------------------------------------------------------- toys: objectives
# Each maps (encoder, pixels (B, 3, H, W) normalised, their scenes) to a loss.


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
        x = x.gather(1, seen.expand(-1, -1, D))
        x = self.hand_over(self.norm(encoder.run(x)[-1]))
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


# ------------------------------------------------------------------------------------- toys: raising


class Toy(NamedTuple):
    """How a toy is raised. At equal steps Muon was worth 1 to 2 points of semseg to toy-clip and toy-sam."""

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


def raise_toy(name: str, toy: Toy, scenes: Scenes, device: str | torch.device = "cpu",
              follow: Callable | None = None) -> Encoder:
    """Train an encoder from nothing by a toy's objective. Same settings, same machine: same weights.

    follow: wraps the iterator over steps to report progress (default: a bar).
    """
    with torch.random.fork_rng():
        torch.manual_seed(toy.seed)
        encoder = Encoder(toy.encoder).to(device)
        objective = toy.objective(toy.encoder, scenes).to(device)
        weights = [*encoder.parameters(), *objective.parameters()]
        optimizers = build_optimizers(encoder, weights, toy)
        steps = enumerate(shuffled(len(scenes.images), toy))
        for step, rows in follow(steps) if follow else data.track(steps, f"raising {name}", toy.steps):
            batch = scenes.batch(rows, step % 2 == 1, device)
            loss = objective(encoder, encoder.normalise(batch.images.float() / 255), batch)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * lr_share(step / toy.steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{name} ended with loss {loss.item()}; lower its lr in TOYS")
    return encoder


def build_optimizers(encoder: Encoder, weights: list[nn.Parameter], toy: Toy) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the encoder's blocks, AdamW for everything else."""
    matrices = [p for p in encoder.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in weights if id(p) not in chosen]
    return [torch.optim.Muon([{"params": matrices, "peak": toy.matrix_lr}], weight_decay=0.05),
            torch.optim.AdamW([{"params": rest, "peak": toy.lr}], weight_decay=0.05, fused=True)]


def lr_share(done: float, warmup: float = 0.15) -> float:
    """Return the share of the peak learning rate when a share of the steps is done: warm-up, cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))


def shuffled(count: int, toy: Toy) -> Iterator[Tensor]:
    """Yield the scenes (batch_size,) of each step, shuffled anew every time they are used up."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(toy.steps):
        while len(order) < toy.batch_size:
            order = torch.cat([order, torch.randperm(count)])
        yield order[: toy.batch_size]
        order = order[toy.batch_size :]


# ----------------------------------------------------------------------------------- toys: the cache


def toy_key(name: str, toy: Toy) -> str:
    """Hash all that decides a toy's weights: settings, world, and the code that raises it."""
    code = Path(__file__).read_text().partition("- toys: what they see")[2].partition("- toys: the cache")[0]
    parts = [Encoder, EncoderBlock, prism.Attention, prism.MLP, prism.Block]
    settings = {**toy._asdict(), "objective": toy.objective.__name__, "encoder": asdict(toy.encoder)}
    text = json.dumps([name, settings, data.world_key(data.WorldSettings()), code,
                       *map(inspect.getsource, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def toy_path(name: str) -> Path:
    """Return where the cache keeps a toy."""
    return data.cache_folder() / f"{name}-{toy_key(name, TOYS[name])}.safetensors"


def load_toy(name: str) -> tuple[Encoder, dict]:
    """Read a toy from the cache; returns it and its provenance. Raises ValueError if it is damaged."""
    toy, key = TOYS[name], toy_key(name, TOYS[name])
    encoder = Encoder(toy.encoder)
    read_weights(toy_path(name), encoder)
    return encoder, {"kind": "toy", "objective": toy.objective.__name__, "settings": key, "licence": "MIT"}


def raise_missing(names: Sequence[str], device: str | torch.device) -> None:
    """Raise the toys that the cache lacks: on the GPU one by one, else a process and a core for each.

    One thread each: two processes take 0.6 of the time of one with two threads. All at once, even on fewer
    cores: the system shares these out evenly, where a queue would leave one idle at the end.
    """
    missing = [name for name in names if not toy_path(name).exists()]
    root = data.render_world() if missing else None
    if min(data.core_count(), len(missing)) < 2 or torch.device(device).type == "cuda":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for name in missing:
            raise_into_cache(name, root, device)
        torch.set_num_threads(threads)
        return
    context, total = data.process_context(), sum(TOYS[name].steps for name in missing)
    with context.Manager() as manager, \
            ProcessPoolExecutor(len(missing), context, torch.set_num_threads, (1,)) as pool:
        ticks = manager.Queue()
        jobs = [pool.submit(raise_into_cache, name, root, "cpu", ticks) for name in missing]
        for _ in data.track(listen(ticks, jobs, total), f"raising {', '.join(missing)}", total):
            pass
        for job in jobs:
            job.result()


def listen(ticks, jobs: list[Future], total: int) -> Iterator[None]:
    """Yield once per step that a process reports; what it raises is raised here."""
    heard = 0
    while heard < total:
        try:
            ticks.get(timeout=1)
            heard += 1
            yield
        except queue.Empty:
            for job in jobs:
                if job.done():
                    job.result()


def raise_into_cache(name: str, root: Path, device: str | torch.device, ticks=None) -> None:
    """Raise a toy on the world in `root` and write it to the cache; ticks: queue told of every step."""
    def report(steps):
        for step in steps:
            yield step
            ticks.put(name)

    toy = TOYS[name]
    encoder = raise_toy(name, toy, read_scenes(root), device, None if ticks is None else report)
    write_weights(toy_path(name), encoder, {"name": name, "key": toy_key(name, toy)})


def write_weights(path: Path, encoder: Encoder, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    state = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    try:
        save_file(state, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: Path, encoder: Encoder) -> None:
    """Fill an encoder from a safetensors file, strictly. Raises ValueError if it is damaged."""
    try:
        encoder.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"teacher file {path} is damaged ({prism.one_line(error)}); delete it (rm {path}) "
                         "and run again to make it anew") from error


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
        self.encoder, self.size = encoder, size or native
        self.provenance = {**provenance, "mean": list(cfg.mean), "std": list(cfg.std),
                           "size": self.size or "the image's own"}
        if self.pads and self.size != native:
            self.provenance["approximation"] = f"longest side {size} px instead of {native}"
        self.levels = [(k + 1) * cfg.depth // 4 - 1 for k in range(4)]  # blocks, evenly spaced
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.encoder.cfg.dim

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

    def blocks(self, pixels: Tensor) -> list[Tensor]:
        """Return the raw outputs of every block, (B, C, h, w) each, for sized and normalised pixels."""
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
    """Load a frozen teacher; what is not in the cache is fetched, a toy is raised (half a minute).

    source: a short name (`python teachers.py` lists them), random: and such a name (its shape, random
    weights, nothing fetched), a hub repo id, a folder with config.json and weights, or a weights file.
    size: see Teacher (toys: 64). sha256: what the weights file must have.
    Raises ValueError or OSError.
    """
    if source in TOYS:
        raise_missing([source], device)
        encoder, provenance = load_toy(source)
        size = size or encoder.cfg.grid[0] * encoder.cfg.patch
    elif source.startswith("random:"):
        encoder, provenance = random_encoder(source.removeprefix("random:")), {"kind": "random weights"}
    else:
        weights = read_source(source, sha256)
        encoder, family = read_encoder(weights)
        provenance = {"kind": family, **weights.provenance}
    return Teacher(encoder, size, provenance).to(device)


def split_name(teacher: str) -> tuple[str, str]:
    """Split name=source; without a name, it is the short name, or made of the source's last part."""
    if match := re.fullmatch(r"([\w-]+)=(.+)", teacher):
        return match[1], match[2]
    return re.sub(r"[^\w-]+", "-", teacher.rstrip("/").rpartition("/")[2]), teacher


def check_names(teachers: Sequence[str]) -> None:
    """Raise ValueError for teachers that are not known or share a name."""
    names = [split_name(teacher)[0] for teacher in teachers]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"teachers {' '.join(teachers) or '(none)'}; name each once, at least one "
                         "(two that share a name: other=SOURCE)")
    for teacher in teachers:
        check_source(split_name(teacher)[1])


class Teachers:
    """All teachers of a run; each sees only its own images of a batch.

    names: sources as for load_teacher, or name=source. sam_size: longest side in pixels that SAM gets.
    """

    def __init__(self, names: Sequence[str], device: str | torch.device = "cpu", compile: bool = False,
                 sam_size: int | None = None):
        check_names(names)
        sources = dict(split_name(name) for name in names)
        raise_missing([source for source in sources.values() if source in TOYS], device)
        self.members = {name: load_teacher(source, device=device) for name, source in sources.items()}
        if sam_size is not None:
            sams = {name: teacher for name, teacher in self.members.items() if teacher.pads}
            if not sams:
                raise ValueError(f"--sam-size {sam_size}, but no teacher of {' '.join(names)} is a SAM; "
                                 "leave it out")
            for name, teacher in sams.items():
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
    short = provenance | {k: provenance[k][:12] for k in ("commit", "sha256") if provenance.get(k)}
    return ", ".join(f"{k} {short[k]}" for k in keys if short.get(k) is not None)


# ------------------------------------------------------------------------------------------ pictures


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


def draw_features(photos: dict[str, np.ndarray], members: dict[str, Teacher], cell: int = 256) -> Image.Image:
    """Draw per photo and teacher a row: the photo, then its four levels, see `pca_picture`."""
    rows = [(name, photo, who) for name, photo in photos.items() for who in members]
    heights = [round(cell * photo.shape[0] / photo.shape[1]) for _, photo, _ in rows]
    sheet = Image.new("RGB", (5 * (cell + 8) + 8, sum(heights) + 52 * len(rows) + 8), "white")
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(15), 8
    for (name, photo, who), height in zip(rows, heights, strict=True):
        teacher = members[who]
        image = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        levels = teacher.features(image.to(teacher.encoder.mean.device))
        h, w = levels[0].shape[-2:]
        pen.text((8, top), f"{name} as {who} sees it: {h} x {w} patches of {teacher.width} channels; red, "
                 "green and blue are the three main components of each level", "black", font)
        cells = [(f"{photo.shape[1]} x {photo.shape[0]} pixels", photo)]
        for block, level in zip(teacher.levels, levels, strict=True):
            picture, share = pca_picture(level[0].float().cpu())
            of = teacher.encoder.cfg.depth
            cells.append((f"block {block + 1} of {of}: {100 * share:.0f} % of the variance", picture))
        for column, (title, picture) in enumerate(cells):
            x = 8 + column * (cell + 8)
            pen.text((x, top + 22), title, (90, 90, 90), font)
            how = Image.Resampling.NEAREST if column else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(picture).resize((cell, height), how), (x, top + 42))
        top += height + 52
    return sheet


# ------------------------------------------------------------------------------------------------ main


@dataclass
class Args:
    """List the teachers; or fetch some and show what they see in photos."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()  # short names, hub repos, folders or weights files
    image: tuple[Path, ...] = ()  # photos whose levels are drawn into OUT_DIR/features.png
    size: int | None = None  # input pixels: longest side for SAM, else the shorter one
    sha256: str | None = None  # what the weights file of the one teacher named must have
    probe: bool = False  # print what linear probes read off the toys, beside an untrained one
    out_dir: Path = Path("out")  # for the picture
    device: str | None = None  # default: cuda if there is one, else cpu
    debug: bool = False  # full traceback on errors


def main(args: Args) -> None:
    """Do what the arguments ask for, the list if nothing."""
    if (args.image or args.sha256) and not args.names:
        raise ValueError("--image and --sha256 need a teacher; name one, such as dinov2-b")
    if args.sha256 and len(args.names) > 1:
        raise ValueError(f"one --sha256 for {len(args.names)} teachers; name one")
    data.check_flags(args, {"size": (1, 2**14)})
    for source in args.names:
        check_source(source)
    device = prism.choose_device(args.device)
    photos = {path.name: data.read_photo(path) for path in args.image}
    if photos:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    raise_missing([source for source in args.names if source in TOYS], device)
    members = {}
    for source in args.names:
        members[source] = load_teacher(source, args.size, device, args.sha256)
        print(f"{source}: {describe(members[source].provenance)}", flush=True)
    if photos:
        draw_features(photos, members).save(args.out_dir / "features.png")
        print(f"{args.out_dir / 'features.png'}: {len(photos)} photos, {len(members)} teachers")
    if args.probe:
        probe_toys(device)
    elif not args.names:
        list_teachers()


def list_teachers() -> None:
    """Print names, sources, sizes, licences, and what the cache holds."""
    table = Table("name", "weights", "width x depth", "M", "patch", "pixels", "licence", "cached",
                  title=f"teachers; cache: {data.cache_folder()}")
    for name, toy in TOYS.items():
        cfg, path = toy.encoder, toy_path(name)
        table.add_row(name, f"raised here: {toy.objective.__name__}", f"{cfg.dim} x {cfg.depth}",
                      f"{8e-6 * cfg.dim**2 * cfg.depth:.1f}", str(cfg.patch), str(cfg.patch * cfg.grid[0]),
                      "MIT", megabytes([path]))
    for name, s in SOURCES.items():
        files = [repo_folder(s.repo) / file for file in WEIGHTS]
        table.add_row(name, s.repo, f"{s.width} x {s.depth}", f"{12e-6 * s.width**2 * s.depth:.0f}",
                      str(s.patch), str(s.pixels), s.licence, megabytes(files))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    print("M: about so many million weights in the blocks. A hub repo, folder or file of your own works, "
          f"too, in one of these layouts: {layouts_known()}")


def megabytes(paths: Sequence[Path]) -> str:
    """Add up the sizes of the files that exist."""
    total = sum(path.stat().st_size for path in paths if path.exists())
    return f"{total / 1e6:.1f} MB" if total else ""


def probe_toys(device: torch.device) -> None:
    """Print what linear probes read off each toy, beside an untrained one of the same shape."""
    import eval  # here alone: a module that train.py needs must not need eval.py

    root = data.render_world()
    raise_missing(list(TOYS), device)
    members = {"untrained": untrained()} | {name: load_teacher(name) for name in TOYS}
    features = {name: teacher.features for name, teacher in members.items()}
    eval.probe_table(features, data.World(root, "probe"), data.World(root, "val"))


def untrained() -> Teacher:
    """Make a toy that has learned nothing: the floor of the table."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Teacher(Encoder(EncoderConfig()), 64, {"kind": "untrained"})


if __name__ == "__main__":
    args = tyro.cli(Args)
    prism.exit_with_one_line(lambda: main(args), args.debug)
