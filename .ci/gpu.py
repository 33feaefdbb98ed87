"""Check and time PRISM beside SAK and a dense ViT, in one process, eager and compiled; .ci/gpu calls it.

    python .ci/gpu.py --size base
    python .ci/gpu.py --size toy --side 64 --batches 2 --repeats 1    # a rehearsal on a CPU
"""

import copy
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # first, as everywhere

# isort: split
import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prism

TEACHERS = dict.fromkeys(("dinov2", "clip", "sam"), 768)
TASKS = {"semseg": 21, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2}  # PASCAL-Context's


@dataclass
class Args:
    size: str = "base"
    side: int = 512  # of the image that is predicted, pixels; training sees 3/4 of it
    batches: tuple[int, ...] = (20, 64, 128)  # images of a training pass
    repeats: int = 10
    peak: float = 989  # TFLOP/s of an H100 or H200, bf16, dense


def build(cfg: prism.PrismConfig, device: torch.device) -> dict[str, prism.Student]:
    """Make all students, each eager and compiled, with the same weights and routers that listen."""
    torch.manual_seed(0)
    students = {}
    for name in ("prism", "sak", "dense"):
        student = prism.build(replace(cfg, student=name))
        for key, p in student.named_parameters():
            if "film" in key or "experts" in key:
                torch.nn.init.normal_(p, std=0.02)
        students[f"{name} eager"] = student.to(device)
        students[f"{name} compiled"] = copy.deepcopy(students[f"{name} eager"])
        students[f"{name} compiled"].compile_parts()
    return students


def measure(runs: dict, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Return per run its median ms, taking turns, and the memory that it takes beside all weights, GiB."""
    ms = prism.time_interleaved(runs, device, repeats)
    rows = {name: {"ms": ms[name]} for name in runs}
    for name, run in runs.items() if device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        rows[name]["GiB, weights not counted"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return rows


def predict(students: dict[str, prism.Student], images: torch.Tensor, repeats: int) -> None:
    """Check that a compiled student predicts what the eager one does; time both on one image."""
    with torch.no_grad():
        found = {name: student.eval().predict(images) for name, student in students.items()}
        for name in ("prism", "sak", "dense"):
            for task, x in found[f"{name} eager"].items():
                error = (found[f"{name} compiled"][task] - x).norm() / x.norm()
                assert error < 0.05, (name, task, error)  # bf16
        runs = {name: partial(student.predict, images) for name, student in students.items()}
        rows = measure(runs, images.device, repeats)
    prism.show(f"predict, one image of {images.shape[-1]} px, {len(TASKS)} tasks", rows)


def step(student: prism.Student, images: torch.Tensor, ids: torch.Tensor) -> None:
    out = student(images, ids)
    sum(x.float().square().mean() for maps in out.distilled.values() for x in maps).backward()
    student.zero_grad(set_to_none=True)


def train(students: dict[str, prism.Student], images: torch.Tensor, repeats: int, peak: float) -> None:
    """Time a pass forward and backward under the teachers' contexts, without teachers and optimizer."""
    B, ids = len(images), torch.arange(len(images)) % len(TEACHERS)
    runs = {name: partial(step, student.train(), images, ids) for name, student in students.items()}
    rows = measure(runs, images.device, repeats)
    for name, row in rows.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step(students[name.replace("compiled", "eager")], images[:3], ids[:3])
        tflop = counter.get_total_flops() / min(3, B) * B / 1e12
        row |= {"images/s": 1000 * B / row["ms"], "MFU, %": 1e5 * tflop / row["ms"] / peak}
    prism.show(f"train, {B} images of {images.shape[-1]} px", rows)


def main(args: Args) -> None:
    device = prism.choose_device(None)
    patch = prism.SIZES[args.size].patch
    side, small = args.side, args.side * 3 // 4
    cfg = replace(prism.SIZES[args.size], teachers=TEACHERS, tasks=TASKS, recompose="route",
                  grid=(side // patch, side // patch))
    students = build(cfg, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        predict(students, torch.rand(1, 3, side, side, device=device), args.repeats)
        for B in args.batches:
            train(students, torch.rand(B, 3, small, small, device=device), args.repeats, args.peak)


if __name__ == "__main__":
    data.exit_with_one_line(lambda: main(tyro.cli(Args, description=__doc__)), debug=True)
