"""Score a student: metrics of every task, Delta_m, what its routers do, pictures.

    python eval.py --ckpt out/prism.pt               # or out/deconstruct.pt: how well it imitates
    torchrun --nproc_per_node=8 eval.py --ckpt out/prism.pt         # the same, batches shared out
    python eval.py --ckpt out/prism.pt --analysis    # conflict of teachers, experts of each patch
    python eval.py --ckpt out/prism.pt --image photo.jpg holiday/   # every task on anyone's photos
    python eval.py --ckpt out/prism.pt --save-predictions found/    # also writes what it scores
    python eval.py --predictions found/ --data nyud:/data/NYUDv2    # scores files, ours or a peer's
    python eval.py --cost --size base --image-size 512 512          # parameters, multiply-adds, time

| task        | metric                         | unit       | better        | protocol |
|-------------|--------------------------------|------------|---------------|----------|
| semseg      | mIoU over all classes          | %          | higher        | sak      |
| human_parts | mIoU, parts and background     | %          | higher        | sak      |
|             | the same where parts meet      | %          | higher        | 3 px band|
| sal         | maxF (beta^2 = 0.3), mIoU      | %          | higher        | sak      |
| normals     | mean angle                     | degrees    | lower         | sak      |
|             | median; within 11.25, 22.5, 30 | degrees; % | lower; higher | astmt    |
| edge        | odsF                           | %          | higher        | chosen   |
| depth       | RMSE                           | metres     | lower         | sak      |
|             | delta1: ratio below 1.25       | %          | higher        | eigen    |

`sak` is the protocol of SAK's and PRISM's code, so of the published tables. Boundaries have three
(--protocol): `sak`, `invpt` (with InvPT's maxF), and `simple`, for the rendered world, which no
published odsF compares with: see `BoundaryF`. Sums are pooled over the whole dataset in int64 or
float64, so neither the order of the images nor the number of processes matters.

Predictions are final maps: class ids, probabilities in [0, 1] of saliency and boundary, normals,
metres. Targets are what `dataset.read(i)` or `dataset[i]` give: 255 = ignore, and so are zero normals
and zero depth. Both are numpy arrays or tensors, one image (H, W) or a batch (B, H, W).
"""

import colorsys
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import zlib

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Column, Table
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import prism
import teachers
import train as training

COLUMNS = {  # metric -> unit, better is, protocol; None: the chosen one
    "miou": ("%", "higher", "sak"),
    "band_miou": ("%", "higher", "3 px band"),
    "maxf": ("%", "higher", "sak"),
    "mean": ("degrees", "lower", "sak"),
    "median": ("degrees", "lower", "astmt"),
    **{f"within_{degrees}": ("%", "higher", "astmt") for degrees in ("11.25", "22.5", "30")},
    "odsf": ("%", "higher", None),
    "threshold": ("probability", "-", None),
    "precision": ("%", "higher", None),
    "recall": ("%", "higher", None),
    "rmse": ("metres", "lower", "sak"),
    "delta1": ("%", "higher", "eigen"),
}
console = Console(width=None if sys.stdout.isatty() else 110)  # a file has no width of its own

# --------------------------------------------------------------------------------------------- metrics


class Metric:
    """Add up counts over images; `state` and `merge` carry them between processes."""

    def __init__(self, **sums: np.ndarray | list):
        self.sums = sums

    def state(self) -> dict[str, np.ndarray | list]:
        """Copy the sums, to send to another process."""
        return {name: values.copy() for name, values in self.sums.items()}

    def merge(self, state: dict[str, np.ndarray | list]) -> None:
        """Add the sums that another process took over other images."""
        for name, values in self.sums.items():
            values += state[name]


class MeanIoU(Metric):
    """Intersection over union of semseg and human_parts (SAK).

    band: also over the pixels less than so many from where two classes meet, where thin parts are won
    or lost; in no published table.
    """

    def __init__(self, num_classes: int, band: int = 0):
        counts = {"confusion": zeros(num_classes, num_classes)}  # target x prediction
        super().__init__(**counts, **({"band": zeros(num_classes, num_classes)} if band else {}))
        self.band = band

    def update(self, prediction, target) -> None:
        """Count prediction and target ([B,] H, W), class ids; target 255 = ignore."""
        prediction, target = as_arrays(prediction, target)
        self.count("confusion", prediction, target)
        for p, t in images_of(prediction, target) if self.band else ():
            self.count("band", p, np.where(boundary_band(t, self.band), t, data.IGNORE))

    def count(self, name: str, prediction: np.ndarray, target: np.ndarray) -> None:
        valid, n = target != data.IGNORE, len(self.sums[name])
        prediction, target = prediction[valid].astype(np.int64), target[valid].astype(np.int64)
        for kind, ids in (("prediction", prediction), ("target", target)):
            if ids.size and not 0 <= ids.min() <= ids.max() < n:
                raise ValueError(f"{kind} has class ids {ids.min()}..{ids.max()} for {n} classes; "
                                 f"pass ids 0..{n - 1}, {data.IGNORE} = ignore")
        pairs = np.bincount(target * n + prediction, minlength=n * n)
        self.sums[name] += pairs.reshape(n, n)

    def compute(self) -> dict:
        """Return `miou` and `per_class` (with a band `band_miou`) in percent.

        A class that never occurs is 0 and counts.
        """
        iou = {}
        for name, confusion in self.sums.items():
            hit = confusion.diagonal()
            iou[name] = 100 * hit / np.maximum(confusion.sum(0) + confusion.sum(1) - hit, 1e-8)
        band = {"band_miou": float(iou["band"].mean())} if self.band else {}
        return {"miou": float(iou["confusion"].mean()), **band, "per_class": iou["confusion"].tolist()}


def boundary_band(labels: np.ndarray, width: int) -> np.ndarray:
    """Mark the pixels of labels (H, W) less than `width` from one that has another class beside it."""
    known, meet = labels != data.IGNORE, np.zeros(labels.shape, bool)
    for axis in (0, 1):
        (here, there), (a, b) = ((np.delete(x, -1, axis), np.delete(x, 0, axis)) for x in (labels, known))
        differ = (here != there) & a & b
        ends = [(0, 0), (0, 0)]
        for ends[axis] in ((0, 1), (1, 0)):
            meet |= np.pad(differ, ends)
    return meet.any() & (ndimage.distance_transform_edt(~meet) < width)


class MaxF(Metric):
    """Best F measure of saliency over 19 thresholds (SAK).

    protocol "invpt": the probability goes through a second sigmoid, as in InvPT's code and those that
    follow it, so four thresholds tell pixels apart: .2007, .4055, .6190 and .8473.
    """

    thresholds = torch.arange(0.05, 1, 0.05).numpy()  # float32 to the last bit as SAK's

    def __init__(self, protocol: str = "sak"):
        if protocol not in ("sak", "invpt"):
            raise ValueError(f"saliency protocol {protocol!r} is not known; use sak or invpt")
        self.protocol = protocol
        super().__init__(hit=zeros(19), predicted=zeros(19), salient=zeros(), images=zeros(),
                         iou=np.zeros(19))

    def update(self, prediction, target) -> None:
        """Count prediction ([B,] H, W), probability in [0, 1]; target the same, {0, 1, 255}."""
        for p, t in images_of(prediction, target):
            valid = t != data.IGNORE
            if not valid.any():
                continue
            if self.protocol == "invpt":
                p = 1 / (1 + np.exp(-p.astype(np.float32)))
            level, salient = levels(p[valid], self.thresholds), t[valid] == 1
            predicted, hit = reaching(level), reaching(level[salient])  # (19,) each
            union = predicted + salient.sum() - hit
            self.sums["hit"] += hit
            self.sums["predicted"] += predicted
            self.sums["salient"] += salient.sum()
            self.sums["images"] += 1
            # Theirs: ZeroDivisionError where nothing is salient or predicted. Ours: agreement, 1.
            self.sums["iou"] += np.where(union == 0, 1, hit / np.maximum(union, 1))

    def compute(self) -> dict:
        """Return `maxf` (of the summed counts) and `miou` (mean over images) in percent."""
        hit = self.sums["hit"]
        precision = hit / (self.sums["predicted"] + 1e-8)
        recall = hit / (self.sums["salient"] + 1e-8)
        f = 1.3 * precision * recall / (0.3 * precision + recall + 1e-8)
        iou = self.sums["iou"] / max(self.sums["images"], 1)
        return {"maxf": float(100 * f.max()), "miou": float(100 * iou.max())}


class NormalError(Metric):
    """Angle between normals, pooled over pixels (mean: SAK; the rest: ASTMT)."""

    BIN = 0.01  # degrees; the median is read off a histogram this fine and errs by less
    LIMITS = (11.25, 22.5, 30)

    def __init__(self):
        super().__init__(bins=zeros(round(180 / self.BIN)), within=zeros(3), total=np.zeros(()))

    def update(self, prediction, target) -> None:
        """Count prediction and target ([B,] H, W, 3) or ([B,] 3, H, W), of any length.

        Target vectors that are zero, or 255 in a channel, are ignored.
        """
        prediction, target = as_arrays(channels_last(prediction), channels_last(target))
        valid = (target != data.IGNORE).all(-1) & (target != 0).any(-1)
        p, t = (unit(x[valid].astype(np.float64)) for x in (prediction, target))  # (pixels, 3)
        # acos of the dot product would lose small angles to rounding
        half = np.arctan2(np.linalg.norm(p - t, axis=1), np.linalg.norm(p + t, axis=1))
        angle = np.degrees(2 * half)  # (pixels,)
        bins = len(self.sums["bins"])
        index = np.minimum(angle / self.BIN, bins - 1).astype(np.int64)
        self.sums["bins"] += np.bincount(index, minlength=bins)
        self.sums["within"] += [(angle < limit).sum() for limit in self.LIMITS]
        self.sums["total"] += angle.sum()

    def compute(self) -> dict:
        """Return `mean`, `median` in degrees, `within_*` in percent; nan without a valid pixel."""
        pixels = self.sums["bins"].sum()
        within = [ratio(100 * count, pixels) for count in self.sums["within"]]
        return {"mean": ratio(self.sums["total"], pixels),
                "median": self.BIN * median_bin(self.sums["bins"]) if pixels else math.nan,
                **{f"within_{x:g}": share for x, share in zip(self.LIMITS, within, strict=True)}}


class DepthRMSE(Metric):
    """Error of depth, pooled over pixels (rmse: SAK)."""

    def __init__(self):
        super().__init__(close=zeros(), pixels=zeros(), squares=np.zeros(()))

    def update(self, prediction, target) -> None:
        """Count prediction and target ([B,] H, W) in metres; target outside (0, 80) is ignored."""
        prediction, target = as_arrays(prediction, target)
        valid = (target > 0) & (target < 80)
        t = target[valid].astype(np.float64)
        p = np.maximum(prediction[valid].astype(np.float64), 1e-9)
        self.sums["squares"] += np.square(p - t).sum()
        self.sums["close"] += (np.maximum(p / t, t / p) < 1.25).sum()
        self.sums["pixels"] += valid.sum()

    def compute(self) -> dict:
        """Return `rmse` in metres and `delta1` in percent; nan without a valid pixel."""
        squares, close, pixels = (self.sums[name] for name in ("squares", "close", "pixels"))
        return {"rmse": math.sqrt(ratio(squares, pixels)), "delta1": ratio(100 * close, pixels)}


class BoundaryF(Metric):
    """Best F measure of boundaries over the dataset, pixels matched one to one (SEISM's `fb`).

    "sak": smoothing, non-maximum suppression over 4 px, 8 bits, 99 thresholds; "invpt": suppression
    over 1 px alone, 101 thresholds; "simple": neither, 19 thresholds. Then, each: thinning, matching.
    Theirs draws random outliers from the clock and misses about 0.1 % of the matches; ours is the
    largest matching, so odsF reads up to 0.11 higher.

    `update` keeps a packed map per image, 35 to 80 KB at 375 x 500; `compute` counts on all cores. Of
    FEW images or more (below, starting processes costs more than it saves), and unless `exhaustive`, it
    takes every 16th threshold, then halves gaps while their bound (see `gaps_worth_halving`) reaches the
    best F: some 25 of 99 thresholds. The bound holds where matches and pixels fall as the threshold
    rises. Thinning breaks that by a few pixels an image, so the odsF of few and noisy images could differ
    from the exhaustive one; it never did in 3000 sets of about 16 and 32 maps of noise, SLACK or not.
    """

    STEP, SLACK, FEW = 16, 0.01, 100
    CHUNK = 2**21  # pixels that go to a process at a time: 11 images of PASCAL

    def __init__(self, max_dist: float, protocol: str = "sak", exhaustive: bool = False):
        if protocol not in THRESHOLDS:
            raise ValueError(f"boundary protocol {protocol!r} is not known; use {', '.join(THRESHOLDS)}")
        super().__init__(images=[])  # (height, width, packed level map and truth) each
        self.max_dist = max_dist  # share of the image's diagonal
        self.protocol, self.thresholds = protocol, THRESHOLDS[protocol]
        self.exhaustive = exhaustive or protocol == "simple"

    def update(self, prediction, target) -> None:
        """Keep prediction ([B,] H, W), in [0, 1] or uint8; target ([B,] H, W), a label map."""
        for p, labels in images_of(prediction, target):
            level, truth = boundary_levels(p, self.protocol), data.thin(seg2bmap(labels))
            self.sums["images"].append((*truth.shape, zlib.compress(
                level.tobytes() + np.packbits(truth).tobytes(), 1)))

    def compute(self) -> dict:
        """Return `odsf`, `precision`, `recall` in percent, `threshold`, and `counts`, thresholds x
        (matched recall, ground truth, matched precision, predicted), -1 where not evaluated."""
        counts = np.full((len(self.thresholds), 4), -1)
        step = 1 if self.exhaustive or len(self.sums["images"]) < self.FEW else self.STEP
        todo = np.arange(step // 2, len(counts), step)
        while len(todo):
            counts[todo] = self.count(todo)
            todo = gaps_worth_halving(counts, self.SLACK)
        matched_r, truth, matched_p, predicted = counts.T  # (thresholds,) each
        recall = matched_r / np.maximum(truth, 1)
        precision = np.where(predicted == 0, 1, matched_p / np.maximum(predicted, 1))
        f = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        f[truth < 0] = -1  # not evaluated
        best = int(f.argmax())
        return {"odsf": float(100 * f[best]), "threshold": round(float(self.thresholds[best]), 4),
                "precision": float(100 * precision[best]), "recall": float(100 * recall[best]),
                "counts": counts}

    def count(self, ks: np.ndarray) -> np.ndarray:
        """Sum the four counts over all images at the thresholds of rising indices ks: (len(ks), 4)."""
        images = self.sums["images"]
        size = max(1, self.CHUNK // math.prod(images[0][:2])) if images else 1
        tasks = [(images[i : i + size], ks, self.max_dist) for i in range(0, len(images), size)]
        found = data.on_all_cores(count_boundaries, tasks)
        what = f"match boundaries at {len(ks)} thresholds"
        return sum(data.track(found, what, len(tasks), quiet=len(tasks) < 8), zeros(len(ks), 4))


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)


def ratio(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part / whole) if whole else math.nan


def as_arrays(prediction, target) -> tuple[np.ndarray, np.ndarray]:
    """Bring tensors or arrays to numpy. Raises ValueError where they cannot be compared."""
    arrays = []
    for x in (prediction, target):
        if isinstance(x, Tensor):
            x = x.detach().cpu()
            x = x.float().numpy() if x.is_floating_point() else x.numpy()  # numpy has no bfloat16
        arrays.append(np.ascontiguousarray(x))
    prediction, target = arrays
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} differ in shape; "
                         "resize or crop the prediction")
    if not np.isfinite(prediction).all():
        raise ValueError("prediction has values that are not finite; score weights that are")
    return prediction, target


def images_of(prediction, target) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the (H, W) pairs of one image or of a batch."""
    prediction, target = as_arrays(prediction, target)
    size = prediction.shape[-2:]
    return zip(prediction.reshape(-1, *size), target.reshape(-1, *size), strict=True)


def levels(p: np.ndarray, thresholds: np.ndarray, side: str = "right") -> np.ndarray:
    """Count for each p how many rising thresholds it reaches: level > k iff p >= thresholds[k].

    side "left": iff p > thresholds[k].
    """
    return np.searchsorted(thresholds, p.astype(np.float32), side)


def reaching(level: np.ndarray) -> np.ndarray:
    """Count the values that reach each of 19 thresholds: (19,)."""
    return np.bincount(level, minlength=20)[::-1].cumsum()[::-1][1:]


def channels_last(x):
    """Move the three channels of ([B,] 3, H, W) to the end, unless they are there."""
    return x if x.shape[-1] == 3 else x.swapaxes(-3, -2).swapaxes(-2, -1)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def median_bin(bins: np.ndarray) -> float:
    """Return below which point half of the counts lie, in units of bins."""
    below = bins.cumsum()
    i = int(np.searchsorted(below, below[-1] / 2))
    return float(i + 1 - (below[i] - below[-1] / 2) / bins[i])


def delta_m(metrics: dict, reference: dict) -> float:
    """Return the mean relative gain over the reference's tasks in percent (PRISM's Delta_m).

    Both map tasks to a headline number, or to what `compute` returned.
    """
    if not reference or not set(reference) <= set(metrics):
        raise ValueError(f"reference is for {sorted(reference)}, numbers for {sorted(metrics)}; "
                         "Delta_m is over the reference's tasks: name at least one, and score all")
    gains = []
    for task, base in reference.items():
        value, base = headline(task, metrics[task]), headline(task, base)
        if not base > 0:
            raise ValueError(f"reference of {task} is {base}; Delta_m divides by it: give one > 0")
        sign = -1 if data.TASKS[task].lower_is_better else 1
        gains.append(sign * (value - base) / base)
    return 100 * sum(gains) / len(gains)


# Published test rows (PRISM's tables 1 and 2, SAK's table 3; "-" was not given), by data set and boundary
# protocol: what SAK and PRISM measured themselves, and what they quote of methods that score odsF as InvPT.
PUBLISHED = {
    ("pascal", "sak"): (("semseg", "human_parts", "sal", "normals", "edge"), """
        single-task ViT-B  80.25 70.54 84.54 13.57 74.22
        multi-task ViT-B   76.76 65.26 84.39 13.98 70.37
        SAK ViT-B          81.88 74.30 84.79 14.02 74.09
        PRISM ViT-B        82.20 75.34 84.81 13.47 75.92
        single-task ViT-L  81.61 72.77 83.80 13.87 75.24
        SAK ViT-L          84.01 76.99 84.65 13.82 76.27
        PRISM ViT-L        84.34 77.83 84.67 13.43 76.23"""),
    ("pascal", "invpt"): (("semseg", "human_parts", "sal", "normals", "edge"), """
        InvPT ViT-B        77.33 66.62 85.14 13.78 73.20
        TaskPrompter ViT-B 79.00 67.00 85.05 13.47 73.50
        MLoRE ViT-B        79.26 67.82 85.31 13.65 74.69"""),
    ("nyud", "sak"): (("semseg", "depth", "normals", "edge"), """
        single-task ViT-B  51.15 0.5792 19.77 77.35
        multi-task ViT-B   49.27 0.5823 19.92 75.88
        SAK ViT-B          59.93 0.4942 17.60 78.60
        PRISM ViT-B        60.22 0.4883 17.81 76.59
        single-task ViT-L  54.19 0.5560 19.22 78.09
        SAK ViT-L          63.18 0.4313 16.25 79.43"""),
    ("nyud", "invpt"): (("semseg", "depth", "normals", "edge"), """
        InvPT ViT-B        50.30 0.5367 19.00 77.60
        TaskPrompter ViT-B 50.40 0.5402 18.91 77.60"""),
}


def published_rows(kind: str, protocol: str) -> dict[str, dict[str, float]]:
    """Return {method: {task: value}} of one data set and one protocol, {} where nothing was published."""
    tasks, text = PUBLISHED.get((kind, protocol), ((), ""))
    rows = [line.split() for line in text.strip().splitlines()]
    return {" ".join(row[: -len(tasks)]): dict(zip(tasks, map(float, row[-len(tasks) :]), strict=True))
            for row in rows}


def print_published(kind: str, protocol: str, ours: dict[str, float], size: str) -> None:
    """Print our headline numbers below the published ones of the same data set and protocol.

    Delta_m is computed, of each row against the single-task row of its size (ours: ViT-B, ViT-L, ...).
    """
    rows = published_rows(kind, protocol)
    if not rows:
        return
    tasks = list(next(iter(rows.values())))
    table = Table("", *tasks, "Delta_m %", title=f"published on {kind}, protocol {protocol}")
    for name, row in (*rows.items(), (f"this checkpoint, {size}", ours)):
        single = rows.get(f"single-task {name[-5:]}", {})
        gain = f"{delta_m(row, single):+.2f}" if single and set(single) <= set(row) else "-"
        cells = (f"{row[task]:.{4 if task == 'depth' else 2}f}" if task in row else "-" for task in tasks)
        table.add_row(name, *cells, gain, style="bold" if row is ours else None)
    console.print(table)


def headline(task: str, value: dict | float) -> float:
    """Return the number of a task that published tables print."""
    return value[data.TASKS[task].metric] if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------ boundaries
# Sums are taken in float32 and in the order of the compiled original: another order, or float64, moves
# up to 0.3 % of the pixels that survive non-maximum suppression.

HUNDREDTHS = np.arange(1, 100) / 100
THRESHOLDS = {  # of a boundary's probability; SAK and ours compare with >=, InvPT with >
    "sak": HUNDREDTHS.astype(np.float32),
    "invpt": np.array([0.001, *HUNDREDTHS, 0.999], np.float32),
    "simple": np.arange(1, 20, dtype=np.float32) / 20,
}


def boundary_levels(p: np.ndarray, protocol: str) -> np.ndarray:
    """Turn p (H, W), in [0, 1] or uint8, into the number of thresholds reached, (H, W) uint8."""
    thresholds = THRESHOLDS[protocol]
    if protocol == "simple":
        return levels(p / np.float32(255) if p.dtype == np.uint8 else p, thresholds).astype(np.uint8)
    if p.dtype != np.uint8:
        if not 0 <= p.min() <= p.max() <= 1:
            raise ValueError(f"boundary probabilities are {p.min():.3g}..{p.max():.3g}; pass 0..1, or uint8")
        p = (255 * p).astype(np.uint8)  # numpy's cast truncates, so does their PNG
    e = p.astype(np.float32) / 255
    if protocol == "invpt":
        return levels(suppress(e, orientation(e), 1), thresholds, "left").astype(np.uint8)
    e = smooth(e)
    e = np.floor(255 * suppress(e, orientation(e), 4) + 0.5) / 255  # through a second PNG
    return levels(e, thresholds).astype(np.uint8)


def smooth(x: np.ndarray) -> np.ndarray:
    """Filter x (H, W) float32 with [1 2 1] / 4 across and down; borders repeat the outermost pixel."""
    def run(x):  # along the first axis
        return np.concatenate([3 * x[:1] + x[1:2], x[:-2] + 2 * x[1:-1] + x[2:], x[-2:-1] + 3 * x[-1:]])

    return run(run(x.T).T) / 16


def smooth_widely(x: np.ndarray, radius: int = 4) -> np.ndarray:
    """Filter x (H, W) float32 with [1 .. r r+1 r .. 1] / (r+1)^2 across and down, borders mirrored.

    A triangle's second difference is 1, -2, 1, so each line is a running sum of a running sum.
    """
    def run(x, scale):  # along the first axis
        n, r = len(x), radius + 1
        around = np.pad(x, ((r, r), (0, 0)), mode="symmetric")
        bend = around[: n - 1] + around[2 * r : 2 * r + n - 1] - 2 * x[:-1]
        ramp = around[r : 2 * r].cumsum(0)
        first = 2 * ramp.cumsum(0)[-1] - ramp[-1]
        return (np.concatenate([first[None], bend.cumsum(0)]) * scale).cumsum(0)

    return run(run(x.T, np.float32(1 / (radius + 1) ** 4)).T, 1)


def orientation(x: np.ndarray) -> np.ndarray:
    """Return the direction across the lines of x (H, W) float32, radians in [0, pi), 0 = along a row."""
    dy, dx = np.gradient(smooth_widely(x))
    dyy, dxy = np.gradient(dy)
    dxx = np.gradient(dx, axis=1)
    return np.mod(np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5)), np.pi)


def suppress(e: np.ndarray, angle: np.ndarray, radius: int) -> np.ndarray:
    """Set to 0 what is not maximal within `radius` pixels along its angle, then fade the border.

    e, angle (H, W) float32. 1 % below a neighbour still counts as maximal.
    """
    (h, w), flat, kept = e.shape, e.ravel(), np.flatnonzero(e)
    for d in (side * step for step in range(1, radius + 1) for side in (1, -1)):
        y, x = np.divmod(kept, w)
        x = np.clip(x + d * np.cos(angle.ravel()[kept]), 0, np.float32(w - 1.001), dtype=np.float32)
        y = np.clip(y + d * np.sin(angle.ravel()[kept]), 0, np.float32(h - 1.001), dtype=np.float32)
        column, row = x.astype(np.int64), y.astype(np.int64)
        x, y, i = x - column.astype(np.float32), y - row.astype(np.float32), row * w + column
        seen = (flat[i] * (1 - x) * (1 - y) + flat[i + 1] * x * (1 - y)
                + flat[i + w] * (1 - x) * y + flat[i + w + 1] * x * y)  # bilinear
        kept = kept[flat[kept] * np.float32(1.01) >= seen]
    out = np.zeros((h, w), np.float32)
    out.ravel()[kept] = flat[kept]
    rim = min(5, h // 2, w // 2)
    for k in range(rim):
        out[:, [k, w - 1 - k]] *= np.float32(k / rim)
    for k in range(rim):
        out[[k, h - 1 - k]] *= np.float32(k / rim)
    return out


def seg2bmap(labels: np.ndarray) -> np.ndarray:
    """Mark where labels (H, W) differ from their E, S or SE neighbour; returns (H, W) bool.

    The last column looks only south, the last row only east, as in the Berkeley benchmark.
    """
    padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    return (labels != padded[:-1, 1:]) | (labels != padded[1:, :-1]) | (labels != padded[1:, 1:])


def match(predicted: np.ndarray, truth: np.ndarray, radius: float) -> int:
    """Count the pairs in a largest one-to-one matching of pixels at most `radius` pixels apart.

    predicted, truth (H, W) bool. Maximum flow source -> fewer -> more -> sink, capacities 1: from the
    side of fewer pixels there is less to look up. scipy's maximum_bipartite_matching hangs on such graphs.
    """
    reach = int(radius)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    steps = (dy * (truth.shape[1] + 2 * reach) + dx)[dy**2 + dx**2 <= radius**2]  # (offsets,)
    fewer, more = sorted((np.pad(x, reach).ravel() for x in (predicted, truth)), key=np.count_nonzero)
    node = np.zeros(len(more), np.int32)  # 0 = none
    fewer, more = np.flatnonzero(fewer), np.flatnonzero(more)
    n, m = len(fewer), len(more)
    if n == 0:
        return 0
    node[more] = np.arange(n + 1, n + m + 1)
    near = node.take(fewer[:, None] + steps)  # (n, offsets)
    ones = np.ones(m, np.int32)
    arcs = np.concatenate([[0, n], (near > 0).sum(1), ones, [0]]).cumsum().astype(np.int32)
    heads = np.concatenate([np.arange(1, n + 1, dtype=np.int32), near[near > 0], ones * (n + m + 1)])
    graph = csr_array((np.ones(len(heads), np.int32), heads, arcs), shape=(n + m + 2, n + m + 2))
    return int(maximum_flow(graph, 0, n + m + 1).flow_value)


def count_boundaries(task: tuple[list, np.ndarray, float]) -> np.ndarray:
    """Sum BoundaryF's four counts of packed images at the thresholds of rising indices ks, (len(ks), 4)."""
    images, ks, max_dist = task
    counts = zeros(len(ks), 4)
    for h, w, packed in images:
        stored = np.frombuffer(zlib.decompress(packed), np.uint8)
        level = stored[: h * w].reshape(h, w)
        truth = np.unpackbits(stored[h * w :], count=h * w).reshape(h, w).astype(bool)
        above = np.bincount(level.ravel(), minlength=256)[::-1].cumsum()[::-1]  # pixels of k and more
        before, total = None, truth.sum()
        at_once = max(1, 2**16 // (h * w))  # thresholds; small images are thinned in a third of the time
        for first in range(0, len(ks), at_once):
            thinned = data.thin(level > ks[first : first + at_once, None, None])
            for row, lines in enumerate(thinned, first):
                if above[ks[row] + 1] != before:  # else the same pixels as at the threshold before
                    before, predicted = above[ks[row] + 1], lines.sum()
                    matched = match(lines, truth, max_dist * math.hypot(h, w))
                counts[row] += [matched, total, matched, predicted]
    return counts


def gaps_worth_halving(counts: np.ndarray, slack: float) -> np.ndarray:
    """Return the middles of gaps between evaluated thresholds in which the best F may lie.

    counts (thresholds, 4), -1 = not evaluated. F = 2 matched / (predicted + truth), so a gap's is at
    most that of the matches at its lower end with the predicted pixels at its upper end.
    """
    known = np.flatnonzero(counts[:, 0] >= 0)
    matched, truth, _, predicted = counts[known].T
    whole = np.maximum(predicted + truth, 1)
    bound = np.append(truth[0], matched) / np.maximum(np.append(predicted, 0) + truth[0], 1)
    edges = np.concatenate([[-1], known, [len(counts)]])
    worth = (bound * (1 + slack) >= (matched / whole).max()) & (np.diff(edges) > 1)
    return (edges[:-1] + edges[1:])[worth] // 2


# -------------------------------------------------------------------------------------------- evaluate


def final_map(task: str, raw: Tensor) -> np.ndarray:
    """Turn a head's raw output (B, C, H, W) into the map that is scored, (B, H, W [, 3])."""
    raw = raw.float()
    if task in ("semseg", "human_parts"):
        return raw.argmax(1).cpu().numpy()
    if task == "sal":
        return raw.softmax(1)[:, 1].cpu().numpy()
    if task == "edge":
        return raw[:, 0].sigmoid().cpu().numpy()
    if task == "normals":
        return F.normalize(raw, dim=1).permute(0, 2, 3, 1).cpu().numpy()
    return raw[:, 0].clamp(min=0).cpu().numpy()


@torch.inference_mode()
def predict_maps(model, images: Tensor, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Predict the final maps of images (B, 3, H, W), RGB in [0, 1], in eval mode."""
    training = model.training
    raw = model.eval().predict(images, list(tasks))
    model.train(training)
    return {task: final_map(task, raw[task]) for task in tasks}


def unpad(padded: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Cut the image of size (H, W) out of the test transform's padding."""
    top, left = (padded.shape[0] - size[0]) // 2, (padded.shape[1] - size[1]) // 2
    return padded[top : top + size[0], left : left + size[1]]


def progress(indices: Sequence[int], batch_size: int, what: str, rank: int = 0,
             world_size: int = 1) -> Iterator[Sequence[int]]:
    """Split indices into batches under a progress bar; yield this process's, every world_size-th."""
    starts = range(rank * batch_size, len(indices), world_size * batch_size)
    for start in data.track(starts, what, len(starts), quiet=rank > 0):
        yield indices[start : start + batch_size]


def stack(samples: list[dict], name: str) -> Tensor:
    return torch.stack([sample[name] for sample in samples])


def new_metric(task: str, dataset, protocol: str | None = None, exhaustive: bool = False) -> Metric:
    """Build the empty metric of a task. protocol, exhaustive: of `BoundaryF` (default: the data's)."""
    protocol = protocol or dataset.boundary_protocol
    if task in ("semseg", "human_parts"):
        return MeanIoU(dataset.tasks[task], band=3 if task == "human_parts" else 0)
    if task == "edge":
        return BoundaryF(dataset.max_dist, protocol, exhaustive)
    if task == "sal":
        return MaxF(protocol_of("sal", "maxf", protocol))
    return {"normals": NormalError, "depth": DepthRMSE}[task]()


def choose_protocol(args: "Args", dataset) -> str:
    """Return the protocol of boundary scores: the one asked for, or the data's own."""
    return dataset.boundary_protocol if args.protocol == "auto" else args.protocol


def protocol_of(task: str, metric: str, protocol: str) -> str:
    """Return whose protocol a number follows where boundaries follow `protocol`."""
    if task == "sal" and protocol == "invpt":
        return protocol
    return COLUMNS[metric][2] or protocol


def measure(model, dataset, device, batch_size: int, tasks: Sequence[str],
            rank: int = 0, world_size: int = 1, save: Path | None = None, **options) -> dict[str, Metric]:
    """Return each task's metric, updated over every world_size-th batch from number `rank` on.

    Whole batches, because in another batch an image's prediction is rounded differently.
    save: write the maps below this folder, see `write_maps`. options: as `new_metric`.
    """
    metrics = {task: new_metric(task, dataset, **options) for task in tasks}
    what = f"evaluate {' '.join(tasks)}"
    for batch in progress(range(len(dataset)), batch_size, what, rank, world_size):
        samples = [dataset[i] for i in batch]
        maps = predict_maps(model, stack(samples, "image").to(device), tasks)
        if save is not None:
            write_maps(save, dataset, batch, maps)
        for task in (task for task in tasks if task != "edge"):
            metrics[task].update(maps[task], stack(samples, task))
        for i, probability in zip(batch, maps.get("edge", ()), strict="edge" in maps):
            labels = dataset.read(i)["labelmap"]  # the training label `edge` is another array
            metrics["edge"].update(unpad(probability, labels.shape), labels)
    return metrics


def evaluate(model, dataset, device, batch_size: int, tasks: Sequence[str], rank: int = 0,
             world_size: int = 1, **options) -> dict[str, dict]:
    """Score the model on the whole dataset: {task: what its metric's `compute` returns}.

    All processes of the default group must call this; it returns {} on all but the first, which alone
    starts processes of its own to match boundaries. options: as `measure`.
    """
    metrics = measure(model, dataset, device, batch_size, tasks, rank, world_size, **options)
    if world_size > 1:
        states = None if rank else [None] * world_size
        dist.gather_object({task: metric.state() for task, metric in metrics.items()}, states)
        if rank:
            return {}
        for task, metric in metrics.items():
            for state in states[1:]:
                metric.merge(state[task])
    return {task: metric.compute() for task, metric in metrics.items()}


# ------------------------------------------------------------------------------------ prediction files

PREDICTION_FILES = {  # task -> endings that are read, the first is written; what they hold
    "semseg": ((".png",), "8-bit class ids"),
    "human_parts": ((".png",), "8-bit part ids"),
    "normals": ((".npy", ".png"), "float32 (H, W, 3), x right, y up, z to the camera; png: 127.5 (n + 1)"),
    "edge": ((".png",), "8-bit gray, floor(255 p)"),
    "sal": ((".png",), "8-bit gray, floor(255 p)"),
    "depth": ((".npy", ".mat"), "float32 metres; mat: variable depth"),
}  # 8-bit colours turn normals by 0.17 degrees in the mean if rounded, by 0.34 if cut off


def write_maps(folder: Path, dataset, indices: Sequence[int], maps: dict[str, np.ndarray]) -> None:
    """Write final maps (B, H, W [, 3]) of padded images as folder/<task>/<id>, at native size."""
    samples = [dataset.read(i, labels=False) for i in indices]
    for task, batch in maps.items():
        files = {}
        for sample, array in zip(samples, batch, strict=True):
            array = unpad(array, sample["image"].shape)
            if task in ("normals", "depth"):
                content = array.astype(np.float32)
            else:
                array = 255 * array if task in ("sal", "edge") else array
                content = Image.fromarray(array.astype(np.uint8))  # the cast is the floor
            files[sample["name"] + PREDICTION_FILES[task][0][0]] = content
        write_files(folder / task, files)


def find_maps(folder: Path, dataset, task: str) -> list[Path]:
    """Return the file of each of the dataset's ids. Raises where one has none, or two."""
    found = [[path for ending in PREDICTION_FILES[task][0]
              if (path := folder / task / f"{name}{ending}").exists()] for name in dataset.ids]
    if missing := [name for name, paths in zip(dataset.ids, found, strict=True) if not paths]:
        endings = " or ".join(PREDICTION_FILES[task][0])
        raise FileNotFoundError(f"{folder / task / missing[0]}{endings} is missing, {len(missing)} of "
                                f"{len(found)} in all; predict every image of the split")
    if double := [paths for paths in found if len(paths) > 1]:
        raise ValueError(f"{double[0][0]} and {double[0][1].name} predict the same; delete one of them")
    return [path for path, in found]


def read_map(task: str, path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """Read a prediction for labels of size (H, W): a final map, edge as uint8. Raises ValueError."""
    array = data.decode_file(path, lambda path: data.load_array(path, "depth"))
    shape = (*size, 3) if task == "normals" else size
    fits = array.dtype == np.uint8 if path.suffix == ".png" else array.dtype.kind == "f"
    if array.shape != shape or not fits:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, its labels need {shape}; write "
                         f"{PREDICTION_FILES[task][1]}, at the image's own size")
    if task in ("semseg", "human_parts"):
        data.check_range(path, array, channels - 1)
    if not np.isfinite(array).all():
        raise ValueError(f"{path} has values that are not finite; predict a number for every pixel")
    if path.suffix == ".png" and task == "normals":
        return data.decode_normals(array)
    return array / np.float32(255) if task == "sal" else array


def evaluate_files(folder: Path, dataset, tasks: Sequence[str], **options) -> dict[str, dict]:
    """Score the files of a folder as `evaluate` scores a model."""
    paths = {task: find_maps(folder, dataset, task) for task in tasks}
    metrics = {task: new_metric(task, dataset, **options) for task in tasks}
    for i in data.track(range(len(dataset)), f"score {' '.join(tasks)}", len(dataset)):
        sample = dataset.read(i)
        size = sample["image"].shape[:2]
        truth = data.to_tensors(sample, size) | {"edge": sample.get("labelmap")}
        for task, metric in metrics.items():
            metric.update(read_map(task, paths[task][i], size, dataset.tasks[task]), truth[task])
    return {task: metric.compute() for task, metric in metrics.items()}


# ---------------------------------------------------------------------------------------------- probes


class Probe(nn.Module):
    """Read every task off frozen features with one linear map per task, patch by patch.

    features: images (B, 3, H, W), RGB in [0, 1] -> 4 levels (B, C, h, w). A patch's levels, whitened,
    predict the labels at CELLS x CELLS places inside it: classes by logistic regression, numbers by
    ridge regression. `predict` gives what a student's does, so `evaluate` scores it.
    """

    CELLS = 4
    STEPS = 100

    def __init__(self, features, dataset):
        super().__init__()
        self.features, samples = features, [dataset[i] for i in range(len(dataset))]
        with torch.no_grad():
            chunks = (samples[k : k + 64] for k in range(0, len(samples), 64))
            x = torch.cat([self.levels(stack(chunk, "image")) for chunk in chunks])
        self.grid, x = x.shape[1:3], x.flatten(0, 2)  # (T, F)
        self.mean, self.whiten = whitening(x)
        x = self.whitened(x)
        labels = {task: self.cells(task, stack(samples, task)) for task in dataset.tasks}
        self.maps = fit_numbers(x, {k: y for k, y in labels.items() if k in ("normals", "depth")})
        classes = {k: y for k, y in labels.items() if k not in self.maps}
        self.maps |= fit_classes(x, classes, dataset.tasks, self.STEPS)

    def levels(self, images: Tensor) -> Tensor:
        """Return the levels of each patch side by side, (B, h, w, F)."""
        return torch.cat(self.features(images), 1).permute(0, 2, 3, 1)

    def whitened(self, x: Tensor) -> Tensor:
        x = (x - self.mean) @ self.whiten
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)  # (..., F + 1), the last for the bias

    def cells(self, task: str, y: Tensor) -> Tensor:
        """Pick the labels (images, [C,] H, W) at the cells of each patch: (T, C, cells)."""
        y = y.unsqueeze(1) if y.ndim == 3 else y
        stride = y.shape[-1] // (self.grid[1] * self.CELLS)
        y = y[..., stride // 2 :: stride, stride // 2 :: stride]
        return rearrange(y, "b c (h p) (w q) -> (b h w) c (p q)", p=self.CELLS, q=self.CELLS)

    @torch.no_grad()
    def predict(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return {task: (B, C, H, W)}, raw outputs as a student's."""
        x = self.whitened(self.levels(images))  # (B, h, w, F + 1)
        raw = {}
        for task in tasks:
            y = x @ self.maps[task]
            y = rearrange(y, "b h w (c p q) -> b c (h p) (w q)", p=self.CELLS, q=self.CELLS)
            raw[task] = F.interpolate(y, images.shape[-2:], mode="bilinear", align_corners=False)
        return raw


def whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (F,) and map (F, F) that make x (T, F) uncorrelated; weak directions stay weak."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / std
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    return mean, vectors * (values.clamp(min=0) + 1e-3).rsqrt() / std[:, None]


def fit_numbers(x: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit x (T, F + 1) to labels (T, C, cells) by ridge regression; returns {task: (F + 1, C * cells)}."""
    gram, maps = x.T @ x / len(x) + 1e-2 * torch.eye(x.shape[1]), {}
    for task, y in labels.items():
        known = y != data.IGNORE
        mean = (y * known).sum((0, 2)) / known.sum((0, 2))  # (C,)
        y = torch.where(known, y, mean[:, None]).flatten(1)  # an unknown cell counts as the mean
        maps[task] = torch.linalg.solve(gram, x.T @ y / len(x))
    return maps


def fit_classes(x: Tensor, labels: dict[str, Tensor], channels: dict[str, int],
                steps: int) -> dict[str, Tensor]:
    """Fit x (T, F + 1) to classes (T, 1, cells) by logistic regression: {task: (F + 1, C * cells)}."""
    maps = {task: torch.zeros(x.shape[1], channels[task] * y.shape[2], requires_grad=True)
            for task, y in labels.items()}
    optimizer = torch.optim.Adam(maps.values(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    order = order.repeat(1 + steps * 2048 // len(x))
    for k in range(steps):
        rows = order[k * 2048 : (k + 1) * 2048]
        loss = sum(class_loss(rearrange(x[rows] @ maps[task], "t (c p) -> t c p", p=y.shape[2]), y[rows, 0])
                   for task, y in labels.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {task: w.detach() for task, w in maps.items()}


def class_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits (T, C, cells) with labels (T, cells), binary where C is 1."""
    if logits.shape[1] == 1:
        known = y != data.IGNORE
        return F.binary_cross_entropy_with_logits(logits[:, 0][known], y[known])
    return F.cross_entropy(logits, y, ignore_index=data.IGNORE)


def probe(features, train, test) -> dict[str, float]:
    """Fit a `Probe` on one dataset, return its headline numbers {task: value} on another."""
    metrics = evaluate(Probe(features, train), test, "cpu", 64, list(test.tasks))
    return {task: headline(task, value) for task, value in metrics.items()}


def probe_table(features: dict[str, Callable[[Tensor], list[Tensor]]], train, test) -> dict[str, dict]:
    """Probe each {name: images -> 4 levels}, the floor first; print name x task, best in bold.

    Returns {name: {task: value}}.
    """
    rows = {name: probe(levels, train, test) for name, levels in features.items()}
    table = Table("linear probe of", *(f"{task} {data.TASKS[task].metric}" for task in test.tasks))
    for name, row in rows.items():
        cells = []
        for task, value in row.items():
            best = (min if data.TASKS[task].lower_is_better else max)(r[task] for r in rows.values())
            cells.append(f"{'[bold]' if value == best else ''}{value:.2f}")
        table.add_row(name, *cells)
    console.print(table)
    return rows


# --------------------------------------------------------------------------------------------- routing


@torch.inference_mode()
def routing(model, dataset, device, batch_size: int, max_images: int = 128) -> list[dict]:
    """Measure what the routers do with the same images under each teacher and each task.

    All tokens count, cls too. Returns per MoE block: `block`, its index; `lambda`, the mean gate;
    `teachers` and `tasks`, {context: E shares of the top-k slots, summing to 1}; `nmi_teachers`,
    `nmi_tasks`. Students without experts: [].
    """
    if not hasattr(model, "route"):
        return []
    cfg, contexts = model.cfg, [*model.cfg.teachers, *model.cfg.tasks]
    counts = zeros(len(cfg.moe_blocks), len(contexts), cfg.experts)
    gates = np.zeros((len(cfg.moe_blocks), 2))  # sum, tokens
    training = model.training
    model.eval()
    for batch in progress(range(min(len(dataset), max_images)), batch_size, "routing"):
        images = stack([dataset[i] for i in batch], "image").to(device)
        for c, context in enumerate(contexts):
            for b, route in enumerate(model.route(images, context)):
                slots = torch.bincount(route.topk_idx.flatten(), minlength=cfg.experts)
                counts[b, c] += slots.cpu().numpy()
                gates[b] += route.gate.double().sum().item(), route.gate.numel()
    model.train(training)
    blocks = []
    for block, count, (total, tokens) in zip(cfg.moe_blocks, counts, gates.tolist(), strict=True):
        rows = dict(zip(contexts, (count / count.sum(1, keepdims=True)).tolist(), strict=True))
        split = len(cfg.teachers)
        blocks.append({
            "block": block, "lambda": total / tokens,
            "teachers": {name: rows[name] for name in cfg.teachers},
            "tasks": {name: rows[name] for name in cfg.tasks},
            "nmi_teachers": nmi(count[:split]), "nmi_tasks": nmi(count[split:]),
        })
    return blocks


def nmi(counts: np.ndarray) -> float:
    """Return I(C; X) / sqrt(H(C) H(X)) of context C and chosen expert X.

    counts (C, E): slots of context C that went to expert X. 0: the context says nothing about the
    expert (or one of them cannot vary); 1: each determines the other.
    """
    p = counts / max(counts.sum(), 1)  # (C, E)
    h_context, h_expert, h_both = entropy(p.sum(1)), entropy(p.sum(0)), entropy(p)
    scale = math.sqrt(h_context * h_expert)
    return max(0.0, h_context + h_expert - h_both) / scale if scale else 0.0


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return max(0.0, float(-(p * np.log(p)).sum()))


# -------------------------------------------------------------------------------------------- analysis


def load_members(stored: dict, device) -> dict[str, teachers.Teacher]:
    """Load the teachers that a checkpoint records; {} if one is missing, and a line that says why."""
    recorded, members = stored.get("provenance", {}).get("teachers", {}), {}
    try:
        for name, width in stored["config"]["teachers"].items():
            was = recorded.get(name) if isinstance(recorded, dict) else None
            was = was if isinstance(was, dict) else {}
            size = was.get("size") if isinstance(was.get("size"), int) else None
            source = name if was.get("kind") == "toy" else was.get("source")
            if not isinstance(source, str):
                raise ValueError(f"the checkpoint does not record what {name} is")
            members[name] = teachers.load_teacher(source, size, device, was.get("sha256"))
            if members[name].width != width:
                raise ValueError(f"{name} is {members[name].width} wide, was {width} in training")
            now, then = members[name].provenance.get("settings"), was.get("settings")
            if now != then:
                print(f"{name} was raised by other code: settings {now} here, {then} in training")
    except (ValueError, OSError) as error:
        print(f"teachers, and what is measured against them, left out: {prism.one_line(error)}")
        return {}
    return members


@torch.inference_mode()
def choose_experts(model, images: Tensor, batch_size: int) -> Tensor:
    """Return every token's experts under every context, (blocks, contexts, B, N, K), best first."""
    chunks = []
    for batch in progress(range(len(images)), batch_size, "experts"):
        routes = [model.route(images[batch], context) for context in model.contexts]
        chunks.append(torch.stack([
            torch.stack([route.topk_idx for route in block]) for block in zip(*routes, strict=True)]))
    return torch.cat(chunks, 2)


def overlap(picks: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compare contexts by the experts that they chose for the same tokens; picks (C, ..., K).

    Returns `active` (C, E) bool: experts that get any token; (C, C) the share of the E experts that are
    active in both; (C, C) the mean over tokens of the Jaccard index |both| / |either| of their top-k sets.
    """
    K = picks.shape[-1]
    chosen = F.one_hot(picks.flatten(1, -2), experts).sum(2).float()  # (C, T, E)
    both = torch.einsum("ate, bte -> abt", chosen, chosen)  # (C, C, T)
    active = chosen.amax(1)  # (C, E)
    return active > 0, active @ active.T / experts, (both / (2 * K - both)).mean(2)


def teacher_gradients(model, members: dict[str, teachers.Teacher], images: Tensor,
                      batch_size: int) -> list[list[Tensor]]:
    """Return per MoE block the gradient of each teacher's distillation loss, mean over the images.

    Of the shared stream (attention, and anchor and shared expert or the one MLP), (teachers, P), and of the
    routed experts, (teachers, E, Q), if any. Each teacher sees all images; the model must be in eval mode.
    """
    blocks, rows = [model.blocks[i] for i in model.cfg.moe_blocks], []
    for i, (name, teacher) in enumerate(members.items()):
        model.zero_grad()
        for batch in progress(range(len(images)), batch_size, f"gradients of {name}"):
            ids = torch.full((len(batch),), i, device=images.device)
            maps, target = model.distill(images[batch], ids)[name], teacher.features(images[batch])
            (loss,) = training.distill_terms({name: maps}, {name: target}).values()
            (loss * len(batch) / len(images)).backward()
        rows.append([])
        for block in blocks:
            parts = [part for part in block.children() if isinstance(part, (prism.Attention, prism.MLP))]
            shared = torch.cat([p.grad.flatten() for part in parts for p in part.parameters()])
            experts = [part for part in block.children() if isinstance(part, prism.Experts)]
            rows[-1].append([shared, *(
                torch.cat([p.grad.flatten(1) for p in part.parameters()], 1) for part in experts)])
    model.zero_grad()
    return [[torch.stack(kind) for kind in zip(*row, strict=True)] for row in zip(*rows, strict=True)]


def conflict(shared: Tensor, experts: Tensor, active: Tensor) -> dict:
    """Return the cosines of two teachers' gradients: shared (2, P), experts (2, E, Q), active (2, E).

    `cos_experts` is the paper's I_l: mean over co-active experts, 0 where there is none.
    """
    both = active.all(0)
    cos = F.cosine_similarity(*experts, dim=1)  # (E,)
    return {"cos_shared": F.cosine_similarity(*shared, dim=0).item(),
            "cos_experts": cos[both].mean().item() if both.any() else 0.0,
            "cos_each": [c if b else None for c, b in zip(cos.tolist(), both.tolist(), strict=True)]}


def analyse(model, members: dict[str, teachers.Teacher], images: Tensor, picks: Tensor | None,
            batch_size: int) -> list[dict]:
    """Say per MoE block what each pair of teachers and of tasks shares: {"teachers": {"a + b": numbers}}.

    `coactive` and `jaccard` as in `overlap`; with teachers at hand also their `conflict`. Without experts
    (picks None) only the cosine of the teachers' gradients.
    """
    cfg, blocks = model.cfg, []
    gradients = teacher_gradients(model, members, images, batch_size) if len(members) > 1 else ()
    if picks is None and not gradients:
        return []
    if picks is None:
        pairs = [(i, j, f"{a} + {b}") for (i, a), (j, b) in combinations(enumerate(members), 2)]
        return [{"block": block, "tasks": {}, "teachers": {
            pair: {"cos_shared": F.cosine_similarity(*shared[[i, j]], dim=0).item()} for i, j, pair in pairs}}
            for block, (shared,) in zip(cfg.moe_blocks, gradients, strict=True)]
    for b, block in enumerate(cfg.moe_blocks):
        row = {"block": block, "teachers": {}, "tasks": {}}
        for kind, first in (("teachers", 0), ("tasks", len(cfg.teachers))):
            names = list(getattr(cfg, kind))
            active, coactive, jaccard = overlap(picks[b, first : first + len(names)], cfg.experts)
            for i, j in combinations(range(len(names)), 2):
                numbers = {"coactive": coactive[i, j].item(), "jaccard": jaccard[i, j].item()}
                if kind == "teachers" and gradients:
                    numbers |= conflict(*(g[[i, j]] for g in gradients[b]), active[[i, j]])
                row[kind][f"{names[i]} + {names[j]}"] = numbers
        blocks.append(row)
    return blocks


@torch.inference_mode()
def fidelity(model, members: dict[str, teachers.Teacher], dataset, device, batch_size: int) -> dict:
    """Compare the student's projected features with each teacher's: {teacher: 4 x numbers}.

    `cos_image` over the flattened map, as in the loss; `cos_patch` mean over patches; `smooth_l1`;
    `length`, the student's norm over the teacher's: a cosine of 1 does not ask for a length of 1.
    """
    keys = ("cos_image", "cos_patch", "smooth_l1", "length")
    sums = {name: torch.zeros(4, len(keys)) for name in members}
    for batch in progress(range(len(dataset)), batch_size, "imitation"):
        images = stack([dataset[i] for i in batch], "image").to(device)
        for i, (name, teacher) in enumerate(members.items()):
            maps = model.distill(images, torch.full((len(images),), i, device=device))[name]
            for level, pair in enumerate(zip(maps, teacher.features(images), strict=True)):
                x, y = training.same_grid(*pair)
                flat_x, flat_y = x.flatten(1), y.flatten(1)
                sums[name][level] += len(x) * torch.stack([
                    F.cosine_similarity(flat_x, flat_y).mean(), F.cosine_similarity(x, y).mean(),
                    F.smooth_l1_loss(x, y), (flat_x.norm(dim=1) / flat_y.norm(dim=1)).mean()]).cpu()
    means = {name: (total / len(dataset)).tolist() for name, total in sums.items()}
    return {name: [dict(zip(keys, row, strict=True)) for row in rows] for name, rows in means.items()}


class First:
    """The first `count` images of a dataset."""

    def __init__(self, dataset, count: int):
        self.dataset, self.count = dataset, min(count, len(dataset))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        return self.dataset[i]

    def __getattr__(self, name: str):
        return getattr(self.dataset, name)


def probe_student(model, members: dict[str, teachers.Teacher], source: str, dataset, device) -> dict:
    """Probe an untrained student, the student in each teacher's context, and the teachers.

    A probe keeps all its features in memory, so it gets 48k patches at most, of the probe split, else of
    train; `dataset` gives at most 256 images. All maps are brought to the student's grid. Returns
    {what: {task: value}}, {} without labels.
    """
    if not dataset.tasks:
        print(f"no linear probes: {source} has no labels")
        return {}
    try:
        known = data.open_data(source, "probe")
    except (ValueError, OSError):
        known = data.open_data(source, "train")
    patches = math.prod(known[0]["image"].shape[-2:]) // model.cfg.patch**2
    known, test = First(known, 48 * 1024 // patches), First(dataset, 256)
    print(f"linear probes: fitted to the first {len(known)} images of {getattr(known, 'split', 'train')}, "
          f"scored on the first {len(test)} of {len(dataset)}")
    torch.manual_seed(0)
    blank, names = prism.build(model.cfg).to(device).eval(), list(model.cfg.teachers)
    students = {"untrained student": (blank, names[0])} | {f"student as {n}": (model, n) for n in names}
    see = {row: lambda x, net=net, name=name: net.features(x, name) for row, (net, name) in students.items()}
    see |= {name: teacher.features for name, teacher in members.items()}

    def on_student_grid(features, images: Tensor) -> list[Tensor]:
        grid = [side // model.cfg.patch for side in images.shape[-2:]]
        return [F.interpolate(level, grid, mode="bilinear", align_corners=False).cpu()
                for level in features(images.to(device))]

    return probe_table({row: partial(on_student_grid, f) for row, f in see.items()}, known, test)


def study(args: "Args", stored: dict, model, dataset, source: str, device) -> tuple[dict, dict]:
    """Run --analysis, and the report on a student without heads; returns results and pictures by name."""
    members, found, pictures = load_members(stored, device), {}, {}
    if args.analysis:
        images = stack([dataset[i] for i in range(min(len(dataset), args.analysis_images))], "image")
        images = images.to(device)
        routed = hasattr(model, "route")
        picks = choose_experts(model, images, args.batch_size) if routed else None
        blocks = analyse(model, members, images, picks, args.batch_size)
        found["analysis"] = {"images": len(images), "blocks": blocks}
        print_analysis(blocks)
        shown = np.linspace(0, len(images) - 1, min(4, len(images))).astype(int).tolist()
        if routed:
            pictures["conflict"] = draw_conflict(blocks, model.cfg)
            pictures["experts"] = draw_experts(model, images[shown].cpu(), picks[:, :, shown, 1:, 0].cpu())
        if members:
            pictures["imitation"] = draw_imitation(model, members, images[shown])
    if not set(model.cfg.tasks) & set(dataset.tasks):
        found["imitation"] = fidelity(model, members, dataset, device, args.batch_size)
        print_fidelity(found["imitation"], model.cfg)
        found["probes"] = probe_student(model, members, source, dataset, device)
    return found, pictures


def print_analysis(blocks: list[dict]) -> None:
    """Print a line per block and pair of teachers, and the mean of the pairs of tasks."""
    keys = {"coactive": "co-active", "jaccard": "Jaccard", "cos_shared": "cos, shared stream",
            "cos_experts": "cos, experts (I_l)"}
    table = Table("MoE block", "contexts", *keys.values(), title=(
        "experts that two contexts share, overlap of their top-k sets, cosine of teachers' gradients"))
    for block in blocks:
        rows, tasks = dict(block["teachers"]), list(block["tasks"].values())
        if tasks:
            rows[f"mean of {len(tasks)} pairs of tasks"] = {
                key: float(np.mean([pair[key] for pair in tasks])) for key in tasks[0]}
        for pair, numbers in rows.items():
            cells = (f"{numbers[key]:.3f}" if key in numbers else "" for key in keys)
            table.add_row(str(block["block"]), pair, *cells)
    console.print(table)


def print_fidelity(levels: dict[str, list[dict]], cfg: prism.PrismConfig) -> None:
    """Print how near the student's projected features come to each teacher's, level by level."""
    table = Table("teacher", "after block", "cos per image", "cos per patch", "SmoothL1", "length",
                  title="projected features of the student beside the teachers'")
    for name, rows in levels.items():
        for block, row in zip(cfg.moe_blocks, rows, strict=True):
            table.add_row(name, str(block), *(f"{value:.3f}" for value in row.values()))
    if levels:
        console.print(table)


# ------------------------------------------------------------------------------------------------ cost


def count_macs(cfg: prism.PrismConfig, size: tuple[int, int], dense: bool = False) -> dict[str, int]:
    """Count the multiply-adds of `predict` for one image of size (H, W) pixels and all of cfg's tasks.

    What lies before the first router runs once, the rest once per task; dense: a `prism.Dense`.
    """
    D, T, blocks = cfg.dim, len(cfg.tasks), range(cfg.depth)
    patches = size[0] // cfg.patch * (size[1] // cfg.patch)
    N, moe = 1 + patches, () if dense else cfg.moe_blocks
    passes = [1 if dense or i <= cfg.moe_blocks[0] else T for i in blocks]
    inside = sum(passes[i] for i in moe)  # passes of gates and shared experts
    wide, narrow = (2 * N * D * int(D * r) for r in (cfg.mlp_ratio, cfg.expert_ratio))
    router = 2 * D * D + N * D * cfg.experts + (N * D * D if cfg.official else 0)
    return {
        "patch embedding": patches * 3 * cfg.patch**2 * D,
        "attention": sum(passes) * (4 * N * D * D + 2 * N * N * D),
        "anchors, MLPs": sum(passes) * wide,
        "gates, routers": inside * N * D + len(moe) * T * router,
        "shared experts": inside * narrow,
        "routed experts": len(moe) * T * cfg.top_k * narrow,
        "heads": heads_macs(cfg, size),
    }


def heads_macs(cfg: prism.PrismConfig, size: tuple[int, int]) -> int:
    """Count the heads' multiply-adds of one image: 3 x 3 taps on patches, then enlarging by two products."""
    D, h, w, tall, broad = cfg.dim, size[0] // cfg.patch, size[1] // cfg.patch, size[0] // 4, size[1] // 4
    fuse = 9 * h * w * D * D + 9 * tall * h * w * D + 3 * tall * broad * w * D  # taps, rows, columns
    return sum(h * w * D * D + fuse + tall * broad * D * C for C in cfg.tasks.values())


@torch.no_grad()
def macs_of(model, size: tuple[int, int]) -> int:
    """Count the multiply-adds of `predict` for one image of size (H, W) pixels by running it."""
    images = torch.rand(1, 3, *size, device=model.pos_embed.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.predict(images)
    return counter.get_total_flops() // 2


def heads_as_convolutions(cfg: prism.PrismConfig, size: tuple[int, int]) -> int:
    """Count the heads' multiply-adds as published counts do: convolving at a quarter of the pixels."""
    D, patches = cfg.dim, size[0] // cfg.patch * (size[1] // cfg.patch)
    quarter = size[0] // 4 * (size[1] // 4)
    return sum(patches * D * D + quarter * (9 * D * D + D * C) for C in cfg.tasks.values())


@torch.inference_mode()
def time_predictions(models: dict[str, nn.Module], images: Tensor, repeats: int = 3) -> dict[str, float]:
    """Return the median ms of `predict` on the images, and of a pass per task; bfloat16 on a GPU."""
    runs = {name: partial(model.predict, images) for name, model in models.items()}
    for name, model in models.items():
        runs[f"{name}, task by task"] = lambda m=model: [m.predict(images, [task]) for task in m.cfg.tasks]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        return prism.time_interleaved(runs, images.device, repeats)


def report_cost(args: "Args", device) -> None:
    """Print parameters, multiply-adds by part and latency beside a dense ViT; write cost.json."""
    stored = None if args.size else prism.read_checkpoint(args.ckpt)
    cfg = prism.config_from(stored["config"], args.ckpt) if stored else prism.SIZES[args.size]
    pascal = {task: known.channels or len(data.PASCAL_CLASSES) for task, known in data.TASKS.items()}
    cfg = replace(cfg, tasks=cfg.tasks or {k: v for k, v in pascal.items() if k != "depth"})
    given = args.image_size or ([n * cfg.patch for n in cfg.grid] if stored else [512])
    size = (given[0], given[-1])
    if any(side <= 0 or side % cfg.patch for side in size):
        raise ValueError(f"image size {size[0]} x {size[1]} is not a multiple of the patch size {cfg.patch}; "
                         "give two such sides")
    student = prism.build(cfg)
    if stored:
        prism.load_strict(student, stored["model"], args.ckpt, new=("heads", "task_embed", "mixers"))
    for serves_training_alone in ("projectors", "aligners"):
        getattr(student, serves_training_alone, {}).clear()
    ours, dense = {"prism": "PRISM", "sak": "SAK"}.get(cfg.student, cfg.student), replace(
        cfg, student="dense", without=(), teachers={})
    models = {ours: student, "dense ViT": prism.build(dense)}
    models = {name: model.to(device).eval() for name, model in models.items()}
    macs = {name: count_macs(m.cfg, size, dense=isinstance(m, prism.Dense))
            if type(m) in (prism.Prism, prism.Dense) and not m.cfg.without
            else {"all but heads": macs_of(m, size) - heads_macs(cfg, size), "heads": heads_macs(cfg, size)}
            for name, m in models.items()}
    count, result = 8 if device.type == "cuda" else 1, {}
    if args.compile:
        for model in models.values():
            model.compile_parts()
    one = time_predictions(models, torch.rand(1, 3, *size, device=device))
    many = one if count == 1 else time_predictions(models, torch.rand(count, 3, *size, device=device))
    for name, model in models.items():
        total, active = prism.count_parameters(model)
        result[name] = {"parameters, M": total / 1e6, "active per token, M": active / 1e6}
        result[name] |= {f"GMAC, {part}": n / 1e9 for part, n in macs[name].items()}
        published = sum(macs[name].values()) - macs[name]["heads"] + heads_as_convolutions(cfg, size)
        result[name] |= {"GMAC, total": sum(macs[name].values()) / 1e9,
                         "GMAC, heads as convolutions": published / 1e9, "ms, batch 1": one[name],
                         "ms, batch 1, task by task": one[f"{name}, task by task"],
                         f"images/s, batch {count}": 1000 * count / many[name]}
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"this machine's CPU, {torch.get_num_threads()} threads")
    print(f"{size[0]} x {size[1]} pixels, {len(cfg.tasks)} tasks: {' '.join(cfg.tasks)}; no projectors; "
          f"times: {machine}, {'bfloat16' if device.type == 'cuda' else 'float32'}, medians of 3")
    table = Table("one image", *(Column(name, justify="right") for name in (*result, "ratio")))
    for key, value in result[ours].items():
        base = result["dense ViT"].get(key)
        table.add_row(key, f"{value:.3f}", "" if base is None else f"{base:.3f}",
                      f"{value / base:.2f}" if base else "")
    console.print(table)
    facts = {"size": size, "tasks": cfg.tasks, "device": machine, "cost": result}
    folder = args.out_dir or args.ckpt.parent
    write_files(folder, {"cost.json": json.dumps(facts, indent=1)})
    print(f"wrote {folder / 'cost.json'}")


# --------------------------------------------------------------------------------------------- contest

SINGLE = "--student dense --stage recompose --no-distill"  # with --tasks: a network per task, Delta_m's base
CONTESTANTS = {  # name -> flags of train.py
    "prism": "", "sak": "--student sak", "dense": "--student dense", "wide": "--student wide",
    "moe": "--student moe", "no-distill": SINGLE, "no-anchor": "--without anchor",
    "no-shared": "--without shared", "no-film": "--without film", "no-context": "--without context",
    "gate-half": "--gate-start 0.5", "sak-one": "--student sak --every-teacher False",
    "dense-all": "--student dense --every-teacher True",
    "no-decorr": "--decorr-levels 0", "decorr-1": "--decorr-levels 1", "decorr-3": "--decorr-levels 3",
    "top-1": "--top-k 1", "top-3": "--top-k 3", "experts-4": "--experts 4", "experts-9": "--experts 9",
    "lite": "--expert-ratio 1", "only-clip-dino": "--teachers toy-clip toy-dino",
    "only-clip-sam": "--teachers toy-clip toy-sam", "only-dino-sam": "--teachers toy-dino toy-sam",
}
MAIN_FIVE = ("prism", "sak", "dense", "wide", "moe")


def train_and_score(folder: Path, flags: list[str], slot: int) -> dict:
    """Train and evaluate in processes of their own, or go on where that was interrupted; returns
    results.json with `train_s`. Raises OSError with the last line of what failed."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, results = folder / "flags.txt", folder / "results.json"
    if asked.exists() and asked.read_text() != " ".join(flags):
        raise OSError(f"{folder} holds a run with other flags ({asked.read_text()}); choose another "
                      "--out-dir")
    asked.write_text(" ".join(flags))
    here, gpus = Path(__file__).parent, torch.cuda.device_count()
    place = {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {"OMP_NUM_THREADS": "1"}
    for script, *given in () if results.exists() else (
            ("train.py", *flags, "--out-dir", folder),
            ("eval.py", "--ckpt", folder / "prism.pt", "--analysis")):
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run([sys.executable, here / script, *given], env=os.environ | place, stdout=log,
                                  stderr=subprocess.STDOUT)
        if done.returncode:
            last = (folder / "log.txt").read_text().strip().splitlines()[-1]
            raise OSError(f"{script} of {folder.name} failed: {last}")
    rows, seconds, last = (folder / "log.jsonl").read_text().splitlines(), 0.0, (None, 0)
    for row in map(json.loads, rows):
        steps = row["step"] - (last[1] if last[0] == row["stage"] else 0)
        seconds, last = seconds + steps * row["ms"] / 1000, (row["stage"], row["step"])
    return json.loads(results.read_text()) | {"train_s": seconds}


def contest(args: "Args", device) -> None:
    """Train contestants and single-task networks over seeds, side by side; write contest.{json,md,png}."""
    names, common = args.contest or MAIN_FIVE, shlex.split(args.train_args)
    if unknown := [name for name in names if name not in CONTESTANTS or names.count(name) > 1]:
        raise ValueError(f"unknown contestant {unknown[0]}, or named twice; known: {', '.join(CONTESTANTS)}")
    settings = tyro.cli(training.Args, args=common)
    stage = training.choose_recipe(settings, "recompose")
    tasks = training.choose_tasks(settings, training.open_train(settings, stage))  # renders the world
    teachers.Teachers(settings.teachers)  # raises the toys
    flags = {name: CONTESTANTS[name] for name in names}
    flags |= {f"only-{task}": f"{SINGLE} --tasks {task}" for task in tasks}
    folder = args.out_dir or Path("out/contest")
    jobs = {(name, seed): [*common, *shlex.split(flags[name]), "--seed", str(seed)]
            for seed in range(args.seeds) for name in flags}
    found: dict[tuple[str, int], dict] = {}
    with ThreadPoolExecutor(torch.cuda.device_count() or data.core_count()) as pool:
        waiting = {pool.submit(train_and_score, folder / f"{name}-{seed}", given, slot): (name, seed)
                   for slot, ((name, seed), given) in enumerate(jobs.items())}
        for done in as_completed(waiting):
            name, seed = waiting[done]
            if done.exception():
                pool.shutdown(cancel_futures=True)
                raise done.exception()
            found[name, seed] = done.result()
            scores = " ".join(f"{t} {v:.2f}" for t, v in found[name, seed]["headline"].items())
            print(f"{len(found)}/{len(jobs)} {name} seed {seed}: {scores}; trained in "
                  f"{found[name, seed]['train_s'] / 60:.1f} min", flush=True)
    report = contest_report(found, names, list(tasks), args.seeds)
    report["cost"] = contest_costs({name: folder / f"{name}-0" / "prism.pt" for name in names}, device)
    text = contest_text(report)
    files = {"contest.json": as_json(report), "contest.md": text, "contest.png": draw_contest(report)}
    write_files(folder, files)
    print(f"{text}\nwrote {', '.join(str(folder / name) for name in files)}")


def contest_report(found: dict, names: Sequence[str], tasks: list[str], seeds: int) -> dict:
    """Put together scores per seed, Delta_m over the same seed's single-task networks, differences from the
    first contestant, gradients' cosines and routing; found {(name, seed): results}."""
    base = [{t: found[f"only-{t}", seed]["headline"][t] for t in tasks} for seed in range(seeds)]
    rows = {}
    for name in names:
        scores = [found[name, seed]["headline"] for seed in range(seeds)]
        rows[name] = {t: [score[t] for score in scores] for t in tasks}
        rows[name]["delta_m"] = [delta_m(score, ref) for score, ref in zip(scores, base, strict=True)]
    minutes = {name: [found[name, seed]["train_s"] / 60 for seed in range(seeds)] for name in names}
    lead, signs = names[0], {t: -1 if data.TASKS[t].lower_is_better else 1 for t in tasks} | {"delta_m": 1}
    paired = {name: {t: interval(signs[t] * (np.array(rows[name][t]) - rows[lead][t])) for t in signs}
              for name in names[1:]}
    results = {name: [found[name, seed] for seed in range(seeds)] for name in names}
    return {"lead": lead, "single_task": {t: [b[t] for b in base] for t in tasks}, "scores": rows,
            "paired": paired, "minutes": minutes,
            "conflict": {name: mean_conflict(runs) for name, runs in results.items()},
            "routing": {name: routing_over_seeds(r) for name, r in results.items() if r[0]["routing"]}}


def interval(differences: np.ndarray) -> list[float]:
    """Return mean and half width of the 95 % interval (Student's t) of paired differences; one: nan."""
    n = len(differences)
    if n < 2:
        return [float(differences.mean()), math.nan]
    return [float(differences.mean()), float(stdtrit(n - 1, 0.975) * differences.std(ddof=1) / math.sqrt(n))]


def mean_conflict(runs: list[dict]) -> dict[str, list[float]]:
    """Return per seed the mean over blocks and pairs of teachers of the cosines of their gradients."""
    found: dict[str, list[float]] = {}
    for run in runs:
        blocks = run.get("analysis", {"blocks": []})["blocks"]
        pairs = [pair for block in blocks for pair in block["teachers"].values()]
        for key in ("cos_shared", "cos_experts"):
            if values := [pair[key] for pair in pairs if key in pair]:
                found.setdefault(key, []).append(float(np.mean(values)))
    return found


def routing_over_seeds(runs: list[dict]) -> dict:
    """Return NMI of teachers per block and seed, and how alike two seeds' teacher x expert tables are once
    the experts of one are matched to those of the other (Hungarian); `shifted`: with teachers mixed up."""
    tables = [[np.array(list(block["teachers"].values())) for block in run["routing"]] for run in runs]
    alike, shifted = [], []
    for a, b in combinations(tables, 2):
        for x, y in zip(a, b, strict=True):
            alike.append(affinity(x, y))
            shifted += [affinity(x, np.roll(y, k, 0)) for k in range(1, len(y))]
    return {"nmi_teachers": [[block["nmi_teachers"] for block in run["routing"]] for run in runs],
            "alike": alike, "shifted": shifted}


def affinity(x: np.ndarray, y: np.ndarray) -> float:
    """Match the experts of two tables (contexts, E) one to one; returns the mean cosine of the pairs."""
    x, y = (t / np.maximum(np.linalg.norm(t, axis=0), 1e-12) for t in (x, y))
    cosines = x.T @ y  # (E, E)
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


def contest_costs(checkpoints: dict[str, Path], device) -> dict[str, dict[str, float]]:
    """Count and time every contestant's `predict`, all taking turns in this process."""
    models = {name: prism.load(path, device) for name, path in checkpoints.items()}
    costs = {}
    for name, model in models.items():
        size = tuple(n * model.cfg.patch for n in model.cfg.grid)
        for serves_training_alone in ("projectors", "aligners"):
            getattr(model, serves_training_alone, {}).clear()
        total, active = prism.count_parameters(model)
        costs[name] = {"parameters": total / 1e6, "active": active / 1e6, "gmac": macs_of(model, size) / 1e9}
    for name, ms in time_predictions(models, torch.rand(1, 3, *size, device=device), repeats=15).items():
        if name in costs:
            costs[name]["ms"] = ms
    return costs


def contest_text(report: dict) -> str:
    """Write the report as tables in markdown."""
    def line(*cells) -> str:
        return "| " + " | ".join(cells) + " |"

    def spreads(columns: dict[str, list[float]]) -> list[str]:
        return [spread(values, 3 if name == "depth" else 2) for name, values in columns.items()]

    def spread(values: list[float], digits: int = 2) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.{digits}f}"

    tasks, cost = list(report["single_task"]), report["cost"]
    text = [line("", *tasks, "Delta_m %", "M", "active M", "GMAC", "ms", "training, min"),
            line(*["---"] * (len(tasks) + 7)),
            line("single-task", *spreads(report["single_task"]), "0", *[""] * 5)]
    for name, row in report["scores"].items():
        c, minutes = cost[name], np.mean(report["minutes"][name])
        text.append(line(name, *spreads(row), f"{c['parameters']:.2f}",
                         f"{c['active']:.2f}", f"{c['gmac']:.3f}", f"{c['ms']:.1f}", f"{minutes:.1f}"))
    text += ["", f"Better than {report['lead']} by (mean ± half the 95 % interval, paired by seed):", "",
             line("", *tasks, "Delta_m"), line(*["---"] * (len(tasks) + 2))]
    text += [line(name, *(f"{mean:+.2f} ± {half:.2f}" for mean, half in row.values()))
             for name, row in report["paired"].items()]
    text += ["", line("", "cos, shared weights", "cos, co-active experts"), line("---", "---", "---")]
    text += [line(name, *(spread(c[key]) if key in c else "" for key in ("cos_shared", "cos_experts")))
             for name, c in report["conflict"].items()]
    for name, r in report["routing"].items():
        nmi = " / ".join(" ".join(f"{v:.2f}" for v in blocks) for blocks in r["nmi_teachers"])
        alike = f"; tables of two seeds, experts matched: {np.mean(r['alike']):.2f}, with teachers mixed up "\
                f"{np.mean(r['shifted']):.2f}" if r["alike"] else ""
        text += ["", f"{name}: NMI teacher-expert per block, seeds: {nmi}{alike}"]
    return "\n".join(text) + "\n"


# -------------------------------------------------------------------------------------------- pictures

INK, FAINT = (30, 32, 38), (115, 119, 128)  # text, quiet text
DEEP, RED = (24, 78, 140), (178, 48, 32)  # largest share, and below zero


def write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, size=14, ink=INK, anchor="mm"):
    pen.text((x, y), text, ink, ImageFont.load_default(size=size), anchor)


def tile(rgb: np.ndarray, side: int) -> Image.Image:
    """Fit rgb (H, W, 3) uint8 into a light square of `side` pixels; label colours do not mix."""
    canvas, picture = Image.new("RGB", (side, side), (236, 237, 240)), Image.fromarray(rgb)
    sizes = [max(1, round(side / max(picture.size) * n)) for n in picture.size]
    canvas.paste(picture.resize(sizes, Image.Resampling.NEAREST), [(side - n) // 2 for n in sizes])
    return canvas


def draw_predictions(model, dataset, device, tasks: Sequence[str], scenes: int = 6) -> Image.Image:
    """Draw scenes spread over the dataset: the image, then prediction and truth of every task."""
    side, gap, top = 128, 14, 58
    indices = np.linspace(0, len(dataset) - 1, min(scenes, len(dataset))).astype(int).tolist()
    images = stack([dataset[i] for i in indices], "image").to(device)
    maps = predict_maps(model, images, tasks)
    lefts = [2 * gap + side + k * (2 * side + 2 + gap) for k in range(len(tasks))]
    bottom, width = top + len(indices) * (side + 4), lefts[-1] + 2 * side + 2 + gap
    legends = [draw_legend(t, dict(enumerate(dataset.classes[t])), width)
               for t in tasks if t in dataset.classes]
    canvas = Image.new("RGB", (width, bottom + sum(x.height for x in legends) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    write(pen, gap + side / 2, top - 15, "image")
    for task, x in zip(tasks, lefts, strict=True):
        write(pen, x + side + 1, top - 38, task, size=17)
        write(pen, x + side / 2, top - 15, "prediction", ink=FAINT)
        write(pen, x + side + 2 + side / 2, top - 15, "truth", ink=FAINT)
    for row, i in enumerate(indices):
        truth, y = dataset.read(i), top + row * (side + 4)
        canvas.paste(tile(truth["image"], side), (gap, y))
        for task, x in zip(tasks, lefts, strict=True):
            pair = unpad(maps[task][row], truth["image"].shape), truth[task]
            drawn = data.colourise(task, np.concatenate(pair, 1))  # one depth ramp
            for n, half in enumerate(np.split(drawn, 2, 1)):
                canvas.paste(tile(half, side), (x + n * (side + 2), y))
    for legend in legends:
        canvas.paste(legend, (0, bottom))
        bottom += legend.height
    return canvas


def draw_legend(task: str, names: dict[int, str], width: int) -> Image.Image:
    """Draw a swatch and a name per class id, wrapped to `width` pixels."""
    canvas = Image.new("RGB", (width, 30 + 22 * len(names)), "white")
    pen, x, y = ImageDraw.Draw(canvas), 120, 18
    write(pen, 14, y, task, anchor="lm")
    for k, name in names.items():
        step = 40 + ImageFont.load_default(size=14).getlength(name)
        if x + step > width:
            x, y = 120, y + 22
        colour = data.colourise(task, np.full((1, 1), k, np.uint8))[0, 0]
        pen.rectangle((x, y - 7, x + 14, y + 7), tuple(colour.tolist()), FAINT)
        write(pen, x + 20, y, name, anchor="lm")
        x += step
    return canvas.crop((0, 0, width, y + 10))


def draw_routing(blocks: list[dict]) -> Image.Image:
    """Draw per MoE block the shares of teacher x expert and task x expert."""
    kinds = [kind for kind in ("teachers", "tasks") if blocks[0][kind]]
    largest = max(max(row) for block in blocks for kind in kinds for row in block[kind].values())
    tables = [[draw_shares(block[kind], largest) for kind in kinds] for block in blocks]
    width = max(600, 20 + sum(table.width + 20 for table in tables[0]))
    step = 64 + max(table.height for table in tables[0])
    canvas = Image.new("RGB", (width, 40 + step * len(blocks)), "white")
    pen = ImageDraw.Draw(canvas)
    write(pen, 20, 22, "percent of the top-k slots that each expert gets; rows sum to 100",
          ink=FAINT, anchor="lm")
    for k, (block, line) in enumerate(zip(blocks, tables, strict=True)):
        notes = ",  ".join(f"{kind} {block['nmi_' + kind]:.3f}" for kind in kinds)
        title = f"block {block['block']}     lambda {block['lambda']:.3f}     NMI  {notes}"
        write(pen, 20, 62 + k * step, title, size=18, anchor="lm")
        x = 20
        for table in line:
            canvas.paste(table, (x, 82 + k * step))
            x += table.width + 20
    return canvas


def draw_shares(table: dict[str, list[float | None]], largest: float,
                columns: Sequence[str] = ()) -> Image.Image:
    """Draw one table context x expert, percent on colours; `largest` gets the deepest colour, blue or,
    below zero, red. None is left empty."""
    columns = columns or [f"e{e}" for e in range(len(next(iter(table.values()))))]
    font = ImageFont.load_default(size=14)
    wide, high = max(42, *(10 + round(font.getlength(name)) for name in columns)), 26
    left = max(115, *(16 + round(font.getlength(name)) for name in table))
    canvas = Image.new("RGB", (left + len(columns) * wide, (len(table) + 1) * high), "white")
    pen = ImageDraw.Draw(canvas)
    for e, name in enumerate(columns):
        write(pen, left + (e + 0.5) * wide, high / 2, name, ink=FAINT)
    for row, (name, values) in enumerate(table.items(), start=1):
        write(pen, left - 8, (row + 0.5) * high, name, anchor="rm")
        for e, share in enumerate(values):
            if share is None:
                continue
            x, y, strength = left + e * wide, row * high, min(1, abs(share) / largest)
            colour = tuple(round(248 + strength * (deep - 248)) for deep in (DEEP if share >= 0 else RED))
            pen.rectangle((x, y, x + wide - 2, y + high - 2), colour)
            write(pen, x + wide / 2 - 1, y + high / 2 - 1, f"{100 * share:z.0f}",
                  ink="white" if strength > 0.5 else INK)
    return canvas


def draw_conflict(blocks: list[dict], cfg: prism.PrismConfig) -> Image.Image:
    """Draw per MoE block the cosines of teachers' gradients, then what pairs of contexts share."""
    lines, taught = [], any("cos_each" in pair for pair in blocks[0]["teachers"].values())
    for block in blocks:
        line = []
        if taught:
            line.append(draw_shares(
                {pair: [n["cos_shared"], n["cos_experts"], *n["cos_each"]] for pair, n in
                 block["teachers"].items()}, 1, ["shared", "I_l", *(f"e{e}" for e in range(cfg.experts))]))
        for kind in (kind for kind in ("teachers", "tasks") if block[kind]):
            names = list(getattr(cfg, kind))
            rows = {name: [None] * len(names) for name in names}
            for (i, j), n in zip(combinations(range(len(names)), 2), block[kind].values(), strict=True):
                rows[names[i]][j], rows[names[j]][i] = n["jaccard"], n["coactive"]
            rows = {f"{i}  {name}": rows[name] for i, name in enumerate(names, 1)}
            line.append(draw_shares(rows, 1, [str(i) for i in range(1, len(names) + 1)]))
        lines.append(line)
    width = max(900, 20 + sum(table.width + 20 for table in lines[0]))
    step = 54 + max((table.height for table in lines[0]), default=0)
    canvas = Image.new("RGB", (width, 76 + step * len(blocks)), "white")
    pen = ImageDraw.Draw(canvas)
    notes = ("pairs of teachers: 100 x cosine of gradients on the shared stream, mean of co-active experts "
             "(I_l), each expert; empty: not co-active",
             "squares: above the diagonal the percent that two contexts' top-k sets overlap (Jaccard), "
             "below it the percent of experts that both use")
    for k, note in enumerate(notes if taught else notes[1:]):
        write(pen, 20, 22 + 22 * k, note, ink=FAINT, anchor="lm")
    for k, (block, line) in enumerate(zip(blocks, lines, strict=True)):
        write(pen, 20, 80 + k * step, f"block {block['block']}", size=18, anchor="lm")
        x = 20
        for table in line:
            canvas.paste(table, (x, 96 + k * step))
            x += table.width + 20
    return canvas


def expert_colours(experts: int) -> list[tuple[int, int, int]]:
    """Return a colour per expert: hues around the circle, bright and dark in turn."""
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(e / experts, 0.85, (0.95, 0.62)[e % 2]))
            for e in range(experts)]


def as_pixels(image: Tensor) -> np.ndarray:
    """Turn RGB in [0, 1] (3, H, W) into uint8 (H, W, 3)."""
    return (255 * image).round().byte().permute(1, 2, 0).numpy()


def draw_experts(model, images: Tensor, best: Tensor) -> Image.Image:
    """Draw every patch's first expert over the images, a row per context, a column per MoE block.

    images (B, 3, H, W) RGB in [0, 1]; best (blocks, contexts, B, patches) expert ids.
    """
    cfg, side, gap, left = model.cfg, 108, 14, 125
    palette = np.array(expert_colours(cfg.experts), np.uint8)
    group = len(cfg.moe_blocks) * (side + 2) + gap
    canvas = Image.new("RGB", (left + group * len(images), 240 + (side + 2) * best.shape[1]), "white")
    pen = ImageDraw.Draw(canvas)
    write(pen, gap, 20, "the expert with the largest weight in each patch", ink=FAINT, anchor="lm")
    for e, colour in enumerate(palette):
        x, y = gap + 60 * (e % 18), 38 + 22 * (e // 18)
        pen.rectangle((x, y, x + 14, y + 14), tuple(colour.tolist()))
        write(pen, x + 20, y + 7, f"e{e}", anchor="lm")
    for c, context in enumerate(model.contexts):
        write(pen, left - 10, 222 + (c + 0.5) * (side + 2), context, anchor="rm")
    for k, image in enumerate(images):
        photo, x = as_pixels(image), left + k * group
        canvas.paste(tile(photo, side), (x, 82))
        grey = photo.mean(2, keepdims=True)  # (H, W, 1)
        for b, block in enumerate(cfg.moe_blocks):
            write(pen, x + (b + 0.5) * (side + 2), 208, f"block {block}", ink=FAINT)
            for c in range(len(model.contexts)):
                ids = best[b, c, k].reshape(photo.shape[0] // cfg.patch, -1).numpy()
                colours = palette[ids].repeat(cfg.patch, 0).repeat(cfg.patch, 1)  # (H, W, 3)
                mixed = (0.35 * grey + 0.65 * colours).astype(np.uint8)
                canvas.paste(tile(mixed, side), (x + b * (side + 2), 222 + c * (side + 2)))
    return canvas


@torch.inference_mode()
def draw_imitation(model, members: dict[str, teachers.Teacher], images: Tensor) -> Image.Image:
    """Draw each level of each teacher and the student's projection to it, in the teacher's colours."""
    cfg, side, gap, left, top = model.cfg, 112, 16, 145, 76
    wide = 2 * side + 2 + gap
    canvas = Image.new("RGB", (left + side + gap + 4 * wide,
                               top + (side + 26) * len(images) * len(members)), "white")
    pen = ImageDraw.Draw(canvas)
    write(pen, gap, 18, "red, green, blue: three main components of the teacher's features; the student's "
          "at equal length in the same components; cosine over the image", ink=FAINT, anchor="lm")
    for level, block in enumerate(cfg.moe_blocks):
        x = left + side + gap + level * wide
        write(pen, x + side, 42, f"level {level + 1}, student's block {block}")
        for n, who in enumerate(("teacher", "student")):
            write(pen, x + n * (side + 2) + side / 2, 62, who, ink=FAINT)
    y = top
    for i, (name, teacher) in enumerate(members.items()):
        maps = model.distill(images, torch.full((len(images),), i, device=images.device))[name]
        pairs = list(zip(teacher.features(images), maps, strict=True))
        for k, image in enumerate(images.cpu()):
            write(pen, left - 10, y + side / 2, name, anchor="rm")
            canvas.paste(tile(as_pixels(image), side), (left, y))
            for level, pair in enumerate(pairs):
                x = left + side + gap + level * wide
                taught, own = (m[k].cpu().float() for m in pair)
                own = own * taught.norm() / own.norm()  # the loss is nearly blind to length, see `fidelity`
                for n, m in enumerate((taught, own)):
                    canvas.paste(tile(teachers.pca_picture(m, taught)[0], side), (x + n * (side + 2), y))
                a, b = training.same_grid(taught[None], own[None])
                cos = F.cosine_similarity(a.flatten(1), b.flatten(1)).item()
                write(pen, x + side, y + side + 11, f"cosine {cos:.3f}", size=13)
            y += side + 26
    return canvas


# -------------------------------------------------------------------------------------- anyone's photos

SHOWN = 320  # longer side of a photo in its panel, pixels
CLASS_NAMES = {  # a checkpoint says how many classes it has; these are the names of as many
    "semseg": {len(names): names for names in (data.CLASSES, data.PASCAL_CLASSES, data.NYUD_CLASSES)},
    "human_parts": {len(data.PARTS): data.PARTS},
}


@torch.inference_mode()
def solve_photo(model, photo: np.ndarray, tasks: Sequence[str], side: int, shown: tuple[int, int]):
    """Predict the final maps of a photo (H, W, 3) uint8 at the size `shown` (h, w).

    The student sees what scoring would show it: the photo at its own size or shrunk to the shorter
    side `side`, never enlarged, padded to whole patches and at least to the student's own size.
    Returns {task: (h, w [, 3])} and the size seen, (h, w).
    """
    scale, cfg = min(1, side / min(photo.shape[:2])), model.cfg
    seen = [max(1, round(scale * n)) for n in photo.shape[:2]]
    small = np.array(Image.fromarray(photo).resize(seen[::-1], Image.Resampling.LANCZOS))
    padded = tuple(cfg.patch * max(math.ceil(n / cfg.patch), g) for n, g in zip(seen, cfg.grid, strict=True))
    image = data.to_tensors({"image": small}, padded)["image"][None]  # (1, 3, H, W)
    maps = {}
    for task, raw in model.predict(image.to(model.mean.device), list(tasks)).items():
        raw = unpad(rearrange(raw.float(), "1 c h w -> h w c"), seen)
        raw = rearrange(raw, "h w c -> 1 c h w")
        raw = F.interpolate(raw, shown, mode="bilinear", align_corners=False, antialias=True)
        maps[task] = final_map(task, raw)[0]
    return maps, seen


def draw_photo(photo: np.ndarray, maps: dict[str, np.ndarray], seen: Sequence[int],
               channels: dict[str, int]) -> Image.Image:
    """Draw a photo and every task's map of one size, (h, w, 3) and (h, w [, 3]), with what colours mean."""
    (h, w), gap, top = photo.shape[:2], 14, 52
    notes = {"photo": f"seen at {seen[1]} x {seen[0]} pixels"}
    notes |= dict.fromkeys(("edge", "sal"), "probability: white is 1")
    wide, cells = max(w, 190), 1 + len(maps)
    columns = max(2, math.ceil(cells / 2)) if w >= h else cells
    width, rows = gap + columns * (wide + gap), math.ceil(cells / columns)
    keys = [draw_key(task, array, channels[task], width) for task, array in maps.items()
            if task not in ("edge", "sal")]
    bottom = rows * (top + h) + gap
    canvas = Image.new("RGB", (width, bottom + sum(key.height for key in keys) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (title, array) in enumerate({"photo": photo, **maps}.items()):
        x, y = gap + k % columns * (wide + gap), k // columns * (top + h) + top
        drawn = array if title == "photo" else data.colourise(title, array)
        write(pen, x + wide / 2, y - 35, title, size=17)
        write(pen, x + wide / 2, y - 14, notes.get(title, ""), ink=FAINT)
        canvas.paste(Image.fromarray(drawn), (x + (wide - w) // 2, y))
    for key in keys:
        canvas.paste(key, (0, bottom))
        bottom += key.height
    return canvas


def draw_contest(report: dict) -> Image.Image:
    """Draw a panel per task and for Delta_m: a dot per seed, a bar at the mean, better to the right."""
    scores, base = report["scores"], report["single_task"]
    panels, rows = [*base, "delta_m"], list(scores)
    wide, step, left = 190, 30, 130
    canvas = Image.new("RGB", (left + wide * len(panels), 90 + step * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, name in enumerate(rows):
        write(pen, left - 14, 70 + step * k, name, anchor="rm")
    for p, task in enumerate(panels):
        lower = task in data.TASKS and data.TASKS[task].lower_is_better
        every = [v for name in rows for v in scores[name][task]] + base.get(task, [0.0])
        worst, best = (max(every), min(every)) if lower else (min(every), max(every))
        scale = (wide - 40) / ((best - worst) or 1)
        x0, bottom = left + wide * p + 10, 56 + step * len(rows)
        write(pen, x0 + wide / 2 - 20, 18, task)
        write(pen, x0, bottom + 14, f"{worst:.4g}", size=11, ink=FAINT, anchor="lm")
        write(pen, x0 + wide - 40, bottom + 14, f"{best:.4g}", size=11, ink=FAINT, anchor="rm")
        single = x0 + (np.mean(base.get(task, [0.0])) - worst) * scale
        pen.line((single, 40, single, bottom), fill=(200, 120, 60))
        for k, name in enumerate(rows):
            y, xs = 70 + step * k, [x0 + (v - worst) * scale for v in scores[name][task]]
            pen.line((x0, y, x0 + wide - 40, y), fill=(232, 232, 232))
            for x in xs:
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline=(70, 110, 180), width=2)
            pen.line((np.mean(xs), y - 9, np.mean(xs), y + 9), fill=INK, width=2)
    note = "circles: seeds; bar: their mean; orange: mean of single-task networks; better is to the right"
    write(pen, left, 84 + step * len(rows), note, size=11, ink=FAINT, anchor="lm")
    return canvas


def draw_key(task: str, array: np.ndarray, channels: int, width: int) -> Image.Image:
    """Draw what a map's colours mean: its classes by area, its metres, or directions as a ball."""
    if task in CLASS_NAMES:
        names = CLASS_NAMES[task].get(channels, range(channels))
        ids, areas = np.unique(array, return_counts=True)
        order = ids[np.argsort(-areas, kind="stable")].tolist()
        return draw_legend(task, {k: str(names[k]) for k in order}, width)
    canvas = Image.new("RGB", (width, 64 if task == "normals" else 36), "white")
    pen, middle = ImageDraw.Draw(canvas), canvas.height // 2
    write(pen, 14, middle, task, anchor="lm")
    if task == "depth":
        near, far = data.known_range(array)
        ramp = data.colourise(task, np.tile(np.linspace(near, far, 140), (15, 1)), (near, far))
        write(pen, 120, middle, f"{near:.2f} m", anchor="lm")
        canvas.paste(Image.fromarray(ramp), (180, middle - 7))
        write(pen, 330, middle, f"{far:.2f} m", anchor="lm")
        return canvas
    x, y = np.meshgrid(np.linspace(-1, 1, 56), np.linspace(1, -1, 56))
    drawn = data.colourise(task, np.stack([x, y, np.sqrt(np.maximum(1 - x**2 - y**2, 0))], -1))
    drawn[x**2 + y**2 > 1] = 255
    canvas.paste(Image.fromarray(drawn), (120, middle - 28))
    write(pen, 190, middle, "the colours of a ball", ink=FAINT, anchor="lm")
    return canvas


# ------------------------------------------------------------------------------------------------ main


@dataclass
class Args:
    """Score a checkpoint, print the numbers, draw what it predicts and how it routes."""

    ckpt: Path = Path("out/prism.pt")  # checkpoint to score
    data: str | None = None  # as train.py's (default: what it was trained on)
    split: str = "val"  # split to score (InvPT's PASCAL numbers: test_new)
    tasks: tuple[str, ...] = ()  # tasks to score (default: all with a head and labels)
    protocol: Literal["auto", "sak", "invpt", "simple"] = "auto"  # of boundaries (default: the data's own)
    exhaustive: bool = False  # count boundaries at every threshold, not only near the best
    batch_size: int = 32  # images per batch
    device: str | None = None  # default: cuda if there is one, else cpu
    out_dir: Path | None = None  # results.json and pictures (default: the checkpoint's folder)
    reference: Path | None = None  # JSON {task: value} or a results.json; prints Delta_m against it
    image: tuple[Path, ...] = ()  # photos, or folders of them: draw every task, score nothing
    photo_side: int | None = None  # shrink photos to this shorter side, pixels (default: the student's)
    save_predictions: Path | None = None  # folder for a file per image and task, while scoring
    predictions: Path | None = None  # score the files of this folder, without a checkpoint
    analysis: bool = False  # also measure and draw conflict of teachers, experts of patches, imitation
    analysis_images: int = 64  # how many of the split's images --analysis uses
    cost: bool = False  # instead: parameters, multiply-adds and latency, beside a dense ViT
    size: Literal["toy", "small", "base", "large"] | None = None  # --cost without a checkpoint
    image_size: tuple[int, ...] | None = None  # of --cost: side, or height and width, pixels
    compile: bool = False  # of --cost: torch.compile blocks and heads
    contest: tuple[str, ...] | None = None  # instead: train and compare students; alone: the main five
    seeds: int = 3  # of --contest
    train_args: str = ""  # of --contest: flags for every train.py: --train-args="--size small"
    debug: bool = False  # full traceback on errors


def choose_tasks(asked: Sequence[str], heads: dict[str, int], dataset) -> list[str]:
    """Return the tasks to score. Raises ValueError where one has no head or no fitting labels."""
    able = [task for task in heads if task in dataset.tasks]
    if unknown := [task for task in asked if task not in able]:
        known = ", ".join(able) or "no task (stage 1): run train.py --stage recompose"
        raise ValueError(f"cannot score {', '.join(unknown)}; checkpoint and data can score {known}")
    tasks = [task for task in able if not asked or task in asked]
    for task in tasks:
        if heads[task] != dataset.tasks[task]:
            raise ValueError(f"{task} has {heads[task]} channels, the data {dataset.tasks[task]}; "
                             "name data with the classes of training with --data")
    return tasks


def read_reference(path: Path | None, tasks: Sequence[str]) -> dict[str, float]:
    """Read {task: value}, or the `headline` of a results.json of ours; {} without a path."""
    if path is None:
        return {}
    try:
        content = json.loads(data.read_bytes(path).decode())
        reference = content.get("headline", content)
        if odd := [x for x in reference.values() if type(x) not in (int, float) or not 0 < x < 1e9]:
            raise ValueError(f"{odd[0]!r:.60}, not above 0")
        reference = {task: float(x) for task, x in reference.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"reference {path} is not an object of task: number ({error}); write JSON "
                         'such as {"semseg": 80.25}') from error
    try:
        delta_m(dict.fromkeys(tasks, 1.0), reference)  # complains now, not after the evaluation
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return reference


def write_files(folder: Path, files: dict[str, Image.Image | np.ndarray | str]) -> None:
    """Write all pictures, arrays and texts or none: temporary ones first, then renames."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".eval-", dir=folder) as temporary:
            for name, content in files.items():
                if isinstance(content, str):
                    Path(temporary, name).write_text(content)
                elif isinstance(content, np.ndarray):
                    np.save(Path(temporary, name), content)
                else:
                    content.save(Path(temporary, name))
            for name in files:
                os.replace(Path(temporary, name), folder / name)
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {prism.one_line(error)}; free space or choose "
                      "another folder") from error


def print_tables(metrics: dict[str, dict], blocks: list[dict], protocol: str) -> None:
    """Print every number with unit, direction and protocol, then lambda and NMI per block."""
    if metrics:
        value = Column("value", justify="right")
        table = Table("task", "metric", value, "unit", "better is", "protocol")
        for task, numbers in metrics.items():
            for key in (key for key in numbers if key in COLUMNS):
                value = f"{numbers[key]:.{4 if key == 'rmse' else 2}f}"
                table.add_row(task, key, value, *COLUMNS[key][:2], protocol_of(task, key, protocol),
                              style="bold" if key == data.TASKS[task].metric else None)
        console.print(table)
    if not blocks:
        return
    table = Table("MoE block", "lambda", "NMI teachers", "NMI tasks")
    for block in blocks:
        numbers = (f"{block[key]:.3f}" for key in ("lambda", "nmi_teachers", "nmi_tasks"))
        table.add_row(str(block["block"]), *numbers)
    console.print(table)


def summary(args: Args, dataset, metrics: dict[str, dict], reference: dict[str, float],
            protocol: str) -> dict:
    """Put the numbers together for results.json; prints Delta_m if there is a reference."""
    results = {
        "split": args.split, "images": len(dataset), "classes": dataset.classes,
        "headline": {task: headline(task, metrics[task]) for task in metrics},
        "protocol": {task: protocol_of(task, data.TASKS[task].metric, protocol) for task in metrics},
        "metrics": metrics,
    }
    if reference:
        results |= {"reference": reference, "delta_m": delta_m(metrics, reference)}
        print(f"Delta_m {results['delta_m']:+.2f} % over {args.reference} ({', '.join(reference)})")
    return results


def as_json(results: dict) -> str:
    text = json.dumps(results, default=np.ndarray.tolist)
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)  # JSON knows no nan


def score_files(args: Args) -> None:
    """Score the task folders of --predictions that the data have labels for; no checkpoint."""
    if args.data is None:
        raise ValueError("predictions have no labels of their own; name the data with --data")
    dataset = data.open_data(args.data, args.split)
    there = {task: n for task, n in dataset.tasks.items() if (args.predictions / task).is_dir()}
    tasks = [task for task in there if not args.tasks or task in args.tasks]
    if not tasks or set(args.tasks) - set(there):
        raise ValueError(f"{args.predictions} has folders for {', '.join(there) or 'no task'}; the data "
                         f"can score {', '.join(dataset.tasks)}: one folder each, of that name")
    reference = read_reference(args.reference, tasks)
    out_dir = args.out_dir or args.predictions
    write_files(out_dir, {})
    print(f"{args.predictions}: {', '.join(tasks)}; {args.data}, {args.split}, {len(dataset)} images")
    protocol = choose_protocol(args, dataset)
    metrics = evaluate_files(args.predictions, dataset, tasks, protocol=protocol, exhaustive=args.exhaustive)
    print_tables(metrics, [], protocol)
    results = {"predictions": args.predictions.name}
    results |= summary(args, dataset, metrics, reference, protocol)
    write_files(out_dir, {"results.json": as_json(results)})
    print(f"wrote {out_dir / 'results.json'}")


def list_photos(given: Sequence[Path]) -> dict[str, Path]:
    """Name the panel of each photo, of folders each image below them: {file name: path}."""
    photos = {}
    for path in given:
        below = [os.fsdecode(name) for name in data.list_images(path)] if path.is_dir() else [""]
        below = [name for name in below if not name.endswith("_tasks.png")]  # panels of an earlier run
        if not below:
            raise ValueError(f"{path} holds no images; known endings are {' '.join(data.SUFFIXES)}")
        for photo in (path / name for name in below):
            names = (photo.stem + (f"-{k}" if k > 1 else "") for k in itertools.count(1))
            name = next(x for name in names if (x := f"{name}_tasks.png") not in photos)
            photos[name] = photo
    return photos


def draw_photos(args: Args, device) -> None:
    """Write a panel per photo of --image; those that cannot be read are named, the others drawn."""
    photos, failed, out_dir = list_photos(args.image), [], args.out_dir or args.ckpt.parent
    model = prism.load(args.ckpt, device)
    tasks = choose_tasks(args.tasks, model.cfg.tasks, model.cfg)
    side = min(model.cfg.grid) * model.cfg.patch if args.photo_side is None else args.photo_side
    if not tasks or side < 1:
        raise ValueError(f"cannot draw {len(tasks)} tasks of photos {side} pixels wide; take a student "
                         "with task heads (train.py --stage recompose), --photo-side 1 or more")
    for name, path in data.track(photos.items(), "photos", len(photos)):
        try:
            photo = data.read_photo(path, max(SHOWN, 4 * side))
        except (ValueError, OSError) as error:
            failed.append(data.printable(str(error)))
            continue
        shown = tuple(max(1, round(SHOWN / max(photo.shape[:2]) * n)) for n in photo.shape[:2])
        maps, seen = solve_photo(model, photo, tasks, side, shown)
        fitted = np.array(Image.fromarray(photo).resize(shown[::-1], Image.Resampling.LANCZOS))
        write_files(out_dir, {name: draw_photo(fitted, maps, seen, model.cfg.tasks)})
        print(data.printable(f"{out_dir / name}: {path}, seen at {seen[1]} x {seen[0]} pixels"), flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(photos)} photos cannot be read: {'; '.join(failed)}")


def score_checkpoint(args: Args) -> None:
    """Check everything cheap, score, print, then write all files at once.

    Several processes share the scoring; all the rest is the first one's, and no other waits for it.
    """
    stored = prism.read_checkpoint(args.ckpt)
    source = args.data or stored.get("provenance", {}).get("data")
    if not isinstance(source, str):
        raise ValueError(f"{args.ckpt} does not say what it was trained on; name it with --data")
    cfg, options = prism.config_from(stored["config"], args.ckpt), {}
    if source.partition(":")[0] in data.UNLABELLED:  # images of all sizes are cut to the student's
        options["size"] = tuple(n * cfg.patch for n in cfg.grid)
    rt = training.start_runtime(args.device)
    dataset = training.first_rank_first(rt, lambda: data.open_data(source, args.split, **options))
    tasks = choose_tasks(args.tasks, cfg.tasks, dataset)
    reference = read_reference(args.reference, tasks)
    out_dir = args.out_dir or args.ckpt.parent
    for folder in (out_dir, args.save_predictions or out_dir):
        write_files(folder, {})  # a folder that cannot be written fails here
    device, model = rt.device, prism.load(args.ckpt, rt.device)
    if rt.rank == 0:
        print(f"{args.ckpt}: step {stored.get('step', 'not recorded')}; {source}, {args.split}, "
              f"{len(dataset)} images; {rt.world_size} x {device}")

    protocol, metrics = choose_protocol(args, dataset), {}
    if tasks:
        metrics = evaluate(model, dataset, device, args.batch_size, tasks, rt.rank, rt.world_size,
                           protocol=protocol, exhaustive=args.exhaustive, save=args.save_predictions)
    if rt.world_size > 1:
        dist.destroy_process_group()
    if rt.rank:
        return
    if not tasks:
        print(f"{args.ckpt} has no task heads (stage 1): no scores; next: train.py --stage recompose")
    blocks = routing(model, dataset, device, args.batch_size)
    print_tables(metrics, blocks, protocol)
    more, pictures = {}, {}
    if args.analysis or not tasks:
        more, pictures = study(args, stored, model, dataset, source, device)
    origin = {"checkpoint": args.ckpt.name, "step": stored.get("step"), "seed": stored.get("seed")}
    results = origin | summary(args, dataset, metrics, reference, protocol) | {"routing": blocks, **more}
    size = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L"}.get(model.cfg.dim, f"width {model.cfg.dim}")
    print_published(source.partition(":")[0], protocol, results["headline"], size)
    suffix = "" if tasks else "_stage1"  # not over the files of the student with heads
    if blocks:
        pictures["routing"] = draw_routing(blocks)
    files = {f"results{suffix}.json": as_json(results)}
    files |= {f"{name}{suffix}.png": picture for name, picture in pictures.items()}
    if tasks:
        files["predictions.png"] = draw_predictions(model, dataset, device, tasks)
    write_files(out_dir, files)
    if args.save_predictions is not None:
        facts = {"data": source, "split": args.split, "images": len(dataset), "size": "of each image",
                 "classes": dataset.classes, "files": {task: PREDICTION_FILES[task][1] for task in tasks}}
        write_files(args.save_predictions, {"meta.json": as_json(origin | facts)})
        print(f"wrote {args.save_predictions}/<task>/<id> of {len(dataset)} images: {', '.join(tasks)}")
    print(f"wrote {', '.join(str(out_dir / name) for name in files)}")


def main(args: Args) -> None:
    """Check the flags, then do what they ask for."""
    if bool(args.image) + (args.predictions is not None) + (args.save_predictions is not None) > 1:
        raise ValueError("--image, --predictions and --save-predictions do different things; give one")
    alone = [name for name in ("image", "predictions", "cost", "contest")
             if getattr(args, name) != getattr(Args, name)]
    if alone and (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        if os.environ.get("RANK", "0") != "0":
            return  # the first process says why
        raise ValueError(f"--{alone[0]} in {processes} processes, but only the scores of a checkpoint are "
                         "shared out; run it with python instead of torchrun")
    if args.predictions is not None:
        return score_files(args)
    device = prism.choose_device(args.device)
    if args.image:
        return draw_photos(args, device)
    data.check_flags(args, {"batch_size": (1, 1e6), "analysis_images": (1, 1e6), "seeds": (1, 1000),
                            "image_size": (1, 2**14)})
    if args.cost:
        return report_cost(args, device)
    if args.contest is not None:
        return contest(args, device)
    with training.explain_lost_process():
        score_checkpoint(args)


if __name__ == "__main__":
    args = tyro.cli(Args)
    prism.exit_with_one_line(lambda: main(args), args.debug)
