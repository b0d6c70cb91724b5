"""What people look at: plots, reports, comparisons."""
