"""What a run directory holds: its files and their record, predictions and results, and what is made of them."""
