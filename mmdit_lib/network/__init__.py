"""A model-independent TensorRT frontend in the style of TensorRT-LLM: networks, tensors, operators, modules."""
