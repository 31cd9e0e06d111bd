"""The files that hold a model's tensors: safetensors, PyTorch's own, GGUF. Each is read tensor by tensor, by key."""
