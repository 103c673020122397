"""Triton's interpreter without two detours that take more than half of its time and change nothing
of what kernels compute.
"""

from dataclasses import replace

from triton.runtime import interpreter


def quicken() -> None:
    """For this process, once."""
    builder = interpreter.interpreter_builder
    # whether integers overflow is worked out at each operation, and told with `debug` only
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    _patch_once_a_launch()


def _patch_once_a_launch() -> None:
    """Each call of a device function patches the language anew, which a launch leaves patched."""
    launch, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_module(function):
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(function)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_module
