"""Bodies, fusion and head as one network, trained end to end."""
