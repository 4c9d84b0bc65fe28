"""The operator's front door: admits leases, routes links to replicas, never looks into a tensor."""
