"""Scenario files: what a user asks, in YAML."""

from fmsim.scenario.file import PolicySpec, Scenario, ScenarioFile

__all__ = ["PolicySpec", "Scenario", "ScenarioFile"]
