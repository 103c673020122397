"""What a model still answers under each policy, and what the policy keeps for it: `fmsim eval` from
plan to summary.

Each answer becomes a line, a dict of plain values; lines are kept in a file as they come, so that a
run can be interrupted and go on. `summary` makes the table's cells of lines. torch is imported
inside functions only.
"""

from fmsim.experiments.accuracy.ask import run
from fmsim.experiments.accuracy.lines import Lines
from fmsim.experiments.accuracy.plan import Plan, at_budgets, policy_of
from fmsim.experiments.accuracy.summary import summary

__all__ = ["Lines", "Plan", "at_budgets", "policy_of", "run", "summary"]
