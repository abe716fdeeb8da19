"""The losses inside other libraries' models. Each is imported by name, and imports nothing else."""
