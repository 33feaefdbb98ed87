"""Two studies of the toy world, run once for README; they need the main job's out/ and a contest's folder.

    python study.py conflict --out FOLDER --contest CONTEST    # stage 1: what experts gain, by how much teachers conflict
    python study.py caption --out FOLDER --student out/prism.pt   # does it help Prismer to read the student's maps?

A row per run in FOLDER/<setting>-<student>-<seed>.json; what is there is not run again. One thread each.
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

import eval as scoring
import prism
import teachers
import train

SETTINGS = {  # teachers of stage 1, and width of the student
    "three": (("toy-clip", "toy-dino", "toy-sam"), 96),
    "clip and dino": (("toy-clip", "toy-dino"), 96),
    "clip and sam": (("toy-clip", "toy-sam"), 96),
    "dino and sam": (("toy-dino", "toy-sam"), 96),
    "narrow": (("toy-clip", "toy-dino", "toy-sam"), 48),
}
MAPS = train.Args.caption_experts


@dataclass
class Args:
    study: tyro.conf.Positional[Literal["conflict", "caption"]]
    out: Path
    settings: tuple[str, ...] = ()  # default: all; of caption: maps, none
    seeds: tuple[int, ...] = (0, 1, 2)
    contest: Path | None = None  # whose stage 1 serves as "three"
    student: Path = Path("out/prism.pt")


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
        train.train(
            train.Args(
                stage="deconstruct", student=name, teachers=names, out_dir=folder, seed=seed, device="cpu"
            )
        )
    prism.SIZES["toy"] = toy
    model, members = prism.load(file), {name: teachers.load_teacher(name) for name in names}
    val = data.open_data("world", "val")
    with torch.inference_mode():
        row = {
            "imitation": imitation(
                model, members, torch.stack([x["image"] for x in map(val.__getitem__, range(256))])
            )
        }
    return row | ({"conflict": conflict(model, members)} if name == "dense" else {})


def true_maps(world, rows) -> dict[str, torch.Tensor]:
    """Return the labels as raw outputs of heads (B, C, H, W)."""
    raw = {}
    for task in MAPS:
        y = torch.stack([world[i][task] for i in rows])
        known, kind = torch.where(y == data.IGNORE, 0, y), data.TASKS[task].kind
        raw[task] = (
            20.0 * F.one_hot(known, world.tasks[task]).movedim(3, 1)
            if kind in ("classes", "mask")
            else 20 * known[:, None] - 10
            if kind == "edge"
            else known
            if kind == "normals"
            else known[:, None]
        )
    return raw


@torch.inference_mode()
def nats(model, pairs, world, how: str) -> float:
    """Score all captions with the maps as they are, of another image, with pixels at random, or the labels."""
    total, count, draw, predict = 0.0, 0, torch.Generator().manual_seed(0), model.student.predict
    for start in range(0, len(pairs), 32):
        rows = range(start, min(start + 32, len(pairs)))

        def maps(images, tasks, rows=rows):
            raw = true_maps(world, rows) if how == "labels" else predict(images, tasks)
            if how == "another image's":
                raw = {task: x.roll(1, 0) for task, x in raw.items()}
            if how == "noise":
                raw = {
                    task: x.flatten()[torch.randperm(x.numel(), generator=draw)].view_as(x)
                    for task, x in raw.items()
                }
            return raw

        batch = pairs.collate([pairs[i] for i in rows])
        model.student.predict = maps
        logits = model(batch["image"], batch["tokens"])
        known = (batch["tokens"][:, 1:] != data.PAD).sum().item()
        total += known * train.caption_terms(logits, batch["tokens"], 1)[1]["nll"].item()
        count += known
    model.student.predict = predict
    return total / count


def run_caption(args: Args, setting: str, seed: int, folder: Path) -> dict:
    train.train(
        train.Args(
            stage="caption",
            out_dir=folder,
            init=str(args.student),
            seed=seed,
            device="cpu",
            prismer_z=setting == "none",
            log_every=100,
        )
    )
    model, world = prism.load(folder / "prismer.pt"), data.open_data("world", "val")
    pairs = data.Captioned(world, (64, 64), model.encode)
    ways = ("its own", "another image's", "noise", "labels") if setting == "maps" else ("its own",)
    row = {"nats": {how: nats(model, pairs, world, how) for how in ways}}
    images = torch.stack([pairs[i]["image"] for i in range(128)])
    texts = [text for part in images.split(32) for text in model.caption(part, 1)]
    true = [texts[0] for texts in pairs.captions[:128]]
    return row | {
        "CIDEr-D": scoring.cider_d(texts, [[t] for t in true]),
        "facts": scoring.score_facts(texts, true),
    }


def main(args: Args) -> None:
    torch.set_num_threads(1)
    arms = (
        itertools.product(args.seeds, args.settings or SETTINGS, ("dense", "prism"))
        if args.study == "conflict"
        else itertools.product(args.seeds, args.settings or ("maps", "none"), ("",))
    )
    for seed, setting, name in arms:
        folder = args.out / f"{setting}-{name}-{seed}".replace(" ", "-")
        if (folder / "row.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        row = (
            run_conflict(args, setting, name, seed, folder)
            if args.study == "conflict"
            else run_caption(args, setting, seed, folder)
        )
        row = {"setting": setting, "student": name, "seed": seed} | row
        (folder / "row.json").write_text(json.dumps(row))
        print(row, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
