"""The conformance kit for policy plug-ins.

from fmsim import check_policy
check_policy(MyPolicy)
"""

from fmsim.testing.checks import PolicyCheck, check_policy, policy_checks
from fmsim.testing.sample import sample_trace

__all__ = ["PolicyCheck", "check_policy", "policy_checks", "sample_trace"]
