"""`stip-keyservice doctor`: what is wrong with a key service, and what to do about it.

Every check stands alone, is bounded in time, changes nothing, and works while the service runs, while it is stopped and
while something is broken: one that fails, hangs or raises says so, and the others go on. `table.CHECKS` lists them.
"""
