"""What a run leaves for others: its adapter as plain PEFT and transformers load it."""
