"""Lowbit's kernels beside other projects', measured on a GPU. Nothing imports this folder; run.py starts it."""
