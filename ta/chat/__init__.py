"""Messages to token ids and loss weights; nothing here imports torch."""
