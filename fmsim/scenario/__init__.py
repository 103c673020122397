"""Scenario files: what a user asks, in YAML."""

from fmsim.scenario.file import NamedPolicy, PolicySpec, Scenario, ScenarioFile, Source

__all__ = ["NamedPolicy", "PolicySpec", "Scenario", "ScenarioFile", "Source"]
