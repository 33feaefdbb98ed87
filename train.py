"""Train a student: deconstruct several teachers into experts, then recompose them for tasks.

    python train.py                                                   # both stages, toy size, CPU or GPU
    python train.py --stage deconstruct --size small --image-size 128 --batch-size 256   # one GPU
    torchrun --nproc_per_node=8 train.py --stage deconstruct          # eight GPUs, or CPU processes
    torchrun --nproc_per_node=8 train.py --stage recompose            # goes on from out/deconstruct.pt

One loop serves every stage: a stage is a set of defaults (STAGES) and the loss terms that its batches
feed. `--batch-size` counts the images of one step over all processes, so a run means the same on 1 or 8.
Order, augmentation, teacher assignment and router noise depend on (seed, step) alone, so that going on needs
no random state. The same command again goes on from the last checkpoint; --fresh starts over. Ctrl-C and
SIGTERM end a run after the step at hand, saved. out/log.jsonl has every loss term by name.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings

# Before torch: threads that spin long at barriers starve beside other busy processes (a toy step of 0.3 s
# took 11 s, measured once), threads that sleep at once take 1.3 to 1.45 times as long on an idle machine.
# A spin of microseconds has neither cost: measured with and without two busy neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import data
import prism
import teachers

# ------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    """Train PRISM. Defaults run the whole road on the rendered world in minutes."""

    stage: Literal["all", "deconstruct", "recompose"] = "all"  # all: deconstruct, then recompose
    size: Literal["toy", "small", "base", "large"] = "toy"  # of the student, see `python prism.py`
    student: Literal["prism", "sak", "dense", "wide", "moe"] = "prism"  # sak: the baseline; then controls
    without: tuple[Literal["anchor", "shared", "film", "context"], ...] = ()  # ablate parts of prism
    experts: int | None = None  # routed experts per MoE block (default: the size's)
    top_k: int | None = None  # experts per token (default: the size's)
    expert_ratio: float | None = None  # hidden width of shared and routed experts over D; 1 is "lite"
    gate_start: float | None = None  # lambda of a new prism (default: 0.94, the expert stream fades in)
    every_teacher: bool | None = None  # each image serves all teachers, or one (default: sak all, others one)
    decorr_levels: int = 2  # the first levels are decorrelated; 0: none
    data: str = "world"  # world, world-nyud; KIND:FOLDER: pascal, nyud; stage 1 also images, imagenet, tars
    teachers: tuple[str, ...] = ("toy-clip", "toy-dino", "toy-sam")  # `python teachers.py`; or NAME=FOLDER
    sam_size: int | None = None  # longest side of SAM's input, pixels; less than 1024 is an approximation
    tasks: tuple[str, ...] = ()  # default: all that the data has
    image_size: tuple[int, ...] | None = None  # side, or height and width, pixels (default: the recipe's)

    steps: int | None = None  # optimizer updates per stage (default: the recipe's)
    epochs: float | None = None  # the same as passes over the data
    batch_size: int | None = None  # images per step over all processes (default: the recipe's)
    accumulate: int = 1  # forward and backward passes per step: less memory, the same images
    lr: float | None = None  # peak learning rate (default: the recipe's)
    weight_decay: float | None = None  # on matrices (default: the recipe's)
    distill_weight: float = 1.0  # mu, weight of the distillation terms beside the tasks in recompose
    distill: bool = True  # --no-distill: recompose without teachers and from random weights, or --init

    out_dir: Path = Path("out")  # checkpoints and log.jsonl
    init: str | None = None  # checkpoint or timm ViT: augreg-s, FILE, ... (recompose: OUT_DIR/deconstruct.pt)
    resume: Literal["auto", "previous"] = "auto"  # where the last checkpoint is damaged: the one before it
    fresh: bool = False  # start over; OUT_DIR's checkpoints and log are kept as NAME.old
    seed: int = 0  # of weights, order, augmentation, noise
    device: str | None = None  # default: cuda if there is one, else cpu
    compile: bool | None = None  # torch.compile student and teachers (default: on cuda)
    recompute: bool = False  # activation checkpointing: blocks run twice, but keep only their inputs
    shard: bool = False  # split weights, gradients and optimizer over processes (FSDP2), not only images
    workers: int | None = None  # loader processes per training process (default: on cuda all cores' share)
    log_every: int = 20  # steps between log lines
    save_every: int | None = None  # steps between checkpoints (default: 100, or 1 % of the stage if more)
    bench: int | None = None  # instead: time so many steps of the first stage, whole and by part
    debug: bool = False  # full traceback on errors


class Stage(NamedTuple):
    """A stage's recipe. "all" runs every stage on the same data."""

    checkpoint: str  # file in out_dir
    view: Literal["distill", "multitask"]  # augmentation
    image_size: tuple[int, int]  # height and width, pixels
    steps: int  # optimizer updates; 0: as many as `epochs` make
    epochs: float  # passes over the data; 0: `steps` count
    batch_size: int  # images per step, over all processes
    lr: float  # peak
    lr_batch: int  # the lr is for as many images per step; with fewer it shrinks in proportion
    lr_pretrained: float  # factor of the lr for what initial weights brought along
    weight_decay: float  # AdamW, matrices only
    warmup: float  # share of the steps, linear from 1e-7
    decay: Literal["cosine", "poly"]  # cosine to 1e-6, or (1 - step/steps)^0.9
    clip: float  # gradient norm


ON_IMAGES = Stage(
    "deconstruct.pt", "distill", image_size=(384, 384), steps=0, epochs=30, batch_size=160, lr=1e-3,
    lr_batch=128, lr_pretrained=0.01, weight_decay=0.01, warmup=2 / 30, decay="cosine", clip=1.0)
ON_PASCAL = Stage(
    "prism.pt", "multitask", image_size=(512, 512), steps=40_000, epochs=0, batch_size=6, lr=2e-5,
    lr_batch=1, lr_pretrained=1.0, weight_decay=1e-6, warmup=0.0, decay="poly", clip=10.0)
STAGES = {  # stage -> kind of data -> recipe: the paper's, but the rendered world's, which takes minutes
    "deconstruct": {
        "world": ON_IMAGES._replace(image_size=(64, 64), steps=350, epochs=0, batch_size=32, lr_batch=1),
        "images": ON_IMAGES, "pascal": ON_IMAGES, "nyud": ON_IMAGES,
    },
    "recompose": {
        "world": ON_PASCAL._replace(image_size=(64, 64), steps=320, batch_size=8, lr=1e-3, warmup=0.05),
        "pascal": ON_PASCAL,
        "nyud": ON_PASCAL._replace(image_size=(448, 576), batch_size=12),
    },
}

# ---------------------------------------------------------------------------------------------- set-up


class Runtime(NamedTuple):
    """Where this process computes, and which share of each batch is its own."""

    rank: int
    world_size: int
    device: torch.device
    amp: torch.dtype | None  # autocast dtype, None for float32


def start_runtime(device: str | None) -> Runtime:
    """Join torchrun's processes if there are any; pick device and dtype. Raises ValueError."""
    chosen = prism.choose_device(device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if chosen.type == "cuda" and chosen.index is None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} has no GPU of its own ({torch.cuda.device_count()} seen); "
                             "lower --nproc_per_node, or use --device cpu")
        torch.cuda.set_device(local)
        chosen = torch.device("cuda", local)
    gpu = chosen.type == "cuda"
    if world_size > 1 and not dist.is_initialized():  # hours: the first rank may be raising teachers
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=3))
    return Runtime(rank, world_size, chosen, torch.bfloat16 if gpu else None)


@contextmanager
def explain_lost_process():
    """Turn what torch raises when another process is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not re.search("peer|connection|gloo|NCCL", str(error), re.IGNORECASE):
            raise
        raise ConnectionError(f"process {dist.get_rank()} ends because another one did ("
                              f"{prism.one_line(error)}); see what that one says, then repeat the command"
                              ) from error


class Stop:
    """Notes SIGTERM and Ctrl-C while it is entered, so that a run ends between two steps; the same signal
    once more ends it at once."""

    def __init__(self):
        self.received, self.pid = 0, os.getpid()

    def __enter__(self):
        self.before = {kind: signal.signal(kind, self.note) for kind in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def note(self, kind: int, _):
        signal.signal(kind, self.before[kind])
        self.received = kind
        if os.getpid() == self.pid:  # no forked loader worker; not print, which may be at work
            os.write(2, f"{signal.Signals(kind).name}: ending after this step\n".encode())

    def agreed(self) -> int:
        """Return the signal that any process got, at the same step on all of them."""
        received = torch.tensor(self.received)  # on the host: no GPU is waited for
        if world_size() > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)


def first_rank_first(rt: Runtime, make):
    """Run `make` on rank 0, then on the others, which find its result in the cache."""
    result = make() if rt.rank == 0 else None
    if rt.world_size > 1:
        dist.barrier()
    return result if rt.rank == 0 else make()


LIMITS = {  # of numbers on the command line: least, most
    "experts": (1, 255), "top_k": (1, 255), "expert_ratio": (0.1, 100), "decorr_levels": (0, 4),
    "sam_size": (1, 2**14), "image_size": (1, 2**14), "steps": (1, 1e9), "epochs": (1e-6, 1e6),
    "batch_size": (1, 1e6), "accumulate": (1, 1e6), "lr": (0, 100), "weight_decay": (0, 100),
    "distill_weight": (0, 1e6), "seed": (0, 2**63 - 1), "workers": (0, 1024), "log_every": (1, 1e9),
    "save_every": (1, 1e9),
}


def check_args(args: Args) -> None:
    """Raise ValueError or OSError for what can be seen before anything is rendered or built."""
    data.check_flags(args, LIMITS)
    patch, processes = prism.SIZES[args.size].patch, int(os.environ.get("WORLD_SIZE", 1))
    if args.steps is not None and args.epochs is not None:
        raise ValueError(f"--steps {args.steps} and --epochs {args.epochs:g}; give one of them")
    if args.distill:
        teachers.check_names(args.teachers)
    elif args.stage != "recompose":
        raise ValueError(f"--no-distill leaves nothing to {args.stage}; add --stage recompose")
    prism.check_config(student_config(args))
    if args.student in ("prism", "moe") and args.every_teacher:
        raise ValueError(f"--every-teacher True with {args.student}: its experts are chosen for one teacher "
                         "per image; use sak, dense or wide")
    if odd := [task for task in args.tasks if task not in data.TASKS or args.tasks.count(task) > 1]:
        raise ValueError(f"task {odd[0]} is unknown or named twice; known are {', '.join(data.TASKS)}")
    data.check_place(args.data)
    check_init(args)
    for name in stage_names(args.stage):
        stage = choose_recipe(args, name)
        for side in stage.image_size:
            if side % patch or side <= 0:
                low = max(side // patch, 1) * patch
                raise ValueError(f"image size {side} is not a multiple of the patch size {patch}; "
                                 f"use {low} or {low + patch}")
        batch, parts = stage.batch_size, processes * args.accumulate
        if args.distill and batch < len(args.teachers):
            raise ValueError(f"batch size {batch} is smaller than the number of teachers "
                             f"({len(args.teachers)}); every step needs an image for each")
        if args.bench is not None and args.bench < 1:
            raise ValueError(f"--bench {args.bench} steps; give 1 or more, or leave it out to train")
        if args.bench and args.accumulate > 1:
            raise ValueError(f"--bench with --accumulate {args.accumulate}: it times single passes; leave it "
                             "out and divide the batch size")
        if args.shard and processes == 1:
            raise ValueError("--shard splits the student over processes, and this is one; start several "
                             "with torchrun --nproc_per_node=N, or leave it out")
        if args.accumulate < 1 or batch % parts:
            raise ValueError(f"batch size {batch} does not split over {processes} processes x "
                             f"{args.accumulate} passes; use {batch // max(parts, 1) * parts or parts}")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        probe = args.out_dir / f".write-test.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        why = error.strerror
        raise OSError(f"cannot write to {args.out_dir}: {why}; choose another --out-dir") from error


def check_init(args: Args) -> None:
    """Raise FileNotFoundError or ValueError where the first stage's initial weights are not there."""
    name = stage_names(args.stage)[0]
    source, own = init_source(args, name), args.out_dir / choose_recipe(args, name).checkpoint
    begun = own.is_file() and not args.fresh
    if source and source.endswith(".pt") and not (Path(source).is_file() or begun):
        raise FileNotFoundError(f"checkpoint {source} does not exist; name one with --init, or make it with "
                                "--stage deconstruct")
    if source and not source.endswith(".pt"):
        teachers.check_source(source)


def init_source(args: Args, name: str) -> str | None:
    """Tell where a stage's first weights are: --init, or for stage 2 stage 1's; None: random weights."""
    source = args.init if args.stage != "all" or name == "deconstruct" else None
    if source is None and name == "recompose" and args.distill:
        source = str(args.out_dir / ON_IMAGES.checkpoint)
    return source


def stage_names(stage: str) -> list[str]:
    return list(STAGES) if stage == "all" else [stage]


def choose_recipe(args: Args, name: str, images: int = 0) -> Stage:
    """Put the command line's values over the recipe for this kind of data of so many images."""
    kind = args.data.partition(":")[0]
    kind = {"world-nyud": "world", **dict.fromkeys(data.UNLABELLED, "images")}.get(kind, kind)
    if kind not in STAGES[name]:
        raise ValueError(f"data {args.data} cannot be used to {name}: it has no labels, or is of no known "
                         f"kind; use --stage deconstruct, or one of {', '.join(STAGES[name])}")
    stage = STAGES[name][kind]
    given = {k: getattr(args, k) for k in ("steps", "epochs", "batch_size", "lr", "weight_decay")}
    stage = stage._replace(**{k: v for k, v in given.items() if v is not None})
    if args.image_size:
        stage = stage._replace(image_size=(args.image_size[0], args.image_size[-1]))
    if args.lr is None:
        stage = stage._replace(lr=stage.lr * min(1, stage.batch_size / stage.lr_batch))
    if args.epochs is not None or (stage.epochs and args.steps is None):
        return stage._replace(steps=max(1, round(stage.epochs * images / stage.batch_size)))
    return stage._replace(epochs=stage.steps * stage.batch_size / max(images, 1))


def open_train(args: Args, stage: Stage) -> data.Samples:
    return data.open_data(args.data, "train", size=stage.image_size, seed=args.seed, view=stage.view)


def choose_tasks(args: Args, dataset: data.Samples) -> dict[str, int]:
    """Return {task: output channels}. Raises ValueError for a task that the data does not label."""
    if missing := [task for task in args.tasks if task not in dataset.tasks]:
        raise ValueError(f"{args.data} has no labels for {', '.join(missing)}; it labels "
                         f"{', '.join(dataset.tasks)}")
    return {task: dataset.tasks[task] for task in args.tasks or dataset.tasks}


def student_config(args: Args, **changes) -> prism.PrismConfig:
    """Return the size's config with what the command line changes of it."""
    switches = ("experts", "top_k", "expert_ratio", "gate_start")
    given = {k: v for k in switches if (v := getattr(args, k)) is not None}
    size = prism.SIZES[args.size]
    return replace(size, student=args.student, without=tuple(args.without), **given, **changes)


def build_student(args: Args, stage: Stage, **changes) -> prism.Student:
    """Make the seeded student for the stage's images; changes: of its config."""
    torch.manual_seed(args.seed)
    grid = tuple(side // prism.SIZES[args.size].patch for side in stage.image_size)
    return prism.build(student_config(args, grid=grid, **changes))


NEW = re.compile(r"blocks\.\d+\.(gate|shared|router|experts)\.|teacher_embed|task_embed|projectors|heads|"
                 r"adapters|out_norms|aligners|mixers")


def build_optimizer(student: nn.Module, stage: Stage, pretrained: bool) -> torch.optim.AdamW:
    """Make AdamW with decay on matrices alone; stacked biases (E, hidden) and embeddings are no matrices.

    pretrained: all but NEW came with initial weights and learns at stage.lr_pretrained times the rate.
    """
    groups = {}
    for name, p in student.named_parameters():
        vector = p.ndim < 2 or name.endswith((".b1", ".b2", "embed", "token"))
        factor = stage.lr_pretrained if pretrained and not NEW.match(name) else 1.0
        group = {"params": [], "weight_decay": 0.0 if vector else stage.weight_decay, "factor": factor}
        groups.setdefault((vector, factor), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=stage.lr, fused=True)


def lr_at(step: int, stage: Stage) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine or polynomial decay."""
    warmup = round(stage.warmup * stage.steps)
    if step < warmup:
        return 1e-7 + (stage.lr - 1e-7) * step / warmup
    if stage.decay == "poly":
        return stage.lr * max(0.0, 1 - step / stage.steps) ** 0.9
    share = (step - warmup) / max(1, stage.steps - warmup)
    return 1e-6 + (stage.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * share))


def assign_teachers(B: int, count: int, seed: int, step: int) -> np.ndarray:
    """Give each image one teacher, balanced: shuffled rounds of all teachers, the last one cut.

    Returns (B,) int64. Any run of images has every teacher's number within two of an equal share, so a
    process's own slice of the batch is balanced as well.
    """
    rng = np.random.default_rng((seed, step, 0x7EAC))
    rounds = [rng.permutation(count) for _ in range(-(-B // count))]
    return np.concatenate(rounds)[:B]


# ---------------------------------------------------------------------------------------------- losses
# Every term is scaled so that its mean over processes is the value over the whole batch: sums are
# divided by the count of all processes and multiplied by their number, which DDP's averaging undoes.


def over_all(total: Tensor, count: Tensor | float) -> Tensor:
    """Divide a local sum by the count over all processes (at least 1)."""
    if not torch.is_tensor(count):  # filled on the device: a copy from the host would wait for it
        count = torch.full((), count, device=total.device)
    return total * world_size() / global_sum(count.float()).clamp(min=1)


def global_sum(x: Tensor) -> Tensor:
    """Sum a statistic over processes, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def distill_terms(distilled: dict[str, list[Tensor]], targets: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """L_distill per teacher: sum over levels of 0.9 (1 - cos) + 0.1 SmoothL1 (released code's weights).

    Both hold 4 maps (B_t, C, h, w) per teacher; the smaller map is upsampled to the other. cos is taken
    once per image over the flattened map (released code).
    """
    terms = {}
    for name, maps in distilled.items():
        losses = [map_loss(x.float(), y.float()) for x, y in zip(maps, targets[name], strict=True)]
        terms[f"distill/{name}"] = over_all(torch.stack(losses).sum(), len(maps[0]))
    return terms


def map_loss(x: Tensor, y: Tensor) -> Tensor:
    """Sum the distance of maps x (B, C, h, w) from y (B, C, h', w') over images."""
    if not len(x):
        return x.sum()  # no image of this teacher here: zero, but in the graph for DDP
    x, y = same_grid(x, y)
    cos = F.cosine_similarity(x.flatten(1), y.flatten(1), dim=1)  # (B,)
    smooth = F.smooth_l1_loss(x, y, reduction="none").mean((1, 2, 3))  # (B,)
    return (0.9 * (1 - cos) + 0.1 * smooth).sum()


def same_grid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Upsample the smaller of two maps (B, C, h, w) and (B, C, h', w') to the other's grid, bilinearly."""
    if x.shape[-2:] == y.shape[-2:]:
        return x, y
    size = tuple(max(a, b) for a, b in zip(x.shape[-2:], y.shape[-2:], strict=True))
    return tuple(F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in (x, y))


def decorr_term(levels: list[Tensor], epsilon: float = 0.0) -> Tensor:
    """L_decorr (eq. 7) on levels (B, D, h, w): far tokens of an image should not be alike.

    Mean over token pairs farther apart than r = max(1, 0.1 min(h, w)) patches of max(0, cos - epsilon).
    The paper gives neither r nor epsilon; these are ours. Summed over levels.
    """
    h, w = levels[0].shape[-2:]
    far = patch_distances(h, w, levels[0].device) > max(1.0, 0.1 * min(h, w))  # (h*w, h*w)
    total = levels[0].new_zeros((), dtype=torch.float32)
    for level in levels:
        z = F.normalize(level.float().flatten(2), dim=1)  # (B, D, h*w)
        alike = F.relu(z.transpose(1, 2) @ z - epsilon)  # (B, h*w, h*w)
        total = total + over_all((alike * far).sum(), float(len(z)) * far.sum())
    return total


def official_decorr_term(maps: list[Tensor]) -> Tensor:
    """The released code's L_decorr: on projector outputs (B_1, C, h, w) of the first teacher, every pair
    counts |cos| (1 - exp(-d^2 / 2 s^2)), s = 0.1 min(h, w), halved per level."""
    h, w = maps[0].shape[-2:]
    weight = 1 - torch.exp(-(patch_distances(h, w, maps[0].device) ** 2) / (2 * (0.1 * min(h, w)) ** 2))
    total = maps[0].new_zeros((), dtype=torch.float32)
    for z in maps[:2]:
        z = F.normalize(z.float().flatten(2), dim=1)  # (B_1, C, h*w)
        alike = (z.transpose(1, 2) @ z).abs() * weight
        total = total + 0.5 * over_all(alike.sum(), float(len(z)) * weight.numel())
    return total


def patch_distances(h: int, w: int, device: torch.device) -> Tensor:
    """Return the distances between patch centres (h*w, h*w), in patches."""
    grid = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).float()
    return torch.cdist(grid, grid)


def balance_term(routes: list[prism.Route]) -> Tensor:
    """Load balance summed over MoE blocks: E * sum_e f_e P_e, smallest (K) when experts share alike."""
    loads = mean_loads(routes)
    return loads.shape[1] * (loads * torch.stack([r.prob for r in routes])).sum()


def mean_loads(routes: list[prism.Route]) -> Tensor:
    """Return the share of all processes' tokens that selected each expert (blocks, E)."""
    return global_sum(torch.stack([r.load for r in routes])) / world_size()


def class_loss(x: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C, H, W) with classes (B, H, W), 255 ignored: mean over valid pixels."""
    total = F.cross_entropy(x, target, ignore_index=255, reduction="sum")
    return over_all(total, (target != 255).sum())


def saliency_loss(x: Tensor, target: Tensor) -> Tensor:
    """Two-class cross-entropy of (B, 2, H, W), classes weighted by the batch's share of the other class."""
    valid = target != 255
    positive, count = global_sum(torch.stack([(target == 1).sum(), valid.sum()]).float())
    weight_of_one = 1 - positive / count.clamp(min=1)
    weight = torch.stack([1 - weight_of_one, weight_of_one])
    return over_all(F.cross_entropy(x, target, weight, ignore_index=255, reduction="sum"), valid.sum())


def edge_loss(x: Tensor, target: Tensor) -> Tensor:
    """0.95 / 0.05 weighted logistic loss of logits (B, 1, H, W) with edges (B, H, W) in {0, 1, 255}."""
    x, valid = x.squeeze(1), target != 255
    loss = 0.95 * target * F.softplus(-x) + 0.05 * (1 - target) * F.softplus(x)
    return over_all(loss.masked_fill(~valid, 0).sum(), valid.sum())


def normals_loss(x: Tensor, target: Tensor) -> Tensor:
    """L1 between x / |x| and labelled normals (B, 3, H, W), channels added, mean over valid pixels."""
    valid = (target != 255).all(1)  # (B, H, W)
    loss = (F.normalize(x, dim=1) - target).abs().sum(1)
    return over_all(loss.masked_fill(~valid, 0).sum(), valid.sum())


def depth_loss(x: Tensor, target: Tensor) -> Tensor:
    """Mean |x - d| in metres over known depth; x (B, 1, H, W), target (B, H, W), 255 unknown."""
    valid = target != 255
    return over_all((x.squeeze(1) - target).abs().masked_fill(~valid, 0).sum(), valid.sum())


TASK_LOSSES = {  # task -> weight in the sum, loss
    "semseg": (1.0, class_loss),
    "human_parts": (2.0, class_loss),
    "normals": (10.0, normals_loss),
    "edge": (50.0, edge_loss),
    "sal": (5.0, saliency_loss),
    "depth": (1.0, depth_loss),
}


def loss_terms(out: prism.Output, targets: dict, batch: dict, cfg: prism.PrismConfig, mu: float,
               decorr_levels: int = 2) -> dict[str, tuple[float, Tensor]]:
    """List {name: (weight, term)} of one step; the loss is the sum of weight * term (eq. 8).

    Distillation terms (deconstruct, and recompose times mu): 0.9 L_distill + 0.1 L_decorr + 0.001 balance,
    of which a student has those that it has the tensors for: SAK no levels, dense ones no routes.
    """
    distill, decorr = (1.0, 0.5) if cfg.official else (0.9, 0.1)
    terms = {k: (mu * distill, v) for k, v in distill_terms(out.distilled, targets).items()}
    if out.levels and decorr_levels:
        first = out.distilled[next(iter(cfg.teachers))]
        term = official_decorr_term(first) if cfg.official else decorr_term(out.levels[:decorr_levels])
        terms["decorr"] = (mu * decorr, term)
    if out.routes:
        terms["balance"] = (mu * 0.001, balance_term(out.routes))
    for task, x in out.predicted.items():
        weight, loss = TASK_LOSSES[task]
        terms[task] = (weight, loss(x, batch[task]))
    return terms


# ------------------------------------------------------------------------------------------------- log


class Log:
    """Collect every step's terms on the device; write a line per interval. One host sync per interval."""

    def __init__(self, path: Path, rt: Runtime, stage: str, steps: int, start: int, every: int):
        self.path, self.rt, self.stage, self.steps, self.every = path, rt, stage, steps, every
        self.rows: list[Tensor] = []
        self.names: list[str] = []
        self.first, self.clock = start, time.perf_counter()
        if rt.rank == 0:
            self.keep_lines_before(start)

    def keep_lines_before(self, start: int) -> None:
        """Drop what this stage logged after the checkpoint it goes on from (start 0 drops all of it), and a
        line that was cut short."""
        before = self.path.read_text() if self.path.exists() else ""
        kept = ""
        for line in before.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["stage"] != self.stage or row["step"] <= start:
                kept += line + "\n"
        if kept != before:
            prism.write_file(self.path, lambda file: file.write_text(kept))

    def add(self, values: dict[str, Tensor]) -> None:
        self.names = list(values)
        self.rows.append(torch.stack([v.detach().float().mean() for v in values.values()]))

    def flush(self, step: int, images: int, lr: float, unreadable: int) -> None:
        """Average the interval that ends before `step` over steps and processes, check, print, append."""
        table = global_sum(torch.stack(self.rows)).cpu() / self.rt.world_size  # (steps, values)
        if bad := torch.nonzero(~torch.isfinite(table)).tolist():
            row, column = bad[0]
            raise FloatingPointError(
                f"{self.names[column]} is {table[row, column]} at step {self.first + row} of {self.stage}; "
                "lower --lr or change --seed (the last checkpoint is untouched)")
        seconds = time.perf_counter() - self.clock
        count, means = len(self.rows), table.mean(0).tolist()
        row = {"stage": self.stage, "step": step, **dict(zip(self.names, means, strict=True)),
               "lr": lr, "images_per_s": images * count / seconds, "ms": 1000 * seconds / count,
               "memory_gib": peak_memory_gib(self.rt.device), "unreadable": unreadable,
               "seconds_left": (self.steps - step) * seconds / count}
        self.rows, self.first, self.clock = [], step, time.perf_counter()
        if self.rt.rank == 0:
            try:
                with open(self.path, "a") as file:  # by name each time: whoever rotates logs may take it away
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise OSError(f"cannot write {self.path}: {error.strerror}; free space, then repeat the "
                              "command: it goes on from the last checkpoint") from error
            print(self.line(row), flush=True)

    def line(self, row: dict) -> str:
        """Format the numbers that people watch; the rest is in the file."""
        def values(*starts):
            return {k: row[k] for k in self.names if k.startswith(starts)}

        routed = values("lambda", "load", "dead")
        terms = " ".join(f"{k.split('/')[-1]} {row[k]:.3f}" for k in self.names if k not in routed)
        minutes, seconds = divmod(int(row["seconds_left"]), 60)
        routes = ""
        if routed:
            gates = " ".join(f"{gate:.2f}" for gate in values("lambda").values())
            load, dead = max(values("load").values()), sum(values("dead").values())
            routes = f"lambda {gates} | load max/mean {load:.2f} dead {dead:.0f} | "
        return (f"{self.stage} {row['step']}/{self.steps}  {terms} | {routes}lr {row['lr']:.1e} "
                f"| {row['images_per_s']:.0f} images/s {row['ms']:.0f} ms {row['memory_gib']:.1f} GiB "
                f"left {minutes}:{seconds:02d}")


def routing_values(routes: list[prism.Route], blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """Summarise routes per MoE block: mean lambda, load max/mean, experts that no token chose."""
    if not routes:  # a student without experts
        return {}
    loads, values = mean_loads(routes), {}
    for i, route, load in zip(blocks, routes, loads, strict=True):
        values[f"lambda/{i}"] = route.gate
        values[f"load/{i}"] = load.max() / load.mean()
        values[f"dead/{i}"] = (load == 0).sum()
    return values


def peak_memory_gib(device: torch.device) -> float:
    """Return peak memory so far: allocated on the GPU, or resident on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


# --------------------------------------------------------------------------------------- save and resume


class Run(NamedTuple):
    """One stage, ready to go on from step `start`."""

    name: str
    stage: Stage
    student: prism.Student
    optimizer: torch.optim.Optimizer
    dataset: data.Samples
    start: int
    provenance: dict  # plain values: data, teachers, initial weights, code, versions, schedule


def prepare(args: Args, rt: Runtime, name: str, taught: teachers.Teachers) -> Run:
    """Open data, build the student, fill it from the checkpoint to resume or from initial weights."""
    stage = choose_recipe(args, name)
    dataset = first_rank_first(rt, lambda: open_train(args, stage))
    stage, path = choose_recipe(args, name, len(dataset)), args.out_dir / stage.checkpoint
    tasks = choose_tasks(args, dataset) if stage.view == "multitask" else {}
    stored = None if args.bench else first_rank_first(rt, lambda: read_last(args, path))
    source = init_source(args, name)
    moved = bool(stored and source and source.endswith(".pt")) and not Path(source).exists()
    given = stored if moved else read_init(source)  # weights that are no longer needed may be gone
    official = given is not None and given["config"].get("official", False)  # its router has one matrix more
    student = build_student(args, stage, teachers=taught.widths, tasks=tasks, official=official)
    origin, report = (given.get("provenance", {}).get("init"), "") if moved else initial_weights(
        student, source, given)
    provenance = {
        "data": dataset.source, "teachers": taught.provenance, "init": origin, "code": git_revision(),
        "torch": str(torch.__version__), "schedule": schedule_of(args, stage, taught),
    }
    start = 0
    if stored:
        check_same_run(path, stored, {
            "stage": name, "seed": args.seed, "steps": stage.steps, "initial weights": origin,
            **{f"student's {k}": v for k, v in asdict(student.cfg).items()}, **provenance["schedule"]})
        prism.load_strict(student, stored["model"], path)
        start, report = stored["step"], f"resumed {path} at step {stored['step']}"
    later = args.out_dir / ON_PASCAL.checkpoint
    if args.stage == "all" and name == "deconstruct" and start < stage.steps and later.exists():
        raise ValueError(f"{later} began with another {path.name} than is to be trained; go on with --stage "
                         "recompose, start both stages over with --fresh, or choose another --out-dir")
    place(args, rt, student)
    optimizer = build_optimizer(student, stage, pretrained=origin != "random weights")
    if stored:
        load_optimizer(optimizer, stored["optimizer"], path)
    run = Run(name, stage, student, optimizer, dataset, start, provenance)
    if rt.rank == 0:
        print_derived(args, rt, run, report)
    return run


def schedule_of(args: Args, stage: Stage, taught: teachers.Teachers) -> dict:
    """List what may not change between a checkpoint and the run that resumes it."""
    return {"data": args.data, "batch size": stage.batch_size, "lr": stage.lr,
            "weight decay": stage.weight_decay, "distill weight": args.distill_weight,
            "decorr levels": args.decorr_levels, "every teacher": serves_all(args),
            "teachers": {name: [p.get(k) for k in ("sha256", "settings", "size")]
                         for name, p in taught.provenance.items()}}


def read_init(source: str | None) -> dict | None:
    """Read a student to start from; None where there is none, or a timm ViT. Raises OSError, ValueError."""
    ours = source is not None and (source.endswith(".pt") or prism.is_student(source))
    return prism.read_checkpoint(source) if ours else None


def initial_weights(student: prism.Student, source: str | None, given: dict | None) -> tuple[str, str]:
    """Fill a new student from what `read_init` read; returns file with hash, and a report."""
    if source is None:
        return "random weights", "random weights"
    if given is None:
        weights = teachers.read_source(source)
        report = prism.start_from_vit(student, weights.tensors, weights.path)
        student.expect(*(weights.hints.get(k, teachers.HALF[k]) for k in ("mean", "std")))
        origin, digest = Path(weights.provenance["source"]).name, weights.provenance["sha256"][:12]
        return f"{origin} {digest}", f"{source}: {report}"
    path = Path(source)
    cfg, state = prism.config_and_weights(given, path)
    check_same_kind(path, cfg, student.cfg)
    state["pos_embed"] = prism.resize_pos(state["pos_embed"], tuple(cfg.grid), student.cfg.grid)
    new = ("heads", "task_embed", "mixers")
    report = prism.load_strict(student, state, path, new=new, dropped=new)
    report += ", arithmetic of the released code" * cfg.official
    student.expect(cfg.mean, cfg.std)
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}", f"{path}: {report}"


def check_same_kind(path: Path, cfg: prism.PrismConfig, ours: prism.PrismConfig) -> None:
    """Raise ValueError where weights are of another size than the student, or know other teachers.

    Teachers in another order, or other attention heads, would fit by shape, and be wrong.
    """
    theirs, ours = ({
        "student": c.student, "width": c.dim, "blocks": c.depth, "attention heads": c.heads,
        "teachers": " ".join(f"{name} ({width} wide)" for name, width in c.teachers.items()) or "none",
    } for c in (cfg, ours))
    if differ := [f"{k} {theirs[k]} there, {ours[k]} here" for k in ours if ours[k] != theirs[k]]:
        raise ValueError(f"cannot start from {path}: {'; '.join(differ)}; use its --student, --size and "
                         "--teachers, in its order (dinov2=SOURCE gives a teacher the name dinov2)")


def read_last(args: Args, path: Path) -> dict | None:
    """Read the checkpoint that a stage goes on from; None: there is none. Raises ValueError or OSError.

    Where it is damaged or gone and --resume previous asks for it, the one before takes its place.
    """
    previous = previous_of(path)
    way = f"--resume previous goes on from {previous}, " * previous.exists() + "--fresh starts over"
    try:
        return prism.read_checkpoint(path, otherwise=way)
    except FileNotFoundError:
        if not previous.exists():
            return None
        why = f"{path} is gone, but not the one before it: {way}"
        if args.resume == "auto":
            raise FileNotFoundError(why) from None
    except ValueError as error:
        why = prism.one_line(error)
        if args.resume == "auto" or not previous.exists():
            raise
        os.replace(path, path.with_suffix(".damaged.pt"))
    print(why, flush=True)
    os.replace(previous, path)
    return prism.read_checkpoint(path, otherwise="--fresh starts over")


def previous_of(path: Path) -> Path:
    return path.with_suffix(".previous.pt")


def set_aside(args: Args) -> None:
    """Give checkpoints of the stages that start over, and the log, names that no run reads."""
    for stage in stage_names(args.stage):
        path = args.out_dir / choose_recipe(args, stage).checkpoint
        for file in filter(Path.exists, (path, previous_of(path))):
            os.replace(file, file.with_suffix(".old.pt"))
    if (log := args.out_dir / "log.jsonl").exists():
        shutil.copyfile(log, log.with_suffix(".old.jsonl"))


def check_same_run(path: Path, stored: dict, ours: dict) -> None:
    """Raise ValueError where a checkpoint is of another run than the one that is to go on from it."""
    otherwise = "choose another --out-dir, or start over with --fresh"
    if missing := sorted(prism.CONTENT.keys() - stored.keys()):
        raise ValueError(f"cannot go on from {path}: it is for use alone, without {missing[0]}; name it by "
                         f"--init, and {otherwise}")
    if not 0 <= stored["step"] <= stored["steps"]:
        raise ValueError(f"{path} is at step {stored['step']} of {stored['steps']}: {otherwise}")
    config = asdict(prism.config_from(stored["config"], path))  # older ones lack newer fields
    origin, schedule = (stored["provenance"].get(k) for k in ("init", "schedule"))
    theirs = {**stored, "initial weights": origin, **{f"student's {k}": v for k, v in config.items()},
              **(schedule if isinstance(schedule, dict) else {})}
    # as text: whatever a file holds has one, and the order of teachers shows
    texts = {k: [" ".join(str(side.get(k)).split()) for side in (theirs, ours)] for k in ours}
    if detail := [f"{k} {there} there, {here} here" for k, (there, here) in texts.items() if there != here]:
        raise ValueError(f"cannot go on from {path}: {'; '.join(detail)}; repeat the command that wrote it, "
                         f"{otherwise}")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: Path) -> None:
    """Load AdamW's moments; a sharded parameter takes its own part of them. Raises ValueError."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        moments = [state["state"][i] for i in range(len(params))]
        fits = all({k: t.shape for k, t in own.items() if prism.is_dense(t) and prism.is_finite(t)}
                   == {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                   for own, p in zip(moments, params, strict=True))
    except Exception:  # a stranger's file may hold anything
        fits = False
    if not fits:
        raise ValueError(f"the optimizer's state in {path} does not fit; start over with --fresh")
    for own, p in zip(moments, params, strict=True):
        if hasattr(p, "placements"):
            from torch.distributed.tensor import distribute_tensor

            own.update({k: distribute_tensor(t, p.device_mesh, p.placements)
                        for k, t in own.items() if t.shape == p.shape})
    optimizer.load_state_dict({"state": dict(enumerate(moments)),
                               "param_groups": optimizer.state_dict()["param_groups"]})


def whole(state):
    """Return a state dict with every sharded tensor put together; all processes must call this."""
    return tree_map(lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t, state)


def save_checkpoint(args: Args, rt: Runtime, run: Run, step: int) -> None:
    """Write all that going on and eval.py need, atomically, on the first rank; keep the one before."""
    content = {
        "model": whole(run.student.state_dict()), "config": asdict(run.student.cfg),
        "optimizer": whole(run.optimizer.state_dict()), "stage": run.name, "step": step,
        "steps": run.stage.steps, "seed": args.seed, "provenance": run.provenance,
    }
    if rt.rank == 0:
        path = args.out_dir / run.stage.checkpoint
        prism.write_checkpoint(path, content, previous_of(path))


def git_revision() -> str:
    """Return the commit of this code, marked when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------ main


def print_derived(args: Args, rt: Runtime, run: Run, report: str) -> None:
    """Print every number that follows from the arguments."""
    stage, images = run.stage, len(run.dataset)
    rates = sorted({stage.lr * group["factor"] for group in run.optimizer.param_groups}, reverse=True)
    total, active = (n / 1e6 for n in prism.count_parameters(run.student))
    part = stage.batch_size // rt.world_size // args.accumulate
    print(f"\n{run.name}: {stage.steps} steps x {stage.batch_size} images of {images} = {stage.epochs:.1f} "
          f"epochs at {stage.image_size[0]} x {stage.image_size[1]} px; {rt.world_size} processes x "
          f"{args.accumulate} passes x {part} images")
    print(f"  student {args.student} {args.size}: {total:.2f} M parameters, all trainable, {active:.2f} M "
          f"active per token; contexts {' '.join(run.student.contexts)}")
    print(f"  {rt.device}, {rt.amp or torch.float32}, lr {' and '.join(f'{rate:g}' for rate in rates)} "
          f"{stage.decay} after {round(stage.warmup * stage.steps)} steps of warm-up, weight decay "
          f"{stage.weight_decay:g}, clip {stage.clip:g}, seed {args.seed}; {report}", flush=True)


class Given:
    """Stands for teachers: gives what they once gave; nothing, where there are none."""

    def __init__(self, maps: dict[str, list[Tensor]] | None = None):
        self.maps, self.widths, self.provenance = maps or {}, {}, {}

    def targets(self, images: Tensor, teacher_ids: Tensor | None) -> dict[str, list[Tensor]]:
        """Return the maps, whatever the images."""
        return self.maps


def place(args: Args, rt: Runtime, student: prism.Student) -> None:
    """Move the student to the device; wrap, compile and shard its blocks as the arguments say."""
    student.to(rt.device).train()
    if compiles(args, rt):
        student.compile_parts()
    for block in student.blocks if args.recompute else ():  # around the compiled one: it cannot look inside
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if args.shard:
        from torch.distributed.fsdp import fully_shard  # takes a second to import

        # harmless: nobody changes these views in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for part in (*student.blocks, student):
            fully_shard(part)


def distribute(args: Args, rt: Runtime, student: nn.Module) -> nn.Module:
    """Average gradients over processes; buffers are equal on all of them without being sent."""
    if rt.world_size == 1 or args.shard:
        return student
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the argument, 2.11 has no other
        return DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)


def exchange(model: nn.Module, last: bool):
    """Return the context of one backward pass: gradients are exchanged in a step's last one alone."""
    if hasattr(model, "set_requires_gradient_sync"):  # sharded
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def pass_over(args: Args, rt: Runtime, run: Run, model: nn.Module, taught: teachers.Teachers, batch: dict,
              mark: Callable[[str], None]) -> dict[str, Tensor]:
    """Run one batch forward and backward; its share of the step's gradient is 1 / args.accumulate.

    Returns every value for the log, detached.
    """
    cfg, ids = run.student.cfg, batch.get("teacher")
    with torch.autocast(rt.device.type, rt.amp) if rt.amp else nullcontext():
        targets = taught.targets(batch["image"], ids)
        mark("teachers")
        out = model(batch["image"], ids, tuple(cfg.tasks))
        mu = args.distill_weight if cfg.tasks else 1.0
        terms = loss_terms(out, targets, batch, cfg, mu, args.decorr_levels)
        loss = sum(weight * term for weight, term in terms.values())
    mark("student forward")
    (loss / args.accumulate).backward()
    mark("backward")
    return {**{k: v.detach() for k, (_, v) in terms.items()}, "loss": loss.detach(),
            **routing_values(out.routes, cfg.moe_blocks)}


def serves_all(args: Args) -> bool:
    """Tell whether every image serves every teacher."""
    return args.student == "sak" if args.every_teacher is None else args.every_teacher


def choose_teachers(args: Args, run: Run, step: int) -> Tensor:
    """Choose whom every image of a step serves: one teacher (B,), or all K of them (B, K).

    Returns int64 on the host.
    """
    B, K = run.stage.batch_size, len(run.student.cfg.teachers)
    if serves_all(args):
        return torch.arange(K).expand(B, K)
    return torch.from_numpy(assign_teachers(B, K, args.seed, step))


def update(args: Args, rt: Runtime, run: Run, model: nn.Module, taught: teachers.Teachers, batch: dict,
           step: int, mark: Callable[[str], None] = lambda part: None) -> dict[str, Tensor]:
    """Make one step of the optimizer from this process's batch; returns every value for the log.

    Nothing here waits for the device. mark is called after each part, with its name.
    """
    stage, B, parts = run.stage, run.stage.batch_size // rt.world_size, args.accumulate
    batch = {k: v.to(rt.device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
    if run.student.cfg.teachers:
        batch["teacher"] = choose_teachers(args, run, step)[rt.rank * B : (rt.rank + 1) * B]
    for group in run.optimizer.param_groups:
        group["lr"] = group["factor"] * lr_at(step, stage)
    values = []
    for part in range(parts):
        torch.manual_seed(seed_of(args.seed, step, rt.rank, part))
        share = {k: v[part * B // parts : (part + 1) * B // parts] for k, v in batch.items()}
        with exchange(model, part == parts - 1):
            values.append(pass_over(args, rt, run, model, taught, share, mark))
    norm = whole(nn.utils.clip_grad_norm_(run.student.parameters(), stage.clip))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    mark("optimizer")
    return {**{k: sum(v[k].float().mean() for v in values) / parts for k in values[0]}, "grad_norm": norm}


def open_batches(args: Args, rt: Runtime, run: Run) -> Iterator[dict]:
    """Start the loader at the run's first step."""
    workers = args.workers
    if workers is None:  # the rendered world lies in memory: on a CPU, workers would only take cores
        workers = min(16, data.core_count() // rt.world_size) if rt.device.type == "cuda" else 0
    return data.batches(run.dataset, run.stage.batch_size // rt.world_size, run.stage.steps, run.start,
                        args.seed, rt.rank, rt.world_size, workers)


def fit(args: Args, rt: Runtime, run: Run, taught: teachers.Teachers) -> int:
    """Train one stage from its start to its end: the one loop of every stage.

    Returns the signal that ended it before, 0 for none.
    """
    stage, start = run.stage, run.start
    model = distribute(args, rt, run.student)
    log = Log(args.out_dir / "log.jsonl", rt, run.name, stage.steps, start, args.log_every)
    batches = data.track(open_batches(args, rt, run), run.name, stage.steps, start, lines=False,
                         quiet=rt.rank > 0)
    with Stop() as stop:
        for step, batch in enumerate(batches, start):
            log.add(update(args, rt, run, model, taught, batch, step))
            done, stopped = step + 1, stop.agreed()
            saves = done % (args.save_every or max(100, stage.steps // 100)) == 0 or done == stage.steps
            if saves or stopped or done % args.log_every == 0:
                # raises before bad weights are saved
                log.flush(done, stage.batch_size, lr_at(step, stage), run.dataset.unreadable.total())
            if saves or stopped:
                save_checkpoint(args, rt, run, done)
            if stopped:
                if rt.rank == 0:
                    print(f"{signal.Signals(stopped).name}: {args.out_dir / stage.checkpoint} holds step "
                          f"{done} of {stage.steps}; the same command goes on", flush=True)
                return stopped
    return 0


def bench(args: Args, rt: Runtime, run: Run, taught: teachers.Teachers) -> None:
    """Time steps as `fit` makes them, the student alone, and every part; write nothing."""
    N, B = args.bench, run.stage.batch_size
    run = run._replace(stage=run.stage._replace(steps=2 * N + 4), start=0)
    model, batches = distribute(args, rt, run.student), open_batches(args, rt, run)
    parts: dict[str, list[float]] = {}

    def now() -> float:
        if rt.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def images_per_s(count: int, taught, batch: dict | None = None, split: bool = False) -> float:
        clock = start = now()

        def mark(part: str) -> None:
            nonlocal clock
            if split:  # waits for the device after each part
                parts.setdefault(part, []).append((then := now()) - clock)
                clock = then

        for _ in range(count):
            own = batch or next(batches)
            mark("data")
            update(args, rt, run, model, taught, own, 0, mark)
        return B * count / (now() - start)

    images_per_s(3, taught)  # compiles, warms up
    rates = {"whole steps": images_per_s(N, taught)}
    images_per_s(N, taught, split=True)
    batch = next(batches)
    ids = choose_teachers(args, run, 0).chunk(rt.world_size)[rt.rank] if taught.widths else None
    with torch.autocast(rt.device.type, rt.amp) if rt.amp else nullcontext():
        given = Given(taught.targets(batch["image"].to(rt.device), ids))
    rates["student alone, one batch"] = images_per_s(N, given, batch)
    peak = peak_memory_gib(rt.device)
    twin = prism.build(run.student.cfg).to(rt.device).train()  # neither compiled nor recomputing: countable
    with FlopCounterMode(display=False) as counter:
        twin_run = run._replace(student=twin, optimizer=build_optimizer(twin, run.stage, pretrained=False))
        update(args, rt, twin_run, twin, given, batch, 0)
    if rt.rank == 0:
        print_rates(args, rt, rates, parts, counter.get_total_flops() * rt.world_size / B)
        print(f"  peak memory {peak:.2f} GiB", flush=True)


def print_rates(args: Args, rt: Runtime, rates: dict[str, float], parts: dict[str, list[float]],
                flops: float) -> None:
    """Print what `bench` measured; flops: of the student, per image, forward and backward."""
    side, dtype = 8192 if rt.device.type == "cuda" else 2048, rt.amp or torch.float32
    x = torch.randn(side, side, device=rt.device, dtype=dtype)
    ms = prism.time_interleaved({"": lambda: x @ x}, rt.device, 5)[""]
    peak = 2 * side**3 / ms * 1000 * rt.world_size
    total = sum(map(statistics.median, parts.values()))
    how = "compiled" if compiles(args, rt) else "eager"
    print(f"\nmedians of {args.bench} steps, {rt.device}, {dtype}, {how}")
    for part, times in parts.items():
        median = statistics.median(times)
        print(f"  {part:<16} {1000 * median:9.1f} ms {median / total:6.1%}")
    for name, rate in rates.items():
        print(f"  {name:<24} {rate:9.1f} images/s, {flops * rate / 1e12:.3f} TFLOP/s of the student's "
              f"{flops / 1e9:.1f} GFLOP per image: {flops * rate / peak:.0%} of a {side} x {side} product")


def seed_of(*numbers: int) -> int:
    """Mix numbers into one seed."""
    return np.random.SeedSequence(numbers).generate_state(1)[0].item()


def compiles(args: Args, rt: Runtime) -> bool:
    return rt.device.type == "cuda" if args.compile is None else args.compile


@contextmanager
def hold(folder: Path, rt: Runtime):
    """Keep other runs out of a folder while this one writes to it; clear what killed ones left."""
    with open(folder / ".lock", "w") as file:
        if rt.rank == 0:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process, however it ends
            except (BlockingIOError, PermissionError) as error:
                raise OSError(f"another run trains into {folder}; wait for it, or choose another "
                              "--out-dir") from error
            except OSError:
                pass  # a file system without locks keeps nobody out
            for part in folder.glob(".*.part"):
                part.unlink()
        yield


def train(args: Args) -> None:
    """Check, raise or load the teachers, run the stages one after the other."""
    check_args(args)
    rt = start_runtime(args.device)
    torch.set_float32_matmul_precision("high")
    with explain_lost_process(), nullcontext() if args.bench else hold(args.out_dir, rt):
        stopped = train_stages(args, rt)
    if rt.world_size > 1:
        dist.destroy_process_group()
    if stopped:
        sys.exit(128 + stopped)


def train_stages(args: Args, rt: Runtime) -> int:
    """Train all that is asked for; returns the signal that ended it before, 0 for none."""
    taught = Given() if not args.distill else first_rank_first(
        rt, lambda: teachers.Teachers(args.teachers, rt.device, compiles(args, rt), args.sam_size))
    for who, provenance in taught.provenance.items() if rt.rank == 0 else ():
        print(f"teacher {who}: {teachers.describe(provenance)}")
    if args.fresh and rt.rank == 0 and not args.bench:
        set_aside(args)
    for name in stage_names(args.stage):
        run = prepare(args, rt, name, taught)
        if args.bench:
            bench(args, rt, run, taught)
            return 0
        if run.start < run.stage.steps and (stopped := fit(args, rt, run, taught)):
            return stopped
        if rt.rank == 0:
            print(f"{args.out_dir / run.stage.checkpoint} holds all {run.stage.steps} steps")
        if rt.world_size > 1:
            dist.barrier()  # the next stage reads the file on every rank
    if rt.rank == 0 and name == "recompose":
        print(f"next: python eval.py --ckpt {args.out_dir / run.stage.checkpoint}")
    return 0


def main() -> None:
    """Run the stages that the command line names."""
    args = tyro.cli(Args, description=__doc__)
    prism.exit_with_one_line(lambda: train(args), args.debug)


if __name__ == "__main__":
    main()
