# ruff: noqa
"""What experts gain in stage 1, by how much teachers conflict; run once for README.

    python study.py conflict --out FOLDER [--contest CONTEST]
    python study.py plot --out FOLDER

A row per run in FOLDER/<setting>-<student>-<seed>/row.json; what is there is not run again. One thread each.
"""

import data  # first

# isort: split
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw

import eval as scoring
import prism
import teachers
import train

THREE = ("toy-clip", "toy-dino", "toy-sam")
SETTINGS = {  # teachers of stage 1, and width of the student
    "three": (THREE, 96), "clip and dino": (("toy-clip", "toy-dino"), 96),
    "clip and sam": (("toy-clip", "toy-sam"), 96), "dino and sam": (("toy-dino", "toy-sam"), 96),
    "width 48": (THREE, 48), "width 24": (THREE, 24), "dino twice": (("toy-dino", "again=toy-dino"), 96),
}


@dataclass
class Args:
    study: tyro.conf.Positional[Literal["conflict", "plot"]]
    out: Path
    settings: tuple[str, ...] = ()  # default: all
    seeds: tuple[int, ...] = (0,)
    contest: Path | None = None  # whose stage 1 serves as "three"


# --------------------------------------------------------------------------------------------- conflict


def imitation(model, members: dict, images: torch.Tensor) -> dict[str, float]:
    """Return the mean over levels of the cosine of flattened maps, per teacher."""
    rows = scoring.fidelity(model, members, images)
    return {name: sum(v["cos_image"] for k, v in rows.items() if k.startswith(name)) / 4 for name in members}


def conflict(model, members: dict, batches: int = 8) -> float:
    """Return the mean cosine of the teachers' gradients on the blocks that they share, over pairs and batches."""
    world = data.open_data("world", "train", view="distill")
    shared, found = list(model.blocks.parameters()), []
    for b in range(batches):
        images = torch.stack([world[b * 32 + k, b, k]["image"] for k in range(32)]).float() / 255
        gradients = []
        for i, (name, teacher) in enumerate(members.items()):
            maps = model.distill(images, torch.full((32,), i))[name]
            loss = sum(map(train.map_loss, maps, teacher.features(images)))
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared)]))
        found += [F.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(gradients, 2)]
    return sum(found) / len(found)


def run_conflict(args: Args, setting: str, name: str, seed: int, folder: Path) -> dict:
    names, dim = SETTINGS[setting]
    toy, known = prism.SIZES["toy"], f"{name}-{seed}/deconstruct.pt"
    prism.SIZES["toy"] = replace(toy, dim=dim)
    file = folder / "deconstruct.pt"
    if setting == "three" and args.contest and (args.contest / known).exists():
        file = args.contest / known
    else:
        train.train(train.Args(stage="deconstruct", student=name, teachers=names, out_dir=folder, seed=seed,
                               device="cpu"))
    prism.SIZES["toy"] = toy
    model = prism.load(file)
    members = {name.split("=")[0]: teachers.load_teacher(name.split("=")[-1]) for name in names}
    val = data.open_data("world", "val")
    with torch.inference_mode():
        row = {"imitation": imitation(model, members, torch.stack([val[i]["image"] for i in range(256)]))}
    return row | ({"conflict": conflict(model, members)} if name == "dense" else {})


def plot(args: Args) -> None:
    """Draw margin over conflict, a point per setting and seed."""
    rows = [json.loads(file.read_text()) for file in args.out.glob("*/row.json")]
    rows = {(row["setting"], row["student"], row["seed"]): row for row in rows}
    points = {}
    for (setting, name, seed), row in rows.items():
        if name == "dense" and (setting, "prism", seed) in rows:
            better = rows[setting, "prism", seed]["imitation"]
            gain = sum(better[k] - v for k, v in row["imitation"].items()) / len(better)
            points.setdefault(setting, []).append((row["conflict"], gain))
    W, H, L, B = 760, 330, 70, 60
    canvas = Image.new("RGB", (W, H), "white")
    pen = ImageDraw.Draw(canvas)

    def at(x: float, y: float) -> tuple[float, float]:
        return L + (x + 0.25) / 1.4 * (W - L), H - B - (y + 0.001) / 0.014 * (H - B - 24)

    pen.line((*at(-0.25, 0), *at(1.15, 0)), (170, 170, 170))
    pen.line((*at(0, -0.001), *at(0, 0.013)), (170, 170, 170))
    for y in (0, 0.005, 0.01):
        data.write(pen, 8, at(0, y)[1], f"{y:+.3f}")
    for x in (-0.2, 0, 0.2, 0.4, 0.6, 0.8, 1):
        data.write(pen, at(x, 0)[0], H - B + 14, f"{x:+.1f}", anchor="mm")
    data.write(pen, W / 2, H - 16, "cosine of two teachers' gradients on the weights that a dense student shares",
               anchor="mm")
    data.write(pen, L + 8, 10, "mean cosine with the teachers: PRISM's less the dense student's")
    names = sorted(points, key=lambda name: -max(y for _, y in points[name]))
    for k, name in enumerate(names):
        for x, y in sorted(points[name]):
            print(f"{name}: {x:+.3f} {y:+.4f}")
            px, py = at(x, y)
            label = (px - 90, py) if x > 0.5 else (at(0.08, 0)[0], 40 + 22 * k)
            if x < 0.5:
                pen.line((px, py, label[0] - 4, label[1]), (170, 190, 230))
            pen.ellipse((px - 5, py - 5, px + 5, py + 5), (67, 99, 216))
        data.write(pen, *label, name)
    canvas.save(args.out / "conflict.png")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    if args.study == "plot":
        return plot(args)
    for seed, setting, name in itertools.product(args.seeds, args.settings or SETTINGS, ("dense", "prism")):
        folder = args.out / f"{setting}-{name}-{seed}".replace(" ", "-")
        if (folder / "row.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        row = {"setting": setting, "student": name, "seed": seed} | run_conflict(args, setting, name, seed, folder)
        (folder / "row.json").write_text(json.dumps(row))
        print(row, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
