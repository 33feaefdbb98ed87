"""Teachers: frozen networks that the student learns to imitate.

    python teachers.py        # raises the toys if need be, and prints what each of them knows

| name     | weights: raised here on the rendered world by | patch | pixels | width | mean / std |
|----------|-----------------------------------------------|-------|--------|-------|------------|
| toy-clip | images against phrases of their captions      | 8     | 64     | 96    | .5 / .25   |
| toy-dino | masked patches predicted; no labels at all    | 8     | 64     | 96    | .5 / .25   |
| toy-sam  | a point -> the mask of the instance there     | 8     | 64     | 96    | .5 / .25   |

A teacher's four levels are the outputs of four of its blocks, patch tokens only, before any final norm.
Toys take images of any size: the shorter side is resized to `pixels`, the other one in proportion,
rounded to whole patches (bilinear, antialiased).
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
        self.register_buffer("mean", torch.tensor(encoder.cfg.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(encoder.cfg.std).view(3, 1, 1), persistent=False)
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
        return (images - self.mean) / self.std

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
    """What the toys are raised on: the train split of the rendered world."""

    images: Tensor  # (N, 3, S, S) uint8 RGB
    labelmaps: Tensor  # (N, S, S) uint8 instance ids
    phrases: Tensor  # (N, A) bool: the caption's things that phrase a names


def read_scenes(root: Path) -> Scenes:
    """Read images, instances and phrases of the world's train split."""
    world = data.World(root, "train")
    samples = [world.read(i) for i in range(len(world))]
    images, labelmaps = (torch.stack([torch.from_numpy(s[key]) for s in samples]) for key in ("image", "labelmap"))
    return Scenes(images.permute(0, 3, 1, 2).contiguous(), labelmaps.to(torch.uint8),
                  phrase_table([s["things"] for s in samples]))


def phrase_table(scenes: Sequence[list[dict]]) -> Tensor:
    """Return (N, A) bool: which of all phrases the captions' things make, sorted, each scene names."""
    named = [{phrase for thing in things for phrase in phrases(thing)} for things in scenes]
    column = {phrase: a for a, phrase in enumerate(sorted(set().union(*named)))}
    table = torch.zeros(len(named), len(column), dtype=torch.bool)
    for row, found in zip(table, named, strict=True):
        row[[column[phrase] for phrase in found]] = True
    return table


def phrases(thing: dict) -> list[str]:
    """List how a caption's thing can be called: "ball", "red", "red ball", "walking person"."""
    words = [thing["class"], thing["colour"], f"{thing['colour']} {thing['class']}"]
    return words + [f"{thing['pose']} {thing['class']}"] * bool(thing["pose"])


# --------------------------------------------------------------------------------- toys: objectives
# Each maps (encoder, pixels (B, 3, H, W) normalised, the scenes of the batch) to a loss.


class Contrast(nn.Module):
    """toy-clip: tell which phrases of the batch belong to which images.

    Every patch is scored against every phrase; an image's score is the log-mean-exp over its patches, so
    that the evidence stays where it is (mean-pooled tokens teach the patches little). Sigmoid loss: an image has
    many phrases.
    """

    def __init__(self, cfg: EncoderConfig, scenes: Scenes):
        super().__init__()
        share = scenes.phrases.float().mean(0).clamp(1e-3, 1 - 1e-3)
        self.norm = nn.LayerNorm(cfg.dim)
        self.score = nn.Linear(cfg.dim, len(share))
        self.score.bias.data = torch.logit(share)

    def forward(self, encoder: Encoder, pixels: Tensor, scenes: Scenes) -> Tensor:
        tokens = self.norm(encoder.run(encoder.embed(pixels))[-1])  # (B, N, D)
        scores = self.score(tokens)  # (B, N, A)
        pooled = scores.logsumexp(1) - torch.tensor(float(scores.shape[1])).log()  # (B, A)
        return F.binary_cross_entropy_with_logits(pooled, scenes.phrases.float())


class Masked(nn.Module):
    """toy-dino: hide most patches, predict their normalised pixels from the others."""

    hidden = 0.6  # share of patches

    def __init__(self, cfg: EncoderConfig, scenes: Scenes):
        super().__init__()
        self.patch = cfg.patch
        self.token = nn.Parameter(torch.zeros(cfg.dim))
        self.norm = nn.LayerNorm(cfg.dim)
        self.predict = nn.Linear(cfg.dim, 3 * cfg.patch**2)

    def forward(self, encoder: Encoder, pixels: Tensor, scenes: Scenes) -> Tensor:
        target = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        target = F.layer_norm(target, target.shape[-1:])
        mask = torch.rand(target.shape[:2], device=pixels.device) < self.hidden  # (B, N)
        pos = rearrange(encoder.pos_embed, "1 d h w -> 1 (h w) d")
        tokens = torch.where(mask.unsqueeze(-1), self.token + pos, encoder.embed(pixels))
        predicted = self.predict(self.norm(encoder.run(tokens)[-1]))
        return F.mse_loss(predicted[mask], target[mask])


class Segment(nn.Module):
    """toy-sam: a point prompt, the mask of the instance there; no classes.

    Tokens become a map of CELLS x CELLS keys per patch; the query at the point is dotted with all keys.
    """

    cells = 4  # per patch side: masks of 32 x 32 for 8 x 8 patches
    prompts = 8  # per image
    channels = 24

    def __init__(self, cfg: EncoderConfig, scenes: Scenes):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim)
        self.keys = nn.Linear(cfg.dim, self.channels * self.cells**2)
        self.query = nn.Linear(self.channels, self.channels + 1)

    def forward(self, encoder: Encoder, pixels: Tensor, scenes: Scenes) -> Tensor:
        h = pixels.shape[-2] // encoder.cfg.patch
        keys = self.keys(self.norm(encoder.run(encoder.embed(pixels))[-1]))
        keys = rearrange(keys, "b (h w) (p q c) -> b (h p w q) c", h=h, p=self.cells, q=self.cells)  # (B, M, c)
        stride = encoder.cfg.patch // self.cells
        labels = scenes.labelmaps[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1)  # (B, M)
        points = torch.randint(labels.shape[1], (len(labels), self.prompts), device=pixels.device)  # (B, P)
        here = keys.gather(1, points.unsqueeze(-1).expand(-1, -1, self.channels))  # (B, P, c)
        query, bias = self.query(here).split([self.channels, 1], -1)
        logits = query @ keys.transpose(1, 2) * self.channels**-0.5 + bias  # (B, P, M)
        masks = (labels.unsqueeze(1) == labels.gather(1, points).unsqueeze(-1)).float()
        return mask_loss(logits, masks)


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus dice of mask logits (B, P, M) against masks {0, 1} (SAM uses focal plus dice)."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum(-1) + 1) / (p.sum(-1) + masks.sum(-1) + 1)  # (B, P)
    return F.binary_cross_entropy_with_logits(logits, masks) + dice.mean()


# ------------------------------------------------------------------------------------- toys: raising


class Toy(NamedTuple):
    """How a toy is raised."""

    objective: type[nn.Module]
    steps: int  # optimizer updates
    lr: float = 2e-3  # peak
    batch_size: int = 64
    weight_decay: float = 0.05
    seed: int = 0


TOYS = {
    "toy-clip": Toy(Contrast, 350),
    "toy-dino": Toy(Masked, 350),
    "toy-sam": Toy(Segment, 350),
}


def raise_toy(name: str, toy: Toy, scenes: Scenes, device: str | torch.device = "cpu") -> Encoder:
    """Train an encoder from nothing by a toy's objective. Same settings, same machine: same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(toy.seed)
        encoder = Encoder(EncoderConfig()).to(device)
        objective = toy.objective(encoder.cfg, scenes).to(device)
        weights = [*encoder.parameters(), *objective.parameters()]
        optimizer = torch.optim.AdamW(weights, toy.lr, weight_decay=toy.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, toy.lr, toy.steps, pct_start=0.15)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (encoder.cfg.mean, encoder.cfg.std))
        for rows in track(batches(len(scenes.images), toy), f"raising {name}", toy.steps):
            batch = Scenes(*(t[rows].to(device) for t in scenes))
            pixels = (batch.images.float() / 255 - mean) / std
            loss = objective(encoder, pixels, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{name} ended with loss {loss}; lower its lr in TOYS")
    return encoder


def batches(count: int, toy: Toy):
    """Yield the scenes of each step, shuffled epoch by epoch."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(toy.steps):
        while len(order) < toy.batch_size:
            order = torch.cat([order, torch.randperm(count)])
        rows, order = order[: toy.batch_size], order[toy.batch_size :]
        yield rows


def track(steps, what: str, total: int):
    """Pass on `steps` with a progress bar on a terminal, else with a plain line every ten seconds."""
    start = shown = time.perf_counter()
    with Progress(disable=not sys.stdout.isatty()) as bar:
        for done, item in enumerate(bar.track(steps, total, description=what), 1):
            yield item
            now = time.perf_counter()
            if bar.disable and (now - shown > 10 or done == total):
                shown, rate = now, done / (now - start)
                print(f"{what}: {done}/{total} steps, {rate:.1f}/s, {(total - done) / rate:.0f} s left", flush=True)


# ---------------------------------------------------------------------------------- toys: the cache


def toy_key(name: str, toy: Toy) -> str:
    """Hash all that decides a toy's weights: its settings, the world, the source above."""
    source = Path(__file__).read_text().partition("# ---------------------------------------------------------------------------------- toys: the cache")[0]
    settings = {**toy._asdict(), "objective": toy.objective.__name__, "encoder": asdict(EncoderConfig())}
    text = json.dumps([name, settings, data.world_key(data.WorldSettings()), source])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_toy(name: str, device: str | torch.device) -> tuple[Encoder, dict]:
    """Read a toy from the cache; raise it, and write it there, if need be. Returns it and its provenance."""
    toy = TOYS[name]
    key = toy_key(name, toy)
    folder = Path(os.environ.get("PRISM_CACHE") or "~/.cache/prism").expanduser()
    path = folder / f"{name}-{key}.safetensors"
    if not path.exists():
        encoder = raise_toy(name, toy, read_scenes(data.render_world()), device)
        write_weights(path, encoder, {"name": name, "key": key})
    encoder = Encoder(EncoderConfig())
    read_weights(path, encoder)
    return encoder, {"kind": "toy", "objective": toy.objective.__name__, "settings": key, "licence": "MIT"}


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
        with safe_open(path, "pt") as file:
            encoder.load_state_dict({k: file.get_tensor(k) for k in file.keys()})
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"teacher file {path} is damaged ({prism.one_line(error)}); delete it (rm {path}) and run "
                         "again to make it anew") from error


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
    encoder, provenance = load_toy(source, device)
    native = encoder.cfg.grid[0] * encoder.cfg.patch
    return Teacher(encoder, size or native, {"name": source, **provenance}).to(device)


class Teachers:
    """All teachers of a run; each sees only its own images of a batch."""

    def __init__(self, names: Sequence[str], device: str | torch.device = "cpu", compile: bool = False):
        check_names(names)
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


def main() -> None:
    """Print what a linear probe reads off each teacher, beside an untrained one of the same shape."""
    import eval

    root = data.render_world()
    members = {"untrained": untrained(), **{name: load_teacher(name) for name in TOYS}}
    eval.print_probes({name: teacher.features for name, teacher in members.items()},
                      data.World(root, "probe"), data.World(root, "val"))


def untrained() -> Teacher:
    """Make a toy that has learned nothing: the floor of the table."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Teacher(Encoder(EncoderConfig()), 64, {"kind": "untrained"})


if __name__ == "__main__":
    prism.exit_with_one_line(main, "--debug" in sys.argv)
