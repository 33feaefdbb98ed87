"""Study: do the maps that a captioner reads pay? Trains and scores one arm; see OUT/ARM-SEED/captions.json.

    python captions.py --arm depth66 --seed 1 --init out/prism.pt
    python captions.py --arm probe                                 # what the student's tokens hold
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import data
import eval as scoring
import prism
import teachers
import train

ALL = ("depth", "normals", "edge", "sal", "semseg")
ARMS = {"none": (), "depth": ALL[:1], "two": ALL[:2], "four": ALL[:4], "all": ALL, "truth": ALL,
        "shuffled": ALL, "noise": (*ALL, "noise"),
        "depth33": ALL[:1], "depth66": ALL[:1], "depth100": ALL[:1]}
SIZE = (64, 64)


@dataclass
class Args:
    arm: str  # of ARMS; truth: labels for maps, shuffled: another photo's maps, depth33: 33 % noise; or probe
    seed: int = 0
    init: Path = Path("out/prism.pt")  # the student
    out: Path = Path("out/captions")
    steps: int | None = None  # default: the recipe's
    told: int = 128  # unseen rooms that are told


def by_photo() -> dict:
    """Find a room by its photo: {digest: (dataset, index)}."""
    rooms = [data.open_data("world", split, size=SIZE) for split in ("train", "val")]
    return {digest(data.squeeze(world.read(i, False)["image"], SIZE)): (world, i)
            for world in rooms for i in range(len(world))}


def digest(image: Tensor) -> int:
    return hash(image.numpy().tobytes())


def true_maps(rooms: dict, images: Tensor) -> dict[str, Tensor]:
    """Return the labels of photos as a perfect student's raw outputs."""
    found = [rooms[digest(image)] for image in images]
    rows = [data.to_tensors({k: v for k, v in world.read(i).items() if k in ("image", *ALL)}, SIZE)
            for world, i in found]
    y = {task: torch.stack([row[task] for row in rows]) for task in ALL}
    known = {task: y[task].masked_fill(y[task] == data.IGNORE, 0) for task in ("semseg", "normals")}
    classes = {task: 20.0 * F.one_hot(x, n).permute(0, 3, 1, 2)
               for task, x, n in (("semseg", known["semseg"], len(data.CLASSES)), ("sal", y["sal"], 2))}
    edge = 20 * (2 * y["edge"].unsqueeze(1) - 1)
    return classes | {"edge": edge, "normals": known["normals"], "depth": y["depth"].unsqueeze(1)}


def changed(arm: str, predict):
    """Put other maps in the place of the student's."""
    rooms = by_photo() if arm == "truth" else {}
    share = int(arm.removeprefix("depth") or 0) / 100 if arm.startswith("depth") else 0

    def other(images: Tensor, tasks) -> dict[str, Tensor]:
        if arm == "truth":
            return true_maps(rooms, images)
        raw = predict(images, [task for task in tasks if task != "noise"])
        if arm == "shuffled":
            return {task: x.roll(1, 0) for task, x in raw.items()}
        if arm == "noise":
            return raw | {"noise": torch.rand_like(raw["depth"])}
        if share:  # of the pixels
            x = raw["depth"]
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            noise = low + (high - low) * torch.rand_like(x)
            return {"depth": torch.where(torch.rand_like(x) < share, noise, x)}
        return raw
    return other


def probe(args: Args) -> None:
    """Tell which phrases ("red ball") a room has from the student's tokens: a linear map to words, summed
    over a phrase's words; its best patch counts. Prints how many of a room's k phrases are among its k best."""
    student, rooms, captions = prism.load(args.init), {}, []
    for split in ("train", "val"):
        world = data.open_data("world", split, size=SIZE)
        images = torch.stack([data.squeeze(world.read(i, False)["image"], SIZE) for i in range(len(world))])
        with torch.no_grad():
            levels = [student.features(part, student.contexts[0])[3] for part in images.split(64)]
        rooms[split] = torch.cat(levels).flatten(2).transpose(1, 2)  # (B, 64, D)
        captions += [world.captions[name]["caption"] for name in world.ids]
    has, _, words = teachers.caption_tables(captions)
    x, n = rooms["train"], len(rooms["train"])
    mean, std = x.mean((0, 1)), x.std((0, 1))
    torch.manual_seed(args.seed)
    score = nn.Linear(x.shape[-1], words.shape[1])
    scale, bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((len(words),), -3.0))
    optimizer = torch.optim.AdamW([*score.parameters(), scale, bias])

    def logits(x: Tensor) -> Tensor:
        return scale * (score((x - mean) / std) @ words.float().t()).amax(1) + bias

    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 600)
        rows = torch.randint(0, n, (64,))
        F.binary_cross_entropy_with_logits(logits(x[rows]), has[rows].float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    true, often = has[n:], has[:n].float().mean(0)
    for how, told in (("probe", logits(rooms["val"])), ("the most frequent", often.expand(len(true), -1))):
        hits = sum(y[row.topk(int(y.sum())).indices].sum() for row, y in zip(told, true, strict=True))
        print(f"{how}: {100 * hits / true.sum():.1f} % of the phrases")


def main(args: Args) -> None:
    if args.arm == "probe":
        return probe(args)
    maps, init = ARMS[args.arm], prism.Prismer.__init__
    data.TASKS["noise"] = data.TASKS["depth"]

    def with_other_maps(self, cfg) -> None:
        init(self, replace(cfg, maps=maps))
        self.student.predict = changed(args.arm, self.student.predict)

    prism.Prismer.__init__ = with_other_maps
    out = args.out / f"{args.arm}-{args.seed}"
    train.main(train.Args(
        stage="caption", data="world", caption_experts=tuple(task for task in maps if task in ALL),
        prismer_z=not maps, init=str(args.init), out_dir=out, seed=args.seed, steps=args.steps, processes=1))
    torch.manual_seed(0)
    scoring.score_captions(scoring.Args(ckpt=out / "prismer.pt", analysis=args.told), "world")


if __name__ == "__main__":
    main(tyro.cli(Args))
