"""What commands with a model or a policy make of their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmsim.policies.base import Policy


def policy_given(name: str, overrides: list[str]) -> Policy:
    """The policy of ``--policy`` with the parameters of ``--set``; FmsimError where one is none."""
    from fmsim.errors import BadParameter, FmsimError, shown
    from fmsim.files import strict_yaml
    from fmsim.policies import registry
    from fmsim.scenario.key_value import key_value

    named, params = registry.split(name)
    for override in overrides:
        key, value = key_value(
            override, f"--set {override}: write key=value, such as --set budget=20%"
        )
        params[key] = strict_yaml.load(value, f"--set {override}")
    try:
        return registry.build({"policy": named} | params)
    except BadParameter as error:
        for override in overrides:
            if override.partition("=")[0].strip() == error.key:
                raise FmsimError(f"--set {shown(override)}: {error}") from None
        raise FmsimError(f"--policy {shown(name)}: {error}") from None


def labels_of(asked: list[str], policies: list[Policy]) -> list[str]:
    """What each policy is called in a report: its name, or where that comes twice as it was
    asked for.
    """
    from fmsim.errors import FmsimError, shown

    names = [policy.name for policy in policies]
    labels = [
        name if names.count(name) == 1 else text for name, text in zip(names, asked, strict=True)
    ]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise FmsimError(f"--policy {shown(twice[0])}: it is there twice; give it once")
    return labels


def device_given(asked: str | None, has_cuda: bool) -> str:
    """The device of ``--device``; without it, the GPU where there is one."""
    from fmsim.errors import FmsimError

    if asked not in (None, "cpu", "cuda"):
        raise FmsimError(f"--device {asked}: write cpu or cuda")
    if asked == "cuda" and not has_cuda:
        raise FmsimError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return asked or ("cuda" if has_cuda else "cpu")
