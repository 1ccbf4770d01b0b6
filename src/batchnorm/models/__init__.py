"""Models as torch has them: their norm layers, hooks, modes, buffers, attributes and devices; containers of tensors."""
