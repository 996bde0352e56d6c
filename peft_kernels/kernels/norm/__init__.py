"""LayerNorm and RMSNorm, with the residual added in the same pass and every gradient from one read of dy."""
