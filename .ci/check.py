"""Check what the main job left in a folder: numbers above their floors, losses that fell, pictures, routing.

A floor is the best that can be said without looking at the image: at each pixel the class that is commonest
there in the training labels, or their mean.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import eval as scoring
import prism


class Floor:
    """Predicts the same for every image."""

    def __init__(self, dataset):
        samples, self.maps = [dataset[i] for i in range(len(dataset))], {}
        for task, channels in dataset.tasks.items():
            y, kind = torch.stack([sample[task] for sample in samples]), data.TASKS[task].kind
            y = y.unsqueeze(1) if y.ndim == 3 else y  # (B, C, H, W)
            known = y != data.IGNORE
            if kind in ("classes", "mask"):
                y = F.one_hot(y[:, 0] * known[:, 0], channels).movedim(3, 1)
            mean = (y * known).sum(0) / known.sum(0).clamp(min=1)
            raw = {"edge": lambda p: p.clamp(1e-4).logit(), "mask": lambda p: p.clamp(1e-4).log()}
            self.maps[task] = raw.get(kind, lambda p: p)(mean)

    def eval(self):
        return self

    def predict(self, images, tasks):
        return {task: self.maps[task].float().expand(len(images), -1, -1, -1) for task in tasks}


def main():
    out = Path(sys.argv[1])
    results = json.loads((out / "results.json").read_text())
    headline = results["headline"]
    print(headline)
    train, val = (data.open_data("world", split, train=False) for split in ("train", "val"))
    floors = scoring.evaluate(Floor(train), val, "cpu", 64, list(val.tasks))
    floors = {task: scoring.headline(task, value) for task, value in floors.items()}
    # What one teacher gives to a linear probe (README), less what another seed or machine may take.
    aims = {"semseg": 26, "human_parts": 17, "sal": 58, "edge": 45, "normals": 20, "depth": 0.95}
    prism.show("task", {task: {"student": value, "floor": floors[task], "asked of it": aims[task]}
                        for task, value in headline.items()})
    assert headline.keys() == aims.keys(), headline.keys()
    for task, value in headline.items():
        sign = -1 if data.TASKS[task].lower_is_better else 1
        asked = max(sign * floors[task], sign * aims[task])
        assert math.isfinite(value) and sign * value > asked, (task, value)

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for stage in ("deconstruct", "recompose"):
        first, *_, last = [row for row in rows if row["stage"] == stage]
        assert last["loss"] < 0.8 * first["loss"], (stage, first["loss"], last["loss"])

    model = prism.load(out / "prism.pt")
    assert len(results["routing"]) == 4 and set(model.cfg.tasks) == headline.keys()
    for block in results["routing"]:
        for row in (*block["teachers"].values(), *block["tasks"].values()):
            assert abs(sum(row) - 1) < 1e-6 and len(row) == model.cfg.experts, row
    for name in ("predictions.png", "routing.png"):
        with Image.open(out / name) as picture:
            greys = set(picture.convert("L").resize((64, 64)).tobytes())
            assert min(picture.size) > 300 and len(greys) > 10, name
    print("ok")


if __name__ == "__main__":
    main()
