"""How good a quantized model is: what its layers read, which of them are fragile, and how far a file is off its source.

Nothing here knows ComfyUI; `host/profile_activations.py` and `host/verify.py` do, and `python <this folder>` is the
command line.
"""
