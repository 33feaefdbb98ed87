"""Data: the rendered world, PASCAL-Context, NYUDv2, images without labels; a loader that can resume.

    python data.py                    renders the world once and draws a contact sheet
    python data.py --show /data/PASCALContext
    python data.py --check /data/NYUDv2
    python data.py --check "tars:/data/shard-{0000..0123}.tar"    (stage 1: any images will do)
    python data.py --bench imagenet:/data/imagenet --image-size 384

Folder layout: PASCAL-Context as its multi-task archives ship it; the world adds the last three
    JPEGImages/<id>.jpg               RGB
    pascal-context/trainval/<id>.mat  LabelMap, ids 1..459 (world: instance ids)
    semseg/VOC12|pascal-context/<id>.png  class ids, 255 = void; VOC12 is used where it exists
    human_parts/<id>.mat              PASCAL-Part `anno`: objects with masks, people with parts
    sal_distill/<id>.png              gray, >= 128 is salient
    normals_distill/<id>.png          RGB, n = 2 v / 255 - 1; x right, y up, z towards the camera
    ImageSets/Context/<split>.txt     one id per line
    ImageSets/Parts/<split>.txt       JSON {id: [class index of each object, -1 if mask empty]}
    json/{nyu,context}_classes.json   name -> LabelMap id; normals count where both know the name
    depth/<id>.npy                    float32 metres along the optical axis (z, not ray length)
    captions.json                     {id: {"caption": str, "things": [...]}}
    meta.json                         classes, parts, size, seed, counts, format version

Folder layout: NYUDv2 as SAK, PRISM and InvPT ship it (PACKAGINGS: the endings of others)
    images/<id>.png                   RGB
    segmentation/<id>.png             class ids plus 1, 0 = void
    normals/<id>.png                  RGB, n = 2 v / 255 - 1; zero, so unknown, in float files alone
    edge/<id>.png                     gray, 0 or 255; the lines that edges are trained on
    edge_mat/<id>.mat                 groundTruth{1}.Boundaries, scored against where it exists
    depth/<id>.npy                    float metres, 0 = unknown
    gt_sets/<split>.txt               one id per line

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
PASCAL-Context labels the first five tasks, NYUDv2 semseg, normals, edge and depth, a world all in
its layout. `read` adds labelmap (H, W) int32, whose boundaries are scored (NYUDv2: a map of lines);
the world also instance (the same array, PASCAL layout only), caption and things.
"""

import contextlib
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import struct
import sys
import tarfile
import threading
import time
import traceback
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from scipy.io import loadmat, savemat
from torch.utils.data import DataLoader, Dataset, default_collate

# === tasks ===


@dataclass(frozen=True)
class Task:
    """One dense task: what its head puts out, and how it is scored."""

    channels: int | None  # outputs of the network; None: one per class of the data set
    unknown: int  # unlabelled pixels in read(), and padding, before both become 255
    metric: str  # headline number in eval.py
    unit: str
    lower_is_better: bool = False


TASKS = {  # in the order of the task embeddings of a PASCAL checkpoint
    "semseg": Task(None, 255, "miou", "%"),
    "human_parts": Task(7, 255, "miou", "%"),
    "normals": Task(3, 0, "mean", "degrees", lower_is_better=True),
    "edge": Task(1, 255, "odsf", "%"),
    "sal": Task(2, 255, "maxf", "%"),
    "depth": Task(1, 0, "rmse", "m", lower_is_better=True),
}
IGNORE = 255


def check_tasks(names: Iterable[str]):
    """Raise ValueError for a name that is no task."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f'task "{name}" is unknown; use {", ".join(TASKS)}')


def check_flags(args, limits: dict[str, tuple[float, float]]):
    """Raise ValueError for a number of a command line outside its limits; None is none, nan is outside."""
    for name, (least, most) in limits.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not least <= number <= most:
                raise ValueError(f"{flag} {number} is not in {least:g} .. {most:g}; give a number that is")
        if isinstance(value, tuple) and len(value) > 2:
            raise ValueError(f"{flag} {' '.join(map(str, value))}; give a side, or height and width")


FILES = {  # of every sample of PASCAL-Context; the world adds depth
    "image": "JPEGImages/{}.jpg", "labelmap": "pascal-context/trainval/{}.mat",
    "semseg": "semseg/pascal-context/{}.png", "human_parts": "human_parts/{}.mat",
    "sal": "sal_distill/{}.png", "normals": "normals_distill/{}.png",
}
PASCAL_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
                  "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()
NYUD_CLASSES = ("wall,floor,cabinet,bed,chair,sofa,table,door,window,bookshelf,picture,counter,blinds,"
                "desk,shelves,curtain,dresser,pillow,mirror,floor mat,clothes,ceiling,books,"
                "refridgerator,television,paper,towel,shower curtain,box,whiteboard,person,night stand,"
                "toilet,sink,lamp,bathtub,bag,otherstructure,otherfurniture,otherprop").split(",")
NYUD_FOLDERS = {"image": "images", "semseg": "segmentation", "normals": "normals", "edge": "edge",
                "depth": "depth"}
PACKAGINGS = {  # of NYUDv2: who ships it, and its file endings in the order of the folders above
    "NYUDv2 of SAK, PRISM and InvPT": "png png png png npy",
    "NYUD_MT of MTI-Net and ATRC": "jpg png npy npy npy",
    "NYUD_MT of ASTMT": "jpg mat jpg png mat",
}
PERSON = 15  # class_ind of people in the PASCAL-Part files
PART_FILE_NAMES = ("", "head hair lear rear lebrow rebrow leye reye mouth nose", "torso neck",
                   "luarm ruarm", "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot")
PART_IDS = {name: part for part, names in enumerate(PART_FILE_NAMES) for name in names.split()}

def track(items: Iterable, what: str, total: int, start: int = 0, lines: bool = True,
          quiet: bool = False) -> Iterator:
    """Pass on `items` under a progress bar with rate and time left.

    Without a terminal, a plain line every ten seconds and at the end, if `lines`. quiet: nothing.
    """
    terminal, begin = sys.stdout.isatty(), time.perf_counter()
    shown = begin
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rate]}",
               TimeRemainingColumn())
    with Progress(*columns, disable=quiet or not terminal) as bar:
        task = bar.add_task(what, total=total, completed=start, rate="")
        for done, item in enumerate(items, start + 1):
            yield item
            now = time.perf_counter()
            rate = (done - start) / (now - begin)
            bar.update(task, completed=done, rate=f"{rate:.1f}/s")
            if lines and not (quiet or terminal) and (now - shown > 10 or done == total):
                shown = now
                left = f"{(total - done) / rate:.0f} s left" if done < total else f"{now - begin:.0f} s"
                print(f"{what}: {done}/{total}, {rate:.1f}/s, {left}", flush=True)


# === rendered world ===
# World frame: x right, y up, z into the room, metres; the camera stands at (0, height, 0). A thing
# is built in a frame of its own, standing on y = 0 and facing -z: at yaw 0, towards the camera.
# Everything is a primitive, the room included. Vectors come component first, (3, P), so that
# numpy runs over contiguous memory.
# Sizes: B scenes, S pixels a side, N = B * S * S pixels, P primitives, F fragments.

CLASSES = ("wall", "floor", "person", "ball", "box", "can", "cone", "table", "chair", "lamp",
           "plant", "picture")
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
COLOURS = {"red": (.80, .13, .12), "orange": (.93, .50, .12), "yellow": (.92, .82, .20),
           "green": (.18, .58, .22), "blue": (.15, .32, .78), "purple": (.52, .22, .64),
           "white": (.90, .90, .87), "brown": (.45, .28, .16)}
SKIN = ((.94, .76, .65), (.85, .64, .48), (.66, .45, .31), (.42, .27, .18))
HAIR = ((.10, .08, .07), (.30, .18, .10), (.62, .44, .22), (.55, .53, .52))
LEAF, METAL = (.20, .50, .16), (.25, .25, .27)
ELLIPSOID, BOX, FRUSTUM, CAPSULE = range(4)
PLAIN, CHECKER, STRIPES, BLOTCHES = range(4)
CELL = 1.3  # metres; every thing keeps to its own square of the floor, so that none touch
CHUNK_PIXELS = 2 ** 17  # rendered at once: few calls of numpy, yet small enough for the cache


class Scene:
    """One room as numbers: camera, light, paints, things, and a row for each primitive."""

    def __init__(self, seed, index):
        self.random = np.random.default_rng((seed, index)).random
        self.things, self.rows, self.shadows, self.counts = [], [], [], Counter()
        pitch, self.yaw = self.between(.08, .32), self.between(-.2, .2)
        sp, cp, sy, cy = math.sin(pitch), math.cos(pitch), math.sin(self.yaw), math.cos(self.yaw)
        right, up, ahead = (cy, 0, -sy), (sp * sy, cp, sp * cy), (sy * cp, -sp, cy * cp)
        self.view = (right, up, ahead)
        self.height, self.focal = self.between(1.1, 1.9), self.between(.8, 1.05)
        self.left, self.right = -self.between(2.2, 3.8), self.between(2.2, 3.8)
        self.back, self.ceiling = self.between(4.5, 8), self.between(2.6, 3.4)
        light = (self.between(-.7, .7), self.between(.6, 1), -self.between(.2, .9))
        self.light = [x / math.hypot(*light) for x in light]  # points at the lamp
        self.tint, self.noise = [self.between(.94, 1.08) for _ in "rgb"], self.between(.005, .025)
        self.build_room()

    def build_room(self):
        """Add walls, ceiling and floor: thick boxes that overlap, so that no crack is left."""
        wall, roof = self.paint(pale=.5)[1], self.paint(pale=.8, texture=PLAIN)[1]
        x, y, z = (self.left + self.right) / 2, self.ceiling / 2, self.back / 2 + .5
        half = ((self.right - self.left) / 2 + .5, y + .5, z - .2)  # from just ahead of the camera
        for centre, axis, paint in (
                ((self.left - .1, y, z), 0, wall), ((self.right + .1, y, z), 0, wall),
                ((x, y, self.back + .1), 2, wall), ((x, 2 * y + .1, z), 1, roof),
                ((x, -.1, z), 1, self.paint(pale=.2)[1])):
            self.add(BOX, centre, [.1 if k == axis else half[k] for k in range(3)], paint)
            self.rows[-1] += (0, 0, 0, 0, 1, 2 if centre[1] < 0 else 1)

    def between(self, low, high):
        return low + (high - low) * self.random()

    def choose(self, options):
        return options[int(len(options) * self.random())]

    def paint(self, rgb=None, pale=0, texture=None):
        """Mix a paint: colour name, (two RGB colours, texture, frequency in 1/m, slant, phase)."""
        name, bright = None if rgb else self.choose(tuple(COLOURS)), self.between(.85, 1.15)
        rgb = [bright * ((1 - pale) * c + pale * .8) + self.between(-.05, .05)
               for c in rgb or COLOURS[name]]
        if texture is None:
            texture = self.choose((PLAIN, PLAIN, CHECKER, STRIPES, BLOTCHES))
        dark = self.between(.45, .75)  # the second colour is a shade, so that the name stays true
        return name, (*rgb, *(dark * c for c in rgb), texture, self.between(1.5, 3.5) if pale else
                      self.between(4, 11), self.between(0, math.pi / 2), self.random())

    def add(self, shape, centre, half, paint, axis=(0, 1, 0), taper=1, part=0):
        """Add a primitive to the thing being built; `axis` is where its own y axis points."""
        self.rows.append((shape, part, taper, *centre, *half, *axis, *paint))

    def limb(self, start, end, radius, paint, part=0):
        """Add a capsule from joint to joint; its radius counts twice, as half of x and of z."""
        length, ends = math.dist(start, end), list(zip(start, end, strict=True))
        self.add(CAPSULE, [(a + b) / 2 for a, b in ends], (radius, length / 2, radius), paint,
                 axis=[(b - a) / length for a, b in ends], part=part)

    def put(self, name, x, z, slack=0, y=0, yaw=0, scale=1, **how):
        """Build a thing and set it down near (x, y, z), as far off as `slack` minus its radius."""
        instance, first = 16 * CLASSES.index(name) + self.counts[name], len(self.rows)
        self.counts[name] += 1
        build = add_person if name == "person" else add_thing
        colour, radius, top = build(self, name, **how)
        slack, top = max(0, slack - radius * scale), top * scale + y
        x, z = x + self.between(-slack, slack), z + self.between(-slack, slack)
        self.rows[first:] = [(*row, x, y, z, yaw, scale, instance) for row in self.rows[first:]]
        if y == 0:
            away = math.hypot(self.light[0], self.light[2])
            self.shadows.append((x, z, -self.light[0] / away, -self.light[2] / away,
                                 top * away / self.light[1], 1.5 * (radius * scale) ** 2))
        self.things.append({"class": name, "colour": colour, "instance": instance,
                            "pose": how.get("pose")})
        return x, z, top


def add_thing(scene, name, seat=None):
    """Add the primitives of a thing other than a person: its colour name, radius and height."""
    between, add, (colour, paint) = scene.between, scene.add, scene.paint()
    plain = scene.paint(paint[:3], texture=PLAIN)[1]
    match name:
        case "ball":
            x = y = z = between(.2, .4)
            add(ELLIPSOID, (0, y, 0), (x, y, z), paint)
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
            add_legs(scene, x, z, 2 * y - .07, .035, plain)
            x = math.hypot(x, z)
        case "chair":
            x, back, seat = between(.22, .27), between(.22, .32), seat or between(.4, .5)
            add(BOX, (0, seat - .03, 0), (x, .03, .22), paint)
            add(BOX, (0, seat + back, .2), (x, back, .025), paint)
            add_legs(scene, x, .22, seat - .06, .03, plain)
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
            add_leaves(scene, 2 * half, leaf)
            x, y = max(1.3 * leaf, 1.4 * pot), half + .95 * leaf
        case "picture":
            x, y = between(.3, .65), between(.25, .45)
            add(BOX, (0, 0, -.02), (x, y, .02), paint)
            add(BOX, (0, 0, -.03), (x - .06, y - .06, .02), scene.paint()[1])
            add(BOX, (0, -y / 2, -.04), (x - .06, y / 2 - .06, .02), scene.paint()[1])
            disc = (between(-.5, .5) * x, .3 * y, -.05)
            add(ELLIPSOID, disc, (.25 * x, .25 * x, .03), scene.paint()[1])
    return colour, x, 2 * y


def add_legs(scene, x, z, height, thick, paint):
    for side, front in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        scene.add(BOX, (side * (x - thick), height / 2, front * (z - thick)),
                  (thick, height / 2, thick), paint)


def add_leaves(scene, pot, leaf):
    green, turned = scene.paint(LEAF, texture=PLAIN)[1], scene.between(0, 6)
    for k in range(scene.choose((5, 6, 7, 8))):
        lean, angle = scene.between(.15, .8) if k else 0, turned + k
        axis = (math.sin(lean) * math.cos(angle), math.cos(lean), math.sin(lean) * math.sin(angle))
        scene.add(ELLIPSOID, (leaf * axis[0], pot + .9 * leaf * axis[1], leaf * axis[2]),
                  (.3 * leaf, leaf, .2 * leaf), green, axis)


def add_person(scene, name, pose):
    """Add a person one unit high by forward kinematics: shirt's colour name, radius, height."""
    between, add, (colour, shirt), (_, trousers) = (
        scene.between, scene.add, scene.paint(), scene.paint())
    skin, hair, shoes = (scene.paint(scene.choose(options), texture=PLAIN)[1]
                         for options in (SKIN, HAIR, HAIR))
    shins = scene.choose((trousers, trousers, skin))  # skin: the trousers are shorts
    sleeves = scene.choose(((skin, skin), (shirt, skin), (shirt, shirt), (shirt, shirt)))
    stride, legs = between(.25, .48) if pose == "walking" else between(-.06, .06), []
    for side in (-1, 1):
        thigh, bend = side * stride, between(.3, .7) if side * stride < -.1 else between(.02, .1)
        if pose == "sitting":
            thigh, bend = between(1.42, 1.5), between(1.4, 1.6)
        legs.append(joints((side * .055, 0, 0), side * .03, (.24, thigh), (.235, thigh - bend)))
    hips = .035 - min(ankle[1] for _, _, ankle in legs)  # the lower foot stands on the floor
    for hip, knee, ankle in (((x, y + hips, z) for x, y, z in leg) for leg in legs):
        scene.limb(hip, knee, .045, trousers, 5)
        scene.limb(knee, ankle, .033, shins, 6)
        add(ELLIPSOID, (ankle[0], ankle[1], ankle[2] - .03), (.03, .033, .075), shoes, part=6)
    add(ELLIPSOID, (0, hips + .01, 0), (.098, .06, .07), trousers, part=2)
    add(FRUSTUM, (0, hips + .16, 0), (.088, .14, .058), shirt, taper=1.3, part=2)
    add(ELLIPSOID, (0, hips + .295, 0), (.118, .035, .074), shirt, part=2)
    scene.limb((0, hips + .3, 0), (0, hips + .36, 0), .032, skin, 2)
    add(ELLIPSOID, (0, hips + .408, -.005), (.05, .068, .057), skin, part=1)
    add(ELLIPSOID, (0, hips + .425, .012), (.054, .058, .056), hair, part=1)
    for side in (-1, 1):
        swing, bend = -side * stride, between(.1, .6)
        if pose == "sitting":
            swing, bend = between(.2, .6), between(.6, 1.1)
        elif pose == "standing" and scene.random() < .2:  # waves
            swing = between(2.1, 2.7)
        shoulder, elbow, wrist, hand = joints(
            (side * .125, hips + .285, 0), side * between(.03, .25), (.165, swing),
            (.14, swing + bend), (.03, swing + bend))
        scene.limb(shoulder, elbow, .033, sleeves[0], 3)
        scene.limb(elbow, wrist, .026, sleeves[1], 4)
        add(ELLIPSOID, hand, (.028, .04, .028), skin, part=4)
    return colour, .2, hips + .48


def joints(start, spread, *bones):
    """Return the joints of a limb; a bone is its length and its swing forward from hanging."""
    chain = [start]
    for length, swing in bones:
        x, y, z = chain[-1]
        chain.append((x + length * spread, y - length * math.cos(swing),
                      z - length * math.sin(swing)))
    return chain


def furnish(scene):
    """Put 0-2 people and 2-6 objects on cells of the floor, 0-2 pictures on the walls."""
    cells, objects, tables = floor_cells(scene), scene.choose((2, 3, 4, 5, 6)), []
    for _ in range(scene.choose((0, 1, 1, 2))):
        pose, height = scene.choose(("standing", "walking", "sitting")), scene.between(1.45, 1.95)
        yaw = scene.between(-1.4, 1.4) + scene.choose((0, 0, 0, 0, math.pi))
        x, z, top = scene.put("person", *cells.pop(), yaw=yaw, scale=height, pose=pose)
        if pose == "sitting":  # under the thighs, .045 below the hips
            scene.put(scene.choose(("chair", "chair", "box")), x, z, yaw=yaw,
                      seat=top - height * (.48 + .045))
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


def floor_cells(scene):
    """Return the centres (x, z) of the floor cells in view, the nearest likelier at the end."""
    cells, z = [], 1.45 + CELL / 2 + scene.between(0, .4)
    while z + CELL / 2 < scene.back:
        middle, reach = z * math.tan(scene.yaw), .5 * z / scene.focal + .35
        low, high = max(scene.left, middle - reach), min(scene.right, middle + reach)
        columns = int((high - low) / CELL)
        first = (low + high - CELL * (columns - 1)) / 2
        cells += [(first + CELL * k, z) for k in range(columns)]
        z += CELL
    return sorted(cells, key=lambda cell: scene.random() * cell[1] ** 1.5, reverse=True)


# From scenes to pixels, in the camera's frame: x right, y up, z ahead. A ray is (u, v, 1), so the
# parameter at which it hits something is that thing's depth.

def turn(rotation, x, y, z):
    """Rotate vectors by (3, 3, ...); not by matmul, whose sums may depend on the batch."""
    return np.stack([row[0] * x + row[1] * y + row[2] * z for row in rotation])


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def gather_primitives(scenes, view):
    """Return all primitives, sorted by shape, as a dict of arrays in their cameras' frames."""
    rows = np.array([(b, *row) for b, scene in enumerate(scenes) for row in scene.rows])
    rows = rows[np.argsort(rows[:, 1], kind="stable")].T  # (29, P)
    owner, shape, part, instance = rows[[0, 1, 2, 28]].astype(int)
    taper, centre, half, y = rows[3], rows[4:7], rows[7:10], rows[10:13]
    position, (sine, cosine), size = rows[23:26], (np.sin(rows[26]), np.cos(rows[26])), rows[27]
    camera = view[owner].transpose(1, 2, 0)  # (3, 3, P)
    rotation = np.stack([cosine * camera[:, 0] - sine * camera[:, 2], camera[:, 1],
                         sine * camera[:, 0] + cosine * camera[:, 2]], 1)
    position[1] -= np.array([scene.height for scene in scenes])[owner]
    hint = np.where(np.abs(y[0]) < .9, [[1], [0], [0]], [[0], [0], [1]])
    x = hint - dot(hint, y) * y
    x /= np.sqrt(dot(x, x))
    axes = np.stack([turn(rotation, *axis) for axis in (x, y, np.cross(x, y, axis=0))])
    extent, unit = half * size, half * size
    extent[1] += np.where(shape == CAPSULE, extent[0], 0)
    extent[::2] *= np.where(shape == FRUSTUM, np.maximum(1, taper), 1)
    unit[1] = np.where(shape == CAPSULE, unit[0], unit[1])  # a unit ball swept along y in +-taper
    return {"owner": owner, "shape": shape, "part": part, "instance": instance,
            "taper": np.where(shape == CAPSULE, half[1] / half[0], taper),
            "paint": rows[13:23].astype(np.float32),
            "centre": turn(rotation, *(centre * size)) + turn(camera, *position),
            "corner": axes * extent[:, None], "unit": unit, "local": axes / unit[:, None]}


def fragments(prims, focal, size):
    """List the pixels of every primitive's screen box: primitive, x and y, (F,) each."""
    centre, corner = prims["centre"][:, None], prims["corner"][:, :, None]
    signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).T[:, :, None]
    x, y, z = centre + (corner * signs[:, None]).sum(0)  # (8, P) each
    pixels, edges = focal[prims["owner"]] * size / np.maximum(z, .1), []
    for line in (x * pixels, -y * pixels):
        first = np.clip(np.ceil(line.min(0) + size / 2 - .5), 0, size).astype(np.int32)
        last = np.clip(np.ceil(line.max(0) + size / 2 - .5), 0, size).astype(np.int32)
        edges += [first, last - first]
    left, width, top, height = edges
    prim, y = runs(height)
    row, x = runs(width[prim])
    prim, y = prim[row], y[row]
    return prim, x + left[prim], y + top[prim]


def runs(lengths):
    """Lay runs of these lengths end to end; return every element's run and place in it."""
    run = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return run, np.arange(len(run), dtype=np.int32) - (np.cumsum(lengths) - lengths)[run]


def localize(prims, prim, u, v):
    """Express rays in their primitives' unit frames: o, d (3, F), taper, depth of o, local (9, F).

    o is the ray's point at the depth of the primitive's centre: so near, float32 is exact enough.
    """
    x, y, depth = prims["centre"]
    table = [x / depth, y / depth, depth, prims["taper"], *prims["local"].reshape(9, -1)]
    x, y, depth, taper, *local = (column.astype(np.float32)[prim] for column in table)
    x, y = (u - x) * depth, (v - y) * depth
    o = np.stack([local[k] * x + local[k + 1] * y for k in (0, 3, 6)])
    d = np.stack([local[k] * u + local[k + 1] * v + local[k + 2] for k in (0, 3, 6)])
    return o, d, taper, depth, local


# Where does the ray o + t d, (3, F) each, enter a shape of unit size? t (F,), inf for a miss.

def hit_ellipsoid(o, d, taper):
    square = dot(d, d)
    nearest = -dot(o, d) / square
    space = (1 - dot(o, o)) / square + nearest * nearest
    return np.where(space > 1e-9, nearest - np.sqrt(np.maximum(space, 0)), np.inf)


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
    ball = hit_ellipsoid((o[0], o[1] - end, o[2]), d, taper)
    return np.where(space > 0, np.where(y == end, side, ball), np.inf)


HITS = (hit_ellipsoid, hit_box, hit_frustum, hit_capsule)  # by shape


def unit_normals(shape, p, d, taper):
    """Return normals, of any length, at the points p where rays enter their unit shapes."""
    slope, nought = (taper - 1) / 2, 0 * p[0]
    face = -p * np.sign(d)  # 1 on the face where the ray enters, less on others
    box = np.where(face == face.max(0), -np.sign(d), 0)
    lid = (np.abs(p[1]) > 1 - 1e-4) & (p[1] * d[1] < 0)
    side = np.stack([p[0], -slope * ((taper + 1) / 2 + slope * p[1]), p[2]])
    frustum = np.where(lid, np.stack([nought, p[1], nought]), side)
    capsule = np.stack([p[0], p[1] - np.clip(p[1], -taper, taper), p[2]])
    return np.choose(shape, (p, box, frustum, capsule))


def find_nearest(prims, focal, size, u, v):
    """Return the primitive (N,) that each pixel shows, and its depth (N,) in metres."""
    prim, x, y = fragments(prims, focal, size)
    pixel = (prims["owner"][prim] * size + y) * size + x
    o, d, taper, centre, _ = localize(prims, prim, u[pixel], v[pixel])
    ends = np.searchsorted(prims["shape"][prim], range(5))
    t = np.concatenate([hit(o[:, a:b], d[:, a:b], taper[a:b]) for hit, a, b in
                        zip(HITS, ends[:-1], ends[1:], strict=True)]) + centre
    depth, winner = np.full(len(u), np.inf, np.float32), np.empty(len(u), np.int32)
    np.minimum.at(depth, pixel, t)
    won = np.flatnonzero(t == depth[pixel])
    winner[pixel[won]] = prim[won]
    return winner, depth


def touch(prims, winner, u, v, depth):
    """Return normals in the camera's frame and texture points, (3, N) each, of what is seen."""
    o, d, taper, centre, local = localize(prims, winner, u, v)
    point = o + (depth - centre) * d
    n = unit_normals(prims["shape"][winner], point, d, taper)
    n = np.stack([local[k] * n[0] + local[k + 3] * n[1] + local[k + 6] * n[2] for k in range(3)])
    return n / np.sqrt(dot(n, n)), point * prims["unit"].astype(np.float32)[:, winner]


def textured(paint, point):
    """Return the colours (3, N) that paints (10, N) have at points (3, N) in metres."""
    texture, frequency, slant, phase = paint[6:]
    x, y, z = point * frequency + phase
    mix = np.where(texture == CHECKER, (np.floor(x) + np.floor(y) + np.floor(z)) % 2, 0)
    at = np.flatnonzero(texture == STRIPES)
    mix[at] = np.floor(2 * ((x + z)[at] * np.cos(slant[at]) + y[at] * np.sin(slant[at]))) % 2
    at = np.flatnonzero(texture == BLOTCHES)
    x, y, z = x[at], y[at], z[at]
    waves = np.sin(2 * x + 3 * np.sin(y)) + np.sin(2 * y + 3 * np.sin(z)) + np.sin(3 * z + x)
    mix[at] = np.clip(2 * waves, 0, 1)
    return paint[:3] + mix * (paint[3:6] - paint[:3])


def floor_light(scenes, owner, x, z):
    """Return the share of light at floor points (F,); a thing darkens a spot and a streak."""
    table = np.zeros((len(scenes), max(len(s.shadows) for s in scenes), 6), np.float32)
    table[:, :, 5] = 1e-6  # no thing: no shadow
    for row, scene in zip(table, scenes, strict=True):
        row[:len(scene.shadows)] = scene.shadows
    light = np.ones(len(owner), np.float32)
    for columns in table.transpose(1, 2, 0):
        thing_x, thing_z, ux, uz, length, spread = (column[owner] for column in columns)
        dx, dz = x - thing_x, z - thing_z
        along = np.clip(dx * ux + dz * uz, 0, length)  # the nearest point of the streak
        dx, dz = dx - along * ux, dz - along * uz
        light *= 1 - .55 * np.maximum(1 - (dx * dx + dz * dz) / spread, 0) / (1 + along)
    return light


def shade(scenes, view, colour, normal, x, y, depth, on_floor):
    """Light the colours (3, N): ambient, directional, contact shadows, fog and tint."""
    owner = np.repeat(np.arange(len(scenes)), len(depth) // len(scenes))
    floor = np.flatnonzero(on_floor)
    table = np.array([(*s.light, *s.tint, s.height) for s in scenes]).T
    light = turn(view.transpose(1, 2, 0), *table[:3])
    *light, red, green, blue, height = np.stack([*light, *table[3:]]).astype(np.float32)[:, owner]
    camera = view.transpose(2, 1, 0).astype(np.float32)[:, :, owner]  # camera to world
    up, world = camera[1], turn(camera, x, y, depth)
    level = .52 + .08 * dot(normal, up) + .6 * np.maximum(dot(normal, light), 0)
    level *= np.minimum(.8 + world[1] + height, 1)  # corners get less light
    level[floor] *= 1.25 * floor_light(scenes, owner[floor], world[0][floor], world[2][floor])
    fog = .02 * depth
    return (colour * (level * (1 - fog)) + .75 * fog) * (red, green, blue)


def salience(instance):
    """Find salient pixels (B, S, S); also every instance's pixels and mean x in [0, 1], (B, 256).

    A thing counts if its score, area times centre prior and 1.5 for people, is half of the best.
    """
    batch, size = instance.shape[:2]
    key = (instance + 256 * np.arange(batch)[:, None, None]).ravel()
    line = (np.arange(size) + .5) / size
    bell = np.exp(-((line - .5) / .35) ** 2)
    area, score, x = (
        np.bincount(key, weights, 256 * batch).reshape(batch, 256) for weights in
        (None, np.tile(np.outer(bell, bell).ravel(), batch), np.tile(line, size * batch)))
    score *= np.where(np.arange(256) // 16 == CLASSES.index("person"), 1.5, 1)
    score[:, :16] = 0  # walls and floor
    salient = (score >= score.max(1, keepdims=True) / 2) & (score > 0)
    return salient.ravel()[key].reshape(instance.shape), area, x / np.maximum(area, 1)


def describe(scene, area, x, size):
    """Return the caption of a scene and a list of its visible things, largest first."""
    things = [thing | {"pixels": int(area[thing["instance"]])} for thing in scene.things]
    things = [thing for thing in things if thing["pixels"] >= max(1, size * size // 1000)]
    if not things:
        return "an empty room", {"things": []}
    things.sort(key=lambda thing: -thing["pixels"])
    phrases = {"person": "{pose} person in {colour}", "plant": "plant in a {colour} pot"}
    names = [phrases.get(t["class"], "{colour} {class}").format(**t) for t in things]
    plurals = {"person": "people", "box": "boxes"}
    counts = [f"{n} {name if n == 1 else plurals.get(name, name + 's')}"
              for name, n in Counter(thing["class"] for thing in things).items()]
    listed = [f"an {name}" if name[0] == "o" else f"a {name}" for name in names]  # an orange box
    at, pairs = [x[thing["instance"]] for thing in things], range(min(3, len(things) - 1))
    sides = ["left" if at[k] < at[k + 1] else "right" for k in pairs]
    places = [f"; the {names[k]} is {sides[k]} of the {names[k + 1]}"
              for k in pairs if abs(at[k] - at[k + 1]) > .1 and names[k] != names[k + 1]]
    caption = f"a room with {', '.join(counts)}: {', '.join(listed)}{''.join(places)}"
    return caption, {"things": things}


def render(seed: int, indices: Sequence[int], size: int) -> dict:
    """Render scenes of the world; what is in scene i depends on (seed, i) alone.

    image       (B, S, S, 3) uint8 RGB
    semseg      (B, S, S)    uint8 index into CLASSES; the ceiling is wall
    instance    (B, S, S)    uint8 wall 1, floor 2, things 16 * class + k
    human_parts (B, S, S)    uint8 index into PARTS
    sal         (B, S, S)    uint8 {0, 1}
    normals     (B, S, S, 3) float32 unit, camera frame: x right, y up, z towards the camera
    depth       (B, S, S)    float32 metres along the optical axis (z, not ray length)
    captions    list of B str
    attributes  list of B dicts {"things": [...]}: the visible things, largest first
    """
    step = max(1, CHUNK_PIXELS // size ** 2)
    chunks = [render_chunk(seed, indices[k:k + step], size) for k in range(0, len(indices), step)]
    joined = {key: [row for chunk in chunks for row in chunk[key]]
              for key in ("captions", "attributes")}
    return joined | {key: np.concatenate([chunk[key] for chunk in chunks])
                     for key in chunks[0] if key not in joined}


def render_chunk(seed, indices, size):
    """Render a few scenes: primitives, the nearest one in each pixel, its colour and labels."""
    scenes = [furnish(Scene(seed, int(index))) for index in indices]
    view, focal = np.array([s.view for s in scenes]), np.array([s.focal for s in scenes])
    prims = gather_primitives(scenes, view)
    u, v = image_plane(focal, size)  # (N,) each
    winner, depth = find_nearest(prims, focal, size, u, v)
    normal, point = touch(prims, winner, u, v, depth)  # (3, N) each
    instance, part = prims["instance"][winner], prims["part"][winner]
    colour = textured(prims["paint"][:, winner], point)
    colour = shade(scenes, view, colour, normal, u * depth, v * depth, depth, instance == 2)
    return finish(seed, indices, scenes, size, colour, instance, part, normal, depth)


def image_plane(focal, size):
    """Return u and v, (N,) each, of the rays (u, v, 1) through the pixels' centres."""
    line = np.arange(size, dtype=np.float32) + np.float32(.5 - size / 2)
    pixel = (1 / (focal * size)).astype(np.float32)[:, None]
    return (pixel * np.tile(line, size)).ravel(), (pixel * np.repeat(-line, size)).ravel()


def finish(seed, indices, scenes, size, colour, instance, part, normal, depth):
    """Add noise, saliency and captions, and shape everything as `render` returns it."""
    shape = (len(scenes), size, size)
    image = np.ascontiguousarray(colour.reshape(3, *shape).transpose(1, 2, 3, 0))
    for pixels, scene, index in zip(image, scenes, indices, strict=True):
        random = np.random.default_rng((seed, int(index), 1))  # apart: scenes ignore the size
        pixels += np.float32(scene.noise) * random.standard_normal(pixels.shape, np.float32)
    instance = instance.reshape(shape).astype(np.uint8)
    normals = normal.reshape(3, *shape).transpose(1, 2, 3, 0) * np.float32([1, 1, -1])
    sal, area, x = salience(instance)
    words = [describe(*row, size) for row in zip(scenes, area, x, strict=True)]
    return {"image": (np.clip(image, 0, 1) * 255 + .5).astype(np.uint8), "instance": instance,
            "semseg": instance // 16 + (instance == 2), "sal": sal.astype(np.uint8),
            "human_parts": part.reshape(shape).astype(np.uint8), "depth": depth.reshape(shape),
            "normals": np.ascontiguousarray(normals), "captions": [caption for caption, _ in words],
            "attributes": [attributes for _, attributes in words]}


# === the world on disk ===

FORMAT = 1  # raise it whenever the files written below change
SPLITS = ("train", "val", "probe")


@dataclass(frozen=True)
class WorldSettings:
    size: int = 64  # side of the square images, pixels
    train: int = 3072  # scenes of each split
    val: int = 256
    probe: int = 768
    seed: int = 0
    layout: Literal["pascal", "nyud"] = "pascal"  # of the files: all six tasks, or NYUDv2's four


def struct_array(fields: str, rows: list[tuple]) -> np.ndarray:
    """Build what MATLAB calls a 1 x N struct array; no rows give the 0 x 0 of an empty field."""
    array = np.empty((1, len(rows)) if rows else (0, 0), [(f, object) for f in fields.split()])
    for column, row in enumerate(rows):
        array[0, column] = row
    return array


def write_parts(path: Path, name: str, objects: list[tuple]) -> list[int]:
    """Write a PASCAL-Part file; returns its entry of ImageSets/Parts.

    objects: (class name, class index, mask (H, W) bool, {part name: mask (H, W) bool}).
    """
    rows = []
    for kind, index, mask, parts in objects:
        parts = [(part, area.astype(np.uint8)) for part, area in parts.items()]
        parts = struct_array("part_name mask", parts)
        rows.append((kind, float(index), mask.astype(np.uint8), parts))
    rows = struct_array("class class_ind mask parts", rows)
    anno = struct_array("imname objects", [(name, rows)])
    savemat(path, {"anno": anno}, do_compression=True)  # masks shrink sixtyfold for 0.4 ms
    return [index if mask.any() else -1 for _, index, mask, _ in objects]


def scene_objects(scene: dict, least: float) -> list[tuple]:
    """List a scene's things for `write_parts`; people of fewer than `least` pixels get no parts."""
    instance, objects = scene["instance"], []
    for label in (np.flatnonzero(np.bincount(instance.ravel())[32:]) + 32).tolist():
        kind, mask, parts = CLASSES[label // 16], instance == label, {}
        if kind == "person" and mask.sum() >= least:
            for part in np.unique(scene["human_parts"][mask & (scene["human_parts"] > 0)]):
                parts[PART_FILE_NAMES[part].split()[0]] = mask & (scene["human_parts"] == part)
        # Other things stay clear of PASCAL's own indices 1..20, where 15 is a person.
        objects.append((kind, PERSON if kind == "person" else 100 + label // 16, mask, parts))
    nothing = ("picture", 111, np.zeros(instance.shape, bool), {})
    return objects or [nothing]  # the format wants one object at least


def write_scene(root: Path, name: str, scene: dict[str, np.ndarray], layout: str) -> list[int]:
    """Write one scene of `render` as files; returns its entry of ImageSets/Parts."""
    path = sample_paths(root, WORLDS[layout].files, name)
    least = 12 * (len(scene["image"]) / 64) ** 2  # people do not label smaller specks: void
    specks = np.bincount(scene["instance"].ravel(), minlength=256) < least
    semseg = np.where(specks[scene["instance"]], np.uint8(IGNORE), scene["semseg"])
    pictures = {"normals": np.rint((scene["normals"] + 1) * 127.5).astype(np.uint8)}
    if layout == "nyud":
        edge = boundary_label(scene["instance"]) * np.uint8(255)
        pictures |= {"image": scene["image"], "semseg": semseg + np.uint8(1), "edge": edge}  # 255 -> 0
    else:
        Image.fromarray(scene["image"]).save(path["image"], quality=95, subsampling=0)
        pictures |= {"semseg": semseg, "sal": scene["sal"] * 255}
        savemat(path["labelmap"], {"LabelMap": scene["instance"].astype(np.uint16)})
    for key, array in pictures.items():
        Image.fromarray(array).save(path[key], compress_level=1)
    np.save(path["depth"], scene["depth"].astype(np.float32))
    return [] if layout == "nyud" else write_parts(path["human_parts"], name, scene_objects(scene, least))


def write_scenes(task: tuple[Path, WorldSettings, str, range]) -> dict[str, tuple]:
    """Render and write some scenes of a split; returns {id: (parts entry, caption entry)}."""
    root, settings, split, indices = task
    seed = len(SPLITS) * settings.seed + SPLITS.index(split)  # no two splits share a scene
    scenes, written = render(seed, indices, settings.size), {}
    for b, index in enumerate(indices):
        name = f"{split}_{index:06d}"
        scene = {key: value[b] for key, value in scenes.items()}
        entry = write_scene(root, name, scene, settings.layout)
        things = scenes["attributes"][b]["things"]
        written[name] = entry, {"caption": scenes["captions"][b], "things": things}
    return written


def write_lists(root: Path, settings: WorldSettings, key: str, written: dict[str, tuple]):
    """Write all that is not one file per scene: splits, class lists, captions, meta.json."""
    written = dict(sorted(written.items()))
    content = {
        "captions": {name: caption for name, (_, caption) in written.items()},
        "meta": {"format": FORMAT, "key": key, "size": settings.size, "seed": settings.seed,
                 "counts": {split: getattr(settings, split) for split in SPLITS},
                 "classes": CLASSES, "parts": PARTS},
    }
    if settings.layout == "pascal":
        context = {"wall": 1, "floor": 2}
        context |= {f"{CLASSES[k // 16]} {k % 16}": k for k in range(32, 16 * len(CLASSES))}
        content |= {
            "json/context_classes": context,
            "json/nyu_classes": {n: k for n, k in context.items() if not n.startswith("plant")},
            "json/pascal_part": {PERSON: PART_IDS},
        }
    for split in SPLITS:
        parts = {name: entry for name, (entry, _) in written.items() if name.startswith(split)}
        lists = root / WORLDS[settings.layout].lists
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in parts))
        if settings.layout == "pascal":
            (root / f"ImageSets/Parts/{split}.txt").write_text(json.dumps(parts))
    for name, value in content.items():
        (root / f"{name}.json").write_text(json.dumps(value))


def write_world(root: Path, settings: WorldSettings, key: str):
    """Render every split into an empty folder, on all cores."""
    reader = WORLDS[settings.layout]
    more = ("ImageSets/Parts/.", "json/.") if settings.layout == "pascal" else ()
    for pattern in (*reader.files.values(), f"{reader.lists}/.", *more):
        os.makedirs(root / os.path.dirname(pattern))
    tasks = [(root, settings, split, range(getattr(settings, split))[first : first + 32])
             for split in SPLITS for first in range(0, getattr(settings, split), 32)]
    total = sum(getattr(settings, split) for split in SPLITS)
    scenes = (scene for part in on_all_cores(write_scenes, tasks) for scene in part.items())
    written = dict(track(scenes, f"rendering {settings.size} px", total))
    write_lists(root, settings, key, written)


def on_all_cores(function, tasks: list) -> Iterator:
    """Yield function(task) in any order; few tasks stay here, a process takes seconds to start."""
    workers = min(core_count(), len(tasks) // 4)
    if workers < 2:
        yield from map(function, tasks)
        return
    with process_context().Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(function, tasks)


def process_context() -> multiprocessing.context.BaseContext:
    """Return how to start processes: forked from a small server that imports torch once for all.

    A fork of this process would hang once CUDA or threads have started; to spawn takes 2 s a process.
    """
    multiprocessing.set_forkserver_preload(["torch"])
    return multiprocessing.get_context("forkserver")


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cache_folder() -> Path:
    """Return where rendered worlds, decoded labels and teachers are kept."""
    return Path(os.environ.get("PRISM_CACHE") or "~/.cache/prism").expanduser()


def world_key(settings: WorldSettings) -> str:
    """Hash all that decides the files: settings, file format, the renderer's own source."""
    content = {name: value for name, value in asdict(settings).items() if value != "pascal"}
    return hash_of(FORMAT, content, own_source("rendered world", "the world on disk"))


def own_source(section: str, following: str) -> str:
    """Return the text of one section of this file."""
    return Path(__file__).read_text().partition(f"# === {section}")[2].partition(f"# === {following}")[0]


def hash_of(*content) -> str:
    """Hash whatever JSON can write to 12 letters."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def render_world(root: str | Path | None = None, **settings: int | str) -> Path:
    """Render the world unless it is there already; returns its folder.

    root: where to put it; None: a folder of $PRISM_CACHE (default ~/.cache/prism), one per world.
    settings: fields of WorldSettings. Raises ValueError if root holds anything else already.
    """
    settings = WorldSettings(**settings)
    key = world_key(settings)
    root = Path(root or cache_folder() / f"world-{settings.size}px-{key}")
    if (root / "meta.json").exists():
        meta = load_json(root / "meta.json")
        if isinstance(meta, dict) and meta.get("key") == key:
            return root
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} holds other files than this world; name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    scenes = settings.train + settings.val + settings.probe
    need = scenes * (12 * settings.size**2 + 16384) / 2**30  # about 40 % more than measured
    free = shutil.disk_usage(root.parent).free / 2**30
    if need > free:
        raise ValueError(f"{root.parent} has {free:.1f} GiB free, the world needs {need:.1f} GiB; "
                         "set PRISM_CACHE to a larger disk")
    # Renamed only when whole, so that an interrupted render is never taken for a world.
    temporary = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        write_world(temporary, settings, key)
        temporary.rename(root)
    except OSError:
        if not (root / "meta.json").exists():  # else another process was first, with the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


# === readers ===


def decode_file(path: Path, decode):
    """Return decode(path); whatever goes wrong becomes one line that names the file."""
    try:
        return decode(path)
    except FileNotFoundError:
        note = "is missing; copy it there, see `python data.py --check ROOT`"
        raise FileNotFoundError(f"{path} {note}") from None
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be decoded ({why}); put an intact copy there") from error


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # whatever the suffix says; EPS starts a program
MOST_BYTES = 2**29  # of a file; 89 million pixels, the most that Pillow takes, are less in any format
MOST_UNPACKED = 2**28  # bytes of a .mat file; labels of 640 x 480 pixels in float64 are 1 % of it
MOST_ARRAYS, DEEPEST = 10**5, 16  # in a .mat file, in one another; PASCAL-Part has thousands, 4 deep


def read_bytes(path: str | Path) -> bytes:
    """Read a file whole. Raises ValueError for a folder, what never ends (a pipe), or too many bytes."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{status.st_size} bytes, at most {MOST_BYTES} are read")
    with open(path, "rb") as file:
        return file.read()


def load_json(path: Path):
    """Read a JSON file."""
    return decode_file(path, lambda path: json.loads(read_bytes(path).decode()))


def load_table(path: Path, fits, what: str, names: Iterable[str] = ()) -> dict:
    """Read a JSON object whose values all fit and which has those names. Raises ValueError."""
    table = load_json(path)
    if not isinstance(table, dict) or not all(map(fits, table.values())):
        raise ValueError(f"{path} does not map every name to {what}; put an intact copy there")
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"{path} lacks {len(missing)} names, first {missing[0]}; put an intact copy there")
    return table


def is_id(value) -> bool:
    """Tell a class id of JSON."""
    return type(value) is int and 0 <= value < 2**16


def read_ids(path: Path) -> list[str]:
    """Read the ids of a split. Raises ValueError if there are none, or one leads out of its folder."""
    names = decode_file(path, lambda path: read_bytes(path).decode().split())
    if not names:
        raise ValueError(f"{path} lists no ids; put an intact copy there")
    if odd := [x for x in names if x in (".", "..") or "/" in x or "\\" in x or not x.isprintable()]:
        raise ValueError(f"{path} lists {ascii(odd[0])[:60]}, which is no plain name of a file; correct it")
    return names


def check_png(content: bytes):
    """Raise ValueError unless chunks have their checksums, which Pillow passes over (0.1 ms for 400 kB)."""
    at, view = 8, memoryview(content)
    while content[at - 8 : at - 4] != b"IEND":
        size = int.from_bytes(view[at : at + 4])
        end = at + 8 + size
        if end + 4 > len(content) or zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise ValueError("cut off, or its checksum is wrong")
        at = end + 4


@contextlib.contextmanager
def open_picture(content: bytes) -> Iterator[Image.Image]:
    """Open an image of FORMATS. Raises ValueError or a warning of Pillow's for a bomb, before decoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF and palettes, by the thousand
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            check_png(content)
        try:
            picture = Image.open(BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError("no image, or cut off in its header") from None
        yield picture


def load_picture(path: Path, mode: str | None = None) -> np.ndarray:
    """Read an image as (H, W) or (H, W, 3) uint8; without a mode, palette files keep their ids."""
    with open_picture(read_bytes(path)) as picture:
        if mode and picture.mode.startswith(("F", "I")):  # convert() would clip them
            raise ValueError(f"pixels of type {picture.mode}, not of 8 bits")
        return np.array(picture.convert(mode) if mode else picture)


def load_mat(path: Path) -> dict:
    """Read a MATLAB file of versions 5 to 7 as scipy does, once its sizes and checksums are checked.

    Left alone, scipy takes 8 GB for 200 bytes, or ends the process. Raises ValueError.
    """
    content = read_bytes(path)
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if not order or 0 in content[:4] or struct.unpack_from(f"{order}H", content, 124) != (0x0100,):
        raise ValueError("no MATLAB file of versions 5 to 7; save it again with -v7")
    parts, at, left = [content[:128]], 128, MOST_UNPACKED
    while at < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        part, at = content[at : at + 8 + size], at + 8 + size
        if kind == 15:  # packed
            unpacker = zlib.decompressobj()
            part = unpacker.decompress(part[8:], max(left, 1))
            if not unpacker.eof:
                raise ValueError(f"cut off, or unpacks to more than {MOST_UNPACKED} bytes")
        check_arrays(part, order)
        left -= len(part)
        parts.append(part)
    return loadmat(BytesIO(b"".join(parts)))


def mat_element(content: bytes, order: str, at: int) -> tuple[int, int, int]:
    """Return first byte and size of an element of a .mat file, and where the next one starts."""
    kind, size = struct.unpack_from(f"{order}II", content, at)
    if kind >> 16:  # up to 4 bytes, beside the size
        return at + 4, kind >> 16, at + 8
    return at + 8, size, at + 8 + size + -size % 8


def check_arrays(content: bytes, order: str):
    """Raise ValueError unless the arrays of a .mat file are as few, shallow and small as scipy can take.

    Walks just as scipy does, which allocates what sizes claim, and calls itself for arrays within arrays.
    """
    now, waiting = 0, [1]  # arrays still to come, at each depth
    for _ in range(MOST_ARRAYS):
        while waiting and not waiting[-1]:
            waiting.pop()
        if not waiting:
            return
        waiting[-1] -= 1
        inner, now = skip_array(content, order, now)
        waiting.append(inner)
        if len(waiting) > DEEPEST or now > len(content) + 7:  # the last padding may be missing
            raise ValueError(f"cut off within an array, or more than {DEEPEST} in one another")
    raise ValueError(f"more than {MOST_ARRAYS} arrays")


def skip_array(content: bytes, order: str, at: int) -> tuple[int, int]:
    """Return how many arrays follow as elements of the one at `at`, and where. Raises as `check_arrays`."""
    kind, size = struct.unpack_from(f"{order}II", content, at)
    if not size:  # an empty cell or field
        return 0, at + 8
    flags, = struct.unpack_from(f"{order}I", content, at + 16)
    form = flags & 255  # 1 cells, 2 struct, 3 object, 4 text, 5 sparse, 6..15 numbers
    first, size, now = mat_element(content, order, at + 24)
    dims = struct.unpack_from(f"{order}{min(size // 4, 32)}i", content, first)
    count, most = math.prod(dims), len(content) - at if form > 5 else MOST_ARRAYS
    if kind != 14 or not 1 <= form <= 15 or min(dims) < 0 or count > most and form != 5:
        raise ValueError(f"array of type {form} with {dims[:4]} elements; numbers alone are read")
    for _ in range(1 + (form == 3)):  # names of array and class
        *_, now = mat_element(content, order, now)
    if form in (2, 3):
        first, _, now = mat_element(content, order, now)
        length, = struct.unpack_from(f"{order}i", content, first)
        _, size, now = mat_element(content, order, now)
        if length < 1 or size > 1000 * length:
            raise ValueError(f"a struct with {size} bytes of names")
        count *= size // length
    if form < 4:
        return count, now
    parts = {4: 1, 5: 3}.get(form, 1) + (form > 4 and flags >> 11 & 1)  # indices, real, imaginary
    for _ in range(parts):
        *_, now = mat_element(content, order, now)
    return 0, now


def load_array(path: Path, field: str = "", mode: str | None = None) -> np.ndarray:
    """Read an array from a .npy file, a field of a .mat file, or an image as `load_picture` does."""
    if path.suffix == ".npy":
        array = np.lib.format.read_array(BytesIO(read_bytes(path)), allow_pickle=False)
    elif path.suffix != ".mat":
        array = load_picture(path, mode)
    else:
        field, *inner = field.split(".")
        array = load_mat(path)[field]
        for name in inner:
            array = array[0, 0][name][0, 0]
    return as_numbers(array)


def as_numbers(array) -> np.ndarray:
    """Pass on an array of real numbers. Raises ValueError for text, dates, cells, sparse or complex ones."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise ValueError(f"{getattr(array, 'dtype', type(array).__name__)}, no real numbers")
    return array


def load_label(path: Path, shape: tuple[int, ...], most: float, least: float = 0, whole: bool = False, **how):
    """Read a label as `load_array` does; raise ValueError unless it has that shape and range.

    whole: no fractions either, as in ids.
    """
    array = decode_file(path, lambda path: load_array(path, **how))
    if array.shape != shape:
        raise ValueError(f"{path} has size {array.shape}, its image {shape[:2]}; "
                         "put the matching label there")
    check_range(path, array, most, least)
    if whole and array.dtype.kind == "f" and (array % 1).any():
        raise ValueError(f"{path} holds fractions, not ids; put an intact copy there")
    return array


def check_range(path: Path, array: np.ndarray, most: float, least: float = 0):
    """Raise ValueError if values read from that file are outside least .. most, or nan."""
    if array.size and not (least <= array.min() and array.max() <= most):
        raise ValueError(f"{path} holds {array.min():g} .. {array.max():g}, not {least:g} .. {most:g}; "
                         "put an intact copy there")


def decode_normals(coded: np.ndarray) -> np.ndarray:
    """Turn uint8 colours (H, W, 3) into float32 normals; not renormalised, as released."""
    return np.float32(2) * coded / np.float32(255) - 1


def upright_rgb(picture: Image.Image) -> np.ndarray:
    """Turn a picture of any mode upright (EXIF), as (H, W, 3) uint8; transparency is dropped."""
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "F":
        raise ValueError("floats of unknown range")
    if picture.mode.startswith("I"):  # 16 bit gray, which convert() would clip at 255
        deep = np.asarray(picture).clip(0, 65535).astype(np.uint32)  # nothing wider: pictures may be large
        deep += 128
        deep //= 257
        picture = Image.fromarray(deep.astype(np.uint8))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def read_photo(path: Path, longest: int = 1024) -> np.ndarray:
    """Read anyone's photo as (H, W, 3) uint8: upright (EXIF), shrunk to at most `longest` pixels a side."""
    if not path.is_file():
        raise FileNotFoundError(f"photo {path} does not exist; name a file that does")

    def read(path: Path) -> np.ndarray:
        with open_picture(read_bytes(path)) as picture:
            upright = Image.fromarray(upright_rgb(picture))
        upright.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return np.array(upright)

    return decode_file(path, read)


def load_objects(path: Path) -> list[tuple]:
    """Read a PASCAL-Part file: (class index, mask (H, W) bool, [(part name, mask), ...]) each."""
    objects = []
    for item in load_mat(path)["anno"][0, 0]["objects"].ravel():
        parts = item["parts"].ravel() if len(item["parts"]) else ()
        parts = [(part["part_name"][0], as_numbers(part["mask"]) > 0) for part in parts]
        objects.append((int(item["class_ind"][0, 0]), as_numbers(item["mask"]) > 0, parts))
    return objects


def load_human_parts(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Paint the parts of all people, in file order, into an (H, W) uint8 map of 0..6."""
    target = np.zeros(shape, np.uint8)
    for index, _, parts in load_objects(path):
        for name, mask in parts if index == PERSON else ():
            target[mask] = PART_IDS[name]
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


def sample_paths(root: Path, files: dict[str, str], name: str) -> dict[str, Path]:
    """Return the files of a sample; some labels have a better file, which is used where it exists."""
    better = {"semseg": root / f"semseg/VOC12/{name}.png", "labelmap": root / f"edge_mat/{name}.mat"}
    paths = {key: root / pattern.format(name) for key, pattern in files.items()}
    return paths | {key: path for key, path in better.items() if path.exists()}


def missing_files(root: Path, files: dict[str, str], ids: list[str]) -> dict[str, list[Path]]:
    """List the files of a split that are not there, under the keys of `files`."""
    missing = {key: [] for key in files}
    for name in ids:
        for key, path in sample_paths(root, files, name).items():
            if not path.exists():
                missing[key].append(path)
    return missing


def stamps(*paths: Path) -> list[int]:
    """Return size and time of change of files, by which a change of their content is noticed."""
    states = [decode_file(path, os.stat) for path in paths]
    return [number for state in states for number in (state.st_size, state.st_mtime_ns)]


class Samples(Dataset):
    """Indexing shared by all data sets; a subclass gives ids and `decode(name, labels)`.

    dataset[i]: sample i whole, padded to `size`. dataset[(i, step, slot)], what the loader asks
    for: if `train`, a random view that depends on (seed, step, slot) alone; else as dataset[i].
    """

    boundary_protocol = "sak"  # of boundary scores: a key of eval.py's THRESHOLDS

    def __init__(
        self, ids: list[str],
        size: int | tuple[int, int],  # of what networks see, pixels
        train: bool = False, seed: int = 0,
        view: Literal["multitask", "distill"] = "multitask",  # distill: the image alone
        crop_scale: tuple[float, float] = (0.08, 1.0),  # share of the area in the distill view
        cache: bool = False,  # keep decoded samples in memory
    ):
        if view not in ("multitask", "distill"):
            raise ValueError(f'view "{view}" is unknown; use "multitask" or "distill"')
        self.ids, self.train, self.seed, self.view = ids, train, seed, view
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.crop_scale, self._cache = crop_scale, {} if cache else None

    def __len__(self) -> int:
        return len(self.ids)

    def decode(self, name: str, labels: bool) -> dict:
        raise NotImplementedError

    def read(self, i: int, labels: bool = True) -> dict:
        """Return sample i as numpy arrays before any transform; without labels, its image alone."""
        if self._cache is None:
            return self.decode(self.ids[i], labels)
        if (i, labels) not in self._cache:
            self._cache[i, labels] = self.decode(self.ids[i], labels)
        return dict(self._cache[i, labels])

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict:
        i, *place = key if isinstance(key, tuple) else (key,)
        sample = self.read(i, labels=not place or self.view == "multitask")
        if place and self.train:
            rng = np.random.default_rng((self.seed, *place))
            sample |= (multitask_view(sample, self.size, rng) if self.view == "multitask" else
                       distill_view(sample["image"], self.size, rng, self.crop_scale))
        return {**to_tensors(sample, self.size), "name": sample["name"]}

    def __getitems__(self, keys: list) -> list | Exception:
        """Fetch a batch; an error is returned, as a loader buries what its workers raise."""
        try:
            return [self[key] for key in keys]
        except (ValueError, OSError) as error:
            return error


class LabelFolder(Samples):
    """A data set on disk: a list of ids per split, a file per id and label; each must be there.

    A subclass gives what stands below and `decode_labels`. train: None means "is this the split
    called train". Further options as Samples.
    Raises FileNotFoundError or ValueError, one line that names the file.
    """

    kind: str  # in front of the folder in what open_data takes
    packaging: str  # whose layout it is
    origin: str  # what to do about missing files
    lists: str  # folder of the lists of ids
    files: dict[str, str]  # label -> path of its file, {} for the id
    default_size = (512, 512)  # that networks see, pixels
    classes: dict[str, Sequence[str]]
    max_dist: float  # tolerance of boundary scores, share of the image diagonal

    def __init__(self, root: str | Path, split: str, size: int | tuple[int, int] | None = None,
                 train: bool | None = None, seed: int = 0, **options):
        self.root, self.split = Path(root), split
        self.source = f"{self.kind}:{self.root.resolve()}"  # what open_data takes
        listed = self.root / self.lists / f"{split}.txt"
        if not listed.exists():
            known = ", ".join(sorted(path.stem for path in listed.parent.glob("*.txt"))) or "none"
            raise FileNotFoundError(f"{listed} is missing; splits of this folder: {known}")
        train = split == "train" if train is None else train
        super().__init__(read_ids(listed), size or self.default_size, train, seed, **options)
        self.packaging, self.files = self.find_files(self.root)
        missing = sum(missing_files(self.root, self.files, self.ids).values(), [])
        if missing:
            raise FileNotFoundError(f"{missing[0]} is missing, {len(missing)} files in all; "
                                    f"see `python data.py --check {self.root}`")
        self.tasks = {task: row.channels or len(self.classes[task])
                      for task, row in TASKS.items() if task in (*self.files, "edge")}

    @classmethod
    def find_files(cls, root: Path) -> tuple[str, dict[str, str]]:
        """Return `packaging` and `files` as they are in that folder."""
        return cls.packaging, cls.files

    def decode(self, name: str, labels: bool) -> dict:
        path = sample_paths(self.root, self.files, name)
        image = decode_file(path["image"], lambda path: load_picture(path, "RGB"))
        return {"image": image, **(self.decode_labels(path, image.shape[:2], name) if labels else {}),
                "name": name}

    def decode_labels(self, path: dict[str, Path], shape: tuple[int, int], name: str) -> dict:
        """Read every label of an image of that (H, W)."""
        raise NotImplementedError


class PascalContext(LabelFolder):
    """PASCAL-Context with its five tasks.

    decoded: keep what is made of .mat files, 30 KB an image, in a folder of $PRISM_CACHE. Parts
    (15 ms at 375 x 500), edges (3) and LabelMap are then read in 1.4 ms, a whole sample in 14, not 32.
    """

    kind = "pascal"
    packaging = "PASCALContext of SAK, PRISM and InvPT (PASCAL_MT of MTI-Net and ASTMT is the same inside)"
    origin = "get PASCALContext from Google Drive, id 1TWZydr5_r4hKDM5Zyzrcq712Stg2cw7p"
    lists = "ImageSets/Context"
    files = FILES
    classes = {"semseg": PASCAL_CLASSES, "human_parts": PARTS}
    max_dist = 0.0075

    def __init__(self, root: str | Path, split: str, *place, decoded: bool = True, **options):
        super().__init__(root, split, *place, **options)
        key = hash_of(str(self.root.resolve()), own_source("readers", "images without labels"))
        self.decoded = cache_folder() / f"decoded/{self.kind}-{key}" if decoded else None
        self.valid_normals, self.part_lists = self.read_valid_normals(), self.read_part_lists()

    def read_valid_normals(self) -> list[int]:
        """Return the LabelMap ids whose normals count: classes that NYUD knows too, 170 of 459."""
        context = load_table(self.root / "json/context_classes.json", is_id, "an id from 0 to 65535")
        nyu = load_table(self.root / "json/nyu_classes.json", lambda value: True, "an id")
        shared = set(context) & set(nyu)
        shared |= {"tvmonitor"} & set(context)  # NYUD says "television"
        return [context[name] for name in shared - {"unknown"}]

    def read_part_lists(self) -> dict[str, list[int]]:
        """Return the objects of each image; from the part files if the list does not fit."""
        path = self.root / f"ImageSets/Parts/{self.split}.txt"
        lists = load_table(path, lambda v: isinstance(v, list) and all(is_id(k) or k == -1 for k in v),
                           "a list of class indices") if path.exists() else {}
        if set(lists) == set(self.ids):
            return lists
        files = [self.root / self.files["human_parts"].format(name) for name in self.ids]

        def build() -> dict[str, np.ndarray]:
            print(f"{path} does not list this split; building the list from {len(self)} files")
            built = {file.stem: [index if mask.any() else -1 for index, mask, _
                                 in decode_file(file, load_objects)] for file in files}
            return {"lists": np.array(json.dumps(built))}

        built = self.keep(f"parts-{hash_of(self.ids)}", stamps(*files), build)
        return json.loads(str(built["lists"]))

    def keep(self, name: str, stamp: list[int], make) -> dict[str, np.ndarray]:
        """Return make(), from the second time on out of a file, until `stamp` is another."""
        if self.decoded is None:
            return make()
        path = self.decoded / f"{name}.npz"
        try:
            with np.load(path) as stored:
                if stored["stamp"].tolist() == stamp:
                    return {key: stored[key] for key in stored.files if key != "stamp"}
        except Exception:  # not there yet, or damaged, of which zip and numpy raise whatever they like
            pass
        arrays = make()
        part = path.with_name(f".{name}.{uuid.uuid4().hex}.npz")
        try:
            self.decoded.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(part, stamp=np.array(stamp), **arrays)
            part.replace(path)  # whole or not at all, whoever else writes it now
        except OSError as error:
            print(f"{self.decoded} cannot be written ({error.strerror}), so labels are decoded anew "
                  "each time; set PRISM_CACHE to another disk")
            self.decoded = None
            with contextlib.suppress(OSError):
                part.unlink()
        return arrays

    def decode_labels(self, path: dict[str, Path], shape: tuple[int, int], name: str) -> dict:
        person = PERSON in self.part_lists[name]

        def decode_slowly() -> dict[str, np.ndarray]:
            labelmap = load_label(path["labelmap"], shape, 2**16 - 1, whole=True, field="LabelMap")
            labelmap = labelmap.astype(np.int32)
            parts = np.zeros(shape, np.uint8)
            if person:
                parts = decode_file(path["human_parts"], lambda path: load_human_parts(path, shape))
            return {"human_parts": parts, "edge": boundary_label(labelmap), "labelmap": labelmap}

        stamp = [*shape, person, *stamps(path["labelmap"], path["human_parts"])]
        labels = self.keep(name, stamp, decode_slowly)
        semseg = load_label(path["semseg"], shape, IGNORE, whole=True).astype(np.uint8, copy=False)
        check_range(path["semseg"], semseg[semseg != IGNORE], len(self.classes["semseg"]) - 1)
        normals = decode_normals(load_label(path["normals"], (*shape, 3), 255, mode="RGB"))
        normals[~np.isin(labels["labelmap"], self.valid_normals)] = 0
        sal = (load_label(path["sal"], shape, 255, mode="L") >= 128).astype(np.uint8)
        labels |= {"semseg": semseg, "normals": normals, "sal": sal}
        if "depth" in path:
            labels["depth"] = load_label(path["depth"], shape, IGNORE - 1).astype(np.float32, copy=False)
        return labels


def nyud_files(packaging: str) -> dict[str, str]:
    """Return the files of a packaging of NYUDv2, as LabelFolder has them."""
    endings = PACKAGINGS[packaging].split()
    return {key: f"{folder}/{{}}.{ending}" for (key, folder), ending in
            zip(NYUD_FOLDERS.items(), endings, strict=True)}


class NYUDv2(LabelFolder):
    """NYUDv2 with its four tasks, in any of PACKAGINGS.

    Nothing is kept decoded: of 14 ms at 425 x 560, 10 go into two PNG files, which no packing
    of the same pixels makes much faster.
    """

    kind = "nyud"
    packaging = next(iter(PACKAGINGS))
    origin = "get NYUDv2 from Google Drive, id 1rj3tHdQVYqe-Y3mpxv4EgWsiqgq3z87H"
    lists = "gt_sets"
    files = nyud_files(packaging)
    default_size = (448, 576)
    classes = {"semseg": NYUD_CLASSES}
    max_dist = 0.011

    @classmethod
    def find_files(cls, root: Path) -> tuple[str, dict[str, str]]:
        """Tell the packaging by its file endings; an empty folder fits any. Raises ValueError."""
        found = {folder: {path.suffix[1:] for path in (root / folder).glob("*.*")} - {""}
                 for folder in NYUD_FOLDERS.values()}
        for packaging, endings in PACKAGINGS.items():
            fits = [not seen or ending in seen
                    for ending, seen in zip(endings.split(), found.values(), strict=True)]
            if all(fits) and any(found.values()):
                return packaging, nyud_files(packaging)
        seen = ", ".join(f"{folder} {'/'.join(sorted(e)) or 'nothing'}" for folder, e in found.items())
        known = "; ".join(f"{endings} ({name})" for name, endings in PACKAGINGS.items())
        raise ValueError(f"{root} is no packaging of NYUDv2 known here: it has {seen}; in that order "
                         f"known are {known}; {cls.origin}")

    def decode_labels(self, path: dict[str, Path], shape: tuple[int, int], name: str) -> dict:
        classes = len(self.classes["semseg"])
        semseg = load_label(path["semseg"], shape, classes, whole=True, field="segmentation")
        normals = load_label(path["normals"], (*shape, 3), 255, -1.001, mode="RGB")
        if normals.dtype == np.uint8:
            normals = decode_normals(normals)
        else:
            check_range(path["normals"], normals, 1.001, -1.001)
            normals = normals.astype(np.float32)
        top = 1 if path["edge"].suffix == ".npy" else 255
        lines = load_label(path["edge"], shape, top, mode="L")
        if lines.any():
            check_range(path["edge"], lines.max(), top, top / 2)
        labelmap = edge = (lines > top / 2).astype(np.uint8)
        depth = load_label(path["depth"], shape, IGNORE - 1, field="depth").astype(np.float32)
        if "labelmap" in path:
            labelmap = load_label(path["labelmap"], shape, 1, whole=True, field="groundTruth.Boundaries")
        return {"semseg": semseg.astype(np.uint8) - np.uint8(1),  # 0, void, wraps round to 255
                "normals": normals, "edge": edge, "depth": depth, "labelmap": labelmap.astype(np.int32)}


class Rendered:
    """What the rendered world adds to the reader of its layout: its own sizes, classes and captions.

    cache: None means "if the split takes less than 1 GiB".
    """

    max_dist = 0.016  # the 8 neighbours at 64 px
    boundary_protocol = "simple"  # the others suppress and fade over 4 px, made for 500
    origin = "delete the folder and render it again"

    def __init__(self, root: str | Path, split: str, size: int | tuple[int, int] | None = None,
                 train: bool | None = None, seed: int = 0, cache: bool | None = None, **options):
        path = Path(root) / "meta.json"
        meta = load_table(path, lambda value: True, "its own", ("classes", "parts", "size"))
        names = {"semseg": meta["classes"], "human_parts": meta["parts"]}
        if not (all(isinstance(v, list) and v and all(isinstance(k, str) for k in v) for v in names.values())
                and is_id(meta["size"]) and meta["size"] > 0):
            raise ValueError(f"{path} needs names as classes and parts, a size in pixels; {self.origin}")
        self.classes = {task: names[task] for task in self.classes}
        super().__init__(root, split, size or meta["size"], train, seed, **options)
        if len(self) * meta["size"] ** 2 * 28 < 2**30 if cache is None else cache:  # 28 bytes per pixel
            self._cache = {}
        self.captions = load_table(
            self.root / "captions.json", lambda v: isinstance(v, dict) and isinstance(v.get("caption"), str)
            and isinstance(v.get("things"), list), 'a "caption" and "things"', self.ids)

    def decode(self, name: str, labels: bool) -> dict:
        return super().decode(name, labels) | {key: self.captions[name][key] for key in ("caption", "things")}


class World(Rendered, PascalContext):
    """The rendered world: all six tasks, captions, and LabelMaps that are instance maps."""

    kind = "world"
    files = {**FILES, "depth": "depth/{}.npy"}

    def __init__(self, root: str | Path, split: str, *place, **options):
        super().__init__(root, split, *place, decoded=False, **options)

    def decode(self, name: str, labels: bool) -> dict:
        sample = super().decode(name, labels)
        return sample | ({"instance": sample["labelmap"]} if labels else {})


class WorldNYUD(Rendered, NYUDv2):
    """The rendered world in NYUDv2's layout: its four tasks, and captions."""

    kind = "world-nyud"


WORLDS = {"pascal": World, "nyud": WorldNYUD}  # by WorldSettings.layout
READERS = {reader.kind: reader for reader in (World, WorldNYUD, PascalContext, NYUDv2)}


def open_data(spec: str, split: str, **options) -> Samples:
    """Open a split of "world" or "world-nyud" (rendered once, at `size`) or of "KIND:/path".

    KIND: a key of READERS, or for stage 1 of UNLABELLED: "images:/path", "imagenet:/path" (its folder
    named like the split, if there is one), "tars:/path/*.tar". options: as those classes take them.
    Raises ValueError for another spec.
    """
    kind, _, root = spec.partition(":")
    if kind in UNLABELLED and root:
        return ImageFolder(Path(root).expanduser(), split, kind=kind, **options)
    layout = {reader.kind: layout for layout, reader in WORLDS.items()}.get(kind)
    if kind not in READERS or not (root or layout):
        raise ValueError(f'data "{spec}" is unknown; use "world", "world-nyud" or "KIND:/path" with KIND '
                         f"one of {', '.join((*READERS, *UNLABELLED))}")
    if not root and split not in SPLITS:
        raise ValueError(f'split "{split}" of {spec} is unknown; use {", ".join(SPLITS)}')
    size = options.get("size") or WorldSettings.size
    root = root or render_world(size=size if isinstance(size, int) else max(size), layout=layout)
    return READERS[kind](Path(root).expanduser(), split, **options)


def check_place(spec: str):
    """Raise OSError or ValueError unless the folder or the tars of a spec of `open_data` are there."""
    kind, _, root = spec.partition(":")
    path = Path(root).expanduser()
    if kind in UNLABELLED and ".tar" in path.name and not path.is_dir():
        find_tars(str(path))
    elif root and not path.is_dir():
        raise FileNotFoundError(f"{path} of data {spec} is no folder; name one that is")
    elif not root and kind not in (World.kind, WorldNYUD.kind):
        raise ValueError(f'data "{spec}" names no folder; write {kind}:/path')


# === images without labels ===
# For stage 1, by the million: names lie in one block of memory, which forks without being copied
# and pickles in milliseconds. One that cannot be read is replaced, named and counted.

UNLABELLED = ("images", "imagenet", "tars")  # kinds of `open_data`
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
TRIES = 10  # unreadable images in a row for one sample


def is_image(name: str) -> bool:
    """Tell an image by its suffix; names with a dot in front are other programs' notes."""
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith(".")


def printable(name: str) -> str:
    """Spell out what of a file name is no text, which to print would raise, and what moves the cursor."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Names(Sequence):
    """Names as one block of bytes: no object for each."""

    def __init__(self, names: list[bytes]):
        self.block = b"".join(names)
        self.ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.block[self.ends[i] : self.ends[i + 1]])


def list_images(root: Path) -> list[bytes]:
    """List the images below a folder, sorted; each real folder once, whatever links lead there."""
    names, seen, folders = [], set(), [""]
    while folders:
        folder = folders.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        below = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    below.append(f"{folder}{entry.name}/")
                elif is_image(entry.name):
                    names.append(os.fsencode(folder + entry.name))
        folders += sorted(below, reverse=True)  # else the disk decides which link comes first
    return sorted(names)


def find_tars(pattern: str) -> list[str]:
    """Expand a glob with {0000..0123} ranges; every number of a range must be there."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = span.groups()
        numbers = (str(k).zfill(len(first)) for k in range(int(first), int(last) + 1))
        return [path for number in numbers
                for path in find_tars(pattern[: span.start()] + number + pattern[span.end() :])]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise FileNotFoundError(f"{pattern} matches no file; name plain tars as /path/*.tar")
    if packed := [path for path in found if not path.endswith(".tar")]:
        raise ValueError(f"{packed[0]} is no plain .tar; decompress it, or narrow the pattern")
    return found


class TarInfo(tarfile.TarInfo):
    """A header of a tar that claims no more than it can: tarfile would loop on sizes below zero."""

    @classmethod
    def frombuf(cls, *given):
        header = super().frombuf(*given)
        extends = header.type in (b"L", b"K", b"x", b"g", b"X")  # long names, attributes: read at once
        if not 0 <= header.size < (2**14 if extends else 2**63):
            raise tarfile.HeaderError(f"{header.size} bytes")
        return header


def scan_tar(path: str) -> tuple[list[bytes], np.ndarray, bool]:
    """Read all headers of a tar: images' names, (n, 2) int64 offset and size, is the tar whole.

    Members are read where they lie; no name is ever that of a file here.
    """
    names, places, end = [], [], 0
    try:
        with tarfile.open(path, "r:", tarinfo=TarInfo) as tar:
            while (member := tar.next()) and end < tar.offset < 2**63:  # attributes may override the size
                tar.members.clear()  # else it keeps a kilobyte of each
                end = tar.offset
                if member.isreg() and not member.issparse() and is_image(member.name):
                    names.append(os.fsencode(member.name).replace(b"\0", b"?"))
                    places.append((member.offset_data, member.size))
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError):
        if not end:
            raise ValueError(f"{path} is no plain tar; decompress it, or copy it again") from None
    with open(path, "rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        whole = end <= os.path.getsize(path) and not any(file.read(512))
    return names, np.array(places, np.int64).reshape(-1, 2), whole


def index_tar(path: str) -> tuple[list[bytes], np.ndarray]:
    """Return what scan_tar finds, from the cache if the tar is still the same."""
    status, key = os.stat(path), hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    stamp, cached = [status.st_size, status.st_mtime_ns], cache_folder() / f"tar-index/{key[:16]}.npz"
    try:
        with np.load(cached) as stored:
            if stored["stamp"].tolist() == stamp:
                return stored["names"].tobytes().split(b"\0")[:-1], stored["places"]
    except Exception:  # absent or damaged, which numpy says in many ways: built again
        pass
    names, places, whole = scan_tar(path)
    if not whole:  # not cached, so that it is said every time
        print(f"{path} is cut off or damaged: {len(names)} images of it are used; copy it again")
        return names, places
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_name(f".{uuid.uuid4().hex}.npz")
    block = np.frombuffer(b"".join(name + b"\0" for name in names), np.uint8)
    np.savez(temporary, names=block, places=places, stamp=stamp)
    temporary.replace(cached)
    return names, places


def decode_image(content: bytes, least: int) -> np.ndarray:
    """Decode an image of any mode as upright (H, W, 3) uint8; transparency is dropped.

    least: a JPEG whose sides are both 2, 4 or 8 times this many pixels comes at that fraction.
    """
    with open_picture(content) as picture:
        picture.draft(None, (least, least))
        return upright_rgb(picture)


class ImageFolder(Samples):
    """Images without labels, for stage 1: below a folder, or in tars by a glob with {0..9} ranges.

    The loader gets the distill view if `train`, as does dataset[(i, step, slot)]; dataset[i] is
    the largest centred crop. Tars are read in place; webdataset's other members are passed over.
    """

    tasks, classes = {}, {}

    def __init__(self, root: str | Path, split: str = "train", size: int | tuple[int, int] | None = None,
                 train: bool | None = None, seed: int = 0, view: str = "distill",
                 kind: str = "images", **options):
        if view != "distill":
            raise ValueError(f"{root} has no labels; use it for --stage deconstruct alone")
        self.source, self.root, self.split = f"{kind}:{Path(root).absolute()}", Path(root), split
        if kind == "imagenet" and (self.root / split).is_dir():
            self.root /= split
        self.tars, parts = [], []
        if self.root.is_dir():
            names = list_images(self.root)
        elif ".tar" in self.root.name:
            self.tars = find_tars(str(self.root))
            parts = list(track(map(index_tar, self.tars), "indexing tars", len(self.tars)))
            names = [name for part, _ in parts for name in part]
        else:
            raise FileNotFoundError(f"{root} is no folder; name one, or plain tars as /path/*.tar")
        if not names:
            raise ValueError(f"{root} holds no images; known suffixes are {' '.join(SUFFIXES)}")
        if self.tars:  # (n, 3): number of the tar, offset and size in it
            self.places = np.concatenate([np.insert(p, 0, k, 1) for k, (_, p) in enumerate(parts)])
        train = split == "train" if train is None else train
        super().__init__(Names(names), size or (224, 224), train, seed, view, **options)
        # Enough for the smallest crop, so that a reduced JPEG is never enlarged where it was not.
        self.least = math.ceil(max(self.size) / math.sqrt(self.crop_scale[0]))

    def path(self, i: int) -> str:
        """Name image i: its file, or its tar and the member."""
        return f"{self.tars[self.places[i, 0]] if self.tars else self.root}/{self.ids[i]}"

    def fetch(self, i: int) -> bytes:
        """Read image i as it is stored; a tar is opened each time: nothing to share or to pickle."""
        if not self.tars:
            return read_bytes(self.path(i))
        tar, start, size = self.places[i].tolist()
        with open(self.tars[tar], "rb") as file:
            file.seek(start)
            return file.read(min(size, MOST_BYTES))

    def read(self, i: int, labels: bool = False) -> dict:
        image = decode_file(printable(self.path(i)), lambda path: decode_image(self.fetch(i), self.least))
        return {"image": image, "name": printable(self.ids[i])}

    def look(self, i: int, place: tuple[int, int] | tuple[()]) -> dict:
        """Return the view of image i at (step, slot), or without them the centred one."""
        sample = self.read(i)
        if place and self.train:
            rng = np.random.default_rng((self.seed, *place))
            sample |= distill_view(sample["image"], self.size, rng, self.crop_scale)
        else:
            whole, shape = Image.fromarray(sample["image"]), self.size[::-1]
            sample["image"] = np.asarray(ImageOps.fit(whole, shape, Image.Resampling.BILINEAR))
        return to_tensors(sample, self.size) | {"name": sample["name"]}

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict:
        """Replace what cannot be read by other images that (seed, step, slot) choose."""
        i, *place = key if isinstance(key, tuple) else (key,)
        unreadable = []
        for attempt in range(1, TRIES + 1):
            try:
                return self.look(i, tuple(place)) | ({"unreadable": unreadable} if unreadable else {})
            except (ValueError, OSError) as error:
                if not place:
                    raise
                unreadable.append(str(error))
                draw = np.random.default_rng((self.seed, *place, attempt))  # attempt 0: the view's
                i = int(draw.integers(len(self)))
        raise ValueError(f"{TRIES} images in a row cannot be read; the last: {unreadable[-1]}")


# === transforms ===

MEAN_COLOUR = (0.485, 0.456, 0.406)  # fill of padding: ImageNet's, zero once normalised


def nearest(target: int, source: int) -> np.ndarray:
    """Return the source pixel (target,) int64 of each pixel when an axis is resized.

    The double division is OpenCV's INTER_NEAREST to the last pixel; i * source / target is not.
    """
    pixels = np.floor(np.arange(target) * (1.0 / (target / source))).astype(np.int64)
    return np.minimum(pixels, source - 1)


def bilinear(image: np.ndarray, rows: np.ndarray, columns: np.ndarray, tall: int, wide: int):
    """Resize to (tall, wide) as OpenCV's INTER_LINEAR, but work out only those rows and columns.

    image: (H, W, 3) uint8. Returns (len(rows), len(columns), 3) float32 in [0, 255].
    """
    image = image.astype(np.float32)
    for axis, places, target in (0, rows, tall), (1, columns, wide):
        last = image.shape[axis] - 1
        at = np.clip((places + 0.5) * ((last + 1) / target) - 0.5, 0, last)
        low = at.astype(np.int64)
        share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = image.take(np.minimum(low + 1, last), axis)
        image = image.take(low, axis) * (1 - share) + high * share
    return image


def choose_crop(semseg: np.ndarray | None, row_of: np.ndarray, column_of: np.ndarray,
                size: tuple[int, int], rng: np.random.Generator):
    """Draw a crop in which no class fills 75 %; the 11th draw is taken as it comes.

    row_of, column_of: source pixel of each row and column of the resized image.
    Returns the crop's rows and columns of the resized image, all of them where it is too small.
    """
    for _ in range(11):
        rows, columns = (
            np.arange(length)[start : start + side]
            for length, side in zip((len(row_of), len(column_of)), size, strict=True)
            for start in [rng.integers(max(length - side, 0) + 1)]
        )
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


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """Convert (H, W, 3) uint8 RGB to OpenCV's 8-bit HSV, (3, H, W) uint8, hue in 0..179."""
    red, green, blue = image.transpose(2, 0, 1).astype(np.float32, order="C")  # (H, W) each
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    step = 30 / np.maximum(spread, 1)
    hue = np.where(value == green, 60 + step * (blue - red), 120 + step * (red - green))
    hue = np.rint(np.where(value == red, step * (green - blue), hue))
    saturation = np.rint(255 * spread / np.maximum(value, 1))
    return np.stack([np.where(hue < 0, hue + 180, hue), saturation, value]).astype(np.uint8)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """Convert 8-bit HSV (3, H, W) to (H, W, 3) uint8 RGB, cutting off decimals as OpenCV does."""
    hue, saturation, value = hsv.astype(np.float32)  # (H, W) each
    sector = np.array([5, 3, 1], np.float32)[:, None, None] + hue / 30  # (3, H, W)
    sector -= 6 * (sector >= 6)
    share = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (value - value * saturation / 255 * share).transpose(1, 2, 0).astype(np.uint8)


def distort_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue at random, (H, W, 3) uint8 to the same.

    The trip to HSV and back is always made, as in the released code; it moves colours by 0.5 of
    255 on average.
    """

    def stretch(values):
        return to_uint8(values * np.float32(rng.uniform(0.5, 1.5))) if rng.random() < 0.5 else values

    if rng.random() < 0.5:
        image = to_uint8(image + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.random() < 0.5
    hsv = rgb_to_hsv(stretch(image) if contrast_first else image)
    hsv[1] = stretch(hsv[1])
    if rng.random() < 0.5:
        hsv[0] = (hsv[0].astype(np.int16) + rng.integers(-18, 18)) % 180
    image = hsv_to_rgb(hsv)
    return image if contrast_first else stretch(image)


def multitask_view(sample: dict, size: tuple[int, int], rng: np.random.Generator) -> dict:
    """Scale by 0.5 to 2, crop, flip and distort a sample of `read`; not yet padded.

    Enlarging brings things nearer, so depth is divided by the scale; a mirror turns normals in x.
    """
    h, w = sample["image"].shape[:2]
    scale = rng.uniform(0.5, 2.0)
    tall, wide = int(h * scale), int(w * scale)
    row_of, column_of = nearest(tall, h), nearest(wide, w)
    rows, columns = choose_crop(sample.get("semseg"), row_of, column_of, size, rng)
    flip = rng.random() < 0.5
    columns = columns[::-1] if flip else columns
    view = {key: sample[key].take(row_of[rows], 0).take(column_of[columns], 1)
            for key in TASKS if key in sample}
    if "depth" in view:
        view["depth"] /= np.float32(scale)
    if "normals" in view and flip:
        view["normals"][..., 0] *= -1
    image = bilinear(sample["image"], rows, columns, tall, wide).astype(np.uint8)
    return {**view, "image": distort_colours(image, rng)}


def distill_view(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator,
                 scale: tuple[float, float]) -> dict:
    """Crop `scale` of the area of an (H, W, 3) uint8 image at 3:4 to 4:3, resize to `size`, flip.

    After ten draws that do not fit, the largest centred crop of an allowed ratio is taken.
    """
    h, w = image.shape[:2]
    for _ in range(10):
        area, ratio = h * w * rng.uniform(*scale), (4 / 3) ** rng.uniform(-1, 1)
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
    padded = np.empty((tall, wide, *array.shape[2:]), array.dtype)
    padded[:] = fill
    padded[top : top + h, left : left + w] = array
    return padded


def to_tensors(sample: dict, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Pad a sample of numpy arrays, mark what is to be ignored with 255, and make it tensors."""
    # Channels move while still bytes, the division is in place: together 6 times as fast.
    pixels = np.ascontiguousarray(sample["image"].transpose(2, 0, 1)).astype(np.float32)  # (3, H, W)
    pixels /= 255
    image = pixels.transpose(1, 2, 0)  # (H, W, 3), a view
    out = {"image": image if image.shape[:2] == size else pad(image, size, MEAN_COLOUR)}
    out |= {key: pad(sample[key], size, row.unknown) for key, row in TASKS.items() if key in sample}
    if "normals" in out:
        out["normals"][~out["normals"].any(-1)] = IGNORE
    if "depth" in out:
        out["depth"][out["depth"] == 0] = IGNORE
    if "human_parts" in out and not (out["human_parts"] % IGNORE).any():  # all 0 or 255
        out["human_parts"][:] = IGNORE  # no part in sight: nothing to learn from or to score
    for key, array in out.items():
        kind = np.int64 if key in ("semseg", "human_parts", "sal") else np.float32
        array = array.transpose(2, 0, 1) if array.ndim == 3 else array  # (3, S, S)
        out[key] = torch.from_numpy(np.ascontiguousarray(array, kind))
    return out


# === loader ===

RESTARTS = 5  # of the loader's workers in a row, without a batch in between
ALLOWED = (0.01, 9)  # unreadable images: share of those tried, and how many in any case


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


def collate(samples: list | Exception) -> dict | Exception:
    """Stack samples, or pass on the error that they met with; "unreadable" only if there are any."""
    if isinstance(samples, Exception):
        return samples
    unreadable = [line for sample in samples for line in sample.pop("unreadable", ())]
    return default_collate(samples) | ({"unreadable": unreadable} if unreadable else {})


def start_loader(dataset: Samples, order: Iterator[list], workers: int) -> Iterator:
    """Start worker processes that fetch the batches of `order`."""
    loader = DataLoader(
        dataset, batch_sampler=order, num_workers=workers, collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, else starting it would draw from the global one
    )
    if not workers or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    # torch raises a worker's death from a signal handler, anywhere, in the middle of a backward
    # pass even. Without it the loader still sees the death when it next waits, 5 s later at most.
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def survive(start, step: int, workers: int) -> Iterator:
    """Yield what start(step) yields; when a worker dies, go on with start(step reached)."""
    loader, failures = None, 0
    while True:
        try:
            loader = start(step) if loader is None else loader
            batch = next(loader)
        except StopIteration:
            return
        except Exception as error:  # what the worker raised, or what its death broke
            if not workers:
                raise
            loader, failures = None, failures + 1
            traceback.clear_frames(error.__traceback__)  # the last hold on the old workers: they end
            why = (str(error).strip() or type(error).__name__).splitlines()[-1]
            if failures > RESTARTS:
                raise OSError(f"loader workers failed {failures} times in a row at step {step} ({why}); "
                              "use fewer --workers, or see that memory and /dev/shm suffice") from error
            print(f"step {step}: a loader worker failed ({why}); starting {workers} anew", flush=True)
        else:
            yield batch
            step, failures = step + 1, 0


def count_unreadable(counts: Counter, lines: list[str], tried: int):
    """Count unreadable images, print each once. Raises ValueError when more than ALLOWED are."""
    for line in lines:
        if line not in counts:
            print(f"{line}; another image takes its place", flush=True)
        counts[line] += 1
    failed = counts.total()
    if failed > max(ALLOWED[0] * (tried + failed), ALLOWED[1]):
        share = f"{failed} of {tried + failed} images tried ({failed / (tried + failed):.1%})"
        raise ValueError(f"{share} cannot be read, {100 * ALLOWED[0]:g} % is allowed; check the disk. First: "
                         + "; ".join(list(counts)[:3]))


def batches(dataset: Samples, batch_size: int, steps: int, start: int = 0, seed: int = 0,
            rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[dict]:
    """Yield the batches of steps start .. steps - 1: tensors stacked, names as a list.

    batch_size: images per process. Ranks and workers of any number, and a run resumed at any
    `start`, see what one process with batch_size * world_size would have seen. Workers that die
    are started again. dataset.unreadable counts the images that were replaced, by message.
    Raises ValueError or OSError, one line that names the file.
    """
    if not len(dataset):
        raise ValueError("the data set has no samples; check the file that lists its split")

    def loader(step: int) -> Iterator:
        order = sample_order(len(dataset), batch_size, range(step, steps), seed, rank, world_size)
        return start_loader(dataset, order, workers)

    dataset.unreadable = Counter()
    for done, batch in enumerate(survive(loader, start, workers), 1):
        if isinstance(batch, Exception):
            raise batch
        if "unreadable" in batch:
            count_unreadable(dataset.unreadable, batch.pop("unreadable"), done * batch_size)
        yield batch


# === pictures, folder check, command line ===

NEUTRAL = (128, 128, 128)  # where nothing is known
COLOURS_OF = {
    "semseg": "3b4252 d8c39a e6194b 3cb44b ffe119 4363d8 f58231 911eb4 46f0f0 f032e6 9acd32 fabed4 "
              "008080 a0522d dcbeff 800000 aaffc3 808000 ffd8b1 000075 ffffff",
    "human_parts": "20242c e6194b 4363d8 f5a231 ffe119 3cb44b 9ff59f",
    "depth": "fde725 5ec962 21918c 3b528b 440154",  # near to far: viridis, reversed
}


def palette(task: str) -> np.ndarray:
    """Return a task's fixed colours, (n, 3) uint8."""
    return np.array([tuple(bytes.fromhex(text)) for text in COLOURS_OF[task].split()], np.uint8)


def known_range(depth: np.ndarray) -> tuple[float, float]:
    """Return the least and the greatest known depth of a map in metres."""
    known = depth[(depth > 0) & (depth != IGNORE)]
    return (known.min(), known.max()) if known.size else (0.0, 1.0)


def colourise(task: str, array: np.ndarray, limits: tuple[float, float] | None = None):
    """Draw a label or a prediction as (H, W, 3) uint8; ignored and unknown pixels come grey.

    array: semseg, human_parts (H, W) class ids; sal, edge (H, W) in [0, 1]; normals (H, W, 3),
    unit; depth (H, W) metres. limits: ends of the depth ramp in metres, default the map's own.
    """
    array = np.asarray(array)
    known = array != IGNORE
    if task in ("semseg", "human_parts"):
        colours = palette(task)
        shade = 0.6 ** (array // len(colours))  # past the list, colours come again, darker
        picture = colours[array % len(colours)] * shade[..., None]
    elif task == "normals":
        known = known.all(-1) & array.any(-1)
        picture = np.clip((array + 1) * 127.5, 0, 255)
    elif task == "depth":
        known &= array > 0
        colours, ends = palette(task), limits or known_range(array)
        stops = np.linspace(*ends, len(colours))
        picture = np.stack([np.interp(array, stops, channel) for channel in colours.T], -1)
    else:
        picture = np.repeat(array[..., None] * 255.0, 3, -1)
    return np.where(known[..., None], picture, NEUTRAL).astype(np.uint8)


def contact_sheet(dataset: LabelFolder, rows: int, cell: int = 192) -> Image.Image:
    """Draw samples as rows, image and labels as columns, class colours below."""
    columns, rows = ["image", *dataset.tasks], max(min(rows, len(dataset)), 1)
    font, width, x, y = ImageFont.load_default(14), len(columns) * (cell + 6), 4, 26 + rows * (cell + 22)
    legend = []
    for task, names in dataset.classes.items():
        for k, name in enumerate(names):
            step = 34 + round(font.getlength(name))
            x, y = (4, y + 20) if x + step > width else (x, y)
            legend.append((x, y, name, tuple(colourise(task, np.array([[k]]))[0, 0].tolist())))
            x += step
        x, y = 4, y + 24
    sheet = Image.new("RGB", (width, y), "white")
    draw = ImageDraw.Draw(sheet)
    for x, y, name, colour in legend:
        draw.rectangle((x, y, x + 14, y + 14), colour, "black")
        draw.text((x + 18, y - 2), name, "black", font)
    for row in range(rows):
        sample, top = dataset.read(row * (len(dataset) // rows)), 22 + row * (cell + 22)
        words = [sample["name"], sample.get("caption", "")]
        if "depth" in sample:
            words.insert(1, "depth {:.1f}-{:.1f} m".format(*known_range(sample["depth"])))
        draw.text((4, top + cell + 1), "   ".join(words), "black", font)
        for column, key in enumerate(columns):
            draw.text((column * (cell + 6) + 4, 2), key, "black", font)
            picture = sample[key] if key == "image" else colourise(key, sample[key])
            height, width = (side * cell // max(picture.shape) for side in picture.shape[:2])
            small = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(small, (column * (cell + 6), top))
    return sheet


def guess_spec(root: Path) -> str:
    """Turn a folder into a spec of `open_data`."""
    kind = next((kind for kind in ("nyud", "pascal") if (root / READERS[kind].lists).is_dir()), "images")
    rendered = kind in WORLDS and (root / "meta.json").exists()
    return f"{WORLDS[kind].kind if rendered else kind}:{root}"


def check(root: Path) -> bool:
    """Count the files of every split, decode a sample of every label; True if all is there."""
    spec, complete = guess_spec(root), True
    reader = READERS.get(spec.partition(":")[0])
    listed = sorted((root / reader.lists).glob("*.txt")) if reader else []
    if not listed:
        raise FileNotFoundError(f"{root} lists no split, neither in {PascalContext.lists} nor in "
                                f"{NYUDv2.lists}; name the folder PASCALContext or NYUDv2, or a world's")
    packaging, files = reader.find_files(root)
    print(f"{spec}: laid out as {packaging}")
    for path in listed:
        ids = read_ids(path)
        for key, missing in missing_files(root, files, ids).items():
            note = f"  missing {missing[0]}, ..." if missing else ""
            print(f"{path.stem:8} {key:12} {len(ids) - len(missing)} of {len(ids)}{note}")
            complete &= not missing
    if not complete:
        print(reader.origin)
        return False
    for key, value in open_data(spec, listed[0].stem).read(0).items():
        if isinstance(value, np.ndarray):
            print(f"{key:12} {value.shape!s:14} {value.dtype!s:8} {value.min():g} .. {value.max():g}")
    return True


def show_images(dataset: ImageFolder, rows: int, columns: int = 6, cell: int = 160) -> Image.Image:
    """Draw evenly spaced images as a grid, each above its name."""
    count = min(rows * columns, len(dataset))
    sheet = Image.new("RGB", (columns * (cell + 6), math.ceil(count / columns) * (cell + 22)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for k in range(count):
        x, y, i = k % columns * (cell + 6), k // columns * (cell + 22), k * len(dataset) // count
        try:
            picture = ImageOps.contain(Image.fromarray(dataset.read(i)["image"]), (cell, cell))
            sheet.paste(picture, (x, y + 18))
        except (ValueError, OSError):
            draw.text((x + 4, y + cell // 2), "cannot be read", "red", font)
        draw.text((x + 2, y + 2), printable(os.path.basename(dataset.ids[i]))[-24:], "black", font)
    return sheet


def check_images(dataset: ImageFolder, sample: int = 64) -> bool:
    """Count images and bytes, decode evenly spaced ones; True if all of those can be read."""
    kinds = Counter(os.path.splitext(name)[1].lower() for name in dataset.ids)
    sizes = dataset.places[:, 2].tolist() if dataset.tars else [
        os.path.getsize(path) for path in map(dataset.path, range(len(dataset))) if os.path.exists(path)]
    print(f"{dataset.source}: {len(dataset)} images, {sum(sizes) / 2**20:,.1f} MiB; "
          + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    chosen = sorted({k * len(dataset) // sample for k in range(sample)})
    shapes, failed = [], []
    for i in track(chosen, "decoding", len(chosen)):
        try:
            shapes.append(dataset.read(i)["image"].shape)
        except (ValueError, OSError) as error:
            failed.append(str(error))
    if shapes:
        ends = np.percentile([shape[:2] for shape in shapes], (0, 50, 100), 0).astype(int)
        print("height x width: least {}x{}, median {}x{}, greatest {}x{}".format(*ends.flat))
    print(f"{len(failed)} of {len(chosen)} decoded images cannot be read", *failed, sep="\n  ")
    return not failed


def bench(dataset: ImageFolder, workers: int, images: int = 256, batch_size: int = 32):
    """Time the loader's parts in one process, then the loader itself; prints a table."""
    clock, spent = time.perf_counter, Counter()

    def timed(part, function, *inputs):
        begin = clock()
        result = function(*inputs)
        spent[part] += clock() - begin
        return result

    for first in range(0, images, batch_size):
        samples = []
        for k in range(first, first + batch_size):
            content = timed("read", dataset.fetch, k * len(dataset) // images)
            image = timed("decode", decode_image, content, dataset.least)
            rng = np.random.default_rng((dataset.seed, 0, k))
            view = timed("crop, resize, flip", distill_view, image, dataset.size, rng, dataset.crop_scale)
            samples.append(timed("tensors", to_tensors, view, dataset.size))
        timed("collate", collate, samples)
    table = Table(title=f"{dataset.source}, {images} images at {dataset.size[0]} px, one process")
    for column in ("part", "ms per image", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    total = spent.total()
    for part, seconds in (*spent.items(), ("all", total)):
        table.add_row(part, f"{1000 * seconds / images:.2f}", f"{seconds / total:.0%}")
    Console().print(table)
    steps = max(images // batch_size, 8 * workers)
    stream = batches(dataset, batch_size, 1 + steps, workers=workers)
    next(stream)  # pays for the workers' start
    begin = clock()
    done = sum(len(batch["name"]) for batch in stream)
    print(f"{images / total:.0f} images/s in one process; the loader with {workers} workers: "
          f"{done / (clock() - begin):.0f} images/s")


@dataclass
class Args:
    show: str = "world"  # draw this: a folder, or what open_data takes: world-nyud, images:/path, ...
    split: str = "train"  # split to draw
    rows: int = 8  # samples to draw
    out: Path = Path("contact_sheet.png")  # picture to write
    check: str | None = None  # check this folder or spec, draw nothing
    bench: str | None = None  # time the loader on images, imagenet or tars, draw nothing
    image_size: int = 384  # side of the views that --bench makes, pixels
    workers: int = 0  # loader processes of --bench
    debug: bool = False  # show tracebacks


def main(args: Args) -> int:
    check_flags(args, {"rows": (1, 1000), "image_size": (1, 2**14), "workers": (0, 1024)})
    given = args.bench or args.check or args.show
    spec = guess_spec(Path(given)) if Path(given).is_dir() else given
    unlabelled = spec.partition(":")[0] in UNLABELLED
    if args.bench and not unlabelled:
        raise ValueError(f'"{given}" has labels; --bench takes {", ".join(UNLABELLED)}')
    if args.bench:
        bench(open_data(spec, "train", size=args.image_size), args.workers)
        return 0
    if args.check and not unlabelled:
        return 0 if check(Path(spec.partition(":")[2] or spec)) else 1
    if not (args.check or is_image(args.out.name) and args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out} cannot be written; name a .png in a folder that exists")
    dataset = open_data(spec, args.split)
    if args.check:
        return 0 if check_images(dataset) else 1
    sheet = (show_images if unlabelled else contact_sheet)(dataset, args.rows)
    sheet.save(args.out)
    print(f"{args.out}: {args.rows} rows of {len(dataset)} samples of {dataset.root}")
    return 0


if __name__ == "__main__":
    args = tyro.cli(Args)
    try:
        sys.exit(main(args))
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        sys.exit(f"{type(error).__name__}: {error}")
