"""From a source's images to the prepared folder of a task, and from there to tensors."""
