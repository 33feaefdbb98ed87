"""Train a student: deconstruct several teachers into experts, then recompose them for tasks.

    python train.py                                                   # both stages, toy size, CPU or GPU
    torchrun --nproc_per_node=8 train.py --stage deconstruct          # eight GPUs, or CPU processes
    torchrun --nproc_per_node=8 train.py --stage recompose            # goes on from out/deconstruct.pt
    python train.py --stage caption                                   # Prismer, around out/prism.pt

One loop serves every stage: a stage is a recipe (STAGES) and the loss terms that its batches feed.
`--batch-size` counts the images of a step over all processes. Order, augmentation, teachers and noise depend
on (seed, step) alone: the same command again goes on from the last checkpoint; --fresh starts over. Ctrl-C
and SIGTERM end a run after the step at hand, saved. out/log.jsonl has every loss term by name.
"""

import data  # first: it settles how threads wait, before torch is loaded

# isort: split
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import prism
import teachers

# ------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    """Train PRISM. Defaults run the whole road on the rendered world in minutes."""

    stage: Literal["all", "deconstruct", "recompose", "caption"] = "all"  # all: deconstruct, then recompose
    size: Literal["toy", "small", "base", "large"] | None = None  # default: stage 1's, or toy
    student: Literal["prism", "sak", "dense", "wide", "moe"] | None = None  # sak: the baseline; then controls
    without: tuple[Literal["anchor", "shared", "film", "context"], ...] = ()  # ablate parts of prism
    experts: int | None = None  # routed experts per MoE block (default: the size's)
    top_k: int | None = None  # experts per token (default: the size's)
    expert_ratio: float | None = None  # hidden width of shared and routed experts over D; 1 is "lite"
    gate_start: float | None = None  # lambda of a new prism (default: the size's)
    projector: Literal["mlp", "linear"] | None = None  # to the teachers' features (default: the size's)
    recompose: Literal["route", "views"] | None = None  # stage 2, see prism.Prism (default: the size's)
    every_teacher: bool | None = None  # each image serves all teachers, or one (default: sak all, others one)
    decorr_levels: int = 2  # the first levels are decorrelated; 0: none
    data: str = "world"  # world, FOLDER, KIND:FOLDER: folder, pascal, nyud; stage 1: images, imagenet, tars
    teachers: tuple[str, ...] = ()  # `python teachers.py`; or NAME=FOLDER (default: as for size, or toys)
    sam_size: int | None = None  # longest side of SAM's input, pixels; less than 1024 is an approximation
    tasks: tuple[str, ...] = ()  # default: all that the data has
    image_size: tuple[int, ...] | None = None  # side, or height and width, pixels (default: the recipe's)

    decoder: str = "toy"  # of caption: toy, roberta-base, roberta-large, OWNER/NAME on the hub, or a folder
    caption_experts: tuple[str, ...] = ()  # maps that it reads (default: those of Prismer that it draws)
    prismer_z: bool = False  # it reads no maps: the control
    prefix: str = ""  # how all captions begin, such as "A picture of"; no part of the loss

    steps: int | None = None  # optimizer updates per stage (default: the recipe's)
    epochs: float | None = None  # the same as passes over the data
    batch_size: int | None = None  # images per step over all processes (default: the recipe's)
    accumulate: int | None = None  # passes per step, for memory (default: what a CPU's stage 1 needs, or 1)
    lr: float | None = None  # peak learning rate (default: the recipe's)
    weight_decay: float | None = None  # on matrices (default: the recipe's)
    distill_weight: float = 1.0  # mu, weight of the distillation terms beside the tasks in recompose
    distill: bool = True  # --no-distill: recompose without teachers and from random weights, or --init
    freeze: Literal["trunk", "vision", "both"] | None = None  # recompose: trunk (heads learn); caption: both

    out_dir: Path = Path("out")  # checkpoints and log.jsonl
    init: str | None = None  # checkpoint or timm ViT: augreg-s, FILE, ... (recompose: OUT_DIR/deconstruct.pt)
    fresh: bool = False  # start over, whatever OUT_DIR holds
    seed: int = 0  # of weights, order, augmentation, noise
    device: str | None = None  # default: cuda if there is one, else cpu
    compile: bool | None = None  # torch.compile student and teachers (default: on cuda)
    recompute: bool = False  # activation checkpointing: blocks run twice, but keep only their inputs
    processes: int | None = None  # on a CPU (default: one per core if memory and batch allow); GPUs: torchrun
    workers: int | None = None  # loader processes per training process (default: on cuda all cores' share)
    log_every: int = 20  # steps between log lines
    save_every: int | None = None  # steps between checkpoints (default: 100, or 1 % of the stage if more)
    debug: bool = False  # full traceback on errors

    def stages(self) -> list[str]:
        """List the stages to run, in order."""
        return ["deconstruct", "recompose"] if self.stage == "all" else [self.stage]


class Stage(NamedTuple):
    """A stage's recipe."""

    checkpoint: str  # file in out_dir
    view: Literal["distill", "multitask", "caption"]  # augmentation; caption: none
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
ON_CAPTIONS = Stage(
    "prismer.pt", "caption", image_size=(480, 480), steps=0, epochs=3, batch_size=256, lr=5e-5, lr_batch=1,
    lr_pretrained=1.0, weight_decay=0.05, warmup=0.0, decay="cosine", clip=math.inf)
TOY = {"dim": 96, "depth": 2, "heads": 4, "positions": 130, "latents": 8, "resampler": 2, "dropout": 0.0}
STAGES = {  # stage -> kind of data -> recipe: the paper's, but the rendered world's, which takes minutes
    "deconstruct": {
        "world": ON_IMAGES._replace(image_size=(64, 64), steps=350, epochs=0, batch_size=32, lr=3e-3,
                                    lr_batch=1),
        "images": ON_IMAGES, "folder": ON_IMAGES, "pascal": ON_IMAGES, "nyud": ON_IMAGES,
    },
    "recompose": {
        "world": ON_PASCAL._replace(image_size=(64, 64), steps=640, batch_size=8, lr=3e-3, lr_pretrained=0.3,
                                    warmup=0.05),
        "folder": ON_PASCAL._replace(image_size=(384, 384), steps=0, epochs=100),  # a guess
        "pascal": ON_PASCAL,
        "nyud": ON_PASCAL._replace(image_size=(448, 576), batch_size=12),
    },
    "caption": {
        "world": ON_CAPTIONS._replace(image_size=(64, 64), steps=900, epochs=0, batch_size=4, lr=2e-3,
                                      lr_pretrained=0.1, warmup=0.1),
        "captions": ON_CAPTIONS, "folder": ON_CAPTIONS,
    },
}

# ---------------------------------------------------------------------------------------------- set-up


class Runtime(NamedTuple):
    """Where this process computes, and which share of each batch is its own."""

    rank: int
    world_size: int
    device: torch.device
    amp: torch.dtype | None  # autocast dtype, None for float32

    def autocast(self):
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()


def process_place() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun tells them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_runtime(device: str | None) -> Runtime:
    """Join torchrun's processes if there are any; pick device and dtype. Raises ValueError."""
    chosen, (rank, world_size) = prism.choose_device(device), process_place()
    gpu = chosen.type == "cuda"
    if gpu and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():  # hours: the first rank may be training toys
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=3))
    return Runtime(rank, world_size, chosen, torch.bfloat16 if gpu else None)


def first_rank_first(rt: Runtime, make):
    """Run `make` on rank 0, then on the others, which find its result in the cache."""
    result = make() if rt.rank == 0 else None
    if rt.world_size > 1:
        dist.barrier()
    return result if rt.rank == 0 else make()


@contextmanager
def noted_signals():
    """Note SIGTERM and Ctrl-C in a list, so that a run ends between two steps; asked twice, at once."""
    received, before = [], {}

    def note(kind: int, _):
        signal.signal(kind, before[kind])
        received.append(kind)

    before |= {kind: signal.signal(kind, note) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def start_processes(args: Args) -> list[subprocess.Popen]:
    """On a CPU, start a process per core beside this one: two of one thread lose less to a busy neighbour.

    As many as share each step evenly, with 4 images and 2 GiB of free memory each. torchrun's are left alone.
    """
    if process_place()[1] > 1 or prism.choose_device(args.device).type != "cpu":
        return []
    most = args.processes or int(min(data.core_count(), free_memory() / 2**31))
    least = 1 if args.processes else 4  # images; fewer do not pay for the exchanges
    parts = [choose_recipe(args, name).batch_size // (args.accumulate or 1) for name in args.stages()]
    shares = (n for n in range(1, most + 1) if not any(part % n or part < least * n for part in parts))
    count = max(shares, default=1)
    if count == 1:
        return []
    threads = max(1, data.core_count() // count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "RANK": "0",
                       "WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(threads)}
    torch.set_num_threads(threads)
    return [subprocess.Popen(sys.orig_argv, env=os.environ | {"RANK": str(k), "PRISM_CHILD": "1"},
                             start_new_session=True)  # Ctrl-C is the first one's to hear
            for k in range(1, count)]


@contextmanager
def explained():
    """Turn what torch raises when another process is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not re.search("peer|connection|gloo|NCCL", str(error), re.IGNORECASE):
            raise
        raise ConnectionError(f"process {dist.get_rank()} ends because another one did: see what that one "
                              f"says, repeat the command ({prism.one_line(error)})") from error


@contextmanager
def held(folder: Path, rank: int):
    """Keep other runs out of a folder while this one writes to it."""
    with open(folder / ".lock", "a") as file:
        try:
            if rank == 0:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process, however it ends
                for part in folder.glob(".*.part"):  # of a run that was killed while it saved
                    part.unlink()
        except (BlockingIOError, PermissionError) as error:
            raise OSError(f"another run trains into {folder}; wait, or choose another --out-dir") from error
        yield


def check_args(args: Args) -> None:
    """Raise ValueError or OSError for what can be seen before anything is rendered or built."""
    for flag in ("steps", "epochs", "batch_size", "accumulate", "processes", "log_every", "save_every"):
        if (value := getattr(args, flag)) is not None and value <= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {value} is not above 0")
    patch, (_, processes) = prism.SIZES[args.size or "toy"].patch, process_place()
    passes = args.accumulate or 1
    parts = processes * passes
    if args.freeze and args.stage != ("recompose" if args.freeze == "trunk" else "caption"):
        raise ValueError(f"--freeze {args.freeze} is not for --stage {args.stage}: recompose takes trunk, "
                         "caption vision or both")
    if args.stage == "caption":
        args.distill = False
    elif args.distill:
        teachers.name_sources(args.teachers)
    elif args.stage != "recompose":
        raise ValueError(f"--no-distill leaves nothing to {args.stage}; add --stage recompose")
    if args.student in ("prism", "moe") and args.every_teacher:
        raise ValueError(f"--every-teacher True: {args.student} serves a teacher per image; use sak or dense")
    prism.check_config(student_config(args))
    for name in args.stages():
        stage = choose_recipe(args, name)
        if wrong := [side for side in stage.image_size if side % patch or side <= 0]:
            raise ValueError(f"image size {wrong[0]} is not a multiple of the patch size {patch}")
        if args.distill and stage.batch_size < len(args.teachers):
            raise ValueError(f"batch size {stage.batch_size} is smaller than the number of teachers "
                             f"({len(args.teachers)}); every step needs an image for each")
        if stage.batch_size % parts:
            raise ValueError(f"batch size {stage.batch_size} does not split over {processes} processes x "
                             f"{passes} passes; use {stage.batch_size // parts * parts or parts}")
    first = args.stages()[0]
    source, own = init_source(args, first), args.out_dir / choose_recipe(args, first).checkpoint
    begun = own.exists() and not args.fresh
    if source and source.endswith(".pt") and not (begun or Path(source).is_file()):
        before = "recompose" if first == "caption" else "deconstruct"
        raise FileNotFoundError(f"checkpoint {source} does not exist; name one with --init, or make it with "
                                f"--stage {before}")


SWITCHES = ("student", "without", "experts", "top_k", "expert_ratio", "gate_start", "projector", "recompose")


def inherit(args: Args) -> dict:
    """Fill in what is left open of size, student and teachers: as stage 2's first weights have it, or toys.

    Returns their checkpoint without weights, {} if there is none.
    """
    begun = None if args.fresh else args.out_dir / ON_PASCAL.checkpoint
    known = (init_source(args, args.stage), begun) if args.stage in ("recompose", "caption") else ()
    path = next((path for path in known if path and prism.is_student(path)), None)
    stored = prism.read_checkpoint(path) if path else {}
    cfg = prism.config_from(stored["config"], path) if stored else prism.SIZES[args.size or "toy"]
    if isinstance(cfg, prism.PrismerConfig):
        raise ValueError(f"{path} is a captioner; start from the student that it was made of")
    shape = (cfg.dim, cfg.depth, cfg.patch)
    alike = (size for size, c in prism.SIZES.items() if (c.dim, c.depth, c.patch) == shape)
    args.size = args.size or next(alike, "toy")
    for name in SWITCHES if stored else ("student",):
        setattr(args, name, getattr(args, name) or getattr(cfg, name))
    found = stored.get("provenance", {}).get("teachers", {})
    args.teachers = args.teachers or tuple(
        f"{name}={was.get('source', name)}" for name, was in found.items()
    ) or tuple(teachers.TOYS)
    rough = (was["size"] for was in found.values() if "approximation" in was)
    args.sam_size = args.sam_size or next(rough, None)
    args.distill = args.distill and not args.freeze
    return {k: stored[k] for k in ("config", "provenance") if k in stored and args.stage == "recompose"}


def init_source(args: Args, name: str) -> str | None:
    """Tell where a stage's first weights are: --init, or for stage 2 stage 1's; None: random weights."""
    source = args.init if args.stage != "all" or name == "deconstruct" else None
    if source is None and name == "recompose" and (args.distill or args.freeze):
        source = str(args.out_dir / ON_IMAGES.checkpoint)
    if source is None and name == "caption":
        source = str(args.out_dir / ON_PASCAL.checkpoint)
    return source


def choose_recipe(args: Args, name: str, images: int = 0) -> Stage:
    """Put the command line's values over the recipe for this kind of data of so many images."""
    kind = args.data.partition(":")[0]
    kind = "images" if kind in data.UNLABELLED else kind
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


def student_config(args: Args, **changes) -> prism.PrismConfig:
    """Return the size's config with what the command line changes of it."""
    given = {k: v for k in SWITCHES if (v := getattr(args, k)) is not None}
    return replace(prism.SIZES[args.size or "toy"], **given, **changes)


def label_channels(args: Args, dataset: data.Samples) -> dict[str, int]:
    """Return {task: output channels}. Raises ValueError for a task that the data does not label."""
    if missing := [task for task in args.tasks if task not in dataset.tasks]:
        raise ValueError(f"{args.data} has no labels for {', '.join(missing)}; it labels "
                         f"{', '.join(dataset.tasks)}")
    return {task: dataset.tasks[task] for task in args.tasks or dataset.tasks}


NEW = {  # view of a stage -> what its initial weights do not bring
    "distill": r"blocks\.\d+\.(gate|shared|router|experts)|teacher_e|projectors|adapters|out_norm|aligners",
    "multitask": "task_embed|heads|mixers", "caption": "(?!rgb|pos)"}


def build_optimizer(student: nn.Module, stage: Stage, pretrained: bool) -> torch.optim.AdamW:
    """Make AdamW with decay on matrices alone; stacked biases (E, hidden) and embeddings are no matrices.

    pretrained: all but NEW came with initial weights and learns at stage.lr_pretrained times the rate.
    """
    groups = {}
    for name, p in ((name, p) for name, p in student.named_parameters() if p.requires_grad):
        vector = p.ndim < 2 or name.endswith((".b1", ".b2", "embed", "token"))
        factor = stage.lr_pretrained if pretrained and not re.match(NEW[stage.view], name) else 1.0
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
    """Give each image one teacher: (B,) int64. Teachers take turns, in an order that each step draws, so that
    any process's slice of the batch has as many images of each, give or take one."""
    order = np.random.default_rng((seed, step, 0x7EAC)).permutation(count)
    return np.resize(order, B)


# ---------------------------------------------------------------------------------------------- losses
# Every term is scaled so that its mean over processes and passes is the value over the whole step: sums are
# divided by the step's count per pass, and multiplied by the number of processes, by which DDP divides.


def over_all(total: Tensor, count: Tensor | float) -> Tensor:
    """Divide a local sum by the count over all processes; nothing to count: zero."""
    if not torch.is_tensor(count):  # filled on the device: a copy from the host would wait for it
        count = torch.full((), count, device=total.device)
    return total * world_size() / global_sum(count.float()).clamp(min=1e-6)


def global_sum(x: Tensor) -> Tensor:
    """Sum a statistic over processes, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def distill_terms(distilled: dict[str, list[Tensor]], targets: dict[str, list[Tensor]],
                  counts: dict[str, float]) -> dict[str, Tensor]:
    """L_distill per teacher: sum over levels of 0.9 (1 - cos) + 0.1 SmoothL1 (released code's weights).

    Both hold 4 maps (B_t, C, h, w) per teacher; the smaller map is upsampled to the other. cos is taken
    once per image over the flattened map (released code). counts: a teacher's images in a pass, on average.
    """
    terms = {}
    for name, maps in distilled.items():
        losses = [map_loss(x.float(), y.float()) for x, y in zip(maps, targets[name], strict=True)]
        terms[f"distill/{name}"] = over_all(torch.stack(losses).sum(), counts[name])
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
    (h, w), total = levels[0].shape[-2:], 0.0
    far = patch_distances(h, w, levels[0].device) > max(1.0, 0.1 * min(h, w))  # (h*w, h*w)
    for level in levels:
        z = F.normalize(level.float().flatten(2), dim=1)  # (B, D, h*w)
        alike = F.relu(z.transpose(1, 2) @ z - epsilon)  # (B, h*w, h*w)
        total = total + over_all((alike * far).sum(), float(len(z)) * far.sum())
    return total


def official_decorr_term(maps: list[Tensor], images: float) -> Tensor:
    """The released code's L_decorr: on projector outputs (B_1, C, h, w) of the first teacher, every pair
    counts |cos| (1 - exp(-d^2 / 2 s^2)), s = 0.1 min(h, w), halved per level; images: B_1 on average."""
    h, w = maps[0].shape[-2:]
    weight = 1 - torch.exp(-(patch_distances(h, w, maps[0].device) ** 2) / (2 * (0.1 * min(h, w)) ** 2))
    total = maps[0].new_zeros((), dtype=torch.float32)
    for z in maps[:2]:
        z = F.normalize(z.float().flatten(2), dim=1)  # (B_1, C, h*w)
        alike = (z.transpose(1, 2) @ z).abs() * weight
        total = total + 0.5 * over_all(alike.sum(), images * weight.numel())
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


def task_term(kind: str, x: Tensor, target: Tensor, step: Tensor) -> Tensor:
    """Mean loss over the valid pixels (not 255) of a step, for outputs x (B, C, H, W) of one of its passes.

    target (B, [3,] H, W): labels of the pass; step: of all its passes, as long as `target` where it is one.
    """
    valid, counted = (y != 255 if y.ndim == 3 else (y != 255).all(1) for y in (target, step))
    loss = TASK_LOSSES[kind](x, target, step).masked_fill(~valid, 0)
    return over_all(loss.sum(), counted.sum() * (len(target) / len(step)))


def mask_loss(x: Tensor, target: Tensor, step: Tensor) -> Tensor:
    """Two-class cross-entropy, classes weighted by the step's share of the other class."""
    positive, count = global_sum(torch.stack([(step == 1).sum(), (step != 255).sum()]).float())
    weight_of_one = 1 - positive / count.clamp(min=1)
    weight = torch.stack([1 - weight_of_one, weight_of_one])
    return F.cross_entropy(x, target, weight, ignore_index=255, reduction="none")


TASK_LOSSES = {  # kind of task -> loss (B, H, W) of each pixel
    "classes": lambda x, y, _: F.cross_entropy(x, y, ignore_index=255, reduction="none"),
    "mask": mask_loss,
    "edge": lambda x, y, _: 0.95 * y * F.softplus(-x[:, 0]) + 0.05 * (1 - y) * F.softplus(x[:, 0]),
    "normals": lambda x, y, _: (F.normalize(x, dim=1) - y).abs().sum(1),
    "number": lambda x, y, _: (x[:, 0] - y).abs(),
}


def loss_terms(out: prism.Output, targets: dict, batch: dict, cfg: prism.PrismConfig, mu: float,
               decorr_levels: int = 2, step: dict | None = None) -> dict[str, tuple[float, Tensor]]:
    """List {name: (weight, term)} of one pass; the loss is the sum of weight * term (eq. 8).

    Distillation terms (deconstruct, and recompose times mu): 0.9 L_distill + 0.1 L_decorr + 0.001 balance,
    of which a student has those that it has the tensors for: SAK no levels, dense ones no routes.
    step: this process's batch of the whole step, of which `batch` is a pass; None: the same.
    """
    distill, decorr = (1.0, 0.5) if cfg.official else (0.9, 0.1)
    counts = {name: len(maps[0]) for name, maps in out.distilled.items()}
    if step is not None:  # on the host
        share = len(batch["image"]) / len(step["image"])
        counts = {name: share * (step["teacher"] == i).sum().item() for i, name in enumerate(counts)}
    terms = {k: (mu * distill, v) for k, v in distill_terms(out.distilled, targets, counts).items()}
    if out.levels and decorr_levels:
        first = next(iter(cfg.teachers))
        term = (official_decorr_term(out.distilled[first], counts[first]) if cfg.official else
                decorr_term(out.levels[:decorr_levels]))
        terms["decorr"] = (mu * decorr, term)
    if out.routes:
        terms["balance"] = (mu * 0.001, balance_term(out.routes))
    for task, x in out.predicted.items():
        row = data.TASKS[task]
        terms[task] = (row.weight, task_term(row.kind, x, batch[task], (step or batch)[task]))
    return terms


def caption_terms(logits: Tensor, tokens: Tensor, start: int) -> tuple[dict, dict[str, Tensor]]:
    """Prismer's loss: cross-entropy smoothed by 0.1, summed over a caption, mean over captions.

    logits (B, T, V) of what follows each of tokens (B, T) int64; these count from `start` on, padding not.
    Returns the term as `loss_terms` does, and for the log the plain nats per token.
    """
    logits, tokens = logits[:, start - 1 : -1].float(), tokens[:, start:]
    smoothed, plain = (F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=data.PAD,
                                       reduction="sum", label_smoothing=share) for share in (0.1, 0.0))
    return ({"caption": (1.0, over_all(smoothed, float(len(tokens))))},
            {"nll": over_all(plain.detach(), (tokens != data.PAD).sum())})


# ------------------------------------------------------------------------------------------------- log


class Log:
    """Collect every step's terms on the device; write a line per interval. One host sync per interval."""

    def __init__(self, path: Path, rt: Runtime, stage: str, steps: int, start: int):
        self.path, self.rt, self.stage, self.steps = path, rt, stage, steps
        self.rows: list[dict[str, Tensor]] = []
        self.first, self.clock = start, time.perf_counter()
        if rt.rank == 0 and path.exists():  # drop what this stage logged after the step it goes on from
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # none cut short
            kept = [x for x in lines if (row := json.loads(x))["stage"] != stage or row["step"] <= start]
            prism.write_file(path, lambda file: file.write_text("".join(f"{line}\n" for line in kept)))

    def add(self, values: dict[str, Tensor]) -> None:
        self.rows.append({k: v.detach().float().mean() for k, v in values.items()})

    def flush(self, step: int, images: int, lr: float) -> str:
        """Average what came since the last time over steps and processes, check, append; return a line."""
        names = list(self.rows[0])
        table = torch.stack([torch.stack(list(row.values())) for row in self.rows])
        table = global_sum(table).cpu() / self.rt.world_size  # (steps, values)
        if bad := torch.nonzero(~torch.isfinite(table)).tolist():
            row, column = bad[0]
            raise FloatingPointError(
                f"{names[column]} is {table[row, column]} at step {self.first + row} of {self.stage}; "
                "lower --lr or change --seed (the last checkpoint is untouched)")
        seconds = (time.perf_counter() - self.clock) / len(self.rows)
        values = dict(zip(names, table.mean(0).tolist(), strict=True))
        row = {"stage": self.stage, "step": step, **values, "lr": lr, "images_per_s": images / seconds,
               "ms": 1000 * seconds, "memory_gib": peak_memory_gib(self.rt.device),
               "seconds_left": (self.steps - step) * seconds}
        self.rows, self.first, self.clock = [], step, time.perf_counter()
        if self.rt.rank == 0:
            with open(self.path, "a") as file:  # by name each time: whoever rotates logs may take it away
                file.write(json.dumps(row) + "\n")
        tail = f" | {row['images_per_s']:.0f} images/s {row['seconds_left'] / 60:.1f} min left"
        line = f"{self.stage} {step}/{self.steps}  loss {values['loss']:.3f}"
        for k in sorted(values, key=lambda k: k not in data.TASKS):  # as many as fit; the file has all
            word = f" {k.removeprefix('distill/')} {values[k]:.2f}"
            if k not in ("loss", "grad_norm") and not k.startswith(("load/", "dead/", "lambda/")):
                line += word if len(line + word + tail) <= 110 else ""
        return line + tail


def routing_values(routes: list[prism.Route], blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """Summarise routes per MoE block: mean lambda, load max/mean, experts that no token chose."""
    values = {}
    for i, route, load in zip(blocks, routes, mean_loads(routes), strict=True) if routes else ():
        values |= {f"lambda/{i}": route.gate, f"load/{i}": load.max() / load.mean(),
                   f"dead/{i}": (load == 0).sum()}
    return values


def peak_memory_gib(device: torch.device) -> float:
    """Return peak memory so far: allocated on the GPU, or resident on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# --------------------------------------------------------------------------------------- save and resume


def fill_student(student: prism.Student, source: str | None, content: dict | None) -> tuple[str, str]:
    """Load initial weights; returns the file with its hash, and a report. Raises OSError or ValueError."""
    if source is None:
        return "random weights", "random weights"
    if content is None:
        weights = teachers.read_source(source)
        report = prism.start_from_vit(student, weights.tensors, weights.path)
        student.expect(*(weights.hints.get(k, teachers.HALF[k]) for k in ("mean", "std")))
        origin = Path(weights.provenance["source"]).name
        return f"{origin} {weights.provenance['sha256'][:12]}", f"{source}: {report}"
    path = Path(source)
    cfg, state = prism.config_from(content["config"], path), content["model"]
    same = ("student", "dim", "depth", "heads", "teachers")  # others would fit by shape, and be wrong
    there, here = ({k: str(getattr(c, k)) for k in same} for c in (cfg, student.cfg))
    if differ := [f"{k} {there[k]} there, {here[k]} here" for k in same if there[k] != here[k]]:
        raise ValueError(f"cannot start from {path}: {'; '.join(differ)}; use its --student, --size and "
                         "--teachers, in its order (dinov2=SOURCE gives a teacher the name dinov2)")
    state["pos_embed"] = prism.resize_pos(state["pos_embed"], tuple(cfg.grid), student.cfg.grid)
    own, ours = student.state_dict(), list(student.cfg.tasks)
    unlike = {k.split(".")[1] for k, v in state.items() if k.startswith(("heads", "mixers"))
              if k not in own or own[k].shape != v.shape}
    kept = [task for task in cfg.tasks if task in ours and task not in unlike]
    new = ("heads", "task_embed", "mixers")
    state = {k: v for k, v in state.items()
             if not k.startswith(("heads", "mixers")) or k.split(".")[1] in kept}
    if "task_embed" in own and "task_embed" in state:
        for there, task in ((i, task) for i, task in enumerate(cfg.tasks) if task in ours):
            own["task_embed"][ours.index(task)] = state["task_embed"][there]
        state["task_embed"] = own["task_embed"]
    report = prism.load_strict(student, state, path, new=new, dropped=new)
    report += f", of the heads those of {', '.join(kept)}" if kept else ""
    report += ", arithmetic of the released code" * cfg.official
    student.expect(cfg.mean, cfg.std)
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}", f"{path}: {report}"


def check_same_run(path: Path, stored: dict, ours: dict) -> None:
    """Raise ValueError where a checkpoint is of another run than the one that is to go on from it."""
    otherwise = "repeat the command that wrote it, choose another --out-dir, or start over with --fresh"
    if "optimizer" not in stored:
        raise ValueError(f"cannot go on from {path}: it is for use alone; name it by --init, and {otherwise}")
    theirs = {k: str(v) for k, v in stored["provenance"].get("run", {}).items()}
    if differ := [f"{k} {theirs.get(k)} there, {v} here" for k, v in ours.items() if theirs.get(k) != str(v)]:
        raise ValueError(f"cannot go on from {path}: {'; '.join(differ)}; {otherwise}")


# ------------------------------------------------------------------------------------------------ main


def build_prismer(args: Args, source: str | Path, pairs: data.Captioned) -> tuple[prism.Prismer, str]:
    """Make a Prismer of a student's checkpoint and a decoder; returns it and what it is made of.

    Raises ValueError or OSError.
    """
    given = prism.read_checkpoint(source)
    patch = given["config"].get("trunk", given["config"])["patch"]
    trunk = prism.load(source, grid=tuple(n // patch for n in pairs.size))
    trunk = getattr(trunk, "student", trunk)  # where this run began is gone: what it has saved will do
    there = (task for task in ("depth", "normals", "edge", "sal", "semseg") if task in trunk.cfg.tasks)
    maps = () if args.prismer_z else args.caption_experts or tuple(there)
    if lost := [task for task in maps if task not in trunk.cfg.tasks]:
        raise ValueError(f"{source} draws no {', '.join(lost)}; --caption-experts takes "
                         f"{', '.join(trunk.cfg.tasks)}")
    names = given.get("provenance", {}).get("classes", {})
    classes = {task: names.get(task) or [str(k) for k in range(trunk.cfg.tasks[task])]
               for task in maps if data.TASKS[task].kind == "classes"}
    spoken = [args.prefix, *(f" {name}" for names in classes.values() for name in names)]
    spoken += [space + text for texts in pairs.captions for text in texts for space in ("", " ")]
    known = {chunk for text in spoken for chunk in data.chunks(text)}
    decoder, sizes = None, TOY | {"words": (*data.SPECIAL, *sorted(known))}
    if args.decoder != "toy":
        decoder, sizes = teachers.read_decoder(args.decoder)
    model = prism.Prismer(prism.PrismerConfig(trunk.cfg, maps=maps, prefix=args.prefix, **sizes))
    report = "random weights"
    if decoder:
        new = [f"blocks.{i}.{part}" for i in range(model.cfg.depth)
               for part in ("multihead_attn", "norm2", "adaptor")]
        report = prism.load_strict(model.text, decoder.tensors, decoder.path, ("output.", *new),
                                   ("roberta.pooler.", "roberta.embeddings.position_ids", "lm_head.decoder."))
    model.start_from(trunk, classes)
    model.freeze(args.freeze == "both")
    pairs.encode = model.encode
    return model, f"{Path(source).name}, {args.decoder} decoder ({report}), frozen: {args.freeze or 'vision'}"


def place(args: Args, rt: Runtime, student: prism.Student) -> nn.Module:
    """Move the student to the device; compile or replicate it as the arguments say."""
    student.to(rt.device).train()
    if args.freeze == "trunk":
        student.blocks.eval()  # no noise in its routers
    if args.compile:
        student.compile_parts()
    blocks = getattr(student, "text", student).blocks
    for block in blocks if args.recompute else ():  # around the compiled one: it cannot look inside
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if rt.world_size > 1:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # 2.13 renames an argument
            return DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
    return student


def serves_all(args: Args) -> bool:
    return args.student == "sak" if args.every_teacher is None else args.every_teacher


BYTES = 160  # that a pass of stage 1 takes per token, channel and block


def free_memory() -> float:
    """Return how many bytes programs may still take; inf where nobody says."""
    try:
        return 1024 * float(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf


def choose_passes(stage: Stage, rt: Runtime, cfg: prism.PrismConfig) -> int:
    """Return how many passes a step of stage 1 takes so that a CPU's free memory is at most half filled."""
    if rt.device.type == "cuda" or stage.view != "distill":  # batch norm sees a pass: it would change stage 2
        return 1
    own, tokens = stage.batch_size // rt.world_size, math.prod(stage.image_size) // cfg.patch**2
    room = free_memory() / 2 / rt.world_size / (BYTES * tokens * cfg.dim * cfg.depth)  # images
    return min((n for n in range(1, own + 1) if own % n == 0 and own / n <= room), default=own)


def begin(args: Args, rt: Runtime, name: str, taught: teachers.Teachers):
    """Return recipe, data set, filled student, what the run is, and the checkpoint to go on from, if any."""
    stage = choose_recipe(args, name)
    dataset = data.open_data(args.data, "train", size=stage.image_size, seed=args.seed, view=stage.view)
    stage, path = choose_recipe(args, name, len(dataset)), args.out_dir / stage.checkpoint
    tasks = label_channels(args, dataset) if "recompose" in args.stages() else {}  # wrong ones before stage 1
    tasks = tasks if stage.view == "multitask" else {}
    (height, width), patch = stage.image_size, prism.SIZES[args.size].patch

    stored = prism.read_checkpoint(path) if path.exists() and not args.fresh else None
    source = init_source(args, name)
    moved = stored and source and source.endswith(".pt") and not Path(source).exists()  # no longer needed
    source = None if moved else source
    ours = source and prism.is_student(source)  # else a ViT in timm's names
    given = prism.read_checkpoint(source) if ours else None
    official = (given or stored or {"config": {}})["config"].get("official", False)  # its arithmetic stays
    torch.manual_seed(args.seed)
    if name == "caption":
        dataset = data.Captioned(dataset, stage.image_size)
        student, origin = build_prismer(args, source or path, dataset)
        report = f"{origin}, maps {' '.join(student.cfg.maps) or 'none'}"
    else:
        student = prism.build(student_config(args, teachers=taught.widths, tasks=tasks, official=official,
                                             grid=(height // patch, width // patch)))
        for task in (task for task in tasks if data.TASKS[task].kind == "number"):  # start at the mean
            y = torch.stack([dataset[i][task] for i in range(min(64, len(dataset)))])
            nn.init.constant_(student.heads[task].last.bias, y[y != data.IGNORE].mean().nan_to_num())
        origin, report = fill_student(student, source, given)
        if moved:
            student.expect(stored["config"]["mean"], stored["config"]["std"])
        for key, p in student.named_parameters():
            idle = key.startswith(("projectors", "aligners")) and not taught.targets
            p.requires_grad_(not (idle or args.freeze and not re.match(NEW["multitask"], key)))
    facts = {"stage": name, "seed": args.seed, "steps": stage.steps,
             "initial weights": stored["provenance"]["init"] if moved else origin,
             "data": args.data, "batch size": stage.batch_size, "lr": stage.lr,
             "weight decay": stage.weight_decay, "distill weight": args.distill_weight,
             "decorr levels": args.decorr_levels, "every teacher": serves_all(args), "frozen": args.freeze,
             **{f"teacher {k}": [p.get(x) for x in ("sha256", "settings", "size")]
                for k, p in taught.provenance.items()},
             **{f"student's {k}": v for k, v in asdict(student.cfg).items()
                if k not in ("words", "merges")}}
    if stored:
        check_same_run(path, stored, facts)
        prism.load_strict(student, stored["model"], path)
        report = f"resumed {path} at step {stored['step']}"
    if rt.rank == 0:
        total, active = (n / 1e6 for n in prism.count_parameters(student))
        print(f"\n{name}: {stage.steps} steps x {stage.batch_size} images of {len(dataset)} = "
              f"{stage.epochs:.1f} epochs at {height} x {width} px; {rt.world_size} processes\n"
              f"  student {args.student} {args.size}: {total:.2f} M parameters, {active:.2f} M per token; "
              f"contexts {' '.join(student.contexts)}\n  {rt.device}, {rt.amp or torch.float32}, lr "
              f"{stage.lr:g} {stage.decay}, weight decay {stage.weight_decay:g}; {report}", flush=True)
        if stage.steps < 500 and args.steps is None and not args.data.startswith("world"):
            print(f"  {stage.steps} updates are few: raise --epochs, or train heads alone: --freeze trunk")
    return stage, dataset, student, facts, stored


def train_stage(args: Args, rt: Runtime, name: str, taught: teachers.Teachers) -> int:
    """Train one stage from its last checkpoint to its end; returns the signal that ended it before, or 0."""
    stage, dataset, student, facts, stored = first_rank_first(  # what is wrong is said once
        rt, lambda: begin(args, rt, name, taught))
    path, cfg, start = args.out_dir / stage.checkpoint, student.cfg, stored["step"] if stored else 0
    if start == stage.steps:
        if rt.rank == 0:
            print(f"{path} holds all {start} steps")
        return 0
    model = place(args, rt, student)
    optimizer = build_optimizer(student, stage, pretrained=facts["initial weights"] != "random weights")
    if stored:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": stored.pop("optimizer")["state"], "param_groups": groups})
    provenance = {"data": dataset.source, "classes": dataset.classes, "teachers": taught.provenance,
                  "tasks": {task: data.TASKS[task]._asdict() for task in getattr(cfg, "trunk", cfg).tasks},
                  "init": facts["initial weights"], "torch": str(torch.__version__), "run": facts}

    workers = args.workers
    if workers is None:  # the rendered world lies in memory: on a CPU, workers would only take cores
        here = int(os.environ.get("LOCAL_WORLD_SIZE", rt.world_size))
        workers = min(16, data.core_count() // here) if rt.device.type == "cuda" else 0
    B = stage.batch_size // rt.world_size
    passes = args.accumulate or (stored or {}).get("passes") or global_max(choose_passes(stage, rt, cfg))
    if passes > 1 and rt.rank == 0:
        print(f"  {passes} passes per step")
    batches = data.batches(dataset, B, stage.steps, start, args.seed,
                           rt.rank, rt.world_size, workers, rt.device)
    log = Log(args.out_dir / "log.jsonl", rt, name, stage.steps, start)
    with noted_signals() as received:
        for step, batch in enumerate(data.track(batches, name, stage.steps, start, rt.rank > 0), start):
            batch = {k: v.to(rt.device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
            if taught.targets:
                ids = torch.from_numpy(assign_teachers(stage.batch_size, len(taught.widths), args.seed, step))
                batch["teacher"] = ids[rt.rank * B : (rt.rank + 1) * B]  # (B,) on the host, or all K (B, K)
                if serves_all(args):
                    batch["teacher"] = torch.arange(len(taught.widths)).expand(B, -1)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * lr_at(step, stage)
            values = []
            for i in range(passes):
                own = rt.rank * (name == "caption")  # a decoder's dropout; other noise is cut from one draw
                noise = np.random.SeedSequence((args.seed, step, i, own))
                torch.manual_seed(noise.generate_state(1)[0].item())
                part = {k: v[i * B // passes : (i + 1) * B // passes] for k, v in batch.items()}
                alone = isinstance(model, DistributedDataParallel) and i < passes - 1
                with model.no_sync() if alone else nullcontext():  # gradients are exchanged in the last pass
                    with rt.autocast():
                        if name == "caption":
                            logits = model(part["image"], part["tokens"])
                            terms, told = caption_terms(logits, part["tokens"], len(student.start))
                        else:
                            targets = taught.targets(part["image"], part["teacher"]) if taught.targets else {}
                            out = model(part["image"], part.get("teacher"), tuple(cfg.tasks))
                            mu = args.distill_weight if cfg.tasks else 1.0
                            terms = loss_terms(out, targets, part, cfg, mu, args.decorr_levels, batch)
                            told = routing_values(out.routes, cfg.moe_blocks)
                        loss = sum(weight * term for weight, term in terms.values())
                    (loss / passes).backward()
                values.append({**{k: v.detach() for k, (_, v) in terms.items()}, "loss": loss.detach(),
                               **told})
            norm = nn.utils.clip_grad_norm_(student.parameters(), stage.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            means = {k: sum(v[k].float().mean() for v in values) / passes for k in values[0]}
            log.add(means | {"grad_norm": norm})
            done = step + 1
            stopped = global_max(received[0] if received else 0)
            every = args.save_every or max(100, stage.steps // 100)
            saves = stopped or done % every == 0 or done == stage.steps
            logs = saves or done % args.log_every == 0
            line = log.flush(done, stage.batch_size, lr_at(step, stage)) if logs else ""  # no nan is saved
            if saves and rt.rank == 0:
                prism.write_checkpoint(path, {
                    "model": student.state_dict(), "config": asdict(cfg), "optimizer": optimizer.state_dict(),
                    "stage": name, "step": done, "steps": stage.steps, "seed": args.seed, "passes": passes,
                    "provenance": provenance})
            if line and rt.rank == 0:
                print(line, flush=True)  # after saving: whoever reads may be gone
            if stopped:
                break
    if rt.rank == 0:
        print(f"{path} holds step {done} of {stage.steps}", flush=True)
    return stopped


def global_max(value: int) -> int:
    value = torch.tensor(value)  # on the host: no GPU is waited for
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def prepare(args: Args) -> dict:
    """Fill in and check the arguments; returns what `inherit` does."""
    args.data = data.guess_spec(args.data)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    first = inherit(args)
    check_args(args)
    return first


def main(args: Args) -> None:
    """Train, on a CPU in a process per core."""
    prepare(args)
    children = start_processes(args)
    try:
        train(args)
        for child in children:
            child.wait()
    finally:
        for child in children:
            child.kill()


def train(args: Args) -> None:
    """Check, train or load the teachers, run the stages one after the other."""
    first, rt = prepare(args), start_runtime(args.device)
    args.compile = rt.device.type == "cuda" if args.compile is None else args.compile
    with explained(), held(args.out_dir, rt.rank):
        # Without teachers a student keeps the contexts that it learned under them.
        taught = SimpleNamespace(widths=first.get("config", {}).get("teachers", {}), targets=None,
                                 provenance=first.get("provenance", {}).get("teachers", {}))
        if args.distill:
            taught = first_rank_first(
                rt, lambda: teachers.Teachers(args.teachers, rt.device, args.compile, args.sam_size))
        for who, provenance in taught.provenance.items() if rt.rank == 0 else ():
            print(f"teacher {who}: {teachers.describe(provenance)}")
        for name in args.stages():
            stopped = train_stage(args, rt, name, taught)
            if rt.world_size > 1:
                dist.barrier()  # the next stage reads the file on every rank
            if stopped:
                sys.exit(128 + stopped)
    if rt.rank == 0 and name != "deconstruct":
        print(f"next: python eval.py --ckpt {args.out_dir / choose_recipe(args, name).checkpoint}")
    if rt.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    data.exit_with_one_line(lambda: main(args), args.debug)
