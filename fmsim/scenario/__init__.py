"""Scenario files: what a user asks, in YAML."""

from fmsim.scenario.file import NamedPolicy, ScenarioFile, Source
from fmsim.scenario.spec import PolicySpec, Scenario

__all__ = ["NamedPolicy", "PolicySpec", "Scenario", "ScenarioFile", "Source"]
