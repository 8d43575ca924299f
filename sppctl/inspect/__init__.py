"""Any checkpoint -> certified sparsity, bytes, speed."""
