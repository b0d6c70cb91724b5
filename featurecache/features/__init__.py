"""What stage two reads: rows of features, stored, stacked, streamed, rearranged or paired; masks to learn from."""
