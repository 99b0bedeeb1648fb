"""What is there: the model, the machine, the workload."""
