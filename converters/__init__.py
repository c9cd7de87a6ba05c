"""Foreign checkpoints to ours and back; numpy, never Jittor."""
