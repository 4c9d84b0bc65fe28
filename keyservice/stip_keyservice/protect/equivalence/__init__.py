"""That a protected instance computes what its source computes: certificates and their verification."""
