"""Study: does the captioner look? Of a checkpoint, nats per token beside its own photo, beside another
photo, and with another photo's maps; --read: a decoder that first reads so many steps of captions alone.

    python captions.py --ckpt out/prismer.pt
    python captions.py --read 2400 --init out/prism.pt
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

import data
import prism
import train


@dataclass
class Args:
    ckpt: Path | None = None  # a captioner to ask
    init: Path = Path("out/prism.pt")  # the student of --read
    read: int = 0  # steps of captions alone before the stage's own
    seed: int = 0


@torch.no_grad()
def ask(model, pairs) -> dict[str, float]:
    predict, total, count = model.student.predict, {}, 0
    ways = {"own photo": (0, 0), "another photo": (1, 0), "another's maps": (0, 1)}
    for i in range(0, len(pairs), 32):
        batch = pairs.collate([pairs[k] for k in range(i, min(i + 32, len(pairs)))])
        known = (batch["tokens"][:, 1:] != data.PAD).sum().item()
        count += known
        for how, (photo, maps) in ways.items():
            model.student.predict = lambda x, tasks, maps=maps: predict(x.roll(maps, 0), tasks)
            logits = model(batch["image"].roll(photo, 0), batch["tokens"])
            nll = train.caption_terms(logits, batch["tokens"], 1)[1]["nll"].item()
            total[how] = total.get(how, 0) + known * nll
    return {how: round(nats / count, 4) for how, nats in total.items()}


def learn(module, optimizer, stage, order, loss) -> None:
    module.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = group.get("factor", 1) * train.lr_at(step, stage)
        loss(order[step * stage.batch_size : (step + 1) * stage.batch_size])["caption"][1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main(args: Args) -> None:
    train_pairs, pairs = (data.Captioned(data.open_data("world", split, size=(64, 64)), (64, 64))
                          for split in ("train", "val"))
    if args.ckpt:
        model = prism.load(args.ckpt)
        pairs.encode = model.encode
        return print(args.ckpt, ask(model, pairs))
    settings = train.Args(stage="caption", data="world", prismer_z=True, init=str(args.init))
    train.prepare(settings)
    stage, rng = train.choose_recipe(settings, "caption"), np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    model, _ = train.build_prismer(settings, str(args.init), train_pairs)
    pairs.encode = model.encode
    first = stage._replace(steps=args.read)
    texts = [model.encode(own[0]) for own in train_pairs.captions]
    nothing = torch.zeros(stage.batch_size, 1, model.cfg.trunk.dim)
    epochs = [math.ceil(recipe.steps * stage.batch_size / len(texts)) for recipe in (first, stage)]
    orders = [np.concatenate([rng.permutation(len(texts)) for _ in range(n)]) for n in epochs]

    def read(chosen):
        tokens = nn.utils.rnn.pad_sequence([texts[k] for k in chosen], True, data.PAD)
        return train.caption_terms(model.text(tokens, nothing), tokens, 1)[0]

    def look(chosen):
        batch = train_pairs.collate([train_pairs[int(k)] for k in chosen])
        return train.caption_terms(model(batch["image"], batch["tokens"]), batch["tokens"], 1)[0]

    reader = torch.optim.AdamW(model.text.parameters(), weight_decay=0.05, fused=True)
    learn(model, reader, first, orders[0], read)
    learn(model, train.build_optimizer(model, stage, True), stage, orders[1], look)
    model.eval()
    print(f"{args.read} steps of captions alone, {stage.steps} with photos:", ask(model, pairs))


if __name__ == "__main__":
    main(tyro.cli(Args))
