"""Traces of one context are recorded packed, share its prompt, and say how they were answered."""

import json

import numpy as np
from nano_training.tiny_nano import tiny_nano

from fmsim.nano.measure import record_traces
from fmsim.nano.tokens import Corpus
from fmsim.trace import read
from fmsim.trace.summary import summary


def test_the_kinds_of_one_context_share_its_prompt(tmp_path):
    rng = np.random.default_rng(0)
    text = rng.integers(300, 4096, 20_000).astype(np.uint16)
    corpus = Corpus(text, np.array([0, len(text)]), ["made up"])
    model, kinds = tiny_nano(4096), ["needles", "memory", "continuation"]
    record_traces.record_context(
        model, corpus, "held_out", tmp_path, "made", 2304, kinds, 70, 0, "d" * 64, [1]
    )
    assert len(list(tmp_path.glob("*.context"))) == 1
    found = [read(tmp_path / f"made-{kind}.safetensors", check=True) for kind in kinds]
    assert len({trace.header.context_sha256 for trace in found}) == 1
    for trace in found:
        assert trace.keyed == [1] and trace.n_layers == 2 and trace.n_steps >= 70
        assert 0 < trace.header.quality["lru_misses"] < 1
        assert np.array_equal(trace.token_ids[:2304], found[0].token_ids[:2304])
    assert found[0].header.quality["asked"] >= 1
    about = summary(found[0])["about"]
    assert "asked" in about["answers"] and "% of the selected" in about["lru misses"]
    assert json.dumps(about)
