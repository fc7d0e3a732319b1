"""Speed benchmarks: the workloads that are compared, and how they are timed."""
