"""Commands, output, prompts."""
