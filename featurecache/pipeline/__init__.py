"""A declared pipeline: its configuration, plan, stages, state and report."""
