"""What is proven, on CPU, without network: the dispatch, the student, the losses, training and resume, the
world and its files, transforms, the loader, toy and real teachers, downloads, metrics, command lines.

Wherever it is possible a number is reached in two independent ways. A docstring names the bug that its
test would catch.
"""

import colorsys
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage, optimize, sparse
from scipy.io import loadmat, savemat
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as scoring
import prism
import teachers
import train

torch.set_num_threads(1)  # many small products: two threads only wait for each other

TASKS = {"semseg": 12, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2, "depth": 1}
TINY = prism.PrismConfig(
    dim=24, depth=5, heads=2, patch=8, grid=(4, 4), moe_blocks=(1, 2, 3, 4), experts=5, top_k=2,
    mlp_ratio=2.0, expert_ratio=2.0, teachers={"clip": 16, "dino": 24, "sam": 8}, tasks=TASKS,
)


def student(**changes) -> prism.Prism:
    """Build a tiny student whose routers listen and whose experts differ."""
    torch.manual_seed(0)
    model = prism.build(replace(TINY, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "film" in name or "experts" in name or "embed" in name:
                p.normal_(std=0.3)
    return model.eval()


# ------------------------------------------------------------------------------------------- dispatch


def routing_case(name: str, T: int, E: int, K: int) -> torch.Tensor:
    if name == "one expert":
        return torch.full((T, K), 3)
    if name == "empty experts":  # ids 1 and 4 only
        return torch.tensor([1, 4]).repeat(T, 1)[:, torch.randperm(2)]
    return torch.rand(T, E).topk(K).indices


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    "case, T", [("random", 57), ("empty experts", 31), ("one expert", 20), ("random", 3)]
)
def test_dispatch_equals_plain(case, T, official):
    """Catches rows that reach the wrong expert or weight, and gradients lost in gather or scatter."""
    torch.manual_seed(1)
    E, K, D = 6, 2, 10
    experts = prism.Experts(E, D, 4 * D, official).double()
    for b in (experts.b1, experts.b2):
        torch.nn.init.normal_(b)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    topk_w = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    topk_idx = routing_case(case, T, E, K)
    results = []
    for run in (experts.plain, experts.forward):
        y = run(x, topk_idx, topk_w)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, topk_w, *experts.parameters()])])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    unused = sorted(set(range(E)) - set(topk_idx.flatten().tolist()))
    assert results[1][3][unused].abs().sum() == 0  # an empty expert gets a zero gradient, not none


def test_plain_is_the_formula():
    """Catches an error that `plain` and the dispatch share: one token, worked through by hand."""
    experts = prism.Experts(3, 4, 8).double()
    x, topk_idx = torch.randn(1, 4, dtype=torch.float64), torch.tensor([[2, 0]])
    topk_w = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    expected = sum(
        w * (experts.w2[e] @ F.gelu(experts.w1[e] @ x[0] + experts.b1[e]) + experts.b2[e])
        for w, e in ((0.7, 2), (0.3, 0))
    )
    torch.testing.assert_close(experts.plain(x, topk_idx, topk_w)[0], expected)


def test_grouped_path_equals_loop_of_products():
    """Catches the GPU's grouped products treating empty groups or biases otherwise than the CPU's loop."""
    torch.manual_seed(2)
    experts = prism.Experts(6, 16, 32)
    for b in (experts.b1, experts.b2):
        torch.nn.init.normal_(b)
    expert = torch.tensor([1] * 5 + [2] * 7 + [5] * 4)
    ends = torch.tensor([0, 5, 12, 12, 12, 16], dtype=torch.int32)
    rows = torch.randn(16, 16, requires_grad=True)
    results = []
    one_hot, weights = F.one_hot(expert, 6).float(), (experts.w1, experts.b1, experts.w2, experts.b2)
    for y in (prism.expert_mlps(rows, ends, *weights)[0], experts._grouped(rows, ends, one_hot, *weights)):
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [rows, *experts.parameters()])])
    for split, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, split, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_compiled_block_equals_eager_without_a_graph_break(dtype, close):
    """Catches a graph break in the block, and torch.compile losing the gradient of a custom function or
    operator (seen in torch 2.11)."""
    block, x, context = student().blocks[1], torch.randn(2, 17, 24), torch.randn(6, 24)
    results = []
    for run in (block, torch.compile(block, fullgraph=True)):
        inputs = [t.clone().requires_grad_() for t in (x, context)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y, route = run(*inputs)
        loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + (route.prob**2).sum()
        wanted = [p for name, p in block.named_parameters() if "noise" not in name]
        results.append([y, *torch.autograd.grad(loss, [*inputs, *wanted])])
    for eager, compiled in zip(*results, strict=True):
        assert eager.norm() > 0 and (compiled - eager).norm() < close * eager.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_block_never_asks_the_device(autocast):
    """Catches a step of the block that needs a number from the device (.item(), nonzero, masks): tensors
    without content have none to give. A GPU would wait for it, once per block."""
    block, mode = student().blocks[1].train(), FakeTensorMode()
    weights = {name: mode.from_tensor(p).requires_grad_() for name, p in block.named_parameters()}
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs = torch.randn(2, 17, 24), torch.randn(6, 24)
        y, route = torch.func.functional_call(block, weights, inputs)
        (y.float().square().sum() + route.prob.sum()).backward()
        rows, ends = torch.randn(68, 24, requires_grad=True), torch.empty(5, dtype=torch.int32)
        stacked = (weights[f"experts.{name}"] for name in ("w1", "b1", "w2", "b2"))
        prism.Experts._grouped(rows, ends, torch.randn(68, 5), *stacked).sum().backward()
    assert all(p.grad.shape == p.shape for p in weights.values()) and rows.grad.shape == rows.shape
    with pytest.raises(DataDependentOutputException), mode:
        torch.randn(3).sum().item()


def test_bench_prints_ratios_beside_what_flops_say(capsys, monkeypatch):
    """Catches a variant that computes something else, or an operator that the FLOP counter does not see."""
    args = prism.Args(bench=True, device="cpu", tokens=60, dim=32, experts=4, top_k=2, repeats=1)
    device = torch.device("cpu")
    works = prism.expert_works(args, device)
    one = 3 * 2 * 60 * 2 * 2 * 32 * 128  # forward and twice that backward, 60 * 2 rows, two matrices
    flops = {name: prism.count_flops(work) for name, work in works.items()}
    assert flops.pop("all experts on all tokens") == pytest.approx(2 * one, rel=0.01)
    assert set(flops.values()) == {one}
    outputs = [w.run() for name, w in works.items() if "masked" not in name and "ideal" not in name]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-4, atol=1e-6)
    quick = functools.partial(torch.compile, backend="aot_eager")  # no machine code: seconds, not a minute
    monkeypatch.setattr(torch, "compile", quick)
    for compiled in (False, True):
        prism.main(replace(args, compile=compiled))
        out = capsys.readouterr().out
        assert all(word in out for word in ("masked loop", "dual stream", "top-k doubled", "kept MiB"))
        assert ("compiled" if compiled else "eager") in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dispatch_on_a_gpu():
    """Catches what only a GPU has: bf16 grouped kernels with T*K not a multiple of 8, poisoned memory in
    empty groups, waiting for the device, results that change from run to run."""
    torch.manual_seed(0)
    experts = prism.Experts(15, 64, 256).cuda()
    x = torch.randn(1013, 64, device="cuda", requires_grad=True)
    topk_w, topk_idx = torch.rand(1013, 9, device="cuda").topk(3)  # experts 9 to 14 get nothing
    plain = torch.autograd.grad(experts.plain(x, topk_idx, topk_w).square().sum(), [x, *experts.parameters()])
    runs = []
    for run in (experts, experts, torch.compile(experts, fullgraph=True)):
        torch.full((2**26,), float("nan"), device="cuda")  # what freed memory holds
        for debug in ("default", "error"):
            torch.cuda.set_sync_debug_mode(debug)
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(x, topk_idx, topk_w).square().sum()
            grads = torch.autograd.grad(loss, [x, *experts.parameters()])
        torch.cuda.set_sync_debug_mode("default")
        runs.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
    for grads in runs:
        assert all((a - b).norm() < 0.02 * b.norm() for a, b in zip(grads, plain, strict=True))


# -------------------------------------------------------------------------------------------- student


@pytest.mark.parametrize("official", [False, True])
def test_dual_stream_block_equals_the_equation(official):
    """Catches a wrong mix of the streams: the block against its equation, token by token, in float64."""
    model = student(official=official).double()
    block, cfg = model.blocks[2], model.cfg
    x, context = torch.randn(2, 17, cfg.dim).double(), torch.randn(2, cfg.dim).double()
    with torch.no_grad():
        y, _ = block(x, context)
        h = x + block.attn(block.norm1(x))
        for i, n in ((0, 0), (1, 5), (1, 16)):
            u = block.norm2(h[i, n])
            lam = torch.sigmoid(block.gate.weight[0] @ u + block.gate.bias[0])
            gamma, beta = (block.router.film.weight @ context[i] + block.router.film.bias).split(cfg.dim)
            z = (1 + gamma) * u + beta
            if official:
                lam = 0.5 + 0.5 * lam
                z = u + torch.sigmoid(block.router.film_gate(u)) * (gamma * u + beta)
            logits = block.router.logits(z)
            kept = logits.topk(cfg.top_k)
            routed = 0
            for w, e in zip(kept.values.softmax(0), kept.indices, strict=True):
                inside = w * u if official else u
                hidden = F.gelu(block.experts.w1[e] @ inside + block.experts.b1[e])
                routed = routed + w * (block.experts.w2[e] @ hidden + block.experts.b2[e])
            expected = h[i, n] + lam * block.anchor(u) + (1 - lam) * (block.shared(u) + routed)
            torch.testing.assert_close(y[i, n], expected)


@pytest.mark.parametrize("without", [("anchor",), ("shared",), ("film",), ("context",), ("anchor", "film")])
def test_ablated_block_equals_its_equation(without):
    """Catches a switch that switches something else, a gate that stays without its anchor, an embedding that
    is not concatenated but added, a context that leaks."""
    model = student(without=without).double()
    block, cfg = model.blocks[2], model.cfg
    x, context = torch.randn(2, 17, cfg.dim).double(), torch.randn(2, cfg.dim).double()
    with torch.no_grad():
        y, route = block(x, None if "context" in without else context)
        h = x + block.attn(block.norm1(x))
        u = block.norm2(h)
        heard = u
        if "film" in without:  # one matrix on [u, c]
            matrix = torch.cat([block.router.logits.weight, block.router.concatenated.weight], 1)
            both = torch.cat([u, context.unsqueeze(1).expand_as(u)], -1)
            logits = both @ matrix.T + block.router.logits.bias
        else:
            if "context" not in without:
                gamma, beta = block.router.film(context).unsqueeze(1).chunk(2, -1)
                heard = (1 + gamma) * u + beta
            logits = block.router.logits(heard)
        kept, idx = logits.topk(cfg.top_k)
        routed = block.experts.plain(u.flatten(0, 1), idx.flatten(0, 1), kept.softmax(-1).flatten(0, 1))
        routed = routed.view_as(u)
        lam = 0 if "anchor" in without else torch.sigmoid(block.gate(u))
        shared = 0 if "shared" in without else block.shared(u)
        anchor = 0 if "anchor" in without else block.anchor(u)
        torch.testing.assert_close(y, h + lam * anchor + (1 - lam) * (shared + routed))
        assert torch.equal(route.topk_idx, idx)
    gone = {"anchor": ("gate", "anchor"), "shared": ("shared",), "film": ("film",), "context": ("film",)}
    names = {name.split(".")[-2] for name, _ in block.named_parameters()} | set(dict(block.named_children()))
    assert names.isdisjoint({part for word in without for part in gone[word]})


def test_controls_are_what_they_are_called():
    """Catches a wide student of other active width than PRISM's, a dense one that hears the context, a moe
    with a stream or an embedding of PRISM's left in."""
    images, ids = torch.rand(3, 3, 32, 32), torch.tensor([1, 0, 2])
    models = {kind: student(student=kind) for kind in ("prism", "dense", "wide", "moe")}
    assert [b.mlp[0].out_features for b in models["wide"].blocks] == [48] + [48 * (2 + TINY.top_k)] * 4
    assert [b.mlp[0].out_features for b in models["dense"].blocks] == [48] * 5
    with torch.no_grad():
        for kind, model in models.items():
            a, b = model.features(images, "clip"), model.features(images, "depth")
            same = [torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True)]
            assert same == [kind != "prism"] * 4, kind
            assert {k: v.shape for k, v in model.predict(images).items()} == {
                k: (3, c, 32, 32) for k, c in TASKS.items()}
            maps = model.distill(images, ids)
            assert [maps[name][3].shape for name in maps] == [(1, w, 4, 4) for w in TINY.teachers.values()]
        alone = models["dense"].distill(images[1:2], ids[1:2])["clip"]
        torch.testing.assert_close(models["dense"].distill(images, ids)["clip"][2], alone[2])
    names = {name for name, _ in models["moe"].named_parameters()}
    assert not [n for n in names if re.search("anchor|shared|gate|film|(task|teacher)_embed", n)]
    block, u = models["moe"].blocks[1], torch.randn(7, 24)
    idx, w = torch.rand(7, 5).topk(2).indices, torch.rand(7, 2)
    torch.testing.assert_close(block.experts(u, idx, w), block.experts.plain(u, idx, w))
    for changes, why in (({"without": ("gate",)}, "parts are anchor, shared, film, context"),
                         ({"student": "dense", "without": ("film",)}, "dense has no such parts"),
                         ({"gate_start": 1.0}, "gate_start 1.0 must lie between 0 and 1")):
        with pytest.raises(ValueError, match=why):
            prism.build(replace(TINY, **changes))


def test_new_student_is_symmetric_and_fades_experts_in():
    """Catches a router that hears the context at birth, experts that are no copies, a gate not at 0.94."""
    torch.manual_seed(0)
    model = prism.Prism(TINY).eval()
    images = torch.rand(2, 3, 32, 32)
    for a, b in zip(model.features(images, "clip"), model.features(images, "edge"), strict=True):
        assert torch.equal(a, b)
    block = model.blocks[1]
    assert all(torch.equal(w, block.anchor[0].weight) for w in block.experts.w1)
    gate = model.route(images, "clip")[0].gate
    assert abs(gate.mean().item() - 0.94) < 0.01


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid, size", [((3, 5), (24, 40)), ((4, 4), (64, 64)), ((3, 4), (40, 36))])
def test_head_equals_its_definition(grid, size, training):
    """Catches taps, shifts or borders that differ from enlarging and convolving, a bias that the border
    loses, batch norm folded wrongly, gradients lost."""
    torch.manual_seed(3)
    head = prism.Head(8, 3).double().train(training)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    head.fuse[1].running_mean.normal_()
    head.fuse[1].running_var.uniform_(0.5, 2)
    levels = [torch.randn(2, 8, *grid, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    results = []
    for run in (head.plain, head.forward):
        y = run(levels, size)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [*levels, *head.parameters()])])
    assert results[0][0].shape == (2, 3, *size)
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)  # maps are enlarged in float32


def test_predict_in_one_pass_equals_task_by_task():
    """Catches tasks or images that swap places in the batch of all tasks, and a prefix shared too far."""
    model, images = student(), torch.rand(3, 3, 40, 24)  # also another grid than the position table's
    together = model.predict(images)
    assert {t: tuple(p.shape) for t, p in together.items()} == {t: (3, c, 40, 24) for t, c in TASKS.items()}
    for task in TASKS:
        alone = torch.cat([model.predict(images[i : i + 1], [task])[task] for i in range(3)])
        torch.testing.assert_close(together[task], alone, rtol=1e-4, atol=1e-5)
    assert (together["semseg"][:, :1] - together["depth"]).abs().max() > 1e-3


def test_training_pass_equals_separate_passes():
    """Catches levels of one context handed to another's head or projector."""
    model, images = student(), torch.rand(4, 3, 32, 32)
    ids = torch.tensor([2, 0, 2, 1])
    out = model(images, ids, ["edge", "sal"])
    names = [list(TINY.teachers)[i] for i in ids]
    for level, expected in zip(out.levels, model.features(images, names), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
    alone = model.predict(images, ["sal"])["sal"]
    torch.testing.assert_close(out.predicted["sal"], alone, rtol=1e-4, atol=1e-5)
    sam = model.distill(images[[0, 2]], torch.tensor([2, 2]))["sam"]
    for a, b in zip(out.distilled["sam"], sam, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert out.distilled["sam"][0].shape == (2, 8, 4, 4)


def test_only_the_router_sees_the_context():
    """Catches a context that leaks into attention, anchor, gate or shared expert."""
    model, images = student(), torch.rand(2, 3, 32, 32)
    assert (model.features(images, "clip")[0] - model.features(images, "sam")[0]).abs().max() > 1e-3
    for i in TINY.moe_blocks:  # experts that answer 0 leave the context no other way
        torch.nn.init.zeros_(model.blocks[i].experts.w2)
        torch.nn.init.zeros_(model.blocks[i].experts.b2)
    for a, b in zip(model.features(images, "clip"), model.features(images, "edge"), strict=True):
        assert torch.equal(a, b)


def test_hidden_experts_still_give_weights():
    """Catches NaN weights where fewer than K experts are visible to a token."""
    model = student(expert_drop=1.0).train()
    route = model.route(torch.rand(1, 3, 32, 32), "clip")[0]
    assert torch.isfinite(route.topk_w).all()
    torch.testing.assert_close(route.topk_w.sum(-1), torch.ones(1, 17))


def test_position_table_resizes():
    """Catches rows and columns swapped in the table: a table that codes its row keeps doing so."""
    rows = torch.arange(4.0).repeat_interleave(6).view(1, 24, 1)
    table = torch.cat([torch.full((1, 1, 1), 9.0), rows], 1)
    bigger = prism.resize_pos(table, (4, 6), (8, 3))
    assert bigger.shape == (1, 25, 1) and bigger[0, 0, 0] == 9
    grid = bigger[0, 1:, 0].view(8, 3)
    assert (grid.diff(dim=0) > 0).all() and grid.diff(dim=1).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{}, {"student": "moe"}, {"student": "dense"}, {"student": "wide"},
                                     {"without": ("anchor",)}, {"without": ("film", "shared")},
                                     {"without": ("film", "context")}])
@pytest.mark.parametrize("stage", ["deconstruct", "recompose"])
def test_every_parameter_gets_a_gradient(stage, changes):
    """Catches a module that no loss reaches: DDP would wait for it for ever."""
    torch.manual_seed(0)
    tasks = TASKS if stage == "recompose" else {}
    model = student(tasks=tasks, **changes).train()
    batch = fake_batch(4)
    targets = {t: [torch.randn(n, width, 4, 4) for _ in range(4)]
               for (t, width), n in zip(TINY.teachers.items(), (2, 2, 0), strict=True)}
    out = model(batch["image"], torch.tensor([0, 1, 1, 0]), tuple(tasks))
    terms = train.loss_terms(out, targets, batch, model.cfg, 1.0)
    sum(w * t for w, t in terms.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    silent = [n for n, p in model.named_parameters() if p.grad.abs().sum() == 0]
    assert [n for n in silent if not n.startswith("projectors.sam")] == []  # sam had no image


def fake_batch(B: int) -> dict:
    shape = (B, 32, 32)
    return {
        "image": torch.rand(B, 3, 32, 32), "semseg": torch.randint(0, 12, shape),
        "human_parts": torch.randint(0, 7, shape), "sal": torch.randint(0, 2, shape),
        "edge": torch.randint(0, 2, shape).float(), "depth": torch.rand(shape) * 5,
        "normals": F.normalize(torch.randn(B, 3, 32, 32), dim=1),
    }


def test_parameter_counts():
    """Catches a miscounted share of active parameters: counted here from shapes alone."""
    model = prism.Prism(TINY)
    expert = 24 * 48 * 2 + 24 + 48
    total, active = prism.count_parameters(model)
    assert total == sum(math.prod(p.shape) for p in model.parameters())
    assert total - active == 4 * 3 * expert  # 4 blocks, 3 of 5 experts idle


# ------------------------------------------------------------------------------------------------ SAK


def sak_student(**changes) -> prism.SAK:
    """Build a tiny SAK whose gates are far from equal; only dino is as wide as the stem."""
    torch.manual_seed(0)
    model = prism.SAK(replace(TINY, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("mixers", "adapters", "aligners", "out_norms")) and p.ndim > 0:
                p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


PASCAL = {"semseg": 21, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2}
NYUD = {"semseg": 40, "normals": 3, "edge": 1, "depth": 1}


@pytest.mark.parametrize("size, tasks, grid, expected", [
    ("small", PASCAL, (32, 32), "21.98 2.89 1.52 7.39 33.80"),
    ("small", NYUD, (28, 36), "21.98 2.89 1.21 5.92 32.02"),
    ("base", PASCAL, (32, 32), "86.43 11.54 5.98 29.53 133.51"),
    ("base", NYUD, (28, 36), "86.42 11.54 4.79 23.64 126.40"),
    ("large", PASCAL, (32, 32), "304.15 39.42 10.60 52.48 406.67"),
    ("large", NYUD, (28, 36), "304.13 39.42 8.48 42.01 394.06"),
])
def test_sak_has_the_published_sizes(size, tasks, grid, expected):
    """Catches a bias, norm or adapter too many or too few: millions of parameters of stem, paths, mixers,
    heads and all, the paths' norms counted in all alone; the paper prints 407 and 394 for the last two."""
    cfg = prism.SIZES[size]
    cfg = replace(cfg, grid=grid, tasks=tasks, teachers=dict.fromkeys(("dinov2", "clip", "sam"), cfg.dim))
    with torch.device("meta"):
        model = prism.SAK(cfg)
    sizes = dict.fromkeys(("stem", "adapters", "mixers", "heads", "out_norms"), 0)
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        sizes[part if part in sizes else "stem"] += p.numel()
    total, active = prism.count_parameters(model)
    assert active == total == sum(sizes.values()) and len(model.aligners) == 0
    assert sizes.pop("out_norms") == 3 * 4 * 2 * cfg.dim
    assert " ".join(f"{n / 1e6:.2f}" for n in (*sizes.values(), total)) == expected


@pytest.mark.parametrize("size, width, expected", [("small", 768, "3.55"), ("base", 1024, "9.45")])
def test_sak_aligners_have_the_published_sizes(size, width, expected):
    """Catches aligners with a hidden layer like Prism's projectors, or one for all levels."""
    with torch.device("meta"):
        model = prism.SAK(replace(prism.SIZES[size], teachers={"dinov2": width, "clip": width, "sam": width}))
    assert f"{sum(p.numel() for p in model.aligners.parameters()) / 1e6:.2f}" == expected


@pytest.mark.parametrize("tasks, size, expected", [
    (PASCAL, (512, 512), "31.7 36.2 145.9"), (NYUD, (448, 576), "31.1 35.2 121.7"),
])
def test_sak_costs_what_was_measured(tasks, size, expected):
    """Catches a stem that runs once per task or teacher: 10^9 multiply-adds of stem, backbone, all."""
    grid, wide = (size[0] // 16, size[1] // 16), dict.fromkeys(("dinov2", "clip", "sam"), 384)
    found = []
    for teachers_, tasks_ in (({}, {}), (wide, tasks)):
        cfg = replace(prism.SIZES["small"], grid=grid, teachers=teachers_, tasks=tasks_)
        with torch.device("meta"):
            model, images = prism.SAK(cfg).eval(), torch.rand(1, 3, *size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, tasks=tuple(tasks_))
        counts = counter.get_flop_counts()
        heads = sum(sum(counts.get(f"SAK.heads.{t}", {}).values()) for t in tasks_)
        backbone = counter.get_total_flops() - heads
        found += [backbone, backbone + 2 * scoring.heads_as_convolutions(cfg, size)]  # as SAK's code has them
    assert " ".join(f"{n / 2e9:.1f}" for n in (found[0], *found[2:])) == expected


def test_sak_path_is_a_running_sum_of_the_stem():
    """Catches an adapter before its block, a path that skips x_0 or reads a normed stem: at scale 0 the
    path's end is x_0 + the sum of all x_i, to the last bit."""
    model, images, seen = sak_student(), torch.rand(2, 3, 32, 32), []
    for name, p in model.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.zeros_(p)
    for module in (*model.blocks, model.adapters["clip"][-1]):
        module.register_forward_hook(lambda module, given, y: seen.append(y))
    stem, _ = model.trunk(images)
    expected = sum(seen[:-1], model.embed(images))
    assert len(seen) == 6 and torch.equal(seen[-1], expected)
    assert all(torch.equal(a, seen[i][:, 1:]) for a, i in zip(stem, TINY.moe_blocks, strict=True))


def test_sak_paths_do_not_flow_back():
    """Catches a path that writes to the stem or to another path."""
    model, images = sak_student(), torch.rand(2, 3, 32, 32)
    stem, paths = model.trunk(images)
    for p in model.adapters["clip"].parameters():
        torch.nn.init.normal_(p)
    changed_stem, changed = model.trunk(images)
    assert all(torch.equal(a, b) for a, b in zip(stem, changed_stem, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(paths["sam"], changed["sam"], strict=True))
    assert all((a - b).abs().max() > 0.1 for a, b in zip(paths["clip"], changed["clip"], strict=True))


def test_sak_gates():
    """Catches gates that are no weights, noise at test, noise per image, and a spread that has no say."""
    model, stem = sak_student(), torch.randn(2, 16, 24)
    mixer = model.mixers["edge"][2]
    logits, spread = mixer.score(stem).mean(1).split(4, dim=1)  # (2, 4) each
    gates = mixer.gates(stem)
    assert gates.shape == (2, 1, 4) and torch.equal(gates, mixer.gates(stem))
    torch.testing.assert_close(gates[:, 0], logits.softmax(1))
    assert gates.amax() > 0.3 and (gates[0] - gates[1]).abs().max() > 1e-3
    mixer.train()
    torch.manual_seed(3)
    noisy = mixer.gates(stem)
    torch.manual_seed(3)
    noise = torch.randn(2, 16, 4)
    expected = (logits[:, None] + noise * (F.softplus(spread[:, None]) + 0.01)).softmax(-1)
    torch.testing.assert_close(noisy, expected)
    for g in (gates, noisy):
        torch.testing.assert_close(g.sum(-1), torch.ones_like(g[..., 0]))
    assert noisy.std(1).min() > 0.01  # every patch its own


def test_sak_gives_every_image_to_every_teacher():
    """Catches rows of one teacher handed to another: (B, K) ids equal one pass per teacher, and what
    `Teachers.targets` makes of them has the same rows."""
    model, images = sak_student(), torch.rand(3, 3, 40, 24)
    every = model.distill(images, torch.arange(3).expand(3, 3))
    for i, (name, width) in enumerate(TINY.teachers.items()):
        alone = model.distill(images, torch.full((3,), i))
        assert [m.shape for m in every[name]] == [(3, width, 5, 3)] * 4
        assert all(torch.equal(a, b) for a, b in zip(every[name], alone[name], strict=True))
    ids = torch.tensor([[2, 0], [1, 2], [0, 1]])
    some = model(images, ids, ["edge"]).distilled
    members = dict.fromkeys(TINY.teachers, SimpleNamespace(features=lambda x: [x] * 4))
    rows = teachers.Teachers.targets(SimpleNamespace(members=members), images, ids)
    for name, picked in (("clip", [0, 2]), ("dino", [1, 2]), ("sam", [0, 1])):
        torch.testing.assert_close(some[name][3], every[name][3][picked])
        assert torch.equal(rows[name][0], images[picked])
    assert model.distill(images, torch.tensor([0, 0, 2]))["dino"][0].shape == (0, 24, 5, 3)


def test_sak_features_are_what_heads_and_aligners_read():
    """Catches contexts or levels that swap places, aligned features, and a list of names in wrong order."""
    model, images = sak_student(), torch.rand(3, 3, 40, 24)
    out = model(images, torch.full((3,), 1), ["sal", "edge"])
    for a, b in zip(out.distilled["dino"], model.features(images, "dino"), strict=True):
        assert torch.equal(a, b)  # as wide as the stem: not aligned
    levels = model.features(images, "edge")
    assert [level.shape for level in levels] == [(3, 24, 5, 3)] * 4
    assert torch.equal(model.heads["edge"](levels, (40, 24)), out.predicted["edge"])
    mixed = model.features(images, ["edge", "sam", "edge"])
    assert all(torch.equal(m[[0, 2]], level[[0, 2]]) for m, level in zip(mixed, levels, strict=True))
    assert all(torch.equal(m[1], s[1]) for m, s in zip(mixed, model.features(images, "sam"), strict=True))
    assert out.levels == out.routes == [] and set(out.predicted) == {"sal", "edge"}
    with pytest.raises(ValueError, match="unknown context dog"):
        model.features(images, "dog")


def test_sak_losses_reach_what_they_should():
    """Catches distillation that trains mixers or heads, a path that tasks do not train, and a parameter
    that nothing trains, for which DDP would wait for ever."""
    model, batch = sak_student().train(), fake_batch(2)
    targets = {t: [torch.randn(2, width, 4, 4) for _ in range(4)] for t, width in TINY.teachers.items()}
    grads = {}
    for loss in ("distill", "tasks", "both"):
        model.zero_grad()
        out = model(batch["image"], torch.arange(3).expand(2, 3), tuple(TASKS))
        terms = train.distill_terms(out.distilled, targets) if loss != "tasks" else {}
        if loss != "distill":
            terms |= {t: train.TASK_LOSSES[t][1](x, batch[t]) for t, x in out.predicted.items()}
        sum(terms.values()).backward()
        grads[loss] = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    names = {n for n, _ in model.named_parameters()}
    assert grads["both"] == names
    assert names - grads["distill"] == {n for n in names if n.startswith(("mixers.", "heads."))}
    assert names - grads["tasks"] == {n for n in names if n.startswith("aligners.")}


def test_sak_starts_from_a_vit(tmp_path, monkeypatch):
    """Catches a stem that starts elsewhere than its ImageNet weights, and new modules that the optimizer
    would train at the slow rate of old ones."""
    cfg = prism.PrismConfig(dim=16, depth=4, heads=2, patch=4, grid=(4, 4), moe_blocks=(0, 1, 2, 3),
                            mlp_ratio=2, teachers={"a": 8}, tasks={"edge": 1})
    model, state = prism.SAK(cfg).eval(), tiny_file("vit")
    report = prism.start_from_vit(model, state, "vit")
    assert report == ("loaded 52, new 82 (adapters, aligners, heads, mixers, out_norms), "
                      "dropped 4 (head, norm)")
    monkeypatch.setitem(teachers.HEADS, 16, 2)
    config, images = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}, torch.rand(2, 3, 16, 24)
    vit = teachers.load_teacher(tiny_folder(tmp_path / "vit", "vit", config))
    for x, expected in zip(model.trunk(images)[0], vit.blocks(vit.prepare(images)), strict=True):
        torch.testing.assert_close(x, expected.flatten(2).mT)
    new = {n.split(".")[0] for n, _ in model.named_parameters() if train.NEW.match(n)}
    old = {n.split(".")[0] for n, _ in model.named_parameters() if not train.NEW.match(n)}
    assert new == {"adapters", "aligners", "heads", "mixers", "out_norms"}
    assert old == {"blocks", "cls_token", "pos_embed", "patch_embed"}
    assert all(a.scale.item() == 1 for a in model.adapters["a"])
    assert 0.015 < model.adapters["a"][0].up.weight.std() < 0.025 and model.out_norms["a"][0].eps == 1e-5


def test_sak_checkpoint_round_trip(tmp_path):
    """Catches a checkpoint that comes back as another student, and an older one, without `student` in its
    config, that is refused by `load` or where it goes on."""
    model, path, images = sak_student(), tmp_path / "a.pt", torch.rand(1, 3, 32, 32)
    prism.save(model, path)
    again = prism.load(path)
    assert type(again) is prism.SAK and again.cfg == model.cfg == replace(TINY, student="sak")
    assert torch.equal(again.predict(images)["depth"], model.predict(images)["depth"])
    assert prism.load(path, grid=(6, 4)).pos_embed.shape == (1, 25, 24)
    prism.save(student(), path)
    content = prism.read_checkpoint(path)
    del content["config"]["student"]
    prism.write_checkpoint(path, content)
    assert type(prism.load(path)) is prism.Prism
    content = {k: kind() for k, kind in prism.CONTENT.items()} | content | {"stage": "a"}
    for cfg in (student().cfg, model.cfg):
        ours = {"stage": "a", **{f"student's {k}": v for k, v in asdict(cfg).items()}}
        refused = pytest.raises(ValueError, match="student's student prism there, sak here")
        with contextlib.nullcontext() if cfg.student == "prism" else refused:
            train.check_same_run(path, content, ours)


@pytest.mark.parametrize("changes, message", [
    ({"student": "zebra"}, "student 'zebra' is not known; use prism or sak or dense or wide or moe"),
    ({"student": "sak", "moe_blocks": (0, 1, 2, 3)}, "must include the last of the 5 blocks, 4"),
    ({"student": "sak", "moe_blocks": (1, 2, 4)}, "must be four of the 5 blocks"),
    ({"student": "prism", "top_k": 9}, "top_k 9 of 5 experts"),
])
def test_build_checks_what_applies(changes, message):
    """Catches a student built from sizes that do not fit, and sak refused for experts that it has not."""
    with pytest.raises(ValueError, match=message):
        prism.build(replace(TINY, **changes))
    assert type(prism.build(replace(TINY, student="sak", experts=1, top_k=9))) is prism.SAK


RELEASED = {"dinov2": 96, "clip": 80, "sam": 160}  # teacher -> width, in the order of the released configs
RELEASED_TASKS = {"semseg": 21, "human_parts": 7, "sal": 2}


def released_sak(stage: int, aligned: bool) -> dict[str, torch.Tensor]:
    """Random weights in the layout of SAK's released code at toy sizes, written from its description:
    width 128, 2 heads, 5 blocks, patches of 16 px, a 3 x 3 grid, taps after blocks 1, 2, 3, 4."""
    torch.manual_seed(stage)
    C, state = 128, {}

    def layer(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.3

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width) * 0.3

    p = "backbone." if stage == 2 else ""
    state[f"{p}vit.cls_token"], state[f"{p}vit.pos_embed"] = torch.randn(1, 1, C), torch.randn(1, 10, C)
    layer(f"{p}vit.patch_embed.proj", C, 3, 16, 16)
    for i in range(5):
        for name, sizes in {"attn.qkv": (3 * C, C), "attn.proj": (C, C), "mlp.fc1": (4 * C, C),
                            "mlp.fc2": (C, 4 * C)}.items():
            layer(f"{p}vit.blocks.{i}.{name}", *sizes)
        norm(f"{p}vit.blocks.{i}.norm1", C), norm(f"{p}vit.blocks.{i}.norm2", C)
    for teacher, width in reversed(RELEASED.items()):  # the order within the file must not matter
        for i in range(6):
            state[f"{p}tsap.{teacher}.{i}.scale"] = torch.rand(1) + 0.5
            layer(f"{p}tsap.{teacher}.{i}.down", C // 4, C), layer(f"{p}tsap.{teacher}.{i}.up", C, C // 4)
        for tap in (1, 2, 3, 4):
            norm(f"{p}out_norms.{tap}_{teacher}", C)
            if aligned:
                layer(f"{p}ts_aligners.{tap}_{teacher}", width, C)
    for task, channels in RELEASED_TASKS.items() if stage == 2 else ():
        for tap in (1, 2, 3, 4):
            name = f"{p}mor.{tap}_{task}.router.module"
            layer(f"{name}.0", C // 2, C), norm(f"{name}.1", C // 2), layer(f"{name}.3", 8, C // 2)
            layer(f"heads.{task}.linears.{tap - 1}", C // 4, C)
        layer(f"heads.{task}.linear_fuse.0", C, C, 3, 3), norm(f"heads.{task}.linear_fuse.1", C)
        state[f"heads.{task}.linear_fuse.1.running_mean"] = torch.randn(C) * 0.3
        state[f"heads.{task}.linear_fuse.1.running_var"] = torch.rand(C) + 0.5
        state[f"heads.{task}.linear_fuse.1.num_batches_tracked"] = torch.tensor(7)
        layer(f"heads.{task}.last_conv", channels, C, 1, 1)
    return state


class Equations:
    """Released layers by their names, line by line; `vit`: the name of the trunk."""

    def __init__(self, state: dict[str, torch.Tensor], vit: str, grid: tuple[int, int]):
        self.s, self.vit, self.grid = state, vit, grid

    def linear(self, x, name):
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def norm(self, x, name, eps=1e-6):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def conv(self, x, name, **options):
        return F.conv2d(x, self.s[f"{name}.weight"], self.s[f"{name}.bias"], **options)

    def mlp(self, x, name, first="fc1", second="fc2"):
        return self.linear(F.gelu(self.linear(x, f"{name}.{first}")), f"{name}.{second}")

    def as_map(self, x):
        return x.mT.reshape(len(x), -1, *self.grid)

    def embed(self, images):
        colour = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        colour = colour / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        side = self.s[f"{self.vit}.patch_embed.proj.weight"].shape[-1]
        x = self.conv(colour, f"{self.vit}.patch_embed.proj", stride=side).flatten(2).mT
        cls = self.s[f"{self.vit}.cls_token"].repeat(len(x), 1, 1)
        return torch.cat([cls, x], 1) + self.s[f"{self.vit}.pos_embed"]

    def attend(self, x, name):
        q, k, v = self.linear(x, f"{name}.qkv").chunk(3, -1)
        heads = [slice(c, c + 64) for c in range(0, x.shape[-1], 64)]
        parts = [(q[..., c] @ k[..., c].mT / 8).softmax(-1) @ v[..., c] for c in heads]
        return self.linear(torch.cat(parts, -1), f"{name}.proj")

    def head(self, levels, task, size):
        small = [self.as_map(self.linear(x, f"heads.{task}.linears.{i}")) for i, x in enumerate(levels)]
        quarter = [n // 4 for n in size]
        maps = [F.interpolate(m, size=quarter, mode="bilinear", align_corners=False) for m in small]
        f, y = f"heads.{task}.linear_fuse.1", torch.cat(maps, 1)
        y = self.conv(y, f"heads.{task}.linear_fuse.0", padding=1)
        y = (y.movedim(1, -1) - self.s[f"{f}.running_mean"]) / (self.s[f"{f}.running_var"] + 1e-5).sqrt()
        y = F.gelu((y * self.s[f"{f}.weight"] + self.s[f"{f}.bias"]).movedim(-1, 1))
        return F.interpolate(self.conv(y, f"heads.{task}.last_conv"), size=tuple(size), mode="bilinear")


def released_outputs(state: dict[str, torch.Tensor], images: torch.Tensor, tasks) -> tuple[dict, dict]:
    """What SAK's equations make of such weights, line by line, on images of 48 x 48 px:
    {teacher: 4 x (B, C_k, 3, 3)} and {task: (B, K, 48, 48)}."""
    s = {key.removeprefix("backbone."): value for key, value in state.items()}
    f = Equations(s, "vit", (3, 3))

    def adapter(z, name):
        return z + s[f"{name}.scale"] * f.mlp(z, name, "down", "up")

    x = f.embed(images)
    paths = {t: adapter(x, f"tsap.{t}.0") for t in RELEASED}
    stem, normed = {}, {}
    for i in range(5):
        b = f"vit.blocks.{i}"
        x = x + f.attend(f.norm(x, f"{b}.norm1"), f"{b}.attn")
        x = x + f.mlp(f.norm(x, f"{b}.norm2"), f"{b}.mlp")
        paths = {t: adapter(r + x, f"tsap.{t}.{i + 1}") for t, r in paths.items()}
        if i:
            stem[i] = x[:, 1:]
            normed[i] = {t: f.norm(r[:, 1:], f"out_norms.{i}_{t}", 1e-5) for t, r in paths.items()}
    aligned = "ts_aligners.1_sam.bias" in s
    distilled = {t: [f.as_map(f.linear(normed[i][t], f"ts_aligners.{i}_{t}") if aligned else normed[i][t])
                     for i in normed] for t in RELEASED}
    predicted = {}
    for task in tasks:
        levels = []
        for i in normed:
            r = f"mor.{i}_{task}.router.module"
            u = f.linear(F.gelu(f.norm(f.linear(stem[i], f"{r}.0"), f"{r}.1", 1e-5)), f"{r}.3")
            w = u.mean(1)[:, :4].softmax(-1)  # (B, 4): stem, dinov2, clip, sam
            mixed = w[:, 0, None, None] * stem[i]
            for e, t in enumerate(RELEASED):
                mixed = mixed + w[:, e + 1, None, None] * normed[i][t]
            levels.append(mixed)
        predicted[task] = f.head(levels, task, (48, 48))
    return distilled, predicted


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_released_sak_equals_its_equations(stage, aligned, tmp_path):
    """Catches a key map that crosses two weights, or an arithmetic that is not SAK's: the loaded student
    against the same file evaluated line by line."""
    state, path, images = released_sak(stage, aligned), tmp_path / "checkpoint.pth", torch.rand(2, 3, 48, 48)
    torch.save({"model": state, "epoch": 3, "iter_count": 40}, path)
    model, tasks = prism.load(path), RELEASED_TASKS if stage == 2 else {}
    expected = prism.PrismConfig(
        dim=128, depth=5, heads=2, grid=(3, 3), moe_blocks=(1, 2, 3, 4), tasks=tasks, student="sak",
        teachers=RELEASED if aligned else dict.fromkeys(RELEASED, 128), official=True,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )
    assert model.cfg == expected and list(model.cfg.teachers) == list(RELEASED) and not model.training
    distilled, predicted = released_outputs(state, images, tasks)
    with torch.no_grad():
        out = model(images, torch.arange(3).expand(2, 3), tuple(tasks))
    assert set(out.predicted) == set(tasks) and len(out.distilled["sam"]) == 4
    torch.testing.assert_close(out.distilled, distilled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.predicted, predicted, rtol=1e-5, atol=1e-5)


def assert_each_is_named(path, state, cases):
    """Change a released file as each case says (None: leave out); the one line must hold its message."""
    for message, changes in cases.items():
        changed = {k: v for k, v in (state | changes).items() if v is not None}
        torch.save({"model": changed}, path)
        with pytest.raises(ValueError) as error:
            prism.load(path)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_released_sak_is_loaded_whole_or_not(tmp_path):
    """Catches weights that are silently left out or left random: one line names the key."""
    state, path = released_sak(2, True), tmp_path / "checkpoint.pth"
    rename = "backbone.mor.3_sal.router.module.0.weight"
    cases = {
        "unknown key backbone.mor.3_sal.gate": {"backbone.mor.3_sal.gate": state[rename]},
        "missing, in our names, adapters.clip.2.up.bias": {"backbone.tsap.clip.2.up.bias": None},
        "unknown, in our names, mixers.sal.7.score.0.weight": {rename.replace("3_", "7_"): state[rename]},
        "lack cls_token": {"backbone.vit.cls_token": None},
        "50 patches is neither square nor 28 x 36": {"backbone.vit.pos_embed": torch.zeros(1, 51, 128)},
        "mixers.sal.2.score.0.weight": {rename: torch.zeros(64, 127)},
    }
    assert_each_is_named(path, state, cases)
    wide = state | {"backbone.vit.pos_embed": torch.zeros(1, 1009, 128)}
    assert prism.from_released(wide, path)[0].grid == (28, 36)


PASCAL = {"semseg": 21, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2}
NYUD = {"semseg": 40, "normals": 3, "edge": 1, "depth": 1}


def released_prism(tasks: dict[str, int] | None, dim: int, levels: tuple[int, ...], patches: int,
                   widths: tuple[int, ...], experts: int = 5, hidden: int = 4, depth: int = 5,
                   patch: int = 16) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a file of PRISM's released code, written from its description; hidden: of shared
    and routed experts, in units of dim; tasks None: stage 1, else stage 2."""
    p, shapes, D = "" if tasks is None else "backbone.", {}, dim

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def mlp(name: str, hidden: int) -> None:
        layer(f"{name}.fc1", hidden, D), layer(f"{name}.fc2", D, hidden)

    shapes[f"{p}task_composer_weights"] = (len(tasks or ()), 3)
    for word, rows in {"task": len(tasks or ()), "vfm": 3, "task_free": 1}.items():
        shapes[f"{p}{word}_condition_embeddings.weight"] = (rows, D)
    t = f"{p}backbone"
    shapes[f"{t}.pos_embed"], shapes[f"{t}.cls_token"] = (1, patches + 1, D), (1, 1, D)
    layer(f"{t}.patch_embed.proj", D, 3, patch, patch), layer(f"{t}.norm", D)
    for i in range(depth):
        b, m = f"{t}.blocks.{i}", f"{t}.blocks.{i}.moe_ffn_layer"
        layer(f"{b}.norm1", D), layer(f"{b}.norm2", D)
        layer(f"{b}.attn.qkv", 3 * D, D), layer(f"{b}.attn.proj", D, D)
        mlp(f"{b}.{'standard_ffn' if i in levels else 'mlp'}", 4 * D)
        if i in levels:
            shapes[f"{m}.ortho_loss_weight"] = shapes[f"{m}.variance_loss_weight"] = ()
            for name in ("shared_expert", *(f"experts.{e}" for e in range(experts))):
                mlp(f"{m}.{name}", hidden * D)
            layer(f"{b}.gate_linear", 1, D), layer(f"{m}.router.film_layer.to_gamma_beta", 2 * D, D)
            layer(f"{m}.router.W_gate_stage1", D, D)
            layer(f"{m}.router.W_g_base", experts, D), layer(f"{m}.router.W_noise", experts, D)
    for k, width in enumerate(widths):
        for n in range(4):
            name = f"{p}vfm_projection_heads.{k}_{n}.net"
            layer(f"{name}.0", D, D), layer(f"{name}.2", width, D)
    for task, channels in (tasks or {}).items():
        for n in range(4):
            layer(f"heads.{task}.linears.{n}", D // 4, D)
        layer(f"heads.{task}.linear_fuse.0", D, D, 3, 3), layer(f"heads.{task}.last_conv", channels, D, 1, 1)
        layer(f"heads.{task}.linear_fuse.1", D)
        for name, shape in {"running_mean": (D,), "running_var": (D,), "num_batches_tracked": ()}.items():
            shapes[f"heads.{task}.linear_fuse.1.{name}"] = shape
    return shapes


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Fill shapes with numbers that keep signals near 1; keys reversed: their order must not matter."""
    torch.manual_seed(0)
    state = {}
    for key, shape in reversed(shapes.items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif "embed" in key and len(shape) < 4:
            state[key] = torch.randn(shape)
        elif len(shape) > 1:
            state[key] = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        elif key.endswith(("weight", "running_var")):  # of norms
            state[key] = torch.rand(shape) + 0.5
        else:
            state[key] = torch.randn(shape) * 0.3
    return state


def prism_outputs(state: dict[str, torch.Tensor], images: torch.Tensor, grid: tuple[int, int],
                  tasks: dict[str, int] | None) -> tuple[dict, dict, dict]:
    """What PRISM's equations make of such weights, with every expert on every token: {context: 4 x
    (B, D, h, w)}, {teacher: 4 x (B, D_t, h, w)} of all images, {task: (B, C, H, W)}."""
    s = {key.removeprefix("backbone.") if tasks else key: value.double() for key, value in state.items()}
    f, depth = Equations(s, "backbone", grid), 1 + max(int(k.split(".")[2]) for k in s if ".blocks." in k)
    tables = torch.cat([s["vfm_condition_embeddings.weight"], s["task_condition_embeddings.weight"]])
    features, distilled, predicted = {}, {}, {}
    for c, name in enumerate([*RELEASED, *(tasks or ())]):
        x, levels = f.embed(images), []
        for i in range(depth):
            b = f"backbone.blocks.{i}"
            m = f"{b}.moe_ffn_layer"
            x = x + f.attend(f.norm(x, f"{b}.norm1"), f"{b}.attn")
            u = f.norm(x, f"{b}.norm2")
            if f"{m}.router.W_g_base.bias" not in s:
                x = x + f.mlp(u, f"{b}.mlp")
                continue
            gamma, beta = f.linear(tables[c], f"{m}.router.film_layer.to_gamma_beta").chunk(2)
            z = u + f.linear(u, f"{m}.router.W_gate_stage1").sigmoid() * (gamma * u + beta)
            logits = f.linear(z, f"{m}.router.W_g_base")
            third = logits.sort(-1, descending=True).values[..., 2:3]
            w = logits.masked_fill(logits < third, -math.inf).softmax(-1)  # (B, N, E), 3 of them not 0
            experts = f.mlp(u, f"{m}.shared_expert")
            for e in range(w.shape[-1]):
                experts = experts + w[..., e, None] * f.mlp(w[..., e, None] * u, f"{m}.experts.{e}")
            lam = 0.5 + 0.5 * f.linear(u, f"{b}.gate_linear").sigmoid()
            x = x + lam * f.mlp(u, f"{b}.standard_ffn") + (1 - lam) * experts
            levels.append(f.norm(x, "backbone.norm")[:, 1:])
        features[name] = [f.as_map(level) for level in levels]
        if name in RELEASED:
            distilled[name] = [f.as_map(f.mlp(level, f"vfm_projection_heads.{c}_{n}.net", "0", "2"))
                               for n, level in enumerate(levels)]
        else:
            predicted[name] = f.head(levels, name, images.shape[-2:])
    return features, distilled, predicted


@pytest.mark.parametrize("tasks, grid, sizes", [
    (None, (3, 3), {"dim": 128, "levels": (1, 2, 3, 4), "widths": (128, 128, 128)}),
    (PASCAL, (3, 3), {"dim": 128, "levels": (0, 1, 3, 4), "widths": (96, 80, 160)}),
    (NYUD, (28, 36), {"dim": 64, "levels": (1, 2, 3, 4), "widths": (96, 96, 96), "hidden": 1, "patch": 4}),
    (None, (28, 36), {"dim": 64, "levels": (1, 2, 3, 5), "widths": (64, 96, 80), "patch": 4, "depth": 6}),
])
def test_released_prism_equals_its_equations(tasks, grid, sizes, tmp_path):
    """Catches a key map that crosses two weights, teachers, tasks or levels, and an arithmetic that is not
    the released code's: the loaded student against the same file evaluated line by line."""
    state = random_weights(released_prism(tasks, patches=math.prod(grid), **sizes))
    path, patch = tmp_path / "checkpoint.pth", sizes.get("patch", 16)
    torch.save({"model": state}, path)
    model = prism.load(path)
    assert model.cfg == prism.PrismConfig(
        dim=sizes["dim"], depth=sizes.get("depth", 5), heads=sizes["dim"] // 64, patch=patch, grid=grid,
        moe_blocks=sizes["levels"], experts=5, top_k=3, expert_ratio=sizes.get("hidden", 4),
        teachers=dict(zip(RELEASED, sizes["widths"], strict=True)), tasks=tasks or {},
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), official=True)
    assert list(model.cfg.teachers) == list(RELEASED) and list(model.cfg.tasks) == list(tasks or {})
    assert not model.training
    model, images = model.double(), torch.rand(2, 3, *(patch * n for n in grid)).double()
    ids, close = torch.tensor([2, 0]), {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    with torch.no_grad():
        features, distilled, predicted = prism_outputs(state, images, grid, tasks)
        ours = {name: model.features(images, name) for name in model.contexts}
        torch.testing.assert_close(ours, features, **close)
        expected = {name: [level[ids == i] for level in distilled[name]] for i, name in enumerate(RELEASED)}
        torch.testing.assert_close(model.distill(images, ids), expected, **close)
        torch.testing.assert_close(model.predict(images) if tasks else {}, predicted, **close)
    assert all(x.std() > 0.1 for x in predicted.values())


@pytest.mark.parametrize("tasks, widths, patches, keys, millions, digest", [
    (None, 768, 576, 506, 409.69, "1ec20f8acec13626"),
    (PASCAL, 1024, 1024, 591, 441.93, "2826f576144787ad"),
    (NYUD, 1024, 1008, 574, 436.02, None),
])
def test_released_prism_of_size_base_is_taken_key_by_key(tasks, widths, patches, keys, millions, digest):
    """Catches a description that is not that of the released files (digests of their keys and shapes), and
    a parameter that is dropped on the way."""
    shapes = released_prism(tasks, 768, (2, 5, 8, 11), patches, (widths,) * 3, experts=15, depth=12)
    lines = "\n".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
    assert digest in (None, hashlib.sha256(lines.encode()).hexdigest()[:16]) and len(shapes) == keys
    unused = [k for k in shapes if re.search("_loss_weight|task_composer|task_free", k) or 0 in shapes[k]]
    statistics = [k for k in shapes if re.search("running|batches", k)]
    assert len(unused) == (11 if tasks is None else 10)
    cfg, state = prism.from_released({k: torch.empty(v, device="meta") for k, v in shapes.items()}, "a.pth")
    grid = {576: (24, 24), 1024: (32, 32), 1008: (28, 36)}[patches]
    assert cfg == replace(
        prism.SIZES["base"], teachers=dict.fromkeys(RELEASED, widths), tasks=tasks or {}, grid=grid,
        official=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with torch.device("meta"):
        model = prism.build(cfg)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    sizes = {k: math.prod(v) for k, v in shapes.items()}
    assert sum(v.numel() for v in state.values()) == sum(sizes.values()) - sum(sizes[k] for k in unused)
    total = sum(sizes.values()) - sum(sizes[k] for k in statistics)
    assert round(total / 1e6, 2) == millions == round(prism.count_parameters(model)[0] / 1e6, 2)


@pytest.mark.parametrize("size, teacher", [("small", 768), ("base", 1024), ("large", 768), ("large", 1024)])
def test_released_prism_of_other_sizes(size, teacher):
    """Catches a size, or teachers of another size than the student, whose config is not what we call it."""
    cfg = prism.SIZES[size]
    for tasks, hidden in ((None, 4), (PASCAL, 1)):
        shapes = released_prism(tasks, cfg.dim, cfg.moe_blocks, 576, (teacher,) * 3, 15, hidden, cfg.depth)
        found, _ = prism.from_released({k: torch.empty(v, device="meta") for k, v in shapes.items()}, "a.pth")
        assert found == replace(
            cfg, teachers=dict.fromkeys(RELEASED, teacher), tasks=tasks or {}, expert_ratio=hidden,
            official=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def test_released_prism_is_loaded_whole_or_not(tmp_path):
    """Catches weights that are silently left out, left random or taken twice: one line names the key."""
    path = tmp_path / "checkpoint.pth"
    state = random_weights(released_prism(PASCAL, 64, (1, 2, 3, 4), 9, (64, 64, 64)))
    b = "backbone.backbone.blocks.2"
    expert, w = f"{b}.moe_ffn_layer.experts", torch.zeros(64, 64)
    cases = {
        f"unknown key {b}.moe_ffn_layer.router.W_s.weight": {f"{b}.moe_ffn_layer.router.W_s.weight": w},
        "unknown key backbone.backbone.head.weight": {"backbone.backbone.head.weight": w},
        "unknown key backbone.vfm_projection_heads.3_0.net.0.weight": {
            "backbone.vfm_projection_heads.3_0.net.0.weight": w},
        "unknown key backbone.pos_embed": {"backbone.pos_embed": w},
        "unknown key module.norm.bias": {"module.norm.bias": w},
        "have teacher_embed (our name) twice, once as": {"vfm_condition_embeddings.weight": w},
        "missing, in our names, blocks.2.gate.bias": {f"{b}.gate_linear.bias": None},
        "missing, in our names, blocks.2.experts.b1": {f"{expert}.{e}.fc1.bias": None for e in range(5)},
        "unknown, in our names, blocks.2.experts.w3": {f"{expert}.{e}.fc3.weight": w for e in range(5)},
        "unknown, in our names, projectors.sam.0.1.bias": {"backbone.vfm_projection_heads.2_0.net.1.bias": w},
        "missing, in our names, task_embed": {"backbone.task_condition_embeddings.weight": w[:0]},
        "experts.3.w2 (our name) is missing, of another shape": {f"{expert}.3.fc2.weight": None},
        "experts.5.w2 (our name) is missing, of another shape": {f"{expert}.5.fc2.weight": w},
        "experts.4.b1 (our name) is missing, of another shape": {f"{expert}.4.fc1.bias": w[0]},
        "lack blocks.1.shared.0.bias": {
            "backbone.backbone.blocks.1.moe_ffn_layer.shared_expert.fc1.bias": None},
        "lack cls_token (our name), or one of its dimensions": {"backbone.backbone.cls_token": w[0]},
        "50 patches is neither square nor 28 x 36": {"backbone.backbone.pos_embed": torch.zeros(1, 51, 64)},
        "task_embed (4, 64) instead of (5, 64)": {"backbone.task_condition_embeddings.weight": w[:4]},
        "router.film_gate.weight (64, 63) instead": {
            f"{b}.moe_ffn_layer.router.W_gate_stage1.weight": w[:, 1:]},
    }
    assert_each_is_named(path, state, cases)
    unused = [k for k in state if re.search("_loss_weight|task_composer|task_free", k)]
    torch.save({"model": {k: v for k, v in state.items() if k not in unused}}, path)
    assert len(unused) == 10 and len(prism.load(path).cfg.tasks) == 5


def test_released_position_table_of_a_named_grid(tmp_path):
    """Catches rows taken for columns: a table of 2 x 8 patches is no 4 x 4 one, and one of 3 x 5 loads."""
    path = tmp_path / "checkpoint.pth"
    for grid in ((2, 8), (3, 5)):
        state = random_weights(released_prism(None, 64, (1, 2, 3, 4), math.prod(grid), (64, 64, 64)))
        torch.save({"model": state}, path)
        images = torch.rand(1, 3, *(16 * n for n in grid)).double()
        model = prism.load(path, grid=grid).double()
        expected = prism_outputs(state, images, grid, None)[0]["sam"]
        torch.testing.assert_close(model.features(images, "sam"), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"15 patches is neither square .* grid=\(h, w\)"):
        prism.load(path)
    torch.save({"model": random_weights(released_prism(None, 64, (1, 2, 3, 4), 9, (64, 64, 64)))}, path)
    assert prism.load(path, grid=(4, 6)).pos_embed.shape == (1, 25, 64)


# --------------------------------------------------------------------------------------------- losses


def test_distill_loss_by_hand():
    """Catches cos per patch instead of per image, a SmoothL1 that sums, a wrong mean over images."""
    x = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 2.0]]]])  # two images, one channel, 1 x 2 patches
    y = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 4.0]]]])
    first = 0.9 * (1 - 0) + 0.1 * 0.5  # orthogonal; both differ by 1: 0.5
    second = 0.9 * (1 - 1) + 0.1 * (0 + 1.5) / 2  # parallel; one differs by 2: 2 - 0.5
    terms = train.distill_terms({"t": [x]}, {"t": [y]})
    assert terms["distill/t"].item() == pytest.approx((first + second) / 2)
    big = F.interpolate(x, size=(2, 4), mode="bilinear", align_corners=False)
    assert train.map_loss(x, big).item() == pytest.approx(0, abs=1e-6)  # the smaller map is upsampled


def test_decorrelation_by_loops():
    """Catches a mask that keeps near pairs, negative cosines that cancel, a wrong mean."""
    torch.manual_seed(3)
    levels = [torch.randn(2, 5, 3, 4) for _ in range(4)]
    total = 0.0
    for level in levels[:2]:
        values = []
        for image in level:
            z = image.flatten(1).T
            for a in range(12):
                for b in range(12):
                    if math.dist((a // 4, a % 4), (b // 4, b % 4)) > 1:
                        values.append(max(0.0, F.cosine_similarity(z[a], z[b], dim=0).item()))
        total += np.mean(values)
    assert train.decorr_term(levels[:2]).item() == pytest.approx(total, rel=1e-5)


def test_official_decorrelation_by_loops():
    """Catches the released code's weight exp(-d^2 / 2 s^2) on the wrong side, and its factor 0.5."""
    torch.manual_seed(4)
    maps = [torch.randn(2, 5, 3, 4) for _ in range(4)]
    total, s = 0.0, 0.3
    for level in maps[:2]:
        values = []
        for image in level:
            z = image.flatten(1).T
            for a in range(12):
                for b in range(12):
                    d = math.dist((a // 4, a % 4), (b // 4, b % 4))
                    cos = F.cosine_similarity(z[a], z[b], dim=0).item()
                    values.append(abs(cos) * (1 - math.exp(-d * d / (2 * s * s))))
        total += 0.5 * np.mean(values)
    assert train.official_decorr_term(maps).item() == pytest.approx(total, rel=1e-5)


def test_balance_loss_by_hand():
    """Catches a balance that rewards collapse: uniform use gives K, all on one expert E * K at most."""
    def route(load, prob):
        return prism.Route(None, None, torch.tensor(load), torch.tensor(prob), None)

    even = route([0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25])
    one = route([1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0])
    assert train.balance_term([even]).item() == pytest.approx(2)
    assert train.balance_term([one, even]).item() == pytest.approx(4 + 2)


def test_task_losses_by_hand():
    """Catches ignored pixels that count, means over the wrong number, swapped class weights."""
    logits = torch.tensor([[[[2.0, 0.0, 5.0, 1.0]], [[0.0, 1.0, 5.0, 0.0]]]])  # (1, 2, 1, 4)
    target = torch.tensor([[[0, 1, 255, 0]]])
    nll = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-1))]
    assert train.class_loss(logits, target).item() == pytest.approx(sum(nll) / 3)
    assert train.class_loss(logits, torch.full((1, 1, 4), 255)).item() == 0
    weighted = (nll[0] * 1 / 3 + nll[1] * 2 / 3 + nll[2] * 1 / 3) / 3  # one of three is salient
    assert train.saliency_loss(logits, target).item() == pytest.approx(weighted)

    x = torch.tensor([[[[0.5, -1.0, 3.0]]]])
    edges = torch.tensor([[[1.0, 0.0, 255.0]]])
    expected = (0.95 * math.log(1 + math.exp(-0.5)) + 0.05 * math.log(1 + math.exp(-1))) / 2
    assert train.edge_loss(x, edges).item() == pytest.approx(expected)

    x = torch.tensor([[[[0.0, 3.0]], [[0.0, 0.0]], [[2.0, 4.0]]]])  # (1, 3, 1, 2)
    normals = torch.tensor([[[[0.0, 255.0]], [[1.0, 255.0]], [[0.0, 255.0]]]])
    assert train.normals_loss(x, normals).item() == pytest.approx(2)  # |0-0| + |0-1| + |1-0|
    x, depth = torch.tensor([[[[1.0, 2.0, 9.0]]]]), torch.tensor([[[1.5, 4.0, 255.0]]])
    assert train.depth_loss(x, depth).item() == pytest.approx((0.5 + 2) / 2)


def test_loss_weights():
    """Catches the 0.9 / 0.1 inside L_distill confused with those around it (our table, row 5)."""
    out = prism.Output({"t": [torch.randn(1, 2, 3, 3)] * 4}, {"edge": torch.zeros(1, 1, 6, 6)},
                       [torch.randn(1, 2, 3, 3)] * 4,
                       [prism.Route(None, None, torch.full((4,), 0.5), torch.full((4,), 0.25), None)])
    batch, targets = {"edge": torch.zeros(1, 6, 6)}, {"t": [torch.randn(1, 2, 3, 3)] * 4}
    weights = {}
    for official in (False, True):
        cfg = replace(TINY, teachers={"t": 2}, official=official)
        weights[official] = {k: w for k, (w, _) in train.loss_terms(out, targets, batch, cfg, 0.5).items()}
    same = {"balance": 0.0005, "edge": 50.0}
    assert weights[False] == pytest.approx({"distill/t": 0.45, "decorr": 0.05, **same})
    assert weights[True] == pytest.approx({"distill/t": 0.5, "decorr": 0.25, **same})


# ------------------------------------------------------------------------------------------- schedule


def test_teacher_assignment_is_balanced():
    """Catches a teacher starved in the batch or in one process's slice of it, and a remainder that is
    always the same teacher's."""
    extra = np.zeros(3, int)
    for step in range(60):
        ids = train.assign_teachers(20, 3, 0, step)
        counts = np.bincount(ids, minlength=3)
        assert sorted(counts) == [6, 7, 7]
        extra += counts - 6
        assert all(np.ptp(np.bincount(part, minlength=3)) <= 2 for part in np.split(ids, 2))
    assert extra.min() > 25 and extra.max() < 55
    assert (train.assign_teachers(20, 3, 0, 7) == train.assign_teachers(20, 3, 0, 7)).all()
    assert (train.assign_teachers(20, 3, 0, 7) != train.assign_teachers(20, 3, 1, 7)).any()


def test_learning_rates():
    """Catches a schedule that jumps after warm-up, or turns negative (released code: complex) at its end."""
    stage = train.STAGES["deconstruct"]["world"]._replace(steps=150, lr=1e-3, warmup=0.1)
    assert train.lr_at(0, stage) == pytest.approx(1e-7)
    assert train.lr_at(15, stage) == pytest.approx(1e-3)
    assert train.lr_at(150, stage) == pytest.approx(1e-6)
    poly = train.STAGES["recompose"]["world"]._replace(steps=100, lr=2e-5, warmup=0.0)
    assert train.lr_at(0, poly) == 2e-5
    assert train.lr_at(50, poly) == pytest.approx(2e-5 * 0.5**0.9)
    assert train.lr_at(120, poly) == 0


def test_recipes_are_the_papers():
    """A recipe that is not the paper's; an lr that does not follow the batch; epochs that do not add up."""
    base = train.Args(size="base", data="imagenet:/x")
    stage = train.choose_recipe(base, "deconstruct", 1_281_167)
    assert stage[:5] == ("deconstruct.pt", "distill", (384, 384), 240_219, 30)  # 30 * 1,281,167 / 160
    assert (stage.batch_size, stage.lr, stage.lr_pretrained, stage.weight_decay) == (160, 1e-3, 0.01, 0.01)
    assert (stage.decay, stage.clip) == ("cosine", 1.0) and stage.warmup * stage.epochs == 2
    half = train.choose_recipe(replace(base, batch_size=64), "deconstruct", 1_281_167)
    assert half.lr == 5e-4 and half.steps == 600_547
    assert train.choose_recipe(replace(base, batch_size=64, lr=1e-3), "deconstruct", 9).lr == 1e-3
    short = train.choose_recipe(replace(base, steps=100), "deconstruct", 1600)
    assert (short.steps, short.epochs) == (100, 10)
    for data_spec, size, batch in (("pascal:/x", (512, 512), 6), ("nyud:/x", (448, 576), 12)):
        stage = train.choose_recipe(train.Args(data=data_spec), "recompose", 4998)
        assert (stage.image_size, stage.batch_size, stage.steps, stage.lr) == (size, batch, 40_000, 2e-5)
        assert (stage.weight_decay, stage.decay, stage.clip, stage.warmup) == (1e-6, "poly", 10.0, 0.0)
        assert train.choose_recipe(train.Args(data=data_spec), "deconstruct", 4998).epochs == 30
    two = train.choose_recipe(train.Args(data="nyud:/x", epochs=2, image_size=(64, 96)), "recompose", 795)
    assert two.steps == 132 and two.image_size == (64, 96)
    with pytest.raises(ValueError, match="data tars:/x cannot be used to recompose.*world, pascal, nyud"):
        train.choose_recipe(train.Args(data="tars:/x"), "recompose")


def test_pretrained_part_learns_slower():
    """New modules at the trunk's rate, or weights that no group has."""
    model, stage = student(), train.ON_IMAGES
    names = {p: name for name, p in model.named_parameters()}
    groups = train.build_optimizer(model, stage, pretrained=True).param_groups
    factor = {names[p]: group["factor"] for group in groups for p in group["params"]}
    assert len(factor) == len(names) == sum(len(group["params"]) for group in groups)
    for name in ("pos_embed", "cls_token", "patch_embed.weight", "blocks.1.attn.qkv.weight", "norm.weight",
                 "blocks.1.anchor.0.weight", "blocks.0.mlp.0.bias", "blocks.2.norm2.bias"):
        assert factor[name] == 0.01
    for name in ("blocks.1.experts.w1", "blocks.1.router.film.weight", "blocks.1.shared.0.weight",
                 "blocks.2.gate.bias", "teacher_embed", "projectors.clip.0.0.weight", "task_embed",
                 "heads.sal.last.bias"):
        assert factor[name] == 1
    assert {g["factor"] for g in train.build_optimizer(model, stage, pretrained=False).param_groups} == {1}


# ------------------------------------------------------------------------------------------- training


class FakeTeachers:
    """Three fixed random teachers, so that tests of training need not raise any."""

    def __init__(self, names, device, compile=False, sam_size=None):
        names = [name.partition("=")[0] for name in names]
        self.widths = dict.fromkeys(names, 8)
        self.provenance = {name: {"kind": "fake", "source": "nowhere", "size": 32} for name in names}
        self.generators = {name: i for i, name in enumerate(names)}

    def targets(self, images, teacher_ids):
        maps = {}
        for name, i in self.generators.items():
            weight = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i))
            rows = torch.where(teacher_ids == i)[0]
            maps[name] = [F.conv2d(images[rows], weight, stride=8)] * 4
        return maps


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A tiny rendered world on disk."""
    return data.render_world(tmp_path_factory.mktemp("world") / "w", size=32, train=12, val=4, probe=4)


def tiny_run(small_world, out, **changes):
    """Train a tiny student on the tiny world; returns the last checkpoint's content."""
    settings = {"steps": 10, "log_every": 5, "save_every": 5, **changes}
    settings = {"data": f"world:{small_world}", "image_size": (32,), "batch_size": 6, **settings}
    args = train.Args(out_dir=out, device="cpu", **settings)
    train.train(args)
    return prism.read_checkpoint(out / ("deconstruct.pt" if args.stage == "deconstruct" else "prism.pt"))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(train.teachers, "Teachers", FakeTeachers)
    monkeypatch.setitem(prism.SIZES, "toy", replace(TINY, teachers={}, tasks={}, router_noise=0.5))


NAMED = ("dinov2=toy-dino", "clip=toy-clip", "sam=toy-sam")


def released_file(path, tasks=None, widths=(8, 8, 8)) -> prism.PrismConfig:
    """Write a tiny released file for 32 x 32 px; returns the size whose students it fits."""
    shapes = released_prism(tasks, 64, (1, 2, 3, 4), 16, widths, patch=8)
    torch.save({"model": random_weights(shapes)}, path)
    return replace(TINY, dim=64, heads=1, top_k=3, mlp_ratio=4.0, expert_ratio=4.0, teachers={}, tasks={})


def test_training_goes_on_from_released_weights(small_world, tmp_path, tiny, monkeypatch, capsys):
    """Catches released weights that are run with the paper's arithmetic, that stage 2 or a resumed run
    forgets to be released ones, or that are not what training starts from."""
    file = tmp_path / "released.pth"
    monkeypatch.setitem(prism.SIZES, "toy", released_file(file))
    theirs = prism.read_checkpoint(file)["model"]
    settings = {"teachers": NAMED, "init": str(file), "steps": 2}
    still = tiny_run(small_world, tmp_path / "still", stage="recompose", lr=0.0, **settings)
    assert {k for k in still["model"] if not k.startswith(("heads.", "task_embed"))} == theirs.keys()
    assert all(torch.equal(still["model"][k], v) for k, v in theirs.items())
    assert still["config"]["official"] and still["config"]["mean"] == (0.485, 0.456, 0.406)
    assert "new 103 (heads, task_embed), arithmetic of the released code" in capsys.readouterr().out
    both = tiny_run(small_world, tmp_path / "both", stage="all", lr=1e-3, **settings)
    first = prism.read_checkpoint(tmp_path / "both" / "deconstruct.pt")
    for stored, before in ((first, theirs), (both, first["model"])):
        changed = {k for k, v in before.items() if not torch.equal(stored["model"][k], v)}
        assert {"blocks.1.router.film_gate.weight", "blocks.4.experts.w2", "pos_embed"} <= changed
        assert stored["config"]["official"] and all(v.isfinite().all() for v in stored["model"].values())
    assert first["provenance"]["init"].startswith("released.pth ")
    tiny_run(small_world, tmp_path / "both", lr=1e-3, **settings)
    assert "holds all 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("teachers, changes, message", [
    (NAMED, {"dim": 24, "heads": 1}, "width 64 there, 24 here"),
    (NAMED, {"heads": 2}, "attention heads 1 there, 2 here"),
    (NAMED, {"depth": 6}, "blocks 5 there, 6 here"),
    (NAMED, {"experts": 6}, "router.logits.weight (5, 64) instead of (6, 64)"),
    (NAMED, {"student": "dense"}, "student prism there, dense here"),
    (("toy-dino", *NAMED[1:]), {}, "teachers dinov2 (8 wide) clip (8 wide) sam (8 wide) there, toy-dino (8"),
    (NAMED[::-1], {}, "there, sam (8 wide) clip (8 wide) dinov2 (8 wide) here"),
    (NAMED, {"widths": (8, 9, 8)}, "clip (9 wide) sam (8 wide) there, dinov2 (8 wide) clip (8 wide)"),
])
def test_released_weights_that_do_not_fit_are_refused(teachers, changes, message, small_world, tmp_path, tiny,
                                                      monkeypatch):
    """Catches weights that fit by shape and are wrong, and a message that does not say what differs."""
    changes, file = dict(changes), tmp_path / "released.pth"
    size = released_file(file, widths=changes.pop("widths", (8, 8, 8)))
    kind = changes.pop("student", "prism")
    monkeypatch.setitem(prism.SIZES, "toy", replace(size, **changes))
    with pytest.raises(ValueError) as error:
        tiny_run(small_world, tmp_path / "out", teachers=teachers, init=str(file), student=kind, steps=1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_released_weights_are_scored(small_world, tmp_path, capsys):
    """Catches an evaluation that needs what only our own checkpoints hold: data, step, teachers, seed."""
    stage1, stage2, world = tmp_path / "one.pth", tmp_path / "two.pth", f"world:{small_world}"
    released_file(stage1), released_file(stage2, TASKS)
    for path in (stage1, stage2):
        with pytest.raises(ValueError, match="does not say what it was trained on; name it with --data"):
            scoring.main(scoring.Args(ckpt=path, device="cpu"))
    scoring.main(scoring.Args(ckpt=stage2, data=world, device="cpu", analysis=True, analysis_images=2))
    out = capsys.readouterr().out
    assert "step not recorded" in out and "does not record what dinov2 is" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["headline"].keys() == TASKS.keys()
    assert all(math.isfinite(value) for value in results["headline"].values())
    assert all(task in out for task in TASKS) and (tmp_path / "predictions.png").exists()
    scoring.main(scoring.Args(ckpt=stage1, data=world, device="cpu"))
    out = capsys.readouterr().out
    assert "no task heads (stage 1)" in out and "does not record what dinov2 is" in out
    assert "student as sam" in json.loads((tmp_path / "results_stage1.json").read_text())["probes"]
    scoring.main(scoring.Args(ckpt=stage2, device="cpu", cost=True))
    assert "PRISM" in capsys.readouterr().out


def test_resume_is_exact(small_world, tmp_path, tiny, monkeypatch):
    """Catches state that a checkpoint forgets: 10 steps equal 5 + 5, bit for bit, in both stages, whatever
    the number of loader workers; a log that ends a run, or loses lines, rotated away or cut short."""
    whole, out, write = tiny_run(small_world, tmp_path / "whole"), tmp_path / "parts", prism.write_checkpoint

    def write_and_stop(path, content, previous):
        write(path, content, previous)
        if (content["stage"], content["step"]) == ("deconstruct", 10):
            (out / "log.jsonl").rename(out / "log.1")
        if content["step"] == 5:
            with open(out / "log.jsonl", "a") as log:
                log.write('{"stage": "deconstruct", "st')  # cut short, as by a full disk
            raise KeyboardInterrupt

    for file, workers in (("deconstruct.pt", 0), ("prism.pt", 2)):
        monkeypatch.setattr(prism, "write_checkpoint", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(small_world, out, workers=workers)
        assert prism.read_checkpoint(out / file)["step"] == 5
    monkeypatch.setattr(prism, "write_checkpoint", write)
    parts = tiny_run(small_world, out)
    assert whole["model"].keys() == parts["model"].keys()
    assert [k for k in whole["model"] if not torch.equal(whole["model"][k], parts["model"][k])] == []
    logs = [[json.loads(line) for file in files for line in file.read_text().splitlines()]
            for files in ((tmp_path / "whole" / "log.jsonl",), (out / "log.1", out / "log.jsonl"))]
    for row, other in zip(*logs, strict=True):
        assert (row["stage"], row["step"], row["loss"]) == (other["stage"], other["step"], other["loss"])
    named = {"distill/toy-clip", "decorr", "balance", "semseg", "lambda/1", "dead/4", "lr"}
    assert named <= logs[0][-1].keys()


@pytest.mark.parametrize("changes", [
    {"student": "sak"}, {"student": "dense", "every_teacher": True}, {"student": "wide"}, {"student": "moe"},
    {"student": "sak", "every_teacher": False},
    {"without": ("anchor", "film"), "decorr_levels": 3},
    {"expert_ratio": 1.0, "top_k": 1, "experts": 3},
])
def test_every_student_trains_resumes_and_is_scored(changes, small_world, tmp_path, tiny, monkeypatch,
                                                    capsys):
    """Catches a student that fits only PRISM's loop, checkpoint, log line or evaluation."""
    changes |= {"stage": "all", "steps": 4, "save_every": 2}
    whole = tiny_run(small_world, tmp_path / "whole", **changes)
    write = prism.write_checkpoint

    def write_and_stop(path, content, previous):
        write(path, content, previous)
        if content["stage"] == "recompose" and content["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(prism, "write_checkpoint", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(small_world, tmp_path / "parts", **changes)
    monkeypatch.setattr(prism, "write_checkpoint", write)
    parts = tiny_run(small_world, tmp_path / "parts", **changes)
    assert [k for k, v in whole["model"].items() if not torch.equal(v, parts["model"][k])] == []
    assert all(whole["config"].get(key, value) == value for key, value in changes.items())
    row = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])
    kind, routed = changes.get("student", "prism"), "balance" in row
    assert routed == ("load/1" in row) == (kind in ("prism", "moe")) and ("decorr" in row) == (kind != "sak")
    scoring.main(scoring.Args(ckpt=tmp_path / "whole" / "prism.pt", analysis=True, analysis_images=2))
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["headline"].keys() == TASKS.keys() and len(results["routing"]) == 4 * routed
    assert (tmp_path / "whole" / "experts.png").exists() == routed
    capsys.readouterr()
    scoring.main(scoring.Args(ckpt=tmp_path / "whole" / "prism.pt", cost=True))
    assert {"prism": "PRISM", "sak": "SAK"}.get(kind, kind) in capsys.readouterr().out


def test_every_teacher_sees_every_image(small_world, tmp_path, tiny, monkeypatch):
    """Catches a switch that leaves the assignment as it was: SAK's default, dense on demand, PRISM never."""
    targets, seen = FakeTeachers.targets, []

    def note(self, images, teacher_ids):
        maps = targets(self, images, teacher_ids)
        seen.append([len(levels[0]) for levels in maps.values()])
        return maps

    monkeypatch.setattr(FakeTeachers, "targets", note)
    for changes, expected in (({"student": "sak"}, [6, 6, 6]), ({"student": "dense"}, [2, 2, 2]),
                              ({"student": "sak", "every_teacher": False}, [2, 2, 2]),
                              ({"student": "dense", "every_teacher": True}, [6, 6, 6])):
        tiny_run(small_world, tmp_path, stage="deconstruct", steps=1, fresh=True, **changes)
        assert seen.pop() == expected, changes
    with pytest.raises(ValueError, match="chosen for one teacher per image; use sak, dense or wide"):
        tiny_run(small_world, tmp_path, every_teacher=True)


def test_without_distillation(small_world, tmp_path, tiny, monkeypatch):
    """Catches teachers that are loaded or terms that are summed for nothing, stage 1 weights that sneak in,
    a single task that trains others."""
    monkeypatch.setattr(train.teachers, "Teachers", lambda *_: pytest.fail("teachers were loaded"))
    changes = {"stage": "recompose", "distill": False, "student": "dense", "tasks": ("depth",), "steps": 3}
    stored = tiny_run(small_world, tmp_path, **changes)
    assert stored["config"]["teachers"] == {} and stored["config"]["tasks"] == {"depth": 1}
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert row["loss"] == pytest.approx(row["depth"]) and stored["provenance"]["init"] == "random weights"
    assert not [k for k in row if k.startswith(("distill", "decorr", "balance", "load"))]
    with pytest.raises(ValueError, match="leaves nothing to all; add --stage recompose"):
        tiny_run(small_world, tmp_path, **changes | {"stage": "all"})
    assert tiny_run(small_world, tmp_path / "b", **changes | {"student": "prism"})["config"]["tasks"]


def test_going_on_refuses_a_stage_that_began_elsewhere(small_world, tmp_path, tiny):
    """Catches stage 2 of an older run taken for finished after stage 1 was trained anew, or found out about
    only after a day of stage 1."""
    tiny_run(small_world, tmp_path, steps=5)
    before = (tmp_path / "prism.pt").read_bytes()
    tiny_run(small_world, tmp_path, steps=5, stage="deconstruct", lr=2e-3, fresh=True)
    with pytest.raises(ValueError, match=r"initial weights deconstruct.pt \w+ there, deconstruct.pt \w+ here;"
                       " .*choose another --out-dir, or start over with --fresh"):
        tiny_run(small_world, tmp_path, steps=5, stage="recompose")
    (tmp_path / "deconstruct.pt").unlink()
    with pytest.raises(ValueError, match="prism.pt began with another deconstruct.pt than is to be trained"):
        tiny_run(small_world, tmp_path, steps=5)
    assert (tmp_path / "prism.pt").read_bytes() == before


def test_stage_2_goes_on_without_what_it_began_with(small_world, tmp_path, tiny, monkeypatch):
    """Catches a stage that cannot be gone on with once the weights it began with are moved away, or that
    begins without them."""
    whole = tiny_run(small_world, tmp_path / "whole")["model"]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "prism.previous.pt").replace(tmp_path / "parts" / "prism.pt")
    (tmp_path / "parts" / "deconstruct.pt").unlink()
    parts = tiny_run(small_world, tmp_path / "parts", stage="recompose")
    assert parts["step"] == 10 and all(torch.equal(whole[k], parts["model"][k]) for k in whole)
    assert parts["provenance"]["init"].startswith("deconstruct.pt ")
    with pytest.raises(FileNotFoundError, match="deconstruct.pt does not exist"):
        tiny_run(small_world, tmp_path / "parts", stage="recompose", fresh=True)
    assert (tmp_path / "parts" / "prism.pt").exists(), "refused, but set aside"


def test_going_on_refuses_another_run(small_world, tmp_path, tiny):
    """Catches a run that silently mixes two, or that loses the older one where --fresh is asked for."""
    tiny_run(small_world, tmp_path, stage="deconstruct", steps=5)
    before, log = (tmp_path / "deconstruct.pt").read_bytes(), (tmp_path / "log.jsonl").read_text()
    other = {"stage": "deconstruct", "steps": 5, "seed": 1}
    with pytest.raises(ValueError, match="cannot go on from .*seed 0 there, 1 here; .*with --fresh"):
        tiny_run(small_world, tmp_path, **other)
    with pytest.raises(ValueError, match="student's teachers .*'toy-clip': 8.* there, {'toy-sam': 8} here"):
        tiny_run(small_world, tmp_path, stage="deconstruct", steps=5, teachers=("toy-sam",))
    with pytest.raises(ValueError, match="student's teachers .*'toy-clip': 8, .* here"):  # ids would change
        tiny_run(small_world, tmp_path, stage="deconstruct", steps=5, teachers=train.Args.teachers[::-1])
    assert (tmp_path / "deconstruct.pt").read_bytes() == before
    assert tiny_run(small_world, tmp_path, fresh=True, **other)["seed"] == 1
    assert (tmp_path / "deconstruct.old.pt").read_bytes() == before
    assert (tmp_path / "log.old.jsonl").read_text() == log != (tmp_path / "log.jsonl").read_text()
    prism.save(student(), tmp_path / "prism.pt")
    with pytest.raises(ValueError, match="for use alone, without optimizer; name it by --init"):
        tiny_run(small_world, tmp_path, **other | {"stage": "recompose"})


def places(processes: int) -> list[dict[str, str]]:
    """List what torchrun would tell each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                  "WORLD_SIZE": str(processes)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(processes)]


def run_two(function, *args):
    """Call function(rank, where, *args) in two processes."""
    torch.multiprocessing.spawn(function, (places(2), *args), nprocs=2)


def be_rank(rank, where):
    os.environ.update(where[rank])
    torch.set_num_threads(1)


def run_rank(rank, where, small_world, out, changes):
    """Be one of several training processes."""
    be_rank(rank, where)
    train.teachers.Teachers = FakeTeachers
    prism.SIZES["toy"] = replace(TINY, teachers={}, tasks={}, router_noise=0.0, expert_drop=0.0)
    tiny_run(small_world, out, **changes)


@pytest.mark.parametrize("changes", [{}, {"shard": True, "recompute": True}, {"shard": True, "accumulate": 3},
                                     {"shard": True, "resume": "previous"}])
def test_two_processes_equal_one(changes, small_world, tmp_path, tiny, monkeypatch):
    """Catches means over a process's own share: losses, batch norm, balance or gradients that depend on
    how the batch is split; sharded weights that are saved, clipped or resumed in parts; a checkpoint that
    goes on only on as many processes as wrote it."""
    quiet = replace(TINY, teachers={}, tasks={}, router_noise=0.0, expert_drop=0.0)
    monkeypatch.setitem(prism.SIZES, "toy", quiet)
    common = {"steps": 4, "save_every": 2, "log_every": 2}
    write, resume = prism.write_checkpoint, "resume" in changes

    def write_twice(path, content, previous):
        write(path, content, previous)
        if resume and (content["stage"], content["step"]) in (("deconstruct", 4), ("recompose", 2)):
            (tmp_path / "two").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "two")

    monkeypatch.setattr(prism, "write_checkpoint", write_twice)
    if "accumulate" in changes:  # means are taken over a pass of all processes: compare with two, unsharded
        run_two(run_rank, small_world, tmp_path / "one", common | {"accumulate": 3})
    else:
        tiny_run(small_world, tmp_path / "one", **common)
    run_two(run_rank, small_world, tmp_path / "two", common | changes)
    one, two = (prism.read_checkpoint(tmp_path / run / "prism.pt") for run in ("one", "two"))
    for key, value in one["model"].items():
        # A bias before batch norm has no effect; its gradient is rounding, which Adam blows up.
        if not key.endswith(("fuse.0.bias", "fuse.1.running_mean")):
            torch.testing.assert_close(two["model"][key], value, rtol=2e-3, atol=2e-5)
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
            for run in ("one", "two")]
    assert [row["step"] for row in logs[1]] == ([4] if resume else [2, 4, 2, 4])
    for row, other in zip(logs[0][-len(logs[1]):], logs[1], strict=True):
        for key in ("loss", "distill/toy-dino", "decorr", "lambda/1", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3), key


def test_recomputing_changes_no_number(small_world, tmp_path, tiny):
    """Catches noise drawn anew when a block runs for the second time."""
    kept, again = (tiny_run(small_world, tmp_path / str(flag), steps=3, recompute=flag)["model"]
                   for flag in (False, True))
    assert [key for key in kept if not torch.equal(kept[key], again[key])] == []


def test_compiled_training_equals_eager(small_world, tmp_path, tiny, monkeypatch):
    """Catches a block or head that does not compile in the training loop, or not beside recomputation, and
    a benchmark that cannot count the FLOPs of a compiled student."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = {"stage": "all", "steps": 2, "log_every": 1}
    for name, changes in (("eager", {}), ("compiled", {"compile": True, "recompute": True})):
        tiny_run(small_world, tmp_path / name, **settings, **changes)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("eager", "compiled")]
    for row, other in zip(*logs, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)
    tiny_run(small_world, tmp_path / "compiled", stage="recompose", compile=True, bench=1)


def test_training_bench(small_world, tmp_path, capsys):
    """Catches a benchmark that writes files, or misses the teachers' or the optimizer's time."""
    args = train.Args(bench=2, device="cpu", data=f"world:{small_world}", image_size=(32,), batch_size=6,
                      teachers=("random:dinov2-s", "sam=random:sam-b"), sam_size=32, out_dir=tmp_path)
    train.train(args)
    out = capsys.readouterr().out
    parts = ("data", "teachers", "student forward", "backward", "optimizer")
    assert all(f"\n  {part} " in out for part in parts)
    assert re.search(r"student alone, one batch +[\d.]+ images/s, [\d.]+ TFLOP/s of", out)
    assert list(tmp_path.iterdir()) == []
    for changes, why in (({"accumulate": 2}, "times single passes"), ({"shard": True}, "this is one"),
                         ({"bench": 0}, "give 1 or more")):
        with pytest.raises(ValueError, match=why):
            train.train(replace(args, **changes))


def test_nan_stops_the_run(small_world, tmp_path, tiny, monkeypatch):
    """Catches a run that trains on with NaN, or saves it: the line names step and term."""
    settings = {"stage": "deconstruct", "steps": 5, "save_every": 2}
    factors, decorr = iter([1, 1, math.nan, 1]), train.decorr_term
    monkeypatch.setattr(train, "decorr_term", lambda levels: decorr(levels) * next(factors))
    with pytest.raises(FloatingPointError, match="decorr is nan at step 2 of deconstruct"):
        tiny_run(small_world, tmp_path, **settings)
    assert prism.read_checkpoint(tmp_path / "deconstruct.pt")["step"] == 2
    monkeypatch.setattr(train, "decorr_term", decorr)
    assert tiny_run(small_world, tmp_path, **settings)["step"] == 5


def test_several_passes_make_one_step(small_world, tmp_path, tiny, monkeypatch):
    """Gradients that are summed instead of averaged, a pass that is lost, teachers dealt out anew."""
    quiet = replace(TINY, teachers={}, tasks={}, router_noise=0.0, expert_drop=0.0)
    monkeypatch.setitem(prism.SIZES, "toy", quiet)
    settings = {"stage": "deconstruct", "steps": 2, "log_every": 1, "lr": 1e-2}
    for name, accumulate in (("one", 1), ("two", 2)):
        tiny_run(small_world, tmp_path / name, accumulate=accumulate, **settings)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        for key in ("distill/toy-clip", "distill/toy-dino", "distill/toy-sam", "decorr", "loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-3), key  # balance is no mean over images
    with pytest.raises(ValueError, match="batch size 6 does not split over 1 processes x 4 passes; use 4"):
        tiny_run(small_world, tmp_path / "four", accumulate=4, **settings)


def test_the_nyud_world_trains_its_four_tasks(tmp_path, tiny):
    """A recipe, loss or head that knows PASCAL's tasks alone."""
    root = data.render_world(tmp_path / "w", size=32, train=8, val=2, probe=2, layout="nyud")
    stored = tiny_run(root, tmp_path / "out", data=f"world-nyud:{root}", stage="all", steps=2)
    assert stored["config"]["tasks"] == {"semseg": 12, "normals": 3, "edge": 1, "depth": 1}
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {"semseg", "normals", "edge", "depth"} < rows[-1].keys() and "sal" not in rows[-1]


def test_stages_may_differ_in_image_size(small_world, tmp_path, tiny):
    """A position table of stage 1 that does not fit stage 2; height taken for width."""
    tiny_run(small_world, tmp_path, stage="deconstruct", steps=1)
    stored = tiny_run(small_world, tmp_path, stage="recompose", steps=1, image_size=(32, 48))
    assert stored["config"]["grid"] == (4, 6) and stored["model"]["pos_embed"].shape == (1, 25, 24)
    before = prism.read_checkpoint(tmp_path / "deconstruct.pt")["model"]["pos_embed"]
    difference = stored["model"]["pos_embed"] - prism.resize_pos(before, (4, 4), (4, 6))
    assert 0 < difference.abs().max() < 2e-3, "one step away from the resized table"


def test_training_lowers_every_loss(small_world, tmp_path, tiny):
    """Catches a loss with the wrong sign or without a path to the weights."""
    tiny_run(small_world, tmp_path, stage="all", steps=60, lr=3e-3, log_every=10)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for stage in train.STAGES:
        first, last = [[r for r in rows if r["stage"] == stage][i] for i in (0, -1)]
        terms = [k for k in first if k in TASKS] or [k for k in first if k.startswith("distill/")]
        assert len(terms) == (3 if stage == "deconstruct" else 6)
        assert [k for k in terms if last[k] >= first[k]] == []


# ------------------------------------------------------------------------------------------------ faults
# What ends a run ends a real process here. It is a fork of a fresh interpreter that has imported
# everything and computed nothing, since a fork of one that has computed may hang.


def in_fresh_process(job, *arguments, before=()) -> str:
    """Run a function of this file in a new interpreter; returns what it printed. Paths become strings."""
    values = ", ".join(repr(str(a) if isinstance(a, Path) else a) for a in arguments)
    code = f"import torch._dynamo, test_prism; test_prism.{job.__name__}({values})"
    done = subprocess.run([*before, sys.executable, "-c", code], cwd=Path(__file__).parent, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_run(small_world, out, sabotage=lambda: None, env=None, **changes) -> int:
    """Train in a fork as train.py's main does, its words in OUT.txt; returns the fork's id."""
    if fork := os.fork():
        return fork
    code = 99
    try:
        signal.alarm(240)  # where a test fails, nothing goes on for ever
        os.environ.update(env or {})
        words = os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1), os.dup2(words, 2)
        train.teachers.Teachers = FakeTeachers
        prism.SIZES["toy"] = replace(TINY, teachers={}, tasks={}, router_noise=0.5)
        sabotage()
        prism.exit_with_one_line(lambda: tiny_run(small_world, Path(out), **changes), debug=False)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def end_of(fork: int) -> int:
    """Wait for a run; returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])


def log_rows(out) -> list[tuple]:
    """List stage, step and loss of every line of a run's log."""
    file = Path(out) / "log.jsonl"
    rows = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    return [(row["stage"], row["step"], row["loss"]) for row in rows]


def wait_for(what, seconds: float = 60) -> None:
    """Wait until what() is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def same_weights(one, two) -> bool:
    one, two = (prism.read_checkpoint(Path(out) / "prism.pt")["model"] for out in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def kill_at_call(owner, name: str, count: int, half: bool = False) -> None:
    """Let the count-th call of a function end this process by kill -9; half: with half a file written."""
    call, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **options):
        if next(calls) == count:
            if half:
                call(*args, **options)
                args[1].truncate(args[1].tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)

    setattr(owner, name, wrapped)


def kill_often(small_world: str, folder: str) -> None:
    """Kill runs 20 times at random, 8 times inside saving, and go on each time."""
    settings = {"steps": 6, "save_every": 1, "log_every": 1}
    rng, whole, start = random.Random(0), f"{folder}/whole", time.monotonic()
    assert end_of(start_run(small_world, whole, **settings)) == 0
    span, killed, rounds = time.monotonic() - start, Counter(), 0
    inside = [(torch, "save", True), (os, "fsync", False), (os, "link", False), (os, "replace", False)] * 2
    while killed["random"] < 20 or inside:
        rounds += 1
        out, code = f"{folder}/{rounds}", None
        while code != 0:
            kind, sabotage = "random", lambda: None
            if inside and rng.random() < 0.4:
                kind, (owner, name, half) = "inside saving", inside.pop()
                sabotage = functools.partial(kill_at_call, owner, name, rng.randrange(1, 4), half)
            fork = start_run(small_world, out, sabotage, **settings)
            if kind == "random":
                time.sleep(rng.uniform(0, span))
                os.kill(fork, signal.SIGKILL)
            code = end_of(fork)
            assert code in (0, -signal.SIGKILL), Path(f"{out}.txt").read_text()
            killed[kind] += code != 0
            for file in Path(out).glob("*.pt"):
                prism.read_checkpoint(file)  # whole, whenever it died
        assert same_weights(out, whole) and log_rows(out) == log_rows(whole)
        assert not list(Path(out).glob(".*.part"))
    print(f"{killed.total()} kills ({dict(killed)}) over {rounds} runs; every checkpoint whole at each")


def test_killed_at_any_moment(small_world, tmp_path):
    """Catches a checkpoint or log that kill -9 leaves half-written, more lost than the steps since the last
    checkpoint, a log line twice or missing, files left behind."""
    print(in_fresh_process(kill_often, small_world, tmp_path))


def stop_softly(small_world: str, folder: str) -> None:
    """SIGTERM and Ctrl-C, to one process and to one of two."""
    settings = {"steps": 30, "save_every": 100, "log_every": 7}
    for processes in (1, 2):
        out, rows = f"{folder}/{processes}", 0
        for kind, text in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT"), (0, "")):
            forks = [start_run(small_world, out, env=env, **settings) for env in places(processes)]
            if kind:
                wait_for(lambda out=out, rows=rows: len(log_rows(out)) > rows)  # beyond the run before
                os.kill(forks[-1], kind)  # the others hear of it
            codes = {end_of(fork) for fork in forks}
            assert codes == {128 + kind if kind else 0}, Path(f"{out}.txt").read_text()
            if kind:
                stage, step, _ = log_rows(out)[-1]
                stored = prism.read_checkpoint(Path(out) / f"{'prism' if stage == 'recompose' else stage}.pt")
                assert stored["step"] == step and step % 7, step
                rows = len(log_rows(out))
                words = Path(f"{out}.txt").read_text()
                assert f"{text}: ending after this step" in words
                assert f"holds step {step} of 30; the same command goes on" in words
        steps = [row[:2] for row in log_rows(out)]
        assert sorted(set(steps)) == steps and steps[-1] == ("recompose", 30)
        assert prism.read_checkpoint(Path(out) / "prism.pt")["step"] == 30
    whole, out = f"{folder}/whole", f"{folder}/twice"
    assert end_of(start_run(small_world, whole, **settings)) == 0
    assert same_weights(whole, f"{folder}/1")

    def hang():
        train.update = lambda *_: time.sleep(60)

    fork = start_run(small_world, out, hang, **settings)

    def says(words):
        return Path(f"{out}.txt").exists() and words in Path(f"{out}.txt").read_text()

    for before, after in (("deconstruct: 30 steps", "ending after this step"), ("ending after", "stopped")):
        wait_for(functools.partial(says, before))
        time.sleep(0.3)  # from these words to the loop
        os.kill(fork, signal.SIGINT)
        wait_for(functools.partial(says, after))
    assert end_of(fork) == 1


def test_signals_end_a_run_saved(small_world, tmp_path):
    """Catches Ctrl-C or SIGTERM that loses steps, leaves other processes waiting, says nothing, or cannot be
    had sooner by asking twice."""
    in_fresh_process(stop_softly, small_world, tmp_path)


def lose_one_of_two(small_world: str, folder: str) -> None:
    """One of two processes is killed, raises, or computes nan."""
    def raises():
        if os.environ["RANK"] == "1":
            def fail(*_):
                raise ValueError("a label of mine is broken")
            train.data.collate = fail

    def nan():
        targets = FakeTeachers.targets
        if os.environ["RANK"] == "1":
            FakeTeachers.targets = lambda self, images, ids: {
                name: [m * math.nan for m in maps] for name, maps in targets(self, images, ids).items()}

    for name, sabotage in (("killed", lambda: None), ("raises", raises), ("nan", nan)):
        out, settings = f"{folder}/{name}", {"steps": 10**4, "log_every": 1, "save_every": 3}
        forks = [start_run(small_world, out, sabotage, env, **settings) for env in places(2)]
        if name == "killed":
            wait_for(lambda out=out: Path(out, "deconstruct.pt").exists())
            os.kill(forks[1], signal.SIGKILL)
        begin = time.monotonic()
        codes = [end_of(fork) for fork in reversed(forks)][::-1]
        seconds, words = time.monotonic() - begin, Path(f"{out}.txt").read_text()
        assert seconds < 60 and "Traceback" not in words, (seconds, words)
        print(f"{name}: ended in {seconds:.1f} s")
        if name == "nan":
            assert codes == [1, 1] and "distill/toy-clip is nan at step 0" in words, (codes, words)
            assert not Path(out, "deconstruct.pt").exists()
        else:
            assert codes == [1, -signal.SIGKILL if name == "killed" else 1], (codes, words)
            assert "process 0 ends because another one did" in words
            assert ("a label of mine is broken" in words) == (name == "raises")
        if name == "killed":
            assert prism.read_checkpoint(Path(out) / "deconstruct.pt")["step"] % 3 == 0


def look_at_ranks(small_world: str, folder: str) -> None:
    """Note what each of two processes has at its first step: weights, images, seed of the noise."""
    def note():
        pass_over = train.pass_over

        def noting(args, rt, run, model, taught, batch, mark):
            weights = [p.sum().item() for p in run.student.parameters()]
            file = Path(folder, f"{rt.rank}.json")
            file.exists() or file.write_text(json.dumps([weights, batch["image"].sum().item(),
                                                         batch["teacher"].tolist(), torch.initial_seed()]))
            return pass_over(args, rt, run, model, taught, batch, mark)

        train.pass_over = noting

    forks = [start_run(small_world, f"{folder}/out", note, env, steps=1) for env in places(2)]
    assert [end_of(fork) for fork in forks] == [0, 0]
    one, two = (json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1))
    assert one[0] == two[0] and one[1] != two[1] and one[3] != two[3]
    assert sorted(one[2] + two[2]) == [0, 0, 1, 1, 2, 2]


def test_ranks_differ_in_images_and_noise_alone(small_world, tmp_path):
    """Catches processes that start from other weights, or train on the same images with the same noise."""
    in_fresh_process(look_at_ranks, small_world, tmp_path)


def test_a_process_lost_ends_the_others(small_world, tmp_path):
    """Catches a process that waits for ever for one that died, or that ends without a reason."""
    print(in_fresh_process(lose_one_of_two, small_world, tmp_path))


def fill_disk(small_world: str, folder: str, quota: bool) -> None:
    """Run out of space while saving: by a quota on a process's files, or on a disk of its own; then go on."""
    settings, whole, out = {"steps": 4, "save_every": 1, "log_every": 1}, f"{folder}/whole", f"{folder}/out"
    assert end_of(start_run(small_world, whole, **settings)) == 0
    size, before = Path(whole, "deconstruct.pt").stat().st_size, {}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    if quota:
        third = functools.partial(kill_at_call, torch, "save", 3)
        assert end_of(start_run(small_world, out, third, **settings)) == -signal.SIGKILL
        before = {file.name: file.read_bytes() for file in Path(out).glob("*.pt")}
        assert len(before) == 2
    else:
        os.mkdir(out)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2.5 * size:.0f}", "tmpfs", out], check=True)
    assert end_of(start_run(small_world, out, limit if quota else lambda: None, **settings)) == 1
    words = Path(f"{out}.txt").read_text()
    print(last := words.splitlines()[-1])
    assert "Traceback" not in words and "cannot write" in last and ("large" if quota else "No space") in last
    found = {file.name: file for file in Path(out).glob("*.pt")}
    assert {"deconstruct.pt", "deconstruct.previous.pt"} == found.keys()
    assert [prism.read_checkpoint(found[name])["step"] for name in sorted(found)] == [1, 2]
    assert not quota or before == {name: file.read_bytes() for name, file in found.items()}
    assert not list(Path(out).glob(".*.part"))
    if not quota:
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
    assert end_of(start_run(small_world, out, **settings)) == 0
    assert same_weights(out, whole) and log_rows(out) == log_rows(whole)


@pytest.mark.parametrize("quota", [True, False])
def test_full_disk_loses_nothing(quota, small_world, tmp_path):
    """Catches a checkpoint that is gone, cut short or left in parts on a full disk, and a traceback."""
    own_mounts = () if quota else ("unshare", "--map-root-user", "--mount")
    if subprocess.run([*own_mounts, "true"]).returncode:
        quota, own_mounts = True, ()  # no disk of one's own here
    print(in_fresh_process(fill_disk, small_world, tmp_path, quota, before=own_mounts))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_checkpoints_are_named(suffix, tmp_path):
    """Catches weights that differ from those that were written, and come back without a word."""
    good, path = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    prism.save(student(), good)
    raw, original = good.read_bytes(), prism.read_checkpoint(good)["model"]
    rng, counts = random.Random(0), Counter()

    def flipped() -> bytes:
        at, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
        return raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :]

    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10**6))
    foreign = (b"", bytes(1000), b"not a checkpoint", archive.getvalue(), pickle.dumps({"model": {}}),
               pickle.dumps(print), rng.randbytes(5000))
    cases = [*(("flipped", flipped()) for _ in range(100)), *(("foreign", content) for content in foreign),
             *(("cut", raw[: rng.randrange(len(raw))]) for _ in range(20))]
    for kind, content in cases:
        path.write_bytes(content)
        if (kind, suffix) == ("flipped", ".pt"):
            with contextlib.suppress(Exception):
                state = torch.load(path, weights_only=True)["model"]
                counts["other weights by torch.load alone"] += not all(
                    torch.equal(state[k], original[k]) for k in original)
        try:
            state = prism.read_checkpoint(path)["model"]
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            counts[kind, "named"] += 1
        else:
            assert all(torch.equal(state[k], original[k]) for k in original), kind
            counts[kind, "unchanged"] += 1
    print(suffix, dict(counts))
    assert counts["flipped", "named"] >= 90 and counts["cut", "named"] == 20
    assert counts["foreign", "named"] == len(foreign)


def test_the_checkpoint_before_is_used_if_asked(small_world, tmp_path, tiny, capsys):
    """Catches a damaged checkpoint that is trained over, that the one before does not replace, or whose
    steps then differ; a run that starts over because its checkpoint is gone."""
    settings = {"stage": "deconstruct", "save_every": 2, "log_every": 2, "steps": 6}
    whole = tiny_run(small_world, tmp_path / "whole", **settings)["model"]
    path, previous = tmp_path / "whole" / "deconstruct.pt", tmp_path / "whole" / "deconstruct.previous.pt"
    raw = path.read_bytes()
    for damage in (lambda: path.write_bytes(raw[:-100]), path.unlink):
        assert prism.read_checkpoint(previous)["step"] == 4
        damage()
        with pytest.raises((ValueError, OSError), match=f"--resume previous goes on from {previous}, "):
            tiny_run(small_world, tmp_path / "whole", **settings)
        capsys.readouterr()
        again = tiny_run(small_world, tmp_path / "whole", resume="previous", **settings)["model"]
        assert "resumed" in (out := capsys.readouterr().out) and "at step 4" in out
        assert all(torch.equal(again[k], whole[k]) for k in whole)
    assert (tmp_path / "whole" / "deconstruct.damaged.pt").read_bytes() == raw[:-100]
    assert [step for _, step, _ in log_rows(tmp_path / "whole")] == [2, 4, 6]


def test_checkpoints_of_strangers(small_world, tmp_path, tiny):
    """Catches a traceback, gigabytes, or a wrong student from a file whose checksums are right and whose
    content is not: missing parts, other types, false sizes, weights that are no numbers."""
    settings = {"stage": "deconstruct", "steps": 4, "save_every": 2}
    tiny_run(small_world, tmp_path / "good", **settings)
    source, images = tmp_path / "good" / "deconstruct.pt", torch.rand(1, 3, 32, 32)
    raw, right = source.read_bytes(), prism.load(source).features(images, "toy-sam")[3]
    odd = (None, -1, 0, 1.5, math.nan, "x", b"x", True, [], {}, (), [1, 2], {"x": 1}, {1: {}}, 2**70,
           torch.zeros(0), torch.zeros(3, 3), torch.full((2,), math.nan), torch.zeros(4).expand(2**20, 4),
           torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.complex64), ("a", "b", "c"), -(2**70))
    rng, counts = random.Random(0), Counter()
    for case in range(80):
        where = content = torch.load(BytesIO(raw), weights_only=True)
        key = first = rng.choice(("model", "config", "config", *content))
        if case == 0:
            where, key, first = content["model"], "pos_embed", "model"
        while isinstance(where[key], dict) and where[key] and rng.random() < 0.7:
            where = where[key]
            key = rng.choice(sorted(where, key=str))
        value = where[key]
        near = (value * math.nan, value.double(), value.long(), value[:0]) if torch.is_tensor(value) else ()
        where[key] = rng.choice(near * 3 + odd)
        if case == 0 or rng.random() < 0.3:
            del where[key]
        out = tmp_path / str(case)
        out.mkdir()
        torch.save(content, out / "deconstruct.pt")
        for what, use in (("load", lambda out=out: prism.load(out / "deconstruct.pt")),
                          ("go on", lambda out=out: tiny_run(small_world, out, **settings)),
                          ("start", lambda out=out: tiny_run(small_world, out / "b", init=str(
                              out / "deconstruct.pt"), **settings | {"steps": 1}))):
            try:
                student_ = use()
            except (ValueError, OSError) as error:
                assert str(out) in str(error), error
                counts[what, "named"] += 1
            else:
                counts[what, "taken"] += 1
                if what == "load":
                    found = student_.features(images, "toy-sam")[3]
                    assert found.isfinite().all() and (first == "config" or torch.equal(found, right))
        shutil.rmtree(out)
    print(dict(counts))
    assert counts["load", "named"] > 30 and counts["go on", "named"] > 60 and counts["start", "named"] > 30


def test_small_files_that_claim_much(tmp_path):
    """Catches memory or hours given to what a small file claims: compressed parts, one number repeated for
    ever, sizes without end, blocks without weights."""
    path, good = tmp_path / "a.pt", {"model": student().state_dict(), "config": asdict(TINY)}
    name = next(iter(good["model"]))
    for part, changes, message in (
        ("model", {name: torch.zeros(1).expand(2**40)}, "its tensors claim more bytes than it has"),
        ("config", {"depth": 10**6}, "claims 1000000 blocks"),
        ("config", {"dim": 2**70}, "has the setting dim = '1180591620717411303424', no <class 'int'>"),
        ("config", {"experts": 200, "dim": 2**18}, "do not fit this student"),
        ("config", {"tasks": {"semseg": 2**20 - 1}}, "do not fit this student"),
    ):
        prism.write_checkpoint(path, good | {part: good[part] | changes})
        with pytest.raises(ValueError, match=message):
            prism.load(path)
    torch.save(good | {"model": {name: torch.zeros(10**7)}}, path)
    stored = zipfile.ZipFile(BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for part in stored.namelist():
            file.writestr(part, stored.read(part))
    with pytest.raises(ValueError, match="its parts claim more bytes than it has"):
        prism.load(path)


def test_memory_and_handles_stay_flat(small_world, tmp_path, tiny, monkeypatch):
    """Catches what every step leaves behind: an open file, a graph that is kept, a list that grows."""
    seen, flush = [], train.Log.flush

    def looking(self, *args):
        flush(self, *args)
        gc.collect()
        kinds = Counter(type(thing).__name__ for thing in gc.get_objects())
        seen.append(kinds | Counter({"open files": len(os.listdir("/proc/self/fd"))}))

    monkeypatch.setattr(train.Log, "flush", looking)
    tiny_run(small_world, tmp_path, stage="deconstruct", steps=60, log_every=10, save_every=20)
    grown = seen[-1] - seen[2]
    assert grown.pop("ProgressSample") == 30  # of rich, which keeps the last 1,000
    assert grown.total() < 15, grown  # 30 steps


@pytest.mark.parametrize("record", [5, "x", [], {}, {"size": 32},
                                    {"kind": "hub", "source": 5}, {"source": "/no"}])
def test_teachers_that_a_stranger_records(record, capsys):
    """Catches an evaluation that ends in a traceback over what a checkpoint says of its teachers."""
    for recorded in (record, {"a": record}):
        stored = {"provenance": {"teachers": recorded}, "config": {"teachers": {"a": 8}}}
        assert scoring.load_members(stored, "cpu") == {}
        assert "teachers, and what is measured against them, left out: " in capsys.readouterr().out


def test_two_runs_in_one_folder(small_world, tmp_path):
    """Catches two runs that write each other's checkpoint and log."""
    print(in_fresh_process(share_folder, small_world, tmp_path))


def test_a_file_system_without_locks(small_world, tmp_path, tiny, monkeypatch):
    """Catches training that is refused where files cannot be locked."""
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    assert tiny_run(small_world, tmp_path, stage="deconstruct", steps=1)["step"] == 1


def share_folder(small_world: str, folder: str) -> None:
    out = f"{folder}/out"
    first = start_run(small_world, out, steps=10**4, log_every=1)
    wait_for(lambda: log_rows(out))
    second = start_run(small_world, out, steps=10**4)
    assert end_of(second) == 1 and f"another run trains into {out}" in Path(f"{out}.txt").read_text()
    os.kill(first, signal.SIGKILL)
    assert end_of(first) == -signal.SIGKILL
    assert end_of(start_run(small_world, out, steps=2, fresh=True)) == 0


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("changes, message", [
    ({"image_size": (50,)}, "image size 50 is not a multiple of the patch size 8; use 48 or 56"),
    ({"teachers": ("toy-clip", "toy-x")}, "toy-x"),
    ({"tasks": ("semseg", "flow")}, "flow"),
    ({"batch_size": 2}, "batch size 2 is smaller than the number of teachers"),
    ({"data": "imagenet"}, "imagenet"),
    ({"device": "cuda"}, "sees no GPU"),
    ({"stage": "recompose"}, "deconstruct.pt does not exist"),
])
def test_bad_arguments_give_one_line(changes, message, small_world, tmp_path, tiny):
    """Catches a traceback, or work done before the command line is checked."""
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    args = {"data": f"world:{small_world}", "image_size": (32,), "batch_size": 6, "device": "cpu", **changes}
    with pytest.raises((ValueError, OSError)) as error:
        train.train(train.Args(out_dir=tmp_path / "out", **args))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_unwritable_out_folder(small_world, tmp_path, tiny):
    """Catches a run that trains for hours and then cannot save."""
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="choose another --out-dir"):
        tiny_run(small_world, tmp_path / "out")


def test_checkpoint_round_trip(tmp_path):
    """Catches a checkpoint that comes back changed, or a message that does not say what to do."""
    model, path, images = student(), tmp_path / "a.pt", torch.rand(1, 3, 32, 32)
    prism.save(model, path)
    again = prism.load(path)
    assert again.cfg == model.cfg
    assert torch.equal(again.predict(images)["depth"], model.predict(images)["depth"])
    assert prism.load(path, grid=(6, 4)).cfg.grid == (6, 4)
    with pytest.raises(FileNotFoundError, match="python train.py"):
        prism.load(tmp_path / "none.pt")
    torch.save({"something": 1}, path)
    with pytest.raises(ValueError, match="holds no model and config"):
        prism.load(path)


def test_export(tmp_path, small_world, tiny, monkeypatch, capsys):
    """Catches an export that loads as another student or forgets where it is from, a URL that is fetched
    anew each time, a file that a server cut short and that stays in the cache."""
    tiny_run(small_world, tmp_path, steps=2)
    path, images = tmp_path / "prism.pt", torch.rand(2, 3, 32, 32)
    prism.main(prism.Args(export=path))
    export = tmp_path / "prism.safetensors"
    assert f"prism.load('{export}') reads it" in capsys.readouterr().out
    assert export.stat().st_size < 0.4 * path.stat().st_size
    stored, exported = prism.read_checkpoint(path), prism.read_checkpoint(export)
    assert exported["provenance"] == json.loads(json.dumps(stored["provenance"])) and exported["step"] == 2
    expected, again = prism.load(path), prism.load(export)
    assert again.cfg == expected.cfg
    for task, value in expected.predict(images).items():
        assert torch.equal(again.predict(images)[task], value)
    third = tiny_run(small_world, tmp_path / "b", steps=1, stage="deconstruct", init=str(export))
    assert third["provenance"]["init"].startswith("prism.safetensors ")
    with pytest.raises(ValueError, match="is an export already"):
        prism.main(prism.Args(export=export))
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="its metadata names no student"):
        prism.load(tmp_path / "foreign.safetensors")

    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    files = {"/prism.safetensors": export.read_bytes(), "/cut.pt": path.read_bytes()[:-9]}
    files["/short.pt"] = path.read_bytes()
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = files.get(self.path.partition("?")[0])
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", len(found or b"") + (self.path == "/short.pt"))
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for _ in range(2):
        assert torch.equal(prism.load(f"{url}/prism.safetensors?x=1").pos_embed, expected.pos_embed)
    for name, why in (("none.pt", "404"), ("short.pt", "IncompleteRead|1 more expected")):
        with pytest.raises(OSError, match=f"cannot fetch {url}/{name} .*({why}).*or put the file at"):
            prism.load(f"{url}/{name}")
    for _ in range(2):
        with pytest.raises(ValueError, match="cut.pt cannot be read"):
            prism.load(f"{url}/cut.pt")
    server.shutdown()
    assert asked == ["/prism.safetensors?x=1", "/none.pt", "/short.pt", "/cut.pt", "/cut.pt"]
    assert len(list((tmp_path / "cache" / "students").iterdir())) == 1


def test_weights_of_another_student_are_refused_whole(tmp_path):
    """Catches a partial load: nothing changes, and the line names a key."""
    model, other = student(), student(dim=32, teachers={"clip": 16})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit this student"):
        prism.load_strict(model, other.state_dict(), "x.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = prism.load_strict(student(), student(tasks={}).state_dict(), "x.pt", new=("heads", "task_embed"))
    assert "new" in report and "heads" in report


def test_image_side_message():
    """Catches an image that is cut to whole patches without a word."""
    with pytest.raises(ValueError, match="image side 44 is not a multiple of the patch size 8; use 40 or 48"):
        student().predict(torch.rand(1, 3, 32, 44))
    with pytest.raises(ValueError, match="no head for flow"):
        student().predict(torch.rand(1, 3, 32, 32), ["flow"])
    with pytest.raises(ValueError, match="unknown context dinov9"):
        student().features(torch.rand(1, 3, 32, 32), "dinov9")


# ------------------------------------------------------------------------------------ rendered world


@pytest.fixture(scope="module")
def scenes():
    """Eight rendered scenes of 64 px."""
    return data.render(1, range(8), 64)


def test_world_is_a_function_of_seed_and_index(scenes):
    """Catches scenes that change with the batch they are rendered in."""
    alone = data.render(1, [5], 64)
    for key in ("image", "depth", "normals", "instance", "sal"):
        assert np.array_equal(alone[key][0], scenes[key][5]), key
    assert alone["captions"][0] == scenes["captions"][5]
    assert not np.array_equal(data.render(2, [5], 64)["image"][0], scenes["image"][5])


def camera_points(scenes, i):
    """Return pixels' points (S, S, 3) in metres and normals, camera frame, z towards the camera."""
    line = (np.arange(64) + 0.5 - 32) / (64 * data.Scene(1, i).focal)
    rays = np.stack([np.tile(line, (64, 1)), np.tile(-line[:, None], (1, 64)), np.full((64, 64), -1.0)], -1)
    return rays, rays * scenes["depth"][i][..., None], scenes["normals"][i]


def test_world_normals_face_the_camera_and_agree_with_depth(scenes):
    """Catches a flipped axis, ray length in place of z, a focal length that labels do not share."""
    for i in range(8):
        rays, points, normals = camera_points(scenes, i)
        assert np.abs(np.linalg.norm(normals, axis=-1) - 1).max() < 1e-5
        assert (rays * normals).sum(-1).max() < 0  # against the ray: towards the camera
        assert (normals[scenes["instance"][i] == 2][:, 1] > 0.9).all()  # the floor looks up
        for axis in (0, 1):  # neighbours on one plane: their difference lies in it
            step, between = np.diff(points, axis=axis), np.diff(normals, axis=axis)
            floor = scenes["instance"][i] == 2
            flat = (between == 0).all(-1) & (np.diff(floor.astype(int), axis=axis) == 0)
            flat &= floor[: step.shape[0], : step.shape[1]]
            out = np.abs((step * normals[: step.shape[0], : step.shape[1]]).sum(-1))[flat]
            assert flat.sum() > 100 and out.max() < 1e-3


def test_world_labels_agree(scenes):
    """Catches parts off people, classes off their instances, saliency on walls, captions of the unseen."""
    instance, semseg = scenes["instance"].astype(int), scenes["semseg"]
    person = data.CLASSES.index("person")
    assert ((scenes["human_parts"] > 0) == (semseg == person)).all()
    assert (semseg == np.where(instance < 16, instance - 1, instance // 16)).all()
    assert (instance[scenes["sal"] == 1] >= 32).all()
    for i, attributes in enumerate(scenes["attributes"]):
        for thing in attributes["things"]:
            assert (instance[i] == thing["instance"]).sum() == thing["pixels"] > 0
            assert thing["colour"] in scenes["captions"][i]
        score = scenes["sal"][i] * instance[i]
        assert len(np.unique(score[score > 0])) >= 1


def test_world_edges_lie_where_instances_change(scenes):
    """Catches edges thinned away (column-major arrays, as .mat files give them), or drawn elsewhere."""
    for instance in scenes["instance"]:
        edge = data.boundary_label(instance)
        assert np.array_equal(edge, data.boundary_label(np.asfortranarray(instance)))
        near = ndimage.maximum_filter(instance, 3) != ndimage.minimum_filter(instance, 3)
        assert edge.any() and near[edge == 1].all()
        assert ndimage.maximum_filter(edge, 5)[near].mean() > 0.98  # but for tips that thinning shortens
        assert edge.sum() < 0.75 * near.sum()  # thin: near is about three pixels wide


# ------------------------------------------------------------------------------------------- teachers


def small_scenes(count=8):
    """Scenes as the toys see them, read from rendered arrays instead of files."""
    rendered = data.render(3, range(count), 64)
    images = torch.from_numpy(rendered["image"]).permute(0, 3, 1, 2).contiguous()
    return teachers.Scenes(images, torch.from_numpy(rendered["instance"]),
                           *teachers.caption_tables(rendered["captions"]))


def test_scenes_are_read_from_the_world(small_world):
    """Catches toys that are raised on other pixels, ids or captions than the world's, or cannot read it."""
    world = data.World(small_world, "train", cache=False)
    samples, scenes = [world.read(i) for i in range(len(world))], teachers.read_scenes(small_world)
    assert np.array_equal(scenes.labelmaps, [sample["labelmap"] for sample in samples])
    assert np.array_equal(scenes.images.permute(0, 2, 3, 1), [sample["image"] for sample in samples])
    tables = teachers.caption_tables([sample["caption"] for sample in samples])
    assert all(map(torch.equal, scenes[2:], tables)) and scenes.phrases.any(1).all()


def short(name, **changes):
    """Return a toy's settings for a few cheap steps."""
    toy = teachers.TOYS[name]
    encoder = replace(toy.encoder, dim=16, heads=2, hidden=16)
    return toy._replace(encoder=encoder, **{"steps": 3, "batch_size": 4, **changes})


@pytest.fixture
def toy_cache(tmp_path, monkeypatch):
    """An empty cache, and toys that are raised in a moment."""
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path))
    monkeypatch.setattr(teachers, "TOYS", {name: short(name) for name in teachers.TOYS})
    monkeypatch.setattr(teachers, "read_scenes", lambda root: small_scenes())
    monkeypatch.setattr(data, "core_count", lambda: 1)  # other processes would not see these changes
    monkeypatch.setattr(data, "render_world", lambda *args, **settings: tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", list(teachers.TOYS))
def test_raising_is_deterministic_and_learns(name):
    """Catches a draw from the global generator, and an objective without a gradient."""
    scenes, toy = small_scenes(), short(name)
    first = teachers.raise_toy(name, toy, scenes).state_dict()
    torch.rand(7)
    again = teachers.raise_toy(name, toy, scenes).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    other = teachers.raise_toy(name, toy._replace(seed=1), scenes).state_dict()
    assert not torch.equal(first["patch_embed.weight"], other["patch_embed.weight"])
    torch.manual_seed(toy.seed)
    born = teachers.Encoder(toy.encoder).state_dict()
    assert [key for key in first if torch.equal(first[key], born[key])] == []


def test_teachers_see_only_their_own_images(toy_cache):
    """Catches rows out of batch order, a teacher run on others' images, a crash on an empty share."""
    taught = teachers.Teachers(list(teachers.TOYS))
    images, ids = torch.rand(5, 3, 64, 64), torch.tensor([2, 0, 2, 0, 2])
    targets = taught.targets(images, ids)
    for i, (name, maps) in enumerate(targets.items()):
        alone = [taught.members[name].features(images[k : k + 1]) for k in range(5) if ids[k] == i]
        assert len(maps) == 4 and all(m.shape == (len(alone), 16, 8, 8) for m in maps)
        for level in range(4):
            for row, expected in zip(maps[level], alone, strict=True):
                torch.testing.assert_close(row, expected[level][0], rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for t in taught.members.values() for p in t.parameters())


def test_teacher_size_rule_and_normalisation(toy_cache):
    """Catches a teacher fed with another's mean and std, or an image squeezed to a square."""
    teacher = teachers.load_teacher("toy-clip")
    image = torch.rand(1, 3, 64, 64)
    by_hand = teacher.blocks((image - 0.5) / 0.25)
    assert all(torch.equal(a, b) for a, b in zip(teacher.features(image), by_hand, strict=True))
    assert teacher.features(torch.rand(1, 3, 96, 192))[0].shape[-2:] == (8, 16)
    with pytest.raises(ValueError, match="unknown teacher dino.*toy-clip"):
        teachers.load_teacher("dino")


def test_teacher_cache(toy_cache, monkeypatch):
    """Catches a cache that is ignored, outlives its settings, or is read when it is damaged."""
    first = teachers.load_teacher("toy-sam").encoder.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "raise_toy", None)  # a second raising would fail
        again = teachers.load_teacher("toy-sam").encoder.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    (file,) = toy_cache.glob("toy-sam-*.safetensors")
    toy = teachers.TOYS["toy-sam"]
    assert teachers.toy_key("toy-sam", toy) != teachers.toy_key("toy-sam", toy._replace(steps=4))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name} is damaged.*delete it"):
        teachers.load_teacher("toy-sam")
    assert not list(toy_cache.glob(".*.part"))


def test_captions_are_read_as_they_are_written():
    """Catches left taken for right, articles in phrases, words that no caption has."""
    caption = ("a room with 2 balls, 1 plant: a red ball, an orange ball, a plant in a blue pot; "
               "the red ball is right of the orange ball; the orange ball is left of the plant in a blue pot")
    phrases, pairs = teachers.parse_caption(caption)
    assert phrases == ["red ball", "orange ball", "plant in a blue pot"]
    assert pairs == [("orange ball", "red ball"), ("orange ball", "plant in a blue pot")]
    assert teachers.parse_caption("an empty room") == ([], [])
    has, places, words = teachers.caption_tables([caption, "an empty room"])
    assert has.tolist() == [[True] * 3, [False] * 3] and (places[1] == -1).all()
    assert words.sum(1).tolist() == [2, 2, 2]  # orange ball; plant blue; red ball


def test_toy_objectives_by_hand():
    """Catches losses that reward the wrong answer: each against its perfect and its opposite case."""
    masks = torch.tensor([[[True, True, False, False]]])
    sure = torch.where(masks, 20.0, -20.0)
    assert teachers.mask_loss(sure, masks) < 1e-3 < 20 < teachers.mask_loss(-sure, masks)
    true = torch.eye(3, dtype=torch.bool)
    right = torch.where(true, 10.0, -10.0)
    for dim in (0, 1):
        assert teachers.contrast_loss(right, true, dim) < 1e-3
        assert teachers.contrast_loss(-right, true, dim) > 10
    x, places = torch.tensor([-1.0, 1.0]), torch.tensor([[[0, 1], [-1, -1]]])
    scores = torch.tensor([[[20.0, -20.0], [-20.0, 20.0]]])  # phrase 0 on the left, 1 on the right
    loss = teachers.place_loss(scores, x, places, 2.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-4)
    assert teachers.place_loss(scores, -x, places, 2.0).item() == pytest.approx(4 + loss.item(), rel=1e-4)


def test_probe_reads_what_is_there_and_no_more(small_world):
    """Catches a probe that finds labels in noise, or misses those that the features spell out."""
    world = data.World(small_world, "train", train=False)

    def told(images):
        near = [next(s for s in known if torch.equal(s["image"], image)) for image in images]
        depth = torch.stack([s["depth"] for s in near]).clamp(max=20)
        cells = F.interpolate(depth[:, None], (16, 16), mode="nearest-exact")
        return [F.pixel_unshuffle(cells, 4)] * 4

    known = [world[i] for i in range(len(world))]
    good = scoring.probe(told, world, world)["depth"]
    blind = scoring.probe(lambda images: [torch.zeros(len(images), 4, 4, 4)] * 4, world, world)["depth"]
    assert good < 0.5 * blind


# --------------------------------------------------------------------------------------- real teachers
# Tiny models of every family, stated twice: here by the keys and shapes of a file, in teachers.py by a
# layout. Weights and pixels come from a formula, so that the numbers which the families' own code gives
# (transformers 5.23, timm 1.0.31) can be stored here, and checked where neither is installed.
# linear: weight of that shape, and bias; norm: weight and bias; bare: itself. # stands for blocks 0 to 3.

DINOV2 = """
    bare embeddings.cls_token 1 1 16; bare embeddings.mask_token 1 16;
    bare embeddings.position_embeddings 1 17 16; linear embeddings.patch_embeddings.projection 16 3 4 4;
    norm encoder.layer.#.norm1 16; linear encoder.layer.#.attention.attention.query 16 16;
    linear encoder.layer.#.attention.attention.key 16 16;
    linear encoder.layer.#.attention.attention.value 16 16;
    linear encoder.layer.#.attention.output.dense 16 16; bare encoder.layer.#.layer_scale1.lambda1 16;
    norm encoder.layer.#.norm2 16; linear encoder.layer.#.mlp.fc1 32 16;
    linear encoder.layer.#.mlp.fc2 16 32; bare encoder.layer.#.layer_scale2.lambda1 16; norm layernorm 16"""
SIGLIP = """
    bare embeddings.position_embedding.weight 16 16; linear embeddings.patch_embedding 16 3 4 4;
    norm encoder.layers.#.layer_norm1 16; linear encoder.layers.#.self_attn.q_proj 16 16;
    linear encoder.layers.#.self_attn.k_proj 16 16; linear encoder.layers.#.self_attn.v_proj 16 16;
    linear encoder.layers.#.self_attn.out_proj 16 16; norm encoder.layers.#.layer_norm2 16;
    linear encoder.layers.#.mlp.fc1 32 16; linear encoder.layers.#.mlp.fc2 16 32; norm post_layernorm 16"""
TINY_FILES = {
    "dinov2": DINOV2,
    "dinov2-reg": DINOV2 + "; bare embeddings.register_tokens 1 4 16",
    "dinov2-g": DINOV2.replace("fc1 32 16", "weights_in 48 16").replace("fc2 16 32", "weights_out 16 24"),
    "clip": SIGLIP.replace("weight 16 16", "weight 17 16; bare embeddings.class_embedding 16").replace(
        "linear embeddings.patch_embedding", "norm pre_layrnorm 16; bare embeddings.patch_embedding.weight"),
    "siglip": SIGLIP + """; bare head.probe 1 1 16; bare head.attention.in_proj_weight 48 16;
        bare head.attention.in_proj_bias 48; linear head.attention.out_proj 16 16; norm head.layernorm 16;
        linear head.mlp.fc1 32 16; linear head.mlp.fc2 16 32""",
    "dinov3": """
        bare embeddings.cls_token 1 1 16; bare embeddings.mask_token 1 1 16;
        bare embeddings.register_tokens 1 4 16; linear embeddings.patch_embeddings 16 3 4 4;
        norm layer.#.norm1 16; linear layer.#.attention.q_proj 16 16;
        bare layer.#.attention.k_proj.weight 16 16;
        linear layer.#.attention.v_proj 16 16; linear layer.#.attention.o_proj 16 16;
        bare layer.#.layer_scale1.lambda1 16; norm layer.#.norm2 16; linear layer.#.mlp.up_proj 32 16;
        linear layer.#.mlp.down_proj 16 32; bare layer.#.layer_scale2.lambda1 16; norm norm 16""",
    "sam": """
        bare vision_encoder.pos_embed 1 5 5 16; linear vision_encoder.patch_embed.projection 16 3 4 4;
        norm vision_encoder.layers.#.layer_norm1 16; linear vision_encoder.layers.#.attn.qkv 48 16;
        linear vision_encoder.layers.#.attn.proj 16 16; norm vision_encoder.layers.#.layer_norm2 16;
        bare vision_encoder.layers.#.attn.rel_pos_h R 8; bare vision_encoder.layers.#.attn.rel_pos_w R 8;
        linear vision_encoder.layers.#.mlp.lin1 32 16; linear vision_encoder.layers.#.mlp.lin2 16 32;
        bare vision_encoder.neck.conv1.weight 8 16 1 1; norm vision_encoder.neck.layer_norm1 8;
        bare vision_encoder.neck.conv2.weight 8 8 3 3; norm vision_encoder.neck.layer_norm2 8""",
    "vit": """
        bare cls_token 1 1 16; bare pos_embed 1 17 16; linear patch_embed.proj 16 3 4 4;
        norm blocks.#.norm1 16; linear blocks.#.attn.qkv 48 16; linear blocks.#.attn.proj 16 16;
        norm blocks.#.norm2 16; linear blocks.#.mlp.fc1 32 16; linear blocks.#.mlp.fc2 16 32; norm norm 16;
        linear head 5 16""",
}
GRIDS = {"native": (4, 4), "larger": (6, 6), "not square": (3, 7)}  # patches; SAM's have one more per side
STORED = {  # per grid: of each block, one element and a weighted sum; from their own code, see below
    "dinov2": [
        [-0.192215, -0.869689, -0.155135, -0.949501, -0.091045, -0.905375, -0.069127, -0.855949],
        [-0.289254, 1.681891, -0.254618, 1.713382, -0.361661, 1.688353, -0.372573, 1.973652],
        [-1.180795, 0.304712, -1.148523, 0.378809, -1.214815, 0.38385, -1.167468, 0.258006],
    ],
    "dinov2-reg": [
        [-0.191415, -0.868653, -0.168978, -0.962001, -0.091602, -0.927209, -0.070271, -0.885393],
        [-0.25947, 1.642668, -0.229847, 1.676062, -0.338454, 1.654303, -0.347821, 1.938982],
        [-1.15715, 0.302806, -1.132559, 0.370947, -1.194153, 0.386975, -1.145516, 0.252116],
    ],
    "dinov2-g": [
        [-0.187034, -0.856843, -0.142148, -0.857288, -0.255986, -0.854609, -0.201335, -0.826503],
        [-0.296932, 1.642906, -0.265235, 1.616135, -0.320319, 1.558029, -0.287083, 1.62339],
        [-1.187642, 0.278388, -1.150072, 0.262657, -1.196125, 0.258579, -1.169987, 0.317039],
    ],
    "clip": [
        [1.496907, -0.980507, 1.503835, -1.110811, 1.617418, -1.19233, 2.278018, -1.213096],
        [0.625639, 1.617999, 0.803237, 2.717127, 0.54275, 2.738235, 1.46735, 2.085452],
        [0.377854, 1.298041, 0.954804, 1.394302, 0.928408, 2.285096, 0.946294, 2.406089],
    ],
    "siglip": [
        [-0.124504, 0.529086, 0.519002, 0.249665, -0.51109, 0.436382, -0.292209, 0.340602],
        [-1.193239, 0.470071, -0.924119, -0.684828, -1.208802, -0.023066, -0.739435, -0.080866],
        [0.046477, -0.594866, 0.38551, -0.905074, 0.725596, -1.301709, 0.762781, -0.118784],
    ],
    "dinov3": [
        [-0.010983, -0.709963, 0.033002, -0.697935, -0.033125, -0.624037, -0.03135, -0.651896],
        [-0.202491, 0.822478, -0.168466, 0.761187, -0.118587, 0.806442, -0.233524, 0.589697],
        [-1.021364, 0.307091, -0.956401, 0.350519, -0.973711, 0.220807, -1.001268, 0.310412],
    ],
    "sam": [
        [-0.719888, -3.645452, -0.664456, -5.251978, -2.391389, -5.515706, -2.422527, -5.406959],
        [-1.237291, -1.853181, -0.986191, -0.453777, -1.588717, -0.664986, -1.610779, 0.063704],
        [-0.349196, 1.430585, 0.302999, 1.131476, -0.160479, 1.367157, -0.5204, 0.681761],
    ],
    "vit": [
        [-0.486255, -0.745737, -0.658285, -0.585071, -0.748498, -0.598541, -0.475047, -0.519929],
        [-0.810186, 1.769777, -0.840699, 1.402072, -1.055154, 1.598355, -1.168124, 1.60534],
        [-1.353316, 0.069898, -0.773691, -0.323651, -0.843944, -0.842112, -1.023871, -1.18912],
    ],
}


def formula(seed: int, *shape: int) -> torch.Tensor:
    """Numbers in [-1, 1) that look random and are the same everywhere."""
    x = np.sin(np.arange(1, 1 + math.prod(shape)) * 12.9898 + seed * 78.233) * 43758.5453
    return torch.from_numpy((2 * (x - np.floor(x)) - 1).reshape(shape).astype(np.float32))


def tiny_file(family: str) -> dict[str, torch.Tensor]:
    """The weights of a tiny model of a family, by the keys of its files."""
    state = {}
    for line in TINY_FILES[family].split(";"):
        kind, name, *shape = line.split()
        for i in range(4 if "#" in name else 1):
            key = name.replace("#", str(i))
            sides = [(9 if i % 2 else 5) if side == "R" else int(side) for side in shape]  # SAM's windows: 3
            value = 0.3 * formula(len(state), *sides)
            if kind == "bare":
                state[key] = value
            else:
                state[key + ".weight"] = 1 + value if kind == "norm" else value
                state[key + ".bias"] = 0.3 * formula(len(state) + 1, sides[0])
    return state


def tiny_folder(folder, family: str, config: dict | None = None, state: dict | None = None) -> str:
    """Write a folder as the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tiny_file(family) if state is None else state, folder / "model.safetensors")
    config = {"num_attention_heads": 2, "model_type": family} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def digest(maps: list[torch.Tensor]) -> list[float]:
    """Two numbers per block: one element, and a sum over all with changing weights."""
    return [value for x in maps for value in (
        x[0, 3, 1, 2].item(), (x[0].flatten() * torch.arange(x[0].numel()).cos()).sum().item() / 10)]


def tiny_pixels(family: str, grid: tuple[int, int]) -> torch.Tensor:
    h, w = (side + (family == "sam") for side in grid)
    return formula(999, 1, 3, 4 * h, 4 * w)


@pytest.mark.parametrize("family", TINY_FILES)
def test_teachers_give_the_stored_numbers(family, tmp_path):
    """A mix-up of q and k, of activations or eps, a transposed grid, another rule for the position table.
    The numbers are those of the families' own code; the first is at the position table's grid."""
    teacher = teachers.load_teacher(tiny_folder(tmp_path, family))
    for grid, stored in zip(GRIDS.values(), STORED[family], strict=True):
        found = digest(teacher.blocks(tiny_pixels(family, grid)))
        assert found == pytest.approx(stored, abs=1e-5), (grid, found)


# Against transformers, where it is installed (no requirement of ours).


def hub_model(family: str):
    """Make a family's tiny model, of the shapes of TINY_FILES, by transformers."""
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4}
    dino = sizes | {"image_size": 16, "mlp_ratio": 2}
    vision = sizes | {"image_size": 16, "intermediate_size": 32}
    sam = vision | {"image_size": 20, "window_size": 3, "global_attn_indexes": [1, 3], "output_channels": 8,
                    "mlp_dim": 32}
    return {
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**dino)),
        "dinov2-reg": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino)),
        "dinov2-g": lambda: t.Dinov2Model(t.Dinov2Config(**dino, use_swiglu_ffn=True)),
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**vision)),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**vision)),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**vision, num_register_tokens=4)),
        "sam": lambda: t.SamModel(t.SamConfig(vision_config=sam)),
    }[family]().eval()


def hub_states(model, family: str, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the output of every block of a transformers model, in its own shape."""
    if family == "sam":
        return model.vision_encoder(pixels, output_hidden_states=True).hidden_states[1:]
    resize = {"interpolate_pos_encoding": True} if family in ("clip", "siglip") else {}
    return model(pixels, output_hidden_states=True, **resize).hidden_states[1:]


@torch.no_grad()
def hub_blocks(model, family: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of every block of a tiny transformers model as depth maps of the patches."""
    h, w = (side // 4 for side in pixels.shape[-2:])
    if family != "sam":
        states = hub_states(model, family, pixels)
        return [x[:, -h * w :].transpose(1, 2).unflatten(2, (h, w)) for x in states]
    encoder = model.vision_encoder  # it knows one size; its table is resized here, by our rule
    table = encoder.pos_embed.permute(0, 3, 1, 2)
    if (h, w) != table.shape[2:]:
        table = F.interpolate(table, (h, w), mode="bicubic", align_corners=False)
    encoder.pos_embed.data = table.permute(0, 2, 3, 1)
    encoder.patch_embed.image_size = pixels.shape[-2:]
    return [x.permute(0, 3, 1, 2) for x in hub_states(model, family, pixels)]


def difference_from_transformers(family: str, grid: tuple[int, int]) -> float:
    """Return the largest difference of any block's output on random weights, through a saved folder."""
    torch.manual_seed(0)
    model = hub_model(family)
    for name, p in model.named_parameters():
        p.data = 0.3 * torch.randn_like(p) + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = teachers.load_teacher(folder).blocks(tiny_pixels(family, grid))
    theirs = hub_blocks(model, family, tiny_pixels(family, grid))
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", [family for family in TINY_FILES if family != "vit"])
def test_every_block_equals_transformers(family, grid):
    """Anything at all that differs from the families' own code."""
    assert difference_from_transformers(family, GRIDS[grid]) <= 1e-5


@pytest.mark.parametrize("family", [family for family in TINY_FILES if family != "vit"])
def test_stored_numbers_are_those_of_transformers(family, tmp_path):
    """Stored numbers that were copied from ours; tiny files whose keys the families do not have."""
    folder = tiny_folder(tmp_path, family, hub_model(family).config.to_dict())
    for grid, stored in zip(GRIDS.values(), STORED[family], strict=True):
        model, report = type(hub_model(family)).from_pretrained(folder, output_loading_info=True)
        assert not {key for key in report["missing_keys"] if "decoder" not in key and "prompt" not in key
                    and "shared" not in key} | set(report["unexpected_keys"])
        found = digest(hub_blocks(model.eval(), family, tiny_pixels(family, grid)))
        assert found == pytest.approx(stored, abs=1e-5), (grid, found)


@pytest.mark.parametrize("family", ["dinov3", "sam"])
def test_encoders_compile_whole_and_run_in_bfloat16(family, tmp_path):
    """A graph break or a recompilation per number of images on the GPU; a dtype that autocast does not
    expect, a residual stream that loses its float32."""
    teacher = teachers.load_teacher(tiny_folder(tmp_path, family))
    compiled = torch.compile(teacher.encoder, fullgraph=True, dynamic=True, backend="eager")
    for B in (2, 3):
        x = tiny_pixels(family, (3, 7)).repeat(B, 1, 1, 1)
        expected = teacher.encoder(x, teacher.levels)
        for a, b in zip(compiled(x, teacher.levels), expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        rough = teacher.encoder(x, teacher.levels)
    for a, b in zip(rough, expected, strict=True):
        assert a.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05 * b.abs().max()


DINO_NAMES = {  # ours, from the hub's, to those of other files; @ marks parts to be stacked
    r"embeddings\.((cls|mask)_token)": r"\1", r"embeddings\.register_tokens": "register_tokens",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"encoder\.layer\.": "blocks.", r"attention\.attention\.(query|key|value)": "attn.qkv@",
    r"attention\.output\.dense": "attn.proj", r"layer_scale(.)\.lambda1": r"ls\1.gamma",
    "layernorm": "norm", "weights_in": "w12", "weights_out": "w3"}
TIMM_CLIP_NAMES = {
    r"embeddings\.class_embedding": "cls_token", r"embeddings\.position_embedding\.weight": "pos_embed",
    r"embeddings\.patch_embedding": "patch_embed.proj", "pre_layrnorm": "norm_pre", "post_layernorm": "norm",
    r"encoder\.layers": "blocks", r"self_attn\.[qkv]_proj": "attn.qkv@", r"self_attn\.out_proj": "attn.proj",
    "layer_norm": "norm"}
OPEN_CLIP_NAMES = {
    r"embeddings\.class_embedding": "visual.class_embedding", "pre_layrnorm": "visual.ln_pre",
    r"embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"embeddings\.patch_embedding": "visual.conv1", "post_layernorm": "visual.ln_post",
    r"encoder\.layers": "visual.transformer.resblocks", "layer_norm": "ln_", r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj", r"self_attn\.[qkv]_proj\.": "attn.in_proj_@", "self_attn": "attn"}
SAM_NAMES = {"vision_encoder": "image_encoder", "layers": "blocks", "projection": "proj",
             r"neck\.conv": "neck.0", r"neck\.layer_norm": "neck.1", "layer_norm": "norm"}
FULL_CLIP = {"": "vision_model.", "vision_model.(text_model|logit|text_pro|visual_pro)": r"\1"}
OTHER_FILES = {  # case -> family, names, keys of other networks in the same file, config.json
    "DINOv2, original": ("dinov2", DINO_NAMES, "", {}),
    "registers, original": ("dinov2-reg", DINO_NAMES, "", {}),
    "registers, timm": ("dinov2-reg", DINO_NAMES | {"register_tokens": "reg_token"}, "head.weight", {}),
    "giant, original": ("dinov2-g", DINO_NAMES, "", {}),
    "CLIP, full": ("clip", FULL_CLIP, "embeddings.position_ids text_model.norm.weight logit_scale "
                   "visual_projection.weight text_projection.weight", {"model_type": "clip"}),
    "SigLIP, full": ("siglip", FULL_CLIP, "text_model.head.weight logit_scale logit_bias", {}),
    "CLIP, timm": ("clip", TIMM_CLIP_NAMES, "head.weight", {"architecture": "clip_quickgelu_224"}),
    "CLIP, open_clip": ("clip", OPEN_CLIP_NAMES, "visual.proj positional_embedding text_projection "
                        "transformer.resblocks.0.ln_1.weight token_embedding.weight ln_final.bias "
                        "logit_scale", {"hidden_act": "quick_gelu"}),
    "SAM, original": ("sam", SAM_NAMES, "prompt_encoder.a mask_decoder.b", {}),
    "SAM, encoder alone": ("sam", {r"vision_encoder\.": ""}, "", {}),
}


def rename(state: dict, names: dict[str, str]) -> dict:
    """Rename keys by regex, one rule after the other, and stack the parts marked @."""
    parts = {}
    for key, value in state.items():
        for pattern, to in names.items():
            key = re.sub("^" + pattern if pattern == "" else pattern, to, key, count=1)
        parts.setdefault(key.replace("@", ""), []).append(value)
    return {key: torch.cat(values) if len(values) > 1 else values[0] for key, values in parts.items()}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_layouts_of_the_same_weights(case, tmp_path):
    """A key of one layout mapped to the wrong weight; other networks' weights in the file; pickles in
    wrappers and in half precision."""
    family, names, others, config = OTHER_FILES[case]
    state = tiny_file(family) | {key: torch.ones(3) for key in others.split()}
    state = rename(state, names)
    if "reg_token" in state:  # timm: the class token's position is already in it
        pos = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + pos[:, :1], "pos_embed": pos[:, 1:]}
    tiny_folder(tmp_path, family, {"num_attention_heads": 2} | config, {})
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "tiny.pth"
    torch.save({"model": state} if "original" in case else {"state_dict": state}, file)
    x = tiny_pixels(family, (3, 7))
    expected = teachers.load_teacher(tiny_folder(tmp_path / "hub", family)).blocks(x)
    for a, b in zip(teachers.load_teacher(str(file)).blocks(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    torch.save({key: value.half() for key, value in state.items()}, file)
    assert (teachers.load_teacher(str(file)).blocks(x)[-1] - expected[-1]).abs().max() < 0.02


def test_activation_and_heads_come_from_the_config(tmp_path, monkeypatch):
    """LAION's CLIP run with OpenAI's QuickGELU, or the other way round; a file without a config guessed
    silently."""
    def activation(name, config=None, sidecar=None, file="clip"):
        folder = Path(tiny_folder(tmp_path / name, file, config))
        for path, content in (sidecar or {}).items():
            (folder / path).write_text(json.dumps(content))
        return teachers.load_teacher(str(folder)).encoder.cfg.activation

    heads = {"num_attention_heads": 2}
    assert activation("laion", heads | {"hidden_act": "gelu"}) == "gelu"
    assert activation("full", {"vision_config": heads | {"hidden_act": "gelu"}}) == "gelu"
    assert activation("openai", {"vision_config": heads | {"hidden_act": "quick_gelu"}}) == "quick_gelu"
    assert activation("siglip", heads | {"hidden_act": "gelu_pytorch_tanh"}, file="siglip") == "gelu_tanh"
    openai = heads | {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "openai"}}
    assert activation("timm", openai) == "quick_gelu"
    beside = {"open_clip_config.json": {"model_cfg": {"quick_gelu": False}}}
    assert activation("open_clip", heads, beside) == "gelu"
    with pytest.raises(ValueError, match="activation relu; known are gelu"):
        activation("other", heads | {"hidden_act": "relu"})
    monkeypatch.setitem(teachers.HEADS, 16, 2)
    with pytest.warns(UserWarning, match="quick_gelu"):
        assert activation("none", {}) == "quick_gelu"


@pytest.mark.parametrize("width, heads", [(192, 3), (384, 6), (768, 12), (1152, 16), (1280, None)])
def test_heads_without_a_config(width, heads, tmp_path):
    """A bare file of the original repositories refused, or its heads guessed where families differ."""
    state = {key: torch.zeros([{16: width, 48: 3 * width}.get(side, side) for side in value.shape])
             for key, value in tiny_file("vit").items()}
    save_file(state, tmp_path / "vit.safetensors")
    if heads is None:
        with pytest.raises(ValueError, match="an unknown number of heads"):
            teachers.load_teacher(str(tmp_path / "vit.safetensors"))
    else:
        assert teachers.load_teacher(str(tmp_path / "vit.safetensors")).encoder.cfg.heads == heads


def test_normalisation_comes_from_the_files(tmp_path):
    """A teacher fed another family's mean and std; timm's large CLIP with OpenAI's."""
    clip = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}}
    given = {"image_mean": [0.4, 0.5, 0.6], "image_std": [4, 5, 6]}
    folder = Path(tiny_folder(tmp_path, "clip"))
    for file, content, mean, std in (
            ("config.json", {"num_attention_heads": 2, "hidden_act": "gelu"},
             (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            ("open_clip_config.json", clip, (0.1, 0.2, 0.3), (1, 2, 3)),
            ("preprocessor_config.json", given, (0.4, 0.5, 0.6), (4, 5, 6))):
        (folder / file).write_text(json.dumps(content))
        teacher = teachers.load_teacher(str(folder))
        image = torch.rand(1, 3, 8, 12)
        expected = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(teacher.prepare(image), expected)
        assert teacher.provenance["mean"] == list(mean) and teacher.provenance["std"] == list(std)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("encoder.layer.2.mlp.fc1.bias"), r"1 keys missing \(encoder.layer.2.mlp.fc1.bias\)"),
    (lambda s: s.pop("embeddings.cls_token"), r"missing \(embeddings.cls_token\)"),
    (lambda s: s.update({"classifier.weight": torch.ones(2)}), r"1 keys unexpected \(classifier.weight\)"),
    (lambda s: s.update({"encoder.layer.3.mlp.fc2.weight": torch.ones(16, 8)}), r"fc2.weight is \(16, 8\)"),
    (lambda s: s.update({"embeddings.position_embeddings": torch.ones(1, 13, 16)}), "13 rows"),
    (lambda s: [s.pop(k) for k in list(s) if "layer" in k], "no known layout.*SAM"),
    (lambda s: s.update({"embeddings.patch_embeddings.projection.weight": torch.ones(16, 48)}), "a matrix"),
])
def test_files_that_do_not_fit_are_named(change, message, tmp_path):
    """Partial loading; an error that does not say which key."""
    state = tiny_file("dinov2")
    change(state)
    with pytest.raises(ValueError, match=message) as error:
        teachers.load_teacher(tiny_folder(tmp_path, "dinov2", state=state))
    assert "DINOv2" in str(error.value) and "\n" not in str(error.value)


def test_bad_sources_are_named(tmp_path):
    """A typo that becomes a download; damaged files; heads guessed wrong; another file than was meant."""
    with pytest.raises(ValueError, match="toy-clip is raised, not read"):
        teachers.read_source("toy-clip")
    for source in ("dinov2", "sam_b", "/nowhere/model.safetensors", "out/typo.pth"):
        with pytest.raises(ValueError, match=f"unknown teacher {source}.*dinov2-b"):
            teachers.load_teacher(source)
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ValueError, match="has no weights; put model.safetensors"):
        teachers.load_teacher(str(folder))
    path = Path(tiny_folder(tmp_path / "t", "dinov2", {}))
    with pytest.raises(ValueError, match="heads do not divide the width 16.*num_attention_heads"):
        teachers.load_teacher(str(path))
    with pytest.raises(ValueError, match="sha256.*instead of 00"):
        teachers.load_teacher(str(path), sha256="00")
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        teachers.load_teacher(str(path))
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        teachers.load_teacher(str(path))
    torch.save({"model": [1, 2]}, tmp_path / "odd.bin")
    with pytest.raises(ValueError, match="no table of weights"):
        teachers.load_teacher(str(tmp_path / "odd.bin"))


def test_images_are_resized_to_whole_patches(tmp_path):
    """Pixels beyond the last whole patch dropped; the ratio of the sides lost."""
    teacher = teachers.load_teacher(tiny_folder(tmp_path, "dinov2"))
    image = torch.rand(2, 3, 22, 31)  # 5.5 x 7.75 patches
    assert teacher.prepare(image).shape == (2, 3, 24, 32)
    assert [level.shape for level in teacher.features(image)] == [(2, 16, 6, 8)] * 4
    whole = F.interpolate(image, (24, 32), mode="bilinear", align_corners=False, antialias=True)
    expected = teacher.blocks((whole - teacher.encoder.mean) / teacher.encoder.std)
    for level, depth_map in zip(teacher.features(image), expected, strict=True):
        torch.testing.assert_close(level, depth_map)
    small = teachers.load_teacher(str(tmp_path), size=12)
    assert small.features(image)[0].shape == (2, 16, 3, 4)
    with pytest.raises(ValueError, match="size 13 is not a multiple of its patch 4; use 12 or 16"):
        teachers.load_teacher(str(tmp_path), size=13)


@pytest.mark.parametrize("depth, levels", [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (27, [5, 12, 19, 26])])
def test_levels_are_quarters_of_the_depth(depth, levels):
    """Levels of the wrong blocks: of the first one, say, where the paper has a quarter of the depth."""
    cfg = replace(teachers.EncoderConfig(), dim=6, hidden=6, depth=depth)
    assert teachers.Teacher(teachers.Encoder(cfg), None, {}).levels == levels


def test_sam_pads_after_normalising_and_crops_the_map(tmp_path):
    """SAM's padding left in the map: the student would be stretched over it; padding that is normalised."""
    teacher = teachers.load_teacher(tiny_folder(tmp_path, "sam"))  # 20 pixels, 5 x 5 patches
    image = torch.rand(2, 3, 26, 40)
    small = F.interpolate(image, (13, 20), mode="bilinear", align_corners=False, antialias=True)
    pixels = torch.zeros(2, 3, 20, 20)
    pixels[:, :, :13] = (small - teacher.encoder.mean) / teacher.encoder.std
    expected = [level[:, :, :3] for level in teacher.blocks(pixels)]  # 13 pixels: 3.25 patches
    for level, depth_map in zip(teacher.features(image), expected, strict=True):
        torch.testing.assert_close(level, depth_map)
    assert teacher.features(image.transpose(2, 3))[0].shape == (2, 16, 5, 3)
    assert teacher.resized(27, 40) == (14, 20), "13.5 pixels are rounded up, as SAM does"
    assert "approximation" not in teacher.provenance
    large = teachers.load_teacher(str(tmp_path), size=40)
    assert large.features(image)[0].shape == (2, 16, 6, 10)  # 26 pixels: 6.5 patches, rounded to even
    assert large.provenance["approximation"] == "longest side 40 px instead of 20"


def test_any_mix_of_teachers_trains_and_is_recorded(small_world, tmp_path, toy_cache, monkeypatch):
    """Checkpoints that do not say which weights taught; --sam-size without a trace; a resume with other
    teachers of the same names."""
    clip, sam = (tiny_folder(tmp_path / f, f, {"num_attention_heads": 2, "hidden_act": "gelu"})
                 for f in ("clip", "sam"))
    monkeypatch.setitem(prism.SIZES, "toy", replace(TINY, teachers={}, tasks={}))
    settings = {"stage": "deconstruct", "teachers": ("toy-sam", f"laion={clip}", sam), "sam_size": 12}
    stored = tiny_run(small_world, tmp_path / "out", steps=2, log_every=1, **settings)
    assert stored["config"]["teachers"] == {"toy-sam": 16, "laion": 16, "sam": 16}
    said = stored["provenance"]["teachers"]
    assert [teacher["kind"] for teacher in said.values()] == ["toy", "CLIP", "SAM"]
    for name, folder in (("laion", clip), ("sam", sam)):
        digest = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
        assert said[name]["sha256"] == digest and said[name]["licence"] == "not stated"
        assert said[name]["source"] == folder, "eval.py --analysis finds it there"
    assert said["sam"]["approximation"] == "longest side 12 px instead of 20" and said["sam"]["size"] == 12
    assert said["laion"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    with pytest.raises(ValueError, match="cannot go on from.*teachers"):
        tiny_run(small_world, tmp_path / "out", steps=2, **settings | {"sam_size": 16})
    with pytest.raises(ValueError, match="no teacher of toy-sam is a SAM"):
        tiny_run(small_world, tmp_path / "out", **settings | {"teachers": ("toy-sam",)})
    with pytest.raises(ValueError, match="name each once"):
        tiny_run(small_world, tmp_path / "out", **settings | {"teachers": (sam, f"sam={clip}")})


def test_student_starts_from_a_vit(tmp_path, small_world, toy_cache, monkeypatch):
    """A trunk that starts elsewhere than its ImageNet weights; experts that are no copies of their MLP."""
    folder = tiny_folder(tmp_path / "vit", "vit", {"pretrained_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}})
    monkeypatch.setitem(teachers.HEADS, 16, 2)
    state = tiny_file("vit")
    cfg = prism.PrismConfig(dim=16, depth=4, heads=2, patch=4, grid=(4, 4), moe_blocks=(0, 1, 2, 3),
                            experts=3, top_k=2, mlp_ratio=2, expert_ratio=2, teachers={"a": 8})
    model = prism.Prism(cfg).eval()
    report = prism.start_from_vit(model, state, folder)
    assert report == ("loaded 54, new 81 (experts, gate, projectors, router, shared, teacher_embed), "
                      "dropped 2 (head)")
    model.expect((0.4,) * 3, (0.2,) * 3)
    vit = teachers.load_teacher(folder)
    with torch.no_grad():  # anchor and shared expert alone, both copies of the MLP: a plain ViT
        for block in model.blocks:
            block.experts.w2.zero_(), block.experts.b2.zero_()
        images = torch.rand(2, 3, 16, 24)
        levels = model.features(images, "a")
        expected = [F.layer_norm(x.movedim(1, -1), (16,), state["norm.weight"], state["norm.bias"], 1e-6)
                    for x in vit.blocks(vit.prepare(images))]
    for level, x in zip(levels, expected, strict=True):
        torch.testing.assert_close(level.movedim(1, -1), x)
    again = prism.Prism(cfg)
    prism.start_from_vit(again, state, folder)
    for e in range(3):
        torch.testing.assert_close(again.blocks[1].experts.w1[e], state["blocks.1.mlp.fc1.weight"])
    monkeypatch.setitem(prism.SIZES, "toy", replace(cfg, teachers={}))
    stored = tiny_run(small_world, tmp_path / "out", stage="all", steps=2, teachers=("toy-sam",), init=folder)
    assert stored["config"]["mean"] == (0.4,) * 3, "stage 2 forgot what its trunk was trained on"
    first = prism.read_checkpoint(tmp_path / "out" / "deconstruct.pt")["provenance"]["init"]
    assert first.startswith("vit ") and len(first.split()[1]) == 12
    torch.save(state, tmp_path / "vit.pth")  # no checkpoint of ours or of the released code
    stored = tiny_run(small_world, tmp_path / "pth", stage="deconstruct", steps=1, teachers=("toy-sam",),
                      init=str(tmp_path / "vit.pth"))
    assert stored["provenance"]["init"].startswith("vit.pth ")
    with pytest.raises(ValueError, match="do not fit this student"):
        prism.start_from_vit(prism.Prism(replace(cfg, dim=32)), state, folder)


def test_the_ten_lines_of_readme_add_a_teacher(tmp_path, monkeypatch):
    """README's example rots. Its layout is that of ViT on the hub: the tiny ViT under those names gives
    the numbers stored for it."""
    monkeypatch.setattr(teachers, "LAYOUTS", list(teachers.LAYOUTS))
    monkeypatch.setattr(teachers, "SOURCES", dict(teachers.SOURCES))
    readme = Path(teachers.__file__).with_name("README.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "LAYOUTS" in block]
    assert len(lines.splitlines()) <= 10
    exec(lines, vars(teachers))
    names = {"^": "embeddings.", r"embeddings\.(blocks|norm|head)": r"\1", "pos_embed": "position_embeddings",
             r"patch_embed\.proj": "patch_embeddings.projection", "blocks": "encoder.layer",
             "norm1": "layernorm_before", "norm2": "layernorm_after", r"attn\.proj": "attention.output.dense",
             r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense", "^norm": "layernorm"}
    state = {k: v for k, v in tiny_file("vit").items() if not k.startswith("head")}
    for key in [k for k in state if "qkv" in k]:
        for part, rows in zip(("query", "key", "value"), state.pop(key).chunk(3), strict=True):
            state[key.replace("attn.qkv", f"attention.attention.{part}")] = rows
    state = {key: value.contiguous().clone() for key, value in rename(state, names).items()}
    config = {"num_attention_heads": 2, "layer_norm_eps": 1e-6}
    teacher = teachers.load_teacher(tiny_folder(tmp_path, "vit", config, state))
    assert digest(teacher.blocks(tiny_pixels("vit", (4, 4)))) == pytest.approx(STORED["vit"][0], abs=1e-5)
    assert teacher.encoder.cfg.mean == teachers.IMAGENET["mean"] and "dino-b" in teachers.SOURCES


def test_pictures_of_features(tmp_path, capsys):
    """Colours that do not follow the features; photos lying on their side; a command that draws nothing."""
    ramp = torch.arange(6.0).repeat(5, 1)  # (h, w)
    level = torch.stack([3 * ramp, 2 * ramp.flip(0) + torch.arange(5.0)[:, None], 0 * ramp, 0 * ramp])
    picture, share = teachers.pca_picture(level)
    assert share == pytest.approx(1) and picture.shape == (5, 6, 3)
    assert (np.diff(picture[2, :, 0].astype(int)) > 0).all(), "the main direction is from left to right"
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert data.read_photo(tmp_path / "photo.jpg").shape == (60, 40, 3)
    assert data.read_photo(tmp_path / "photo.jpg", 30).shape == (30, 20, 3)
    folder = tiny_folder(tmp_path / "dinov2", "dinov2")
    image = (tmp_path / "photo.jpg",)
    teachers.main(teachers.Args(names=(folder,), image=image, out_dir=tmp_path, device="cpu"))
    with Image.open(tmp_path / "features.png") as drawn:
        assert drawn.size == (5 * 264 + 8, 384 + 60)
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 100
    assert "sha256" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="photo nowhere.jpg does not exist"):
        data.read_photo(Path("nowhere.jpg"))
    with pytest.raises(ValueError, match="name one, such as dinov2-b"):
        teachers.main(teachers.Args(image=image))


def test_list_of_teachers(capsys, tmp_path, monkeypatch):
    """A list that lacks a teacher or does not see what is cached."""
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path))
    folder = teachers.repo_folder("facebook/sam-vit-base")
    tiny_folder(folder, "sam")
    teachers.main(teachers.Args())
    lines = capsys.readouterr().out.splitlines()
    for name, source in teachers.SOURCES.items():
        (line,) = [line for line in lines if f" {name} " in line]
        assert source.repo in line and source.licence in line and ("MB" in line) == (name == "sam-b")
    assert teachers.load_teacher("sam-b").provenance["source"] == "facebook/sam-vit-base"


# ------------------------------------------------------------------------------------------- downloads

CHUNK = teachers.CHUNK
BODY = random.Random(0).randbytes(5 * CHUNK + 321)
SHA256, CUT = hashlib.sha256(BODY).hexdigest(), 2 * CHUNK + 100
HELLO_GIT = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object, of "hello" and a newline


class Hub(ThreadingHTTPServer):
    """A hub on this machine, with the faults that a test gives it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.files = {"config.json": b"{}", "model.safetensors": BODY, "hello.txt": b"hello\n"}
        self.etags = {"model.safetensors": f'"{SHA256}"', "hello.txt": f'W/"{HELLO_GIT}"'}
        self.faults = []  # of the next answers: a status, or (above 1000) bytes after which the line breaks
        self.ranges, self.store = True, None  # store: host that the hub redirects to
        self.asked, self.served = [], 0  # (host, file, range, authorization); bytes
        self.reached, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def url(self, name: str = "model.safetensors") -> str:
        """Return the address of a file."""
        return f"http://127.0.0.1:{self.server_port}/lab/vit/resolve/main/{name}"

    def handle_error(self, request, client_address):
        """Say nothing of clients that were killed."""


class HubAnswer(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, name, host = self.server, Path(self.path).name, self.headers["Host"].split(":")[0]
        asked, body = self.headers["Range"], hub.files.get(name)
        hub.asked.append((host, name, asked, self.headers["Authorization"]))
        hub.reached.set()
        hub.gate.wait(60)
        fault = hub.faults.pop(0) if hub.faults else 404 if body is None else 10**9
        if fault < 1000:
            return self.answer(fault)
        headers, etag = {"X-Repo-Commit": "c0ffee"}, hub.etags.get(name, '"0-1"')
        if hub.store and host != hub.store:
            return self.answer(302, Location=f"http://{hub.store}:{hub.server_port}/{name}", **headers,
                               **{"X-Linked-Etag": etag, "X-Linked-Size": len(body)})
        headers = {"ETag": f'"{"f" * 64}"'} if hub.store else headers | {"ETag": etag}  # f: hash of nothing
        first = int(asked.strip("bytes=-")) if asked and hub.ranges else 0
        if first >= len(body):
            return self.answer(416, **{"Content-Range": f"bytes */{len(body)}"})
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        self.answer(206 if first else 200, body[first:], fault, **headers)

    def answer(self, status, body=b"", stop=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.server.served += len(body[:stop])
        self.wfile.write(body[:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name, value in {"PRISM_CACHE": str(tmp_path), "NO_PROXY": "*",
                        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}/"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(teachers, "PAUSE", 0)
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


def resumed_from(hub) -> int:
    """Return where the last request wanted to go on."""
    return int(re.fullmatch(r"bytes=(\d+)-", hub.asked[-1][2])[1])


def test_broken_line_is_resumed(hub, tmp_path):
    """Catches a retry that starts from nothing, asks for bytes it has, or drops or doubles some."""
    hub.faults = [CUT, 500, 503]
    facts = teachers.download(hub.url(), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and facts == {"commit": "c0ffee", "sha256": SHA256}
    start = resumed_from(hub)
    assert CUT - CHUNK < start <= CUT and hub.served == CUT + len(BODY) - start
    assert len(hub.asked) == 4 and sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_giving_up_keeps_the_part(hub, tmp_path):
    """Catches endless retries, pauses that count from the start, a gigabyte thrown away with the error."""
    hub.faults = [500] * 5 + [CUT] + [500] * 5
    with pytest.raises(ConnectionError, match="gave up on .*answered 500.*0.1 MB are kept") as caught:
        teachers.download(hub.url(), tmp_path / "x")
    assert "\n" not in str(caught.value) and not hub.faults and not (tmp_path / "x").exists()
    kept = (tmp_path / "x.part").stat().st_size
    teachers.download(hub.url(), tmp_path / "x")
    assert resumed_from(hub) == kept > CHUNK and (tmp_path / "x").read_bytes() == BODY


def test_server_without_ranges(hub, tmp_path):
    """Catches a whole file appended to a part, and a line that breaks for ever taken for progress."""
    hub.ranges, hub.faults = False, [CUT]
    teachers.download(hub.url(), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and hub.served == CUT + len(BODY)
    hub.faults = [CUT] * 99
    with pytest.raises(ConnectionError, match="gave up"):
        teachers.download(hub.url(), tmp_path / "y")
    assert len(hub.faults) == 99 - 1 - teachers.RETRIES


@pytest.mark.parametrize("etag, sha256, kind", [
    (f'"{"0" * 64}"', None, "sha256"), (f'W/"{"0" * 40}"', None, "git sha1"),
    (f'"{SHA256}"', "0" * 64, "sha256"),
])
def test_wrong_content_is_not_kept(hub, tmp_path, etag, sha256, kind):
    """Catches a file under its final name that nobody verified, and a bad part that every run resumes."""
    hub.etags["model.safetensors"] = etag
    with pytest.raises(ValueError, match=f"model.safetensors came with {kind} .*, needed 0000.*run again"):
        teachers.download(hub.url(), tmp_path / "x", sha256)
    assert not list(tmp_path.iterdir()) and hub.served == len(BODY)
    (tmp_path / "x.part").write_bytes(bytes(len(BODY)))  # of an earlier run: once more, not for ever
    with pytest.raises(ValueError, match="needed 0000"):
        teachers.download(hub.url(), tmp_path / "x", sha256)
    assert not list(tmp_path.iterdir()) and hub.served <= 3 * len(BODY)


def test_checksums_that_fit(hub, tmp_path):
    """Catches git's hash taken without its header, case and quotes compared, an ETag that is no hash."""
    teachers.download(hub.url("hello.txt"), tmp_path / "hello")
    teachers.download(hub.url(), tmp_path / "x", SHA256.upper())
    facts = teachers.download(hub.url("config.json"), tmp_path / "config.json")
    assert facts["sha256"] == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("part, served", [
    (bytes(CHUNK), 2 * len(BODY) - CHUNK), (bytes(len(BODY)), len(BODY)), (bytes(len(BODY) + 5), len(BODY)),
    (BODY[:CHUNK], len(BODY) - CHUNK), (BODY, len(BODY)),
])
def test_part_of_an_earlier_run(hub, tmp_path, part, served):
    """Catches another file's part that is trusted or ends the download, a good one that is fetched again."""
    (tmp_path / "x.part").write_bytes(part)
    teachers.download(hub.url(), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and hub.served == served


def test_repo_is_fetched_once(hub, tmp_path):
    """Catches weights of another name not found, provenance lost, requests for what the cache has."""
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    folder = teachers.fetch_repo("lab/vit", "refs/pr/1", SHA256)
    assert folder == tmp_path / "hub/lab--vit/refs--pr--1"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "pytorch_model.bin", "source.json"]
    url = f"http://127.0.0.1:{hub.server_port}/lab/vit/resolve/refs%2Fpr%2F1/pytorch_model.bin"
    assert json.loads((folder / "source.json").read_text()) == {
        "repo": "lab/vit", "revision": "refs/pr/1", "commit": "c0ffee", "file": "pytorch_model.bin",
        "sha256": SHA256, "url": url}
    assert [name for _, name, *_ in hub.asked] == [*teachers.SIDECARS, *teachers.WEIGHTS[:2]]
    by_hand = tmp_path / "hub/lab--own/main"
    by_hand.mkdir(parents=True)
    (by_hand / "model.safetensors").touch()
    hub.asked.clear()
    assert teachers.fetch_repo("lab/vit", "refs/pr/1") == folder and not hub.asked
    assert teachers.fetch_repo("lab/own") == by_hand and not hub.asked


def test_repo_without_weights(hub):
    """Catches an empty folder returned, a missing file that is retried, a message without next step."""
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": b"{}"}
    with pytest.raises(FileNotFoundError, match="lab/vit at main has none of model.safetensors, .*shards"):
        teachers.fetch_repo("lab/vit")
    hub.files.clear()
    with pytest.raises(FileNotFoundError, match="has none of .*nor a config: check its name"):
        teachers.fetch_repo("lab/typo")


def test_gated_repo_and_token(hub, tmp_path, monkeypatch):
    """Catches a message without next step, a token not sent, or replaced by what ~/.netrc has."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password old\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    hub.faults = [401]
    with pytest.raises(PermissionError, match=r"lab/vit is gated .*\(401\): .* set HF_TOKEN") as caught:
        teachers.fetch_repo("lab/vit")
    assert "\n" not in str(caught.value) and len(hub.asked) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.faults = [403]
    with pytest.raises(PermissionError, match=r"\(403\): the token in HF_TOKEN has no access") as caught:
        teachers.fetch_repo("lab/vit")
    assert [sent for *_, sent in hub.asked] == [None, "Bearer hf_secret"]
    assert "secret" not in str(caught.value)
    hub.faults = [418]
    with pytest.raises(OSError, match="lab/vit/resolve/main/config.json answered 418"):
        teachers.fetch_repo("lab/vit")


def test_token_stays_with_the_hub(hub, tmp_path, monkeypatch):
    """Catches a token told to the store behind the hub, and the store's ETag taken for a checksum."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.store, hub.faults = "localhost", [10**9, CUT]
    facts = teachers.download(hub.url(), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and facts == {"commit": "c0ffee", "sha256": SHA256}
    assert [(host, sent) for host, *_, sent in hub.asked] == 2 * [("127.0.0.1", "Bearer hf_secret"),
                                                                  ("localhost", None)]
    hub.etags |= {"model.safetensors": f'"{"0" * 64}"', "config.json": None}
    with pytest.raises(ValueError, match="needed 0000"):
        teachers.download(hub.url(), tmp_path / "y")
    teachers.download(hub.url("config.json"), tmp_path / "config.json")


def test_offline(hub, tmp_path):
    """Catches half a minute of retries and a traceback where there is no network at all."""
    hub.server_close()  # refuses from now on
    with pytest.raises(ConnectionError) as caught:
        teachers.fetch_repo("lab/vit")
    message, folder = str(caught.value), tmp_path / "hub/lab--vit/main"
    assert message.startswith(f"no connection to 127.0.0.1:{hub.server_port}") and "\n" not in message
    assert f"download {hub.url()} and config.json, and put both into {folder}" in message


def test_full_disk(hub, tmp_path, monkeypatch):
    """Catches a disk that is filled to the last byte before anybody says so; what is there counts."""
    (tmp_path / "x.part").write_bytes(BODY[:CHUNK])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(BODY) - CHUNK - 1))
    with pytest.raises(OSError, match="needs 0.00 GiB, .* GiB free: make room"):
        teachers.download(hub.url(), tmp_path / "x")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(BODY) - CHUNK))
    teachers.download(hub.url(), tmp_path / "x")


def test_progress_lines(hub, tmp_path, capsys):
    """Catches a bar's control codes in a log, noise for every small file, sizes that do not add up."""
    teachers.download(hub.url(), tmp_path / "x")
    assert capsys.readouterr().out == ""
    hub.files["big"] = bytes(3 * 10**6)
    (tmp_path / "big.part").write_bytes(bytes(10**6))
    teachers.download(hub.url("big"), tmp_path / "big")
    assert re.sub(r", .*", "", capsys.readouterr().out) == "big: 1/3 MB\nbig: 3/3 MB\n"


def fetch_elsewhere(before: str = "") -> subprocess.Popen:
    """Start a process that fetches the repo."""
    code = f"import {teachers.__name__} as teachers\n{before}\nteachers.fetch_repo('lab/vit')"
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(teachers.__file__).parent)


def test_two_processes_share_one_download(hub, tmp_path, monkeypatch, capsys):
    """Catches two processes that write into one part, and a second download after the wait."""
    hub.gate.clear()
    other = fetch_elsewhere()
    assert hub.reached.wait(60)  # it holds the lock
    flock = fcntl.flock

    def wait_for_lock(file, how):
        if how == fcntl.LOCK_EX:
            hub.gate.set()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", wait_for_lock)
    folder = teachers.fetch_repo("lab/vit")
    assert other.wait(60) == 0 and (folder / "model.safetensors").read_bytes() == BODY
    assert hub.served == len(BODY) + 2 and capsys.readouterr().out.count("waiting for another process") == 1


DIE_AFTER_THREE_CHUNKS = """
import os
def track_bytes(chunks, what, *_):
    for k, chunk in enumerate(chunks):
        yield chunk
        if (what, k) == ("model.safetensors", 2):
            os.kill(os.getpid(), 9)
teachers.track_bytes = track_bytes
"""


def test_killed_process_leaves_a_part_and_no_lock(hub, tmp_path):
    """Catches a lock that outlives its process, half a file taken for a whole one, a lost part."""
    assert fetch_elsewhere(DIE_AFTER_THREE_CHUNKS).wait(60) == -signal.SIGKILL
    folder = tmp_path / "hub/lab--vit/main"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors.part"]
    assert teachers.fetch_repo("lab/vit") == folder and resumed_from(hub) == 3 * CHUNK
    assert (folder / "model.safetensors").read_bytes() == BODY
    assert [name for _, name, *_ in hub.asked].count("config.json") == 1
    assert json.loads((folder / "source.json").read_text())["sha256"] == SHA256


# ------------------------------------------------------- a stand-in renderer and a hand-made PASCAL folder


def blobs(seed, indices, size):
    """Stand in for `render`: random rectangles, two people, a speck of a person, a plant."""
    scenes = {"captions": [], "attributes": []}
    for index in indices:
        rng = np.random.default_rng((7, seed, index))
        instance = np.ones((size, size), np.uint8)
        instance[size // 2 :] = 2
        parts = np.zeros_like(instance)
        labels = (32, 33, 48, 160, 176) if index % 3 else (48, 160)
        for label in labels:
            y, x = rng.integers(0, size - 14, 2)
            instance[y : y + 14, x : x + 10] = label
            parts[y : y + 14, x : x + 10] = 0
            if label < 48:
                parts[y : y + 14, x : x + 10] = np.arange(14)[:, None] // 2  # 0..6
        if index % 3 == 1:
            instance[0, :3], parts[0, :3] = 34, 2  # three pixels of a third person
        normals = rng.normal(size=(size, size, 3))
        scene = {
            "image": rng.integers(0, 256, (size, size, 3)).astype(np.uint8), "instance": instance,
            "semseg": np.where(instance < 16, instance - 1, instance // 16).astype(np.uint8),
            "human_parts": parts, "sal": (instance == 48).astype(np.uint8),
            "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32),
            "depth": rng.uniform(1, 8, (size, size)).astype(np.float32),
        }
        for key, value in scene.items():
            scenes.setdefault(key, []).append(value)
        scenes["captions"].append(f"scene {index}")
        scenes["attributes"].append({"things": [{"class": "ball", "instance": 48}]})
    return {key: np.stack(v) if isinstance(v[0], np.ndarray) else v for key, v in scenes.items()}


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "render", blobs)
    return data.render_world(tmp_path / "world", size=40, train=7, val=3, probe=2)


def anno(name, objects):
    """Write PASCAL-Part structs with scipy dicts, another way than data.py's object arrays."""
    items = np.empty((1, len(objects)), object)
    for j, (index, mask, parts) in enumerate(objects):
        parts = [{"part_name": n, "mask": m.astype(np.uint8)} for n, m in parts]
        parts = np.array(parts, object)[None] if parts else np.zeros((0, 0))
        items[0, j] = {"class": "x", "class_ind": index, "mask": mask.astype(np.uint8), "parts": parts}
    fields = ("class", "class_ind", "mask", "parts")
    structs = np.empty(items.shape, [(f, object) for f in fields])
    for j in range(len(objects)):
        structs[0, j] = tuple(items[0, j][f] for f in fields)
        if isinstance(items[0, j]["parts"], np.ndarray) and items[0, j]["parts"].dtype == object:
            rows = items[0, j]["parts"][0]
            inner = np.empty((1, len(rows)), [("part_name", object), ("mask", object)])
            for k, row in enumerate(rows):
                inner[0, k] = (row["part_name"], row["mask"])
            structs[0, j]["parts"] = inner
    return {"anno": {"imname": name, "objects": structs}}


def box(shape, y, x, h, w):
    mask = np.zeros(shape, bool)
    mask[y : y + h, x : x + w] = True
    return mask


@pytest.fixture
def pascal(tmp_path, monkeypatch):
    """Two images of odd, different sizes: two overlapping people, one without parts, a dog."""
    root, rng = tmp_path / "PASCALContext", np.random.default_rng(0)
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    for folder in ("JPEGImages", "pascal-context/trainval", "semseg/pascal-context", "semseg/VOC12",
                   "human_parts", "sal_distill", "normals_distill", "ImageSets/Context",
                   "ImageSets/Parts", "json"):
        (root / folder).mkdir(parents=True)
    names, shapes = ["2008_000002", "2008_000003"], [(37, 51), (45, 29)]
    for name, (h, w) in zip(names, shapes, strict=True):
        gray = Image.fromarray(rng.integers(0, 256, (h, w)).astype(np.uint8))
        gray.save(root / f"JPEGImages/{name}.jpg")
        labelmap = rng.choice([284, 360, 427, 431, 440], (h // 4 + 1, w // 4 + 1)).astype(np.uint16)
        labelmap = labelmap.repeat(4, 0).repeat(4, 1)[:h, :w]
        savemat(root / f"pascal-context/trainval/{name}.mat", {"LabelMap": labelmap})
        semseg = rng.integers(0, 21, (h, w)).astype(np.uint8)
        Image.fromarray(semseg).save(root / f"semseg/pascal-context/{name}.png")
        sal = np.resize([0, 127, 128, 255], (h, w)).astype(np.uint8)
        Image.fromarray(sal).save(root / f"sal_distill/{name}.png")
        normals = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        Image.fromarray(normals).save(root / f"normals_distill/{name}.png")
    shape = shapes[0]
    objects = [
        (15, box(shape, 2, 2, 20, 12), [("head", box(shape, 2, 2, 6, 12)), ("nose", box(shape, 4, 4, 2, 2)),
                                        ("torso", box(shape, 6, 2, 10, 12))]),
        (12, box(shape, 20, 20, 8, 8), [("head", box(shape, 20, 20, 4, 4))]),
        (15, box(shape, 10, 8, 20, 12), [("rfoot", box(shape, 10, 8, 6, 12))]),
        (15, box(shape, 30, 30, 5, 5), []),
        (15, np.zeros(shape, bool), []),
    ]
    savemat(root / f"human_parts/{names[0]}.mat", anno(names[0], objects))
    savemat(root / f"human_parts/{names[1]}.mat",
            anno(names[1], [(15, np.zeros(shapes[1], bool), [("head", box(shapes[1], 0, 0, 9, 9))])]))
    palette = Image.fromarray(np.full(shapes[1], 3, np.uint8), "P")
    palette.putpalette(list(range(30, 33)) * 256)
    palette.save(root / f"semseg/VOC12/{names[1]}.png")
    for split in ("train", "val"):
        (root / f"ImageSets/Context/{split}.txt").write_text("\n".join(names) + "\n")
        lists = {names[0]: [15, 12, 15, 15, -1], names[1]: [-1]}
        (root / f"ImageSets/Parts/{split}.txt").write_text(json.dumps(lists))
    context = {"person": 284, "sky": 360, "tvmonitor": 427, "unknown": 431, "wall": 440}
    (root / "json/context_classes.json").write_text(json.dumps(context))
    nyu = {"person": 331, "television": 172, "unknown": 20, "wall": 21}
    (root / "json/nyu_classes.json").write_text(json.dumps(nyu))
    (root / "json/pascal_part.json").write_text("{}")
    return root


def test_pascal_trains_both_stages_and_is_scored(pascal, tmp_path, tiny, capsys):
    """A recipe that cannot start on the real format; teachers or students that want square images; a
    score by the world's protocol, or without the published rows beside it."""
    stored = tiny_run(pascal, tmp_path / "out", data=f"pascal:{pascal}", steps=2, image_size=(32, 48),
                      save_every=1)
    assert stored["config"]["tasks"] == {"semseg": 21, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2}
    assert stored["config"]["grid"] == (4, 6) and stored["step"] == 2
    assert stored["provenance"]["data"] == f"pascal:{pascal}"
    scoring.main(scoring.Args(ckpt=tmp_path / "out" / "prism.pt", device="cpu"))
    found, said = json.loads((tmp_path / "out" / "results.json").read_text()), capsys.readouterr().out
    assert set(found["protocol"].values()) == {"sak"} and found["images"] == 2
    assert "published on pascal, protocol sak" in said and "this checkpoint, width 24" in said


# --------------------------------------------------------------------------------------------------- files


def test_world_round_trip(world):
    """A label that a file format, a wrong dtype or a swapped folder changes on the way."""
    for s, split in enumerate(data.SPLITS):
        dataset = data.World(world, split)
        made = blobs(s, range(len(dataset)), 40)
        for i in range(len(dataset)):
            sample, instance = dataset.read(i), made["instance"][i]
            pixels = np.bincount(instance.ravel(), minlength=256)[instance]
            least = 12 * (40 / 64) ** 2
            semseg = np.where(pixels < least, 255, made["semseg"][i])
            assert (sample["semseg"] == semseg).all() and sample["semseg"].dtype == np.uint8
            parts = np.where((pixels < least) & (instance < 48), 0, made["human_parts"][i])
            assert (sample["human_parts"] == parts).all()
            assert (sample["sal"] == made["sal"][i]).all()
            assert sample["labelmap"].dtype == np.int32 and (sample["labelmap"] == instance).all()
            assert (sample["instance"] == instance).all()
            assert sample["depth"].dtype == np.float32 and (sample["depth"] == made["depth"][i]).all()
            coded = np.rint((made["normals"][i] + 1) / 2 * 255)
            normals = np.where((instance // 16 == 10)[..., None], 0, 2 * coded / 255 - 1)
            assert np.abs(sample["normals"] - normals).max() < 1e-6
            assert np.abs(sample["image"].astype(int) - made["image"][i]).mean() < 12  # JPEG of noise
            assert sample["caption"] == f"scene {i}" and sample["things"][0]["instance"] == 48
    assert (semseg == 255).any() or dataset.ids, "the stand-in must produce void pixels"
    assert dataset.tasks == {"semseg": 12, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2, "depth": 1}


def test_void_and_partless_occur(world):
    """A speck rule that never fires, so that ignore regions are never exercised."""
    samples = [data.World(world, "train").read(i) for i in range(7)]
    assert any((s["semseg"] == 255).any() for s in samples)
    objects = [o for s in samples for o in
               loadmat(world / f"human_parts/{s['name']}.mat")["anno"][0, 0]["objects"][0]]
    people = [o for o in objects if o["class_ind"][0, 0] == 15]
    assert any(len(o["parts"]) == 0 for o in people) and any(o["parts"].size > 2 for o in people)


def test_part_files_read_as_the_references_do(world):
    """Fields out of order or one nesting level off: other people's readers index by position."""
    lists = json.loads((world / "ImageSets/Parts/train.txt").read_text())
    for name, entry in lists.items():
        anno = loadmat(world / f"human_parts/{name}.mat")["anno"][0, 0]
        assert anno[0][0] == name and anno[1].shape == (1, len(entry))
        for j in range(anno[1].shape[1]):
            by_place, by_name = anno[1][0][j], anno["objects"][0, j]
            assert by_place[1][0, 0] == by_name["class_ind"][0, 0] == entry[j]
            assert (by_place[2] == by_name["mask"]).all() and by_place[2].shape == (40, 40)
            assert (by_place[0][0] == "person") == (entry[j] == 15)
            if len(by_place[3]):
                assert by_place[3][0][0][0][0] == by_name["parts"][0, 0]["part_name"][0]
                assert by_place[3][0][0][1].shape == (40, 40)


def test_pascal_labels(pascal):
    """Painting order, people without parts, other classes' parts, gray JPEGs, 16 bit LabelMaps,
    palette PNGs read as colours, the saliency threshold one too low, normals of masked classes."""
    dataset = data.PascalContext(pascal, "train")
    one, two = dataset.read(0), dataset.read(1)
    assert one["image"].shape == (37, 51, 3) and two["image"].shape == (45, 29, 3)
    assert (one["image"][..., 0] == one["image"][..., 2]).all()
    expected = np.zeros((37, 51), np.uint8)
    expected[2:8, 2:14], expected[6:16, 2:14], expected[10:16, 8:20] = 1, 2, 6
    assert (one["human_parts"] == expected).all() and not two["human_parts"].any()
    assert one["labelmap"].max() == 440 and one["labelmap"].dtype == np.int32
    assert (two["semseg"] == 3).all() and one["semseg"].shape == (37, 51)
    raw = np.resize([0, 127, 128, 255], (37, 51))
    assert (one["sal"] == (raw > 127)).all()
    known = np.isin(one["labelmap"], (284, 427, 440))
    assert (one["normals"].any(-1) == known).all()
    coded = np.asarray(Image.open(pascal / "normals_distill/2008_000002.png"))
    assert (one["normals"][known] == np.float32(2) * coded[known] / np.float32(255) - 1).all()
    assert dataset.tasks["semseg"] == 21 and "depth" not in one and "depth" not in dataset.tasks


def test_parts_list_is_a_gate_and_can_be_rebuilt(pascal, capsys):
    """Parts decoded against the list, or a missing list that stops or writes to the data folder."""
    path = pascal / "ImageSets/Parts/train.txt"
    before = data.PascalContext(pascal, "train").part_lists
    path.unlink()
    assert data.PascalContext(pascal, "train").part_lists == before and not path.exists()
    path.write_text(json.dumps({"2008_000002": [12], "2008_000003": [15]}))
    dataset = data.PascalContext(pascal, "train")
    assert not dataset.read(0)["human_parts"].any()
    assert (dataset.read(1)["human_parts"] == box((45, 29), 0, 0, 9, 9)).all()


def test_errors_name_the_file(pascal, world):
    """Tracebacks from a decoder's depths, skipped samples, or a message without the path."""
    name = "2008_000003"
    for folder, suffix in ("JPEGImages", "jpg"), ("pascal-context/trainval", "mat"), ("sal_distill", "png"):
        path = pascal / f"{folder}/{name}.{suffix}"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            data.PascalContext(pascal, "val").read(1)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(pascal / f"sal_distill/{name}.png")
    with pytest.raises(ValueError, match=f"{name}.png has size .9, 9., its image .45, 29."):
        data.PascalContext(pascal, "val").read(1)
    (pascal / f"sal_distill/{name}.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.png is missing, 1 files in all; see"):
        data.PascalContext(pascal, "val")
    with pytest.raises(FileNotFoundError, match="test.txt is missing; splits of this folder: train, val"):
        data.PascalContext(pascal, "test")
    with pytest.raises(FileNotFoundError, match="meta.json is missing"):
        data.open_data(f"world:{pascal}", "train")
    with pytest.raises(ValueError, match='view "both" is unknown; use "multitask" or "distill"'):
        data.World(world, "train", view="both")
    with pytest.raises(ValueError, match='task "parts" is unknown; use semseg, human_parts, '):
        data.check_tasks(["semseg", "parts"])
    assert data.open_data(data.World(world, "val").source, "val").ids == data.World(world, "val").ids
    with pytest.raises(FileNotFoundError, match="gt_sets/train.txt is missing; splits of this folder: none"):
        data.open_data(f"nyud:{pascal}", "train")
    for spec in "cityscapes:/x", "pascal", "nyud", "worlds":
        with pytest.raises(ValueError, match=f'"{spec}" is unknown; use "world"'):
            data.open_data(spec, "train")
    path = world / "depth/train_000004.npy"
    path.write_bytes(path.read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            list(data.batches(data.World(world, "train"), 7, 1, workers=workers))
        assert "\n" not in str(caught.value)


def test_rendering_is_atomic(tmp_path, monkeypatch):
    """Half a world taken for a whole one, a second process in the way, another world's folder."""
    settings = {"size": 16, "train": 40, "val": 1, "probe": 1}
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    calls = []

    def failing(seed, indices, size):
        calls.append((seed, tuple(indices)))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return blobs(seed, indices, size)

    monkeypatch.setattr(data, "render", failing)
    with pytest.raises(KeyboardInterrupt):
        data.render_world(**settings)
    assert not list((tmp_path / "cache").iterdir())
    root = data.render_world(**settings)
    assert list((tmp_path / "cache").iterdir()) == [root] and len(calls) == 6
    assert data.render_world(**settings) == root and len(calls) == 6
    other = tmp_path / "other"

    def overtaken(seed, indices, size):
        if seed == 2:  # a second process ends while the last split is being written
            monkeypatch.setattr(data, "render", blobs)
            data.render_world(other, **settings)
        return blobs(seed, indices, size)

    monkeypatch.setattr(data, "render", overtaken)
    assert data.render_world(other, **settings) == other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "other"]
    with pytest.raises(ValueError, match="holds other files than this world; name another folder"):
        data.render_world(other, **settings | {"train": 41})


def test_scenes_are_shared_by_no_two_splits(tmp_path, monkeypatch):
    """Training scenes in the test split, or seed 1's training split in seed 0's test split."""
    seen = []

    def render(seed, indices, size):
        seen.extend((seed, index) for index in indices)
        return blobs(seed, indices, size)

    monkeypatch.setattr(data, "render", render)
    for seed in range(3):
        data.render_world(tmp_path / str(seed), size=16, train=3, val=2, probe=2, seed=seed)
    assert len(seen) == len(set(seen)) == 21


def test_world_key():
    """A cached world that outlives a change of settings or of the renderer's source."""
    a, b = data.WorldSettings(), data.WorldSettings(seed=1)
    assert data.world_key(a) == data.world_key(data.WorldSettings()) != data.world_key(b)
    assert data.world_key(a) != data.world_key(data.WorldSettings(layout="nyud"))
    text = Path(data.__file__).read_text()
    assert "def render(" in text.partition("# === rendered world")[2].partition("# === the world on disk")[0]


def test_processes_write_the_same_world(tmp_path, monkeypatch):
    """Scenes that depend on which others share their batch or process."""
    settings = {"size": 16, "train": 320, "val": 3, "probe": 2}
    many = data.render_world(tmp_path / "many", **settings)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: {0})
    one = data.render_world(tmp_path / "one", **settings)
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(files) == 325 * 7 + 11
    for path in files:  # MATLAB headers carry the time of day: compare what follows
        skip = 128 if path.suffix == ".mat" else 0
        assert (one / path).read_bytes()[skip:] == (many / path).read_bytes()[skip:], path


def test_check_counts(pascal, world, capsys):
    """A folder check that passes with files gone, or that cannot decode what it praises."""
    assert data.check(pascal) and data.check(world)
    assert "labelmap     (37, 51)" in capsys.readouterr().out
    (pascal / "normals_distill/2008_000002.png").unlink()
    assert not data.check(pascal)
    assert "normals      1 of 2  missing" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- boundaries


def slow_thin(binary):
    """Guo-Hall pixel by pixel, straight from the definition."""
    b = np.pad(binary.astype(bool), 1)
    while True:
        start = b.copy()
        for second in (False, True):
            delete = []
            for y, x in zip(*np.nonzero(b), strict=True):
                p = [None, b[y, x + 1], b[y - 1, x + 1], b[y - 1, x], b[y - 1, x - 1],
                     b[y, x - 1], b[y + 1, x - 1], b[y + 1, x], b[y + 1, x + 1]]
                p.append(p[1])
                g1 = sum(not p[2 * i - 1] and (p[2 * i] or p[2 * i + 1]) for i in range(1, 5)) == 1
                n1 = sum(p[2 * k - 1] or p[2 * k] for k in range(1, 5))
                n2 = sum(p[2 * k] or p[2 * k + 1] for k in range(1, 5))
                g3 = not ((p[6] or p[7] or not p[4]) and p[5]) if second else \
                    not ((p[2] or p[3] or not p[8]) and p[1])
                if g1 and 2 <= min(n1, n2) <= 3 and g3:
                    delete.append((y, x))
            for place in delete:
                b[place] = False
        if (b == start).all():
            return b[1:-1, 1:-1]


def test_thin_against_pixel_by_pixel():
    """A wrong table entry, a shifted neighbour, stopping after half a pair, a stack that bleeds."""
    rng = np.random.default_rng(1)
    for i in range(120):
        noise = rng.random(rng.integers(1, 26, 2))
        binary = noise > 0.4 if i % 2 else ndimage.gaussian_filter(noise, 1.5) > 0.5
        assert (data.thin(binary) == slow_thin(binary)).all()
    assert (data.thin(np.ones((5, 9))) == slow_thin(np.ones((5, 9)))).all()
    stack = rng.random((2, 3, 12, 17)) > 0.3
    assert (data.thin(stack) == [[slow_thin(binary) for binary in row] for row in stack]).all()


def test_boundary_label():
    """Borders that count as edges or are repeated, gradients instead of a Laplacian, 8 bit overflow."""
    rng = np.random.default_rng(2)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    for i in range(20):
        labelmap = rng.integers(1, 460 if i % 2 else 4, rng.integers(3, 30, 2))
        labelmap = labelmap.repeat(1 + i % 3, 0).repeat(1 + i % 2, 1)  # fine ones test the border
        laplacian = ndimage.correlate(labelmap.astype(np.int64), kernel, mode="mirror")
        assert (data.boundary_label(labelmap) == slow_thin(laplacian != 0)).all()
    labelmap = np.full((9, 11), 100)
    assert not data.boundary_label(labelmap).any()
    labelmap[:, 5], labelmap[:, 6:] = 200, 300  # the mean: no edge on the column itself
    marked = data.boundary_label(labelmap)
    assert not marked[:, 5].any() and marked[:, 4].all() and marked[:, 6].all()


# ---------------------------------------------------------------------------------------------- transforms


def test_nearest_is_opencvs():
    """i * source / target, torch's or Pillow's rounding: labels half a pixel beside the image."""
    for source in range(1, 90, 4):
        for target in range(1, 130, 3):
            step = 1.0 / (float(target) / float(source))
            expected = [min(int(np.floor(i * step)), source - 1) for i in range(target)]
            assert data.nearest(target, source).tolist() == expected
    naive = [(s, t) for s in range(30, 90) for t in range(30, 90)
             if (data.nearest(t, s) != np.arange(t) * s // t).any()]
    assert naive, "the rule must differ from the naive one somewhere"


def test_bilinear_is_opencvs():
    """Corner-aligned or antialiased resizing; cropping that shifts the sampling grid."""
    rng = np.random.default_rng(3)
    for h, w, tall, wide in (31, 43, 50, 60), (31, 43, 20, 23), (8, 8, 5, 16), (1, 7, 2, 3):
        image = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        whole = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        whole = torch.nn.functional.interpolate(whole, (tall, wide), mode="bilinear")[0]
        rows, columns = np.arange(tall)[tall // 4 :], np.arange(wide)[::-1]
        ours = data.bilinear(image, rows, columns, tall, wide)
        expected = whole.permute(1, 2, 0).numpy()[tall // 4 :, ::-1]
        assert ours.dtype == np.float32 and np.abs(ours - expected).max() < 0.02


def coded_sample(h, w, rng):
    """Build a sample whose depth tells which pixel a value came from."""
    place = np.arange(h * w).reshape(h, w)
    normals = rng.normal(size=(h, w, 3)).astype(np.float32)
    return {
        "image": rng.integers(0, 256, (h, w, 3)).astype(np.uint8), "name": "x",
        "semseg": (place % 5).astype(np.uint8), "human_parts": (place % 7).astype(np.uint8),
        "normals": normals, "edge": (place % 2).astype(np.uint8), "sal": (place % 3 == 0).astype(np.uint8),
        "depth": (place + 1).astype(np.float32),
    }


def test_multitask_view_moves_all_labels_alike():
    """A label flipped alone, x of normals not negated, depth multiplied or not divided by the scale."""
    rng, flips = np.random.default_rng(4), set()
    sample = coded_sample(40, 52, rng)
    kept = {key: np.copy(value) for key, value in sample.items()}
    for step in range(40):
        view = data.multitask_view(sample, (32, 32), np.random.default_rng((0, step, 0)))
        scale = np.random.default_rng((0, step, 0)).uniform(0.5, 2)
        place = np.rint(view["depth"] * scale).astype(int) - 1
        assert np.abs(view["depth"] * scale - place - 1).max() < 2e-3
        rows, columns = place[:, 0] // 52, place[0] % 52
        assert (place == rows[:, None] * 52 + columns).all() and (np.diff(rows) >= 0).all()
        flip = columns[0] > columns[-1]
        flips.add(bool(flip))
        tall, wide = int(40 * scale), int(52 * scale)
        assert place.shape == (min(32, tall), min(32, wide)) == view["image"].shape[:2]
        every_row = data.nearest(tall, 40)
        assert any((every_row[t : t + 32] == rows).all() for t in range(max(tall - 32, 0) + 1))
        for key in ("semseg", "human_parts", "edge", "sal"):
            assert (view[key] == sample[key].ravel()[place]).all(), key
        expected = sample["normals"].reshape(-1, 3)[place] * ([-1, 1, 1] if flip else [1, 1, 1])
        assert (view["normals"] == expected.astype(np.float32)).all()
    assert flips == {True, False}
    for key, value in kept.items():
        assert (sample[key] == value).all(), f"{key} of the cached sample was changed"


def test_image_and_labels_stay_aligned():
    """An image cropped or flipped differently from its labels, by a pixel or more."""
    blocks = (np.indices((48, 48)) // 12).sum(0) % 2
    sample = coded_sample(48, 48, np.random.default_rng(0))
    sample |= {"image": np.repeat((blocks * 200 + 20)[..., None], 3, -1).astype(np.uint8),
               "semseg": blocks.astype(np.uint8)}
    for step in range(20):
        view = data.multitask_view(sample, (40, 40), np.random.default_rng((1, step, 0)))
        bright = view["image"].astype(float).mean(-1)
        middle = (bright.max() + bright.min()) / 2
        wrong = (bright > middle) != view["semseg"]
        inside = ~ndimage.binary_dilation(ndimage.morphological_gradient(view["semseg"], 3) > 0)
        assert not (wrong & inside).any() and inside.any()


class CountingRng:
    def __init__(self, seed):
        self.rng, self.draws = np.random.default_rng(seed), 0

    def integers(self, *args):
        self.draws += 1
        return self.rng.integers(*args)


def test_crop_avoids_single_classes():
    """Void counted as a class, an endless search, or a search that stops too early."""
    axis = np.arange(60)
    semseg = np.zeros((60, 60), np.uint8)
    rng = CountingRng(0)
    rows, columns = data.choose_crop(semseg, axis, axis, (20, 20), rng)
    assert rng.draws == 22 and len(rows) == len(columns) == 20
    semseg[:, 30:] = 255  # one class and void is still one class
    rng = CountingRng(0)
    data.choose_crop(semseg, axis, axis, (20, 20), rng)
    assert rng.draws == 22
    semseg[:, 30:] = 1
    for seed in range(30):
        rows, columns = data.choose_crop(semseg, axis, axis, (40, 40), CountingRng(seed))
        assert np.bincount(semseg[np.ix_(rows, columns)].ravel(), minlength=2).max() < 0.75 * 1600
    ends = {int(data.choose_crop(None, axis, axis, (57, 57), CountingRng(s))[0][0]) for s in range(60)}
    assert ends == {0, 1, 2, 3}, "both ends of the range of offsets belong to it"
    rows, columns = data.choose_crop(semseg, axis[:9], axis, (20, 20), CountingRng(0))
    assert len(rows) == 9 and len(columns) == 20


def test_hsv_against_the_standard_library():
    """A sextant mixed up, hue in 0..255, truncation that darkens the picture each time."""
    image = np.random.default_rng(5).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    image[0, :7] = [[0] * 3, [255] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 8], [7] * 3]
    hsv = np.moveaxis(data.rgb_to_hsv(image), 0, -1)
    assert hsv[0, 2:5, 0].tolist() == [0, 60, 120] and hsv[..., 0].max() < 180
    expected = np.array([[colorsys.rgb_to_hsv(*(p / 255)) for p in row] for row in image])
    error = np.abs(hsv - expected * (180, 255, 255))
    assert np.minimum(error[..., 0], 180 - error[..., 0]).max() <= 0.51 and error[..., 1:].max() <= 0.51
    back = np.array([[colorsys.hsv_to_rgb(*(p / (180, 255, 255))) for p in row] for row in hsv])
    ours = data.hsv_to_rgb(np.moveaxis(hsv, -1, 0))
    assert 0.3 < (back * 255 - ours).mean() and np.abs(ours - back * 255).max() < 1.01  # cut off
    drift = np.abs(ours.astype(int) - image)
    assert 0.4 < drift.mean() < 0.7 and drift.max() <= 5  # the released round trip: 0.55, 5


def test_distortion_statistics():
    """A coin that never or always falls one way; a change applied twice."""
    image = np.full((4, 4, 3), (120, 90, 60), np.uint8)
    seen = np.array([data.distort_colours(image, np.random.default_rng(s))[0, 0] for s in range(2000)])
    same = np.abs(seen - (120, 90, 60)).max(1) <= 2
    assert 0.05 < same.mean() < 0.09  # 1/16, and draws too small to see
    assert 30 < seen[:, 0].min() < 60 and 210 < seen[:, 0].max() < 236
    spread = np.ptp(seen.astype(int), axis=1)
    assert spread.min() < 20 and spread.max() > 110 and (image == (120, 90, 60)).all()


def test_padding_and_ignore():
    """Odd padding on the wrong side, grey instead of mean colour, zero depth or normals as labels."""
    sample = coded_sample(5, 8, np.random.default_rng(6))
    sample["depth"][0, 0], sample["normals"][1, 1], sample["human_parts"][:] = 0, 0, 0
    out = data.to_tensors(sample, (8, 11))
    assert out["image"].shape == (3, 8, 11) and out["image"].dtype == torch.float32
    inside = (slice(1, 6), slice(1, 9))
    assert torch.equal(out["semseg"][inside], torch.from_numpy(sample["semseg"]).long())
    assert torch.allclose(out["image"][:, 0, 0], torch.tensor([0.485, 0.456, 0.406]))
    image = out["image"][(slice(None), *inside)].permute(1, 2, 0)
    assert torch.equal(image, torch.from_numpy(sample["image"]) / 255)
    outside = torch.ones(8, 11, dtype=bool)
    outside[inside] = False
    for key in ("semseg", "sal", "edge", "depth"):
        assert (out[key][outside] == 255).all(), key
    assert (out["normals"][:, outside] == 255).all() and (out["normals"][:, 2, 2] == 255).all()
    assert (out["normals"] == 255).all(0).sum() == outside.sum() + 1
    assert out["depth"][1, 1] == 255 and (out["depth"] == 255).sum() == outside.sum() + 1
    assert (out["human_parts"] == 255).all() and out["human_parts"].dtype == torch.int64
    sample["human_parts"][3, 3] = 4
    out = data.to_tensors(sample, (8, 11))["human_parts"]
    assert (out == 0).sum() == 39 and (out == 4).sum() == 1
    assert data.to_tensors(sample, (4, 4))["semseg"].shape == (5, 8), "never cropped"


def test_distill_view():
    """Crops outside the asked share of the area or ratio, labels let through, no mirror."""
    ramp = np.stack(np.meshgrid(np.arange(96), np.arange(120)), -1)
    image = np.concatenate([ramp, ramp[..., :1]], -1).astype(np.uint8)  # red x, green y
    shares, flips = [], []
    for seed in range(300):
        out = data.distill_view(image, (24, 24), np.random.default_rng(seed), (0.3, 0.6))["image"]
        out = out.astype(float)
        assert out.shape == (24, 24, 3)
        wide = abs(out[0, -1, 0] - out[0, 0, 0]) * 24 / 23
        tall = (out[-1, 0, 1] - out[0, 0, 1]) * 24 / 23
        shares.append(wide * tall / image[..., 0].size)
        assert 0.66 < wide / tall < 1.5
        flips.append(out[0, 0, 0] > out[0, -1, 0])
    assert 0.27 < min(shares) < 0.33 and 0.56 < max(shares) < 0.65 and 0.4 < np.mean(flips) < 0.6
    thin_image = np.zeros((10, 100, 3), np.uint8)
    assert data.distill_view(thin_image, (8, 6), np.random.default_rng(0), (1, 1))["image"].shape == (8, 6, 3)


# -------------------------------------------------------------------------------------------------- loader


def same_batches(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_loader_is_a_function_of_seed_and_step(world):
    """Resuming or adding ranks or workers that changes what is seen; epochs that repeat a sample."""
    dataset = data.World(world, "train", seed=3)
    whole = list(data.batches(dataset, 4, 9, seed=3))
    names = sum((batch["name"] for batch in whole), [])
    assert len(whole) == 9 and all(sorted(names[k : k + 7]) == dataset.ids for k in range(0, 35, 7))
    assert names[:7] != names[7:14]
    state = torch.get_rng_state()
    again = list(data.batches(data.World(world, "train", seed=3), 4, 9, seed=3, workers=2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(same_batches, whole, again))
    resumed = list(data.batches(dataset, 4, 9, start=5, seed=3))
    assert len(resumed) == 4 and all(map(same_batches, whole[5:], resumed))
    ranks = [list(data.batches(dataset, 2, 9, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    for one, left, right in zip(whole, *ranks, strict=True):
        assert one["name"] == left["name"] + right["name"]
        joined = {k: torch.cat([left[k], right[k]]) if k != "name" else one[k] for k in one}
        assert same_batches(one, joined)
    assert names != sum((b["name"] for b in data.batches(dataset, 4, 9, seed=4)), [])
    other = next(data.batches(data.World(world, "train", seed=5), 4, 1, seed=3))
    assert other["name"] == whole[0]["name"] and not same_batches(other, whole[0])


def test_views_and_splits(world):
    """Random views of the test split, labels read for distillation, a view that is never random."""
    train, val = data.World(world, "train"), data.World(world, "val")
    uncached = data.World(world, "val", cache=False)
    assert same_batches(val[(1, 5, 0)], val[1]) and same_batches(val[1], uncached[1])
    for other in ((1, 6, 0), (1, 5, 1)):
        assert not same_batches(train[(1, 5, 0)], train[other])
    assert same_batches(train[(1, 5, 0)], data.World(world, "train", cache=False)[(1, 5, 0)])
    assert same_batches(data.World(world, "train", train=False)[(1, 5, 0)], train[1])
    distill = data.World(world, "train", view="distill", size=(24, 32))
    assert set(distill[(0, 0, 0)]) == {"image", "name"} and distill[(0, 0, 0)]["image"].shape == (3, 24, 32)
    batch = next(data.batches(train, 5, 1))
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if k != "name"}
    flat, f, i = (5, 40, 40), torch.float32, torch.int64
    assert shapes == {"image": ((5, 3, 40, 40), f), "semseg": (flat, i), "human_parts": (flat, i),
                      "normals": ((5, 3, 40, 40), f), "edge": (flat, f), "sal": (flat, i), "depth": (flat, f)}
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1 and isinstance(batch["name"], list)


# ----------------------------------------------------------------- NYUDv2, kept labels, world in its layout

DECODED = np.array([np.float32(np.float32(2 * v / 255) - 1) for v in range(256)])  # colour -> normal


def write_array(path, array, field=""):
    """Write an array in the format that the file's ending asks for; returns what there is to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".mat":
        savemat(path, {field: array})
    else:
        Image.fromarray(array).save(path)
    return np.asarray(Image.open(path)) if path.suffix == ".jpg" else array


def nyud_folder(root, endings):
    """Two images of odd sizes with every class, void, unknown depth and nearly or wholly zero normals."""
    image, semseg, normals, edge, depth = endings.split()
    truth = []
    for k, (h, w) in enumerate([(37, 52), (45, 31)]):
        rng, name = np.random.default_rng(k), f"{k + 1:04d}"
        ids = np.resize(np.arange(41), (h, w)).astype(np.uint8)
        colours = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        colours[:9] = rng.integers(127, 129, (9, w, 3))
        vectors = DECODED[colours].astype(np.float64)
        vectors[20:25] = 0  # in the float packaging alone
        lines = (rng.random((h, w)) > 0.8).astype(np.uint8)
        metres = rng.uniform(0.5, 9.5, (h, w)).astype(np.float32 if k else np.float64)
        metres[30:, :7] = 0
        picture = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        picture = write_array(root / f"images/{name}.{image}", picture)
        write_array(root / f"segmentation/{name}.{semseg}", ids, "segmentation")
        coded = write_array(root / f"normals/{name}.{normals}", vectors if normals == "npy" else colours)
        write_array(root / f"edge/{name}.{edge}", lines.astype(float) if edge == "npy" else lines * 255)
        write_array(root / f"depth/{name}.{depth}", metres, "depth")
        truth.append({
            "image": picture, "semseg": np.array([255, *range(40)], np.uint8)[ids],
            "normals": coded.astype(np.float32) if normals == "npy" else DECODED[coded],
            "edge": lines, "depth": metres.astype(np.float32), "labelmap": lines.astype(np.int32),
        })
    (root / "gt_sets").mkdir()
    for split in ("train", "val"):
        (root / f"gt_sets/{split}.txt").write_text("0001\n0002\n")
    return truth


def same_arrays(sample, truth):
    return all(sample[key].dtype == array.dtype and sample[key].shape == array.shape
               and sample[key].tobytes() == array.tobytes() for key, array in truth.items())


@pytest.mark.parametrize("packaging", data.PACKAGINGS)
def test_nyud_labels(tmp_path, packaging):
    """Void as class 40 or 0 as void twice, a colour off by one, millimetres, labels of other types,
    127/128 (which are not zero) ignored, zero normals kept, unknown depth trained on."""
    truth = nyud_folder(tmp_path, data.PACKAGINGS[packaging])
    dataset = data.open_data(f"nyud:{tmp_path}", "val")
    assert dataset.packaging == packaging and dataset.max_dist == 0.011 and dataset.kind == "nyud"
    assert dataset.tasks == {"semseg": 40, "normals": 3, "edge": 1, "depth": 1}
    assert len(set(dataset.classes["semseg"])) == 40 and dataset.classes["semseg"][18] == "mirror"
    for i, expected in enumerate(truth):
        sample = dataset.read(i)
        assert sample.keys() == {*expected, "name"} and same_arrays(sample, expected)
        out = dataset[i]
        assert set(out) == {"image", *dataset.tasks, "name"} and out["image"].shape == (3, 448, 576)
        h, w = expected["edge"].shape
        top, left = (448 - h) // 2, (576 - w) // 2
        inside = (slice(top, top + h), slice(left, left + w))
        ignored = (out["normals"][(slice(None), *inside)] == 255).all(0).numpy()
        assert (ignored == (expected["normals"] == 0).all(-1)).all()
        assert ignored.any() == ("npy npy npy" in data.PACKAGINGS[packaging])
        assert ((out["depth"][inside] == 255).numpy() == (expected["depth"] == 0)).all()


def test_nyud_views(tmp_path):
    """A view of NYUDv2 that needs PASCAL's labels, or whose depth is not divided by the scale."""
    truth = nyud_folder(tmp_path, data.PACKAGINGS[data.NYUDv2.packaging])
    dataset = data.NYUDv2(tmp_path, "train", seed=2)
    for step in range(6):
        view, scale = dataset[0, step, 0], np.random.default_rng((2, step, 0)).uniform(0.5, 2)
        depth = view["depth"][view["depth"] != 255].numpy()
        assert np.isin(depth, truth[0]["depth"] / np.float32(scale)).all() and len(depth) > 100
    batch = next(data.batches(dataset, 2, 1, seed=2))
    assert set(batch) == {"image", "semseg", "normals", "edge", "depth", "name"}


def test_nyud_scores_against_boundaries_and_reads_any_picture(tmp_path):
    """Training lines scored where SEISM has its own; gray, palette or RGBA images of another shape."""
    truth = nyud_folder(tmp_path, data.PACKAGINGS[data.NYUDv2.packaging])
    boundaries, cell = 1 - truth[0]["edge"], np.empty((1, 1), object)
    cell[0, 0] = {"Boundaries": boundaries, "Segmentation": boundaries * 3}
    (tmp_path / "edge_mat").mkdir()
    savemat(tmp_path / "edge_mat/0001.mat", {"groundTruth": cell})
    sample = data.NYUDv2(tmp_path, "val").read(0)
    assert same_arrays(sample, truth[0] | {"labelmap": boundaries.astype(np.int32)})
    picture = Image.open(tmp_path / "images/0001.png")
    for mode in ("L", "RGBA", "P"):
        changed = picture.convert(mode)
        changed.save(tmp_path / "images/0001.png")
        image = data.NYUDv2(tmp_path, "val").read(0)["image"]
        assert image.shape == (37, 52, 3) and (image == np.asarray(changed.convert("RGB"))).all()


def test_nyud_errors(tmp_path, capsys):
    """A packaging guessed wrong, millimetres or class 41 trained on, a message without the file."""
    nyud_folder(tmp_path, data.PACKAGINGS[data.NYUDv2.packaging])
    assert data.check(tmp_path) and "laid out as NYUDv2 of SAK, PRISM and InvPT" in capsys.readouterr().out
    zeros = np.zeros((37, 52), np.uint8)
    for path, array, message in (
        ("segmentation/0001.png", zeros + np.uint8(41), "holds 41 .. 41, not 0 .. 40"),
        ("segmentation/0001.png", zeros[1:], r"has size .36, 52., its image .37, 52."),
        ("segmentation/0001.png", np.stack([zeros] * 3, -1), r"has size .37, 52, 3., its image .37, 52."),
        ("edge/0001.png", zeros + (np.arange(52) > 9).astype(np.uint8), "holds 1 .. 1, not 127.5 .. 255"),
        ("depth/0001.npy", zeros + 2500.0, "holds 2500 .. 2500, not 0 .. 254"),
        ("depth/0001.npy", zeros + np.nan, "holds nan .. nan, not 0"),
    ):
        whole = (tmp_path / path).read_bytes()
        write_array(tmp_path / path, array)
        with pytest.raises(ValueError, match=f"{path} {message}") as caught:
            data.NYUDv2(tmp_path, "val").read(0)
        assert "\n" not in str(caught.value)
        (tmp_path / path).write_bytes(whole)
    shutil.rmtree(tmp_path / "depth")
    with pytest.raises(FileNotFoundError, match="depth/0001.npy is missing, 2 files in all; see"):
        data.NYUDv2(tmp_path, "val")
    assert not data.check(tmp_path)
    printed = capsys.readouterr().out
    assert "depth        0 of 2  missing" in printed and "id 1rj3tHdQVYqe-Y3mpxv4EgWsiqgq3z87H" in printed
    (tmp_path / "edge/0001.png").rename(tmp_path / "edge/0001.gif")
    (tmp_path / "edge/0002.png").unlink()
    with pytest.raises(ValueError, match="edge gif, depth nothing; in that order known are png") as caught:
        data.NYUDv2(tmp_path, "val")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="lists no split, neither in ImageSets/Context nor in "):
        data.check(tmp_path / "edge")


def test_world_in_the_layout_of_nyud(tmp_path, monkeypatch):
    """Classes off by one, void lost, edges of another rule, or tasks that this layout cannot hold."""
    monkeypatch.setattr(data, "render", blobs)
    root = data.render_world(tmp_path / "w", size=40, train=5, val=2, probe=1, layout="nyud")
    laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    void = 0
    for s, split in enumerate(data.SPLITS):
        dataset = data.open_data(f"world-nyud:{root}", split)
        made = blobs(s, range(len(dataset)), 40)
        for i in range(len(dataset)):
            sample, instance = dataset.read(i), made["instance"][i].astype(np.int64)
            specks = np.bincount(instance.ravel())[instance] < 12 * (40 / 64) ** 2
            void += specks.sum()
            edge = slow_thin(ndimage.correlate(instance, laplace, mode="mirror") != 0).astype(np.uint8)
            semseg = np.where(specks, 255, made["semseg"][i]).astype(np.uint8)
            assert same_arrays(sample, {"image": made["image"][i], "semseg": semseg, "edge": edge,
                                        "depth": made["depth"][i], "labelmap": edge.astype(np.int32)})
            assert np.abs(sample["normals"] - made["normals"][i]).max() <= 1 / 255 + 1e-6
            assert sample["caption"] == f"scene {i}" and "human_parts" not in sample
    assert void and dataset.tasks == {"semseg": 12, "normals": 3, "edge": 1, "depth": 1}
    assert dataset.source == f"world-nyud:{root}" and dataset.size == (40, 40) and data.check(root)
    assert data.contact_sheet(dataset, 1).width == 5 * 198
    assert data.guess_spec(root) == f"world-nyud:{root}"


def arrays_of(sample):
    return {key: value for key, value in sample.items() if key != "name"}


def test_labels_are_kept(pascal, monkeypatch, capsys):
    """Labels that differ once kept, that outlive their files, gate or root, a damaged file that stops
    or changes a run, decoding that is not saved at all, files left in the data folder."""
    name, before = "2008_000002", sorted(pascal.rglob("*"))
    plain = data.PascalContext(pascal, "train", decoded=False)
    truth = [arrays_of(plain.read(i)) for i in range(2)]
    assert not data.cache_folder().exists()
    dataset = data.PascalContext(pascal, "train")
    assert all(same_arrays(dataset.read(i), truth[i]) for i in range(2))
    loadmat_calls = []
    monkeypatch.setattr(data, "loadmat", lambda path: loadmat_calls.append(path) or loadmat(path))
    dataset = data.PascalContext(pascal, "train")
    assert all(same_arrays(dataset.read(i), truth[i]) for i in range(2)) and not loadmat_calls
    kept = dataset.decoded / f"{name}.npz"
    whole = kept.read_bytes()
    for damage in (whole[:-40], whole[: len(whole) // 2], b"", whole.replace(b"PK", b"QQ"),
                   whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        kept.write_bytes(damage)
        assert same_arrays(dataset.read(0), truth[0]) and len(kept.read_bytes()) == len(whole)
    path, turned = pascal / f"pascal-context/trainval/{name}.mat", truth[0]["labelmap"][::-1]
    size = path.stat().st_size
    savemat(path, {"LabelMap": turned.astype(np.uint16)})
    assert path.stat().st_size == size and (dataset.read(0)["labelmap"] == turned).all()
    assert (dataset.read(0)["edge"] == data.boundary_label(turned)).all()
    lists = pascal / "ImageSets/Parts/train.txt"
    lists.write_text(json.dumps({name: [12], "2008_000003": [-1]}))
    assert not data.PascalContext(pascal, "train").read(0)["human_parts"].any()
    assert sorted(pascal.rglob("*")) == before
    lists.unlink()
    built = data.PascalContext(pascal, "train").part_lists
    assert capsys.readouterr().out.endswith("does not list this split; building the list from 2 files\n")
    loadmat_calls.clear()
    assert data.PascalContext(pascal, "train").part_lists == built == plain.part_lists and not loadmat_calls
    for path in pascal.rglob("2008_000003.*"):
        shutil.copy2(path, path.with_stem("2008_000009"))  # size and time stay
    (pascal / "ImageSets/Context/train.txt").write_text(f"{name}\n2008_000009\n")
    assert set(data.PascalContext(pascal, "train").part_lists) == {name, "2008_000009"}
    other = pascal.rename(pascal.with_name("elsewhere"))
    assert data.PascalContext(other, "val").decoded != dataset.decoded
    assert not [path for path in dataset.decoded.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("trouble", ["full", "file in the way"])
def test_labels_that_cannot_be_kept(pascal, trouble, monkeypatch, capsys):
    """A run that ends, or prints a line per image, because the cache's disk is full or read-only."""
    truth = [arrays_of(data.PascalContext(pascal, "val", decoded=False).read(i)) for i in range(2)]
    if trouble == "full":
        def fail(path, **arrays):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(data.np, "savez_compressed", fail)
    else:
        data.cache_folder().write_bytes(b"")
    dataset = data.PascalContext(pascal, "val")
    assert all(same_arrays(dataset.read(i), truth[i]) for i in (0, 1, 0, 1))
    assert capsys.readouterr().out.count("cannot be written") == 1
    assert trouble != "full" or not list((data.cache_folder() / "decoded").rglob("*.npz"))


def test_processes_keep_labels_at_once(pascal):
    """A half-written file read by another process, or two processes' files mixed."""
    expected = list(data.batches(data.PascalContext(pascal, "train", size=32, decoded=False), 2, 8))
    for _ in range(2):
        dataset = data.PascalContext(pascal, "train", size=32)
        assert all(map(same_batches, expected, data.batches(dataset, 2, 8, workers=2)))
        shutil.rmtree(dataset.decoded)


def test_pascal_files_of_any_type(pascal):
    """LabelMaps cut to 8 bit, void counted as a class, class 21 trained on, colour images of any mode."""
    name, shape = "2008_000002", (37, 51)
    labelmap = np.random.default_rng(0).choice([1, 255, 256, 459], shape)
    for kind in ("uint16", "int16", "int32", "int64", "float64"):
        savemat(pascal / f"pascal-context/trainval/{name}.mat", {"LabelMap": labelmap.astype(kind)})
        read = data.PascalContext(pascal, "val", decoded=False).read(0)["labelmap"]
        assert (read == labelmap).all() and read.dtype == np.int32
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 4)).astype(np.uint8), "RGBA")
    for mode in ("RGBA", "P", "L"):
        changed = picture if mode == "RGBA" else picture.convert("RGB").convert(mode)
        changed.save(pascal / f"JPEGImages/{name}.jpg", "PNG")
        image = data.PascalContext(pascal, "val").read(0)["image"]
        assert image.shape == (*shape, 3) and (image == np.asarray(changed.convert("RGB"))).all()
    path = pascal / f"semseg/pascal-context/{name}.png"
    semseg = np.full(shape, 20, np.uint8)
    semseg[5] = 255
    Image.fromarray(semseg).save(path)
    assert (data.PascalContext(pascal, "val").read(0)["semseg"] == semseg).all()
    Image.fromarray(semseg + (semseg == 20)).save(path)
    with pytest.raises(ValueError, match=f"{path} holds 21 .. 21, not 0 .. 20"):
        data.PascalContext(pascal, "val").read(0)


def test_normals_count_on_170_classes(pascal):
    """Ids of the NYUD list instead of the Context list, "unknown" let in, television left out."""
    context = {f"class {k}": k for k in range(1, 458)} | {"unknown": 458, "tvmonitor": 459}
    nyu = {f"class {k}": 1000 - k for k in range(2, 340, 2)} | {f"thing {k}": k for k in range(700)}
    nyu |= {"unknown": 800, "television": 801}
    (pascal / "json/context_classes.json").write_text(json.dumps(context))
    (pascal / "json/nyu_classes.json").write_text(json.dumps(nyu))
    valid = data.PascalContext(pascal, "val").valid_normals
    assert len(valid) == 170 and set(valid) == {*range(2, 340, 2), 459}


# ------------------------------------------------------------------------------------ images without labels


def photo(k: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Paint two smooth ramps that no other k has."""
    y, x = np.mgrid[: size[1], : size[0]]
    return Image.fromarray(np.stack([4 * x + k, 5 * y, 0 * x + 9 * k], -1).astype(np.uint8))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """23 images in folders of three depths; the index of tars goes to the test's own cache."""
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for k in range(23):
        path = root / ("", "a/", "b/c/")[k % 3] / f"{k:02d}.{('png', 'JPG', 'bmp', 'WebP', 'tiff')[k % 5]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(k).save(path)
    return root


def pack(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))
    return path


def stored(root: Path) -> list[tuple[str, bytes]]:
    return [(str(p.relative_to(root)), p.read_bytes()) for p in sorted(root.rglob("*")) if p.is_file()]


def png_header(width: int, height: int) -> bytes:
    """Forge a PNG that claims a size its few bytes do not have."""
    file = BytesIO()
    photo(0).save(file, "png")
    content = bytearray(file.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_odd_images(tmp_path):
    """16-bit gray clipped to white, photos lying on their side, palettes read as ids, alpha channels."""
    rgb, gray = photo(5), photo(5).convert("L")
    deep = np.linspace(0, 65535, 48 * 40).reshape(40, 48).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    indexed = rgb.quantize(7)
    rgba = rgb.copy()
    rgba.putalpha(gray)
    flat = Image.new("RGB", (48, 40), (200, 100, 30))
    turned, eight_bit = {"exif": exif}, Image.fromarray((deep / 257 + 0.5).astype(np.uint8))
    dot, line = rgb.crop((3, 3, 4, 4)), rgb.crop((3, 0, 4, 40))
    cases = {
        "rgba.png": (rgba, rgb), "la.png": (rgba.convert("LA"), gray), "l.png": (gray, gray),
        "one.png": (gray.convert("1"), gray.convert("1")), "deep.png": (Image.fromarray(deep), eight_bit),
        "deep.tif": (Image.fromarray(deep), eight_bit), "rgb.webp": (rgb, rgb, {"lossless": True}),
        "p.png": (indexed, indexed, {"transparency": 2}), "1x1.png": (dot, dot), "1x40.png": (line, line),
        "side.tif": (rgb, rgb.rotate(-90, expand=True), turned),
        "side.jpg": (flat, flat.rotate(-90, expand=True), turned), "cmyk.jpg": (flat.convert("CMYK"), flat),
    }
    for name, (picture, _, *options) in cases.items():
        picture.save(tmp_path / name, **dict(*options))
    dataset = data.ImageFolder(tmp_path, size=(24, 16))
    assert list(dataset.ids) == sorted(cases)
    for i, name in enumerate(dataset.ids):
        image, truth = dataset.read(i)["image"], np.asarray(cases[name][1].convert("RGB")).astype(int)
        assert image.dtype == np.uint8 and image.shape == truth.shape, name
        assert abs(image - truth).max() <= (4 if name.endswith("jpg") else 0), name
        for view in dataset[i], dataset[(i, 0, 0)]:
            assert view["image"].shape == (3, 24, 16) and 0 <= view["image"].min() <= view["image"].max() <= 1
    photo(1, (60, 50)).resize((1600, 1200)).save(tmp_path / "rgba.png", "jpeg", quality=95)
    image = dataset.read(dataset.ids.index("rgba.png"))["image"]  # 24 / sqrt(0.08) = 85 is enough
    truth = np.asarray(photo(1, (60, 50)).resize((200, 150))).astype(int)
    assert image.shape == (150, 200, 3) and abs(image - truth).mean() < 4


def test_folder_listing(photos, tmp_path):
    """Loops of links, folders listed twice, other programs' files, an order that the disk decides."""
    names = [name for name, _ in stored(photos)]
    (photos / "a/up").symlink_to(photos)
    (photos / "z").symlink_to(photos / "b")
    (tmp_path / "far.png").write_bytes((photos / "00.png").read_bytes())
    (photos / "far.png").symlink_to(tmp_path / "far.png")
    for other in "notes.txt", "._00.png", "a/x.json", "jpg":
        (photos / other).write_bytes(b"?")
    (photos / "photos.png").mkdir()
    dataset = data.open_data(f"images:{photos}", "train", size=16)
    assert list(dataset.ids) == sorted([*names, "far.png"]) and dataset.source == f"images:{photos}"
    assert (dataset.read(dataset.ids.index("far.png"))["image"] == np.asarray(photo(0))).all()
    many = data.Names([b"n01440764/n01440764_%05d.JPEG" % k for k in range(100_000)])
    packed = pickle.dumps(many)
    assert len(packed) < 100_000 * 39 and pickle.loads(packed)[99_999] == "n01440764/n01440764_99999.JPEG"
    (photos / "train/b").mkdir(parents=True)
    photo(1).save(photos / "train/b/1.png")
    assert list(data.open_data(f"imagenet:{photos}", "train").ids) == ["b/1.png"]
    assert len(data.open_data(f"imagenet:{photos}", "val")) == 25


def test_tars_equal_the_folder(photos, tmp_path):
    """Offsets a header off, long names cut at 100 bytes, labels taken for images, files unpacked."""
    members = stored(photos)
    long = "/".join(["deep" * 20] * 3) + "/00.png"
    hostile = [("../../evil.png", members[0][1]), ("/etc/evil.png", members[0][1])]
    web = [pair for name, content in members[12:] for pair in (
        (name, content), (name.rpartition(".")[0] + ".cls", b"7"), (name + ".json", b"{}"))]
    pack(tmp_path / "s-08.tar", [*members[:12], (long, members[0][1])], format=tarfile.GNU_FORMAT)
    pack(tmp_path / "s-09.tar", [*web, *hostile], format=tarfile.PAX_FORMAT)
    before = stored(tmp_path / "photos"), set(os.listdir(tmp_path))
    dataset = data.open_data(f"tars:{tmp_path}/s-{{08..09}}.tar", "train", size=16)
    assert set(os.listdir(tmp_path)) == before[1] | {"cache"} and stored(photos) == before[0]
    assert list(dataset.ids) == [n for n, _ in members[:12]] + [long] + [n for n, _ in members[12:] + hostile]
    plain = data.ImageFolder(photos, size=16)
    for i, name in enumerate(dataset.ids):
        same = plain.ids.index(name) if name in plain.ids else 0
        assert (dataset.read(i)["image"] == plain.read(same)["image"]).all(), name
    globbed = data.ImageFolder(f"{tmp_path}/s-*.tar", size=16)
    again = list(data.batches(pickle.loads(pickle.dumps(dataset)), 4, 3, workers=1))
    assert all(map(same_batches, data.batches(globbed, 4, 3), again))
    assert globbed.fetch(0) == members[0][1] and len(stored(tmp_path / "cache/tar-index")) == 2


def test_tar_index_follows_the_tar(photos, tmp_path, capsys):
    """An old index read into a new tar; half a download that goes unsaid, or that stops the run."""
    members, path = stored(photos), tmp_path / "s.tar"
    pack(path, members[:5])
    assert len(data.ImageFolder(path)) == 5
    [index] = (tmp_path / "cache/tar-index").iterdir()
    content = index.read_bytes()
    data.ImageFolder(path)
    assert index.read_bytes() == content
    pack(path, members[3:])
    assert list(data.ImageFolder(path).ids) == [name for name, _ in members[3:]]
    size = path.stat().st_size
    pack(path, [("Z" + name[1:], content) for name, content in members[3:]])  # of the same size
    assert path.stat().st_size == size and all(name[0] == "Z" for name in data.ImageFolder(path).ids)
    index.write_bytes(content[:100])
    assert len(data.ImageFolder(path)) == 20
    pack(path, members[:5])
    whole = path.read_bytes()
    last = data.ImageFolder(path).places[-1]
    capsys.readouterr()
    for end, left in (last[1] + last[2] // 2, 5), (last[1] - 100, 4):
        path.write_bytes(whole[:end])
        for _ in "again", "and not from the cache":
            cut = data.ImageFolder(path, size=16)
            says = f"s.tar is cut off or damaged: {left} images of it are used"
            assert len(cut) == left and (says in capsys.readouterr().out or left == 4)
    path.write_bytes(whole[: last[1] - 512] + b"\7" * 512 + whole[last[1] :])  # a header in the middle
    assert len(data.ImageFolder(path)) == 4 and "damaged: 4 images" in capsys.readouterr().out
    path.write_bytes(whole[: last[1] + last[2] // 2])
    cut = data.ImageFolder(path, size=16)
    with pytest.raises(ValueError, match=f"s.tar/{re.escape(members[4][0])} cannot be decoded"):
        cut.read(4)
    for content in b"", b"\x1f\x8b" + bytes(2000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="s.tar is no plain tar; decompress it"):
            data.ImageFolder(path)


def spoil(folder: Path) -> list[str]:
    """Add one file of every unreadable kind."""
    jpeg, png = (folder / "a/01.JPG").read_bytes(), (folder / "00.png").read_bytes()
    bad = {"cut.jpg": jpeg[: len(jpeg) // 2], "cut.png": png[: len(png) // 2], "empty.png": b"",
           "text.jpeg": b"no image at all\n" * 50, "bomb.png": png_header(40_000, 40_000),
           "large.png": png_header(10_000, 10_000)}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "gone.png").symlink_to(folder / "nowhere")
    return [*bad, "gone.png"]


def test_unreadable_images_are_replaced(photos, capsys, monkeypatch):
    """Replacements that workers, ranks or a resume change; a broken file unnamed, or named each time."""
    bad = spoil(photos)
    monkeypatch.setattr(data, "ALLOWED", (0.9, 0))
    dataset = data.ImageFolder(photos, size=16, seed=3)
    assert len(dataset) == 30
    for name in bad:
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(f"{photos}/{name} ")) as caught:
            dataset[dataset.ids.index(name)]
        assert ("pixels) exceeds" in str(caught.value)) == (name in ("bomb.png", "large.png"))
        assert "\n" not in str(caught.value)
    capsys.readouterr()
    whole = list(data.batches(dataset, 4, 16, seed=3))  # two epochs and a bit
    said = capsys.readouterr().out
    assert all(said.count(f"/{name} ") == 1 for name in bad) and said.count("\n") == len(bad)
    assert len(dataset.unreadable) == 7 and dataset.unreadable.total() >= 14
    assert all(batch.keys() == {"image", "name"} and not set(batch["name"]) & set(bad) for batch in whole)
    assert len({name for batch in whole for name in batch["name"]}) == 23
    for workers in 1, 2:
        assert all(map(same_batches, whole, data.batches(dataset, 4, 16, seed=3, workers=workers)))
    assert all(map(same_batches, whole[7:], data.batches(dataset, 4, 16, start=7, seed=3)))
    ranks = [data.batches(dataset, 2, 16, seed=3, rank=r, world_size=2) for r in (0, 1)]
    for one, left, right in zip(whole, *ranks, strict=True):
        assert one["name"] == left["name"] + right["name"]
        assert torch.equal(one["image"], torch.cat([left["image"], right["image"]]))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_stop(photos, workers):
    """A run on a dying disk that goes on with what is left of it, or one bad file that stops a run."""
    for k in range(4):
        (photos / f"bad{k}.jpg").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"1\d of \d+ images tried \(\d+.\d%\) cannot be") as caught:
        list(data.batches(data.ImageFolder(photos, size=16), 4, 100, workers=workers))
    assert "bad" in str(caught.value) and "\n" not in str(caught.value)
    for k in range(1, 4):
        (photos / f"bad{k}.jpg").unlink()
    assert len(list(data.batches(data.ImageFolder(photos, size=16), 4, 30, workers=workers))) == 30  # 5 times
    counts = data.Counter()
    data.count_unreadable(counts, ["x"] * 11, 1089)  # 1 % to the image
    with pytest.raises(ValueError, match="12 of 1101"):
        data.count_unreadable(counts, ["x"], 1089)
    for path in photos.rglob("*.*"):
        path.write_bytes(b"?")
    with pytest.raises(ValueError, match="10 images in a row cannot be read"):
        list(data.batches(data.ImageFolder(photos, size=16), 4, 9, workers=workers))


def test_killed_worker_loses_nothing(photos, capsys):
    """A run of days that ends with one worker, or that skips or repeats batches after it."""
    dataset, before = data.ImageFolder(photos, size=16), signal.getsignal(signal.SIGCHLD)
    whole, seen = list(data.batches(dataset, 4, 30)), []
    for batch in data.batches(dataset, 4, 30, workers=2):
        seen.append(batch)
        if len(seen) == 4:
            assert signal.getsignal(signal.SIGCHLD) == before
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.3)  # the middle of a training step, where no exception may come up
    assert len(seen) == 30 and all(map(same_batches, whole, seen))
    assert re.findall(r"step \d+: a loader worker failed \(.*\); starting 2 anew", capsys.readouterr().out)


class Fragile(data.ImageFolder):
    """Raise what no reader foresees at steps 2 and 6, until a file says that it was often enough."""

    def __getitem__(self, key):
        if key[1] in (2, 6) and self.log.read_text().count(str(key[1])) < self.times:
            self.log.write_text(self.log.read_text() + str(key[1]))
            raise KeyError("unforeseen")
        return super().__getitem__(key)


def test_raising_worker_is_restarted_five_times(photos, tmp_path, capsys):
    """Endless restarts, or an error of the loader's own process that is taken for a worker's."""
    dataset = Fragile(photos, size=16)
    dataset.log, dataset.times = tmp_path / "log", 5
    dataset.log.write_text("")
    others = set(multiprocessing.active_children())
    for done, _ in enumerate(data.batches(dataset, 4, 8, workers=1), 1):  # the old worker has ended
        assert done == 8 or len(set(multiprocessing.active_children()) - others) == 1
    assert done == 8
    out = capsys.readouterr().out
    assert all(out.count(f"step {k}: a loader worker failed (KeyError: 'unforeseen')") == 5 for k in (2, 6))
    dataset.times = 99
    with pytest.raises(OSError, match="failed 6 times in a row at step 2 .*; use fewer --workers"):
        list(data.batches(dataset, 4, 5, workers=1))
    with pytest.raises(KeyError):
        list(data.batches(dataset, 4, 5))


def test_students_of_images_without_labels_are_reported(photos, tmp_path, tiny, capsys):
    """A report that asks such data for a task, a protocol or a split of probes."""
    spec = f"images:{photos}"
    tiny_run(None, tmp_path, stage="deconstruct", data=spec, steps=1, image_size=(32, 40))
    ckpt = tmp_path / "deconstruct.pt"
    scoring.main(scoring.Args(ckpt=ckpt, device="cpu", analysis=True))
    found = json.loads((tmp_path / "results_stage1.json").read_text())
    assert found["images"] == len(data.open_data(spec, "val")) and found["metrics"] == found["probes"] == {}
    assert len(found["analysis"]["blocks"]) == 4 and "has no labels" in capsys.readouterr().out
    with Image.open(tmp_path / "experts_stage1.png") as drawn:
        assert drawn.width > 400


def test_specs_of_unlabelled_images(photos, tmp_path):
    """Labels wished for after days of stage 1; a missing shard passed over; compressed tars."""
    pack(tmp_path / "s-0.tar", stored(photos))
    (tmp_path / "s-1.tar.gz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for spec, says in {
        f"tars:{tmp_path}/s-*": "is no folder; name one, or plain tars as",
        f"tars:{tmp_path}/s-*.tar*": "s-1.tar.gz is no plain .tar; decompress it",
        f"tars:{tmp_path}/s-{{0..2}}.tar": "s-1.tar matches no file",
        f"images:{tmp_path}/nowhere": "nowhere is no folder; name one",
        f"images:{tmp_path}/empty": "empty holds no images; known suffixes are .jpg",
        f"tars:{tmp_path}/s-{{1..0}}.tar": "holds no images", "images:": '"images:" is unknown; use "world"',
    }.items():
        with pytest.raises((ValueError, OSError), match=re.escape(says)):
            data.open_data(spec, "train")
    with pytest.raises(ValueError, match="has no labels; use it for --stage deconstruct"):
        data.open_data(f"images:{photos}", "train", view="multitask")
    args = train.Args(data=f"images:{photos}", out_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be used to recompose: it has no labels"):
        train.check_args(args)
    train.check_args(replace(args, stage="deconstruct"))


def test_commands_on_unlabelled_images(photos, tmp_path, capsys):
    """A check that praises broken files, a sheet that breaks on them, a benchmark that cannot run."""
    pack(tmp_path / "s.tar", stored(photos))
    assert data.main(data.Args(check=f"tars:{tmp_path}/s.tar")) == 0
    assert "23 images, 0.1 MiB; 5 .png, 5 .jpg, 5 .bmp, 4 .webp, 4 .tiff" in capsys.readouterr().out
    assert data.main(data.Args(bench=str(photos), image_size=16)) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("read", "decode", "tensors", "collate", "images/s in one process"))
    spoil(photos)
    assert data.main(data.Args(check=str(photos))) == 1
    out = capsys.readouterr().out
    assert "7 of 30 decoded images cannot be read" in out and f"{photos}/cut.jpg cannot be decoded" in out
    data.main(data.Args(show=str(photos), rows=2, out=tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").size == (996, 364)
    with pytest.raises(ValueError, match='"world" has labels; --bench takes images, imagenet, tars'):
        data.main(data.Args(bench="world"))


# ------------------------------------------------------------------------------------------------ pictures


def test_colourise():
    """Ignored pixels in a class colour, mirrored normals, two classes of one colour."""
    ids = np.array([list(range(12)) + [255]], np.uint8)
    for task, count in ("semseg", 12), ("human_parts", 7):
        picture = data.colourise(task, ids)
        assert picture.dtype == np.uint8 and picture[0, -1].tolist() == [128] * 3
        assert len({tuple(p) for p in picture[0, :count].tolist()}) == count
    forty = data.colourise("semseg", np.arange(40)[None])
    assert len({tuple(p) for p in forty[0].tolist()}) == 40
    normals = np.array([[[0, 0, 1], [1, 0, 0], [0, 0, 0], [255, 255, 255]]], np.float32)
    picture = data.colourise("normals", normals)[0].tolist()
    assert picture == [[127, 127, 255], [255, 127, 127], [128] * 3, [128] * 3]
    depth = data.colourise("depth", np.array([[2.0, 6.0, 0.0, 255.0]]))[0].tolist()
    assert depth == [[253, 231, 37], [68, 1, 84], [128] * 3, [128] * 3]
    assert data.colourise("sal", np.array([[0, 1, 255]]))[0].tolist() == [[0] * 3, [255] * 3, [128] * 3]
    assert data.colourise("edge", np.array([[0.5]]))[0, 0].tolist() == [127] * 3


def test_contact_sheet(world, pascal):
    """A sheet that only square images, or only the world, can be drawn on."""
    assert data.contact_sheet(data.World(world, "val"), 8).width == 7 * 198
    assert data.contact_sheet(data.PascalContext(pascal, "val"), 2, cell=64).width == 6 * 70


# ------------------------------------------------------------------------------------- plain versions


def plain_miou(predictions, targets, n):
    tp, fp, fn = [0] * n, [0] * n, [0] * n
    for p, t in zip(np.ravel(predictions).tolist(), np.ravel(targets).tolist(), strict=True):
        if t != 255 and p == t:
            tp[t] += 1
        elif t != 255:
            fp[p] += 1
            fn[t] += 1
    return [100 * tp[c] / max(tp[c] + fp[c] + fn[c], 1e-8) for c in range(n)]


def plain_saliency(predictions, targets, tiny=1e-8):
    """maxF from sums over the data set, mIoU from means over images."""
    f, miou = [], []
    for threshold in torch.arange(0.05, 1, 0.05):
        tp = predicted = salient = 0
        per_image = []
        for p, t in zip(predictions, targets, strict=True):
            valid = t != 255
            if not valid.any():
                continue
            over, truth = torch.tensor(p[valid]) >= threshold, torch.tensor(t[valid] == 1)
            both = int((over & truth).sum())
            tp, predicted, salient = tp + both, predicted + int(over.sum()), salient + int(truth.sum())
            union = int((over | truth).sum())
            per_image.append(both / union if union else 1.0)
        precision, recall = tp / (predicted + tiny), tp / (salient + tiny)
        f.append(1.3 * precision * recall / (0.3 * precision + recall + tiny))
        miou.append(sum(per_image) / max(len(per_image), 1))
    return 100 * max(f), 100 * max(miou)


def plain_angles(predictions, targets):
    """acos of the clipped dot product, pixel by pixel."""
    angles = []
    for p, t in zip(predictions.reshape(-1, 3).tolist(), targets.reshape(-1, 3).tolist(), strict=True):
        if 255 in t or not any(t):
            continue
        dot = sum(a * b for a, b in zip(p, t, strict=True)) / math.hypot(*p) / math.hypot(*t)
        angles.append(math.degrees(math.acos(max(-1.0, min(1.0, dot)))))
    return np.array(angles)


def plain_boundary(labels):
    h, w = labels.shape
    marked = np.zeros((h, w), bool)
    for y in range(h):
        for x in range(w):
            around = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if y == h - 1:
                around = [(y, x + 1)]
            elif x == w - 1:
                around = [(y + 1, x)]
            marked[y, x] = any(labels[v, u] != labels[y, x] for v, u in around if v < h and u < w)
    return marked


def plain_match(predicted, truth, radius):
    """Try every assignment: exponential, so for a handful of pixels."""
    left, right = np.argwhere(predicted).tolist(), np.argwhere(truth).tolist()

    def best(i, used):
        if i == len(left):
            return 0
        most = best(i + 1, used)
        for j, place in enumerate(right):
            if j not in used and math.dist(left[i], place) <= radius:
                most = max(most, 1 + best(i + 1, used | {j}))
        return most

    return best(0, frozenset())


# -------------------------------------------------------------------------------------------- metrics

SHAPE = (5, 24, 20)  # images, rows, columns


def sample(task, seed=0):
    """Return predictions and targets of five images; in the last one nothing is labelled."""
    rng = np.random.default_rng(seed)
    ignored = rng.random(SHAPE) < 0.2
    ignored[-1] = True
    if task in ("semseg", "human_parts"):  # class 4 is never there, class 3 only predicted
        p, t = rng.integers(0, 4, SHAPE), rng.integers(0, 3, SHAPE).astype(np.uint8)
        return p, np.where(ignored, 255, t)
    if task == "sal":  # half of the probabilities lie exactly on a threshold
        t = rng.random(SHAPE) < 0.3
        steps = torch.arange(0.05, 1, 0.05).numpy()[rng.integers(0, 19, SHAPE)]
        p = np.where(rng.random(SHAPE) < 0.5, steps, rng.random(SHAPE)).astype(np.float32)
        p[1], t[1] = 0, False  # nothing salient, nothing predicted: the released code divides by zero
        return p, np.where(ignored, 255, t).astype(np.uint8)
    if task == "normals":
        p, t = rng.normal(size=(2, *SHAPE, 3)).astype(np.float32)
        t = np.where(rng.random(SHAPE)[..., None] < 0.5, p + 0.1 * t, t).astype(np.float32)
        t[ignored] = 255
        t[0, :3] = 0
        return p, t
    if task == "depth":
        t = rng.uniform(0.5, 10, SHAPE).astype(np.float32)
        p = (t * rng.normal(1, 0.3, SHAPE)).astype(np.float32)
        t[ignored], t[0, :2], t[1, :2] = 255, 0, 81
        return p, t
    labels = np.repeat(np.repeat(rng.integers(0, 3, (5, 4, 4)), 6, 1), 5, 2).astype(np.int32)
    edges = np.stack([scoring.seg2bmap(x) for x in labels])
    return (0.5 * edges + 0.5 * rng.random(SHAPE)).astype(np.float32), labels


def build(task):
    return {"semseg": lambda: scoring.MeanIoU(5), "human_parts": lambda: scoring.MeanIoU(5, band=1),
            "sal": scoring.MaxF, "normals": scoring.NormalError,
            "depth": scoring.DepthRMSE, "edge": lambda: scoring.BoundaryF(0.05, "simple"),
            "edge sak": lambda: scoring.BoundaryF(0.05)}[task]()


def score(task, predictions, targets):
    metric = build(task)
    metric.update(predictions, targets)
    return metric.compute()


def same_numbers(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-12, err_msg=key)


def test_miou_equals_loops_and_counts_absent_classes():
    """Would catch: ignored pixels counted as false positives, absent classes left out of the mean."""
    p, t = sample("semseg")
    got = score("semseg", p, t)
    np.testing.assert_allclose(got["per_class"], plain_miou(p, t, 5), rtol=1e-12)
    assert got["per_class"][3:] == [0, 0] and got["miou"] == pytest.approx(sum(got["per_class"]) / 5)
    hand = scoring.MeanIoU(3)
    hand.update(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 255]]))  # IoU 1/2, 1/2, absent
    assert hand.compute()["miou"] == pytest.approx(100 / 3)


def test_band_is_where_classes_meet():
    """Would catch: void counted as a class that meets others, the image's border taken for one, a band
    that is a pixel too wide."""
    rng = np.random.default_rng(0)
    p, t = rng.integers(0, 4, (3, 17, 23)), rng.integers(0, 4, (3, 2, 3))
    t = t.repeat(9, 1).repeat(9, 2)[:, :17, :23]
    t[:, 3:8, 5:9] = 255
    metric, near = scoring.MeanIoU(4, band=3), np.full(t.shape, 255)
    for i, y, x in np.argwhere(t != 255):
        for v, u in np.argwhere(t[i] != 255):
            beside = ((v + 1, u), (v - 1, u), (v, u + 1), (v, u - 1))
            meets = any(0 <= y2 < 17 and 0 <= x2 < 23 and t[i, y2, x2] not in (255, t[i, v, u])
                        for y2, x2 in beside)
            if meets and math.hypot(v - y, u - x) < 3:
                near[i, y, x] = t[i, y, x]
                break
    metric.update(p, t)
    assert metric.compute()["band_miou"] == pytest.approx(np.mean(plain_miou(p, near, 4)), rel=1e-12)
    assert 0.1 < (near != 255).mean() < 0.9 and not scoring.boundary_band(np.ones((4, 5)), 3).any()


def test_miou_of_images_without_labels_is_zero_and_wrong_ids_are_named():
    """Would catch: nan or a crash on images without people; ids that wrap around in the bincount."""
    metric = scoring.MeanIoU(7)
    metric.update(np.zeros((4, 4), int), np.full((4, 4), 255))
    assert metric.compute() == {"miou": 0.0, "per_class": [0.0] * 7}
    with pytest.raises(ValueError, match="target has class ids 9..9 for 7 classes"):
        metric.update(np.zeros((1, 1), int), np.full((1, 1), 9))
    with pytest.raises(ValueError, match="differ in shape"):
        metric.update(np.zeros((4, 4), int), np.zeros((4, 5), int))


def test_saliency_equals_loops():
    """Would catch: > for >=, thresholds in float64, per-image F, beta^2 = 1, IoU of the pooled counts."""
    p, t = sample("sal")
    got = score("sal", p, t)
    assert [got["maxf"], got["miou"]] == pytest.approx(plain_saliency(p, t), rel=1e-12)


def test_second_sigmoid_of_invpt_leaves_four_thresholds():
    """Would catch: logits or the logistic function's inverse, an F of "sak" under InvPT's name."""
    p, t = sample("sal")
    metric = scoring.MaxF("invpt")
    metric.update(p, t)
    got = metric.compute()
    second = torch.from_numpy(p).sigmoid().numpy()
    # theirs adds no 1e-8: the sums are so large that nobody sees it
    assert [got["maxf"], got["miou"]] == pytest.approx(plain_saliency(second, t, 1e-12), rel=1e-6)
    assert got["maxf"] != pytest.approx(score("sal", p, t)["maxf"], rel=1e-3)
    for value, edge in ((0.2006, 0), (0.2008, 1), (0.4056, 2), (0.6191, 3), (0.8474, 4)):
        metric = scoring.MaxF("invpt")
        metric.update(np.array([[value]], np.float32), np.array([[1]]))
        assert metric.sums["predicted"].sum() == 10 + edge  # .05 .. .5 take everything
    with pytest.raises(ValueError, match="use sak or invpt"):
        scoring.MaxF("simple")


def test_saliency_by_hand():
    """Would catch: precision and recall swapped where beta^2 = 0.3 tells them apart."""
    got = score("sal", np.array([[0.9, 0.9, 0.1, 0.0]]), np.array([[1, 0, 1, 0]]))
    # t <= .1: P 2/3, R 1, F 1.3 (2/3) / (.2 + 1) = .7222;  t in (.1, .9]: P = R = 1/2, F = 1/2
    assert got["maxf"] == pytest.approx(100 * 1.3 * (2 / 3) / 1.2, abs=1e-4)
    assert got["miou"] == pytest.approx(100 * 2 / 3)


def test_saliency_without_salient_pixels_does_not_divide_by_zero():
    """Would catch: the released code's ZeroDivisionError on an empty image, and on no image at all."""
    assert scoring.MaxF().compute() == {"maxf": 0.0, "miou": 0.0}
    assert score("sal", np.zeros((3, 3)), np.zeros((3, 3), int)) == {"maxf": 0.0, "miou": 100.0}


def test_normals_equal_loops_in_both_layouts():
    """Would catch: unnormalised predictions, zero or 255 normals scored, channels mixed with rows."""
    p, t = sample("normals")
    got, angles = score("normals", p, t), plain_angles(p, t)
    assert got["mean"] == pytest.approx(angles.mean(), abs=1e-5)
    low, high = np.sort(angles)[[(len(angles) - 1) // 2, len(angles) // 2]]
    assert low - 0.01 <= got["median"] <= high + 0.01
    for limit in (11.25, 22.5, 30):
        assert got[f"within_{limit:g}"] == pytest.approx(100 * (angles < limit).mean(), abs=1e-9)
    first = (np.moveaxis(x, -1, 1) for x in (3 * p, t))
    same_numbers(got | {"mean": 0}, score("normals", *first) | {"mean": 0})


def test_normals_by_hand():
    """Would catch: an acos whose rounding turns small angles into 0, a median off by half a bin."""
    angles = np.array([1e-5, 20, 90, 180, 40])
    p = np.stack([np.sin(np.radians(angles)), 0 * angles, np.cos(np.radians(angles))], -1)[None]
    metric = scoring.NormalError()
    metric.update(p[:, :1], np.array([[[0.0, 0, 1]]]))
    assert metric.compute()["mean"] == pytest.approx(1e-5, rel=1e-6)
    metric.update(p[:, 1:], np.tile([0.0, 0, 1], (1, 4, 1)))
    got = metric.compute()
    assert got["mean"] == pytest.approx(66, abs=1e-5) and got["median"] == pytest.approx(40, abs=0.01)
    assert [got[f"within_{x}"] for x in ("11.25", "22.5", "30")] == [20, 40, 40]
    assert scoring.median_bin(np.array([1, 3, 0])) == pytest.approx(4 / 3)
    fine = scoring.NormalError()
    spread = np.radians(np.random.default_rng(0).uniform(0, 60, 9999))
    fine.update(np.stack([np.sin(spread), 0 * spread, np.cos(spread)], -1)[None],
                np.tile([0.0, 0, 1], (1, 9999, 1)))
    assert fine.compute()["median"] == pytest.approx(np.degrees(np.median(spread)), abs=0.01)


def test_depth_equals_loops():
    """Would catch: a mean of per-image errors, unknown (0), ignored (255) or far (81 m) depth scored."""
    p, t = sample("depth")
    pairs = [(max(a, 1e-9), b) for a, b in zip(p.ravel().tolist(), t.ravel().tolist(), strict=True)
             if 0 < b < 80]
    got = score("depth", p, t)
    assert got["rmse"] == pytest.approx(math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs)))
    close = sum(max(a / b, b / a) < 1.25 for a, b in pairs)
    assert got["delta1"] == pytest.approx(100 * close / len(pairs))
    # pooled: sqrt((1 + 9) / 4), not the mean of sqrt(1/2) and sqrt(9/2)
    hand = score("depth", np.array([[[3.0, 2]], [[5, 2]]]), np.array([[[2.0, 2]], [[2, 2]]]))
    assert hand == {"rmse": pytest.approx(math.sqrt(2.5)), "delta1": 50.0}


def test_no_valid_pixel_is_nan_not_zero():
    """Would catch: a perfect 0.0 degrees or metres from a data set without labels."""
    for task in ("normals", "depth"):
        p, t = sample(task)
        assert all(math.isnan(x) for x in score(task, p[-1:], t[-1:]).values())


def test_seg2bmap_equals_loops():
    """Would catch: a marked bottom-right corner, last row or column compared with what is not there."""
    labels = np.random.default_rng(0).integers(0, 2, (40, 5, 6))
    for x in labels:
        assert np.array_equal(scoring.seg2bmap(x), plain_boundary(x))
    one = np.zeros((3, 3), int)
    one[2, 2] = 7
    assert np.argwhere(scoring.seg2bmap(one)).tolist() == [[1, 1], [1, 2], [2, 1]]


def test_match_is_the_largest_matching():
    """Would catch: greedy pairs, a pixel used twice, a radius cut to whole pixels or to squares."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        predicted, truth = np.zeros((2, 5, 6), bool)
        for grid in (predicted, truth):
            grid.ravel()[rng.choice(30, rng.integers(0, 7), replace=False)] = True
        radius = rng.choice([0.5, 1, 1.5, 2, 2.3, 3])
        assert scoring.match(predicted, truth, radius) == plain_match(predicted, truth, radius)
    predicted, truth = np.zeros((2, 1, 4), bool)
    predicted[0, [1, 2]], truth[0, [0, 2]] = True, True  # nearest first pairs 2-2 or 1-2, then is stuck
    assert scoring.match(predicted, truth, 1) == 2


def test_boundary_counts_equal_loops():
    """Would catch: counts of a skipped threshold lost or stale, > for >=, a radius of the wrong side."""
    p, labels = sample("edge")
    p = np.round(p, 1)  # most thresholds leave the binary map as it was
    got, expected = score("edge", p, labels), np.zeros((19, 4), np.int64)
    for image, label in zip(p, labels, strict=True):
        truth = data.thin(plain_boundary(label))
        for k in range(19):
            binary = data.thin(image >= np.float32((k + 1) / 20))
            matches = scoring.match(binary, truth, 0.05 * math.sqrt(24**2 + 20**2))
            expected[k] += [matches, truth.sum(), matches, binary.sum()]
    assert np.array_equal(got["counts"], expected)
    scores = [2 * a / b * c / d / (a / b + c / d) if a else 0.0 for a, b, c, d in expected.tolist()]
    best = int(np.argmax(scores))
    assert got["odsf"] == pytest.approx(100 * scores[best])
    assert got["threshold"] == pytest.approx((best + 1) / 20)
    assert got["recall"] == pytest.approx(100 * expected[best][0] / expected[best][1])


def test_boundary_extremes():
    """Would catch: precision 0/0 without predictions, 8-bit maps read as probabilities, a score of
    untouched images, and label maps from .mat files, whose columns lie in a row in memory."""
    labels = 3 * np.tri(12, dtype=np.int32)  # a diagonal: its boundary needs thinning
    truth = data.thin(scoring.seg2bmap(labels))
    perfect = score("edge", truth.astype(np.float32), labels)
    assert [perfect[k] for k in ("odsf", "precision", "recall")] == [100, 100, 100]
    assert np.array_equal(score("edge", 255 * truth.astype(np.uint8), labels)["counts"], perfect["counts"])
    fortran = score("edge", truth.astype(np.float32), np.asfortranarray(labels))
    assert np.array_equal(fortran["counts"], perfect["counts"])
    silent = score("edge", np.zeros((12, 12), np.float32), labels)
    assert (silent["odsf"], silent["precision"], silent["recall"]) == (0, 100, 0)
    assert score("edge", np.zeros((12, 12)), 0 * labels)["odsf"] == 0
    with pytest.raises(ValueError, match="use sak, invpt, simple"):
        scoring.BoundaryF(0.01, protocol="seism")


def plain_triangle(x, radius, middle):
    """Weigh by distance, pixel by pixel, mirrored at the borders, in float64."""
    weight = [*range(1, radius + 1), middle, *range(radius, 0, -1)]
    for _ in range(2):  # one axis, then the other
        length, x = len(x), x.astype(np.float64)
        place = [min(i % (2 * length), -1 - i % (2 * length) + 2 * length)
                 for i in range(-radius, length + radius)]
        x = np.stack([sum(w * x[place[i + k]] for k, w in enumerate(weight)) / sum(weight)
                      for i in range(length)]).T
    return x


def plain_orientation(x):
    """Follow the definition of the direction, one pixel at a time, in float64."""
    x = plain_triangle(x, 4, 5)

    def slope(z, axis):
        z = z if axis else z.T
        out = np.array([[(row[min(i + 1, len(row) - 1)] - row[max(i - 1, 0)])
                         / (min(i + 1, len(row) - 1) - max(i - 1, 0)) for i in range(len(row))] for row in z])
        return out if axis else out.T

    dx, dy = slope(x, 1), slope(x, 0)
    dxx, dxy, dyy = slope(dx, 1), slope(dx, 0), slope(dy, 0)
    angle = [math.atan(c * np.sign(-b) / (a + 1e-5)) % math.pi
             for a, b, c in zip(dxx.ravel(), dxy.ravel(), dyy.ravel(), strict=True)]
    return np.reshape(angle, x.shape), np.abs(dxx + 1e-5), np.abs(dxy)


def plain_suppression(e, angle, radius):
    """Compare every pixel with every sample along its angle, then fade the border."""
    (h, w), out = e.shape, e.astype(np.float64)
    for y in range(h):
        for x in range(w):
            for d in [*range(-radius, 0), *range(1, radius + 1)]:
                u = min(max(x + d * math.cos(angle[y, x]), 0), w - 1.001)
                v = min(max(y + d * math.sin(angle[y, x]), 0), h - 1.001)
                i, j, a, b = int(u), int(v), u % 1, v % 1
                sample = ((1 - b) * ((1 - a) * e[j, i] + a * e[j, i + 1])
                          + b * ((1 - a) * e[j + 1, i] + a * e[j + 1, i + 1]))
                if 1.01 * e[y, x] < sample:
                    out[y, x] = 0
    rim = min(5, h // 2, w // 2)
    fade = [[min(k, n - 1 - k, rim) / rim for k in range(n)] for n in (h, w)]
    return out * np.outer(*fade)


@pytest.mark.parametrize("size", [(17, 23), (30, 12), (5, 9), (3, 4)])
def test_boundary_filters_equal_loops(size):
    """Would catch: rows mixed with columns, a border mirrored elsewhere, comparison with what was already
    suppressed, one side of the line forgotten, a fade that stops at 4/5 or runs along one axis."""
    rng = np.random.default_rng(size[0])
    for _ in range(3):
        e = rng.random(size, np.float32)
        np.testing.assert_allclose(scoring.smooth(e), plain_triangle(e, 1, 2), atol=1e-6)
        np.testing.assert_allclose(scoring.smooth_widely(e), plain_triangle(e, 4, 5), atol=1e-6)
        expected, steep, turned = plain_orientation(e)
        angle = scoring.orientation(e)
        off = np.abs(angle - expected)
        clear = (steep > 1e-4) & (turned > 1e-6)  # else the last bit decides
        assert clear.mean() > 0.7 and np.minimum(off, np.pi - off)[clear].max() < 0.02
        for radius in (1, 4):
            got = scoring.suppress(e, angle, radius)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, plain_suppression(e, angle, radius), atol=1e-6)


def test_suppression_by_hand():
    """Would catch: an angle along the line instead of across, a tolerance below 1 % or above, borders that
    do not fade or fade by another step."""
    e = np.zeros((21, 21), np.float32)
    e[:, 9:12] = 0.985, 1, 0.995
    across, along = np.zeros_like(e), np.full_like(e, np.pi / 2)
    got = scoring.suppress(e, across, 1)
    assert not got[:, 9].any() and (got[5:16, 11] == np.float32(0.995)).all()  # 0.995 * 1.01 > 1
    assert scoring.suppress(e, along, 4)[10, 9:12] == pytest.approx([0.985, 1, 0.995])
    assert got[:6, 10] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    ridge = scoring.orientation(e)[10, 10]  # of a line that runs down: across is along a row
    assert min(ridge, np.pi - ridge) < 0.01


def test_thresholds_of_each_protocol():
    """Would catch: > for >= or the reverse, float64 against float32 at 0.2, rounding of the second PNG to
    even or down, rounding of the first up."""
    flat = np.full((25, 25), 51, np.uint8)  # 51 / 255 is a threshold, 0.2
    centre = {name: scoring.boundary_levels(flat, name)[12, 12] for name in scoring.THRESHOLDS}
    assert centre == {"sak": 20, "invpt": 20, "simple": 4}  # .01 .. .20; .001, .01 .. .19; .05 .. .20
    assert [len(t) for t in scoring.THRESHOLDS.values()] == [99, 101, 19]
    five = np.full((5, 5), 5, np.uint8)  # halved by the fade: 2.5 / 255, and only 3 / 255 reaches .01
    assert scoring.boundary_levels(five, "sak")[1:4, 1:4].tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    assert scoring.boundary_levels(np.full((25, 25), 50.99 / 255), "sak")[12, 12] == 19
    with pytest.raises(ValueError, match=r"boundary probabilities are 0\.\.2; pass 0\.\.1"):
        scoring.boundary_levels(np.array([[0.0, 2.0]]), "sak")


SEISM = {  # protocol: weighted sums of the levels, whole and of the first 40 rows; counts at 5 thresholds
    "sak": ([18908906, 7515605],
            [[1060, 1146, 1063], [975, 1146, 978], [742, 1146, 744], [0, 1146, 0], [0, 1146, 0]]),
    "invpt": ([30555644, 12290535],
            [[1085, 1146, 1087], [1038, 1146, 1039], [941, 1146, 941], [236, 1146, 236], [0, 1146, 0]]),
}


@pytest.mark.parametrize("protocol", SEISM)
def test_boundary_map_and_counts_are_the_original_codes(protocol):
    """Would catch: sums in float64 or another order, which move a few weak pixels. The numbers are of code
    that gave, on two images, SEISM's own maps to the pixel and its numbers of pixels at all thresholds."""
    y, x = np.mgrid[:90, :121]
    ring = (y - 38) ** 2 + 2 * (x - 57) ** 2
    lines = np.maximum(0, 30 - np.abs(ring % 1200 - 600) // 8) * (x + 40) // 23
    specks = (y * 7919 + x * 104729 + y * y * x) % 1009 % 100 // 99
    predicted, labels = (7 + lines + specks).astype(np.uint8), ring // 1200 + (ring % 1200 > 600)
    sums = []
    for rows in (90, 40):  # cut at 40, the order of three terms in the last row shows
        level = scoring.boundary_levels(predicted[:rows], protocol).ravel()
        sums.append(int((level * (np.arange(level.size) % 997)).sum()))
    metric = scoring.BoundaryF(0.015, protocol)
    for map_ in (predicted, ((predicted + 0.5) / 255).astype(np.float32)):
        metric.sums["images"].clear()
        metric.update(map_, labels)
        counts = metric.compute()["counts"][[4, 10, 20, 60, 90], :]
        assert (sums, counts[:, [0, 1, 3]].tolist()) == SEISM[protocol]
        assert np.array_equal(counts[:, 0], counts[:, 2])


def boundary_scene(seed, size):
    """Return a probability and a label map: lines of unequal strength beside false ones."""
    rng, (h, w) = np.random.default_rng(seed), size
    y, x = np.mgrid[:h, :w]
    places = rng.random((rng.integers(3, 9), 2)) * size
    labels = ((y[..., None] - places[:, 0]) ** 2 + (x[..., None] - places[:, 1]) ** 2).argmin(-1)
    strength, false = ndimage.gaussian_filter(rng.random((2, h, w)), (0, 3, 3))
    strength = (strength - strength.min()) / np.ptp(strength)
    lines = ndimage.gaussian_filter(scoring.seg2bmap(labels).astype(float), 1) * 2 * strength
    false = np.abs(false - false.mean()) / false.std() * rng.uniform(0.05, 0.4)
    return np.clip(lines + false, 0, 1).astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("protocol", ["sak", "invpt"])
def test_coarse_to_fine_finds_the_exhaustive_best(protocol):
    """Would catch: a gap given up too early, a peak at either end missed, counts of one threshold stored at
    another, thresholds that were not evaluated counted as zeros."""
    evaluated = []
    for seed in range(15):
        whole = scoring.BoundaryF(0.03, protocol, exhaustive=True)
        quick = scoring.BoundaryF(0.03, protocol)
        quick.FEW = 0
        for image in range(1 + seed % 3):
            whole.update(*boundary_scene(100 * seed + image, (28 + seed % 9, 36)))
        quick.merge(whole.state())
        a, b = whole.compute(), quick.compute()
        known = b["counts"][:, 0] >= 0
        assert (b["counts"][~known] == -1).all() and (a["counts"] >= 0).all()
        assert np.array_equal(a["counts"][known], b["counts"][known])
        assert all(a[key] == b[key] for key in ("odsf", "threshold", "precision", "recall"))
        evaluated.append(known.sum())
    assert np.mean(evaluated) < 45


def test_gaps_by_hand():
    """Would catch: the bound with matches of the upper end or pixels of the lower, open ends forgotten."""
    counts = np.full((9, 4), -1)
    counts[2], counts[6] = (80, 100, 80, 160), (50, 100, 50, 60)  # F .615 and .625
    # below 2: 2 * 100 / 260 = .77; between: 2 * 80 / 160 = 1; above 6: 2 * 50 / 100 = 1
    assert scoring.gaps_worth_halving(counts, 0).tolist() == [0, 4, 7]
    counts[4] = (78, 100, 78, 90)  # F .821; bounds: .77; 160 / 190 = .842; 156 / 160 = .975; 1
    assert scoring.gaps_worth_halving(counts, 0).tolist() == [3, 5, 7]
    counts[6] = (40, 100, 40, 60)  # above: .8
    assert scoring.gaps_worth_halving(counts, 0).tolist() == [3, 5]
    assert scoring.gaps_worth_halving(counts, 0.1).tolist() == [0, 3, 5, 7]
    assert scoring.gaps_worth_halving(counts[:2] + 1, 0).tolist() == []


def test_match_equals_assignment_either_way_round():
    """Would catch: rows of the picture that run into each other, a side mistaken for the other when it has
    more pixels, indices that overflow or collide with source and sink."""
    rng = np.random.default_rng(3)
    for share in (0.02, 0.1, 0.3):
        a, b = rng.random((30, 25)) < share, rng.random((30, 25)) < 0.1
        near = ((np.argwhere(a)[:, None] - np.argwhere(b)) ** 2).sum(-1) <= 2.3**2
        rows, columns = optimize.linear_sum_assignment(near, maximize=True)
        assert scoring.match(a, b, 2.3) == scoring.match(b, a, 2.3) == near[rows, columns].sum()


def test_counts_do_not_depend_on_processes(monkeypatch):
    """Would catch: a chunk lost or counted twice, a function that a spawned process cannot import."""
    metric, counts = scoring.BoundaryF(0.03), []
    for seed in range(9):
        metric.update(*boundary_scene(seed, (20, 24)))
    for cores in (1, 2):
        monkeypatch.setattr(data, "core_count", lambda cores=cores: cores)
        monkeypatch.setattr(scoring.BoundaryF, "CHUNK", 480 if cores == 2 else 1500)
        counts.append(metric.count(np.array([20, 50])))
    assert np.array_equal(*counts) and counts[0].min() > 0


@pytest.mark.parametrize("task", ["semseg", "human_parts", "sal", "normals", "edge", "edge sak", "depth"])
def test_merge_order_and_batching_change_nothing(task):
    """Would catch: means of means over processes, a metric that takes a batch for one image, state
    that is shared instead of copied, tensors and arrays scored differently."""
    p, t = sample(task)
    whole = score(task, p, t)
    parts = [build(task), build(task)]
    for i in (3, 0, 4, 2, 1):
        parts[i % 2].update(torch.from_numpy(p[i]), torch.from_numpy(t[i]))
    kept = parts[1].state()
    parts[0].merge(parts[1].state())
    same_numbers(whole, parts[0].compute())
    assert pickle.dumps(kept) == pickle.dumps(parts[1].sums)
    parts[1].update(p[0], t[0])
    assert pickle.dumps(kept) != pickle.dumps(parts[1].sums)
    assert all(type(v) is list or v.dtype in (np.int64, np.float64) for v in kept.values())


def test_bfloat16_predictions_are_scored_and_nan_is_not():
    """Would catch: numpy's refusal of bfloat16 on a GPU run, and nan that counts as a low score."""
    half = torch.tensor([[2.0, 4.0]], dtype=torch.bfloat16)
    assert score("depth", half, torch.tensor([[2.0, 4.0]]))["rmse"] == 0
    with pytest.raises(ValueError, match="not finite"):
        score("depth", half * math.nan, torch.tensor([[2.0, 4.0]]))


def test_delta_m_reproduces_the_paper():
    """Would catch: the sign of normals or depth, and the paper's typed 2.29 where its row gives 2.52."""
    tasks = ("semseg", "human_parts", "sal", "normals", "edge")
    single = dict(zip(tasks, (80.25, 70.54, 84.54, 13.57, 74.22), strict=True))
    student = dict(zip(tasks, (82.20, 75.34, 84.81, 13.47, 75.92), strict=True))
    assert round(scoring.delta_m(student, single), 2) == 2.52
    keys = ("miou", "miou", "maxf", "mean", "odsf")
    nested = {task: {key: student[task], "other": 0.0} for task, key in zip(tasks, keys, strict=True)}
    assert scoring.delta_m(nested, single) == scoring.delta_m(student, single)
    nyud = ({"semseg": 60.22, "depth": 0.4883, "normals": 17.81, "edge": 76.59},
            {"semseg": 51.15, "depth": 0.5792, "normals": 19.77, "edge": 77.35})
    assert round(scoring.delta_m(*nyud), 2) == 10.59
    for reference in ({}, {"depth": 1.0}, {"sal": 0.0}):
        with pytest.raises(ValueError):
            scoring.delta_m(student, reference)


def test_published_rows(capsys):
    """A mistyped published number: Delta_m computed from each row must be the printed one, which SAK's and
    PRISM's papers give (PRISM ViT-B on PASCAL is printed as 2.29; its own row gives 2.52)."""
    printed = {
        "pascal": {"multi-task ViT-B": -4.04, "SAK ViT-B": 0.83, "PRISM ViT-B": 2.52, "SAK ViT-L": 2.30,
                   "PRISM ViT-L": 3.16},
        "nyud": {"multi-task ViT-B": -1.72, "SAK ViT-B": 11.11, "PRISM ViT-B": 10.59, "SAK ViT-L": 14.05}}
    for kind, gains in printed.items():
        rows = scoring.published_rows(kind, "sak")
        for name, gain in gains.items():
            single = rows[f"single-task {name[-5:]}"]
            assert scoring.delta_m(rows[name], single) == pytest.approx(gain, abs=0.0051), name
        assert set(rows) == {*gains, "single-task ViT-B", "single-task ViT-L"}
    scoring.print_published("pascal", "sak", rows["SAK ViT-B"], "ViT-B")  # its tasks are NYUD's
    scoring.print_published("world", "simple", {}, "ViT-B")
    out = capsys.readouterr().out
    (ours,) = [line for line in out.splitlines() if "this checkpoint, ViT-B" in line]
    assert "59.93" in ours and ours.rstrip(" │").endswith("-"), "no Delta_m over tasks that are not all there"


# -------------------------------------------------------------------------------------------- routing


def test_nmi_of_known_tables():
    """Would catch: another normalisation, log of 0, counts that were not made probabilities."""
    assert scoring.nmi(np.outer([1, 2, 3], [5, 0, 7, 11])) == pytest.approx(0, abs=1e-12)
    assert scoring.nmi(9 * np.eye(4, dtype=int)[[2, 0, 3, 1]]) == pytest.approx(1)
    assert scoring.nmi(np.zeros((0, 4), int)) == scoring.nmi(np.array([[3, 4]])) == 0
    # two contexts, four experts, two each: I = H(C) = log 2, H(X) = log 4, so 1 / sqrt 2
    assert scoring.nmi(np.array([[1, 1, 0, 0], [0, 0, 1, 1]])) == pytest.approx(1 / math.sqrt(2))
    table = np.random.default_rng(0).integers(1, 50, (3, 6))
    p = table / table.sum()
    information = sum(p[c, e] * math.log(p[c, e] / p[c].sum() / p[:, e].sum())
                      for c in range(3) for e in range(6))
    spread = [-sum(q * math.log(q) for q in margin) for margin in (p.sum(0), p.sum(1))]
    assert scoring.nmi(table) == pytest.approx(information / math.sqrt(math.prod(spread)))


PLAINEST = prism.PrismConfig(
    dim=16, depth=4, heads=2, patch=8, grid=(4, 4), moe_blocks=(0, 1, 2, 3), experts=4, top_k=2,
    teachers={"toy-clip": 8, "toy-sam": 8},
    tasks={"semseg": 3, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2, "depth": 1},
)


class Scenes:
    """Five labelled scenes of 29 x 30 pixels, padded to 32 x 32; the image's value is its number."""

    tasks, max_dist, ids, boundary_protocol = PLAINEST.tasks, 0.02, list("01234"), "simple"
    classes = {"semseg": ["wall", "floor", "ball"], "human_parts": [f"part {k}" for k in range(7)]}

    def __len__(self):
        return 5

    def read(self, i, labels=True):
        y, x = np.mgrid[:29, :30]
        ball = np.hypot(y - 12 - i, x - 14) < 6
        labelmap = np.where(ball, 32, 1 + (y > 20)).astype(np.int32)
        normals = np.zeros((29, 30, 3), np.float32)
        normals[np.arange(29) > i, :, :] = (0.6, 0, 0.8)
        return {
            "image": np.full((29, 30, 3), 10 * i, np.uint8), "labelmap": labelmap, "name": str(i),
            "semseg": np.where(ball, 2, y > 20).astype(np.uint8), "sal": ball.astype(np.uint8),
            "human_parts": (ball * (i % 3)).astype(np.uint8), "normals": normals,
            "edge": scoring.seg2bmap(labelmap).astype(np.uint8),
            "depth": np.where(x < 3, 0, 2 + 0.1 * y).astype(np.float32),
        }

    def __getitem__(self, i):
        return data.to_tensors(self.read(i), (32, 32))


class Oracle(torch.nn.Module):
    """Answers with the truth as raw outputs: logits, normals of length 3, negative depth at the rim."""

    def predict(self, images, tasks):
        assert not self.training
        found = [Scenes()[i] for i in (images[:, 0, 16, 16] * 25.5).round().int().tolist()]
        raw = {}
        for task in tasks:
            t = torch.stack([scene[task] for scene in found])
            if task in ("semseg", "human_parts"):
                raw[task] = 5 * F.one_hot(t * (t != 255), PLAINEST.tasks[task]).permute(0, 3, 1, 2).float()
            elif task == "sal":
                raw[task] = torch.stack([0 * t, 9.0 * t - 4.5], 1)
            elif task == "edge":
                thin = [data.thin(scoring.seg2bmap(Scenes().read(int(i)).get("labelmap")))
                        for i in (images[:, 0, 16, 16] * 25.5).round()]
                raw[task] = F.pad(torch.from_numpy(np.stack(thin)).float() * 9 - 4.5, (1, 1, 1, 2))[:, None]
            elif task == "normals":
                raw[task] = 3 * t
            else:
                raw[task] = torch.where(t == 255, -1, t)[:, None]
        return raw


def test_evaluate_scores_the_truth_perfect_and_merges():
    """Would catch: padding cut on the wrong side, a wrong final map (sigmoid for softmax, other axis),
    the training label `edge` scored as truth, a model left in another mode, ranks that overlap."""
    oracle, tasks = Oracle().train(), list(PLAINEST.tasks)
    got = scoring.evaluate(oracle, Scenes(), "cpu", 2, tasks)
    assert oracle.training and list(got) == tasks
    assert got["semseg"]["miou"] == 100 and got["sal"]["maxf"] == pytest.approx(100, abs=1e-5)
    assert got["human_parts"]["per_class"] == [100, 100, 100, 0, 0, 0, 0]
    assert got["normals"]["mean"] == pytest.approx(0, abs=1e-4) and got["normals"]["within_11.25"] == 100
    assert got["edge"]["odsf"] == 100 and got["depth"] == {"rmse": 0, "delta1": 100}
    ranks = [scoring.measure(oracle, Scenes(), "cpu", 2, tasks, r, 2) for r in range(2)]
    for task in tasks:
        ranks[0][task].merge(ranks[1][task].state())
        same_numbers(got[task], ranks[0][task].compute())


def test_routing_tables_are_what_the_router_says():
    """Would catch: contexts shifted by one row, slots of one block added to another, cls left out, a
    mean of gates over blocks, router noise of training mode in the tables."""
    torch.manual_seed(0)
    student = prism.Prism(PLAINEST).train()
    for block in student.blocks:
        torch.nn.init.normal_(block.router.film.weight)
    got = scoring.routing(student, Scenes(), "cpu", 2, max_images=3)
    assert student.training and [b["block"] for b in got] == [0, 1, 2, 3]
    images = torch.stack([Scenes()[i]["image"] for i in range(3)])
    student.eval()
    gates = [[], [], [], []]
    for kind in ("teachers", "tasks"):
        for name in getattr(PLAINEST, kind):
            for b, route in enumerate(student.route(images, name)):
                picks = route.topk_idx.flatten().tolist()
                expected = [picks.count(e) / len(picks) for e in range(4)]
                assert got[b][kind][name] == pytest.approx(expected)
                gates[b] += route.gate.flatten().tolist()
    for b in range(4):
        assert got[b]["lambda"] == pytest.approx(sum(gates[b]) / len(gates[b]))
        table = np.array(list(got[b]["tasks"].values()))
        assert table.shape == (6, 4) and got[b]["nmi_tasks"] == pytest.approx(scoring.nmi(table))
    assert max(b["nmi_tasks"] for b in got) > 0.001


# ------------------------------------------------------------------------------------- analysis, cost


class FakeTeacher:
    """Gives maps that depend on the image alone; the student's own projections if it has a student."""

    provenance, width = {}, 8

    def __init__(self, seed, student=None, grid=4):
        torch.manual_seed(seed)
        self.mix, self.seed, self.student, self.grid = torch.randn(4, 8, 3), seed, student, grid

    def features(self, images):
        if self.student:
            ids = torch.full((len(images),), self.seed)
            return list(self.student.distill(images, ids).values())[self.seed]
        small = F.adaptive_avg_pool2d(images, self.grid)
        return [torch.einsum("cd, bdhw -> bchw", m, small) for m in self.mix]


def listening_student(**changes):
    """A student whose routers listen to the context and whose streams weigh alike."""
    torch.manual_seed(3)
    student = prism.Prism(replace(PLAINEST, gate_start=0.5, **changes)).eval()
    for block in student.blocks:
        torch.nn.init.normal_(block.router.film.weight, std=2)
        torch.nn.init.normal_(block.experts.w1, std=0.2)
    return student


def test_overlap_by_hand():
    """Would catch: union taken for 2 K, the mean over experts instead of tokens, experts counted as active
    in one context only, order within the top k."""
    picks = torch.tensor([[[0, 1], [2, 0], [1, 0]], [[1, 0], [0, 3], [3, 4]], [[3, 4]] * 3])
    active, coactive, jaccard = scoring.overlap(picks, 5)
    assert active.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert coactive[0].tolist() == pytest.approx([3 / 5, 2 / 5, 0])
    assert jaccard[0].tolist() == pytest.approx([1, (1 + 1 / 3 + 0) / 3, 0])
    assert jaccard[1, 2] == pytest.approx((0 + 1 / 3 + 1) / 3) and torch.equal(jaccard, jaccard.T)


def test_gradient_conflict_equals_autograd_by_hand():
    """Would catch: gradients of another block, expert or teacher, a batch that counts too much, projectors
    of the wrong teacher, norms or router among the shared weights, experts of one teacher only in I_l."""
    student, images = listening_student(), torch.rand(3, 3, 32, 32)
    members = {"toy-clip": FakeTeacher(0), "toy-sam": FakeTeacher(1)}
    picks = scoring.choose_experts(student, images, 2)
    blocks = scoring.analyse(student, members, images, picks, batch_size=2)
    losses = []
    for name, teacher in members.items():
        loss, targets = 0, teacher.features(images)
        for level, x in enumerate(student.features(images, name)):
            x = student.projectors[name][level](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for a, b in zip(x, targets[level], strict=True):
                cos = (a * b).sum() / a.norm() / b.norm()
                loss = loss + (0.9 * (1 - cos) + 0.1 * F.smooth_l1_loss(a, b)) / len(images)
        losses.append(loss)
    for b, block in enumerate(student.blocks):
        (numbers,) = blocks[b]["teachers"].values()
        both = set(picks[b, 0].flatten().tolist()) & set(picks[b, 1].flatten().tolist())
        jaccard = [len(p & q) / len(p | q) for p, q in zip(
            *([set(k) for k in picks[b, t].flatten(0, 1).tolist()] for t in range(2)), strict=True)]
        assert numbers["jaccard"] == pytest.approx(np.mean(jaccard)) and numbers["coactive"] == len(both) / 4

        def cosine(pattern, expert=slice(None), block=block):
            weights = [p for name, p in block.named_parameters() if re.match(pattern, name)]
            x, y = (torch.cat([g[expert].flatten() for g in torch.autograd.grad(
                loss, weights, retain_graph=True)]).double() for loss in losses)
            return (x @ y / x.norm() / y.norm()).item()

        assert numbers["cos_shared"] == pytest.approx(cosine(r"(attn|anchor|shared)\."), abs=1e-5)
        each = {e: c for e, c in enumerate(numbers["cos_each"]) if c is not None}
        assert each == pytest.approx({e: cosine(r"experts\.", e) for e in both}, abs=1e-5)
        assert numbers["cos_experts"] == pytest.approx(np.mean(list(each.values())), abs=1e-5)
        assert len(blocks[b]["tasks"]) == 15


def test_conflict_without_coactive_experts_is_zero():
    """Would catch: nan, or the cosine of experts that only one teacher uses."""
    got = scoring.conflict(torch.eye(2), torch.ones(2, 3, 4), torch.tensor([[1, 0, 0], [0, 1, 0]]).bool())
    assert got == {"cos_shared": 0, "cos_experts": 0, "cos_each": [None, None, None]}


def test_fidelity_of_a_perfect_student():
    """Would catch: a level or teacher compared with another, sums divided by batches instead of images,
    a cosine over channels where the whole map is meant."""
    student = listening_student()
    members = {name: FakeTeacher(i, student) for i, name in enumerate(PLAINEST.teachers)}
    perfect = scoring.fidelity(student, members, Scenes(), "cpu", 2)
    assert all(row == pytest.approx({"cos_image": 1, "cos_patch": 1, "smooth_l1": 0, "length": 1}, abs=1e-5)
               for rows in perfect.values() for row in rows)
    members = {"toy-clip": FakeTeacher(0)}
    row = scoring.fidelity(student, members, Scenes(), "cpu", 2)["toy-clip"][3]
    images, ids = torch.stack([Scenes()[i]["image"] for i in range(5)]), torch.zeros(5, dtype=int)
    x, y = student.distill(images, ids)["toy-clip"][3], FakeTeacher(0).features(images)[3]
    cosines = [(a * b).sum() / a.norm() / b.norm() for a, b in zip(x, y, strict=True)]
    assert row["cos_image"] == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-5)
    assert row["cos_patch"] == pytest.approx(F.cosine_similarity(x, y).mean().item(), abs=1e-5)
    assert row["smooth_l1"] == pytest.approx(F.smooth_l1_loss(x, y).item(), abs=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
@pytest.mark.parametrize("changes", [{}, {"expert_ratio": 1.0, "moe_blocks": (1, 2, 4, 5), "depth": 7},
                                     {"official": True, "top_k": 3, "tasks": {"semseg": 3}}])
def test_multiply_adds_equal_the_counter(changes, size):
    """Would catch: a prefix counted once per task, a first MoE block counted as context-dependent, heads or
    attention at the wrong grid, a forgotten linear layer."""
    cfg = replace(PLAINEST, **changes)
    for dense, model in ((False, prism.Prism(cfg)), (True, prism.build(replace(cfg, student="dense")))):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model.eval().predict(torch.rand(1, 3, *size))
        assert counter.get_total_flops() == 2 * sum(scoring.count_macs(cfg, size, dense).values())


def test_features_in_anothers_components():
    """Would catch: a student's map shown in components of its own, where any map looks as good."""
    base = torch.randn(6, 5, 7)
    same, share = teachers.pca_picture(base, base)
    alone, own_share = teachers.pca_picture(base)
    assert (same == alone).all() and share == own_share
    flat = teachers.pca_picture(0.01 * base + base.mean((1, 2), keepdim=True), base)[0]
    assert flat.reshape(-1, 3).std(0).max() < 5 < alone.reshape(-1, 3).std(0).min()


# --------------------------------------------------------------------------------------- command line


def run(capsys, monkeypatch, folder, **changes):
    """Run eval.py's main as the command line does: (exit code, stdout, stderr)."""
    monkeypatch.setattr(data, "open_data", lambda spec, split: Scenes())
    args = replace(scoring.Args(ckpt=folder / "prism.pt", batch_size=5), **changes)
    code = 0
    try:
        prism.exit_with_one_line(lambda: scoring.main(args), args.debug)
    except SystemExit as stop:
        code = 1
        print(stop.code, file=sys.stderr)
    return code, *capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    for name, cfg in (("prism.pt", PLAINEST), ("deconstruct.pt", replace(PLAINEST, tasks={}))):
        prism.write_checkpoint(tmp_path / name, {
            "model": prism.Prism(cfg).state_dict(), "config": asdict(cfg), "step": 3, "seed": 0,
            "provenance": {"data": "world"}})
    return tmp_path


def test_command_line_writes_results_and_pictures(folder, capsys, monkeypatch):
    """Would catch: numbers in results.json that differ from the table, a claimed protocol that did not
    run, nan in the JSON, pictures that are not pictures, temporary files left behind."""
    (folder / "reference.json").write_text('{"semseg": 50.0, "depth": 2.0}')
    unknown = dict.fromkeys(scoring.NormalError().compute(), math.nan)
    monkeypatch.setattr(scoring.NormalError, "compute", lambda self: unknown)
    code, out, err = run(capsys, monkeypatch, folder, reference=folder / "reference.json")
    assert code == 0 and err == ""
    files = {path.name for path in folder.iterdir()}
    assert files == {"prism.pt", "deconstruct.pt", "reference.json", "results.json", "routing.png",
                     "predictions.png"}
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert set(results["headline"]) == set(PLAINEST.tasks) and results["protocol"]["edge"] == "simple"
    assert results["headline"]["normals"] is None
    base, head = {"semseg": 50.0, "depth": 2.0}, results["headline"]
    by_hand = 50 * ((head["semseg"] - 50) / 50 - (head["depth"] - 2) / 2)
    assert results["delta_m"] == pytest.approx(by_hand) and results["reference"] == base
    assert f"Delta_m {by_hand:+.2f} %" in out and f"{head['depth']:.4f}" in out
    for name, width in (("predictions.png", 1700), ("routing.png", 600)):
        with scoring.Image.open(folder / name) as picture:
            assert picture.width >= width and len(picture.getcolors(1 << 20)) > 20


def test_chosen_protocol_runs_and_is_named(folder, capsys, monkeypatch):
    """Would catch: --protocol that reaches the boundaries but not maxF or the table, --exhaustive ignored,
    a reader of photographs scored by the rendered world's protocol."""
    readers = {kind: reader.boundary_protocol for kind, reader in data.READERS.items()}
    assert readers == {"world": "simple", "world-nyud": "simple", "pascal": "sak", "nyud": "sak"}
    monkeypatch.setattr(scoring.BoundaryF, "FEW", 0)
    count = scoring.BoundaryF.count
    for protocol, exhaustive, first_pass in (("sak", False, 6), ("invpt", True, 101)):
        changes = {"protocol": protocol, "exhaustive": exhaustive, "tasks": ("semseg", "sal", "edge")}
        passes = []
        monkeypatch.setattr(scoring.BoundaryF, "count",
                            lambda self, ks, passes=passes: passes.append(len(ks)) or count(self, ks))
        code, out, err = run(capsys, monkeypatch, folder, **changes)
        assert code == 0 and err == ""
        results = json.loads((folder / "results.json").read_text())
        assert results["protocol"] == {"semseg": "sak", "sal": protocol, "edge": protocol}
        rows = [line.split() for line in out.splitlines() if " odsf " in line or " maxf " in line]
        assert len(rows) == 2 and all(protocol in row for row in rows)
        assert passes[0] == first_pass
    made = [scoring.new_metric(task, Scenes(), name).protocol
            for task in ("sal", "edge") for name in (None, "sak", "invpt")]
    assert made == ["sak", "sak", "invpt", "simple", "sak", "invpt"]


def test_stage_1_checkpoint_gets_its_routing_and_says_so(folder, capsys, monkeypatch):
    """Would catch: a crash on a student without heads, or its files over those of one with heads."""
    (folder / "results.json").write_text("earlier")
    code, out, err = run(capsys, monkeypatch, folder, ckpt=folder / "deconstruct.pt")
    assert code == 0 and err == "" and out.count("has no task heads (stage 1)") == 1
    assert (folder / "results.json").read_text() == "earlier"
    blocks = json.loads((folder / "results_stage1.json").read_text())["routing"]
    assert all(set(b["teachers"]) == {"toy-clip", "toy-sam"} and b["tasks"] == {} for b in blocks)
    assert (folder / "routing_stage1.png").stat().st_size > 1000


def test_analysis_and_report_on_stage_1(folder, capsys, monkeypatch):
    """Would catch: tables that results.json lacks, pictures that are cut or blank, a student probed in the
    wrong context, a teacher whose grid is not the student's."""
    monkeypatch.setattr(teachers, "load_teacher", lambda *source: FakeTeacher(0, grid=5))
    for name in ("prism.pt", "deconstruct.pt"):
        content = prism.read_checkpoint(folder / name)
        toy = {"kind": "toy", "size": 64, "settings": "old"}
        content["provenance"]["teachers"] = {"toy-clip": toy, "toy-sam": toy | {"settings": None}}
        prism.write_checkpoint(folder / name, content)
    for name, suffix in (("prism.pt", ""), ("deconstruct.pt", "_stage1")):
        code, out, err = run(capsys, monkeypatch, folder, ckpt=folder / name, analysis=True)
        assert code == 0 and err == "" and "toy-clip was raised by other code: settings None here" in out
        results = json.loads((folder / f"results{suffix}.json").read_text())
        assert results["analysis"]["images"] == 5
        for block in results["analysis"]["blocks"]:
            assert len(block["tasks"]) == (0 if suffix else 15)
            (pair,) = block["teachers"].values()
            assert set(pair) == {"coactive", "jaccard", "cos_shared", "cos_experts", "cos_each"}
        contexts = 2 if suffix else 8
        sizes = {"experts": (125 + 4 * 454, 240 + 110 * contexts), "imitation": (1241, 76 + 138 * 8)}
        for picture in ("conflict", "experts", "imitation"):
            with scoring.Image.open(folder / f"{picture}{suffix}.png") as drawn:
                assert drawn.size == sizes.get(picture, drawn.size) and drawn.width >= 900
                assert len(drawn.convert("RGB").getcolors(1 << 20)) > 20
    assert list(results["probes"]) == ["untrained student", "student as toy-clip", "student as toy-sam",
                                       "toy-clip", "toy-sam"]
    assert [len(levels) for levels in results["imitation"].values()] == [4, 4]
    assert "linear probes: fitted to the first 5 images of train, scored on the first 5 of 5" in out


def test_teachers_that_cannot_be_loaded_are_left_out(folder, capsys, monkeypatch):
    """Would catch: an analysis that fails where only its gradients need the teachers."""
    code, out, _ = run(capsys, monkeypatch, folder, analysis=True)
    assert code == 0 and "left out: the checkpoint does not record what toy-clip is" in out
    pair = json.loads((folder / "results.json").read_text())["analysis"]["blocks"][0]["teachers"]
    assert set(pair["toy-clip + toy-sam"]) == {"coactive", "jaccard"}
    assert (folder / "experts.png").exists() and not (folder / "imitation.png").exists()


def fake_result(scores: dict, seed: int, routed: bool) -> dict:
    table = np.eye(4)[:3][:, np.random.default_rng(seed).permutation(4)]  # teachers x experts, shuffled
    teachers_ = dict(zip("abc", table.tolist(), strict=True))
    pairs = {"a + b": {"cos_shared": 0.1 * seed, **({"cos_experts": 0.5} if routed else {})}}
    block = {"block": 1, "teachers": teachers_, "tasks": {}, "lambda": 0.5, "nmi_teachers": 1, "nmi_tasks": 0}
    return {"headline": scores, "train_s": 60 * (seed + 1), "routing": [block] if routed else [],
            "analysis": {"blocks": [{"block": 1, "teachers": pairs, "tasks": {}}]}}


def test_contest_report_by_hand():
    """Catches Delta_m over another seed's base, signs of errors, intervals that are not paired, experts of
    two seeds compared by their numbers."""
    base = {"semseg": [20, 10, 10], "depth": [2, 1, 1]}
    ours, theirs = {"semseg": [22, 12, 11], "depth": [1, 1, 1]}, {"semseg": [23, 14, 14], "depth": [2, 1, 1]}
    found = {}
    for seed in range(3):
        for name, rows, routed in (("prism", ours, True), ("dense", theirs, False)):
            scores = {task: values[seed] for task, values in rows.items()}
            found[name, seed] = fake_result(scores, seed, routed)
        for task, values in base.items():
            found[f"only-{task}", seed] = {"headline": {task: values[seed]}}
    report = scoring.contest_report(found, ["prism", "dense"], ["semseg", "depth"], 3)
    assert report["scores"]["prism"]["delta_m"] == pytest.approx([30, 10, 5])
    assert report["scores"]["dense"]["delta_m"] == pytest.approx([7.5, 20, 20])
    mean, half = report["paired"]["dense"]["semseg"]  # differences 1, 2, 3
    assert (mean, half) == pytest.approx((2, 4.302653 / math.sqrt(3)), rel=1e-5)
    assert report["paired"]["dense"]["depth"][0] == pytest.approx(-1 / 3)  # a larger error is worse
    assert report["conflict"]["dense"] == {"cos_shared": pytest.approx([0, 0.1, 0.2])}
    assert report["conflict"]["prism"]["cos_experts"] == [0.5] * 3
    assert report["minutes"]["prism"] == [1, 2, 3] and "dense" not in report["routing"]
    assert report["routing"]["prism"]["alike"] == pytest.approx([0.75] * 3)  # the fourth expert is empty
    assert max(report["routing"]["prism"]["shifted"]) == pytest.approx(0.75)
    report["cost"] = {name: {"parameters": 1, "active": 1, "gmac": 1, "ms": 1} for name in ("prism", "dense")}
    text = scoring.contest_text(report)
    assert "| prism | 15.00 ± 6.08 | 1.000 ± 0.000 | 15.00 ± 13.23 |" in text and "+2.00 ± 2.48" in text


def test_contest_runs_restarts_and_names_what_failed(folder, tmp_path, capsys, monkeypatch):
    """Catches a run that is repeated although it is done, one that hides why it failed, a folder whose runs
    had other flags."""
    asked = []

    def fake_run(command, env, stdout, stderr):
        script, flags = Path(command[1]).name, list(map(str, command[2:]))
        asked.append((script, flags, env.get("OMP_NUM_THREADS")))
        if script == "train.py":
            out = Path(flags[flags.index("--out-dir") + 1])
            shutil.copy(folder / "prism.pt", out)
            rows = [{"stage": stage, "step": step, "ms": ms} for stage, step, ms in (
                ("deconstruct", 20, 100), ("deconstruct", 30, 200), ("recompose", 10, 300))]
            (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif "only-sal-1" in flags[1]:
            print("ValueError: no luck", file=stdout, flush=True)
            return SimpleNamespace(returncode=1)
        else:
            scores = fake_result({task: 5.0 for task in TASKS}, 0, True)
            (Path(flags[1]).parent / "results.json").write_text(json.dumps(scores))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scoring.subprocess, "run", fake_run)
    monkeypatch.setattr(scoring.teachers, "Teachers", lambda names: None)
    monkeypatch.setattr(scoring.training, "open_train", lambda *_: SimpleNamespace(tasks=TASKS))
    args = scoring.Args(contest=("prism", "lite"), seeds=2, out_dir=tmp_path, train_args="--steps 7")
    with pytest.raises(OSError, match="eval.py of only-sal-1 failed: ValueError: no luck"):
        scoring.main(args)
    scripts = [flags for script, flags, _ in asked if script == "train.py"]
    assert ["--steps", "7", "--expert-ratio", "1", "--seed", "1", "--out-dir", str(tmp_path / "lite-1")
            ] in scripts and {threads for *_, threads in asked} == {"1"}
    done = len(list(tmp_path.glob("*/results.json")))
    asked.clear()
    fake_result_of_sal = fake_result({task: 5.0 for task in TASKS}, 0, True)
    (tmp_path / "only-sal-1").mkdir(exist_ok=True)
    (tmp_path / "only-sal-1" / "results.json").write_text(json.dumps(fake_result_of_sal))
    scoring.main(args)
    assert len(asked) == 2 * (2 * 8 - done - 1), "finished runs are not repeated"
    report = json.loads((tmp_path / "contest.json").read_text())
    assert report["minutes"]["lite"] == [pytest.approx((20 * 0.1 + 10 * 0.2 + 10 * 0.3) / 60)] * 2
    assert report["cost"]["prism"]["gmac"] > 0 and "| lite |" in (tmp_path / "contest.md").read_text()
    with Image.open(tmp_path / "contest.png") as picture:
        colours = {colour for _, colour in picture.getcolors(2**16)}
        assert picture.size == (130 + 190 * 7, 90 + 30 * 2) and (70, 110, 180) in colours
    with pytest.raises(OSError, match="holds a run with other flags .*--steps 7"):
        scoring.main(replace(args, train_args="--steps 8"))
    with pytest.raises(ValueError, match="unknown contestant zebra"):
        scoring.main(replace(args, contest=("zebra",)))


def test_cost_beside_a_dense_vit(folder, capsys, monkeypatch):
    """Would catch: projectors among the parameters, a stage 1 without heads to count, sides the patch does
    not divide, files of the scores overwritten."""
    for name in ("prism.pt", "deconstruct.pt"):
        code, out, err = run(capsys, monkeypatch, folder, ckpt=folder / name, cost=True, image_size=(32, 48))
        assert code == 0 and err == "" and "32 x 48 pixels" in out and "this machine's CPU" in out
        assert f"{6 if name == 'prism.pt' else 5} tasks: semseg human_parts normals edge sal" in out
    ours = json.loads((folder / "cost.json").read_text())["cost"]["PRISM"]
    cfg = replace(PLAINEST, tasks={"semseg": 21, "human_parts": 7, "normals": 3, "edge": 1, "sal": 2})
    assert ours["GMAC, total"] == pytest.approx(sum(scoring.count_macs(cfg, (32, 48)).values()) / 1e9)
    alone = sum(p.numel() for name, p in prism.Prism(cfg).named_parameters() if "projectors" not in name)
    assert ours["parameters, M"] == pytest.approx(alone / 1e6)
    assert not (folder / "results.json").exists()
    code, _, err = run(capsys, monkeypatch, folder, cost=True, size="small", image_size=(500,))
    assert code == 1 and "image size 500 x 500 is not a multiple of the patch size 16" in err


def test_user_errors_are_one_line_and_leave_files_alone(folder, capsys, monkeypatch):
    """Would catch: a traceback for a typing error, and results of an earlier run that a failed one
    overwrote in part."""
    for name in ("results.json", "predictions.png", "routing.png", "plain_file"):
        (folder / name).write_text("earlier")
    (folder / "broken.json").write_text("{]")
    (folder / "sal.json").write_text('{"sal": 80}')
    cases = {
        "does not exist": {"ckpt": folder / "none.pt"},
        "cannot score colour; .* semseg, human_parts": {"tasks": ("colour",)},
        r"cannot score semseg; .*\(stage 1\)": {"ckpt": folder / "deconstruct.pt", "tasks": ("semseg",)},
        "device .tpux. is not known": {"device": "tpux"},
        "--batch-size 0 is not in 1": {"batch_size": 0},
        "analysis-images 0": {"analysis_images": 0},
        "cannot write to .*plain_file.* choose another": {"out_dir": folder / "plain_file" / "out"},
        "is not an object of task: number": {"reference": folder / "broken.json"},
        "No such file": {"reference": folder / "none.json"},
        "reference is for .'sal'.": {"reference": folder / "sal.json", "tasks": ("semseg",)},
    }
    for message, changes in cases.items():
        code, out, err = run(capsys, monkeypatch, folder, **changes)
        assert code == 1 and err.count("\n") == 1, (message, err)
        assert re.search(message, err), (message, err)
    monkeypatch.setattr(scoring, "draw_predictions", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    code, _, err = run(capsys, monkeypatch, folder)
    assert (code, err) == (1, "OSError: disk full\n")
    for name in ("results.json", "predictions.png", "routing.png"):
        assert (folder / name).read_text() == "earlier"
    with pytest.raises(FileNotFoundError):
        scoring.main(scoring.Args(ckpt=folder / "none.pt", debug=True))


def test_other_classes_than_in_training_are_named(folder):
    """Would catch: an index error deep in a metric when the data have other classes."""
    dataset = SimpleNamespace(tasks={"semseg": 21, "sal": 2})
    assert scoring.choose_tasks((), {"semseg": 21, "depth": 1}, dataset) == ["semseg"]
    with pytest.raises(ValueError, match="semseg has 12 channels, the data 21"):
        scoring.choose_tasks((), {"semseg": 12}, dataset)


# ------------------------------------------------------------------ photos of anyone, files of predictions


class Copycat(torch.nn.Module):
    """Predicts depth = 1 + red and, by class 2, where green is bright; notes the sizes it was shown."""

    cfg = replace(PLAINEST, tasks={"semseg": 3, "depth": 1})

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.seen = []

    def predict(self, images, tasks):
        self.seen.append(tuple(images.shape[-2:]))
        red, green, _ = images[:, :, None].unbind(1)
        zero = torch.zeros_like(red)
        return {"semseg": torch.cat([zero, zero - 1, green - 0.5], 1), "depth": 1 + red}


@pytest.mark.parametrize("size", [(150, 37), (64, 200), (480, 640), (29, 30), (7, 5), (1, 90), (1, 1)])
def test_predictions_lie_on_the_photo(size):
    """Would catch: padding cut on the wrong side or not at all, a photo squeezed into a square, sides
    that are no whole patches, x and y swapped, a map half a patch off, small photos enlarged."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    waves = np.stack([np.sin(2 + 9 * x / size[1]) + np.cos(7 * y / size[0]),
                      np.cos(5 * x / size[1]) + np.sin(8 * y / size[0]), 0 * x], -1)
    image = (127.5 + 60 * waves).astype(np.uint8)
    shown, model = tuple(max(1, round(320 / max(size) * n)) for n in size), Copycat()
    maps, seen = scoring.solve_photo(model, image, list(model.cfg.tasks), 32, shown)
    assert min(seen) == min(32, *size) and abs(seen[0] * size[1] - seen[1] * size[0]) <= max(size)
    assert model.seen == [tuple(8 * max(4, math.ceil(n / 8)) for n in seen)]
    assert maps["depth"].shape == maps["semseg"].shape == shown
    truth = np.asarray(Image.fromarray(image).resize(shown[::-1], Image.Resampling.BILINEAR)) / 255
    assert abs(maps["depth"] - 1 - truth[..., 0]).mean() < 0.004  # one pixel off: 0.006 or more
    assert ((maps["semseg"] == 2) == (truth[..., 1] > 0.5)).mean() > 0.97


def test_photo_gets_what_scoring_shows(folder):
    """Would catch: another padding, fill, scale or final map than the metrics see, so that pictures
    and numbers are not of the same student."""
    model, tasks, truth = prism.load(folder / "prism.pt"), list(PLAINEST.tasks), Scenes().read(3)
    maps, seen = scoring.solve_photo(model, truth["image"], tasks, 32, (29, 30))
    assert seen == [29, 30]
    expected = scoring.predict_maps(model, Scenes()[3]["image"][None], tasks)
    for task in tasks:
        np.testing.assert_allclose(maps[task], scoring.unpad(expected[task][0], (29, 30)), atol=1e-5)


def test_panels_of_a_folder(folder, capsys, monkeypatch):
    """Would catch: EXIF ignored, 16-bit gray shown white, panels that overwrite each other or are taken
    for photos the next time, one broken photo that ends the run or goes unnoticed, clipped keys."""
    root, turned = folder / "photos", Image.Exif()
    (root / "below").mkdir(parents=True)
    turned[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 40 * 64).reshape(40, 64).astype(np.uint16))
    kinds = {"a.png": photo(1, (150, 37)), "a.jpg": photo(2, (64, 200)).convert("CMYK"),
             "below/a.png": deep, "rgba.png": photo(3).convert("RGBA"), "dot.png": photo(4, (1, 1))}
    for name, picture in kinds.items():
        picture.save(root / name)
    photo(5, (60, 30)).save(root / "side.jpg", exif=turned)
    (root / "broken.jpg").write_bytes(b"nonsense")
    for _ in range(2):
        code, out, err = run(capsys, monkeypatch, folder, image=(root, folder / "none.jpg"), out_dir=root)
        assert code == 1 and err.count("\n") == 1 and "ValueError: 2 of 8 photos cannot be read" in err
        assert "broken.jpg cannot be decoded" in err and "none.jpg does not exist" in err
        assert "side.jpg, seen at 30 x 60 pixels" in out and "a.png, seen at 130 x 32 pixels" in out
        assert "photos: 8/8" in out
    panels = {path.name for path in root.glob("*_tasks.png")}
    assert panels == {f"{stem}_tasks.png" for stem in ("a", "a-2", "a-3", "rgba", "dot", "side")}
    widths = {name: Image.open(root / f"{name}_tasks.png").size[0] for name in ("a", "a-2", "a-3", "side")}
    assert widths == {"a": 1442, "a-2": 1350, "a-3": 1350, "side": 1442}  # 8 cells upright, 4 lying
    drawn = np.asarray(Image.open(root / "a-3_tasks.png"))[52:252, 14:334, 0].astype(int)
    assert drawn[0].mean() < 5 < 120 < drawn[100].mean() < 135 and drawn[-1].mean() > 250
    for path in root.glob("*_tasks.png"):
        margin = np.asarray(Image.open(path))
        assert (margin[:, -8:] == 255).all() and (margin[-8:] == 255).all(), path


def test_keys_name_what_occurs():
    """Would catch: a legend of all 40 classes, of none, or with the names of another data set."""
    named = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "draw_legend", lambda task, names, width: named.append(names))
        for channels in (40, 21, 12, 13):
            scoring.draw_key("semseg", np.array([[7, 7, 2]]), channels, 500)
    assert named == [{7: "door", 2: "cabinet"}, {7: "car", 2: "bicycle"}, {7: "table", 2: "person"},
                     {7: "7", 2: "2"}]


def headlines(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


def test_files_of_predictions_score_as_the_model_does(folder, capsys, monkeypatch):
    """Would catch: padding in the files, files of another image, a metric of its own for files, class
    ids scaled, normals in another axis order, all images one batch's."""
    found = folder / "found"
    code, _, err = run(capsys, monkeypatch, folder, save_predictions=found, batch_size=2)
    assert code == 0 and err == "" and json.loads((found / "meta.json").read_text())["images"] == 5
    assert sorted(path.name for path in (found / "depth").iterdir()) == [f"{i}.npy" for i in range(5)]
    direct = headlines(folder)
    monkeypatch.setattr(prism, "load", pytest.fail)
    code, out, err = run(capsys, monkeypatch, folder, predictions=found, data="any", ckpt=Path("none"))
    assert code == 0 and err == "" and "MoE" not in out
    files = headlines(found)
    assert files["semseg"] == direct["semseg"] and files["human_parts"] == direct["human_parts"]
    for task, slack in {"depth": 1e-9, "normals": 1e-5, "sal": 0.5, "edge": 0.5}.items():
        for key in set(direct[task]) - {"counts", "threshold"}:  # 8 bits move p across a threshold
            assert files[task][key] == pytest.approx(direct[task][key], abs=slack), (task, key)
    for path in (found / "normals").iterdir():  # a peer's 8 bits
        coded = np.round(127.5 * (np.load(path) + 1)).astype(np.uint8)
        Image.fromarray(coded).save(path.with_suffix(".png"))
        path.unlink()
    for path in (found / "depth").iterdir():
        savemat(path.with_suffix(".mat"), {"depth": np.load(path)})
        path.unlink()
    code, *_ = run(capsys, monkeypatch, folder, predictions=found, data="any", tasks=("normals", "depth"))
    files = headlines(found)
    assert code == 0 and files["depth"]["rmse"] == pytest.approx(direct["depth"]["rmse"], abs=1e-9)
    assert 0 < abs(files["normals"]["mean"] - direct["normals"]["mean"]) < 0.1


def score_as_rank(rank, where, folder, world, out, batch_size):
    """Be one of several processes that score: leaves in `out` what it printed, images scored, files."""
    be_rank(rank, where)
    score_noted(folder, world, out, batch_size, out / f"rank{rank}")


def score_noted(folder, world, out, batch_size, note):
    """Run eval.py's main; note what it printed, which images it scored, which files it wrote."""
    read, write, measure = data.Samples.__getitem__, scoring.write_files, scoring.measure
    seen, scored, wrote = [], [], []

    def counted(*args, **options):
        seen.clear()
        found = measure(*args, **options)
        scored.extend(seen)
        return found

    with pytest.MonkeyPatch.context() as patch, open(f"{note}.txt", "w") as said:
        patch.setattr(data.Samples, "__getitem__", lambda self, i: seen.append(i) or read(self, i))
        patch.setattr(scoring, "measure", counted)
        patch.setattr(scoring, "write_files", lambda where, files: (
            wrote.extend(str((where / name).relative_to(out)) for name in files), write(where, files)))
        patch.setattr(sys, "stdout", said)
        scoring.main(scoring.Args(ckpt=folder / "world.pt", data=f"world:{world}", out_dir=out,
                                  device="cpu", batch_size=batch_size, save_predictions=out / "found"))
    Path(f"{note}.json").write_text(json.dumps({"scored": scored, "wrote": wrote}))


@pytest.mark.parametrize("batch_size, shares", [(2, [[0, 1, 4], [2, 3]]), (8, [[0, 1, 2, 3, 4], []])])
def test_two_processes_score_as_one(batch_size, shares, tmp_path):
    """Would catch: an image scored twice to make shares equal, or by nobody; a share that is not merged; a
    process without images that fails or leaves the other waiting; files written or results printed twice;
    batches cut otherwise than by one process, which changes how predictions are rounded; TF32 in scores."""
    world = data.render_world(tmp_path / "world", size=32, train=1, val=5, probe=1)
    content = {"model": student().state_dict(), "config": asdict(TINY), "provenance": {}}
    prism.write_checkpoint(tmp_path / "world.pt", content)
    one, two = (tmp_path / name for name in ("one", "two"))
    for out in (one, two):
        out.mkdir()
    torch.set_float32_matmul_precision("highest")
    score_noted(tmp_path, world, one, batch_size, one / "rank0")
    assert torch.get_float32_matmul_precision() == "highest"
    run_two(score_as_rank, tmp_path, world, two, batch_size)
    alone, *ranks = (json.loads(path.read_text()) for path in (
        one / "rank0.json", two / "rank0.json", two / "rank1.json"))
    assert alone["scored"] == [0, 1, 2, 3, 4] and [rank["scored"] for rank in ranks] == shares
    assert sorted(ranks[0]["wrote"] + ranks[1]["wrote"]) == sorted(alone["wrote"])
    assert (two / "rank1.txt").read_text() == "" and "delta1" in (two / "rank0.txt").read_text()
    for path in (one / "found").rglob("*.*"):
        assert path.read_bytes() == (two / "found" / path.relative_to(one / "found")).read_bytes()
    found = [json.loads((out / "results.json").read_text()) for out in (one, two)]
    assert found[0]["images"] == 5 and found[0]["routing"] == found[1]["routing"]
    for task, numbers in found[0]["metrics"].items():
        same_numbers(numbers, found[1]["metrics"][task])


def test_only_scoring_is_shared_out(folder, capsys, monkeypatch):
    """Would catch: a benchmark, a contest or pictures made once per process, a refusal printed by each."""
    for rank in "01":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        for changes in ({"cost": True}, {"contest": ()}, {"image": (folder,)}, {"predictions": folder}):
            code, out, err = run(capsys, monkeypatch, folder, **changes)
            assert out == "" and (code, err.count("\n")) == ((1, 1) if rank == "0" else (0, 0))
            assert rank == "1" or f"--{next(iter(changes))} in 2 processes" in err


def test_files_of_the_truth_score_perfect(tmp_path):
    """Would catch: files scored against the training label `edge`, classes of another image, probability
    not cut to floor(255 p), a task without people counted as wrong."""
    tasks = list(PLAINEST.tasks)
    scoring.evaluate(Oracle(), Scenes(), "cpu", 2, tasks, save=tmp_path)
    got = scoring.evaluate_files(tmp_path, Scenes(), tasks)
    assert got["semseg"]["miou"] == got["edge"]["odsf"] == 100 and got["depth"]["rmse"] == 0
    assert got["human_parts"]["per_class"] == [100, 100, 100, 0, 0, 0, 0]
    assert got["sal"]["maxf"] == pytest.approx(100, abs=1e-5) and got["normals"]["mean"] < 1e-4
    p = 1 / (1 + math.exp(-4.5))
    coded = np.asarray(Image.open(tmp_path / "edge/1.png"))
    assert set(np.unique(coded)) == {math.floor(255 * p), math.floor(255 * (1 - p))}


def test_files_of_predictions_are_checked(folder, capsys, monkeypatch):
    """Would catch: a part of the split scored as the whole, predictions at another size resized or
    broadcast in silence, 255 or 16 bits taken for class ids, two files for one image."""
    found = folder / "found"
    run(capsys, monkeypatch, folder, save_predictions=found)

    def save(name, array):
        return lambda: (np.save(found / name, array) if name.endswith("npy") else
                        Image.fromarray(array).save(found / name))

    byte, nan = np.zeros((29, 30), np.uint8), np.full((29, 30), np.nan, np.float32)
    cases = [
        ((found / "edge/3.png").unlink, r"edge/3.png is missing, 1 of 5 in all; predict every image"),
        (save("edge/3.png", np.zeros((32, 32), np.uint8)), r"holds uint8 \(32, 32\), .* \(29, 30\)"),
        (save("edge/3.png", byte), None),
        (save("semseg/0.png", byte + 3), r"semseg/0.png holds 3 .. 3, not 0 .. 2"),
        (save("semseg/0.png", byte.astype(np.uint16)), "write 8-bit class ids"),
        (save("semseg/0.png", byte), None),
        (save("depth/1.npy", nan), "depth/1.npy has values that are not finite"),
        (save("depth/1.npy", byte), "depth/1.npy holds uint8"),
        (save("depth/1.npy", np.ones_like(nan)), None),
        (save("normals/2.png", np.stack([byte] * 3, -1)), "2.npy and 2.png predict the same"),
        (lambda: (found / "normals/2.npy").write_bytes(b"no"), "2.npy and 2.png"),
        ((found / "normals/2.png").unlink, "normals/2.npy cannot be decoded"),
    ]
    for change, message in cases:
        change()
        code, _, err = run(capsys, monkeypatch, folder, predictions=found, data="any")
        assert (code, err.count("\n")) == ((1, 1) if message else (0, 0)), err
        assert re.search(message or "", err), err
    for changes, message in (
            ({"predictions": found}, "name the data with --data"),
            ({"predictions": folder, "data": "any"}, "has folders for no task; the data can score semseg"),
            ({"predictions": found, "data": "any", "tasks": ("colour",)}, "has folders for semseg, "),
            ({"predictions": found, "image": (found,)}, "give one"),
            ({"image": (found / "depth",)}, "holds no images"),
            ({"image": (found,), "ckpt": folder / "deconstruct.pt"}, "cannot draw 0 tasks"),
            ({"image": (found,), "photo_side": 0}, "--photo-side 1 or more"),
            ({"save_predictions": folder / "prism.pt"}, "cannot write to .*; free space or choose another"),
            ({"save_predictions": folder / "full"}, "cannot write to .*full/normals: .*No space left")):
        with monkeypatch.context() as patch:
            patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            code, _, err = run(capsys, monkeypatch, folder, **changes)
        assert code == 1 and err.count("\n") == 1 and re.search(message, err), (message, err)
    assert [path.name for path in (folder / "full").rglob("*") if path.name.startswith(".")] == []


# ------------------------------------------------------------------------------------- untrusted input


class Hang(BaseException):
    """No kind of error that a reader may catch."""


def ring(*_):
    raise Hang("still reading after 20 s")


def outcome(read, names: list[str], before, equal) -> str:
    """Read a damaged file: "refused" in one line that names it (or what lists it), "unchanged",
    "legal" where it is another value than before. Anything else is raised."""
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        after = read()
    except (ValueError, OSError) as error:
        assert any(name in str(error) for name in names), f"names no file: {error!r}"
        assert str(error).isprintable(), f"more than one line: {error!r}"
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "unchanged" if equal(after, before) else "legal"


def damaged(content: bytes, rng: np.random.Generator) -> dict[str, bytes]:
    """Break a file in every way that needs no knowledge of its format: {what was done: content}."""
    size, at = len(content), int(rng.integers(len(content)))
    flipped, noisy, huge = bytearray(content), bytearray(content), bytearray(content)
    for bit in rng.integers(0, 8 * size, rng.integers(1, 5)).tolist():
        flipped[bit // 8] ^= 1 << bit % 8
    noisy[at : at + 16] = rng.bytes(min(16, size - at))
    place = int(rng.integers(min(size, 200)))
    huge[place : place + 4] = (b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff")[int(rng.integers(2))]
    late = bytearray(content)
    late[size // 2 + at // 2] ^= 1 << int(rng.integers(8))
    return {"cut": content[:at], "flipped": bytes(flipped), "noisy": bytes(noisy), "huge": bytes(huge),
            "late": bytes(late), "longer": content + rng.bytes(20), "empty": b"", "zeros": bytes(size),
            "noise": rng.bytes(size), "foreign": FOREIGN[int(rng.integers(len(FOREIGN)))]}


class Fuzz:
    """Damage files one at a time, count how reading them ends, and keep what should not have happened."""

    def __init__(self, seed: int):
        self.rng, self.counts, self.bugs = np.random.default_rng(seed), {}, []

    def file(self, path: Path, read, equal, cases: int = 10, crafted: dict | None = None, most: str = "legal",
             listed: str = ""):
        """Try `cases` general ways to break the file at `path`, all `crafted` ones, a folder and a link.

        most: the worst outcome allowed, "unchanged" where a checksum covers the content.
        """
        whole, before = path.read_bytes(), read()
        ways = damaged(whole, self.rng)
        chosen = self.rng.permutation(list(ways))[:cases]
        ways = {way: ways[way] for way in chosen} | (crafted or {}) | {"folder": None, "link": None}
        for way, content in ways.items():
            path.unlink(missing_ok=True)
            if way == "folder":
                path.mkdir()
            elif way == "link":
                path.symlink_to("nowhere")
            else:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            try:
                ended = outcome(read, [str(path), listed or str(path)], before, equal)
                if ended == "legal" and most != "legal":
                    ended = "wrong without a word"
            except (Exception, Hang) as error:
                ended = f"{type(error).__name__}: {error}"
            kind = path.suffix[1:]
            if ended in ("refused", "unchanged", "legal"):
                self.count(kind, ended)
            else:
                self.count(kind, "bug")
                self.bugs.append(f"{path.name}, {way}: {ended}")
            path.rmdir() if way == "folder" else path.unlink()
        path.write_bytes(whole)

    def count(self, kind: str, ended: str):
        row = self.counts.setdefault(kind, dict.fromkeys(("refused", "unchanged", "legal", "bug"), 0))
        row[ended] += 1

    def report(self, family: str):
        """Print the counts (pytest -s shows them) and fail if there was a bug."""
        for kind, row in self.counts.items():
            print(f"\nfuzz {family:12} .{kind:12} {sum(row.values()):4} cases: "
                  + ", ".join(f"{count} {ended}" for ended, count in row.items()), end="")
        assert not self.bugs, "\n".join(self.bugs)


def bytes_of(**options) -> bytes:
    """Encode a small picture."""
    file = BytesIO()
    photo(3).save(file, **options)
    return file.getvalue()


FOREIGN = [bytes_of(format="png"), bytes_of(format="jpeg"), bytes_of(format="eps"), bytes_of(format="ppm"),
           bytes_of(format="tiff"), b"PK\3\4" + bytes(100), b"{}", b"\x93NUMPY\1\0" + bytes(60)]


def legal_sample(sample: dict, classes: int) -> bool:
    """Tell whether a sample of `read` keeps what data.py's docstring promises."""
    shape = sample["image"].shape[:2]
    ranges = {"semseg": (np.uint8, 0, 255), "human_parts": (np.uint8, 0, 6), "edge": (np.uint8, 0, 1),
              "normals": (np.float32, -1.01, 1.01), "sal": (np.uint8, 0, 1), "depth": (np.float32, 0, 254),
              "labelmap": (np.int32, 0, 65535), "image": (np.uint8, 0, 255)}
    ids = sample["semseg"][sample["semseg"] != 255]
    return (ids < classes).all() and all(
        sample[key].dtype == kind and sample[key].shape[:2] == shape and sample[key].min() >= low
        and sample[key].max() <= high for key, (kind, low, high) in ranges.items() if key in sample)


def same_sample(after: dict, before: dict) -> bool:
    assert legal_sample(after, 40), "values that are not legal"
    assert after.keys() == before.keys(), "other keys"
    return same_arrays(after, {key: value for key, value in before.items() if isinstance(value, np.ndarray)})


def mat_element(kind: int, body: bytes) -> bytes:
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def mat_matrix(kind: int, dims: tuple, data: bytes, name: bytes = b"") -> bytes:
    head = mat_element(6, struct.pack("<II", kind, 0)) + mat_element(5, struct.pack(f"<{len(dims)}i", *dims))
    return mat_element(14, head + mat_element(1, name) + data)


def mat_file(body: bytes, packed: bool = False) -> bytes:
    body = mat_element(15, zlib.compress(body)).rstrip(b"\0") if packed else body
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + body


def mat_saved(**variables) -> bytes:
    file = BytesIO()
    savemat(file, variables)
    return file.getvalue()


@functools.cache
def crafted_mats(field: str, shape: tuple[int, int]) -> dict[str, bytes]:
    """.mat files that are made to break a reader: scipy alone takes 8 GB, hangs, or ends the process."""
    name, cell, heads = field.encode(), np.full(shape, "x", object), []
    inner, size = mat_matrix(9, (1, 1), mat_element(9, bytes(8))), 0
    for level in range(20_000):
        head = mat_matrix(1, (1, 1), b"", name if level == 19_999 else b"")[8:]
        size += len(head)
        heads.append(struct.pack("<II", 14, size + len(inner)) + head)
        size += 8
    nested = b"".join(reversed(heads)) + inner
    wide = struct.pack("<i", 8)
    return {
        "cells": mat_file(mat_matrix(1, (2**15, 2**15), b"", name)),
        "structs": mat_file(mat_matrix(2, (2**15, 2**15), mat_element(5, wide) + mat_element(1, b"a"), name)),
        "characters": mat_file(mat_matrix(4, (2**15, 2**15), mat_element(16, b""), name)),
        "empty cells": mat_file(mat_matrix(1, (2**20, 1), mat_element(14, b"") * 2**20, name), packed=True),
        "cells of cells": mat_file(mat_matrix(1, (40, 1), 40 * mat_matrix(
            1, (5000, 1), mat_element(14, b"") * 5000), name), packed=True),
        "below zero": mat_file(mat_matrix(9, (-5, -5), mat_element(9, bytes(8)), name)),
        "nested": mat_file(nested), "nested, packed": mat_file(nested, packed=True),
        "cell": mat_saved(**{field: cell}), "text": mat_saved(**{field: "x" * 9}),
        "sparse": mat_saved(**{field: sparse.csc_matrix(np.ones(shape))}),
        "complex": mat_saved(**{field: np.ones(shape) * 1j}),
        "infinite": mat_saved(**{field: np.full(shape, np.inf)}),
        "fractions": mat_saved(**{field: np.full(shape, 300.5)}), "other": mat_saved(other=np.ones(shape)),
        "version 4": struct.pack("<5i", 0, *shape, 0, 9) + b"LabelMap\0" + bytes(8 * shape[0] * shape[1]),
        "version 7.3": b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\x89HDF\r\n\x1a\n",
    }


def crafted_npys(shape: tuple, dtype=np.float32) -> dict[str, bytes]:
    """.npy files that claim gigabytes, or hold something else than numbers."""
    def save(array):
        file = BytesIO()
        np.save(file, array)
        return file.getvalue()

    claim = str({"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}).encode().ljust(117) + b"\n"
    made = {"text": np.full(shape, "x"), "dates": np.zeros(shape, "M8[s]"), "complex": np.zeros(shape, "c8"),
            "records": np.zeros(shape, "f4,i4"), "objects": np.full(shape, None),
            "nan": np.full(shape, np.nan, dtype), "infinite": np.full(shape, np.inf, dtype),
            "below zero": np.full(shape, -3.0, dtype), "large": np.full(shape, 200.0, dtype),
            "a number": np.float32(3),
            "flat": np.ones(np.prod(shape))}
    zipped = BytesIO()
    np.savez(zipped, a=np.ones(shape, dtype))
    return {name: save(array) for name, array in made.items()} | {"zip": zipped.getvalue(),
            "claim": b"\x93NUMPY\1\0" + struct.pack("<H", len(claim)) + claim + bytes(100)}


@functools.cache
def crafted_pictures() -> dict[str, bytes]:
    """Pictures of every format that claim many pixels, or hold floats and 16 bits where 8 are read."""
    def claim(kind: str, form: str, *places: int | bytes) -> bytes:
        content = bytearray(bytes_of(format=kind))
        for place in places:
            at = place if isinstance(place, int) else content.index(place) + len(place)
            content[at : at + struct.calcsize(form)] = struct.pack(form, *[60_000] * form.count("H"))
        return bytes(content)

    floats, deep = BytesIO(), BytesIO()
    Image.fromarray(np.full((37, 51), np.nan, np.float32)).save(floats, "tiff")
    Image.fromarray(np.full((37, 51), 40_000, np.uint16)).save(deep, "png")
    return {"floats": floats.getvalue(), "16 bits": deep.getvalue(), "png": png_header(40_000, 40_000),
            "large png": png_header(10_000, 10_000), "jpeg": claim("jpeg", ">HH", b"\xff\xc0\0\x11\x08"),
            "gif": claim("gif", "<HH", 6), "bmp": claim("bmp", "<HxxHxx", 18),
            "tiff": claim("tiff", "<H", b"\0\1\4\0\1\0\0\0", b"\1\1\4\0\1\0\0\0")}


def crafted_for(path: Path, field: str, shape: tuple) -> dict[str, bytes]:
    """Files made to break the reader of this ending."""
    return {".mat": crafted_mats, ".npy": crafted_npys}.get(path.suffix, crafted_pictures)(
        *{".mat": (field, shape), ".npy": (shape,)}.get(path.suffix, ()))


def test_damaged_labels(pascal, small_world, tmp_path):
    """A damaged label or photo that hangs, exhausts memory, ends the process, raises what no command line
    catches, or is trained on though PNGs and packed .mat files have checksums."""
    fuzz, name = Fuzz(0), "2008_000002"
    shutil.copy(pascal / f"semseg/pascal-context/{name}.png", pascal / "semseg/VOC12")
    for path in sorted(pascal.rglob(f"{name}.*")):
        read = functools.partial(data.PascalContext(pascal, "val", decoded=False).read, 0)
        if path.parent.name != "pascal-context":  # VOC12 has one
            field = "anno" if path.parent.name == "human_parts" else "LabelMap"
            fuzz.file(path, read, same_sample, 7, crafted_for(path, field, (37, 51)),
                      most="unchanged" if path.suffix == ".png" else "legal")
        if path.suffix == ".mat":
            content = loadmat(path)
            savemat(path, {key: content[key] for key in content if key[0] != "_"}, do_compression=True)
            fuzz.file(path, read, same_sample, 7, most="unchanged")
    savemat(pascal / f"pascal-context/trainval/{name}.mat", {"LabelMap": np.full((37, 51), 0.5)})
    with pytest.raises(ValueError, match=f"{name}.mat holds fractions, not ids"):
        data.PascalContext(pascal, "val", decoded=False).read(0)
    for packaging in data.PACKAGINGS:
        nyud_folder(tmp_path / "nyud", data.PACKAGINGS[packaging])
        read = functools.partial(data.NYUDv2(tmp_path / "nyud", "val").read, 0)
        for key, ending in zip(data.NYUD_FOLDERS.values(), data.PACKAGINGS[packaging].split(), strict=True):
            if ending != "jpg" and (packaging != data.NYUDv2.packaging or ending == "npy"):
                shape = (37, 52, 3) if key == "normals" else (37, 52)
                path = tmp_path / f"nyud/{key}/0001.{ending}"
                fuzz.file(path, read, same_sample, 4, crafted_for(path, key, shape),
                          most="unchanged" if ending == "png" else "legal")
        shutil.rmtree(tmp_path / "nyud")
    world = data.World(shutil.copytree(small_world, tmp_path / "w"), "val", cache=False)
    read = functools.partial(world.read, 0)
    fuzz.file(tmp_path / "w/depth/val_000000.npy", read, same_sample, 4, crafted_npys((32, 32)))
    fuzz.report("labels")


def test_one_wrong_bit_of_a_label_is_seen(tmp_path):
    """Pixels changed without a word: Pillow passes over PNGs' checksums."""
    rng, path, counts = np.random.default_rng(6), tmp_path / "x.png", {"refused": 0, "let through": 0}
    pillow_alone = 0
    labels, colours = np.asarray(photo(0, (200, 150)))[..., 0] // 16, np.asarray(photo(0, (200, 150)))
    for array, level in ((labels, 1), (labels, 6), (colours, 1)):
        Image.fromarray(array).save(path, compress_level=level)
        whole = path.read_bytes()
        for bit in rng.integers(8 * 8, 8 * (len(whole) - 12), 60).tolist():  # up to the last chunk
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            read = functools.partial(data.load_label, path, array.shape, 255)
            ended = outcome(read, [str(path)], array, lambda after, before: (after == before).all())
            counts["refused" if ended == "refused" else "let through"] += 1
            with contextlib.suppress(Exception):
                found = np.array(Image.open(path))  # may raise, which array_equal would hide
                pillow_alone += not np.array_equal(found, array)
    print(f"\nfuzz one bit of a .png: {counts}; other pixels by Pillow alone: {pillow_alone}", end="")
    assert counts == {"refused": 180, "let through": 0}


def test_damaged_lists(pascal, small_world, tmp_path):
    """A list of the wrong kind that ends in a KeyError, ids that lead out of the folder (predictions and kept
    labels are written under them), captions that take the place of labels."""
    fuzz, world = Fuzz(1), shutil.copytree(small_world, tmp_path / "w")
    nested = b"[" * 100_000 + b"]" * 100_000
    odd = {"nested": nested, "list": [1], "number": 3, "text": "x", "none": None, "big": b"9" * 5000,
           "nan": b"NaN", "latin": "caf\u00e9".encode("latin-1"), "empty table": {}}
    values = ([1], {"a": 1}, "x", None, -2, 2**70, math.nan, True)

    def tables(path: Path) -> dict:
        known = json.loads(path.read_text())
        return odd | {f"value {v!r}"[:20]: dict.fromkeys(known, v) for v in values} | {
            f"inner {v!r}"[:20]: {name: [v] for name in known} for v in values[1:]}

    def read_all(spec: str) -> list[dict]:
        dataset = data.open_data(spec, "val")
        return [dataset.read(i) for i in range(len(dataset))]

    def same(after: list, before: list) -> bool:
        assert len(after) > 0 and all(legal_sample(sample, 40) for sample in after)
        return pickle.dumps(after) == pickle.dumps(before)

    for root, spec in ((pascal, f"pascal:{pascal}"), (world, f"world:{world}")):
        read = functools.partial(read_all, spec)
        for path in sorted(root.rglob("*.json")) + sorted(root.rglob("ImageSets/*/val.txt")):
            if path.name != "pascal_part.json":
                crafted = tables(path) if path.parent.name != "Context" else {
                    f"id {x!r}": x.encode() for x in ("../../x", "/etc/passwd", "..", "a\0b", "a\033[2Jb")}
                fuzz.file(path, read, same, 7, crafted, listed=str(root))  # or the file that an id leads to
    for name in ("./2008_000002", "x/../2008_000002", "../../x", ".."):  # the first would be found
        (pascal / "ImageSets/Context/val.txt").write_text(f"2008_000003\n{name}\n")
        with pytest.raises(ValueError, match="val.txt lists .* no plain name of a file"):
            read_all(f"pascal:{pascal}")
    (world / "meta.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds other files than this world"):
        data.render_world(world)
    fuzz.report("lists")


def damaged_tars(whole: bytes) -> dict[str, bytes]:
    """Tars made to break tarfile, or to write where they should not."""
    def header(size: int | bytes = 0, kind: bytes = b"0", name: str = "a.png", link: str = "") -> bytes:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
        block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
        return bytes(block)

    def attributes(text: bytes) -> bytes:
        length = next(n for n in range(len(text), len(text) + 9) if len(b"%d " % n + text) + 1 == n)
        line = b"%d " % length + text + b"\n"
        return header(length, b"x") + line + bytes(-length % 512)

    minus = [(-n).to_bytes(12, "big", signed=True) for n in (512, 1024)]
    image, end = whole.rstrip(b"\0"), bytes(1024)
    image += bytes(-len(image) % 512)
    return {
        "size below zero": image + header(minus[0]) + end, "two back": image + header(minus[1]) + end,
        "negative at once": header(minus[0]) + end, "negative name": header(minus[0], b"L") + end,
        "huge size": image + header(b"\x80" + b"\x7f" * 11) + end, "8 GiB": image + header(2**33 - 1) + end,
        "huge name": header(2**33 - 1, b"L") + end, "huge attributes": header(2**33 - 1, b"x") + end,
        "attributes below zero": image + attributes(b"size=-1024") + header(0) + end,
        "attributes huge": image + attributes(b"size=99999999999999999999") + header(0) + end,
        "zero in a name": attributes(b"path=a\0b.png") + image + end,
        "escape in a name": image + attributes(b"path=a\033[2J\n.png") + header(9) + b"no".ljust(512) + end,
        "digits": header(2**13 - 1, b"x") + b"1" * 2**13 + image + end,
        "names of names": header(3, b"L") * 3000 + end,
        "sparse": image + header(0, b"S") + b"\xff" * 512 + end,
        "links": image + b"".join(header(0, kind, "l.png", "/etc/passwd") for kind in (b"1", b"2")) + end,
        "devices": image + b"".join(header(0, b"%d" % kind, "d.png") for kind in range(3, 8)) + end,
        "outside": header(0, name="../../evil.png") + header(0, name="/etc/evil.png") + end,
        "twice": image + image + end, "packed": zlib.compress(whole), "gzip": b"\x1f\x8b\x08" + whole,
    }


def test_damaged_images(photos, tmp_path):
    """A photo or a tar that hangs (tarfile does, on sizes below zero), that is unpacked by its members'
    names, or of which the second reading, by the index, differs from the first."""
    fuzz = Fuzz(2)
    photo(9).save(photos / "a/animated.gif", save_all=True, append_images=[photo(8)])

    def same(after, before) -> bool:
        assert after.dtype == np.uint8 and after.ndim == 3 and after.shape[2] == 3
        return after.shape == before.shape and (after == before).all()

    for path in [*sorted(photos.rglob("*.*"))[:5], photos / "a/animated.gif"]:
        (tmp_path / "one").mkdir(exist_ok=True)
        one = Path(shutil.copy(path, tmp_path / "one"))
        dataset = data.ImageFolder(tmp_path / "one", size=16) if path.suffix != ".gif" else None
        if dataset:
            fuzz.file(one, lambda d=dataset: d.read(0)["image"], same, 5, crafted_pictures())
        fuzz.file(one, lambda p=one: data.read_photo(p), same, 5, crafted_pictures())
        one.unlink()

    def read_tar() -> list:
        def images(dataset):
            kept = []
            for i in range(len(dataset)):
                try:
                    kept.append((dataset.ids[i], dataset.read(i)["image"].tobytes()))
                except ValueError as error:
                    assert str(tar) in str(error) and str(error).isprintable()
            return kept

        first, second = (images(data.ImageFolder(tar, size=16)) for _ in "12")
        assert first == second, "the index tells otherwise"
        return first

    def same_images(after: list, before: list) -> bool:
        assert {image for _, image in after} <= {image for _, image in before}
        return after == before

    tar = pack(tmp_path / "t.tar", [pair for pair in stored(photos) if pair[0].endswith("png")])
    files = set(tmp_path.rglob("*"))
    fuzz.file(tar, read_tar, same_images, 10, damaged_tars(tar.read_bytes()))
    made = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert made <= files and not Path("/etc/evil.png").exists()
    fuzz.report("images")


def test_damaged_predictions(tmp_path):
    """A prediction or reference that hangs, ends in a traceback, or is scored with values that cannot be."""
    fuzz, tasks = Fuzz(3), list(PLAINEST.tasks)
    scoring.evaluate(Oracle(), Scenes(), "cpu", 2, tasks, save=tmp_path)
    np.save(tmp_path / "depth/9.npy", depth := np.load(tmp_path / "depth/1.npy"))
    savemat(tmp_path / "depth/1.mat", {"depth": depth}, do_compression=True)

    def same(after, before) -> bool:
        assert after.shape == before.shape and np.isfinite(after).all()
        return (after == before).all()

    for task in tasks:
        shape = (29, 30, 3) if task == "normals" else (29, 30)
        for path in sorted((tmp_path / task).glob("1.*")):
            read = functools.partial(scoring.read_map, task, path, (29, 30), PLAINEST.tasks[task])
            crafted = crafted_for(path, "depth", shape)
            crafted = {way: content for way, content in crafted.items() if way != "fractions"}  # of metres
            fuzz.file(path, read, same, 4, crafted, most="legal" if path.suffix == ".npy" else "unchanged")
    path = tmp_path / "reference.json"
    path.write_text('{"semseg": 50.0, "depth": 2.0}')
    odd = (math.nan, math.inf, -math.inf, 0, -1, True, "50", None, [], {}, 10**400)
    crafted = {f"value {v!r}"[:20]: {"semseg": v, "depth": 2.0} for v in odd} | {
        "nested": b"[" * 100_000 + b"]" * 100_000, "headline 3": {"headline": 3}, "list": [1],
        "empty table": {}, "number": 3, "latin": "caf\u00e9".encode("latin-1"),
        "headline": {"headline": {"semseg": "x"}}}
    fuzz.file(path, lambda: scoring.read_reference(path, tasks), lambda a, b: a == b, 10, crafted)
    fuzz.report("predictions")


def last_features(folder: Path) -> torch.Tensor:
    """Load a teacher and let it look."""
    return teachers.load_teacher(str(folder)).features(formula(1, 1, 3, 16, 16))[3]


def same_features(after: torch.Tensor, before: torch.Tensor) -> bool:
    assert after.shape[:2] == before.shape[:2] and after.isfinite().all()
    return torch.equal(after, before)


def test_damaged_weights(tmp_path):
    """A weights file that ends in a traceback, teaches numbers that are none, or has the memory of a thousand
    of its size taken before its sizes are compared."""
    fuzz, state = Fuzz(4), tiny_file("dinov2")
    folder = Path(tiny_folder(tmp_path / "t", "dinov2"))
    read = functools.partial(last_features, folder)

    def changed(save, **changes) -> bytes:
        known = {"fc1": "encoder.layer.0.mlp.fc1.weight", "norm": "encoder.layer.0.norm1.weight", "patch":
                 "embeddings.patch_embeddings.projection.weight", "fc2": "encoder.layer.0.mlp.fc2.weight",
                 "cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings"}
        file = tmp_path / "changed"
        save(state | {known[key]: value for key, value in changes.items()}, file)
        return file.read_bytes()

    ways = {f"{key} {shape}": {key: torch.ones(shape)} for key in "fc1 norm patch fc2 cls pos".split()
            for shape in ((), (3,), (0, 4), (2, 3, 4, 5, 6))}
    ways |= {"nan": {"fc1": state["encoder.layer.0.mlp.fc1.weight"] * math.nan}, "wide": {
        "norm": torch.ones(2**20), "fc2": torch.ones(1, 2**20)}, "ids": {"norm": torch.ones(16).long()},
        "complex": {"norm": torch.ones(16) * 1j}}
    crafted = {way: changed(save_file, **given) for way, given in ways.items()} | {
        "a pickle": changed(torch.save), "huge header": struct.pack("<Q", 2**40) + b"{" * 50,
        "header below zero": struct.pack("<q", -1) + b"{" * 50}
    path = folder / "model.safetensors"
    fuzz.file(path, read, same_features, 10, crafted, listed=str(folder))
    for way in ("nan", "ids", "cls (0, 4)", "wide"):
        path.write_bytes(crafted[way])
        with pytest.raises(ValueError, match="instead of" if way == "wide" else "empty or not finite"):
            read()
    path.unlink()
    path = folder / "pytorch_model.bin"
    torch.save(state, path)
    spread = torch.ones(1).expand(2**20, 2**20)
    ways |= {"spread": {"fc1": spread}, "sparse": {"fc1": torch.ones(32, 16).to_sparse()},
             "meta": {"fc1": torch.ones(32, 16, device="meta")}}
    crafted = {way: changed(torch.save, **given) for way, given in ways.items()}
    for way, content in ("numbers", {1: torch.ones(1)}), ("list", [1]), ("code", pytest.fail), ("none", None):
        torch.save(content, tmp_path / "changed")
        crafted[way] = (tmp_path / "changed").read_bytes()
    fuzz.file(path, read, same_features, 10, crafted, listed=str(folder))
    for way in ("spread", "sparse", "complex", "numbers"):
        path.write_bytes(crafted[way])
        with pytest.raises(ValueError, match="is no table of weights by name"):
            read()
    fuzz.report("weights")


def test_damaged_configs(tmp_path):
    """A config that ends in a traceback, or makes a teacher see colours that are no numbers."""
    fuzz, side = Fuzz(7), [0.4] * 3
    folder = Path(tiny_folder(tmp_path / "t", "dinov2", {"num_attention_heads": 2, "layer_norm_eps": 1e-6}))
    read = functools.partial(last_features, folder)
    odd = (math.nan, math.inf, 0, -1, 2**70, True, "x", None, [], {}, [1, 2], 0.5)
    keys = ("num_attention_heads", "layer_norm_eps", "rope_theta", "num_register_tokens", "hidden_act",
            "vision_config", "pretrained_cfg", "architecture", "model_type")
    config = {f"{key} {v!r}"[:40]: {"num_attention_heads": 2, key: v} for key in keys for v in odd}
    config |= {f"mean {v!r}": {"pretrained_cfg": {"mean": v, "std": side}} for v in (
        3, "abc", [1], [math.nan] * 3, ["a"] * 3, None, {"a": 1})}
    config |= {"std 0": {"num_attention_heads": 2, "pretrained_cfg": {"mean": side, "std": [0] * 3}},
               "nested": b"[" * 100_000 + b"]" * 100_000, "list": [1], "latin": "caf\u00e9".encode("latin-1")}
    fuzz.file(folder / "config.json", read, same_features, 10, config, listed=str(folder))
    for name in ("preprocessor_config.json", "open_clip_config.json", "source.json"):
        (folder / name).write_text("{}")
        fuzz.file(folder / name, read, same_features, 3, {
            f"{key} {v!r}"[:40]: {key: v, "image_std": side, "file": "model.safetensors"} for v in odd[4:]
            for key in ("image_mean", "model_cfg", "preprocess_cfg", "sha256", "commit")}, listed=str(folder))
    fuzz.report("configs")


def test_bombs(tmp_path):
    """A small file that takes gigabytes before it is refused: pictures, .mat and .npy files, tars."""
    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    def refuse(name: str, content: bytes, read):
        path = tmp_path / name
        path.write_bytes(content)
        assert len(content) < 2**20
        measured = os.access("/proc/self/clear_refs", os.W_OK)
        if measured:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start, before = time.process_time(), peak() if measured else 0
        assert outcome(functools.partial(read, path), [str(path)], None, lambda *_: False) == "refused", name
        assert time.process_time() - start < 3, name
        assert not measured or peak() - before < 0.7 * 2**30, name

    body = mat_matrix(9, (1, 2**28), mat_element(2, bytes(2**28)), b"LabelMap")
    made = crafted_mats("LabelMap", (9, 9)) | crafted_npys((9, 9)) | {"packed": mat_file(body, packed=True)}
    for way in ("packed", "cells", "empty cells", "structs", "characters", "nested", "claim"):
        refuse(f"{way}.{'npy' if way == 'claim' else 'mat'}", made[way],
               lambda path: data.load_label(path, (9, 9), 1, field="LabelMap"))
    (tmp_path / "x.mat").write_bytes(made["cells of cells"])
    with pytest.raises(ValueError, match="more than 100000 arrays"):
        data.load_label(tmp_path / "x.mat", (9, 9), 1, field="LabelMap")
    bombs = {way: content for way, content in crafted_pictures().items() if way not in ("floats", "16 bits")}
    for way, content in bombs.items():
        refuse(f"{way}.png", content, data.read_photo)
        with pytest.raises(ValueError, match="pixels. exceeds limit"):  # not: too few bytes
            data.read_photo(tmp_path / f"{way}.png")
        refuse(f"{way}.png", content, lambda path: data.load_label(path, (9, 9), 1))
        tar = pack(tmp_path / "t.tar", [(f"{way}.png", content)])
        refuse("t.tar", tar.read_bytes(), lambda path: data.ImageFolder(path, size=16).read(0))
    for other in ("eps", "ppm"):  # an EPS would start a program
        refuse("other.png", bytes_of(format=other), data.read_photo)
    os.truncate(tmp_path / "other.png", 2**29 + 1)  # a hole
    with pytest.raises(ValueError, match="other.png cannot be decoded .536870913 bytes, at most 536870912"):
        data.read_photo(tmp_path / "other.png")
    fifo = tmp_path / "pipe.png"
    os.mkfifo(fifo)
    for read in (lambda: data.load_label(fifo, (9, 9), 1), lambda: data.ImageFolder(tmp_path, size=16).read(
            data.ImageFolder(tmp_path).ids.index("pipe.png"))):
        assert outcome(read, [str(fifo)], None, lambda *_: False) == "refused"


WRONG = {  # script -> flags, each of which is refused before anything is rendered, raised, fetched or trained
    "train": """--steps 0|--steps -1|--steps nan|--steps 1e3|--epochs 0|--epochs -1|--epochs nan
        |--epochs inf|--epochs 1 --steps 1|--batch-size 0|--batch-size -6|--batch-size 2|--image-size 0
        |--image-size -8|--image-size 50|--image-size 8 8 8|--image-size 1e9|--lr nan|--lr -1|--lr inf
        |--weight-decay nan|--weight-decay -1|--distill-weight nan|--distill-weight -1|--log-every 0
        |--log-every -1|--save-every 0|--save-every -5|--workers -1|--seed -1
        |--seed 99999999999999999999|--accumulate 0|--accumulate -1|--accumulate 7|--experts 0
        |--experts -1|--experts 256|--top-k 99|--top-k 0|--expert-ratio 0|--expert-ratio nan
        |--expert-ratio inf|--expert-ratio -1|--gate-start nan|--gate-start 0|--gate-start 1
        |--decorr-levels -1|--decorr-levels 99|--sam-size 0|--sam-size -16|--bench 0|--bench -1
        |--bench 2 --accumulate 2|--tasks x|--tasks semseg semseg|--teachers|--teachers x|--teachers =
        |--teachers toy-dino toy-dino|--without x|--without film --student sak|--data|--data x|--data :
        |--data world:{nowhere}|--data pascal|--data pascal:{nowhere}|--data nyud:{file}
        |--data images:{nowhere}|--data images:{nowhere} --stage deconstruct
        |--data tars:{nowhere}.tar --stage deconstruct
        |--data tars:{nowhere}{0..3}.tar --stage deconstruct|--out-dir {file}|--out-dir /proc/x
        |--device tpu|--device meta|--device mps|--device cuda:99|--device cpu:-1|--init {nowhere}.pt
        |--init {folder}.pt|--init x|--resume --init {nowhere}|--stage recompose|--stage x|--no-distill
        |--shard|--size x|--student x|--no-distill --stage recompose --init {nowhere}.pt|--no-such-flag
        |--debug x""",
    "eval": """--ckpt {folder}|--ckpt {nowhere}|--ckpt {file}|--batch-size 0|--batch-size -1
        |--batch-size x|--analysis-images 0|--device meta|--device tpu|--cost --size toy --image-size 0
        |--cost --size toy --image-size 8 8 8|--cost --size toy --image-size -8
        |--cost --size toy --image-size 9|--cost --size x|--contest x|--contest prism prism
        |--contest --seeds 0|--contest --seeds -1|--contest --train-args=--steps
        |--contest --train-args="|--contest --train-args=--nonsense|--image {nowhere}|--image {file}
        |--image {folder}|--image {folder} --predictions {folder}|--predictions {nowhere}
        |--predictions {nowhere} --data nyud:{nowhere}|--predictions {folder} --data x
        |--reference {nowhere}|--protocol x|--split x|--seeds x""",
    "data": """--show {nowhere}|--show x:|--show {folder}|--show {file}|--show world --split x
        |--split nothing|--check {nowhere}|--check {folder}|--check x|--check pascal:{nowhere}
        |--check world|--bench world|--bench images:{nowhere}|--bench {photos} --image-size 0
        |--bench {photos} --image-size -5|--bench {photos} --workers -1|--rows 0|--rows -1|--rows x
        |--rows 99999999|--out {folder}|--out {nowhere}/x.png|--out {file}""",
    "teachers": """x|{nowhere}|{folder}|{file}|random:x|random:|random:dinov2-s --size 0
        |random:dinov2-s --size -14|toy-dino --size 0|toy-dino x|--image {nowhere}|--sha256 x
        |dinov2-b dinov2-s --sha256 x|random:dinov2-s --image {nowhere}|random:dinov2-s --image {folder}
        |random:dinov2-s --device meta|random:dinov2-s --image {photos}/00.png --out-dir {file}|a/b@
        |--probe --device tpu|--size x""",
    "prism": """--bench --tokens 0|--bench --tokens -1|--bench --dim 0|--bench --dim 3|--bench --dim -4
        |--bench --experts 0|--bench --experts 4|--bench --top-k 99|--bench --top-k 0
        |--bench --repeats 0|--bench --device tpu|--bench --device meta|--bench --dtype x""",
}


def test_wrong_command_lines(photos, tmp_path, monkeypatch, capsys):
    """A traceback, two lines, or minutes of work before a wrong value is seen: a step 0 of 0, a seed below
    zero, a batch of nothing, a learning rate that is no number."""
    def start(*_, **__):
        raise Hang("long work has begun")

    for module, name in ((data, "write_world"), (teachers, "Teachers"), (teachers, "fetch_repo"), (scoring,
                         "train_and_score"), (train, "fit"), (prism, "time_interleaved")):
        monkeypatch.setattr(module, name, start)
    monkeypatch.setattr(teachers, "raise_missing", lambda names, device: names and start())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir(), (tmp_path / "file").write_text("x")
    places = {name: str(tmp_path / name) for name in ("nowhere", "folder", "file", "photos")}
    rng, counts = np.random.default_rng(5), {"one line": 0, "usage": 0}
    for script, text in WRONG.items():
        module = {"train": train, "eval": scoring, "data": data, "teachers": teachers, "prism": prism}[script]
        wrong = [re.sub(r"\{([a-z]+)\}", lambda m: places[m[1]], x).split() for x in re.split(r"\s*\|", text)]
        pairs = [wrong[a] + wrong[b] for a, b in rng.integers(0, len(wrong), (len(wrong) // 5, 2))]
        for flags in wrong + pairs:
            run = module.train if script == "train" else module.main
            begin = time.process_time()
            with pytest.raises(SystemExit) as stop:
                args = tyro.cli(module.Args, args=flags)
                prism.exit_with_one_line(functools.partial(run, args), args.debug)
            says, more = (script, *flags, stop.value.code), capsys.readouterr().err
            assert time.process_time() - begin < 3, says
            if stop.value.code != 2:  # 2: tyro has told the usage
                line = str(stop.value.code) + more
                assert line.isprintable() and re.match(r"\w+Error: .{10}", line), says
            counts["usage" if stop.value.code == 2 else "one line"] += 1
    made = {path.name for path in tmp_path.rglob("*")} - {path.name for path in photos.rglob("*")}
    assert made <= {"folder", "file", "photos", "out"}, made
    print(f"\nfuzz command lines: {counts}", end="")


# -------------------------------------------------------------------------------- beside transformers


def compare_with_transformers(repeats: int = 5) -> None:
    """Print the largest difference of any block (tiny models, three grids) and the time of a forward pass
    (ViT-B) of our encoders and transformers', interleaved."""
    import transformers as t
    from rich.console import Console
    from rich.table import Table

    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    real = {  # family -> model of real size, input side in pixels
        "dinov2": (lambda: t.Dinov2Model(t.Dinov2Config(patch_size=14, image_size=518)), 378),
        "dinov2-reg": (lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(patch_size=14, image_size=518)), 378),
        "clip": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(patch_size=16)), 384),
        "siglip": (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(image_size=384)), 384),
        "dinov3": (lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**base, num_register_tokens=4)), 384),
        "sam": (lambda: t.SamModel(t.SamConfig()), 1024),
    }
    torch.set_num_threads(data.core_count())
    table = Table("family", *GRIDS, "pixels", "ours, s", "theirs, s", "ratio", title=(
        f"largest |difference| of a block; forward pass of a ViT-B with all blocks kept, batch 1, fp32, "
        f"{torch.get_num_threads()} threads, medians of {repeats}; transformers {t.__version__}"))
    for family, (build, pixels) in real.items():
        differences = [f"{difference_from_transformers(family, grid):.1e}" for grid in GRIDS.values()]
        theirs = build().eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = teachers.load_teacher(folder)
        x, times = torch.randn(1, 3, pixels, pixels), {"ours": [], "theirs": []}
        runs = {"ours": lambda x=x, net=ours: net.blocks(x),
                "theirs": lambda x=x, net=theirs, family=family: hub_states(net, family, x)}
        for i in range(repeats + 1):
            for name in sorted(runs, reverse=i % 2):
                start = time.perf_counter()
                with torch.no_grad():
                    runs[name]()
                times[name].append(time.perf_counter() - start)
        a, b = (float(np.median(times[name][1:])) for name in ("ours", "theirs"))
        table.add_row(family, *differences, str(pixels), f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    compare_with_transformers()
