"""What half maps, masks and poses say about a result: pure functions, from tensors to judgements."""
