"""Operators of the model on a CPU that PyTorch composes of many passes over memory, each in one pass, in C."""
