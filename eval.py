"""Score a student: metrics of every task, Delta_m, what its routers do, pictures.

    python eval.py --ckpt out/prism.pt               # or out/deconstruct.pt: how well it imitates
    torchrun --nproc_per_node=8 eval.py --ckpt out/prism.pt         # the same, batches shared out
    python eval.py --ckpt out/prism.pt --image photo.jpg holiday/   # every task on anyone's photos
    python eval.py --ckpt out/prism.pt --save-predictions found/    # also writes what it scores
    python eval.py --predictions found/ --data nyud:/data/NYUDv2    # scores files, ours or a peer's
    python eval.py --ckpt out/prism.pt --cost                       # parameters, multiply-adds, time
    python eval.py --contest prism sak dense                        # trains and compares students
    python eval.py --ckpt out/prismer.pt                            # scores and draws captions, or --image

| task        | metric                         | unit       | better        | protocol |
|-------------|--------------------------------|------------|---------------|----------|
| semseg      | mIoU over all classes          | %          | higher        | sak      |
| human_parts | mIoU, parts and background     | %          | higher        | sak      |
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

Predictions are final maps: class ids, probabilities of saliency and boundary, unit normals, metres. Targets
are as dataset[i] gives them: 255 = ignore, and so are zero normals and depth. All are (H, W) or (B, H, W).
"""

import data  # first: it settles how threads wait, before torch is loaded

# isort: split
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image, ImageColor, ImageDraw
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prism
import teachers
import train

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
    """Intersection over union of semseg and human_parts (SAK)."""

    def __init__(self, num_classes: int):
        super().__init__(confusion=zeros(num_classes, num_classes))  # target x prediction

    def update(self, prediction, target) -> None:
        """Count prediction and target ([B,] H, W), class ids; target 255 = ignore."""
        prediction, target = as_arrays(prediction, target)
        if prediction.dtype.kind == "f":
            raise ValueError("prediction holds no whole numbers; pass class ids, such as the argmax")
        valid, n = target != data.IGNORE, len(self.sums["confusion"])
        prediction, target = prediction[valid].astype(np.int64), target[valid].astype(np.int64)
        for kind, ids in (("prediction", prediction), ("target", target)):
            if ids.size and not 0 <= ids.min() <= ids.max() < n:
                raise ValueError(f"{kind} has class ids {ids.min()}..{ids.max()} for {n} classes; "
                                 f"pass ids 0..{n - 1}, {data.IGNORE} = ignore")
        self.sums["confusion"] += np.bincount(target * n + prediction, minlength=n * n).reshape(n, n)

    def compute(self) -> dict:
        """Return `miou` and `per_class` in percent; a class that never occurs is 0 and counts; nan without a
        valid pixel."""
        confusion = self.sums["confusion"]
        hit = confusion.diagonal()
        iou = 100 * hit / np.maximum(confusion.sum(0) + confusion.sum(1) - hit, 1e-8)
        return {"miou": float(iou.mean()) if confusion.any() else math.nan, "per_class": iou.tolist()}


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
            if not 0 <= p.min() <= p.max() <= 1:
                raise ValueError(f"probabilities are {p.min():.3g}..{p.max():.3g}; pass 0..1")
            valid = t != data.IGNORE
            if not valid.any():
                continue
            if self.protocol == "invpt":
                p = 1 / (1 + np.exp(-p.astype(np.float32)))
            level, salient = reached(p[valid], self.thresholds), t[valid] == 1
            predicted, hit = reaching(level), reaching(level[salient])  # (19,) each
            union = predicted + salient.sum() - hit
            self.sums["hit"] += hit
            self.sums["predicted"] += predicted
            self.sums["salient"] += salient.sum()
            self.sums["images"] += 1
            # Theirs: ZeroDivisionError where nothing is salient or predicted. Ours: agreement, 1.
            self.sums["iou"] += np.where(union == 0, 1, hit / np.maximum(union, 1))

    def compute(self) -> dict:
        """Return `maxf` (of the summed counts) and `miou` (mean over images) in percent, or nan."""
        if not self.sums["images"]:
            return {"maxf": math.nan, "miou": math.nan}
        hit = self.sums["hit"]
        precision = hit / (self.sums["predicted"] + 1e-8)
        recall = hit / (self.sums["salient"] + 1e-8)
        f = 1.3 * precision * recall / (0.3 * precision + recall + 1e-8)
        iou = self.sums["iou"] / self.sums["images"]
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
        prediction, target = as_arrays(channels_first(prediction), channels_first(target))
        valid = (target != data.IGNORE).all(-3) & (target != 0).any(-3)
        (a, b, c), (d, e, f) = ([x[valid].astype(np.float64) for x in np.moveaxis(vectors, -3, 0)]
                                for vectors in (prediction, target))  # (pixels,) each
        # Cross and dot product: acos would lose small angles to rounding. No direction at all: 90 degrees.
        cross = np.sqrt((b * f - c * e) ** 2 + (c * d - a * f) ** 2 + (a * e - b * d) ** 2)
        angle = np.degrees(np.arctan2(cross.clip(1e-300), a * d + b * e + c * f))  # (pixels,)
        bins = self.sums["bins"]
        bins += np.bincount(np.minimum(angle / self.BIN, len(bins) - 1).astype(np.int64), minlength=len(bins))
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
    """Error of depth, or of another number, pooled over pixels (rmse: SAK)."""

    def __init__(self, least: float = 0, most: float = 80):
        super().__init__(close=zeros(), pixels=zeros(), squares=np.zeros(()))
        self.least, self.most = least, most

    def update(self, prediction, target) -> None:
        """Count prediction and target ([B,] H, W) in metres; target outside (least, most) is ignored."""
        prediction, target = as_arrays(prediction, target)
        valid = (target > self.least) & (target < self.most) & (target != data.IGNORE)
        t = target[valid].astype(np.float64)
        p = prediction[valid].astype(np.float64)
        p = np.maximum(p, 1e-9) if self.least == 0 else p
        self.sums["squares"] += np.square(p - t).sum()
        low, high = np.minimum(p, t), np.maximum(p, t)
        self.sums["close"] += ((low > 0) & (high < 1.25 * low)).sum()
        self.sums["pixels"] += valid.sum()

    def compute(self) -> dict:
        """Return `rmse` in metres and, of distances, `delta1` in percent; nan without a valid pixel."""
        squares, close, pixels = (self.sums[name] for name in ("squares", "close", "pixels"))
        rmse = {"rmse": math.sqrt(ratio(squares, pixels))}
        return rmse | ({"delta1": ratio(100 * close, pixels)} if self.least == 0 else {})


class BoundaryF(Metric):
    """Best F measure of boundaries over the dataset, pixels matched one to one (SEISM's `fb`).

    "sak": smoothing, non-maximum suppression over 4 px, 8 bits, 99 thresholds; "invpt": suppression
    over 1 px alone, 101 thresholds; "simple": neither, 19 thresholds. Then, each: thinning, matching.
    Theirs draws random outliers from the clock and misses about 0.1 % of the matches; ours is the
    largest matching, so odsF reads up to 0.11 higher.

    `update` keeps a packed map per image, 35 to 80 KB at 375 x 500; `compute` counts on all cores. A map
    with a side above LONGEST is scored at a half, a third, ... of its size: matching 12 megapixels at 99
    thresholds takes an hour.
    """

    LONGEST = 640  # pixels; the published data sets are not larger

    def __init__(self, max_dist: float, protocol: str = "sak", exhaustive: bool = True):  # the last: ignored
        super().__init__(images=[])  # (height, width, packed map) each
        self.max_dist = max_dist  # share of the image's diagonal
        self.protocol, self.thresholds = protocol, THRESHOLDS[protocol]

    def update(self, prediction, target) -> None:
        """Keep prediction ([B,] H, W), in [0, 1] or uint8; target ([B,] H, W), a label map."""
        for p, labels in images_of(prediction, target):
            truth, step = seg2bmap(labels), -(-max(p.shape) // self.LONGEST)
            for axis, side in enumerate(truth.shape):  # the maximum, so that no line is lost
                p, truth = (np.maximum.reduceat(x, np.arange(0, side, step), axis) for x in (p, truth))
            level, truth = boundary_levels(p, self.protocol), data.thin(truth)
            self.sums["images"].append((*truth.shape, zlib.compress(level | truth.astype(np.uint8) << 7, 1)))

    def compute(self) -> dict:
        """Return `odsf`, `precision`, `recall` in percent, `threshold`, and `counts`, thresholds x
        (matched recall, ground truth, matched precision, predicted)."""
        tasks = [(image, len(self.thresholds), self.max_dist) for image in self.sums["images"]]
        found = data.track(data.on_all_cores(count_boundaries, tasks), "match boundaries", len(tasks),
                           quiet=len(tasks) < 8)
        counts = sum(found, zeros(len(self.thresholds), 4))
        matched_r, truth, matched_p, predicted = counts.T  # (thresholds,) each
        recall = matched_r / np.maximum(truth, 1)
        precision = np.where(predicted == 0, 1, matched_p / np.maximum(predicted, 1))
        f = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f.argmax())
        return {"odsf": float(100 * f[best]) if tasks else math.nan,
                "threshold": round(float(self.thresholds[best]), 4),
                "precision": float(100 * precision[best]), "recall": float(100 * recall[best]),
                "counts": counts}


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
    if not (np.isfinite(prediction).all() and np.isfinite(target).all()):
        raise ValueError("prediction or target has values that are not finite; score those that are")
    return prediction, target


def images_of(prediction, target) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the (H, W) pairs of one image or of a batch."""
    prediction, target = as_arrays(prediction, target)
    size = prediction.shape[-2:]
    return zip(prediction.reshape(-1, *size), target.reshape(-1, *size), strict=True)


def reached(p: np.ndarray, thresholds: np.ndarray, side: str = "right") -> np.ndarray:
    """Count for each p how many rising thresholds it reaches: level > k iff p >= thresholds[k].

    side "left": iff p > thresholds[k].
    """
    return np.searchsorted(thresholds, p.astype(np.float32), side)


def reaching(level: np.ndarray) -> np.ndarray:
    """Count the values that reach each of 19 thresholds: (19,)."""
    return np.bincount(level, minlength=20)[::-1].cumsum()[::-1][1:]


def channels_first(x):
    """Move the three channels of ([B,] H, W, 3) before the pixels, unless they are there."""
    return x.swapaxes(-1, -2).swapaxes(-2, -3) if x.shape[-1] == 3 else x


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
        if not (base or 0) > 0:  # None: a results.json has it for nan
            raise ValueError(f"reference of {task} is {base}; Delta_m divides by it: give one > 0")
        sign = -1 if data.TASKS[task].lower_is_better else 1
        gains.append(sign * (value - base) / base)
    return 100 * sum(gains) / len(gains)


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
        return reached(p / np.float32(255) if p.dtype == np.uint8 else p, thresholds).astype(np.uint8)
    if p.dtype != np.uint8:
        if not 0 <= p.min() <= p.max() <= 1:
            raise ValueError(f"boundary probabilities are {p.min():.3g}..{p.max():.3g}; pass 0..1, or uint8")
        p = (255 * p).astype(np.uint8)  # numpy's cast truncates, so does their PNG
    e = p.astype(np.float32) / 255
    if protocol == "invpt":
        return reached(suppress(e, orientation(e), 1), thresholds, "left").astype(np.uint8)
    e = smooth(e)
    e = np.floor(255 * suppress(e, orientation(e), 4) + 0.5) / 255  # through a second PNG
    return reached(e, thresholds).astype(np.uint8)


def smooth(x: np.ndarray) -> np.ndarray:
    """Filter x (H, W) float32 with [1 2 1] / 4 across and down; borders repeat the outermost pixel."""
    def run(x):  # along the first axis
        return np.concatenate([3 * x[:1] + x[1:2], x[:-2] + 2 * x[1:-1] + x[2:], x[-2:-1] + 3 * x[-1:]])

    return run(run(x.T).T) / 16


def smooth_widely(x: np.ndarray) -> np.ndarray:
    """Filter x (H, W) float32 with [1 2 3 4 5 4 3 2 1] / 25 across and down, borders mirrored.

    A triangle's second difference is 1, -2, 1, so each line is a running sum of a running sum.
    """
    def run(x, scale):  # along the first axis
        around = np.pad(x, ((5, 5), (0, 0)), mode="symmetric")
        bend = around[: len(x) - 1] + around[10 : len(x) + 9] - 2 * x[:-1]
        ramp = around[5:10].cumsum(0)
        first = 2 * ramp.cumsum(0)[-1] - ramp[-1]
        return (np.concatenate([first[None], bend.cumsum(0)]) * scale).cumsum(0)

    return run(run(x.T, np.float32(1 / 5**4)).T, 1)


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


def count_boundaries(task: tuple[tuple, int, float]) -> np.ndarray:
    """Count BoundaryF's four numbers of one packed image at every threshold, (thresholds, 4)."""
    (h, w, packed), thresholds, max_dist = task
    stored = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(h, w)
    level, truth = stored & 127, stored > 127
    counts, before = zeros(thresholds, 4), None
    at_once = max(1, 2**16 // (h * w))  # thresholds; small images are thinned in a third of the time
    for first in range(0, thresholds, at_once):
        above = level > np.arange(first, min(first + at_once, thresholds), dtype=np.uint8)[:, None, None]
        for k, (pixels, lines) in enumerate(zip(above.sum((1, 2)), data.thin(above), strict=True), first):
            if pixels != before:  # else the same pixels as at the threshold before
                before, predicted = pixels, lines.sum()
                matched = match(lines, truth, max_dist * math.hypot(h, w))
            counts[k] = matched, truth.sum(), matched, predicted
    return counts


# -------------------------------------------------------------------------------------------- evaluate


def final_map(task: str, raw: Tensor) -> np.ndarray:
    """Turn a head's raw output (B, C, H, W) into the map that is scored; no distance is below 0."""
    final = prism.FINAL[data.TASKS[task].kind](raw.float())
    return (final.clamp(min=0) if data.TASKS[task].distance else final).cpu().numpy()


@torch.inference_mode()
def predict_maps(model, images: Tensor, tasks: Sequence[str], seen: Sequence[tuple[int, int]],
                 sizes: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
    """Predict the final maps of each image at its own size, {task: (h, w [, 3])}, in eval mode.

    images (B, 3, H, W), RGB in [0, 1], padded; seen: (h, w) of each without padding; sizes: before shrinking.
    """
    raw, found = model.eval().predict(images, list(tasks)), []
    for i, (small, size) in enumerate(zip(seen, sizes, strict=True)):
        top, left = ((n - m) // 2 for n, m in zip(images.shape[-2:], small, strict=True))
        cut = {task: x[i : i + 1, :, top : top + small[0], left : left + small[1]] for task, x in raw.items()}
        if small != size:
            cut = {task: F.interpolate(x.float(), size, mode="bilinear", align_corners=False, antialias=True)
                   for task, x in cut.items()}
        found.append({task: final_map(task, x)[0] for task, x in cut.items()})
    return found


def solve(model, samples: list[dict], size: tuple[int, int], device, tasks: Sequence[str]) -> list[dict]:
    """Predict the final maps of samples of `read`, as `predict_maps` gives them; networks see `size`."""
    small = [data.shrink({"image": sample["image"]}, size) for sample in samples]
    images = torch.stack([data.to_tensors(sample, size)["image"] for sample in small]).to(device)
    return predict_maps(model, images, tasks, *([sample["image"].shape[:2] for sample in kind]
                                                for kind in (small, samples)))


def score(metrics: dict[str, Metric], maps: dict[str, np.ndarray], sample: dict) -> None:
    """Add the final maps of a sample of `read` to the metrics; without a label nothing is added."""
    truth = data.to_tensors(sample, sample["image"].shape[:2])
    for task, metric in metrics.items():
        if (truth[task] != data.IGNORE).any():  # of edges, maps are scored that are no label of training
            metric.update(maps[task], sample.get("labelmap", truth[task].numpy())
                          if task == "edge" else truth[task])


def stack(samples: list[dict], name: str) -> Tensor:
    return torch.stack([sample[name] for sample in samples])


def new_metric(task: str, dataset, protocol: str | None = None) -> Metric:
    """Build the empty metric of a task; protocol: of boundaries, default the data's."""
    protocol = protocol or dataset.boundary_protocol
    most = data.IGNORE if dataset.kind == "folder" else 80  # metres
    limits = (0, most) if data.TASKS[task].distance else (-math.inf, math.inf)
    metrics = {"classes": lambda: MeanIoU(dataset.tasks[task]), "normals": NormalError,
               "number": lambda: DepthRMSE(*limits),
               "mask": lambda: MaxF("invpt" if protocol == "invpt" else "sak"),
               "edge": lambda: BoundaryF(dataset.max_dist, protocol)}
    return metrics[data.TASKS[task].kind]()


def evaluate(model, dataset, device, batch_size: int, tasks: Sequence[str], rank: int = 0,
             world_size: int = 1, protocol: str | None = None, save: Path | None = None) -> dict[str, dict]:
    """Score the model on the whole dataset: {task: what its metric's `compute` returns}.

    Every process takes every world_size-th batch, whole, as in another batch an image's prediction is rounded
    differently. All must call this; it returns {} on all but the first, which alone starts
    processes of its own to match boundaries. save: write the maps below this folder, see `write_maps`.
    """
    metrics = {task: new_metric(task, dataset, protocol) for task in tasks}
    starts = range(rank * batch_size, len(dataset), world_size * batch_size)
    for start in data.track(starts, f"evaluate {' '.join(tasks)}", quiet=rank > 0):
        samples = [dataset.read(i) for i in range(start, min(start + batch_size, len(dataset)))]
        for sample, maps in zip(samples, solve(model, samples, dataset.size, device, tasks), strict=True):
            score(metrics, maps, sample)
            if save is not None:
                write_maps(save, sample["name"], maps)
    if world_size > 1:
        states = None if rank else [None] * world_size
        dist.gather_object({task: metric.state() for task, metric in metrics.items()}, states)
        if rank:
            return {}
        for task, metric in metrics.items():
            for state in states[1:]:
                metric.merge(state[task])
    return {task: metric.compute() for task, metric in metrics.items()}


class Floor(nn.Module):
    """Predicts the same for every image, the best that can be said without looking at it.

    At each pixel the class that is commonest there in the training labels, or their mean.
    """

    def __init__(self, dataset, device):
        super().__init__()
        self.maps, counts = {}, {}
        for i in data.track(range(len(dataset)), "floor"):
            sample = dataset[i]
            for task in dataset.tasks:
                y = sample[task][None] if sample[task].ndim == 2 else sample[task]  # (C, H, W)
                known = y != data.IGNORE
                if data.TASKS[task].kind in ("classes", "mask"):
                    y = F.one_hot(y[0] * known[0], dataset.tasks[task]).permute(2, 0, 1)
                self.maps[task] = self.maps.get(task, 0) + (y * known).double()
                counts[task] = counts.get(task, 0) + known.double()
        raw = {"edge": lambda p: p.clamp(1e-4).logit(), "mask": lambda p: p.clamp(1e-4).log()}
        for task, total in self.maps.items():
            mean = total / counts[task].clamp(min=1)
            self.maps[task] = raw.get(data.TASKS[task].kind, lambda p: p)(mean).float().to(device)

    def predict(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return {task: (B, C, H, W)}, as a student does."""
        return {task: self.maps[task].expand(len(images), -1, -1, -1) for task in tasks}


# ---------------------------------------------------------------------------------------------- probes


class Probe(nn.Module):
    """Read every task off frozen features with one linear map each, trained with the student's own losses.

    features: images (B, 3, H, W), RGB in [0, 1] -> 4 levels (B, C, h, w). A patch's levels, whitened, give
    CELLS x CELLS places inside it. `predict` gives what a student's does, so `evaluate` scores it.
    """

    CELLS, IMAGES, STEPS, BATCH, LR = 4, 768, 300, 32, 0.05

    @torch.no_grad()
    def __init__(self, features: Callable[[Tensor], list[Tensor]], dataset, device):
        super().__init__()
        self.features, samples = features, [dataset[i] for i in range(min(len(dataset), self.IMAGES))]
        images = stack(samples, "image").to(device)
        x = torch.cat([self.levels(part) for part in images.split(64)])  # (images, h, w, F)
        self.mean, (values, vectors) = x.mean((0, 1, 2)), torch.linalg.eigh(x.flatten(0, 2).T.cov())
        self.whiten = vectors * (values.clamp(min=0) + 1e-3 * values.mean() + 1e-9).rsqrt()  # weak stays weak
        self.heads = nn.ModuleDict({task: nn.Linear(x.shape[-1], channels * self.CELLS**2)
                                    for task, channels in dataset.tasks.items()}).to(device)
        labels = {task: stack(samples, task).to(device) for task in dataset.tasks}
        self.fit((x - self.mean) @ self.whiten, labels, images.shape[-2:])

    @torch.enable_grad()
    def fit(self, x: Tensor, labels: dict[str, Tensor], size: Sequence[int]) -> None:
        """Train the maps on whitened levels (images, h, w, F) and labels of all images, each of `size`."""
        optimizer = torch.optim.Adam(self.heads.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.LR, self.STEPS)
        draw = torch.Generator().manual_seed(0)
        for _ in range(self.STEPS):
            rows = torch.randint(len(x), (self.BATCH,), generator=draw)
            losses = [train.task_term(data.TASKS[task].kind, self.read(task, x[rows], size), y[rows], y[rows])
                      for task, y in labels.items()]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            schedule.step()

    def levels(self, images: Tensor) -> Tensor:
        """Return the levels of each patch side by side, (B, h, w, F)."""
        return torch.cat(self.features(images), 1).permute(0, 2, 3, 1)

    def read(self, task: str, x: Tensor, size: Sequence[int]) -> Tensor:
        """Map whitened levels (B, h, w, F) to raw outputs (B, C, *size) of a task."""
        y = rearrange(self.heads[task](x), "b h w (c p q) -> b c (h p) (w q)", p=self.CELLS, q=self.CELLS)
        return F.interpolate(y, size, mode="bilinear", align_corners=False)

    def predict(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return {task: (B, C, H, W)}, raw outputs as a student's."""
        x = (self.levels(images) - self.mean) @ self.whiten
        return {task: self.read(task, x, images.shape[-2:]) for task in tasks}


def probe(features: Callable[[Tensor], list[Tensor]], fitted, scored, device="cpu") -> dict[str, float]:
    """Fit a `Probe` on one data set, return its headline numbers {task: value} on another."""
    metrics = evaluate(Probe(features, fitted, device), scored, device, 64, list(scored.tasks))
    return {task: headline(task, value) for task, value in metrics.items()}


def report_probes(args: "Args", device) -> None:
    """Print linear probes of the checkpoint's features, of an untrained student's and of the teachers'."""
    torch.manual_seed(0)
    stored, model = prism.read_checkpoint(args.ckpt), prism.load(args.ckpt, device)
    source = args.data or stored.get("provenance", {}).get("data", "world")
    blank = prism.build(model.cfg).to(device).eval()
    rows = {f"student as {name}": partial(model.features, context=name) for name in model.cfg.teachers}
    rows["untrained"] = partial(blank.features, context=next(iter(model.cfg.teachers)))
    rows |= {name: teacher.features for name, teacher in load_members(stored, device).items()}
    splits = ("probe" if source.startswith("world") else "train", args.split)  # a world keeps rooms for this
    fitted, scored = (data.open_data(source, split, train=False) for split in splits)
    found = {row: probe(features, fitted, scored, device) for row, features in rows.items()}
    prism.show(f"linear probe, {min(len(fitted), Probe.IMAGES)} images", found)
    write_files(args.out_dir or args.ckpt.parent, {"probes.json": as_json(found)})


# ------------------------------------------------------------------------------------ prediction files

FILED = {  # kind of task -> what its prediction files hold
    "classes": "8-bit class ids", "mask": "8-bit gray, floor(255 p)", "edge": "8-bit gray, floor(255 p)",
    "normals": "float32 (H, W, 3), x right, y up, z to the camera; png: 127.5 (n + 1)",  # .17 degrees off
    "number": "float32, such as metres; mat: variable depth",
}


def write_maps(folder: Path, name: str, maps: dict[str, np.ndarray]) -> None:
    """Write the final maps (H, W [, 3]) of an image as folder/<task>/<name>."""
    for task, array in maps.items():
        (folder / task / name).parent.mkdir(parents=True, exist_ok=True)
        if data.TASKS[task].files[0] == ".npy":
            np.save(folder / task / f"{name}.npy", array.astype(np.float32))
        else:
            if array.dtype.kind == "f":  # less than 2 all over is nothing, and would look like class ids
                array = 255 * array * (array.max() >= 2 / 255)
            whole = array.astype(np.uint8)  # the floor
            Image.fromarray(whole).save(folder / task / f"{name}.png")


def read_map(folder: Path, task: str, name: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """Read a prediction for labels of size (H, W): a final map, edge as uint8."""
    kind, endings = data.TASKS[task].kind, data.TASKS[task].files
    found = [path for ending in endings if (path := folder / task / f"{name}{ending}").exists()]
    if len(found) != 1:
        raise FileNotFoundError(f"{folder / task / name}{' or '.join(endings)}: {len(found)} files; predict "
                                "every image of the split, once")
    path, shape = found[0], (*size, 3) if kind == "normals" else size
    array = data.decode_file(path, lambda path: data.load_array(path, "depth"))
    fits = array.dtype == np.uint8 if path.suffix == ".png" else array.dtype.kind == "f"
    if array.shape != shape or not fits:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, its labels need {shape}; write "
                         f"{FILED[kind]}, at the image's own size")
    if kind == "classes":
        data.check_range(path, array, channels - 1)
    if kind in ("mask", "edge"):
        data.check_gray(path, array)
    if path.suffix == ".png" and kind == "normals":
        return data.decode_normals(array)
    return array / np.float32(255) if kind == "mask" else array


def evaluate_files(folder: Path, dataset, tasks: Sequence[str], protocol: str | None = None) -> dict:
    """Score the files of a folder as `evaluate` scores a model."""
    metrics = {task: new_metric(task, dataset, protocol) for task in tasks}
    for i in data.track(range(len(dataset)), f"score {' '.join(tasks)}"):
        sample = dataset.read(i)
        size = sample["image"].shape[:2]
        score(metrics, {task: read_map(folder, task, dataset.ids[i], size, dataset.tasks[task])
                        for task in tasks}, sample)
    return {task: metric.compute() for task, metric in metrics.items()}


# ---------------------------------------------------------------------------- routing, imitation


@torch.inference_mode()
def routing(model, images: Tensor, batch_size: int = 32) -> tuple[list[dict], Tensor | None]:
    """Measure what the routers do with the same images under each teacher and each task.

    All tokens count, cls too. Returns per MoE block: `block`, its index; `lambda`, the mean gate;
    `teachers` and `tasks`, {context: E shares of the top-k slots, summing to 1}; `nmi_teachers`,
    `nmi_tasks`; and every token's best expert (blocks, contexts, B, N). Students without experts: [], None.
    """
    if not model.routed:
        return [], None
    cfg, blocks, picks, gates = model.cfg, [], [], []
    for part in data.track(images.split(batch_size), "routing"):
        routes = [model.route(part, context) for context in model.contexts]
        picks.append(torch.stack([torch.stack([r.topk_idx for r in own]) for own in routes], 1))
        gates.append(torch.stack([torch.stack([r.gate.mean(1) for r in own]) for own in routes], 1))
    picks, gates = torch.cat(picks, 2), torch.cat(gates, 2).mean((1, 2))  # (blocks, contexts, B, N, K)
    for b, block in enumerate(cfg.moe_blocks):
        counts = F.one_hot(picks[b].flatten(1), cfg.experts).sum(1).double().cpu().numpy()  # (contexts, E)
        rows = dict(zip(model.contexts, (counts / counts.sum(1, keepdims=True)).tolist(), strict=True))
        split = len(cfg.teachers)
        blocks.append({"block": block, "lambda": gates[b].item(),
                       "teachers": {name: rows[name] for name in cfg.teachers},
                       "tasks": {name: rows[name] for name in model.contexts[split:]},
                       "nmi_teachers": nmi(counts[:split]), "nmi_tasks": nmi(counts[split:])})
    return blocks, picks[..., 0]


def nmi(counts: np.ndarray) -> float:
    """Return I(C; X) / sqrt(H(C) H(X)) of context C and chosen expert X.

    counts (C, E): slots of context C that went to expert X. 0: the context says nothing about the
    expert (or one of them cannot vary); 1: each determines the other.
    """
    def entropy(p: np.ndarray) -> float:
        return max(0.0, float(-(p[p > 0] * np.log(p[p > 0])).sum()))

    p = counts / max(counts.sum(), 1)  # (C, E)
    h_context, h_expert, h_both = entropy(p.sum(1)), entropy(p.sum(0)), entropy(p)
    scale = math.sqrt(h_context * h_expert)
    return max(0.0, h_context + h_expert - h_both) / scale if scale else 0.0


def load_members(stored: dict, device) -> dict[str, teachers.Teacher]:
    """Load the teachers that a checkpoint records; {} if one is missing, and a line that says why."""
    recorded, members = stored.get("provenance", {}).get("teachers", {}), {}
    try:
        for name, width in stored["config"]["teachers"].items():
            was = recorded[name]
            size = was["size"] if isinstance(was.get("size"), int) else None  # else words: the image's own
            members[name] = teachers.load_teacher(was.get("source", name), size, device, was.get("sha256"))
            settings = members[name].provenance.get("settings")
            if members[name].width != width or settings != was.get("settings"):
                print(f"{name} is another here than it was in training")
    except (ValueError, OSError, KeyError) as error:  # a key: the file says nothing of this teacher
        print(f"teachers, and what is measured against them, left out: {prism.one_line(error)}")
        return {}
    return members


@torch.inference_mode()
def fidelity(model, members: dict[str, teachers.Teacher], images: Tensor) -> dict[str, dict[str, float]]:
    """Compare the student's projected features with each teacher's, level by level.

    `cos_image` over the flattened map, as in the loss; `cos_patch` mean over patches; `length`, the
    student's norm over the teacher's: a cosine of 1 does not ask for a length of 1.
    """
    found = {}
    for i, (name, teacher) in enumerate(members.items()):
        maps = model.distill(images, torch.full((len(images),), i))[name]
        for block, *pair in zip(model.cfg.moe_blocks, maps, teacher.features(images), strict=True):
            x, y = train.same_grid(*pair)
            flat_x, flat_y = x.flatten(1), y.flatten(1)
            found[f"{name}, block {block}"] = {
                "cos_image": F.cosine_similarity(flat_x, flat_y).mean().item(),
                "cos_patch": F.cosine_similarity(x, y).mean().item(),
                "length": (flat_x.norm(dim=1) / flat_y.norm(dim=1)).mean().item()}
    return found


# ------------------------------------------------------------------------------------------------ cost


@torch.inference_mode()
def cost(models: dict[str, prism.Student], images: Tensor, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Count parameters and multiply-adds of `predict` for one image (1, 3, H, W), and time it, taking turns.

    Heads are counted as they are computed and, as published counts do, as convolutions at a quarter of the
    pixels.
    """
    def count_gmac(model) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.predict(images)
        return counter.get_total_flops() / 2e9

    rows = {}
    for name, model in models.items():
        for trains_alone in ("projectors", "aligners"):
            getattr(model, trains_alone, {}).clear()
        total, active = prism.count_parameters(model)
        rows[name] = {"parameters, M": total / 1e6, "active, M": active / 1e6, "GMAC": count_gmac(model)}
        for head in model.heads.values():
            head.forward = head.plain
        rows[name]["GMAC, heads convolved"] = count_gmac(model)
        for head in model.heads.values():
            del head.forward
    runs = {name: partial(model.predict, images) for name, model in models.items()}
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        ms = prism.time_interleaved(runs, images.device, repeats)
    return {name: row | {"ms": ms[name]} for name, row in rows.items()}


def report_cost(args: "Args", device) -> None:
    """Print what a student costs beside a dense ViT of its size; write cost.json."""
    model = prism.load(args.ckpt, device)
    if not getattr(model.cfg, "tasks", {}):
        raise ValueError(f"{args.ckpt} has no task heads (stage 1); name one of train.py --stage recompose")
    dense = prism.build(replace(model.cfg, student="dense", without=())).to(device).eval()
    given = args.image_size or tuple(n * model.cfg.patch for n in model.cfg.grid)
    images = torch.rand(1, 3, given[0], given[-1], device=device)
    rows = cost({model.cfg.student: model, "dense ViT": dense}, images)
    prism.show(f"one image of {given[0]} x {given[-1]}, {len(model.cfg.tasks)} tasks, {device}", rows)
    write_files(args.out_dir or args.ckpt.parent, {"cost.json": as_json(rows)})


# --------------------------------------------------------------------------------------------- contest

CONTESTANTS = {  # name -> flags of train.py
    "prism": "", "sak": "--student sak", "dense": "--student dense", "wide": "--student wide",
    "moe": "--student moe", "route": "--recompose route", "no-anchor": "--without anchor",
    "no-shared": "--without shared", "no-film": "--without film", "no-context": "--without context",
    "gate-paper": "--gate-start 0.94", "sak-one": "--student sak --every-teacher False",
    "dense-all": "--student dense --every-teacher True", "no-decorr": "--decorr-levels 0",
    "top-1": "--top-k 1", "top-3": "--top-k 3", "lite": "--expert-ratio 1", "mlp": "--projector mlp",
    "no-distill": "--student dense --stage recompose --no-distill",
}


def train_and_score(folder: Path, flags: list[str], slot: int) -> dict:
    """Train and evaluate in processes of their own, or go on where that was interrupted; returns
    results.json. Raises OSError with the last line of what failed."""
    folder.mkdir(parents=True, exist_ok=True)
    here, gpus = Path(__file__).parent, torch.cuda.device_count()
    where = {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {"OMP_NUM_THREADS": "1"}
    where["PRISM_CHILD"] = "1"
    for command in (["train.py", *flags, "--processes", "1", "--out-dir", folder],
                    ["eval.py", "--ckpt", folder / "prism.pt", "--no-floor"]):
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run([sys.executable, here / command[0], *command[1:]], env=os.environ | where,
                                  stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            last = (folder / "log.txt").read_text().strip().splitlines()[-1]
            raise OSError(f"{command[0]} of {folder.name} failed: {last}")
    return json.loads((folder / "results.json").read_text())


def contest(args: "Args", device) -> None:
    """Train contestants over seeds, side by side; write contest.{json,md}."""
    common, folder = shlex.split(args.train_args), args.out_dir or Path("out/contest")
    if not args.contest or (unknown := [name for name in args.contest if name not in CONTESTANTS]):
        raise ValueError(f"unknown contestant {unknown[0] if args.contest else ''}: name some of "
                         f"{', '.join(CONTESTANTS)}")
    settings = tyro.cli(train.Args, args=common)
    train.inherit(settings)
    data.open_data(settings.data, "train")  # renders the world
    teachers.Teachers(settings.teachers)  # trains the toys
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.contest]
    pool, waiting, found = ThreadPoolExecutor(torch.cuda.device_count() or data.core_count()), {}, {}
    try:
        for slot, (name, seed) in enumerate(jobs):
            given = [*common, *shlex.split(CONTESTANTS[name]), "--seed", str(seed)]
            waiting[name, seed] = pool.submit(train_and_score, folder / f"{name}-{seed}", given, slot)
        for job, future in waiting.items():
            found[job] = future.result()["headline"]
            print(f"{len(found)}/{len(jobs)} {job[0]} seed {job[1]}: {found[job]}", flush=True)
    finally:  # Ctrl-C: what runs hears it too, and saves; what waits is not begun
        pool.shutdown(cancel_futures=True)
    models = {name: prism.load(folder / f"{name}-0" / "prism.pt", device) for name in args.contest}
    grid, patch = models[args.contest[0]].cfg.grid, models[args.contest[0]].cfg.patch
    costs = cost(models, torch.rand(1, 3, grid[0] * patch, grid[1] * patch, device=device), repeats=15)
    scores = contest_scores(found, args.contest, args.seeds)
    text = contest_text(scores, costs)
    write_files(folder, {"contest.json": as_json({"scores": scores, "cost": costs}), "contest.md": text})
    print(f"{text}\nwrote {folder / 'contest.md'}")


def contest_scores(found: dict, names: Sequence[str], seeds: int) -> dict:
    """Return {contestant: {task or Delta_m: a value per seed}}; Delta_m is over the first of the same seed.

    found: {(name, seed): {task: value}}.
    """
    rows = {}
    for name in names:
        own = [found[name, seed] for seed in range(seeds)]
        rows[name] = {task: [row[task] for row in own] for task in own[0]}
        rows[name]["Delta_m %"] = [delta_m(row, found[names[0], seed]) for seed, row in enumerate(own)]
    return rows


def contest_text(scores: dict, costs: dict) -> str:
    """Write a table in markdown: means +- deviations over seeds; of Delta_m half the 95 % interval of the
    mean (Student's t)."""
    first = next(iter(scores))
    columns = [*scores[first], *costs[first]]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in scores.items():
        cells = []
        for column, values in row.items():
            n, cell = len(values), f"{np.mean(values):.3f}"
            if n > 1:
                half = stdtrit(n - 1, 0.975) / math.sqrt(n) if column == "Delta_m %" else 1
                cell += f" ± {half * np.std(values, ddof=1):.3f}"
            cells.append(cell)
        cells += [f"{v:.3f}" for v in costs[name].values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------- captions

THING = rf"\w+ person in \w+|plant in an? \w+ pot|\w+ (?:{'|'.join(data.CLASSES[3:])})\b"
KINDS = dict.fromkeys(data.COLOURS, "colours") | dict.fromkeys(("standing", "walking", "sitting"), "poses")


def facts(caption: str) -> Counter:
    """Count what a caption of the rendered world states; the first word of a fact is its kind."""
    found = Counter(("counts", *pair) for pair in re.findall(r"(\d+) (\w+)", caption))
    sides = re.findall(rf"the ({THING}) is (\w+) of the ({THING})", caption)
    found.update(("sides", *three) for three in sides)
    for words in map(str.split, re.findall(rf"\ban? ({THING})", caption)):
        name = next(word for word in words if word in data.CLASSES)
        found["classes", name] = 1
        found.update((KINDS[word], name, word) for word in words if word in KINDS)
    return found


def score_facts(found: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Return precision and recall of each kind of fact over all captions, in percent."""
    pairs, scores = [(facts(own), facts(truth)) for own, truth in zip(found, true, strict=True)], {}
    for kind in ("classes", "counts", "colours", "poses", "sides"):
        hits, said, due = (
            sum(n for counts in column for fact, n in counts.items() if fact[0] == kind)
            for column in ([own & truth for own, truth in pairs], *zip(*pairs, strict=True)))
        scores |= {f"{kind} precision": 100 * hits / max(said, 1), f"{kind} recall": 100 * hits / max(due, 1)}
    return scores


def cider_d(found: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr-D in percent (1,000 at most), as COCO's code has it; words are what regex calls so."""
    def grams(text: str, n: int) -> Counter:
        words = re.findall(r"\w+", text.lower())
        return Counter(zip(*(words[k:] for k in range(n)), strict=False))

    total = 0.0
    for n in range(1, 5):
        seen = Counter(gram for texts in references for gram in set().union(*(grams(x, n) for x in texts)))
        for own, texts in zip(found, references, strict=True):
            for text in texts:
                a, b = ({gram: k * math.log(len(references) / max(1, seen[gram]))  # rare ones count more
                         for gram, k in grams(x, n).items()} for x in (own, text))
                same = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys())
                norm = math.hypot(*a.values()) * math.hypot(*b.values())
                longer = grams(own, 1).total() - grams(text, 1).total()
                total += math.exp(-(longer**2) / 72) * same / (norm or 1) / len(texts)
    return 250 * total / len(found)


@torch.inference_mode()
def score_captions(args: "Args", source: str) -> None:
    """Score a Prismer: plain nats per token, CIDEr-D and facts of its captions; draw some.

    Who tells the same beside another photo, the one before, has learnt the language alone.
    """
    model = prism.load(args.ckpt, prism.choose_device(args.device))
    size = tuple(n * model.cfg.trunk.patch for n in model.cfg.trunk.grid)
    pairs = data.Captioned(data.open_data(source, args.split, size=size), size, model.encode)
    nats, count, first = [0.0, 0.0], 0, len(model.start)  # beside the own photo, beside another one
    for start in data.track(range(0, len(pairs), args.batch_size), "captions"):
        stop = min(start + args.batch_size, len(pairs))
        batch = pairs.collate([pairs[i] for i in range(start - 1, stop)])  # also the photo before
        images, tokens = batch["image"].to(model.pos.device), batch["tokens"][1:].to(model.pos.device)
        seen = model.see(images)
        known = (tokens[:, first:] != data.PAD).sum().item()
        for k, beside in enumerate((seen[1:], seen[:-1])):
            logits = model.text(tokens, beside)
            nats[k] += known * train.caption_terms(logits, tokens, first)[1]["nll"].item()
        count += known
    own, other = (total / count for total in nats)
    chosen = np.linspace(0, len(pairs) - 1, min(args.analysis or 64, len(pairs))).astype(int).tolist()
    images = stack([pairs[i] for i in chosen], "image").to(model.pos.device)
    found = {how: [text for part in images.split(args.batch_size) for text in model.caption(part, beams)]
             for how, beams in (("greedy", 1), ("beam 3", 3))}
    references = [pairs.captions[i] for i in chosen]
    pairings = {how: (texts, references) for how, texts in found.items()}
    pairings["beam 3, of another photo"] = found["beam 3"], references[1:] + references[:1]
    scores = {how: {"CIDEr-D": cider_d(told, due), **score_facts(told, [texts[0] for texts in due])}
              for how, (told, due) in pairings.items()}
    prism.show(f"{args.split}: {own:.4f} nats per token of {len(pairs)} images, beside another photo "
               f"{other:.4f}; {len(chosen)} told",
               {name: {how: row[name] for how, row in scores.items()} for name in scores["greedy"]})
    true = [texts[0] for texts in references]
    panel = draw_captions(model, images[:6], {"caption": found["beam 3"], "truth": true})
    results = {"checkpoint": args.ckpt.name, "data": source, "split": args.split, "images": len(pairs),
               "nats per token": own, "beside another photo": other, "scores": scores, "captions": found,
               "truth": references}
    out_dir = args.out_dir or args.ckpt.parent
    write_files(out_dir, {"captions.json": as_json(results), "captions.png": panel})
    print(f"wrote {out_dir / 'captions.json'}, {out_dir / 'captions.png'}")


def draw_captions(model: prism.Prismer, images: Tensor, texts: dict[str, list[str]]) -> Image.Image:
    """Draw images (B, 3, H, W), the student's maps that are read of them, and columns of texts."""
    rows, sizes = [], [tuple(images.shape[-2:])] * len(images)
    drawn = (predict_maps(model.student, images, model.cfg.maps, sizes, sizes) if model.cfg.maps else
             [{}] * len(images))
    for k, image in enumerate(images):
        cells = [as_pixels(image), *(data.colourise(*pair) for pair in drawn[k].items())]
        for column in texts.values():
            page = Image.new("RGB", (256, 256), "white")
            for y, line in enumerate(textwrap.wrap(column[k], 36)):
                data.write(ImageDraw.Draw(page), 2, 10 + 18 * y, line)
            cells.append(np.asarray(page))
        rows.append(("", cells))
    return data.sheet(["photo", *map(titled, model.cfg.maps), *texts], rows, 256)


# -------------------------------------------------------------------------------------------- pictures

def as_pixels(image: Tensor) -> np.ndarray:
    """Turn RGB in [0, 1] (3, H, W) into uint8 (H, W, 3)."""
    return (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()


def titled(task: str) -> str:
    """Name a task, and the unit of its map."""
    row = data.TASKS[task]
    return f"{task}, {row.unit}" if row.kind == "number" and row.unit else task


def draw_predictions(model, dataset, device, tasks: Sequence[str]) -> Image.Image:
    """Draw six scenes spread over the dataset: the image, then prediction and truth of every task."""
    indices = np.linspace(0, len(dataset) - 1, min(6, len(dataset))).astype(int).tolist()
    samples, rows = [dataset.read(i) for i in indices], []
    for truth, maps in zip(samples, solve(model, samples, dataset.size, device, tasks), strict=True):
        cells = [truth["image"]]
        for task in tasks:
            pair = np.concatenate([maps[task], truth[task]], 1)  # one depth ramp
            cells += np.split(data.colourise(task, pair), 2, 1)
        rows.append((truth["name"], cells))
    columns = ["image", *(word for task in tasks for word in (titled(task), "truth"))]
    return data.sheet(columns, rows, 128, {t: dataset.classes[t] for t in tasks if t in dataset.classes})


def draw_losses(rows: list[dict], side: int = 480) -> Image.Image:
    """Draw every term of log.jsonl over the steps, as a share of the largest value that it had."""
    cells = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        names = [k for k in own[0] if k.startswith("distill/") or k in ("loss", "decorr", *data.TASKS)]
        canvas = Image.new("RGB", (side, side), "white")
        pen = ImageDraw.Draw(canvas)
        for k, name in enumerate(names):
            colour = ImageColor.getrgb(f"hsv({360 * k // len(names)},85%,75%)")
            across, up = side * 0.68 / own[-1]["step"], (side - 8) / (max(row[name] for row in own) or 1)
            pen.line([(row["step"] * across, side - 4 - row[name] * up) for row in own], colour, 2)
            text = f"{name.removeprefix('distill/')} {own[-1][name]:.3f}"
            data.write(pen, side * 0.7, 12 + 20 * k, text, colour)
        cells[f"{stage}, {own[-1]['step']} steps"] = np.asarray(canvas)
    rows = [("lines go from 0 to their largest value; the number is the last value", list(cells.values()))]
    return data.sheet(list(cells), rows, side)


def draw_experts(model, images: Tensor, best: Tensor) -> Image.Image:
    """Draw every patch's first expert over the images, a row per context, a column per image and MoE block.

    images (B, 3, H, W) RGB in [0, 1]; best (blocks, contexts, B, N) expert ids, cls first.
    """
    blocks, E = model.cfg.moe_blocks, model.cfg.experts
    palette = np.array([ImageColor.getrgb(f"hsv({360 * e // E},85%,{95 - 33 * (e % 2)}%)") for e in range(E)])
    photos, rows = [as_pixels(image) for image in images], []
    for c, context in enumerate(model.contexts):
        cells = []
        for k, photo in enumerate(photos):
            for b in range(len(blocks)):
                ids = best[b, c, k, 1:].reshape(photo.shape[0] // model.cfg.patch, -1).cpu().numpy()
                over = palette[ids].repeat(model.cfg.patch, 0).repeat(model.cfg.patch, 1)  # (H, W, 3)
                cells.append((0.35 * photo.mean(2, keepdims=True) + 0.65 * over).astype(np.uint8))
        rows.append((context, cells))
    return data.sheet([f"block {b}" for _ in photos for b in blocks], rows, 108)


@torch.inference_mode()
def draw_imitation(model, members: dict[str, teachers.Teacher], images: Tensor) -> Image.Image:
    """Draw each level of each teacher and the student's projection to it, in the teacher's components."""
    rows = []
    for i, (name, teacher) in enumerate(members.items()):
        maps = model.distill(images, torch.full((len(images),), i))[name]
        for k, image in enumerate(images):
            cells = [as_pixels(image)]
            for pair in zip(teacher.features(images), maps, strict=True):
                taught, own = (m[k].cpu().float() for m in pair)
                own = own * taught.norm() / own.norm()  # the loss is nearly blind to length, see `fidelity`
                cells += [teachers.pca_picture(m, taught)[0] for m in (taught, own)]
            rows.append((name, cells))
    blocks = [word for block in model.cfg.moe_blocks for word in (f"block {block}", "student")]
    return data.sheet(["image", *blocks], rows, 112)


def photo_input(photo: np.ndarray, side: int, cfg: prism.PrismConfig) -> tuple[Tensor, tuple[int, int]]:
    """Turn a photo (H, W, 3) uint8 into what the student sees of it, (1, 3, H', W'), and its size there.

    As in scoring: the photo at its own size or shrunk to the shorter side `side`, never enlarged, padded to
    whole patches and at least to the student's own size.
    """
    scale = min(1, side / min(photo.shape[:2]))
    seen = tuple(max(1, round(scale * n)) for n in photo.shape[:2])
    small = np.array(Image.fromarray(photo).resize(seen[::-1], Image.Resampling.LANCZOS))
    padded = tuple(cfg.patch * max(math.ceil(n / cfg.patch), g) for n, g in zip(seen, cfg.grid, strict=True))
    return data.to_tensors({"image": small}, padded)["image"][None], seen


def draw_photos(args: "Args", device) -> None:
    """Write a panel per photo of --image, or of each image in a folder; also raw maps and features."""
    stored, model = prism.read_checkpoint(args.ckpt), prism.load(args.ckpt, device)
    captioner = model if isinstance(model, prism.Prismer) else None
    model = captioner.student if captioner else model
    out_dir, cfg = args.out_dir or args.ckpt.parent, model.cfg
    tasks = choose_tasks(args.tasks, cfg.tasks, cfg)
    classes = stored.get("provenance", {}).get("classes", {})
    legends = {task: names for task, names in classes.items() if task in tasks}
    folders = [data.image_folder(path) for path in args.image]  # or photos
    photos = [path / name for path in folders for name in (data.list_images(path) if path.is_dir() else [""])]
    if not photos:
        raise ValueError(f"{', '.join(map(str, args.image))} holds no images; name photos or folders of them")
    stems = [path.stem for path in photos]
    for k, path in enumerate(data.track(photos, "photos")):
        name = f"{path.stem}{f'-{k + 1}' if path.stem in stems[:k] else ''}"  # a.jpg and b/a.jpg
        side = args.photo_side or min(cfg.grid) * cfg.patch
        photo = data.read_photo(path, 4 * side if args.save_predictions is None else None)
        image, seen = photo_input(photo, side, cfg)
        if captioner:
            whole = data.squeeze(photo, tuple(n * cfg.patch for n in cfg.grid))[None].to(device)
            texts = captioner.caption(whole)
            print(f"{path}: {texts[0]}", flush=True)
            write_files(out_dir, {f"{name}_caption.png": draw_captions(captioner, whole, {"caption": texts})})
        if args.save_features is not None:
            levels = model.features(image.to(device), args.context or model.contexts[0])
            args.save_features.mkdir(parents=True, exist_ok=True)
            np.save(args.save_features / f"{name}.npy", torch.cat(levels).detach().cpu())  # (4, D, h, w)
        maps = predict_maps(model, image.to(device), tasks, [seen], [photo.shape[:2]])[0] if tasks else {}
        if args.save_predictions is not None:
            write_maps(args.save_predictions, name, maps)
        cells = [photo, *(data.colourise(task, array) for task, array in maps.items())]
        panel = data.sheet(["photo", *map(titled, maps)], [(f"{seen[1]} x {seen[0]}", cells)], 320, legends)
        write_files(out_dir, {f"{name}_tasks.png": panel})
        print(f"wrote {out_dir / name}_tasks.png", flush=True)


# ------------------------------------------------------------------------------------------------ main


@dataclass
class Args:
    """Score a checkpoint, print the numbers, draw what it predicts and how it routes."""

    ckpt: Path = Path("out/prism.pt")  # checkpoint to score
    data: str | None = None  # as train.py's (default: what it was trained on)
    split: str = "val"  # split to score (InvPT's PASCAL numbers: test_new)
    tasks: tuple[str, ...] = ()  # tasks to score (default: all with a head and labels)
    protocol: Literal["auto", "sak", "invpt", "simple"] = "auto"  # of boundaries (default: the data's own)
    batch_size: int = 32  # images per batch
    device: str | None = None  # default: cuda if there is one, else cpu
    out_dir: Path | None = None  # results.json and pictures (default: the checkpoint's folder)
    reference: Path | None = None  # JSON {task: value} or a results.json; prints Delta_m against it
    image: tuple[Path, ...] | None = None  # photos, or folders of them: draw every task, score nothing
    photo_side: int | None = None  # shrink photos to this shorter side, pixels (default: the student's)
    save_predictions: Path | None = None  # folder for a file per image and task, of scored ones or --image
    save_features: Path | None = None  # of --image: folder for its 4 levels, npy (4, D, h, w)
    context: str | None = None  # of --save-features: teacher or task (default: the first teacher)
    predictions: Path | None = None  # score the files of this folder, without a checkpoint
    floor: bool = True  # also score what needs no image: commonest class, mean of the training labels
    analysis: int = 0  # on so many images also: how well the student imitates its teachers
    probe: bool = False  # instead: linear probes of the checkpoint's features, and of its teachers'
    cost: bool = False  # instead: parameters, multiply-adds and latency, beside a dense ViT
    image_size: tuple[int, ...] | None = None  # of --cost: side, or height and width, pixels
    contest: tuple[str, ...] | None = None  # instead: train and compare students, the first with the others
    seeds: int = 3  # of --contest
    train_args: str = ""  # of --contest: flags for every train.py: --train-args="--size small"
    debug: bool = False  # full traceback on errors


def choose_tasks(asked: Sequence[str], heads: dict[str, int], dataset) -> list[str]:
    """Return the tasks to score. Raises ValueError where one has no head or no fitting labels."""
    able = [task for task in heads if dataset.tasks.get(task) == heads[task]]
    if unknown := [task for task in asked if task not in able]:
        known = ", ".join(able) or "no task (stage 1): run train.py --stage recompose"
        raise ValueError(f"cannot score {', '.join(unknown)}; checkpoint and data can score {known}")
    if other := [task for task in heads if task in dataset.tasks and task not in able]:
        raise ValueError(f"{other[0]} has {heads[other[0]]} channels, the data {dataset.tasks[other[0]]}; "
                         "name data with the classes of training with --data")
    return [task for task in able if not asked or task in asked]


def write_files(folder: Path, files: dict[str, Image.Image | str]) -> None:
    """Write pictures and texts, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        save = partial(content.save, format="PNG") if isinstance(content, Image.Image) else (
            lambda file, content=content: file.write_text(content))
        prism.write_file(folder / name, save)


def as_json(results: dict) -> str:
    text = json.dumps(results, default=np.ndarray.tolist)
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)  # JSON knows no nan


def report(args: Args, dataset, metrics: dict[str, dict], protocol: str, file: Path,
           floors: dict[str, float]) -> dict:
    """Write, print and return the numbers beside what needs no image, and Delta_m if there is a reference."""
    results = {"split": args.split, "images": len(dataset), "classes": dataset.classes, "protocol": protocol,
               "headline": {task: headline(task, metrics[task]) for task in metrics}, "floor": floors,
               "metrics": metrics}
    write_files(file.parent, {file.name: as_json(results)})  # first: whoever reads may be gone
    if args.reference:
        reference = json.loads(args.reference.read_text())
        reference = reference.get("headline", reference)
        results |= {"reference": reference, "delta_m": delta_m(metrics, reference)}
        write_files(file.parent, {file.name: as_json(results)})
    if metrics:
        prism.show(f"{args.split}, boundaries: {protocol}", {
            f"{task} {k}": {"value": v} | ({"floor": floors.get(task, ""), "headline": "*"}
                                           if k == data.TASKS[task].metric else {})
            for task, numbers in metrics.items() for k, v in numbers.items() if isinstance(v, float)})
    if args.reference:
        print(f"Delta_m {results['delta_m']:+.2f} % over {args.reference} ({', '.join(reference)})")
    return results


def score_files(args: Args) -> None:
    """Score the task folders of --predictions that the data have labels for; no checkpoint."""
    if args.data is None:
        raise ValueError("predictions have no labels of their own; name the data with --data")
    dataset = data.open_data(args.data, args.split)
    there = {task: n for task, n in dataset.tasks.items() if (args.predictions / task).is_dir()}
    tasks = choose_tasks(args.tasks, there, dataset)
    if not tasks:
        raise ValueError(f"{args.predictions} has folders for no task; the data can score "
                         f"{', '.join(dataset.tasks)}: one folder each, of that name")
    protocol = dataset.boundary_protocol if args.protocol == "auto" else args.protocol
    file = (args.out_dir or args.predictions) / "results.json"
    report(args, dataset, evaluate_files(args.predictions, dataset, tasks, protocol), protocol, file, {})


def score_checkpoint(args: Args) -> None:
    """Score, print, write all files. Several processes share the scoring; the rest is the first one's."""
    stored = prism.read_checkpoint(args.ckpt)
    source = args.data or stored.get("provenance", {}).get("data")
    if source is None:
        raise ValueError(f"{args.ckpt} does not say what it was trained on; name it with --data")
    if "trunk" in stored["config"]:
        return score_captions(args, source)
    cfg, rt = prism.config_from(stored["config"], args.ckpt), train.start_runtime(args.device)
    options = {"train": False}  # no random views; what cannot be read is replaced
    if source.partition(":")[0] in ("folder", *data.UNLABELLED):  # of all sizes: fit the student's
        options["size"] = tuple(n * cfg.patch for n in cfg.grid)
    dataset = train.first_rank_first(rt, lambda: data.open_data(source, args.split, **options))
    tasks, model = choose_tasks(args.tasks, cfg.tasks, dataset), prism.load(args.ckpt, rt.device)
    protocol = dataset.boundary_protocol if args.protocol == "auto" else args.protocol
    metrics = evaluate(model, dataset, rt.device, args.batch_size, tasks, rt.rank, rt.world_size,
                       protocol, args.save_predictions) if tasks else {}
    if rt.world_size > 1:
        dist.destroy_process_group()
    if rt.rank:
        return
    suffix, out_dir = "" if tasks else "_stage1", args.out_dir or args.ckpt.parent
    floors = {}
    if tasks and args.floor:
        try:
            training = data.open_data(source, "train", **options)
            found = evaluate(Floor(training, rt.device), dataset, rt.device, 32, tasks, protocol=protocol)
            floors = {task: headline(task, value) for task, value in found.items()}
        except (ValueError, OSError) as error:  # who scores need not have what was trained on
            print(f"no floor: {prism.one_line(error)}", flush=True)
    results = {"checkpoint": args.ckpt.name, "step": stored.get("step"), "seed": stored.get("seed"), "data":
               source, **report(args, dataset, metrics, protocol, out_dir / f"results{suffix}.json", floors)}
    images = torch.stack([dataset[i, 0, 0]["image"] for i in range(min(len(dataset), 128))]).to(rt.device)
    results["routing"], best = routing(model, images, args.batch_size)
    pictures = {"predictions": draw_predictions(model, dataset, rt.device, tasks)} if tasks else {}
    if best is not None:
        prism.show("MoE block", {str(b["block"]): {k: b[k] for k in ("lambda", "nmi_teachers", "nmi_tasks")}
                           for b in results["routing"]})
        pictures["experts"] = draw_experts(model, images[:3], best[:, :, :3])
    if args.analysis or not tasks:
        members, images = load_members(stored, rt.device), images[: args.analysis or 64]
        if members:
            results["imitation"] = fidelity(model, members, images)
            prism.show("imitation", results["imitation"])
            pictures["imitation"] = draw_imitation(model, members, images[:3])
    log = args.ckpt.parent / "log.jsonl"
    if log.exists():
        pictures["losses"] = draw_losses([json.loads(line) for line in log.read_text().splitlines()])
    files = {f"results{suffix}.json": as_json(results)}
    files |= {f"{name}{suffix}.png": picture for name, picture in pictures.items()}
    write_files(out_dir, files)
    if args.save_predictions is not None and tasks:
        meta = {"data": source, "files": {task: FILED[data.TASKS[task].kind] for task in tasks}}
        write_files(args.save_predictions, {"meta.json": as_json(meta)})
    print(f"wrote {', '.join(str(out_dir / name) for name in files)}")


def main(args: Args) -> None:
    """Do what the flags ask for."""
    args.data = args.data and data.guess_spec(args.data)
    if args.predictions is not None:
        return score_files(args)
    if args.image is args.contest is None and not (args.cost or args.probe):
        return score_checkpoint(args)
    if train.process_place()[1] > 1:
        raise ValueError("only the scores of a checkpoint are shared out; use python instead of torchrun")
    device = prism.choose_device(args.device)
    run = report_cost if args.cost else report_probes if args.probe else contest
    return draw_photos(args, device) if args.image is not None else run(args, device)


if __name__ == "__main__":
    args = tyro.cli(Args)
    data.exit_with_one_line(lambda: main(args), args.debug)
