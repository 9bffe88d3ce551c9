"""Engine folders: building them, reading a network back, running it by TensorRT or by PyTorch."""
