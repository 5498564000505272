"""From files to batches: records, their tokens and labels through the chat template, and the steps of training."""
