"""What sppctl knows of transformers' models: checkpoints, decoder blocks, the matrices that can be pruned."""
