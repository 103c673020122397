"""Index keys that come and go with their entries, in the layers that no memory indexer scores: the
same decode as with all keys on the GPU.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from dataclasses import replace

from command import fmsim
from tiny_indexer import lookahead
from tiny_model import CSA, HCA, SLIDING, oracle, ours

from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Batch, Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.kernels.index_score import GROUP, new_scores
from fmsim.exec.kernels.layout import KEY, plain, read_entries
from fmsim.exec.kv.keys import AllKeys, ResidentKeys
from fmsim.exec.kv.resident import ResidentPages
from fmsim.exec.kv.tiered import RequestSize, TieredCache
from fmsim.exec.runs import live as run
from fmsim.exec.runs.record import trace_header, trace_of
from fmsim.exec.runs.stream import Stream, Turn
from fmsim.geometry import Geometry
from fmsim.policies import registry
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.sim import metrics
from fmsim.sim.footprint import allocation, footprint, keyed_layers

TARGETS, TIERED, LAYERS = (1, 3), [0, 2, 4], 5
LENGTHS, STEPS, TAU = (212, 97), 44, 8  # 64 entries at the end of the first
ENTRY_BYTES, KEY_BYTES = 32 * 4, 16 * 4
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
OPTIONS = [
    {"stale": False},
    {},
    {"granularity": 4},
    {"granularity": 4, "stale": False, "recent_entries": 9},
]


@pytest.fixture(scope="module")
def reference():
    return oracle(layer_types=[SLIDING, CSA, HCA, CSA, CSA, CSA, CSA], index_topk=8, head_dim=32)


@pytest.fixture(scope="module")
def prompts(reference):
    read = {}

    def on(device):
        if device not in read:
            texts = [
                torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist()
                for length in LENGTHS
            ]
            model = ours(reference).to(device)
            read[device] = [Prompt(model, text, STEPS) for text in texts]
        return read[device]

    return on


class Decoded:
    """A batch after `STEPS` steps; `ids` int32 [T, L, B, K] what each attended to."""

    def __init__(self, prompts, spec, index_keys, watch=lambda batch: None, **options):
        self.batch = Batch(prompts, registry.build(spec), tau=TAU, index_keys=index_keys, **options)
        self.ids = []
        for step in range(STEPS):
            self.batch.step([step, step + 1][: len(prompts)] if step < 4 else None)
            self.ids.append(self.batch.selections.ids.cpu().clone())
            watch(self.batch)
        self.ids = torch.stack(self.ids)
        self.tokens = [request.tokens for request in self.batch.requests]
        self.ledgers = [request.ledger() for request in self.batch.requests]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [None, True], ids=["", "kernels"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_places_of_keys_select_the_same_step_for_step(
    prompts, tmp_path, options, kernels, device
):
    spec = lookahead(tmp_path, "28 entries", TARGETS, **options)
    everything, tiered = (
        Decoded(prompts(device), spec, where, kernels=kernels) for where in ("all", "tiered")
    )
    assert tiered.batch.keys.tiered == TIERED
    assert torch.equal(tiered.ids, everything.ids)
    assert tiered.tokens == everything.tokens
    for one, other in zip(everything.ledgers, tiered.ledgers):
        assert one.lookahead_loads.sum() > 1 and one.evicted.sum() > 1
        assert (
            one.hit[:, TIERED] < one.accessed[:, TIERED]
        ).mean() > 0.2  # the selections among all keys would have been others
        for name in (
            "resident",
            "initial",
            "lookahead_loads",
            "demand_loads",
            "written",
            "evicted",
            "set_overlap",
            "scored",
        ):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    if device == "cpu":
        assert torch.equal(tiered.batch.logits, everything.batch.logits)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=20, deadline=None)
@given(
    granularity=st.sampled_from([1, 4, 16, 64]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    share=st.floats(0, 1),
    layout=st.sampled_from([plain(torch.float32, 32), plain(torch.bfloat16, 32), KEY]),
    seed=st.integers(0, 2**32),
)
def test_scores_beside_entries_are_those_of_all_keys_where_pages_are(
    device, granularity, lengths, share, layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // granularity) for length in lengths]
    slots = [max(1, round(share * count)) for count in pages]
    tiers = TieredCache(
        layout, 1, granularity, [RequestSize(*size) for size in zip(pages, slots)], device
    )
    tables = [torch.full((count + 1,), -1, dtype=torch.int32) for count in pages]
    blocks = torch.full((len(lengths), max(pages) + 1), -1, dtype=torch.int32, device=device)
    for b, (table, count, some) in enumerate(zip(tables, pages, slots)):
        table[torch.randperm(count, generator=generator)[:some]] = torch.arange(
            some, dtype=torch.int32
        )
        tables[b] = table.to(device)
        tiers.blocks(b, tables[b], blocks[b, : count + 1])
    buffers = [new_scores(len(lengths), -(-max(lengths) // 64) * 64, device) for _ in range(2)]
    listing = ResidentPages(
        1, slots, tiers.slot_start[:-1], max(pages), granularity, torch.device(device)
    )  # which a selection takes; scores need none
    everything, resident = (
        AllKeys(layout, buffers[0], device),
        ResidentKeys(tiers, 0, tables, blocks, buffers[1], listing, 0),
    )
    for b, length in enumerate(lengths):
        rows = torch.randn(length, layout.width, generator=generator).to(device)
        for keys in (everything, resident):
            keys.fill(b, rows[:-1])
            keys.append(b, rows[-1:], torch.tensor([length - 1], device=device))
    dtype = layout.dtype if layout.kind == "plain" else torch.bfloat16
    queries, weights = (
        torch.randn(len(lengths), 1, *shape, generator=generator).to(device, dtype)
        for shape in ((4, layout.width), (4,))
    )
    known, found = (
        keys.scores(queries, weights, torch.tensor(lengths, dtype=torch.int32, device=device))
        for keys in (everything, resident)
    )
    entries = torch.arange(buffers[0].scores.shape[1], device=device)
    here = blocks[:, (entries // granularity).clamp(max=blocks.shape[1] - 1)] >= 0
    rtol, atol = (
        (0, 0) if device == "cpu" else (1e-3, 1e-4)
    )  # pages of other sizes may be multiplied in other blocks
    torch.testing.assert_close(
        found.scores, known.scores.masked_fill(~here, float("-inf")), rtol=rtol, atol=atol
    )
    assert torch.equal(found.maxima, found.scores.unflatten(1, (-1, GROUP)).amax(2))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the engine ran on the CPU only"
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_graph_of_kernels_decodes_as_torch_does(prompts, tmp_path, options):
    spec = lookahead(tmp_path, "28 entries", TARGETS, **options)
    one, other = (Decoded(prompts(device), spec, "tiered") for device in ("cpu", "cuda"))
    assert other.tokens == one.tokens and torch.equal(other.ids, one.ids)
    torch.testing.assert_close(other.batch.logits.cpu(), one.batch.logits, atol=1e-3, rtol=0)
    assert other.batch.h2d_bytes == one.batch.h2d_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_with_room_for_everything_nothing_is_lost(prompts, tmp_path, device):
    spec = lookahead(tmp_path, "64 entries", TARGETS, threshold=1e-300)
    tiered, everything = (Decoded(prompts(device), spec, where) for where in ("tiered", "all"))
    full = Decoded(prompts(device), "full", "all")
    assert tiered.tokens == everything.tokens == full.tokens
    assert torch.equal(tiered.ids, full.ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("granularity", [1, 4])
def test_a_page_of_keys_is_where_its_entries_are_and_the_mirror_has_them_all(
    prompts, tmp_path, granularity, device
):
    """At every step: new keys were written through, and recalled ones, ahead of a decision or not,
    came whole.
    """
    spec = lookahead(tmp_path, "28 entries", TARGETS, granularity=granularity)

    def compare(batch):
        cache, layout = batch.tiers.keys, batch.tiers.keys.layout
        for b, request in enumerate(batch.requests):
            closed = (len(request.prompt.tokens) + request.step) // 4
            table = request.residency.table[0, :-1]
            for number in range(len(TIERED)):
                ids = torch.arange(closed, device=table.device)
                places = cache.page_start[b] * granularity + ids.to(cache.mirror.device)
                kept = read_entries(cache.mirror[number], layout, places).to(ids.device)
                assert kept.abs().amax(1).min() > 0
                slot = table[ids // granularity]
                here = read_entries(
                    cache.pool[number],
                    layout,
                    (cache.slot_start[b] + slot) * granularity + ids % granularity,
                )
                assert (
                    torch.equal(here[slot >= 0], kept[slot >= 0])
                    and (slot >= 0).any()
                    and ((slot < 0).any() or b > 0)
                )

    tiered, everything = (
        Decoded(prompts(device), spec, "tiered", compare),
        Decoded(prompts(device), spec, "all"),
    )
    for b, closed in enumerate((length + STEPS) // 4 for length in LENGTHS):
        for number, layer in enumerate(TIERED):
            cache = tiered.batch.tiers.keys
            kept = read_entries(
                cache.mirror[number],
                cache.layout,
                cache.page_start[b] * granularity + torch.arange(closed),
            )
            torch.testing.assert_close(
                kept,
                everything.batch.keys.kept[layer].read(b, closed).cpu(),
                atol=0 if device == "cpu" else 1e-5,
                rtol=0,
            )


def test_what_a_decision_will_recall_is_copied_ahead_keys_too(prompts, tmp_path):
    spec, seen = lookahead(tmp_path, "28 entries", TARGETS), []

    def watch(batch):
        seen.append(tuple(int(cache.recalled_pages) for cache in batch.tiers.caches))

    batch = Decoded(prompts("cpu")[:1], spec, "tiered", watch).batch
    loads = batch.requests[0].ledger().lookahead_loads[:, 0]
    first = np.flatnonzero(loads)[0]
    entries, keys = np.array(seen).T
    assert first > TAU and keys[first - TAU - 1] == 0
    assert 0 < keys[first - 1] <= loads[first] * len(TIERED)  # of the decision that is yet to come
    assert keys[-1] == loads.sum() * len(TIERED)
    assert (entries * len(TIERED) == keys * LAYERS).all()


def plain_geometry(config) -> Geometry:
    """The tiny model, with its unscaled float32 entries and keys."""

    class Plain(Geometry):
        kv_entry_bytes, index_key_bytes = ENTRY_BYTES, KEY_BYTES

    zeros = dict.fromkeys(
        (
            "hidden_size",
            "n_heads",
            "rope_dim",
            "index_n_heads",
            "q_lora_rank",
            "o_lora_rank",
            "o_groups",
            "n_experts",
            "n_active_experts",
            "n_shared_experts",
            "expert_width",
            "vocabulary",
        ),
        0,
    )
    return Plain(
        name="tiny",
        layer_types=tuple(config.layer_types),
        head_dim=config.head_dim,
        window_tokens=config.sliding_window,
        csa_rate=4,
        hca_rate=8,
        index_topk=config.index_topk,
        index_head_dim=config.index_head_dim,
        **zeros,
    )


class ReplayerOf(Replayer):
    """Of a decode's trace, with the decode's own states in the place of what a trace rounds."""

    def __init__(self, trace, request, **options):
        super().__init__(trace, **options)
        self.request = request

    def _lookahead(self, window):
        state = self.request.lookahead(window)
        return state.hidden.numpy(), state.position, state.keys.numpy()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bytes_are_those_of_the_replay_and_of_its_footprint(prompts, tmp_path, options):
    spec, [prompt] = lookahead(tmp_path, "28 entries", TARGETS, **options), prompts("cpu")[:1]
    everything, tiered = (Decoded([prompt], spec, where) for where in ("all", "tiered"))
    trace = trace_of(
        everything.batch.requests[0],
        trace_header(prompt.model, LENGTHS[0], name="tiny", seed=0, sha256=None, tau=TAU),
        [False] * STEPS,
    )
    replayed = ReplayerOf(trace, everything.batch.requests[0], entry_bytes=ENTRY_BYTES).run(
        registry.build(spec)
    )
    [ledger] = tiered.ledgers
    for name in ("resident", "lookahead_loads", "written", "evicted", "scored", "initial"):
        assert np.array_equal(getattr(ledger, name), getattr(replayed, name)), name
    geometry, batch = plain_geometry(prompt.model.config), tiered.batch
    place, own = footprint(replayed, geometry), footprint(ledger, geometry)
    assert (
        place.keys_tiered and own.keys_tiered and keyed_layers(replayed, geometry) == len(TARGETS)
    )
    assert np.array_equal(place.gpu_bytes, own.gpu_bytes)
    entries, granularity = (LENGTHS[0] + STEPS) // 4, ledger.granularity
    assert batch.tiers.slot_bytes == ledger.n_slots * granularity * (
        LAYERS * ENTRY_BYTES + len(TIERED) * KEY_BYTES
    )
    planned = allocation(replayed, geometry)
    assert batch.tiers.slot_bytes == planned.slots
    assert batch.keys.kept_bytes == planned.index_keys
    assert batch.tiers.pool_bytes - batch.tiers.slot_bytes == planned.spare
    assert batch.tiers.mirror_bytes == entries * (LAYERS * ENTRY_BYTES + len(TIERED) * KEY_BYTES)
    loads = int(replayed.lookahead_loads.sum()) * granularity
    assert batch.h2d_bytes == loads * (LAYERS * ENTRY_BYTES + len(TIERED) * KEY_BYTES) > 0
    assert batch.timeline().h2d_bytes.sum() == batch.h2d_bytes
    assert everything.batch.h2d_bytes == loads * LAYERS * ENTRY_BYTES
    assert batch.gpu_kv_bytes < everything.batch.gpu_kv_bytes


def test_what_is_not_measured_is_said_and_never_counted(prompts, tmp_path):
    spec = lookahead(tmp_path, "28 entries", TARGETS)
    everything, tiered = (Decoded(prompts("cpu"), spec, where) for where in ("all", "tiered"))
    for one, other in zip(everything.ledgers, tiered.ledgers):
        assert one.unmeasured == [] and other.unmeasured == TIERED
        for name in (
            "accessed",
            "hit",
            "golden",
            "golden_hit",
            "mass_total",
            "mass_kept",
            "heaviest_lost",
        ):
            assert not getattr(other, name)[:, TIERED].any()
            assert np.array_equal(
                getattr(one, name)[:, TARGETS], getattr(other, name)[:, TARGETS]
            ), name
        kept, only = metrics.kept(other, range(LAYERS)), metrics.kept(one, TARGETS)
        assert kept == only and 0 < kept["mass_kept"] < 1
        assert metrics.kept(other, TIERED) == only | {"entry_recall": None, "mass_kept": None}
        assert metrics.exact(other) is False
        assert metrics.exact(replace(other, mass_kept=other.mass_total)) is None
        other.save(tmp_path / "it.npz")
        assert Ledger.load(tmp_path / "it.npz").unmeasured == TIERED


@pytest.mark.parametrize("targets", [TARGETS, range(LAYERS)], ids=["some", "all"])
def test_the_report_says_over_how_many_layers(reference, tmp_path, capsys, targets):
    from fmsim.report.tables import measured

    stream = Stream("text", np.random.default_rng(0).integers(0, 64, 120), [Turn([1, 2, 3], 20)])
    policy = registry.build(lookahead(tmp_path, "20 entries", targets, cadence=64))
    report = run.report(
        *run.decode(ours(reference), [stream], policy, index_keys="tiered"), "lsa", "tiny", "text"
    )
    details = report["scenario"]["details"]["lsa"]
    assert details["index_keys"] == "tiered" and details["measured_layers"] == list(targets)
    measured.show(report, [])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"all in the {len(targets)} of 5 CSA layers that the memory indexer scores" in shown
    assert ("in 2 of 5 CSA layers; not measured in the others" in shown) == (targets == TARGETS)


REFUSED = [
    ("lru", "policy lru has on_miss fetch, .* give --set on_miss=mask, or --index-keys all"),
    ({"policy": "lsa", "on_miss": "fallback"}, "policy lsa has on_miss fallback"),
    (
        {"policy": "recency", "budget": "40%"},
        "policy recency has no memory indexer, .* give --policy lsa, or --index-keys all",
    ),
]


@pytest.mark.parametrize(("spec", "says"), REFUSED, ids=str)
def test_what_needs_all_keys_is_refused(prompts, spec, says):
    with pytest.raises(FmsimError, match="--index-keys tiered: " + says):
        Engine(prompts("cpu")[0], registry.build(spec), index_keys="tiered")


def test_what_was_not_measured_cannot_be_asked_for(prompts, tmp_path):
    spec, prompt = lookahead(tmp_path, "28 entries", TARGETS), prompts("cpu")[0]
    with pytest.raises(FmsimError, match='select="all" takes the scores of all index keys'):
        Engine(prompt, registry.build(spec), index_keys="tiered", select="all")
    engine = Engine(prompt, registry.build(spec), index_keys="tiered")
    engine.generate(2)
    header = trace_header(prompt.model, LENGTHS[0], name="tiny", seed=0, sha256=None, tau=TAU)
    with pytest.raises(
        FmsimError, match=r"what CSA layers \[0, 2, 4\] select among all entries was not measured"
    ):
        trace_of(engine.request, header, [False] * 2)
    with pytest.raises(FmsimError, match=r"CSA layer 2 .* those of layers \[1, 3\] are all there"):
        engine.keys.first(0, 9)[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--record", "it.safetensors"],
            "--record: a trace says what each layer selects among all entries",
        ),
        (
            ["--weights", "synthetic"],
            "--index-keys: with --weights synthetic they lie as `fmsim run` counts them",
        ),
    ],
)
def test_a_users_mistake_is_one_line(arguments, says):
    done = fmsim("exec", *arguments, "--index-keys", "tiered", "--device", "cpu")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_nano_tiers_the_layers_that_its_indexer_is_told_to_leave_out():
    """It scores all three of nano's CSA layers unless told otherwise."""
    done = fmsim(
        "exec",
        "--context",
        "1024",
        "--steps",
        "24",
        "--device",
        "cpu",
        "--json",
        "--index-keys",
        "tiered",
        "--set",
        "layers=[1]",
        "--set",
        "budget=30%",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        report["scenario"]["details"]["lsa"]["measured_layers"] == [1]
        and 0 < report["policies"][0]["mass_kept"] < 1
    )
