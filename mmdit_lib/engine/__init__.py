"""Engine folders: building them, reading a network back, running it with TensorRT or with PyTorch."""
