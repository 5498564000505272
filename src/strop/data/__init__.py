"""From files to batches: records (`records`), tokens and labels (`templates`, `samples`), steps (`batches`, `packing`)."""
