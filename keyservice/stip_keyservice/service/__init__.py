"""The key service: users, instances, releases, leases and the audit log. No torch, nothing of `protect`."""
