"""What makes pixels and numbers comparable between the trainer and the agent. Torch-free."""
