"""The mixture beside every other way to use the same adapters: methods make models, score scores them."""
