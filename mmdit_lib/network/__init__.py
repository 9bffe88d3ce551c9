"""The TensorRT frontend in TensorRT-LLM's manner: networks, tensors, operators, modules. It knows no model."""
