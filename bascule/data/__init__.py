"""From problems to token ids: tokenizer, chat format, tasks with exact verifiers, and the train/held-out corpus. No torch."""
