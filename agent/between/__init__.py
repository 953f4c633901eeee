"""What lies between the inspect and the publish process: shared memory, questions, a process to keep alive."""
