"""Models: from a Hugging Face folder to a forward pass. The operators are those of kernels/."""
