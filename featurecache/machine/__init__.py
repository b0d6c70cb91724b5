"""The machine that this runs on: its memory, its cores and files, its signals, its libraries."""
