"""Arithmetic on quantized bytes: one folder an op, each with a reference and the implementations that can replace
it."""
