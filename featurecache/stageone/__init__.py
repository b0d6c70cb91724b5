"""The parts of stage one: cells become keys and jobs, are read ahead, computed and committed."""
