"""All parts of STIP on one machine, as real processes, with a simulated TEE: for demos, tests and benchmarks.

Production parts never import this package.
"""
