"""Measures of numbers and words, without a model: phases of curves, words against captions."""
