"""transformers' models as sppctl sees them: checkpoints, decoder blocks, and the matrices that can be pruned."""
