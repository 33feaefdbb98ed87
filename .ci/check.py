"""Check what the main job left in a folder: numbers above a floor, losses that fell, pictures, routing."""

import json
import math
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prism

out = Path(sys.argv[1])
results = json.loads((out / "results.json").read_text())
headline = results["headline"]
print(headline)
# Below what three seeds reached (README), above what an untrained ViT's probe or plain background gets.
floors = {"semseg": 16, "human_parts": 13.9, "sal": 48, "edge": 32}
ceilings = {"normals": 25, "depth": 1.3}
assert headline.keys() == floors.keys() | ceilings.keys(), headline.keys()
for task, value in headline.items():
    assert math.isfinite(value), (task, value)
    assert value > floors.get(task, -math.inf) and value < ceilings.get(task, math.inf), (task, value)

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
