"""The scripts of TensorRT-LLM's MMDiT example, with the same flags: `python -m mmdit_lib.compat.convert_checkpoint`."""
