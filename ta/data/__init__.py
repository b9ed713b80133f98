"""Files to prepared records to batches."""
