"""The key service's policy: one signed file that says which enclaves get which keys, how much, and for how long.

document    the file: its tables, what refuses to load, its digest
access      which signed manifests are served, and to whom
budgets     how much any user may be given
enclaves    accepted evidence held against the policy of today
meaning     a policy as nested maps: what is digested and compared
signing     the detached signature
loading     file, signature and consents become the policy in force; no way back to an older one
lint, diff  for people: what is unwise, and what a change lets in
template    what `policy init` writes
"""

from stip_keyservice.service.policy.access import InstanceRule
from stip_keyservice.service.policy.budgets import Budgets
from stip_keyservice.service.policy.document import (
    POLICY_LIMIT,
    CanaryPolicy,
    LeasePolicy,
    Policy,
    ReleasePolicy,
)

__all__ = ["POLICY_LIMIT", "Budgets", "CanaryPolicy", "InstanceRule", "LeasePolicy", "Policy", "ReleasePolicy"]
