"""nano's greedy decode beside transformers' own `generate`: the same weights, prompt, number type
and device, in one run.

    python benchmarks/generate.py [--context 8192] [--steps 256] [--budget 10%] [--device cuda]
    [--repeats 3] [--out FILE]

float32, as `fmsim exec` runs nano. The prompt is fmsim's own source with facts woven in. Reading it
(prefill) and decoding are timed apart: a decode step's time is that of the tokens after the first
few, in which either side still compiles, captures or allocates. transformers decodes with its
default cache and expert implementation; it has no static cache for this architecture, so it cannot
be compiled whole.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    DeepseekV4ForCausalLM,
    FineGrainedFP8Config,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.model.weights.loader import load_model
from fmsim.nano.question import TEXT, haystack, questions
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.policies import registry

FIRST_STEPS = 4  # not timed
WIDENED = FineGrainedFP8Config(dequantize=True)  # transformers would use FP8 kernels on a GPU


class Decode(NamedTuple):
    tokens: list[int]
    step_s: float


class Clock(StoppingCriteria):
    """When each token of `generate` was there; stops nothing."""

    def __init__(self, device: str):
        self.device, self.at_s = device, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.at_s.append(now_s(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now_s(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def theirs(
    model: DeepseekV4ForCausalLM, prompt: Sequence[int], steps: int, device: str
) -> tuple[Decode, float]:
    """transformers' greedy tokens; -> also seconds to the first token, which is the prefill."""
    clock, start_s = Clock(device), now_s(device)
    ids = torch.tensor([list(prompt)], device=device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    timed_s = clock.at_s[-1] - clock.at_s[FIRST_STEPS]
    return (
        Decode(out[0, len(prompt) :].tolist(), timed_s / (steps - 1 - FIRST_STEPS)),
        clock.at_s[0] - start_s,
    )


def ours(prompt: Prompt, policy: dict[str, Any], steps: int, device: str) -> Decode:
    engine = Engine(prompt, registry.build(policy))
    engine.generate(FIRST_STEPS)
    start_s = now_s(device)
    engine.generate(steps - FIRST_STEPS)
    return Decode(engine.tokens, (now_s(device) - start_s) / (steps - FIRST_STEPS))


def row(runs: Sequence[Decode], expected: Sequence[int]) -> dict[str, Any]:
    """A side's figures over its repeats, and where its tokens leave transformers'."""
    rates, tokens = sorted(1 / run.step_s for run in runs), runs[0].tokens
    differing = [
        place
        for place, (one, other) in enumerate(zip(tokens, expected, strict=True))
        if one != other
    ]
    return {
        "tokens_per_s": round(statistics.median(rates), 2),
        "all_tokens_per_s": [round(rate, 2) for rate in rates],
        "same_every_time": all(run.tokens == tokens for run in runs),
        "tokens_equal": len(tokens) - len(differing),
        "first_differing": differing[0] if differing else None,
    }


def measure(
    context: int, steps: int, policies: dict[str, dict[str, Any]], device: str, repeats: int
) -> dict[str, Any]:
    text = questions(context, steps, 0, haystack()).prompt.tolist()
    model, oracle = (
        load_model(MODEL_FOLDER, device),
        DeepseekV4ForCausalLM.from_pretrained(
            MODEL_FOLDER, dtype=torch.bfloat16, quantization_config=WIDENED
        )
        .float()
        .to(device)
        .eval(),
    )
    runs: dict[str, list[Decode]] = {"transformers": [], **{name: [] for name in policies}}
    prefills: dict[str, list[float]] = {"transformers": [], "fmsim": []}
    for repeat in range(repeats):  # in turn, so that whatever else the machine does falls on all
        decode, prefill_s = theirs(oracle, text, steps, device)
        runs["transformers"].append(decode)
        start_s = now_s(device)
        prompt = Prompt(model, text, steps)
        prefills["fmsim"].append(now_s(device) - start_s)
        prefills["transformers"].append(prefill_s)
        for name, policy in policies.items():
            runs[name].append(ours(prompt, policy, steps, device))
        print(
            f"run {repeat + 1} of {repeats}: "
            + ", ".join(
                f"{name} {1 / sides[-1].step_s:.1f} tokens/s" for name, sides in runs.items()
            ),
            flush=True,
        )
    rows = {name: row(sides, runs["transformers"][0].tokens) for name, sides in runs.items()}
    base = rows["transformers"]["tokens_per_s"]
    return {
        "prefill_s": {
            name: [round(seconds, 3) for seconds in sorted(taken)]
            for name, taken in prefills.items()
        },
        "decode": {
            name: figures | {"times_transformers": round(figures["tokens_per_s"] / base, 2)}
            for name, figures in rows.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--context", type=int, default=8192, help="tokens of the prompt, 1024 or more"
    )
    parser.add_argument("--steps", type=int, default=256, help="tokens to decode")
    parser.add_argument(
        "--budget",
        default="10%",
        help="of lsa; a short context needs a larger share for what it always keeps",
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "generate.json"
    )
    given = parser.parse_args()
    if given.context < 1024 or given.steps < FIRST_STEPS + 4 or given.repeats < 1:
        parser.error(
            f"--context is 1024 or more, --steps {FIRST_STEPS + 4} or more, --repeats 1 or more"
        )
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    policies = {"full": {"policy": "full"}, "lsa": {"policy": "lsa", "budget": given.budget}}
    try:
        figures = measure(given.context, given.steps, policies, given.device, given.repeats)
    except FmsimError as error:
        sys.exit(str(error))
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": (
            torch.cuda.get_device_name()
            if given.device == "cuda"
            else f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        ),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "model": "nano, float32",
        "prompt": TEXT,
        "context_tokens": given.context,
        "steps": given.steps,
        "policies": policies,
    } | figures
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, side in result["decode"].items():
        print(
            f"{name:12} {side['tokens_per_s']:9.1f} tokens/s, {side['times_transformers']:5.2f}"
            f" times transformers'; {side['tokens_equal']} of {given.steps} tokens are"
            " transformers'"
        )
    print(f"prefill, seconds: {result['prefill_s']}; written to {given.out}")


if __name__ == "__main__":
    main()
