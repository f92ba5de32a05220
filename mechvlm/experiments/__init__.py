"""Experiments: one function each, over any number of examples, with a typed result."""
