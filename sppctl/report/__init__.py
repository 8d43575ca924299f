"""Records of runs -> tables, figures, pages."""
