"""Two-stage feature extraction with cached embeddings; public names are imported when first used."""
