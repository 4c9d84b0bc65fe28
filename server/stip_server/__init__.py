"""The model server: one gRPC service over an engine that steps a protected model.

It holds the server part of an instance and nothing that opens it. Rows come in, hidden states or permuted top
logits go out; which session belongs to whom, what a row stands for and what an output means it cannot know.
"""
