"""What tuner, report and benchmarks measure with: timing, checks of results, data, and competitors of a step."""
