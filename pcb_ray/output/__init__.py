"""The output folder: where it may go, its state while it is unfinished, the files beside the tensors, and how it gets its name."""
