"""The serving report: what the protected path costs over the plain engine, in time, memory and round trips.

`python -m benchmarks.serving` measures section by section (`sections/`), keeps what each has found in a JSON part of
its own (`records.Part`), and writes one page with plots from all parts that lie there.
"""
