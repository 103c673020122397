"""transformers' model of the shipped nano."""

import pytest
import torch
import transformers

from fmsim.nano.tokenizer import MODEL_FOLDER


def nano_oracle(folder=MODEL_FOLDER):
    """Its float8 weights widened, in float32: on a GPU too, where transformers would have FP8
    kernels of its own.
    """
    pytest.importorskip("accelerate", reason="transformers wants it for float8")
    widened = transformers.FineGrainedFP8Config(dequantize=True)
    found = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=widened
    )
    return found.float().eval()
