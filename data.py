"""Data: the rendered world, own folders, PASCAL-Context, NYUDv2, images alone; a loader that can resume.

    python data.py                           renders the world once and draws a contact sheet
    python data.py --show /data/PASCALContext
    python data.py --check /data/NYUDv2      or "tars:/data/shard-{0000..0123}.tar" (stage 1: any images)

Folder layout: your own (`folder:ROOT`), and the rendered world's
    images/<id>.jpg                   or png, ...; any sizes
    <task>/<id>.png                   8 bits; classes: ids, 255 = void; sal, edge: gray, >= 128 is set
                                      normals: RGB, n = 2 v / 255 - 1; x right, y up, z towards the
                                      camera; black = unknown. Or npy: float32, zeros = unknown
    <number>/<id>.npy                 float32, nan = unknown (depth: metres, 0 too); or a PNG times `scale`
    labelmap/<id>.png                 optional: ids; `edge` is where they change
    <split>.txt                       optional: an id per line; else 1 of 10 is for val, by a hash of its id
    dataset.json                      optional: {task: {"classes": [names]}, task of your own: {"kind": one of
                                      Task's, "classes": [...], "unit": "m", "weight": 1, "scale": 0.001}}
    captions.json                     optional: {id: {"caption": text or texts}} (world: also "things")
    meta.json                         world: size, and a key of all that decides the files
Any label may be missing: that task then ignores that image.

Folder layouts: PASCAL-Context as multi-task archives ship it, NYUDv2 as SAK, PRISM and InvPT do: see KINDS.

A sample before and after the transforms. H, W: native size; S: the size that networks see.
    key          dataset.read(i), numpy              dataset[i], torch
    image        (H, W, 3) uint8                     (3, S, S) float32 RGB in [0, 1]
    semseg       (H, W) uint8, 255 = ignore          (S, S) int64, 255 = ignore
    human_parts  (H, W) uint8, 0 background, 1..6    (S, S) int64, 255 = ignore
    normals      (H, W, 3) float32, zeros = unknown  (3, S, S) float32, 255 = ignore
    edge         (H, W) uint8 {0, 1}                 (S, S) float32 {0, 1}, 255 = ignore
    sal          (H, W) uint8 {0, 1}                 (S, S) int64, 255 = ignore
    depth        (H, W) float32 metres, 0 = unknown  (S, S) float32 metres, 255 = ignore
    name         str                                 str
PASCAL-Context labels the first five tasks, NYUDv2 semseg, normals, edge and depth, a world all. `read`
adds labelmap (H, W) int32, whose boundaries are scored (NYUDv2: a map of lines), where there is one, and
caption and things. Images larger than S are shrunk to it, and scored at their own size.
"""

import ast
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
# Threads that spin long starve beside other processes, those that sleep at once are slow. Read by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich import progress
from scipy.io import loadmat
from torch import nn
from torch.utils.data import DataLoader, Dataset

warnings.filterwarnings("ignore", module="PIL")  # odd EXIF and palettes, by the thousand
warnings.filterwarnings("ignore", message="torch.distributed.nn.functional")  # 2.13; its heir is private
Image.MAX_IMAGE_PIXELS = 2**29  # telephones make 2e8

# ------------------------------------------------------------------------------------ what every script needs


def track(items: Iterable, what: str, total: int | None = None, start=0, quiet=False) -> Iterable:
    """Pass on `items` under a progress bar, where there is a terminal; total: where they have no length."""
    return progress.track(items, what, total, start, disable=quiet or not sys.stdout.isatty())


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def on_all_cores(function, jobs: list, chunk: int = 1, workers: int | None = None) -> Iterator:
    """Yield function(job) in any order; few jobs stay here, a process takes seconds to start.

    Processes are forked from a small server: a fork of this one would hang once CUDA or threads have started.
    """
    workers = min(core_count(), len(jobs) // (4 * chunk)) if workers is None else workers
    if workers < 2:
        yield from map(function, jobs)
        return
    multiprocessing.set_forkserver_preload(["torch"])
    with multiprocessing.get_context("forkserver").Pool(workers, start_worker) as pool:
        yield from pool.imap_unordered(function, jobs, chunk)


def start_worker() -> None:
    """Set this process up as a child: one thread, and an end when its parent ends, however that happens."""
    above, parent = os.getppid(), multiprocessing.parent_process()  # a pool's: the one behind its server

    def watch() -> None:
        while os.getppid() == above and (parent is None or parent.is_alive()):
            time.sleep(1)
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=watch, daemon=True).start()


def say(text: str) -> None:
    """Print what a data set found, once for all of torchrun's processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def cache_folder() -> Path:
    """Return where rendered worlds and teachers are kept."""
    return Path(os.environ.get("PRISM_CACHE") or "~/.cache/prism").expanduser()


def exit_with_one_line(run: Callable[[], int | None], debug: bool) -> None:
    """Exit with what `run` returns; turn what a user can cause into one line on stderr and exit code 1.

    SIGTERM ends it as Ctrl-C does, so that worker processes end and temporary files go.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.environ.get("PRISM_CHILD"):
        start_worker()
    try:
        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit("stopped")
    except BrokenPipeError:  # `| head`: else Python complains once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("nobody reads what this prints any more: stopped")
    except (MemoryError, RuntimeError) as error:
        if debug or not re.search("allocate memory|out of memory", str(error) or "out of memory"):
            raise
        sys.exit("out of memory: lower --batch-size, or raise --accumulate (train.py)")
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        text = "".join(c if c.isprintable() else "?" for c in str(error))  # files may hold a terminal's codes
        sys.exit(f"{type(error).__name__}: {text}")


# ------------------------------------------------------------------------------------------------------ tasks


class Task(NamedTuple):
    """One dense task. Its kind decides loss, metric, final map, colours and how predictions are filed."""

    kind: Literal["classes", "mask", "edge", "normals", "number"]
    channels: int | None  # outputs of the network; None: one per class of the data set
    unknown: int  # unlabelled pixels in read(), and padding, before both become 255
    weight: float  # of its loss in the sum (SAK, PRISM)
    metric: str  # headline number in eval.py
    unit: str
    files: tuple[str, ...]  # endings of predictions; the first is written
    lower_is_better: bool = False
    colours: str = ""  # of the classes, or of near to far
    distance: bool = False  # a number that is above 0, and smaller where an image is enlarged
    needs_object: bool = False  # background alone is no label


PNG = (".png",)
TASKS = {  # in the order of the task embeddings of a PASCAL checkpoint
    "semseg": Task("classes", None, 255, 1, "miou", "%", PNG, colours=(
        "3b4252 d8c39a e6194b 3cb44b ffe119 4363d8 f58231 911eb4 46f0f0 f032e6 9acd32 fabed4 "
        "008080 a0522d dcbeff 800000 aaffc3 808000 ffd8b1 000075 ffffff")),
    "human_parts": Task("classes", 7, 255, 2, "miou", "%", PNG, needs_object=True, colours=(
        "20242c e6194b 4363d8 f5a231 ffe119 3cb44b 9ff59f")),
    "normals": Task("normals", 3, 0, 10, "mean", "degrees", (".npy", ".png"), lower_is_better=True),
    "edge": Task("edge", 1, 255, 50, "odsf", "%", PNG),
    "sal": Task("mask", 2, 255, 5, "maxf", "%", PNG),
    "depth": Task("number", 1, 0, 1, "rmse", "m", (".npy", ".mat"), lower_is_better=True, distance=True,
                  colours="fde725 5ec962 21918c 3b528b 440154"),  # viridis, reversed
}
IGNORE = 255


def enter_task(name: str, given: dict) -> None:
    """Enter a task of a data set's own into TASKS, like the first one of its kind. Raises ValueError."""
    if name not in TASKS:
        kinds = {row.kind: row for row in reversed(TASKS.values())}
        if given.get("kind") not in kinds or not name.isidentifier() or name in ("images", "labelmap"):
            raise ValueError(f"{name} is no known task; name it by letters and _, and its kind: "
                             f"{', '.join(kinds)}")
        row = kinds[given["kind"]]._replace(**{k: given[k] for k in ("unit", "weight") if k in given})
        TASKS[name] = row._replace(unknown=math.nan, distance=False) if row.kind == "number" else row
    elif given.get("kind", TASKS[name].kind) != TASKS[name].kind:
        raise ValueError(f"{name} is known as a task of kind {TASKS[name].kind}; choose another name")
    elif given.get("unit", TASKS[name].unit) != TASKS[name].unit:
        raise ValueError(f"{name} is in {TASKS[name].unit} elsewhere, {given['unit']} here; convert it")


PASCAL_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
                  "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()
NYUD_CLASSES = ("wall,floor,cabinet,bed,chair,sofa,table,door,window,bookshelf,picture,counter,blinds,"
                "desk,shelves,curtain,dresser,pillow,mirror,floor mat,clothes,ceiling,books,"
                "refridgerator,television,paper,towel,shower curtain,box,whiteboard,person,night stand,"
                "toilet,sink,lamp,bathtub,bag,otherstructure,otherfurniture,otherprop").split(",")
PERSON = 15  # class_ind of people in the PASCAL-Part files
PART_FILE_NAMES = ("", "head hair lear rear lebrow rebrow leye reye mouth nose", "torso neck",
                   "luarm ruarm", "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot")
PART_IDS = {name: part for part, names in enumerate(PART_FILE_NAMES) for name in names.split()}

# --------------------------------------------------------------------------------------------- rendered world
# World frame: x right, y up, z into the room, metres; the camera stands at (0, height, 0). A thing is built
# in a frame of its own, standing on y = 0 and facing -z: at yaw 0, towards the camera. Everything is a
# primitive, the room included. Vectors come component first: (3, P) of primitives, (3, S, S) of pixels.

CLASSES = "wall floor person ball box can cone table chair lamp plant picture".split()
PARTS = ["background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg"]
COLOURS = {"red": (.80, .13, .12), "orange": (.93, .50, .12), "yellow": (.92, .82, .20),
           "green": (.18, .58, .22), "blue": (.15, .32, .78), "purple": (.52, .22, .64),
           "white": (.90, .90, .87), "brown": (.45, .28, .16)}
SKIN = ((.94, .76, .65), (.85, .64, .48), (.66, .45, .31), (.42, .27, .18))
HAIR = ((.10, .08, .07), (.30, .18, .10), (.62, .44, .22), (.55, .53, .52))
LEAF, METAL = (.20, .50, .16), (.25, .25, .27)
BOX, FRUSTUM, CAPSULE = range(3)  # a capsule is a ball swept along y in +-taper
PLAIN, CHECKER, STRIPES, BLOTCHES = range(4)
CELL = 1.3  # metres; every thing keeps to its own square of the floor, so that none touch


class Scene:
    """One room: camera, light, things, and a row of numbers for each primitive."""

    def __init__(self, seed, index):
        self.random = np.random.default_rng((seed, index)).random
        self.things, self.rows, self.shadows, self.counts = [], [], [], Counter()
        pitch, self.yaw = self.between(.08, .32), self.between(-.2, .2)
        sp, cp, sy, cy = math.sin(pitch), math.cos(pitch), math.sin(self.yaw), math.cos(self.yaw)
        right, up, ahead = (cy, 0, -sy), (sp * sy, cp, sp * cy), (sy * cp, -sp, cy * cp)
        self.view = np.array([right, up, ahead])
        self.height, self.focal = self.between(1.1, 1.9), self.between(.8, 1.05)
        self.left, self.right = -self.between(2.2, 3.8), self.between(2.2, 3.8)
        self.back, self.ceiling = self.between(4.5, 8), self.between(2.6, 3.4)
        light = (self.between(-.7, .7), self.between(.6, 1), -self.between(.2, .9))
        self.light = [x / math.hypot(*light) for x in light]  # points at the lamp
        self.tint, self.noise = [self.between(.94, 1.08) for _ in "rgb"], self.between(.005, .025)
        wall, roof, floor = (self.paint(None, *how)[1] for how in ((.5,), (.8, PLAIN), (.2,)))
        x, y, z = (self.left + self.right) / 2, self.ceiling / 2, self.back / 2 + .5
        wide, deep = (self.right - self.left) / 2 + .5, z - .2  # from just ahead of the camera
        for centre, half, paint, instance in (  # thick boxes that overlap, so that no crack is left
                ((self.left - .1, y, z), (.1, y + .5, deep), wall, 1),
                ((self.right + .1, y, z), (.1, y + .5, deep), wall, 1),
                ((x, y, self.back + .1), (wide, y + .5, .1), wall, 1),
                ((x, 2 * y + .1, z), (wide, .1, deep), roof, 1), ((x, -.1, z), (wide, .1, deep), floor, 2)):
            self.add(BOX, centre, half, paint)
            self.rows[-1] += ((0, 0, 0), 0, 1, instance)

    def between(self, low, high):
        return low + (high - low) * self.random()

    def choose(self, options):
        return options[int(len(options) * self.random())]

    def paint(self, rgb=None, pale=0, texture=None):
        """Mix a paint: colour name, (two RGB colours, texture, frequency in 1/m, slant, phase)."""
        name, bright = None if rgb else self.choose(tuple(COLOURS)), self.between(.85, 1.15)
        rgb = [bright * ((1 - pale) * c + pale * .8) + self.between(-.05, .05) for c in rgb or COLOURS[name]]
        texture = self.choose((PLAIN, PLAIN, CHECKER, STRIPES, BLOTCHES)) if texture is None else texture
        dark = self.between(.45, .75)  # the second colour is a shade, so that the name stays true
        frequency = self.between(*((1.5, 3.5) if pale else (4, 11)))
        pattern = (texture, frequency, self.between(0, math.pi / 2), self.random())
        return name, (*rgb, *(dark * c for c in rgb), *pattern)

    def add(self, shape, centre, half, paint, axis=(0, 1, 0), taper=None, part=0):
        """Add a primitive to the thing being built; `axis` is where its own y axis points."""
        taper = shape != CAPSULE if taper is None else taper  # a can, an ellipsoid
        self.rows.append((shape, part, float(taper), centre, half, axis, paint))

    def limb(self, start, end, radius, paint, part=0):
        """Add a capsule from joint to joint."""
        length, ends = math.dist(start, end), list(zip(start, end, strict=True))
        self.add(CAPSULE, [(a + b) / 2 for a, b in ends], (radius, radius, radius), paint,
                 [(b - a) / length for a, b in ends], length / 2 / radius, part)

    def put(self, name, x, z, slack=0, y=0, yaw=0, scale=1, **how):
        """Build a thing and set it down near (x, y, z), as far off as `slack` minus its radius."""
        instance, first = 16 * CLASSES.index(name) + self.counts[name], len(self.rows)
        self.counts[name] += 1
        colour, radius, top = (add_person if name == "person" else add_thing)(self, name, **how)
        slack, top = max(0, slack - radius * scale), top * scale + y
        x, z = x + self.between(-slack, slack), z + self.between(-slack, slack)
        self.rows[first:] = [(*row, (x, y, z), yaw, scale, instance) for row in self.rows[first:]]
        if y == 0:
            away = math.hypot(self.light[0], self.light[2])
            self.shadows.append((x, z, -self.light[0] / away, -self.light[2] / away,
                                 top * away / self.light[1], 1.5 * (radius * scale) ** 2))
        self.things.append({"class": name, "colour": colour, "instance": instance, "pose": how.get("pose")})
        return x, z, top


def add_thing(scene, name, seat=None):
    """Add the primitives of a thing other than a person: its colour name, radius and height."""
    between, add, (colour, paint) = scene.between, scene.add, scene.paint()
    plain = scene.paint(paint[:3], texture=PLAIN)[1]

    def add_legs(x, z, height, thick):
        for side, front in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            add(BOX, (side * (x - thick), height / 2, front * (z - thick)), (thick, height / 2, thick), plain)

    match name:
        case "ball":
            x = y = z = between(.2, .4)
            add(CAPSULE, (0, y, 0), (x, y, z), paint)
        case "box":
            x, y, z = between(.2, .42), seat / 2 if seat else between(.2, .42), between(.2, .42)
            x, z = (.6 * x, .2) if seat else (x, z)
            add(BOX, (0, y, 0), (x, y, z), paint)
            x = math.hypot(x, z)
        case "can":
            x, y = between(.16, .32), between(.22, .55)
            add(FRUSTUM, (0, y, 0), (x, y, x), paint)
        case "cone":
            x, y = between(.24, .46), between(.3, .62)
            add(FRUSTUM, (0, y, 0), (x, y, x), paint, taper=between(0, .15))
        case "table":
            x, y, z = between(.4, .54), between(.26, .42), between(.28, .34)
            add(BOX, (0, 2 * y - .035, 0), (x, .035, z), paint)
            add_legs(x, z, 2 * y - .07, .035)
            x = math.hypot(x, z)
        case "chair":
            x, back, seat = between(.22, .27), between(.22, .32), seat or between(.4, .5)
            add(BOX, (0, seat - .03, 0), (x, .03, .22), paint)
            add(BOX, (0, seat + back, .2), (x, back, .025), paint)
            add_legs(x, .22, seat - .06, .03)
            x, y = math.hypot(x, .23), seat / 2 + back
        case "lamp":
            x, y, half = between(.22, .34), between(.45, .8), between(.14, .22)
            metal = scene.paint(METAL, texture=PLAIN)[1]
            add(FRUSTUM, (0, .025, 0), (.18, .025, .18), metal, taper=.8)
            add(FRUSTUM, (0, y, 0), (.03, y - .02, .03), metal)
            add(FRUSTUM, (0, 2 * y - half, 0), (x, half, x), paint, taper=between(.4, .8))
        case "plant":
            pot, half, leaf = between(.14, .22), between(.1, .2), between(.22, .42)
            add(FRUSTUM, (0, half, 0), (pot, half, pot), paint, taper=between(1, 1.4))
            green, turned = scene.paint(LEAF, texture=PLAIN)[1], between(0, 6)
            for k in range(scene.choose((5, 6, 7, 8))):
                lean, angle = between(.15, .8) if k else 0, turned + k
                x, y, z = math.sin(lean) * math.cos(angle), math.cos(lean), math.sin(lean) * math.sin(angle)
                add(CAPSULE, (leaf * x, 2 * half + .9 * leaf * y, leaf * z), (.3 * leaf, leaf, .2 * leaf),
                    green, (x, y, z))
            x, y = max(1.3 * leaf, 1.4 * pot), half + .95 * leaf
        case "picture":
            x, y = between(.3, .65), between(.25, .45)
            add(BOX, (0, 0, -.02), (x, y, .02), paint)
            add(BOX, (0, 0, -.03), (x - .06, y - .06, .02), scene.paint()[1])
            add(BOX, (0, -y / 2, -.04), (x - .06, y / 2 - .06, .02), scene.paint()[1])
            disc = (between(-.5, .5) * x, .3 * y, -.05)
            add(CAPSULE, disc, (.25 * x, .25 * x, .03), scene.paint()[1])
    return colour, x, 2 * y


def add_person(scene, name, pose):
    """Add a person one unit high by forward kinematics: shirt's colour name, radius, height."""
    between, add, (colour, shirt), (_, trousers) = scene.between, scene.add, scene.paint(), scene.paint()
    skin, hair, shoes = (scene.paint(scene.choose(of), texture=PLAIN)[1] for of in (SKIN, HAIR, HAIR))
    shins = scene.choose((trousers, trousers, skin))  # skin: the trousers are shorts
    sleeves = scene.choose(((skin, skin), (shirt, skin), (shirt, shirt), (shirt, shirt)))
    stride, legs = between(.25, .48) if pose == "walking" else between(-.06, .06), []

    def joints(start, spread, *bones):
        """Return the joints of a limb; a bone is its length and its swing forward from hanging."""
        chain = [start]
        for length, swing in bones:
            x, y, z = chain[-1]
            chain.append((x + length * spread, y - length * math.cos(swing), z - length * math.sin(swing)))
        return chain

    for side in (-1, 1):
        thigh, bend = side * stride, between(.3, .7) if side * stride < -.1 else between(.02, .1)
        if pose == "sitting":
            thigh, bend = between(1.42, 1.5), between(1.4, 1.6)
        legs.append(joints((side * .055, 0, 0), side * .03, (.24, thigh), (.235, thigh - bend)))
    hips = .035 - min(ankle[1] for _, _, ankle in legs)  # the lower foot stands on the floor
    for hip, knee, ankle in (((x, y + hips, z) for x, y, z in leg) for leg in legs):
        scene.limb(hip, knee, .045, trousers, 5)
        scene.limb(knee, ankle, .033, shins, 6)
        add(CAPSULE, (ankle[0], ankle[1], ankle[2] - .03), (.03, .033, .075), shoes, part=6)
    add(CAPSULE, (0, hips + .01, 0), (.098, .06, .07), trousers, part=2)
    add(FRUSTUM, (0, hips + .16, 0), (.088, .14, .058), shirt, taper=1.3, part=2)
    add(CAPSULE, (0, hips + .295, 0), (.118, .035, .074), shirt, part=2)
    scene.limb((0, hips + .3, 0), (0, hips + .36, 0), .032, skin, 2)
    add(CAPSULE, (0, hips + .408, -.005), (.05, .068, .057), skin, part=1)
    add(CAPSULE, (0, hips + .425, .012), (.054, .058, .056), hair, part=1)
    for side in (-1, 1):
        swing, bend = -side * stride, between(.1, .6)
        if pose == "sitting":
            swing, bend = between(.2, .6), between(.6, 1.1)
        elif pose == "standing" and scene.random() < .2:  # waves
            swing = between(2.1, 2.7)
        shoulder, elbow, wrist, hand = joints((side * .125, hips + .285, 0), side * between(.03, .25),
                                              (.165, swing), (.14, swing + bend), (.03, swing + bend))
        scene.limb(shoulder, elbow, .033, sleeves[0], 3)
        scene.limb(elbow, wrist, .026, sleeves[1], 4)
        add(CAPSULE, hand, (.028, .04, .028), skin, part=4)
    return colour, .2, hips + .48


def furnish(scene):
    """Put 0-2 people and 2-6 objects on cells of the floor, 0-2 pictures on the walls."""
    cells, z = [], 1.45 + CELL / 2 + scene.between(0, .4)  # centres (x, z) of the cells in view
    while z + CELL / 2 < scene.back:
        middle, reach = z * math.tan(scene.yaw), .5 * z / scene.focal + .35
        low, high = max(scene.left, middle - reach), min(scene.right, middle + reach)
        columns = int((high - low) / CELL)
        cells += [((low + high - CELL * (columns - 1)) / 2 + CELL * k, z) for k in range(columns)]
        z += CELL
    cells.sort(key=lambda cell: -scene.random() * cell[1] ** 1.5)  # the nearest are likelier at the end
    objects, tables = scene.choose((2, 3, 4, 5, 6)), []
    for _ in range(scene.choose((0, 1, 1, 2))):
        pose, height = scene.choose(("standing", "walking", "sitting")), scene.between(1.45, 1.95)
        yaw = scene.between(-1.4, 1.4) + scene.choose((0, 0, 0, 0, math.pi))
        x, z, top = scene.put("person", *cells.pop(), yaw=yaw, scale=height, pose=pose)
        if pose == "sitting":  # under the thighs, .045 below the hips
            seat = top - height * (.48 + .045)
            scene.put(scene.choose(("chair", "chair", "box")), x, z, yaw=yaw, seat=seat)
            objects -= 1
    for _ in range(objects):
        name, yaw = scene.choose(CLASSES[3:-1]), scene.between(-math.pi, math.pi)
        if tables and name in ("ball", "can", "cone", "plant") and scene.random() < .6:
            x, z, top = tables.pop()
            scene.put(name, x, z, .3, top, yaw, .5)
        elif cells:
            where = scene.put(name, *cells.pop(), CELL / 2, yaw=yaw)
            tables += [where] if name == "table" else []
    for side in scene.choose(((), (0,), (1,), (-1,), (0, 1), (0, -1))):
        x, z = ((scene.right if side > 0 else scene.left, scene.between(.6, .9) * scene.back)
                if side else (scene.between(.6 * scene.left, .6 * scene.right), scene.back))
        scene.put("picture", x, z, y=scene.between(1.35, 1.9), yaw=side * math.pi / 2)
    return scene


# From a scene to pixels, in the camera's frame: x right, y up, z ahead. A ray is (u, v, 1), so the parameter
# at which it hits something is that thing's depth.

def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def turn(matrix, v):
    """Multiply (3, 3, ...) by vectors; not by matmul, whose sums depend on the shapes."""
    return matrix[:, 0] * v[0] + matrix[:, 1] * v[1] + matrix[:, 2] * v[2]


def place(scene):
    """Set up the primitives in the camera's frame: a dict of arrays with P columns."""
    rows = zip(*sorted(scene.rows, key=lambda row: row[0]), strict=True)
    shape, part, taper, centre, half, y, paint, position, yaw, size, instance = (np.array(x).T for x in rows)
    camera = scene.view[:, :, None] + 0 * yaw  # (3, 3, P)
    right, up, ahead = camera.transpose(1, 0, 2)
    rotation = np.stack([np.cos(yaw) * right - np.sin(yaw) * ahead, up,
                         np.sin(yaw) * right + np.cos(yaw) * ahead], 1)
    hint = np.where(np.abs(y[0]) < .9, [[1], [0], [0]], [[0], [0], [1]])
    x = hint - dot(hint, y) * y
    x = x / np.sqrt(dot(x, x))
    axes = np.stack([turn(rotation, axis) for axis in (x, y, np.cross(x, y, axis=0))])
    unit, extent = half * size, half * size
    extent[1] *= np.where(shape == CAPSULE, 1 + taper, 1)
    extent[::2] *= np.where(shape == FRUSTUM, np.maximum(1, taper), 1)
    position[1] -= scene.height
    centre = turn(rotation, centre * size) + turn(camera, position)
    # Rays start at their point at the depth of the primitive's centre: so near, float32 is exact enough.
    table = np.stack([*centre[:2] / centre[2], centre[2], taper, *(axes / unit[:, None]).reshape(9, -1)])
    return {"shape": shape, "part": part, "instance": instance, "centre": centre,
            "corner": axes * extent[:, None], "paint": np.float32(paint), "unit": np.float32(unit),
            "table": np.float32(table)}


def boxes(prims, focal, size):
    """Return each primitive's box on the screen: left, right, top, bottom."""
    signs = np.array(list(itertools.product((-1, 1), repeat=3))).T[:, :, None]
    x, y, z = prims["centre"][:, None] + (prims["corner"][:, :, None] * signs[:, None]).sum(0)  # (8, P) each
    pixels = focal * size / np.maximum(z, .1)
    return [np.clip(np.ceil(end + size / 2 - .5), 0, size).astype(int) for line in (x * pixels, -y * pixels)
            for end in (line.min(0), line.max(0))]


def local_rays(table, u, v):
    """Express rays in the frame where their primitive has unit size: o + t d; taper, depth of o."""
    x, y, depth, taper, *local = table
    x, y = (u - x) * depth, (v - y) * depth
    o = np.stack([local[k] * x + local[k + 1] * y for k in (0, 3, 6)])
    d = np.stack([local[k] * u + local[k + 1] * v + local[k + 2] for k in (0, 3, 6)])
    return o, d, taper, depth


# Where does the ray o + t d, (3, ...) each, enter a shape of unit size? inf for a miss.

def hit_box(o, d, taper):
    inverse = 1 / np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
    near, far = -o * inverse - np.abs(inverse), -o * inverse + np.abs(inverse)
    return np.where(near.max(0) < far.min(0), near.max(0), np.inf)


def hit_frustum(o, d, taper):
    slope = (taper - 1) / 2  # the radius goes from 1 at y = -1 to taper at y = 1
    radius, change = (taper + 1) / 2 + slope * o[1], slope * d[1]
    a = d[0] * d[0] + d[2] * d[2] - change * change
    b = o[0] * d[0] + o[2] * d[2] - radius * change
    space = b * b - a * (o[0] * o[0] + o[2] * o[2] - radius * radius)
    side = (-b - np.sqrt(np.maximum(space, 0))) / np.where(np.abs(a) < 1e-9, np.float32(1e-9), a)
    side = np.where((space > 0) & (np.abs(o[1] + side * d[1]) <= 1), side, np.inf)
    lid = -np.sign(d[1])
    cap = (lid - o[1]) / np.where(d[1] == 0, np.float32(1e-9), d[1])
    x, z, rim = o[0] + cap * d[0], o[2] + cap * d[2], (taper + 1) / 2 + slope * lid
    return np.where(x * x + z * z < rim * rim, np.minimum(cap, side), side)


def hit_capsule(o, d, taper):
    a, b = d[0] * d[0] + d[2] * d[2] + np.float32(1e-9), o[0] * d[0] + o[2] * d[2]
    space = b * b - a * (o[0] * o[0] + o[2] * o[2] - 1)
    side = (-b - np.sqrt(np.maximum(space, 0))) / a
    y = o[1] + side * d[1]
    end = np.clip(y, -taper, taper)
    o, square = (o[0], o[1] - end, o[2]), dot(d, d)  # and now the ball at that end
    nearest = -dot(o, d) / square
    room = (1 - dot(o, o)) / square + nearest * nearest
    ball = np.where(room > 1e-9, nearest - np.sqrt(np.maximum(room, 0)), np.inf)
    return np.where(space > 0, np.where(y == end, side, ball), np.inf)


HITS = (hit_box, hit_frustum, hit_capsule)  # by shape


def unit_normals(shape, p, d, taper):
    """Return normals, of any length, at the points p where rays enter their unit shapes."""
    slope, nought = (taper - 1) / 2, 0 * p[0]
    face = -p * np.sign(d)  # 1 on the face where the ray enters, less on others
    box = np.where(face == face.max(0), -np.sign(d), 0)
    lid = (np.abs(p[1]) > 1 - 1e-4) & (p[1] * d[1] < 0)
    side = np.stack([p[0], -slope * ((taper + 1) / 2 + slope * p[1]), p[2]])
    frustum = np.where(lid, np.stack([nought, p[1], nought]), side)
    capsule = np.stack([p[0], p[1] - np.clip(p[1], -taper, taper), p[2]])
    return np.choose(shape, (box, frustum, capsule))


def textured(paint, point):
    """Return the colours (3, S, S) that paints (10, S, S) have at points (3, S, S) in metres."""
    texture, frequency, slant, phase = paint[6:]
    x, y, z = point * frequency + phase
    stripes = np.floor(2 * ((x + z) * np.cos(slant) + y * np.sin(slant))) % 2
    waves = np.sin(2 * x + 3 * np.sin(y)) + np.sin(2 * y + 3 * np.sin(z)) + np.sin(3 * z + x)
    checks = (np.floor(x) + np.floor(y) + np.floor(z)) % 2
    mix = np.choose(texture.astype(int), (0 * x, checks, stripes, np.clip(2 * waves, 0, 1)))
    return paint[:3] + mix * (paint[3:6] - paint[:3])


def shade(scene, colour, normal, world, depth, floor):
    """Light colours (3, S, S): ambient, directional, contact shadows on the floor, fog and tint."""
    up, light = scene.view[:, 1].astype(np.float32), turn(scene.view, scene.light).astype(np.float32)
    level = .52 + .08 * dot(normal, up) + .6 * np.maximum(dot(normal, light), 0)
    level *= np.minimum(.8 + world[1] + np.float32(scene.height), 1)  # corners get less light
    share = np.ones_like(depth)
    for x, z, ux, uz, length, spread in np.float32(scene.shadows):  # a thing darkens a spot and a streak
        dx, dz = world[0] - x, world[2] - z
        along = np.clip(dx * ux + dz * uz, 0, length)  # the nearest point of the streak
        dx, dz = dx - along * ux, dz - along * uz
        share *= 1 - .55 * np.maximum(1 - (dx * dx + dz * dz) / spread, 0) / (1 + along)
    level *= np.where(floor, 1.25 * share, 1)
    fog = .02 * depth
    return (colour * (level * (1 - fog)) + .75 * fog) * np.float32(scene.tint)[:, None, None]


def describe(scene, instance):
    """Return which pixels are salient, the caption, and the visible things, largest first.

    A thing is salient if its score, area times centre prior and 1.5 for people, is half of the best.
    """
    size = len(instance)
    line = (np.arange(size) + .5) / size
    bell = np.exp(-((line - .5) / .35) ** 2)
    area, score, x = (np.bincount(instance.ravel(), weights, 256) for weights in
                      (None, np.outer(bell, bell).ravel(), np.tile(line, size)))
    score *= np.where(np.arange(256) // 16 == CLASSES.index("person"), 1.5, 1)
    score[:16] = 0  # walls and floor
    salient = ((score >= score.max() / 2) & (score > 0))[instance]
    things = [thing | {"pixels": int(area[thing["instance"]])} for thing in scene.things]
    things = [thing for thing in things if thing["pixels"] >= max(1, size * size // 1000)]
    if not things:
        return salient, "an empty room", things
    things.sort(key=lambda thing: -thing["pixels"])
    phrases = {"person": "{pose} person in {colour}", "plant": "plant in a {colour} pot"}
    names = [phrases.get(t["class"], "{colour} {class}").format(**t) for t in things]
    plurals = {"person": "people", "box": "boxes"}
    counts = [f"{n} {name if n == 1 else plurals.get(name, name + 's')}"
              for name, n in Counter(thing["class"] for thing in things).items()]
    listed = [f"an {name}" if name[0] == "o" else f"a {name}" for name in names]  # an orange box
    at = [x[thing["instance"]] / area[thing["instance"]] for thing in things]
    places = [f"; the {a} is {'left' if x < y else 'right'} of the {b}" for a, b, x, y in
              list(zip(names, names[1:], at, at[1:], strict=False))[:3] if abs(x - y) > .1 and a != b]
    return salient, f"a room with {', '.join(counts)}: {', '.join(listed)}{''.join(places)}", things


def render(seed: int, index: int, size: int) -> dict:
    """Render one scene of the world; what is in it depends on (seed, index) alone.

    Returns what a sample holds, see the top; semseg and human_parts (S, S) uint8, indices into CLASSES
    and PARTS; instance (S, S) uint8: wall and ceiling 1, floor 2, things 16 * class + k.
    """
    scene = furnish(Scene(seed, index))
    prims, pixel = place(scene), np.float32(1 / (scene.focal * size))
    line = pixel * (np.arange(size, dtype=np.float32) + np.float32(.5 - size / 2))
    u, v = line[None], -line[:, None]  # of the rays through the pixels' centres
    depth, winner = np.full((size, size), np.inf, np.float32), np.zeros((size, size), int)
    for p, (left, right, top, bottom) in enumerate(zip(*boxes(prims, scene.focal, size), strict=True)):
        at = np.s_[top:bottom, left:right]
        if depth[at].size:
            o, d, taper, away = local_rays(prims["table"][:, p], u[:, left:right], v[top:bottom])
            t = HITS[prims["shape"][p]](o, d, taper) + away
            winner[at][t <= depth[at]] = p
            depth[at] = np.minimum(t, depth[at])
    table = prims["table"][:, winner]  # of what each pixel shows
    o, d, taper, away = local_rays(table, u, v)
    point = o + (depth - away) * d
    normal = turn(table[4:].reshape(3, 3, size, size).swapaxes(0, 1),
                  unit_normals(prims["shape"][winner], point, d, taper))
    normal /= np.sqrt(dot(normal, normal))
    instance = prims["instance"][winner]
    colour = textured(prims["paint"][:, winner], point * prims["unit"][:, winner])
    world = turn(scene.view.T.astype(np.float32)[:, :, None, None], (u * depth, v * depth, depth))
    colour = shade(scene, colour, normal, world, depth, instance == 2).transpose(1, 2, 0)
    noise = np.random.default_rng((seed, index, 1)).standard_normal(colour.shape, np.float32)
    image = np.clip(colour + np.float32(scene.noise) * noise, 0, 1) * 255 + .5
    salient, caption, things = describe(scene, instance)
    return {"image": image.astype(np.uint8), "instance": instance.astype(np.uint8),
            "semseg": (instance // 16 + (instance == 2)).astype(np.uint8), "sal": salient.astype(np.uint8),
            "human_parts": prims["part"][winner].astype(np.uint8), "depth": depth,
            "normals": normal.transpose(1, 2, 0) * np.float32([1, 1, -1]),
            "caption": caption, "things": things}


# ------------------------------------------------------------------------------------------ the world on disk

FORMAT = 3  # raise it whenever the files written below change
SPLITS = ("train", "val", "probe")
WORLD_TASKS = ("semseg", "human_parts", "normals", "sal", "depth")  # and edge, where instances change


@dataclass(frozen=True)
class WorldSettings:
    size: int = 64  # side of the square images, pixels
    train: int = 3072  # scenes of each split
    val: int = 256
    probe: int = 768
    seed: int = 0


def write_scene(job: tuple[Path, WorldSettings, str, int]) -> tuple[str, dict]:
    """Render one scene and write its files; returns its id, and its caption and things."""
    root, settings, split, index = job
    seed = len(SPLITS) * settings.seed + SPLITS.index(split)  # no two splits share a scene
    scene = render(seed, index, settings.size)
    name = f"{split}_{index:06d}"
    least = 12 * (settings.size / 64) ** 2  # people do not label smaller specks: void
    specks = (np.bincount(scene["instance"].ravel(), minlength=256) < least)[scene["instance"]]
    normals = np.rint((scene["normals"] + 1) * 127.5).astype(np.uint8)
    normals[scene["semseg"] == CLASSES.index("plant")] = 0  # nobody labels leaves: unknown
    pictures = {"labelmap": scene["instance"], "normals": normals, "sal": scene["sal"] * 255,
                "semseg": np.where(specks, np.uint8(IGNORE), scene["semseg"]),
                "human_parts": np.where(specks, np.uint8(0), scene["human_parts"])}
    Image.fromarray(scene["image"]).save(root / f"images/{name}.jpg", quality=95, subsampling=0)
    for key, array in pictures.items():
        Image.fromarray(array).save(root / f"{key}/{name}.png", compress_level=1)
    np.save(root / f"depth/{name}.npy", scene["depth"])
    return name, {"caption": scene["caption"], "things": scene["things"]}


def write_world(root: Path, settings: WorldSettings, key: str):
    """Render every split into an empty folder, on all cores, then write what is not one file per scene."""
    for folder in ("images", "labelmap", *WORLD_TASKS):
        os.makedirs(root / folder)
    counts = {split: getattr(settings, split) for split in SPLITS}
    jobs = [(root, settings, split, i) for split, count in counts.items() for i in range(count)]
    written = track(on_all_cores(write_scene, jobs, 32), f"rendering {settings.size} px", len(jobs))
    captions = dict(sorted(written))
    for split in SPLITS:
        lines = [f"{name}\n" for name in captions if name.startswith(split)]
        (root / f"{split}.txt").write_text("".join(lines))
    files = {"meta": {"key": key, "size": settings.size}, "captions": captions,
             "dataset": {"semseg": {"classes": CLASSES}, "human_parts": {"classes": PARTS}}}
    for name, content in files.items():
        (root / f"{name}.json").write_text(json.dumps(content))


def world_key(settings: WorldSettings) -> str:
    """Hash all that decides the files: settings, file format, the renderer's own source."""
    source = Path(__file__).read_text().partition("- rendered world\n")[2].partition("- the world on")[0]
    return hashlib.sha256(repr((FORMAT, settings, code_alone(source))).encode()).hexdigest()[:12]


def code_alone(source: str) -> str:
    """Return code without comments, docstrings and layout: what decides, not the text around it."""
    return ast.dump(ast.parse(re.sub(r'"{3}.*?"{3}', '""', source, flags=re.DOTALL)))


def render_world(root: str | Path | None = None, **settings: int | str) -> Path:
    """Render the world unless it is there already; returns its folder.

    root: where to put it; None: a folder of $PRISM_CACHE (default ~/.cache/prism), one per world.
    settings: fields of WorldSettings. Raises OSError, also if root holds other files.
    """
    settings = WorldSettings(**settings)
    key = world_key(settings)
    root = Path(root or cache_folder() / f"world-{settings.size}px-{key}")
    if (root / "meta.json").exists() and json.loads((root / "meta.json").read_text())["key"] == key:
        return root
    # Renamed only when whole, so that an interrupted render is never taken for a world.
    temporary = root.with_name(f".{root.name}.{os.getpid()}")
    try:
        write_world(temporary, settings, key)
        temporary.rename(root)
    except OSError:
        if not (root / "meta.json").exists():  # else another process was first, with the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


# ---------------------------------------------------------------------------------------------------- readers


class Kind(NamedTuple):
    """How a labelled data set lies on disk: where the lists of ids and the files are, {} for the id."""

    lists: str
    files: dict[str, str]  # but for their endings; own folders: found there
    size: tuple[int, int]  # that networks see, pixels
    classes: dict[str, Sequence[str]]
    max_dist: float  # tolerance of boundary scores, share of the image diagonal


KINDS = {
    "folder": Kind("", {"image": "images/{}.jpg"}, (384, 384), {}, 0.0075),
    "world": Kind("", {"image": "images/{}.jpg"}, (64, 64), {}, 0.016),  # the 8 neighbours at 64 px
    "pascal": Kind("ImageSets/Context", {  # json/{nyu,context}_classes.json: name -> LabelMap id
        "image": "JPEGImages/{}.jpg",
        "labelmap": "pascal-context/trainval/{}.mat",  # LabelMap, ids 1..459
        "semseg": "semseg/pascal-context/{}.png",  # or semseg/VOC12/{}.png, where it exists; 255 = void
        "human_parts": "human_parts/{}.mat",  # PASCAL-Part `anno`: objects with masks, people with parts
        "sal": "sal_distill/{}.png",
        "normals": "normals_distill/{}.png",  # count where both json files know the class
    }, (512, 512), {"semseg": PASCAL_CLASSES, "human_parts": PARTS}, 0.0075),
    "nyud": Kind("gt_sets", {  # others ship other endings
        "image": "images/{}.png",
        "semseg": "segmentation/{}.png",  # class ids plus 1, 0 = void
        "normals": "normals/{}.png",  # zero, so unknown, in float files alone
        "edge": "edge/{}.png",  # trained on; scored: edge_mat/{}.mat, groundTruth{1}.Boundaries, if there
        "depth": "depth/{}.npy",  # float metres, 0 = unknown
    }, (448, 576), {"semseg": NYUD_CLASSES}, 0.011),
}


def decode_file(path: Path, decode):
    """Return decode(path); whatever goes wrong becomes one line that names the file."""
    try:
        return decode(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; put it there") from None
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        why = why.partition("\n")[0].partition(" <_io")[0]
        raise ValueError(f"{path} cannot be decoded ({why}); put an intact copy of a known format "
                         "there") from error


def read_json(path: Path) -> dict:
    """Read a JSON object; {} if there is no such file."""
    return decode_file(path, lambda path: dict(json.loads(path.read_text()))) if path.exists() else {}


def load_array(path: Path, field: str = "", mode: str | None = None) -> np.ndarray:
    """Read a .npy file, a field of a .mat file, or an image; without a mode, palette files keep their ids."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".mat":
        field, *inner = field.split(".")
        array = loadmat(path)[field]
        for name in inner:
            array = array[0, 0][name][0, 0]
        return array
    with Image.open(path) as picture:
        return np.array(picture.convert(mode) if mode else picture)


def load_label(path: Path, shape: tuple[int, ...], most: float | None = None, least: float = 0, **how):
    """Read a label as `load_array` does; raise ValueError unless it has that shape, and range if given."""
    array = decode_file(path, lambda path: load_array(path, **how))
    if array.shape != shape:
        raise ValueError(f"{path} has size {array.shape}, its image {shape[:2]}; put the right label there")
    if most is not None:
        check_range(path, array, most, least)
    return array


def check_range(path: Path, array: np.ndarray, most: float, least: float = 0):
    """Raise ValueError if values read from that file are outside least .. most, or nan."""
    if array.size and not (least <= array.min() and array.max() <= most):
        raise ValueError(f"{path} holds {array.min():g} .. {array.max():g}, not {least:g} .. {most:g}; "
                         "put an intact copy there")


def load_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a mask {0, 1}: set where the brightest channel is 128 or more, or from 0..1 in a .npy file."""
    if path.suffix == ".npy":
        return (load_label(path, shape, 1) > 0.5).astype(np.uint8)
    levels = load_label(path, (*shape, 3), 255, mode="RGB").max(-1)  # palettes have dark red for 1
    return (check_gray(path, levels) >= 128).astype(np.uint8)


def check_gray(path: Path, array: np.ndarray) -> np.ndarray:
    """Return gray levels 0..255 as they are. Raises ValueError for a map of zeros and ones."""
    if array.max() == 1:
        raise ValueError(f"{path} holds 0 and 1 where 0..255 is meant; multiply it by 255")
    return array


def load_normals(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read normals (H, W, 3) float32, as colours or as they are."""
    normals = load_label(path, (*shape, 3), 255, -1.001, mode="RGB")
    return decode_normals(normals) if normals.dtype == np.uint8 else normals.astype(np.float32)


def decode_normals(coded: np.ndarray) -> np.ndarray:
    """Turn uint8 colours (H, W, 3) into float32 normals; not renormalised, as released."""
    return np.float32(2) * coded / np.float32(255) - 1


TURNS = (None, None, *(Image.Transpose[name] for name in (  # by EXIF's orientation
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90").split()))


def upright(picture: Image.Image) -> Image.Image:
    """Turn a picture of any mode upright (EXIF), RGB; 16-bit gray is scaled, which convert() would clip."""
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers; store them in 8 bits")
    picture.load()  # a PNG may tell its orientation last
    try:
        picture = picture.transpose(TURNS[picture.getexif()[0x112]])
    except Exception:  # no orientation, 1, or whatever other programs wrote beside good pixels
        pass
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) / 257 + 0.5).astype(np.uint8))
    return picture.convert("RGB")


def read_photo(path: Path, longest: int | None = None) -> np.ndarray:
    """Read anyone's photo as (H, W, 3) uint8: upright (EXIF), shrunk to at most `longest` pixels a side."""
    def read(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            picture = upright(picture)
        if longest:
            picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return np.array(picture)

    return decode_file(path, read)


def load_human_parts(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Paint the parts of all people of a PASCAL-Part file, in file order: (H, W) uint8, 0..6."""
    target = np.zeros(shape, np.uint8)
    for item in loadmat(path)["anno"][0, 0]["objects"].ravel():
        if item["class_ind"][0, 0] == PERSON and item["mask"].any() and len(item["parts"]):
            for part in item["parts"].ravel():
                target[part["mask"] > 0] = PART_IDS[part["part_name"][0]]
    return target


def thinning_tables() -> np.ndarray:
    """Tabulate the two deletion rules of Guo and Hall, (2, 256) bool.

    Bits 0..7 of an index are the neighbours E, NE, N, NW, W, SW, S, SE (their x1..x8).
    """
    x = (np.arange(256) >> np.arange(8)[:, None] & 1).astype(bool)  # (8, 256)
    after, before = np.roll(x, -1, 0), np.roll(x, 1, 0)
    crossings = (~x & (after | np.roll(x, -2, 0)))[::2].sum(0)
    pairs = np.minimum((x | after)[::2].sum(0), (x | before)[::2].sum(0))
    either = (crossings == 1) & (pairs >= 2) & (pairs <= 3)
    return np.stack([either & ~((x[1] | x[2] | ~x[7]) & x[0]),
                     either & ~((x[5] | x[6] | ~x[3]) & x[4])])


THINNING = thinning_tables()


def thin(binary: np.ndarray) -> np.ndarray:
    """Thin to lines one pixel wide: Guo-Hall, to convergence, as MATLAB's bwmorph(b, "thin", Inf).

    binary: (H, W), or a stack (..., H, W) of such, thinned each by itself; non-zero = set. Returns bool.
    """
    sides = [(0, 0)] * (binary.ndim - 2) + [(1, 1)] * 2
    padded = np.pad(np.ascontiguousarray(binary) != 0, sides).astype(np.uint8)  # .mat arrays are not
    flat, row = padded.reshape(-1), padded.shape[-1]
    neighbours = (1, 1 - row, -row, -1 - row, -1, row - 1, row, row + 1)
    left, before = np.flatnonzero(flat), -1
    while len(left) != before:  # only a full pair without any change ends it
        before = len(left)
        for table in THINNING:
            code = np.zeros(len(left), np.uint8)
            for bit, offset in enumerate(neighbours):
                code |= flat[left + offset] << bit
            gone = table[code]
            flat[left[gone]] = 0
            left = left[~gone]
    return padded[..., 1:-1, 1:-1] > 0


def boundary_label(labelmap: np.ndarray) -> np.ndarray:
    """Draw the training label of `edge`, (H, W) uint8 {0, 1}, from a LabelMap (H, W).

    A true Laplacian, as in the released code: a column one pixel wide whose id is the mean of its
    two neighbours' goes unmarked. The border mirrors without repeating the outermost pixel.
    """
    around = np.pad(labelmap.astype(np.int64), 1, mode="reflect")
    cross = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]
    return thin(cross - 4 * around[1:-1, 1:-1]).astype(np.uint8)


def files_by_id(folder: Path) -> dict[str, Path]:
    """Return {id: file} of the pictures and arrays below a folder. Raises ValueError for two of one id."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if is_image(str(path.relative_to(folder)), (".npy",)):
            if name in found:
                raise ValueError(f"{found[name]} and {path.name} share a name; keep one of them")
            found[name] = path
    return found


def find_files(root: Path, kind: str) -> dict[str, str]:
    """Return the files of a data set in that folder: NYUDv2 comes in packagings of other endings."""
    files = {}
    for key, pattern in KINDS[kind].files.items():
        endings = (path.suffix for path in (root / pattern).parent.glob("*.*")
                   if is_image(path.name, (".npy", ".mat")))
        files[key] = str(Path(pattern).with_suffix(min(endings, default=Path(pattern).suffix)))
    return files


class Samples(Dataset):
    """Indexing shared by all data sets.

    dataset[i]: sample i whole, padded to `size`. dataset[(i, step, slot)], what the loader asks for: if
    `train`, a random view of (seed, step, slot) alone, uint8 where it is distill's; else as dataset[i].
    """

    boundary_protocol, scales = "sak", (0.5, 2.0)  # a key of eval.py's THRESHOLDS; of the multitask view

    def __init__(self, ids: Sequence, size: int | tuple[int, int],  # of what networks see, pixels
                 train: bool = False, seed: int = 0,
                 view: Literal["multitask", "distill"] = "multitask"):  # distill: the image alone
        self.ids, self.train, self.seed, self.view = ids, train, seed, view
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int, labels: bool = True) -> dict:
        """Return sample i as numpy arrays before any transform; without labels, its image alone."""
        raise NotImplementedError

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict:
        i, *place = key if isinstance(key, tuple) else (key,)
        sample = self.fetch(i, place)
        if place and self.train:
            rng = np.random.default_rng((self.seed, *place))
            if self.view == "distill":  # no padding, so bytes will do until they are on the device
                pixels = distill_view(sample["image"], self.size, rng)["image"].transpose(2, 0, 1)
                return {"image": torch.from_numpy(pixels.copy()), "name": sample["name"]}
            sample |= multitask_view(shrink(sample, self.size), self.size, rng, self.scales)
        return {**to_tensors(shrink(sample, self.size), self.size), "name": sample["name"]}

    def fetch(self, i: int, place: Sequence[int]) -> dict:
        """Read sample i for `place`, (step, slot) or (): what is not train has one view."""
        return self.read(i, labels=not place or self.view == "multitask")


class LabelFolder(Samples):
    """PASCAL-Context or NYUDv2: a list of ids per split, a file per id and label.

    train: None means split == "train"; cache, of decoded samples: None means "if it is a world". Raises
    FileNotFoundError or ValueError that names the file.
    """

    def __init__(self, root: str | Path, split: str, size: int | tuple[int, int] | None = None,
                 train: bool | None = None, seed: int = 0, cache: bool | None = None, kind: str = "pascal",
                 **options):
        self.root, self.split, self.kind = Path(root), split, kind
        self.source = f"{kind}:{self.root.resolve()}"  # what open_data takes
        self.lists, _, default_size, self.classes, self.max_dist = KINDS[kind]
        if kind == "world":  # the other protocols suppress and fade over 4 px, made for 500
            self.boundary_protocol, self.scales = "simple", (1.0, 1.0)  # few steps: rooms as they are
            default_size = json.loads((self.root / "meta.json").read_text())["size"]
        train = split == "train" if train is None else train
        self._cache = {} if (kind == "world" if cache is None else cache) else None
        self.captions: dict[str, dict] = {}
        super().__init__(self.list_ids(), size or default_size, train, seed, **options)
        if not self.ids:
            raise ValueError(f"{self.root} has no image in split {split}; write {split}.txt, an id per line")
        self.find_labels()

    def list_ids(self) -> list[str]:
        """List the ids of the split."""
        listed = self.root / self.lists / f"{self.split}.txt"
        if not listed.exists():
            known = ", ".join(sorted(path.stem for path in listed.parent.glob("*.txt"))) or "none"
            raise FileNotFoundError(f"{listed} is missing; splits of this folder: {known}")
        return [line.strip() for line in listed.read_text().splitlines() if line.strip()]

    def find_labels(self) -> None:
        """Find the files of all ids, and what they label."""
        self.files = find_files(self.root, self.kind)
        paths = [path for name in self.ids for path in self.paths(name).values()]
        if missing := [path for path in paths if not path.exists()]:
            folders = Counter(str(path.parent.relative_to(self.root)) for path in missing)
            raise FileNotFoundError(f"{missing[0]} is missing, and as many files in all as are named: "
                                    f"{dict(folders)}; put them there")
        self.tasks = {task: row.channels or len(self.classes[task])
                      for task, row in TASKS.items() if task in (*self.files, "edge")}
        if self.kind == "pascal":  # normals count on classes that NYUD knows too, 170 of 459
            context, nyu = (json.loads((self.root / f"json/{name}_classes.json").read_text())
                            for name in ("context", "nyu"))
            shared = set(context) & {*nyu, "tvmonitor"} - {"unknown"}  # NYUD says "television"
            self.valid_normals = [context[name] for name in shared]

    def paths(self, name: str) -> dict[str, Path]:
        """Return the files of a sample; some labels have a better file, which is used where it exists."""
        better = {"semseg": f"semseg/VOC12/{name}.png", "labelmap": f"edge_mat/{name}.mat"}
        paths = {key: self.root / pattern.format(name) for key, pattern in self.files.items()}
        return paths | {key: path for key in better if (path := self.root / better[key]).exists()}

    def read(self, i: int, labels: bool = True) -> dict:
        if self._cache is None:
            return self.decode(self.ids[i], labels)
        if (i, labels) not in self._cache:
            self._cache[i, labels] = self.decode(self.ids[i], labels)
        return dict(self._cache[i, labels])

    def decode(self, name: str, labels: bool) -> dict:
        path = self.paths(name)
        image = read_photo(path["image"])
        sample = {**self.captions.get(name, {}), "image": image, "name": name}
        return sample | (self.decode_labels(path, image.shape[:2]) if labels else {})

    def decode_labels(self, path: dict[str, Path], shape: tuple[int, int]) -> dict:
        pascal, void = self.kind == "pascal", int(self.kind == "nyud")  # 0 is void, the others one more
        ids = load_label(path["semseg"], shape, IGNORE, field="segmentation").astype(np.uint8)
        ids = ids - np.uint8(void)  # 0 wraps round to 255
        check_range(path["semseg"], ids[ids != IGNORE] + void, self.tasks["semseg"] - 1 + void)
        labels = {"semseg": ids, "normals": load_normals(path["normals"], shape)}
        if not pascal:
            labels["edge"] = load_mask(path["edge"], shape)
            labels["depth"] = load_label(path["depth"], shape, IGNORE - 1, field="depth").astype(np.float32)
            lines = (load_label(path["labelmap"], shape, 1, field="groundTruth.Boundaries")
                     if "labelmap" in path else labels["edge"])
            return labels | {"labelmap": lines.astype(np.int32)}
        labelmap = load_label(path["labelmap"], shape, 2**16 - 1, field="LabelMap").astype(np.int32)
        labels["normals"][~np.isin(labelmap, self.valid_normals)] = 0
        parts = decode_file(path["human_parts"], lambda path: load_human_parts(path, shape))
        return labels | {"sal": load_mask(path["sal"], shape), "human_parts": parts, "labelmap": labelmap,
                         "edge": boundary_label(labelmap)}


class OwnFolder(LabelFolder):
    """Anyone's images and labels, of which any may be missing; also how the rendered world is written."""

    def list_ids(self) -> list[str]:
        known = files_by_id(self.root / "images")
        self.files = {"image": known, "labelmap": files_by_id(self.root / "labelmap")}
        if not known:
            raise FileNotFoundError(f"{self.root}/images holds no images; put them there as <id>.jpg or .png")
        if any((self.root / f"{split}.txt").exists() for split in ("train", self.split)):
            ids = super().list_ids()
            if strays := [name for name in ids if name not in known]:
                raise FileNotFoundError(f"{self.root}/images lacks {strays[0]} that {self.split}.txt names "
                                        f"({len(strays)} in all); put it there, or take out the line")
            return ids
        if self.split not in ("train", "val"):
            raise FileNotFoundError(f"{self.root}/{self.split}.txt is missing; write an id per line")
        held = {name for name in known if hashlib.sha256(name.encode()).digest()[0] % 10 == 0}
        say(f"{self.root} has no train.txt: {len(held)} of {len(known)} images are val's, by a hash of ids")
        return sorted(held if self.split == "val" else known.keys() - held)

    def find_labels(self) -> None:
        captions, described = (read_json(self.root / f"{name}.json") for name in ("captions", "dataset"))
        self.captions = {k: v if isinstance(v, dict) else {"caption": v} for k, v in captions.items()}
        for task, given in described.items():
            enter_task(task, given)
        self.classes = {task: given["classes"] for task, given in described.items() if "classes" in given}
        self.number_scale = {task: given.get("scale") for task, given in described.items()}
        self.files |= {task: files_by_id(self.root / task) for task in TASKS
                       if task in described or (self.root / task).is_dir()}
        for key, files in self.files.items():
            strays = [path for name, path in files.items() if name not in self.files["image"]]
            if strays or not files and key in TASKS:
                what = f"{strays[0]} has no image of its name" if strays else f"{self.root / key} is empty"
                raise FileNotFoundError(f"{what}; label images/<id>.* in {key}/<id>.*, or remove it")
        self.tasks = {task: self.count_classes(task) if row.kind == "classes" else row.channels
                      for task, row in TASKS.items()
                      if task in self.files or (task == "edge" and self.files["labelmap"])}

    def count_classes(self, task: str) -> int:
        """Count the classes of a task; without names, by the largest id of all labels."""
        if task == "human_parts":
            self.classes.setdefault(task, PARTS)
        if task not in self.classes:
            files = track(self.files[task].values(), f"count classes of {task}")
            maps = (decode_file(path, load_array) for path in files)
            most = max(int(ids[ids != IGNORE].max(initial=0)) for ids in maps)
            self.classes[task] = [str(k) for k in range(most + 1)]
            if most == 0:
                raise ValueError(f"{self.root / task} has id 0 alone, and {IGNORE} = void; write 0, 1, ...")
            say(f"{task} has ids 0..{most}; name the classes in {self.root / 'dataset.json'}")
        return len(self.classes[task])

    def paths(self, name: str) -> dict[str, Path]:
        return {key: files[name] for key, files in self.files.items() if name in files}

    def decode_labels(self, path: dict[str, Path], shape: tuple[int, int]) -> dict:
        labels = {}
        if "labelmap" in path:
            labels["labelmap"] = load_label(path["labelmap"], shape, 2**16 - 1).astype(np.int32)
            labels["edge"] = boundary_label(labels["labelmap"])
        for task, channels in self.tasks.items():
            row, file = TASKS[task], path.get(task)
            if file is None and task not in labels:
                vector, real = row.kind == "normals", row.kind in ("normals", "number")
                labels[task] = np.full((*shape, 3) if vector else shape, row.unknown,
                                       np.float32 if real else np.uint8)
            elif file and row.kind == "classes":
                labels[task] = load_label(file, shape, IGNORE).astype(np.uint8)
                check_range(file, labels[task][labels[task] != IGNORE], channels - 1)
            elif file and row.kind == "normals":
                labels[task] = load_normals(file, shape)
                labels[task][(labels[task] == -1).all(-1)] = 0  # black
            elif file and row.kind == "number":
                labels[task] = self.load_number(task, file, shape)
            elif file:
                labels[task] = load_mask(file, shape)
        return labels

    def load_number(self, task: str, path: Path, shape: tuple[int, int]) -> np.ndarray:
        """Read a number per pixel, (H, W) float32."""
        scale = 1 if path.suffix == ".npy" else self.number_scale.get(task)
        if scale is None:
            raise ValueError(f"{path} holds steps of an unknown size; write npy, or {task}'s scale in "
                             "dataset.json: units per step")
        array = load_label(path, shape).astype(np.float32) * np.float32(scale)
        array[~np.isfinite(array)] = TASKS[task].unknown
        array[array == IGNORE] = np.nextafter(np.float32(IGNORE), np.float32(0))  # a height, say: it is known
        if TASKS[task].distance:
            check_range(path, array, IGNORE - 1)
        return array


FOLDERS = dict.fromkeys(("folder", "world"), OwnFolder)
PascalContext, NYUDv2, World = (partial(FOLDERS.get(kind, LabelFolder), kind=kind)
                                for kind in ("pascal", "nyud", "world"))


def open_data(spec: str, split: str, **options) -> Samples:
    """Open a split of "world" (rendered once, at `size`) or of "KIND:/path".

    KIND: a key of KINDS, or for stage 1 images, imagenet (its folder named like the split, if there is one)
    or tars ("tars:/path/*.tar"). options: as those classes take them. Raises ValueError for another spec.
    """
    kind, _, root = spec.partition(":")
    if kind == "captions" and root:
        return CaptionList(Path(root).expanduser(), split, **options)
    if kind in UNLABELLED and root:
        return ImageFolder(Path(root).expanduser(), split, kind=kind, **options)
    if kind not in KINDS or not (root or kind == "world"):
        raise ValueError(f'data "{spec}" is unknown; use "world" or "KIND:/path" with KIND one of '
                         f"{', '.join((*KINDS, *UNLABELLED, 'captions'))}")
    size = options.get("size") or WorldSettings.size
    root = root or render_world(size=size if isinstance(size, int) else max(size))
    return FOLDERS.get(kind, LabelFolder)(Path(root).expanduser(), split, kind=kind, **options)


# -------------------------------------------------------------------------------------- images without labels

UNLABELLED = ("images", "imagenet", "tars")  # kinds of `open_data`, for stage 1, by the million
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
TRIES = 10  # unreadable images in a row for one sample


def is_image(name: str, more: tuple[str, ...] = ()) -> bool:
    """Tell an image by its suffix; what has a dot in front is another program's note or waste bin."""
    return name.lower().endswith((*SUFFIXES, *more)) and not re.search(r"(^|/)\.[^./]", name)


def list_images(root: Path) -> list[str]:
    """List the images below a folder, sorted, links followed."""
    paths = (os.path.relpath(os.path.join(folder, name), root)
             for folder, _, names in os.walk(root, followlinks=True) for name in names)
    return sorted(filter(is_image, paths))


def image_folder(root: Path) -> Path:
    """Return where the images of a folder lie: of a labelled data set not with its labels."""
    kind = guess_spec(str(root)).partition(":")[0]
    return root / os.path.dirname(KINDS[kind].files["image"]) if kind in KINDS else root


def find_tars(pattern: str) -> list[str]:
    """Expand a glob with {0000..0123} ranges; every number of a range must be there."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = span.groups()
        return [path for k in range(int(first), int(last) + 1) for path in
                find_tars(pattern[: span.start()] + str(k).zfill(len(first)) + pattern[span.end() :])]
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise FileNotFoundError(f"{pattern} matches no file; name plain tars as /path/*.tar")
    return found


def index_tar(path: str) -> list[tuple[str, int, int]]:
    """Return (name, offset, size) of a plain tar's images: 3 s per 100,000."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and is_image(m.name)]
    except tarfile.TarError:
        raise ValueError(f"{path} is no plain tar; decompress it, or copy it again") from None


class ImageFolder(Samples):
    """Images without labels, for stage 1: below a folder, or in tars by a glob with {0..9} ranges.

    The loader gets the distill view if `train`, as does dataset[(i, step, slot)]; dataset[i] is
    the largest centred crop. Tars are read in place; webdataset's other members are passed over.
    """

    tasks, classes = {}, {}

    def __init__(self, root: str | Path, split: str = "train", size: int | tuple[int, int] | None = None,
                 train: bool | None = None, seed: int = 0, view: str = "distill", kind: str = "images"):
        if view != "distill":
            raise ValueError(f"{root} has no labels; use it for --stage deconstruct alone")
        self.source, self.root, self.split = f"{kind}:{Path(root).absolute()}", Path(root), split
        if kind == "imagenet" and (self.root / split).is_dir():
            self.root /= split
        elif kind == "imagenet":
            say(f"{self.root} has no folder {split}: all images below it are taken")
        self.tars = []
        if (inner := image_folder(self.root)) != self.root:
            say(f"{root} has labels: of its images those in {inner} are taken")
            self.root = inner
        if self.root.is_dir():
            names = list_images(self.root)
        elif ".tar" in self.root.name:
            self.tars = find_tars(str(self.root))
            parts = list(track(map(index_tar, self.tars), "indexing tars", len(self.tars)))
            names = [name for part in parts for name, *_ in part]
            self.places = np.array([(k, *place) for k, part in enumerate(parts) for _, *place in part])
        else:
            raise FileNotFoundError(f"{root} is no folder; name one, or plain tars as /path/*.tar")
        if not names:
            raise ValueError(f"{root} holds no images; known suffixes are {' '.join(SUFFIXES)}; tars are "
                             "read as tars:/path/*.tar or tars:/path/{00..12}.tar")
        train = split == "train" if train is None else train
        super().__init__(names, size or (224, 224), train, seed, view)
        self.lost = set()  # what cannot be read; more than 1 in 100 end the training
        # Enough for the smallest crop, so that a reduced JPEG is never enlarged where it was not.
        self.least = math.ceil(max(self.size) / math.sqrt(CROP_SCALE[0]))

    def path(self, i: int) -> str:
        """Name image i: its file, or its tar and the member."""
        return f"{self.tars[self.places[i, 0]] if self.tars else self.root}/{self.ids[i]}"

    def read(self, i: int, labels: bool = False) -> dict:
        def decode(path: str) -> np.ndarray:
            tar, start, size = self.places[i].tolist() if self.tars else (None, 0, -1)
            with open(path if tar is None else self.tars[tar], "rb") as file:
                file.seek(start)
                with Image.open(BytesIO(file.read(size))) as picture:
                    picture.draft(None, (self.least, self.least))  # JPEGs, at 1/2, 1/4 or 1/8
                    return np.asarray(upright(picture))

        return {"image": decode_file(self.path(i), decode), "name": self.ids[i]}

    def fetch(self, i: int, place: Sequence[int]) -> dict:
        """Replace what cannot be read by another image that (seed, step, slot) choose."""
        for attempt in range(1, TRIES + 1):
            try:
                sample = self.read(i)
                break
            except (ValueError, OSError) as error:
                self.lost.add(i)
                if not place or attempt == TRIES or len(self.lost) > max(TRIES, len(self) // 100):
                    raise
                print(f"{error}; another image takes its place", flush=True)
                i = int(np.random.default_rng((self.seed, *place, attempt)).integers(len(self)))
        if not (place and self.train):
            whole = Image.fromarray(sample["image"])
            sample["image"] = np.asarray(ImageOps.fit(whole, self.size[::-1], Image.Resampling.BILINEAR))
        return sample


# ------------------------------------------------------------------------------------------------- transforms

MEAN_COLOUR = (0.485, 0.456, 0.406)  # fill of padding: ImageNet's, zero once normalised
CROP_SCALE = (0.08, 1.0)  # share of the area in the distill view


def nearest(target: int, source: int) -> np.ndarray:
    """Return the source pixel (target,) int64 of each pixel when an axis is resized, as OpenCV does."""
    pixels = np.floor(np.arange(target) * (1.0 / (target / source))).astype(np.int64)
    return np.minimum(pixels, source - 1)


def choose_crop(semseg: np.ndarray | None, row_of: np.ndarray, column_of: np.ndarray,
                size: tuple[int, int], rng: np.random.Generator):
    """Draw a crop in which no class fills 75 %; the 11th draw is taken as it comes.

    row_of, column_of: source pixel of each row and column of the resized image.
    Returns the crop's rows and columns of the resized image, all of them where it is too small.
    """
    for _ in range(11):
        rows, columns = (np.arange(length)[start : start + side]
                         for length, side in zip((len(row_of), len(column_of)), size, strict=True)
                         for start in [rng.integers(max(length - side, 0) + 1)])
        if semseg is None:
            break
        crop = semseg.take(row_of[rows], 0).take(column_of[columns], 1)
        pixels = np.bincount(crop.ravel(), minlength=256)[:IGNORE]
        if np.count_nonzero(pixels) > 1 and pixels.max() < 0.75 * pixels.sum():
            break
    return rows, columns


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Clip to [0, 255] and cut off the decimals."""
    return np.clip(values, 0, 255).astype(np.uint8)


def distort_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of (H, W, 3) uint8 at random, through 8-bit HSV."""

    def stretch(values):
        return to_uint8(values * np.float32(rng.uniform(0.5, 1.5))) if rng.random() < 0.5 else values

    if rng.random() < 0.5:
        image = to_uint8(image + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.random() < 0.5
    image = Image.fromarray(stretch(image) if contrast_first else image)
    hsv = np.array(image.convert("HSV"))  # hue in 0..255, OpenCV's in 0..179
    hsv[..., 1] = stretch(hsv[..., 1])
    if rng.random() < 0.5:
        hsv[..., 0] += np.uint8(rng.integers(-18, 18) * 256 // 180 % 256)
    image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    return image if contrast_first else stretch(image)


def multitask_view(sample: dict, size: tuple[int, int], rng: np.random.Generator, scales=(0.5, 2.0)) -> dict:
    """Scale, crop, flip and distort a sample of `read`; not yet padded.

    Enlarging brings things nearer, so depth is divided by the scale; a mirror turns normals in x.
    """
    h, w = sample["image"].shape[:2]
    scale = rng.uniform(*scales)
    tall, wide = int(h * scale), int(w * scale)
    row_of, column_of = nearest(tall, h), nearest(wide, w)
    classes = next((sample[key] for key in sample if key in TASKS and TASKS[key].kind == "classes"), None)
    rows, columns = choose_crop(classes, row_of, column_of, size, rng)
    flip = rng.random() < 0.5
    columns = columns[::-1] if flip else columns
    view = {key: sample[key].take(row_of[rows], 0).take(column_of[columns], 1)
            for key in TASKS if key in sample}
    for key, array in view.items():
        if TASKS[key].distance:
            array /= np.float32(scale)
        elif TASKS[key].kind == "normals" and flip:
            array[..., 0] *= -1
    pixels = torch.from_numpy(sample["image"]).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (tall, wide), mode="bilinear")[0]  # is OpenCV's INTER_LINEAR
    pixels = pixels.permute(1, 2, 0).numpy()[rows][:, columns].astype(np.uint8)
    return {**view, "image": distort_colours(pixels, rng)}


def shrink(sample: dict, size: tuple[int, int]) -> dict:
    """Fit a sample of `read` that is larger than `size` into it: labels by the nearest pixel, lines kept."""
    h, w = sample["image"].shape[:2]
    scale = min(size[0] / h, size[1] / w)
    if scale >= 1:
        return sample
    tall, wide = (max(1, round(scale * n)) for n in (h, w))
    rows, columns = nearest(tall, h), nearest(wide, w)
    small = {key: sample[key].take(rows, 0).take(columns, 1) for key in TASKS if key in sample}
    for key in (key for key in small if TASKS[key].kind == "edge"):  # a line is one pixel wide
        small[key] = np.maximum.reduceat(np.maximum.reduceat(sample[key], rows, 0), columns, 1)
    image = Image.fromarray(sample["image"]).resize((wide, tall), Image.Resampling.BILINEAR)
    return sample | small | {"image": np.array(image)}


def distill_view(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> dict:
    """Crop CROP_SCALE of the area of an (H, W, 3) uint8 image at 3:4 to 4:3, resize to `size`, flip.

    After ten draws that do not fit, the largest centred crop of an allowed ratio is taken.
    """
    h, w = image.shape[:2]
    for _ in range(10):
        area, ratio = h * w * rng.uniform(*CROP_SCALE), (4 / 3) ** rng.uniform(-1, 1)
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= w and 0 < tall <= h:
            top, left = rng.integers(h - tall + 1), rng.integers(w - wide + 1)
            break
    else:
        wide, tall = min(w, round(h * 4 / 3)), min(h, round(w * 4 / 3))
        top, left = (h - tall) // 2, (w - wide) // 2
    crop = Image.fromarray(image[top : top + tall, left : left + wide])
    image = np.asarray(crop.resize(size[::-1], Image.Resampling.BILINEAR))  # antialiased
    return {"image": image[:, ::-1] if rng.random() < 0.5 else image}


def pad(array: np.ndarray, size: tuple[int, int], fill: float | tuple) -> np.ndarray:
    """Pad (h, w, ...) to at least `size`; the odd row or column goes to the bottom or right."""
    h, w = array.shape[:2]
    tall, wide = max(h, size[0]), max(w, size[1])
    top, left = (tall - h) // 2, (wide - w) // 2
    padded = np.full((tall, wide, *array.shape[2:]), fill, array.dtype)
    padded[top : top + h, left : left + w] = array
    return padded


def to_tensors(sample: dict, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Pad a sample of numpy arrays, mark what is to be ignored with 255, and make it tensors."""
    # Channels move while still bytes, the division is in place: together 6 times as fast.
    pixels = np.ascontiguousarray(sample["image"].transpose(2, 0, 1)).astype(np.float32)  # (3, H, W)
    pixels /= 255
    image = pixels.transpose(1, 2, 0)  # (H, W, 3), a view
    out = {"image": image if image.shape[:2] == size else pad(image, size, MEAN_COLOUR)}
    for key in (key for key in TASKS if key in sample):
        row = TASKS[key]
        y = out[key] = pad(sample[key], size, row.unknown)
        if row.kind == "normals":
            y[~y.any(-1)] = IGNORE
        elif row.kind == "number":
            y[np.isnan(y) | (y == row.unknown)] = IGNORE
        elif row.needs_object and not (y % IGNORE).any():  # all 0 or 255
            y[:] = IGNORE  # no part in sight: nothing to learn from or to score
    for key, array in out.items():
        classes = key in TASKS and TASKS[key].kind in ("classes", "mask")
        array = array.transpose(2, 0, 1) if array.ndim == 3 else array  # (3, S, S)
        out[key] = torch.from_numpy(np.ascontiguousarray(array, np.int64 if classes else np.float32))
    return out


# --------------------------------------------------------------------------------------------------- captions

START, PAD, END, UNKNOWN = range(4)  # RoBERTa's ids of <s>, <pad>, </s>, <unk>
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
CHUNK = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")  # GPT-2's
LETTERS = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}  # a letter per byte
LETTERS |= {b: chr(256 + k) for k, b in enumerate(b for b in range(256) if b not in LETTERS)}
BYTES = {letter: b for b, letter in LETTERS.items()}


def chunks(text: str) -> list[str]:
    """Cut a text as GPT-2 does, mostly into words with the space before them, and write bytes as letters."""
    return ["".join(map(LETTERS.get, chunk.encode())) for chunk in CHUNK.findall(text)]


class Tokenizer:
    """Text to token ids and back: chunks or, given merges, RoBERTa's byte pairs."""

    def __init__(self, words: Sequence[str], merges: Sequence[str] = ()):
        self.words, self.ids = words, {word: i for i, word in enumerate(words)}
        self.merges, self.ranks = merges, {tuple(pair.split(" ")): k for k, pair in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without <s> and </s>. The pair of the lowest rank merges first."""
        ids = []
        for chunk in chunks(text):
            parts = list(chunk) if self.merges else [chunk]
            while pairs := [pair for pair in pairwise(parts) if pair in self.ranks]:
                best, old, parts = min(pairs, key=self.ranks.get), parts, []
                while old:
                    n = 2 if tuple(old[:2]) == best else 1
                    parts, old = [*parts, "".join(old[:n])], old[n:]
            ids += [self.ids.get(part, UNKNOWN) for part in parts]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special ones left out."""
        letters = "".join(self.words[i] for i in ids if i >= len(SPECIAL))
        return bytes(map(BYTES.get, letters)).decode(errors="replace").strip()


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read RoBERTa's vocab.json and merges.txt. Raises ValueError or OSError."""
    vocab = decode_file(folder / "vocab.json", lambda path: json.loads(path.read_text("utf-8")))
    lines = decode_file(folder / "merges.txt", lambda path: path.read_text("utf-8").split("\n"))
    merges = tuple(line for line in lines if line and not line.startswith("#version"))
    return Tokenizer(tuple(sorted(vocab, key=vocab.get)), merges)


class CaptionList(Samples):
    """Photos with captions: ROOT/SPLIT.json is [{"image": path in ROOT, "caption": text or texts}, ...]. All
    rows of a photo are one sample."""

    tasks, classes = {}, {}

    def __init__(self, root: Path, split: str, size: int | tuple[int, int] = 224, **options):
        file, self.captions = root / f"{split}.json", {}
        rows = decode_file(file, lambda path: json.loads(path.read_text("utf-8")))
        try:
            rows[0]  # there is one
            for row in rows:
                of_photo = self.captions.setdefault(root / row["image"], {"caption": []})
                of_photo["caption"] += np.atleast_1d(row["caption"]).tolist()
        except (TypeError, LookupError):
            raise ValueError(f'{file} is no [{{"image": path, "caption": text}}, ...]; write it so') from None
        super().__init__(list(self.captions), size)
        if missing := [path for path in self.ids if not path.is_file()]:
            raise FileNotFoundError(f"{missing[0]} of {file} is missing; put it there")
        self.root, self.source = root, f"captions:{root.resolve()}"

    def read(self, i: int, labels: bool = False) -> dict:
        path = self.ids[i]
        return {**self.captions[path], "image": read_photo(path), "name": path.name}


def squeeze(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Resize an image (H, W, 3) uint8, whole and unmirrored as captions need it: (3, *size) in [0, 1]."""
    picture = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    return to_tensors({"image": np.asarray(picture)}, size)["image"]


class Captioned(Dataset):
    """Images of any data whose `read` gives captions, with the tokens of one caption each: of several, in
    training, that which (step, slot) choose.

    encode: text -> tokens (T,) int64. Raises ValueError where a caption lacks.
    """

    def __init__(self, samples: Samples, size: tuple[int, int], encode: Callable | None = None):
        self.samples, self.size, self.encode = samples, size, encode
        self.source, self.classes = samples.source, samples.classes
        texts = (samples.captions.get(name, {}).get("caption", "") for name in samples.ids)
        self.captions = [np.atleast_1d(text).tolist() for text in texts]
        if empty := [name for name, texts in zip(samples.ids, self.captions, strict=True)
                     if not texts or not all(isinstance(text, str) and text.strip() for text in texts)]:
            raise ValueError(f"{empty[0]} of {self.source} has no caption, as {len(empty)} in all; write "
                             "them, or leave the images out")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict:
        i, *place = key if isinstance(key, tuple) else (key,)
        image, texts = self.samples.read(i, False)["image"], self.captions[i]
        k = np.random.default_rng(place).integers(len(texts)) if place else 0
        return {"image": squeeze(image, self.size), "tokens": self.encode(texts[k])}

    @staticmethod
    def collate(rows: list[dict]) -> dict:
        """Stack samples; tokens (B, T) are padded on the right."""
        tokens = nn.utils.rnn.pad_sequence([row["tokens"] for row in rows], True, PAD)
        return {"image": torch.stack([row["image"] for row in rows]), "tokens": tokens}


# ----------------------------------------------------------------------------------------------------- loader


def sample_order(length: int, batch_size: int, steps: range, seed: int, rank: int, world_size: int):
    """Yield the samples [(index, step, slot), ...] of each step: a function of (seed, step) alone.

    The order is an endless chain of shuffled epochs; each rank takes its own run of slots.
    """
    epoch = -1
    for step in steps:
        batch = []
        for slot in range(rank * batch_size, (rank + 1) * batch_size):
            now, place = divmod(step * batch_size * world_size + slot, length)
            if now != epoch:  # the last word keeps this stream apart from those of the samples
                epoch, rng = now, np.random.default_rng((seed, now, 2**32 - 1))
                permutation = rng.permutation(length)  # an array: a list of 10^6 takes 5 times as much
            batch.append((int(permutation[place]), step, slot))
        yield batch


def leave_group(_) -> None:
    """Leave signals to a whole group, such as torchrun's SIGTERM, to the process that trains and saves."""
    os.setsid()


def batches(dataset: Samples, batch_size: int, steps: int, start: int = 0, seed: int = 0,
            rank: int = 0, world_size: int = 1, workers: int = 0, device="cpu") -> Iterator[dict]:
    """Yield the batches of steps start .. steps - 1: tensors stacked, images on `device`, names as a list.

    batch_size: images per process. Ranks and workers of any number, and a run resumed at any `start`, see
    what one process with batch_size * world_size would have seen. Raises as the data set does.
    """
    order = sample_order(len(dataset), batch_size, range(start, steps), seed, rank, world_size)
    generator = torch.Generator()  # its own, else starting the loader would draw from the global one
    try:
        for batch in DataLoader(dataset, batch_sampler=order, num_workers=workers, generator=generator,
                                pin_memory=torch.cuda.is_available(), worker_init_fn=leave_group,
                                collate_fn=getattr(dataset, "collate", None)):
            image = batch["image"].to(device, non_blocking=True)
            batch["image"] = image.float().div_(255) if image.dtype == torch.uint8 else image
            yield batch
    except (ValueError, OSError) as error:  # workers put their traceback before the message
        last = str(error).strip().rpartition("\n")[2]
        raise type(error)(last.removeprefix(f"{type(error).__name__}: ")) from error


# ----------------------------------------------------------------------- pictures, folder check, command line

NEUTRAL = (128, 128, 128)  # where nothing is known
INK = (30, 32, 38)


def colourise(task: str, array: np.ndarray) -> np.ndarray:
    """Draw a label or a prediction as (H, W, 3) uint8; ignored and unknown pixels come grey.

    array: classes (H, W) ids; masks and edges (H, W) in [0, 1]; normals (H, W, 3), unit; numbers (H, W),
    whose ramp of colours is the map's own range.
    """
    array, kind = np.asarray(array), TASKS[task].kind
    known = array != IGNORE
    colours = np.array([tuple(bytes.fromhex(text)) for text in TASKS[task].colours.split()], np.uint8)
    if kind == "classes":
        shade = 0.6 ** (array // len(colours))  # past the list, colours come again, darker
        picture = colours[array % len(colours)] * shade[..., None]
    elif kind == "normals":
        known = known.all(-1) & array.any(-1)
        picture = np.clip((array + 1) * 127.5, 0, 255)
    elif kind == "number":
        known &= array > 0 if TASKS[task].distance else np.isfinite(array)
        low, high = np.quantile(array[known], (0, 1)) if known.any() else (0, 1)
        stops = np.linspace(low, high, len(colours))
        picture = np.stack([np.interp(array, stops, channel) for channel in colours.T], -1)
    else:
        picture = np.repeat(array[..., None] * 255.0, 3, -1)
    return np.where(known[..., None], picture, NEUTRAL).astype(np.uint8)


def write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, ink=INK, anchor: str = "lm") -> float:
    """Write a line of text; returns where it ends."""
    font = ImageFont.load_default(size=14)
    pen.text((x, y), text, ink, font, anchor)
    return x + font.getlength(text)


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, list[np.ndarray]]], side: int,
          legends: dict[str, Sequence[str]] | None = None) -> Image.Image:
    """Draw a table of pictures (H, W, 3) uint8, each fitted into a square of `side` pixels.

    A row is a line of text, which stands below it, and its pictures. Below all stand the class colours
    of tasks, {task: names}.
    """
    step, high, top = side + 4, side + 28, 26
    lines = [(task, k, names[k : k + 12]) for task, names in (legends or {}).items()
             for k in range(0, len(names), 12)]
    width, bottom = max(step * len(columns), 900 * bool(lines)), top + high * len(rows)
    canvas = Image.new("RGB", (width, bottom + 22 * len(lines)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, name in enumerate(columns):
        write(pen, step * k + side / 2, top / 2, name, anchor="mm")
    for r, (text, cells) in enumerate(rows):
        write(pen, 4, top + high * r + side + 12, text)
        for k, cell in enumerate(cells):
            picture, scale = Image.fromarray(cell), side / max(cell.shape[:2])
            size = [max(1, round(scale * n)) for n in picture.size]
            picture = picture.resize(size, Image.Resampling.NEAREST)  # label colours do not mix
            canvas.paste(picture, (step * k + (side - size[0]) // 2, top + high * r + (side - size[1]) // 2))
    for y, (task, first, names) in zip(range(bottom + 10, 2**16, 22), lines, strict=False):
        write(pen, 4, y, task)
        x = 100
        for k, name in enumerate(names, first):
            colour = tuple(colourise(task, np.array([[k]]))[0, 0].tolist())
            pen.rectangle((x, y - 7, x + 14, y + 7), colour, INK)
            x = write(pen, x + 20, y, name) + 16
    return canvas


def guess_spec(given: str) -> str:
    """Turn a folder into a spec of `open_data`; a spec stays as it is."""
    root = Path(given)
    if not root.is_dir():
        return given
    own = (root / "images").is_dir() and any((root / name).exists() for name in (*TASKS, "dataset.json"))
    marks = {kind: (root / KINDS[kind].lists).is_dir() for kind in ("pascal", "nyud")}
    marks |= {"world": "key" in read_json(root / "meta.json"), "folder": own}
    return f"{next((kind for kind, found in marks.items() if found), 'images')}:{root}"


def check(spec: str) -> bool:
    """Open the data set, decode 64 evenly spaced samples; True if all can be read."""
    dataset, failed = open_data(spec, "train"), []
    chosen = range(0, len(dataset), -(-len(dataset) // 64))
    for i in track(chosen, "decoding"):
        try:
            dataset.read(i)
        except (ValueError, OSError) as error:
            failed.append(str(error))
    print(f"{spec}: {len(dataset)} samples; {len(failed)} of {len(chosen)} cannot be read", *failed, sep="\n")
    return not failed


@dataclass
class Args:
    show: str = "world"  # draw this: a folder, or what open_data takes: folder:/path, ...
    split: str = "train"  # split to draw
    rows: int = 8  # samples to draw
    out: Path = Path("contact_sheet.png")  # picture to write
    check: str | None = None  # check this folder or spec, draw nothing
    debug: bool = False  # show tracebacks


def main(args: Args) -> int:
    if args.check:
        return 0 if check(guess_spec(args.check)) else 1
    dataset, rows = open_data(guess_spec(args.show), args.split), []
    for i in range(0, len(dataset), -(-len(dataset) // args.rows)):  # evenly spaced
        sample = dataset.read(i)
        pictures = [sample["image"], *(colourise(task, sample[task]) for task in dataset.tasks)]
        rows.append((f"{sample['name']}   {sample.get('caption', '')}", pictures))
    sheet(["image", *dataset.tasks], rows, 192, dataset.classes).save(args.out)
    print(f"{args.out}: {len(rows)} rows of {len(dataset)} samples of {dataset.root}")
    return 0


if __name__ == "__main__":
    args = tyro.cli(Args)
    exit_with_one_line(lambda: main(args), args.debug)
