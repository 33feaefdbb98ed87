"""train.py with random weights in place of every named teacher's: its shape and cost, nothing is fetched."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # first, as everywhere

# isort: split
import torch
import tyro
from torch import nn

import teachers
import train

SHAPES = {  # what no short name tells: flags of a family
    "dinov2": {"prefix": 1, **teachers.DINO_FLAGS}, "clip": {"prefix": 1, **teachers.CLIP_FLAGS},
    "sam": {"window": 14, **teachers.IMAGENET},
}


def load_teacher(name: str, size: int | None = None, device: str | torch.device = "cpu") -> teachers.Teacher:
    """Make a frozen teacher of a named one's shape."""
    source, flags = teachers.SOURCES[name], SHAPES[name.partition("-")[0]]
    side = source.pixels // source.patch
    quarters = tuple((k + 1) * source.depth // 4 - 1 for k in range(4)) if "window" in flags else ()
    torch.manual_seed(0)
    encoder = teachers.Encoder(teachers.EncoderConfig(
        source.width, source.depth, teachers.HEADS.get(source.width) or source.width // 64, 4 * source.width,
        source.patch, (side, side), global_blocks=quarters, **flags))
    for p in encoder.parameters():
        nn.init.trunc_normal_(p, std=0.02)
    return teachers.Teacher(encoder, size, {"kind": "random weights"}).to(device)


if __name__ == "__main__":
    teachers.load_teacher = load_teacher
    args = tyro.cli(train.Args)
    data.exit_with_one_line(lambda: train.main(args), args.debug)
