"""A model by name: a preset, a Hugging Face config.json, or a file of layer specs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fmsim.errors import FmsimError, short, shown
from fmsim.files import strict_json, strict_yaml
from fmsim.files.inputs import read_text
from fmsim.geometry import deepseek_v4, deepseek_v41, dsa, minimax_m3
from fmsim.geometry.base import Geometry
from fmsim.geometry.described import from_description
from fmsim.geometry.fields import check_numbers

_FOLDER = resources.files("fmsim.geometry") / "presets"
_FAMILIES: dict[str, Callable[[Mapping[str, Any], str], Geometry]] = {
    deepseek_v4.MODEL_TYPE: deepseek_v4.from_config,
    **dict.fromkeys(deepseek_v41.MODEL_TYPES, deepseek_v41.from_config),
    **dict.fromkeys(dsa.MODEL_TYPES, dsa.from_config),
    **dict.fromkeys(minimax_m3.MODEL_TYPES, minimax_m3.from_config),
}


def from_config(config: Mapping[str, Any], name: str = "") -> Geometry:
    """The geometry of a Hugging Face `config.json`; ValueError names what it lacks."""
    check_numbers(config)
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(
            f"model_type is {kind!r}; known are {known}. Describe another model by its layers"
            " (docs/how-to/describe-a-model.md)"
        )
    return _FAMILIES[kind](config, name or str(config.get("_name_or_path") or "custom"))


class Presets(Mapping[str, Geometry]):
    """The shipped models by name. A file is read when its model is asked for."""

    def __getitem__(self, name: str) -> Geometry:
        if name not in self._names():
            raise KeyError(name)
        return _preset(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    @staticmethod
    @cache
    def _names() -> tuple[str, ...]:
        names = [path.name.removesuffix(".json") for path in _FOLDER.iterdir()]
        return tuple(sorted(names, key=lambda name: (not name.startswith("v4-"), name)))

    def about(self, name: str) -> dict[str, str]:
        """``title`` and ``source`` of a preset."""
        found = _preset_file(name)
        return {"title": found["title"], "source": found["source"]}


PRESETS = Presets()


def _preset_file(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


@cache
def _preset(name: str) -> Geometry:
    found = _preset_file(name)
    if "config" in found:
        return from_config(found["config"], name)
    return from_description(found["model"], name)


def deepseek_v4_named(
    name: str, find: Callable[[str], Path] = Path, where: str = "--model"
) -> deepseek_v4.DeepseekV4Geometry:
    """The same for the GPU backend, which decodes one family; FmsimError for any other."""
    found = geometry_named(name, find, where)
    if not isinstance(found, deepseek_v4.DeepseekV4Geometry):
        raise FmsimError(
            f"{where}: {found.name} is a {found.family} model, and the GPU backend decodes"
            " DeepSeek-V4 only; `fmsim run` and `fmsim plan` take it"
        )
    return found


def geometry_named(
    name: str, find: Callable[[str], Path] = Path, where: str = "--model"
) -> Geometry:
    """A preset by its name, or what a file says: a `config.json` (or the folder that holds one), or
    a YAML file of layer specs.

    ``find`` turns the name into a path; ``where`` leads the message of an FmsimError.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = find(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        text = read_text(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"presets are {', '.join(PRESETS)}"
        raise FmsimError(
            f"{where}: neither a preset nor a model's file: {short(name)}; {hint}"
        ) from None
    found: Geometry
    try:
        if path.suffix in (".yaml", ".yml"):
            found = from_description(strict_yaml.load(text, str(path)), path.stem)
        else:
            config = strict_json.parse(text, str(path))
            if not isinstance(config, dict):
                raise ValueError("it is not a JSON object")
            found = from_config(config, path.resolve().parent.name)
        _check_sizes(found)
        return found
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise FmsimError(f"{shown(path)}: not a usable model ({shown(error)[:300]})") from None


def _check_sizes(geometry: Geometry) -> None:
    """What a field of the wrong kind or size breaks is found here, not half-way."""
    sizes = [float(geometry.full_kv_bytes(4096))]
    with suppress(FmsimError):  # a described model may not say what its steps compute
        sizes.append(geometry.flops_per_token(4096, 1))
    if not all(0 <= size < 1e18 for size in sizes):
        raise ValueError("its sizes are beyond any model's")
