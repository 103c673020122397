"""The conformance kit for policy plug-ins.

from fmsim.testing import check_policy
check_policy(MyPolicy)
"""

from fmsim.testing.policy_checks import check_policy, sample_trace, slot_history

__all__ = ["check_policy", "sample_trace", "slot_history"]
