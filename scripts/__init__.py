"""What users run: each file is a command."""
