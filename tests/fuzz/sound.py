"""Sound inputs of every class, in a folder; the cases damage them."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import captures
from command import fmsim_here
from made_trace import make_trace, save_indexer

from fmsim.indexer import checkpoint
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import PUBLISHED
from fmsim.trace import float8, lightened, write, write_shared

CONFIG = json.loads((ROOT / "scenarios/one-gpu/config.json").read_text(encoding="utf-8"))
WORKLOADS = (
    "{kind: poisson, rate_per_s: 1, prompt_tokens: 2000, output_tokens: 8, duration_s: 3}",
    "{kind: bursts, burst: 2, every_s: 1, prompt_tokens: [100, 900], output_tokens: 4,"
    " duration_s: 2, slo: {ttft_s: 1, tpot_s: 0.05}}",
    "{kind: closed_loop, requests: 2, prompt_tokens: 700, output_tokens: 3, duration_s: 0.1}",
)
SCENARIO = (
    "name: case\n"
    "description: of a fuzzer\n"
    "trace: small.safetensors\n"
    "model: v4-flash\n"
    "hardware: h100\n"
    "hardware_figures: {link_bytes_per_s: 27.0e+9}\n"
    "batch: 1\n"
    "policies: [{policy: lru, budget: 20%, label: a, granularity: 4}]\n"
)
START_LOG = (
    "[2026-01-01 00:00:00 TP0] Load weight end. avail mem=60.10 GB, mem usage=18.02 GB.\n"
    "[2026-01-01 00:00:09 TP0] KV Cache is allocated. #tokens: 812345, KV size: 41.50 GB\n"
    "INFO 01-01 00:00:09 [gpu_worker.py:298] Available KV cache memory: 41.5 GiB\n"
    "INFO 01-01 00:00:09 [kv_cache_utils.py:864] GPU KV cache size: 812,345 tokens\n"
)


class Sound:
    """A folder with the inputs, and their contents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        trace = make_trace(prompt_tokens=256, n_steps=8, n_layers=1)
        write(folder / "small.safetensors", trace)
        write(folder / "three.safetensors", make_trace(prompt_tokens=256, n_steps=8))
        self.packed = folder / "packed" / "packed.safetensors"
        light = lightened(make_trace(prompt_tokens=256, n_steps=8, n_layers=3), None, 10)
        self.context = write_shared([self.packed], [light])
        (folder / "small.yaml").write_text(SCENARIO)
        (folder / "three.yaml").write_text(SCENARIO.replace("small.", "three."))
        done = fmsim_here("run", "small.yaml", "--out", "out", folder=folder)
        assert done.returncode == 0, done.stderr
        swept = fmsim_here("sweep", "small.yaml", "-g", "batch=1,2", folder=folder)
        assert swept.returncode == 0, swept.stderr
        self.trace = (folder / "small.safetensors").read_bytes()
        self.report = json.loads((folder / "out/report.json").read_text())
        self.ledger = (folder / "out/ledgers/a.npz").read_bytes()
        self.timeline = json.loads((folder / "out/timelines/a.json").read_text())
        self.rows = (folder / "sweep.jsonl").read_text()
        presets = ROOT / "fmsim" / "hw"
        text = (presets / "presets" / "h100.yaml").read_text(encoding="utf-8")
        self.hardware = text.replace("link: h100", "link: case-link")
        self.link = (presets / "links" / "h100.yaml").read_text(encoding="utf-8")
        save_indexer(folder / "indexer.safetensors")
        self.checkpoint = (folder / "indexer.safetensors").read_bytes()
        published = Checkpoint(checkpoint.load(folder / "indexer.safetensors").layers, PUBLISHED)
        checkpoint.save(published, folder / "indexer.pt")
        self.checkpoint_pt = (folder / "indexer.pt").read_bytes()
        self.dump = pickle.dumps(_dump())
        selected = captures.rows(np.random.default_rng(0))
        self.captures = {"sglang": captures.sglang(selected), "vllm": captures.vllm(selected)}
        captures.config_file(folder)
        np.save(folder / "rows.npy", selected[:, :, :4])
        self.npy = (folder / "rows.npy").read_bytes()


def _dump(rows: int = 5, first: int = 402) -> dict[str, Any]:
    """One layer of FlashMemory's training data, as their server pickles it."""
    rng = np.random.default_rng(0)
    entries = (first + rows) // 4
    codes = float8.encode(rng.standard_normal((entries, 128)))
    scales = rng.uniform(0.5, 2, entries).astype("<f4")
    keys = np.concatenate([codes, scales[:, None].view(np.uint8)], axis=1)
    labels = np.sort(rng.integers(0, 100, rows))
    return {
        "label_indices": torch.from_numpy(labels.astype(np.int32)),
        "label_scores": torch.full((rows,), 7, dtype=torch.int32),
        "label_pointers": torch.arange(rows + 1, dtype=torch.int32),
        "hidden_layer_6": torch.from_numpy(rng.standard_normal((rows, 8))).to(torch.bfloat16),
        "compk_layer_6": torch.from_numpy(keys),
        "positions_layer_6": torch.arange(first, first + rows),
    }
