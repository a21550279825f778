"""sqa-fx: rewrite the attention of a trained PyTorch model into Sparse Query Attention, and prove it."""
