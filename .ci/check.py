"""Check what the main job left in a folder: numbers above floors, losses that fell, pictures, routing."""

import json
import math
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import prism


def main():
    out = Path(sys.argv[1])
    results = json.loads((out / "results.json").read_text())
    headline = results["headline"]
    print(headline)
    floors = results["floor"]
    # What one teacher gives to a linear probe (README), less what another seed or machine may take.
    aims = {"semseg": 26, "human_parts": 17, "sal": 58, "edge": 58, "normals": 20, "depth": 0.95}
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
    for name in ("predictions.png", "experts.png", "losses.png"):
        with Image.open(out / name) as picture:
            greys = set(picture.convert("L").resize((64, 64)).tobytes())
            assert min(picture.size) > 300 and len(greys) > 10, name
    print("ok")


if __name__ == "__main__":
    main()
