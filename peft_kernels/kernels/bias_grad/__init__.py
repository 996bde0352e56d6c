"""Bias gradients: dbias = dy.sum(0), also in one pass with an activation's backward, and a linear around them."""
