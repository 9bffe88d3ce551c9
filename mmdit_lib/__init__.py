"""Stable Diffusion 3 / 3.5's transformer (the MMDiT) as TensorRT engines, on one GPU or many."""
