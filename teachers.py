"""Teachers: frozen networks that the student learns to imitate.

    python teachers.py        # raises the toys if need be, and prints what each of them knows

| name     | weights: raised here, on the rendered world, by | patch | pixels | width | mean / std |
|----------|-------------------------------------------------|-------|--------|-------|------------|
| toy-clip | images against the phrases of their captions    | 8     | 64     | 96    | .5 / .25   |
| toy-dino | hidden patches told from the others; no labels  | 8     | 64     | 96    | .5 / .25   |
| toy-sam  | a point -> the mask of the thing there          | 8     | 64     | 64    | .5 / .25   |

A teacher's four levels are the outputs of four of its blocks, patch tokens only, before any final norm.
Toys take images of any size: the shorter side is resized to `pixels`, the other one in proportion,
rounded to whole patches (bilinear, antialiased).
"""

import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import queue

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: see train.py

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import data
import prism

# ---------------------------------------------------------------------------------------- the encoder


@dataclass(frozen=True)
class EncoderConfig:
    """Describe a teacher's ViT."""

    dim: int = 96  # width of the tokens
    depth: int = 4  # blocks
    heads: int = 3  # attention heads
    hidden: int = 192  # hidden width of the MLPs
    patch: int = 8  # patch side in pixels
    grid: tuple[int, int] = (8, 8)  # rows and columns of the position table, in patches
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of RGB in [0, 1], subtracted from the input
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)


class Encoder(nn.Module):
    """A ViT that returns the output of every block."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch)
        self.pos_embed = nn.Parameter(torch.empty(1, cfg.dim, *cfg.grid))
        self.blocks = nn.ModuleList(prism.Block(cfg.dim, cfg.heads, cfg.hidden) for _ in range(cfg.depth))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn RGB in [0, 1] (B, 3, H, W) into the pixels that the encoder expects."""
        return (images - self.mean) / self.std

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn normalised pixels (B, 3, H, W) into tokens with positions (B, N, D)."""
        x, pos = self.patch_embed(pixels), self.pos_embed  # (B, D, h, w)
        if x.shape[-2:] != pos.shape[-2:]:
            pos = F.interpolate(pos, x.shape[-2:], mode="bicubic", align_corners=False)
        return rearrange(x + pos, "b d h w -> b (h w) d")

    def run(self, x: Tensor) -> list[Tensor]:
        """Map tokens (B, N, D) to the output of every block, (B, N, D) each."""
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Map normalised pixels (B, 3, H, W) to the depth maps of every block, (B, D, h, w) each."""
        h = pixels.shape[-2] // self.cfg.patch
        return [rearrange(x, "b (h w) d -> b d h w", h=h) for x in self.run(self.embed(pixels))]


class Teacher(nn.Module):
    """A frozen encoder with its own input size and normalisation."""

    def __init__(self, encoder: Encoder, size: int, provenance: dict):
        super().__init__()
        self.encoder, self.size = encoder, size
        self.provenance = {**provenance, "mean": list(encoder.cfg.mean), "std": list(encoder.cfg.std),
                           "size": size}
        self.levels = [(k + 1) * encoder.cfg.depth // 4 - 1 for k in range(4)]  # blocks, evenly spaced
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.encoder.cfg.dim

    def grid(self, H: int, W: int) -> tuple[int, int]:
        """Return rows and columns of the features of an image of H x W pixels."""
        patch, scale = self.encoder.cfg.patch, self.size / min(H, W)
        return tuple(max(1, round(side * scale / patch)) for side in (H, W))

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalise RGB in [0, 1] (B, 3, H, W)."""
        patch = self.encoder.cfg.patch
        size = tuple(patch * n for n in self.grid(*images.shape[-2:]))
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.encoder.normalise(images)

    def blocks(self, pixels: Tensor) -> list[Tensor]:
        """Return the raw outputs of every block, (B, C, h, w) each, for sized and normalised pixels."""
        return self.encoder(pixels)

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Return 4 levels (B, C, h, w) of images (B, 3, H, W), RGB in [0, 1], of any size."""
        maps = self.blocks(self.prepare(images))
        return [maps[i] for i in self.levels]


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
    world = data.World(root, "train")
    samples = [world.read(i) for i in range(len(world))]
    images, labelmaps = (torch.stack([torch.from_numpy(s[key]) for s in samples])
                         for key in ("image", "labelmap"))
    return Scenes(images.permute(0, 3, 1, 2).contiguous(), labelmaps.to(torch.uint8),
                  *caption_tables([s["caption"] for s in samples]))


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
    parts = [Encoder, prism.Attention, prism.MLP, prism.Block]
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

    One thread each: two processes took 115 s where one with two threads took 197 s.
    """
    missing = [name for name in names if not toy_path(name).exists()]
    workers = min(data.core_count(), len(missing))
    root = data.render_world() if missing else None
    if workers < 2 or torch.device(device).type == "cuda":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for name in missing:
            raise_into_cache(name, root, device)
        torch.set_num_threads(threads)
        return
    spawn, total = multiprocessing.get_context("spawn"), sum(TOYS[name].steps for name in missing)
    with spawn.Manager() as manager, ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
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


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a teacher that is not known."""
    if unknown := [name for name in names if name not in TOYS]:
        raise ValueError(f"unknown teacher {', '.join(unknown)}; known are {', '.join(TOYS)}")


def load_teacher(source: str, size: int | None = None, device: str | torch.device = "cpu") -> Teacher:
    """Load a frozen teacher by name; a toy that is not in the cache is raised first (half a minute).

    size: input pixels of the shorter side (default: the teacher's own). Raises ValueError.
    """
    check_names([source])
    cfg = TOYS[source].encoder
    size = cfg.grid[0] * cfg.patch if size is None else size
    if size <= 0 or size % cfg.patch:
        low = max(size // cfg.patch, 1) * cfg.patch
        raise ValueError(f"size {size} of {source} is not a multiple of its patch {cfg.patch}; "
                         f"use {low} or {low + cfg.patch}")
    raise_missing([source], device)
    encoder, provenance = load_toy(source)
    return Teacher(encoder, size, provenance).to(device)


class Teachers:
    """All teachers of a run; each sees only its own images of a batch."""

    def __init__(self, names: Sequence[str], device: str | torch.device = "cpu", compile: bool = False):
        check_names(names)
        raise_missing(names, device)
        self.members = {name: load_teacher(name, device=device) for name in names}
        self.widths = {name: teacher.width for name, teacher in self.members.items()}
        self.provenance = {name: teacher.provenance for name, teacher in self.members.items()}
        for teacher in self.members.values() if compile else ():
            teacher.encoder.compile(dynamic=True)  # the number of images varies from step to step

    @torch.no_grad()
    def targets(self, images: Tensor, teacher_ids: Tensor) -> dict[str, list[Tensor]]:
        """Return {name: 4 x (B_t, C, h, w)}, rows of the images of that teacher in batch order.

        images (B, 3, H, W) RGB in [0, 1]; teacher_ids (B,) int64 into the names. A teacher without an
        image gives empty maps and does not run.
        """
        targets = {}
        for i, (name, teacher) in enumerate(self.members.items()):
            rows = torch.where(teacher_ids == i)[0]
            if len(rows):
                targets[name] = teacher.features(images[rows])
            else:
                grid = teacher.grid(*images.shape[-2:])
                targets[name] = [images.new_zeros(0, teacher.width, *grid) for _ in teacher.levels]
        return targets


# ------------------------------------------------------------------------------------------------ main


@dataclass
class Args:
    """Print what linear probes read off each teacher, beside an untrained one of the same shape."""

    device: str = "cpu"  # where toys that are not in the cache are raised: cpu, cuda
    debug: bool = False  # full traceback on errors


def main(args: Args) -> None:
    """Raise what is not in the cache, print the table."""
    import eval  # here alone: a module that train.py needs must not need eval.py

    root = data.render_world()
    raise_missing(list(TOYS), args.device)
    members = {"untrained": untrained()}
    members |= {name: load_teacher(name, device=args.device).cpu() for name in TOYS}
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
