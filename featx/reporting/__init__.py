"""What people look at: the pages and figures of runs, sweeps and learning curves."""
