"""Engine folders: building them, reading a network back, and running it with TensorRT or PyTorch."""
