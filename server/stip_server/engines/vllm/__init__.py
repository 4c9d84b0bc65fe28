"""The engine on vLLM: what outgrows one GPU or one machine, and decoding alone at vLLM's own speed.

Nothing is imported here: `surroundings.surround` comes before anything that imports vLLM.
"""
