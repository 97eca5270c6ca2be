"""What the child does to itself before it becomes the workload."""
