"""Shared by all tests; loaded before anything imports torch."""

import os

# Waiting threads that spin make everything else on a busy machine crawl; the command line sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
