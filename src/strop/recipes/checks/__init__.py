"""What is looked at before a run: each check is a function from an open session to findings."""
