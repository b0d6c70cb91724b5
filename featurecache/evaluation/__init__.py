"""Numbers that say how good a model is: pure arrays in, numbers out."""
