raise SystemExit("imported a module that a run named")
