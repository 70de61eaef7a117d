"""What the PEFT library writes: its config, its tensor names and its rules for targeting modules."""
