"""The cache: recipes, index, chunked arrays and their verification. Knows no torch."""
