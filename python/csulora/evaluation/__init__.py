"""What policies are worth on prompts that nothing was fitted to or chosen by."""
