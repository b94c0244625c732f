"""What one device computes of a MoE layer: a plain torch reference for each operation, and Triton beside it."""
