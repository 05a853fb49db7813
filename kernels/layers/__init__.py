"""What a decoder layer computes besides attention: norms, the MLP's gate and matrix products."""
