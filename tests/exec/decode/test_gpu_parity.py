"""bfloat16, on a GPU where there is one: what our decode makes of it is as near to float32 as what
transformers' model makes of it.

In all three runs the weights are the same, rounded to bfloat16 beforehand. Where a run has to
choose entries and experts by scores that are nearly equal, bfloat16 may choose others, and one
token's logits are then far off, in transformers' run as in ours. So the strict test is of models
whose choices no rounding can change; where choices are free the typical token is compared.
"""

import copy
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the oracle is transformers' DeepseekV4ForCausalLM")

from nano_oracle import nano_oracle
from tiny_model import CSA, kinds, oracle

from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.model.weights.loader import allocate, load_model, meta_model
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.policies import registry
from fmsim.trace import read

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: bfloat16 was compared on the CPU only",
    ),
]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
# Whether by kernels: on a CPU, plain torch and the kernels' references; on a GPU the kernels, in a
# CUDA graph.
WAYS = {"cpu": (False, True), "cuda": (True,)}
LENGTHS, STEPS = (
    (40, 7),
    {"cpu": 40, "cuda": 600},
)  # across the ends of windows, of entries, and of 16 pages


class Logits(NamedTuple):
    """float32 [tokens, vocabulary] of three runs."""

    exact: torch.Tensor
    theirs: torch.Tensor
    ours: torch.Tensor

    @property
    def errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Theirs and ours."""
        return (self.theirs - self.exact).abs(), (self.ours - self.exact).abs()


def bfloat16_twins(reference, device: str):
    """``reference``, its weights rounded, as transformers' bfloat16 model and as ours."""
    numbers = [
        *reference.parameters(),
        *(
            part
            for name, part in reference.named_buffers()
            if name.endswith("e_score_correction_bias")
        ),
    ]
    for number in numbers:
        number.data = number.data.bfloat16().float()
    theirs = copy.deepcopy(reference).to(torch.bfloat16)
    # these a loaded model has in float32
    angles = {name: part for name, part in reference.named_buffers() if "inv_freq" in name}
    for name, part in theirs.named_buffers():
        if name in angles:
            part.data = angles[name].clone()
    ours = allocate(meta_model(reference.config, torch.bfloat16), device)
    ours.load_state_dict(reference.state_dict())
    return theirs, ours.eval().requires_grad_(False)


@torch.inference_mode()
def decoded(
    reference, device: str, texts: list[torch.Tensor], steps: int, specs=("full",)
) -> list[Logits]:
    """The prompt's last token and the ``steps`` given tokens after it, of all texts: under each
    policy, in each of the device's `WAYS`.
    """
    reference = reference.to(device)
    theirs, ours = bfloat16_twins(reference, device)
    wholes = [
        [model(text[None].to(device)).logits[0, -steps - 1 :].float() for text in texts]
        for model in (reference, theirs)
    ]
    prompts = [Prompt(ours, text[:-steps].tolist(), steps) for text in texts]
    found = []
    for spec, kernels in product(specs, WAYS[device]):
        batch = Batch(prompts, registry.build(spec), kernels=kernels)
        rows = [batch.logits.float().clone()]
        for step in range(steps):
            batch.step([int(text[step - steps]) for text in texts])
            rows.append(batch.logits.float().clone())
        found.append(Logits(*map(torch.cat, wholes), torch.stack(rows, 1).flatten(0, 1)))
    return found


def random_texts(steps: int, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    return [torch.randint(0, 64, (length + steps,)) for length in lengths]


def clear(found: Logits, error: torch.Tensor) -> torch.Tensor:
    """bool [tokens]: float32's best token leads by more than ``error`` could take from it and add
    to another.
    """
    best = found.exact.topk(2).values
    return best[:, 0] - best[:, 1] > 2 * error


@on_each_device
@settings(max_examples=5 if torch.cuda.is_available() else 3, deadline=None)
@given(
    layers=st.lists(kinds, max_size=3).flatmap(lambda mix: st.permutations([*mix, CSA])),
    experts=st.sampled_from([4, 16]),
    seed=st.integers(0, 99),
)
def test_it_rounds_as_transformers_does_and_greedy_tokens_are_float32s(
    device, layers, experts, seed
):
    """Every expert by the token's id, every entry among the top-k: there is nothing to choose."""
    reference = oracle(
        seed,
        layer_types=layers,
        n_routed_experts=experts,
        num_hash_layers=len(layers),
        index_topk=(LENGTHS[0] + STEPS[device]) // 4,
    )
    for found in decoded(reference, device, random_texts(STEPS[device]), STEPS[device]):
        theirs, ours = found.errors
        assert (
            0 < ours.square().mean().sqrt() < 1.3 * theirs.square().mean().sqrt() < 0.05
        )  # of logits whose deviation is 0.8
        sure = clear(found, 2 * theirs.max())
        assume(sure.any())
        assert torch.equal(found.ours[sure].argmax(-1), found.exact[sure].argmax(-1))


@pytest.mark.slow
@on_each_device
def test_where_choices_are_free_the_typical_token_is_as_near(device):
    specs = "full", {"policy": "lru", "budget": "3x topk", "granularity": 4}
    runs = []
    for seed in range(3):
        reference = oracle(
            seed,
            layer_types=["sliding_attention", CSA, "heavily_compressed_attention", CSA],
            n_routed_experts=16,
            index_topk=8,
        )
        texts = random_texts(STEPS["cpu"], (40, 33))  # for a budget of three times top-k
        runs.append(decoded(reference, device, texts, STEPS["cpu"], specs))
    for of_one_way in zip(*runs):
        found = Logits(*map(torch.cat, zip(*of_one_way)))
        theirs, ours = (error.amax(-1).median() for error in found.errors)
        assert ours < 1.3 * theirs < 0.15
        agreements = [
            (logits.argmax(-1) == found.exact.argmax(-1)).float().mean()
            for logits in (found.theirs, found.ours)
        ]
        assert agreements[1] > agreements[0] - 0.05 > 0.8


@pytest.mark.slow
@on_each_device
def test_nano_decodes_as_near_and_says_the_same(device):
    """The shipped model on real text, with the tokens that it chooses itself."""
    reference = nano_oracle()
    text = torch.from_numpy(
        np.asarray(
            read(Path(__file__).parents[3] / "traces/nano-32k-needles.safetensors").token_ids[1:260]
        ).astype(np.int64)
    )
    for found in decoded(reference, device, [text], 30):
        theirs, ours = (error.amax(-1).median() for error in found.errors)
        assert ours < 1.5 * theirs
        sure = clear(found, 4 * theirs)
        assert sure.sum() > 10 and torch.equal(
            found.ours[sure].argmax(-1), found.exact[sure].argmax(-1)
        )
    model = load_model(MODEL_FOLDER, device, torch.bfloat16)
    texts = text.unfold(0, 100, 40 if device == "cuda" else 80)
    prompts = [Prompt(model, prompt.tolist(), 12) for prompt in texts]
    written, counts = [], []
    for prompt in texts:
        given_ = reference.generate(
            prompt[None].to(device),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(given_.logits).topk(2).values
        written.append(given_.sequences[0, -12:].tolist())
        # after a near tie the texts may part
        counts.append(int((best[:, 0] - best[:, 1] > 4 * theirs).cumprod(0).sum()))
    assert sum(counts) > 5
    for kernels in WAYS[device]:
        batch = Batch(prompts, registry.build("full"), kernels=kernels)
        batch.generate(12)
        for request, expected, count in zip(batch.requests, written, counts, strict=True):
            assert request.tokens[:count] == expected[:count]
