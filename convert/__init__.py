"""The other direction: BF16, FP16, FP8 and quantized checkpoints -> INT8 safetensors and GGUF, tensor by tensor.

Nothing here knows ComfyUI; `host/convert.py` does, and `python <this folder>` is the command line.
"""
