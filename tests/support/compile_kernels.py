"""Compiles kernels for a Hopper GPU where there is none: run by tests/exec/test_compile.py,
in a process without the interpreter.

Every launch of a kernel is replaced by a compilation for sm_90 with that launch's arguments, which
finds what an interpreter lets pass: types, shapes, layouts, more shared memory than a
multiprocessor has. Prints one line of JSON a kernel: its launch, its name, shared memory, and how
many loads and matrix instructions it has of each kind.
"""

import json
import re
import sys
from collections import Counter
from functools import partialmethod
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import target_info
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}
TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg")
KINDS = (
    r"griddepcontrol\.\w+|ld\.global[\w:.]*|cp\.async\.c[\w.]*|cp\.async\.bulk\.tensor\.2d"
    r"|wgmma\.mma_async[\w.]*|mma\.sync[\w.]*"
)
SHARED_BYTES = 227 * 1024  # that one program can have on sm_90
ALIGNED = [["tt.divisibility", 16]]


def pointer(tensor: torch.Tensor) -> str:
    return f"*{TYPES[tensor.dtype]}"


def compile_launch(function: JITFunction, launch: str, *args, grid, warmup, **kwargs) -> None:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    given = dict(zip(function.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(function.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(number,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointer(value)
            if value.data_ptr() % 16 == 0:
                attributes[(number,)] = ALIGNED
        elif isinstance(value, TensorDescriptor):
            kind = TYPES[value.base.dtype]
            signature[parameter.name] = f"tensordesc<{kind}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, tuple) and isinstance(value[0], int):
            signature[parameter.name] = ("i32",) * len(value)
        elif isinstance(value, tuple):  # of tensors
            signature[parameter.name] = tuple(map(pointer, value))
            attributes |= {
                (number, place): ALIGNED
                for place, tensor in enumerate(value)
                if tensor.data_ptr() % 16 == 0
            }
        elif value == 1:  # Triton makes a constant of it
            signature[parameter.name], constants[(number,)] = "constexpr", 1
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(number,)] = ALIGNED
    source = GluonASTSource if function.is_gluon() else ASTSource
    compiled = triton.compile(
        source(function, signature, constants, attributes), target=TARGET, options=options
    )
    ptx = compiled.asm["ptx"]
    kinds = dict(sorted(Counter(re.findall(KINDS, ptx)).items()))
    print(
        json.dumps(
            {
                "launch": launch,
                "kernel": function.__name__,
                "warps": options.get("num_warps"),
                "shared_bytes": compiled.metadata.shared,
                "ptx": kinds,
            }
        )
    )
    assert compiled.metadata.shared <= SHARED_BYTES, (
        f"{function.__name__} needs {compiled.metadata.shared} bytes of shared memory"
    )


def main() -> None:
    from kernel_launches import LAUNCHES
    from nano_training.launches import LAUNCHES as TRAINING

    target_info.driver = SimpleNamespace(
        active=SimpleNamespace(get_current_target=lambda: TARGET)
    )  # what kernels ask for
    launches = LAUNCHES | TRAINING
    for name in sys.argv[1:] or launches:
        JITFunction.run = partialmethod(compile_launch, name)
        launches[name]()


if __name__ == "__main__":
    main()
